//! The image reader on anything, and on streams whose checksums are right but whose records say anything.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pod_migrate::ids::MmId;
use pod_migrate::image::{Kind, Owner, PageRun, Reader, Writer};
use pod_migrate::restore::Image;

fuzz_target!(|data: &[u8]| {
    let _ = pod_migrate::image::verify(data);
    // The first byte of each piece chooses a kind; its CBOR is the rest.
    let mut w = Writer::new(Vec::new());
    for piece in data.chunks(64) {
        let kind = Kind(u16::from(piece[0]));
        if kind.is_raw() {
            let run = PageRun { owner: Owner::Mm(MmId(1)), address: 4096, bytes: piece.len() as u64 };
            w.pages(run, &[piece]).unwrap();
        } else if let Ok(value) = ciborium::from_reader::<ciborium::Value, _>(&piece[1..]) {
            w.put(kind, u64::from(piece[0]), &value).unwrap();
        }
    }
    let image = w.finish().unwrap();
    let mut reader = Reader::new(&image[..]).unwrap();
    let _ = Image::collect(&mut reader, |_, _| Ok(()));
});
