//! Layers there and back on real files; hostile ones. The node tests need root and say so by their names.

use super::*;
use crate::image::{Kind, Owner, PageRun, Reader, Writer};
use pod_runtime::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufRead, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

fn root_of(path: &Path) -> std::os::fd::OwnedFd {
    File::open(path).unwrap().into()
}

fn send(from: &Path, before: Option<&Inventory>) -> (Vec<u8>, Inventory, Sent) {
    send_as(from, before, Manner::Whole)
}

fn send_as(from: &Path, before: Option<&Inventory>, manner: Manner) -> (Vec<u8>, Inventory, Sent) {
    let mut w = Writer::new(Vec::new());
    let tree = Tree::open(from).unwrap();
    let (inventory, sent) = walk(&tree, &mut w, &mut 1, before, &Mapped::default(), manner).unwrap();
    w.put(Kind::STORAGE_END, 0, &()).unwrap();
    (w.finish().unwrap(), inventory, sent)
}

fn receive(image: &[u8], to: &Path) -> Result<Arrived> {
    receive_layer(&mut Reader::new(image).unwrap(), Writing::new(root_of(to), false))
}

/// Everything that can be compared of a tree, by path.
fn picture(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut to_read = vec![root.to_owned()];
    while let Some(dir) = to_read.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let mut text = format!(
                "{:o} {}:{} {} {}.{} links {} dev {}",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                if meta.is_dir() { 0 } else { meta.len() },
                meta.mtime(),
                meta.mtime_nsec(),
                if meta.is_dir() { 0 } else { meta.nlink() },
                meta.rdev()
            );
            if meta.is_symlink() {
                text += &format!(" -> {:?}", fs::read_link(&path).unwrap());
            } else if meta.is_file() {
                text += &format!(" {}", blake3::hash(&fs::read(&path).unwrap()));
            } else if meta.is_dir() {
                to_read.push(path.clone());
            }
            found.insert(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned(), text);
        }
    }
    found
}

fn settle() {
    // Past the grain of the stamps.
    std::thread::sleep(std::time::Duration::from_millis(25));
}

fn make_tree(root: &Path) {
    fs::create_dir_all(root.join("a/b")).unwrap();
    fs::write(root.join("a/b/file"), vec![3; 3_000_000]).unwrap();
    fs::write(root.join("empty"), b"").unwrap();
    fs::hard_link(root.join("a/b/file"), root.join("a/second name")).unwrap();
    symlink("/etc/passwd", root.join("a/link")).unwrap();
    symlink("..", root.join("a/b/up")).unwrap();
    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.write_all_at(b"end", 100 << 20).unwrap();
    fs::set_permissions(root.join("a/b"), fs::Permissions::from_mode(0o1711)).unwrap();
    assert!(Command::new("mkfifo").arg(root.join("fifo")).status().unwrap().success());
}

#[test]
fn a_tree_arrives_as_it_was() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(from.path());
    let (image, _, sent) = send(from.path(), None);
    assert!(sent.bytes < 4_000_000, "holes are not sent: {sent:?}");
    receive(&image, to.path()).unwrap();
    assert_eq!(picture(from.path()), picture(to.path()));
    assert_eq!(
        fs::metadata(to.path().join("a/b/file")).unwrap().ino(),
        fs::metadata(to.path().join("a/second name")).unwrap().ino()
    );
    assert!(fs::metadata(to.path().join("sparse")).unwrap().blocks() < 100, "holes stay holes");
    assert_eq!(fs::metadata(from.path()).unwrap().mtime_nsec(), fs::metadata(to.path()).unwrap().mtime_nsec());
}

