//! The image reader, and what a restore believes of an image before it makes anything of it.
#![no_main]

use libfuzzer_sys::{fuzz_crossover, fuzz_mutator, fuzz_target};
use pod_migrate::image::{Reader, verify};
use pod_migrate::objects::files::{FileState, socket};
use pod_migrate::restore::Image;
use pod_runtime::spec::{Seccomp, Security};

fuzz_mutator!(|data: &mut [u8], size: usize, most: usize, seed: u32| {
    pod_fuzz::mutate_stream(data, size, most, seed)
});
fuzz_crossover!(|one: &[u8], other: &[u8], out: &mut [u8], seed: u32| {
    pod_fuzz::cross_streams(one, other, out, seed)
});

fuzz_target!(|data: &[u8]| {
    let _ = verify(data);
    let Ok(mut reader) = Reader::new(data) else { return };
    let Ok(image) = Image::collect(&mut reader, |_, _| Ok(())) else { return };
    // As the restore walk goes on: terminals by session, rights of sockets, pages to their owners.
    let _ = image.files.controlling_terminals();
    let rights = Security { privileged: false, capabilities: Vec::new(), seccomp: Seccomp::Default };
    for file in image.files.files.values() {
        if let FileState::Socket(state) = &file.state {
            let _ = socket::permitted(state, &rights);
        }
    }
    let mut buffer = [0; 4096];
    while let Ok(Some(_)) = reader.next() {
        while reader.read_pages(&mut buffer).is_ok_and(|n| n > 0) {}
    }
});
