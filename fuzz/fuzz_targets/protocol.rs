//! What a hostile peer may say, on both sides; and the entries of a hostile layer of files.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pod_migrate::image::{Kind, Reader, Writer};
use pod_migrate::migrate::protocol::{Answer, Say};
use pod_migrate::storage::Entry;

fuzz_target!(|data: &[u8]| {
    let Ok(value) = ciborium::from_reader::<ciborium::Value, _>(data) else { return };
    let mut w = Writer::new(Vec::new());
    w.put(Kind::MESSAGE, 0, &value).unwrap();
    let stream = w.finish().unwrap();
    let mut reader = Reader::new(&stream[..]).unwrap();
    let record = reader.next().unwrap().unwrap();
    let _ = record.state::<Say>();
    let _ = record.state::<Answer>();
    let _ = record.state::<Entry>();
});
