//! A pod's spec as JSON, and what is checked of one that comes from elsewhere.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pod_runtime::spec::Spec;

fuzz_target!(|data: &[u8]| {
    if let Ok(spec) = serde_json::from_slice::<Spec>(data)
        && pod_migrate::arrival::check_spec(&spec).is_ok()
    {
        assert!(!spec.name.contains('/') && !spec.id.contains('/'));
        assert!(spec.volumes.iter().all(|v| v.source.is_absolute()));
    }
});