#[test]
fn a_delta_carries_only_what_changed() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(from.path());
    fs::create_dir_all(from.path().join("gone/deep")).unwrap();
    fs::write(from.path().join("gone/deep/x"), b"x").unwrap();
    fs::write(from.path().join("becomes a directory"), b"x").unwrap();
    settle();
    let (image, inventory, _) = send(from.path(), None);
    receive(&image, to.path()).unwrap();

    let (_, _, nothing) = send(from.path(), Some(&inventory));
    assert_eq!((nothing.files, nothing.removed), (0, 0), "{nothing:?}");

    fs::remove_dir_all(from.path().join("gone")).unwrap();
    fs::remove_file(from.path().join("becomes a directory")).unwrap();
    fs::create_dir(from.path().join("becomes a directory")).unwrap();
    fs::write(from.path().join("becomes a directory/new"), b"new").unwrap();
    fs::rename(from.path().join("a/b"), from.path().join("a/renamed")).unwrap();
    fs::write(from.path().join("empty"), b"not any more").unwrap();
    let (image, _, sent) = send(from.path(), Some(&inventory));
    assert!(sent.removed >= 2 && sent.bytes < 4_000_000, "{sent:?}");
    receive(&image, to.path()).unwrap();
    assert_eq!(picture(from.path()), picture(to.path()));
}

#[test]
fn a_changed_file_leaves_the_times_of_its_directory() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(from.path());
    settle();
    let (image, inventory, _) = send(from.path(), None);
    receive(&image, to.path()).unwrap();
    File::options().append(true).open(from.path().join("a/b/file")).unwrap().write_at(b"more", 3_000_000).unwrap();
    let (image, ..) = send(from.path(), Some(&inventory));
    receive(&image, to.path()).unwrap();
    assert_eq!(picture(from.path()), picture(to.path()));
}

#[test]
fn of_a_changed_file_only_what_changed_is_sent() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(from.path());
    settle();
    let (image, first, _) = send_as(from.path(), None, Manner::Blocks);
    receive(&image, to.path()).unwrap();
    let file = File::options().write(true).open(from.path().join("a/b/file")).unwrap();
    file.write_at(b"other", 1_000_000).unwrap();
    let sparse = File::options().write(true).open(from.path().join("sparse")).unwrap();
    sparse.write_at(b"middle", 50 << 20).unwrap();
    let (image, second, sent) = send_as(from.path(), Some(&first), Manner::Blocks);
    assert!(sent.bytes <= 3 << 14, "{sent:?}");
    receive(&image, to.path()).unwrap();
    assert_eq!(picture(from.path()), picture(to.path()));
    assert!(fs::metadata(to.path().join("sparse")).unwrap().blocks() < 200, "holes stay holes");
    // And what was a change counts as sent.
    settle();
    file.set_len(100).unwrap();
    file.set_len(2_000_000).unwrap();
    sparse.set_len(5).unwrap();
    let (image, _, sent) = send_as(from.path(), Some(&second), Manner::Blocks);
    assert!(sent.bytes <= 2_000_000, "{sent:?}");
    receive(&image, to.path()).unwrap();
    assert_eq!(picture(from.path()), picture(to.path()));
}

/// Pass after pass over files that are written, cut, punched, renamed, linked and replaced at random.
#[test]
fn changes_make_the_same_tree() {
    use rand_like::Random;
    let seed = std::env::var("SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let mut random = Random(seed);
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // Names between that of a directory and those in it.
    let path = |n: u64| from.path().join(["a", "d/x", "d/y", "d.z", "d-z", "d/x.y"][n as usize]);
    let mut before: Option<Inventory> = None;
    for pass in 0..40 {
        for _ in 0..random.below(6) {
            let (one, other) = (path(random.below(6)), path(random.below(6)));
            let directory = from.path().join("d");
            match random.below(6) {
                0 => drop(fs::remove_dir_all(&directory)),
                1 if fs::remove_dir_all(&directory).is_ok() => fs::write(&directory, "a file").unwrap(),
                2 if fs::remove_dir_all(&directory).is_ok() => symlink("a", &directory).unwrap(),
                _ => {}
            }
            if !fs::symlink_metadata(&directory).is_ok_and(|meta| meta.is_dir()) {
                if random.below(2) == 0 {
                    continue;
                }
                let _ = fs::remove_file(&directory);
                fs::create_dir(&directory).unwrap();
            }
            // Some are compared in several parts.
            let (far, long) = [(200_000, 70_000), (4_000_000, 1_500_000)][random.below(2) as usize];
            let (at, length) = (random.below(far), 1 + random.below(long));
            let open = || File::options().create(true).truncate(false).write(true).open(&one).unwrap();
            match random.below(8) {
                0..3 => drop(open().write_all_at(&vec![1 + random.below(3) as u8; length as usize], at)),
                3 => open().set_len(at).unwrap(),
                4 => open().write_all_at(&vec![0; length as usize], at).unwrap(),
                5 => {
                    let how = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
                        | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
                    let _ = nix::fcntl::fallocate(open(), how, at as i64, length as i64);
                }
                6 => drop(fs::rename(&one, &other)),
                _ => drop(fs::remove_file(&other).and_then(|()| fs::hard_link(&one, &other))),
            }
        }
        if random.below(2) == 0 {
            settle();
        }
        let (image, now, _) = send_as(from.path(), before.as_ref(), Manner::Blocks);
        receive(&image, to.path()).unwrap();
        assert_eq!(picture(from.path()), picture(to.path()), "SEED={seed}, pass {pass}");
        before = Some(now);
    }
}

mod rand_like {
    /// xorshift: the same for the same seed.
    pub struct Random(pub u64);

    impl Random {
        pub fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % n
        }
    }
}

