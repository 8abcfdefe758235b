//! Texts that come from other hosts or from files that anybody may have edited. The first byte says which.
#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use pod_migrate::link::dial::Target;
use pod_migrate::migrate::journal::Job;
use pod_runtime::network::named::{Definition, Subnet};
use pod_runtime::security::capabilities::Set;
use pod_runtime::security::seccomp;
use pod_runtime::spec::{Seccomp, Spec};
use pod_runtime::status::Status;
use pod_runtime::{events, monitor, when};

fuzz_mutator!(|data: &mut [u8], size: usize, most: usize, seed: u32| {
    pod_fuzz::mutate_json(data, size, most, seed, 1)
});

/// A spec behind its letter.
const SPEC: &str = include_str!("../corpus/config/spec");

fuzz_target!(|data: &[u8]| {
    let Some((which, rest)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(rest);
    match which {
        b's' => spec(rest),
        b'j' => drop(serde_json::from_slice::<Job>(rest)),
        b't' => drop(serde_json::from_slice::<Status>(rest).map(Status::corrected)),
        b'n' => network(&text),
        b'p' => profile(&text),
        b'l' => drop(monitor::log::decode(rest)),
        b'e' => drop(events::parse(&text).count()),
        b'w' => drop((when::parse(&text, 1_700_000_000), when::parse_duration(&text))),
        b'h' => {
            if let Ok(target) = Target::parse(&text) {
                assert!(!target.host.starts_with('-') && !target.host.contains(char::is_whitespace));
            }
        }
        b'c' => drop(Set::parse(&text.split(',').map(String::from).collect::<Vec<_>>())),
        b'i' => drop(serde_json::from_slice::<pod_runtime::monitor::wire::Request>(rest)),
        _ => {}
    }
});

fn spec(bytes: &[u8]) {
    let Ok(spec) = serde_json::from_slice::<Spec>(bytes) else { return };
    let _ = seccomp::program(&spec);
    if pod_migrate::arrival::check_spec(&spec).is_ok() {
        assert!(!spec.name.contains('/') && !spec.id.contains('/'));
        assert!(spec.volumes.iter().all(|v| v.source.is_absolute() && v.destination.is_absolute()));
    }
}

/// A seccomp profile, as docker or OCI write it, up to the filter that is made of it.
fn profile(text: &str) {
    let Ok(mut spec) = serde_json::from_str::<Spec>(&SPEC[1..]) else { return };
    spec.security.seccomp = Seccomp::Profile(text.to_owned());
    let _ = seccomp::program(&spec);
}

fn network(text: &str) {
    let Ok(network) = toml::from_str::<Definition>(text) else { return };
    for one in &network.subnets {
        assert!(one.contains(one.base));
        assert_eq!(one.to_string().parse::<Subnet>().as_ref(), Ok(one));
        network.subnets.iter().for_each(|other| assert_eq!(one.overlaps(other), other.overlaps(one)));
    }
}
