//! A layer of files that means harm, written for real: whatever it says, nothing outside of its root changes.
#![no_main]

use libfuzzer_sys::{fuzz_crossover, fuzz_mutator, fuzz_target};
use pod_migrate::image::Reader;
use pod_migrate::storage::{Writing, receive_layer};
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

fuzz_mutator!(|data: &mut [u8], size: usize, most: usize, seed: u32| {
    pod_fuzz::mutate_stream(data, size, most, seed)
});
fuzz_crossover!(|one: &[u8], other: &[u8], out: &mut [u8], seed: u32| {
    pod_fuzz::cross_streams(one, other, out, seed)
});

/// In memory: a layer is made and taken away some thousand times a second. `root` is the layer's, the rest is not.
static PLACE: LazyLock<PathBuf> = LazyLock::new(|| {
    let place = PathBuf::from(format!("/dev/shm/pod-fuzz-layer-{}", std::process::id()));
    let _ = fs::remove_dir_all(&place);
    fs::create_dir_all(place.join("dir")).expect("a place in /dev/shm");
    fs::write(place.join("dir/file"), b"not yours").expect("written");
    fs::write(place.join("x"), b"not yours").expect("written");
    place
});

/// Everything about what must not change, in one text.
fn outside() -> String {
    let mut text = String::new();
    for name in ["", "dir", "dir/file", "x"] {
        let meta = fs::symlink_metadata(PLACE.join(name)).unwrap_or_else(|error| panic!("'{name}': {error}"));
        // The layer's own root comes and goes in the first.
        let mtime = if name.is_empty() { 0 } else { meta.mtime_nsec() };
        text += &format!("{name} {:o} {}:{} {} {mtime}\n", meta.mode(), meta.uid(), meta.gid(), meta.nlink());
    }
    let mut names: Vec<_> = fs::read_dir(&*PLACE).expect("listed").flatten().map(|e| e.file_name()).collect();
    names.sort();
    let contents = ["dir/file", "x"].map(|name| fs::read_to_string(PLACE.join(name)).expect("read"));
    format!("{text}{names:?}{contents:?}{}", fs::read_dir(PLACE.join("dir")).expect("listed").count())
}

/// What an earlier pass, or the pod itself, may have left there.
fn prepare(root: &Path) {
    fs::create_dir_all(root.join("dir")).expect("made");
    fs::write(root.join("dir/file"), b"old").expect("written");
    symlink("..", root.join("up")).expect("linked");
    symlink("../dir/file", root.join("link")).expect("linked");
    symlink(PLACE.join("dir"), root.join("dir/away")).expect("linked");
}

fuzz_target!(|data: &[u8]| {
    // At its end the process leaves the place behind, once, for /dev/shm to be looked at; fuzz.sh takes it away.
    let root = PLACE.join("root");
    prepare(&root);
    let before = outside();
    let Ok(mut reader) = Reader::new(data) else { return drop(fs::remove_dir_all(&root)) };
    for keep in [false, true] {
        let open = File::open(&root).expect("the root is there");
        let _ = receive_layer(&mut reader, Writing::new(open.into(), keep));
        assert_eq!(outside(), before, "something outside of the layer changed");
    }
    fs::remove_dir_all(&root).expect("removed");
});