#[test]
fn a_store_that_leaves_no_stamp_is_found() {
    let (from, to) = (tempfile::tempdir_in("/dev/shm").unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
    let path = from.path().join("mapped");
    fs::write(&path, vec![5; 300_000]).unwrap();
    fs::hard_link(&path, from.path().join("other name")).unwrap();
    let program = "import mmap, sys
opened = open(sys.argv[1], 'r+b')
file = mmap.mmap(opened.fileno(), 0)
file[7] = 5
print('mapped', flush=True)
sys.stdin.readline()
file[8] = 6
print('stored', flush=True)
sys.stdin.readline()";
    let mut command = Command::new("python3");
    let mut writer = command
        .args(["-c", program])
        .arg(&path)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut says = std::io::BufReader::new(writer.stdout.take().unwrap());
    let mut line = || {
        let mut line = String::new();
        says.read_line(&mut line).unwrap();
        line
    };
    assert_eq!(line(), "mapped\n");
    settle();
    let (image, first, _) = send_as(from.path(), None, Manner::Blocks);
    receive(&image, to.path()).unwrap();
    let stamp = || fs::metadata(&path).map(|meta| (meta.ctime_nsec(), meta.mtime_nsec())).unwrap();
    let stamped = stamp();
    writer.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    assert_eq!(line(), "stored\n");
    assert_eq!(stamp(), stamped, "this kernel stamps it: this test shows nothing");
    let tree = Tree::open(from.path()).unwrap();
    let pass = |mapped: &Mapped| {
        let mut w = Writer::new(Vec::new());
        let (_, sent) = walk(&tree, &mut w, &mut 1, Some(&first), mapped, Manner::Blocks).unwrap();
        w.put(Kind::STORAGE_END, 0, &()).unwrap();
        (w.finish().unwrap(), sent)
    };
    assert_eq!(pass(&Mapped::default()).1.files, 0);
    let other_name = BTreeSet::from([b"other name".to_vec()]);
    assert_eq!(pass(&Mapped { paths: other_name, ..Mapped::default() }).1.bytes, 1 << 14);
    let (image, sent) = pass(&Mapped { any: true, ..Mapped::default() });
    assert_eq!((sent.files, sent.bytes), (1, 1 << 14));
    receive(&image, to.path()).unwrap();
    assert_eq!(picture(from.path()), picture(to.path()));
    drop(writer.stdin.take());
    writer.wait().unwrap();
}

#[test]
fn a_change_of_what_is_no_file_is_refused() {
    let to = tempfile::tempdir().unwrap();
    let outside = tempfile::NamedTempFile::new().unwrap();
    symlink(outside.path(), to.path().join("link")).unwrap();
    fs::create_dir(to.path().join("directory")).unwrap();
    assert!(Command::new("mkfifo").arg(to.path().join("fifo")).status().unwrap().success());
    for name in ["link", "directory", "fifo", "nothing", "directory/nothing"] {
        let mut w = Writer::new(Vec::new());
        let meta = Meta { mode: 0o644, uid: 0, gid: 0, accessed: (0, 0), modified: (0, 0), attributes: Vec::new() };
        let path = serde_bytes::ByteBuf::from(name);
        w.put(Kind::STORAGE_ENTRY, 1, &Entry { path, node: Node::Patch { size: 5 }, meta: Some(meta) }).unwrap();
        let run = PageRun { owner: Owner::Storage(1), address: 0, bytes: 5 };
        w.pages(run, &[b"wrong"]).unwrap();
        w.put(Kind::STORAGE_END, 0, &()).unwrap();
        let problem = receive(&w.finish().unwrap(), to.path()).unwrap_err();
        assert_eq!(problem.code(), crate::image::DAMAGED, "{name}");
        assert_eq!(fs::metadata(outside.path()).unwrap().len(), 0);
    }
}

#[test]
fn mapped_files_are_sent_again() {
    let from = tempfile::tempdir().unwrap();
    make_tree(from.path());
    settle();
    let (_, inventory, _) = send(from.path(), None);
    let mapped = Mapped { paths: BTreeSet::from([b"empty".to_vec()]), ..Mapped::default() };
    let tree = Tree::open(from.path()).unwrap();
    let (_, sent) =
        walk(&tree, &mut Writer::new(Vec::new()), &mut 1, Some(&inventory), &mapped, Manner::Whole).unwrap();
    assert_eq!(sent.files, 1);
}

#[test]
fn a_file_alone_is_a_layer() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(from.path());
    let mut w = Writer::new(Vec::new());
    let tree = Tree::open(&from.path().join("empty")).unwrap();
    walk(&tree, &mut w, &mut 1, None, &Mapped::default(), Manner::Whole).unwrap();
    w.put(Kind::STORAGE_END, 0, &()).unwrap();
    receive(&w.finish().unwrap(), to.path()).unwrap();
    assert_eq!(picture(to.path()).keys().collect::<Vec<_>>(), ["empty"]);
}

#[test]
fn attributes_travel() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let file = from.path().join("f");
    fs::write(&file, b"x").unwrap();
    let path = std::ffi::CString::new(file.to_str().unwrap()).unwrap();
    if pod_runtime::sys::xattr::set(&path, c"user.note", b"\x00binary").is_err() {
        return; // a file system without them
    }
    settle();
    let (image, inventory, _) = send(from.path(), None);
    receive(&image, to.path()).unwrap();
    let there = std::ffi::CString::new(to.path().join("f").to_str().unwrap()).unwrap();
    assert_eq!(pod_runtime::sys::xattr::get(&there, c"user.note").unwrap().unwrap(), b"\x00binary");
    pod_runtime::sys::xattr::remove(&path, c"user.note").unwrap();
    let (image, ..) = send(from.path(), Some(&inventory));
    receive(&image, to.path()).unwrap();
    assert_eq!(pod_runtime::sys::xattr::get(&there, c"user.note").unwrap(), None);
}

#[test]
fn root_whiteouts_and_devices_travel() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for (name, major, minor) in [("whiteout", "0", "0"), ("null", "1", "3")] {
        assert!(
            Command::new("mknod").arg(from.path().join(name)).args(["c", major, minor]).status().unwrap().success()
        );
    }
    std::os::unix::net::UnixListener::bind(from.path().join("socket")).unwrap();
    fs::create_dir(from.path().join("opaque")).unwrap();
    let opaque = std::ffi::CString::new(from.path().join("opaque").to_str().unwrap()).unwrap();
    pod_runtime::sys::xattr::set(&opaque, c"trusted.overlay.opaque", b"y").unwrap();
    pod_runtime::sys::xattr::set(&opaque, c"trusted.overlay.impure", b"y").unwrap();
    std::os::unix::fs::chown(from.path().join("null"), Some(1234), Some(99)).unwrap();
    let (image, ..) = send(from.path(), None);
    receive(&image, to.path()).unwrap();
    assert_eq!(picture(from.path()), picture(to.path()));
    let there = std::ffi::CString::new(to.path().join("opaque").to_str().unwrap()).unwrap();
    assert_eq!(pod_runtime::sys::xattr::get(&there, c"trusted.overlay.opaque").unwrap().unwrap(), b"y");
    assert_eq!(pod_runtime::sys::xattr::get(&there, c"trusted.overlay.impure").unwrap(), None);
}

fn hostile(entries: &[Entry]) -> Vec<u8> {
    let mut w = Writer::new(Vec::new());
    for (id, entry) in entries.iter().enumerate() {
        w.put(Kind::STORAGE_ENTRY, id as u64, entry).unwrap();
        if matches!(entry.node, Node::File { .. }) {
            let run = PageRun { owner: Owner::Storage(id as u64), address: 0, bytes: 4 };
            w.pages(run, &[b"evil"]).unwrap();
        }
    }
    w.put(Kind::STORAGE_END, 0, &()).unwrap();
    w.finish().unwrap()
}

fn entry(path: &str, node: Node) -> Entry {
    let meta = Meta { mode: 0o644, uid: 0, gid: 0, accessed: (0, 0), modified: (0, 0), attributes: Vec::new() };
    Entry { path: path.as_bytes().to_vec().into(), node, meta: Some(meta) }
}

#[test]
fn nothing_is_written_outside() {
    let place = tempfile::tempdir().unwrap();
    let root = place.path().join("layer");
    let outside = place.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let link = |target: &Path| Node::Symlink(target.to_str().unwrap().as_bytes().to_vec().into());
    let file = Node::File { size: 4 };
    let cases: Vec<Vec<Entry>> = vec![
        vec![entry("../outside/f", file.clone())],
        vec![entry("a/../../outside/f", file.clone())],
        vec![entry("/outside/f", file.clone())],
        vec![entry("..", Node::Directory)],
        vec![entry(".", Node::Removed)],
        vec![entry("a//f", file.clone())],
        vec![entry("a\0b", file.clone())],
        vec![entry(&"x/".repeat(5000), file.clone())],
        vec![entry("way", link(&outside)), entry("way/f", file.clone())],
        vec![entry("way", link(Path::new("../outside"))), entry("way/f", file.clone())],
        vec![entry("way", link(Path::new(".."))), entry("way/outside/f", Node::Removed)],
        vec![entry("mine", Node::HardLink(b"../outside/secret".to_vec().into()))],
        vec![entry("way", link(&outside)), entry("mine", Node::HardLink(b"way/secret".to_vec().into()))],
    ];
    for case in cases {
        let _ = fs::remove_dir_all(&root);
        fs::create_dir(&root).unwrap();
        fs::write(outside.join("secret"), b"secret").unwrap();
        let problem = receive(&hostile(&case), &root).expect_err(&format!("{case:?}"));
        assert!(problem.code() == PATH || problem.code() == STORAGE, "{case:?}: {}", problem.chain());
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "{case:?}");
        assert_eq!(fs::metadata(outside.join("secret")).unwrap().nlink(), 1);
    }
    // A link that is replaced by a file is not followed, and adorning one does not reach its target.
    fs::remove_dir_all(&root).unwrap();
    fs::create_dir(&root).unwrap();
    let before = fs::metadata(outside.join("secret")).unwrap();
    let case = [entry("f", link(&outside.join("secret"))), entry("f", file), entry("l", link(&outside.join("secret")))];
    receive(&hostile(&case), &root).unwrap();
    assert_eq!(fs::read(root.join("f")).unwrap(), b"evil");
    let after = fs::metadata(outside.join("secret")).unwrap();
    assert_eq!((before.mode(), before.mtime()), (after.mode(), after.mtime()));
    assert_eq!(fs::read(outside.join("secret")).unwrap(), b"secret");
}

#[test]
fn contents_of_another_file_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let mut w = Writer::new(Vec::new());
    w.put(Kind::STORAGE_ENTRY, 1, &entry("f", Node::File { size: 4 })).unwrap();
    w.pages(PageRun { owner: Owner::Storage(2), address: 0, bytes: 4 }, &[b"evil"]).unwrap();
    w.put(Kind::STORAGE_END, 0, &()).unwrap();
    assert!(receive(&w.finish().unwrap(), root.path()).is_err());
}
