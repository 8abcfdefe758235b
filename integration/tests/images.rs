//! Checkpoints as files: what can be seen in one, and one that is not what it was: it is refused, nothing of it runs and
//! nothing is left.

use anyhow::{Result, ensure};
use integration::bed::Bed;
use integration::pods::said;
use integration::wait::{SOON, until_true};
use pod_migrate::image::{Owner, PageRun, Reader, Writer};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// One bit of a page, deep in the file: what is compared only while the pod is put together.
#[test]
fn a_damaged_page_does_not_run() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    bed.a().guest("memory", &[], 0)?;
    let path = bed.shared().join("memory.pod");
    let name = path.to_string_lossy().into_owned();
    bed.a().pod(&["checkpoint", "create", "memory", "-e", &name, "--compress", "none"])?;
    bed.a().pod(&["rm", "-f", "memory"])?;
    let file = File::options().read(true).write(true).open(&path)?;
    // The guest has tens of MiB of pages without a repetition, and little else.
    let at = file.metadata()?.len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 4], at)?;
    let (_, words) = bed.a().pod_fails(&["restore", "-i", &name])?;
    ensure!(words.contains("error[E-IMAGE-DAMAGED]"), "it says: {words}");
    bed.nothing_left(&before)?;
    file.write_all_at(&byte, at)?;
    bed.a().pod(&["restore", "-i", &name])?;
    bed.a().pod(&["kill", "-s", "USR1", "memory"])?;
    said(bed.a(), "memory", "ok 1")?;
    bed.a().pod(&["rm", "-f", "memory"])?;
    bed.nothing_left(&before)
}

/// Well-formed, whole, and hostile: bytes that lie behind the end of what they belong to would make it larger.
fn does_not_grow(guest: &str, is_it: fn(Owner) -> bool) -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    bed.a().guest(guest, &[], 0)?;
    let [good, same, hostile] = ["good", "same", "hostile"].map(|name| bed.shared().join(format!("{name}.pod")));
    bed.a().pod(&["checkpoint", "create", guest, "-e", &good.to_string_lossy(), "--compress", "none"])?;
    bed.a().pod(&["rm", "-f", guest])?;
    let mut found = 0;
    rewrite(&good, &same, |run| run)?;
    rewrite(&good, &hostile, |run| {
        let far = if is_it(run.owner) { 1 << 30 } else { 0 };
        found += far >> 30;
        PageRun { address: run.address + far, ..run }
    })?;
    ensure!(found > 0, "the guest has some");
    let (_, words) = bed.a().pod_fails(&["restore", "-i", &hostile.to_string_lossy()])?;
    ensure!(words.contains("error[E-IMAGE-DAMAGED]") && words.contains("beyond its"), "it says: {words}");
    bed.nothing_left(&before)?;
    bed.a().pod(&["restore", "-i", &same.to_string_lossy()])?;
    bed.a().pod(&["kill", "-s", "USR1", guest])?;
    said(bed.a(), guest, "ok 1")?;
    bed.a().pod(&["rm", "-f", guest])?;
    bed.nothing_left(&before)
}

#[test]
fn shared_memory_does_not_grow_by_its_contents() -> Result<()> {
    does_not_grow("sharedparts", |owner| matches!(owner, Owner::SharedMemory(_)))
}

#[test]
fn a_deleted_file_does_not_grow_by_its_contents() -> Result<()> {
    does_not_grow("files", |owner| matches!(owner, Owner::File(_)))
}

/// Writes the image again, with its raw bytes at other places.
fn rewrite(from: &Path, to: &Path, mut place: impl FnMut(PageRun) -> PageRun) -> Result<()> {
    let mut reader = Reader::new(File::open(from)?)?;
    let mut writer = Writer::to_file(File::create(to)?)?;
    while let Some(record) = reader.next()? {
        let Some(run) = record.run else {
            writer.put(record.kind, record.id, &record.state::<ciborium::Value>()?)?;
            continue;
        };
        let mut bytes = vec![0; run.bytes as usize];
        let mut at = 0;
        while at < bytes.len() {
            at += reader.read_pages(&mut bytes[at..])?;
        }
        writer.pages(place(run), &[&bytes])?;
    }
    writer.finish()?;
    Ok(())
}

/// One that changes, when it is told to, everything that a difference is shown of.
const CHANGING: &str = r#"
import os, signal, socket, subprocess, time
listener = socket.create_server(('127.0.0.1', 8000))
client = socket.create_connection(('127.0.0.1', 8000))
server, _ = listener.accept()
client.send(b'x' * 100)
memory = bytearray(os.urandom(1 << 20)) * 4
open('/var/tmp/mine', 'w').write('before')
first = subprocess.Popen(['sleep', '1000'])
def change(*_):
    global second, other
    memory[0 : 1 << 20] = os.urandom(1 << 20)
    memory[2 << 20 : 3 << 20] = bytes(1 << 20)
    other = socket.create_server(('127.0.0.1', 8001))
    server.recv(100)
    first.kill()
    first.wait()
    second = subprocess.Popen(['sleep', '2000'])
    open('/var/tmp/mine', 'w').write('afterwards')
    open('/var/tmp/new', 'w').write('new')
    print('changed', flush=True)
signal.signal(signal.SIGUSR1, change)
print('ready', flush=True)
while True: time.sleep(1000)
"#;

#[test]
fn what_is_in_a_checkpoint_is_shown_without_restoring_it() -> Result<()> {
    let bed = Bed::new()?;
    let host = bed.a();
    host.pod(&[
        "run",
        "-d",
        "--name",
        "one",
        "--network",
        "none",
        "-e",
        "TOKEN=s3cret",
        "--",
        "python3",
        "-c",
        CHANGING,
    ])?;
    said(host, "one", "ready")?;
    host.pod(&["checkpoint", "create", "one", "before"])?;
    host.pod(&["kill", "-s", "USR1", "one"])?;
    said(host, "one", "changed")?;
    host.pod(&["checkpoint", "create", "one", "after"])?;
    let look = |args: &[&str]| -> Result<Value> {
        Ok(serde_json::from_str(&host.pod(&[&["--json", "checkpoint"], args].concat())?)?)
    };
    let seen = look(&["inspect", "before"])?;
    let python = &seen["processes"][0];
    ensure!(python["args"][0] == "python3" && python["args"][2] == CHANGING, "{}", python["args"]);
    ensure!(seen["processes"][1]["args"] == serde_json::json!(["sleep", "1000"]), "{}", seen["processes"]);
    ensure!(seen["processes"][1]["parent"] == 1);
    let has = |list: &Value, what: &dyn Fn(&Value) -> bool| list.as_array().is_some_and(|list| list.iter().any(what));
    let tcp = |local: &str, state: &str| {
        let (local, state) = (local.to_owned(), state.to_owned());
        move |one: &Value| one["protocol"] == "tcp" && one["local"] == *local && one["state"] == *state
    };
    ensure!(has(&seen["sockets"], &tcp("127.0.0.1:8000", "listen")), "{}", seen["sockets"]);
    let unread = |one: &Value| tcp("127.0.0.1:8000", "established")(one) && one["unread_bytes"] == 100;
    ensure!(has(&seen["sockets"], &unread), "{}", seen["sockets"]);
    ensure!(python["stored_bytes"].as_u64() > Some(4 << 20), "{}", python["stored_bytes"]);
    let mine = |one: &Value| one["path"].as_str().is_some_and(|path| path.ends_with("var/tmp/mine"));
    ensure!(has(&seen["layers"][0]["entries"], &mine), "{}", seen["layers"]);
    // Neither the environment that it was started with nor the one in its memory.
    for args in [&["checkpoint", "inspect", "before"][..], &["--json", "checkpoint", "inspect", "before"]] {
        let text = host.pod(args)?;
        ensure!(text.contains("TOKEN") && !text.contains("s3cret"), "{text}");
        let text = host.pod(&[args, &["--show-env"]].concat())?;
        ensure!(text.contains("TOKEN=s3cret"), "{text}");
    }
    let text = host.pod(&["checkpoint", "inspect", "before", "--fds", "--files"])?;
    ensure!(text.contains("var/tmp/mine") && text.contains("127.0.0.1:8000") && text.contains("sleep 1000"), "{text}");

    let found = look(&["diff", "before", "after"])?;
    let command = |list: &Value| list[0]["command"].clone();
    ensure!(command(&found["processes_come"]) == "sleep 2000", "{}", found["processes_come"]);
    ensure!(command(&found["processes_gone"]) == "sleep 1000", "{}", found["processes_gone"]);
    ensure!(has(&found["sockets_come"], &tcp("127.0.0.1:8001", "listen")), "{}", found["sockets_come"]);
    ensure!(found["sockets_gone"] == serde_json::json!([]), "{}", found["sockets_gone"]);
    ensure!(found["sockets_changed"].as_array().is_some_and(|all| all.len() == 1), "{}", found["sockets_changed"]);
    let memory = &found["memory"][0];
    let pages = |name: &str| memory[name].as_u64().unwrap_or(0);
    ensure!(memory["pid"] == 1 && pages("changed") >= 255 && pages("removed") >= 255, "{memory}");
    ensure!(pages("same") >= 512, "{memory}");
    let change = |end: &'static str, how: &'static str| {
        move |one: &Value| one["path"].as_str().is_some_and(|path| path.ends_with(end)) && one["change"] == how
    };
    ensure!(has(&found["files"], &change("tmp/mine", "changed")), "{}", found["files"]);
    ensure!(has(&found["files"], &change("tmp/new", "added")), "{}", found["files"]);
    let text = host.pod(&["checkpoint", "diff", "before", "before"])?;
    ensure!(text.matches("no difference").count() == 5, "{text}");
    host.pod(&["rm", "-f", "one"])?;
    until_true("the pod to be gone", SOON, || !host.runs("one"))
}

/// Makes a checkpoint of the guest in each way, restores it, and has the guest see whether all is as it was.
fn packed(guest: &str) -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let host = bed.a();
    host.guest(guest, &[], 0)?;
    for (round, how) in ["none", "zstd", "zstd:-5"].into_iter().enumerate() {
        let path = bed.shared().join(format!("{guest}-{round}.pod"));
        let path = path.to_string_lossy();
        // The pod runs on in every second round, and its large memory goes ahead.
        let more: &[&str] = if round % 2 == 0 { &["--stop"] } else { &[] };
        let made =
            host.pod(&[&["--json", "checkpoint", "create", guest, "-e", &path, "--compress", how], more].concat())?;
        let made: Value = serde_json::from_str(&made)?;
        let [bytes, unpacked] = ["bytes", "unpacked_bytes"].map(|name| made[name].as_u64());
        ensure!(if how == "none" { bytes == unpacked } else { bytes < unpacked }, "{guest}: {made}");
        host.pod(&["rm", "-f", guest])?;
        host.pod(&["checkpoint", "inspect", &path])?;
        let seen: Value = serde_json::from_str(&host.pod(&["--json", "checkpoint", "diff", &path, &path])?)?;
        ensure!(seen["memory"] == serde_json::json!([]), "{seen}");
        host.pod(&["restore", "-i", &path])?;
        host.pod(&["kill", "-s", "USR1", guest])?;
        said(host, guest, &format!("ok {}", round + 1))?;
    }
    host.pod(&["rm", "-f", guest])?;
    bed.nothing_left(&before)
}

#[test]
fn a_packed_checkpoint_of_much_memory_is_the_same_pod() -> Result<()> {
    packed("memory")
}

#[test]
fn a_packed_checkpoint_of_shared_memory_is_the_same_pod() -> Result<()> {
    packed("sharedparts")
}

#[test]
fn a_packed_checkpoint_of_many_processes_is_the_same_pod() -> Result<()> {
    packed("tree")
}

/// What is hostile of a packed image: it claims more than it holds, or pages like others that are nowhere.
#[test]
fn pages_like_others_that_did_not_come_are_refused() -> Result<()> {
    use pod_migrate::image::Kind;
    use pod_migrate::objects::memory::{Alike, Same};
    let bed = Bed::new()?;
    let before = bed.census()?;
    let host = bed.a();
    host.guest("memory", &[], 0)?;
    let [good, bad] = ["good", "bad"].map(|name| bed.shared().join(format!("{name}.pod")));
    host.pod(&["checkpoint", "create", "memory", "-e", &good.to_string_lossy(), "--stop"])?;
    let mut reader = Reader::new(File::open(&good)?)?;
    let mut writer = Writer::to_file(File::create(&bad)?)?;
    while let Some(record) = reader.next()? {
        match record.run {
            // Left out: the first process has nothing but pages that are to be like these.
            Some(PageRun { owner: Owner::Mm(_), .. }) => {}
            Some(run) => {
                let mut bytes = vec![0; run.bytes as usize];
                let mut at = 0;
                while at < bytes.len() {
                    at += reader.read_pages(&mut bytes[at..])?;
                }
                writer.pages(run, &[&bytes])?;
            }
            None if record.kind == Kind::SAME => {}
            None => writer.put(record.kind, record.id, &record.state::<ciborium::Value>()?)?,
        }
    }
    let seen: Value =
        serde_json::from_str(&host.pod(&["--json", "checkpoint", "inspect", &good.to_string_lossy()])?)?;
    ensure!(seen["processes"][0]["pid"] == 1);
    // Of its stack and of its heap there is nothing to copy.
    let (to, from) = ((Kind::PAGES.0, 1, 0x1000), (Kind::PAGES.0, 1, 0x7fff_0000_0000));
    writer.put(Kind::SAME, 0, &Same { pages: vec![Alike { to, from, bytes: 4096 }] })?;
    writer.finish()?;
    let (_, words) = host.pod_fails(&["restore", "-i", &bad.to_string_lossy()])?;
    ensure!(words.contains("error[E-IMAGE-DAMAGED]") && words.contains("did not come"), "it says: {words}");
    host.pod(&["rm", "memory"])?;
    bed.nothing_left(&before)
}

#[test]
fn an_encrypted_checkpoint_is_for_who_has_the_key() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let host = bed.a();
    let [path, mine, other] = ["secret.pod", "mine", "other"].map(|name| bed.shared().join(name));
    let [path, mine, other] = [&path, &mine, &other].map(|path| path.to_string_lossy().into_owned());
    let recipient = host.pod(&["checkpoint", "keygen", &mine])?;
    host.pod(&["checkpoint", "keygen", &other])?;
    host.guest("tree", &["-e", "TOKEN=in-clear-nowhere"], 0)?;
    for (round, how) in ["none", "zstd"].into_iter().enumerate() {
        let to = ["--encrypt-to", recipient.trim(), "--compress", how];
        host.pod(&[&["checkpoint", "create", "tree", "-e", &path, "--stop"], &to[..]].concat())?;
        host.pod(&["rm", "-f", "tree"])?;
        let bytes = std::fs::read(&path)?;
        let has = |what: &[u8]| bytes.windows(what.len()).any(|window| window == what);
        ensure!(bytes.starts_with(b"age-encryption.org/v1\n"), "it is a file of age");
        ensure!(!has(b"in-clear-nowhere") && !has(b"pod\0img"), "something is in clear");
        for (more, code) in [(&[][..], "E-ENCRYPTED"), (&["--identity", &other], "E-IDENTITY")] {
            for verb in [&["restore", "-i", &path][..], &["checkpoint", "inspect", &path]] {
                let (_, words) = host.pod_fails(&[verb, more].concat())?;
                ensure!(words.contains(&format!("error[{code}]")), "it says: {words}");
            }
        }
        let file = File::options().read(true).write(true).open(&path)?;
        let at = file.metadata()?.len() / 2;
        file.write_all_at(&[bytes[at as usize] ^ 1], at)?;
        let (_, words) = host.pod_fails(&["restore", "-i", &path, "--identity", &mine])?;
        ensure!(words.contains("error[E-IMAGE-DAMAGED]"), "it says: {words}");
        file.write_all_at(&bytes[at as usize..][..1], at)?;
        let text = host.pod(&["checkpoint", "inspect", &path, "--identity", &mine, "--show-env"])?;
        ensure!(text.contains("TOKEN=in-clear-nowhere"), "{text}");
        host.pod(&["restore", "-i", &path, "--identity", &mine])?;
        host.pod(&["kill", "-s", "USR1", "tree"])?;
        said(host, "tree", &format!("ok {}", round + 1))?;
    }
    host.pod(&["rm", "-f", "tree"])?;
    bed.nothing_left(&before)
}

/// What a restore puts into memory is what was saved, and no page more: a pod that is saved and restored over and over
/// does not grow by it.
#[test]
fn memory_does_not_grow_by_being_restored() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let host = bed.a();
    host.guest("memory", &[], 0)?;
    let path = |round: usize| bed.shared().join(format!("{round}.pod")).to_string_lossy().into_owned();
    let save = |round, how| host.pod(&["checkpoint", "create", "memory", "-e", &path(round), "--stop", "-c", how]);
    save(0, "zstd")?;
    for (round, how) in [(1, "none"), (2, "zstd")] {
        host.pod(&["rm", "memory"])?;
        host.pod(&["restore", "-i", &path(round - 1)])?;
        save(round, how)?;
        let seen = host.pod(&["--json", "checkpoint", "diff", &path(round - 1), &path(round)])?;
        let seen: Value = serde_json::from_str(&seen)?;
        let all = ["memory", "shared_memory"].map(|list| seen[list].as_array().cloned().unwrap_or_default()).concat();
        let pages = |what| all.iter().filter_map(|one| one[what].as_u64()).sum::<u64>();
        // What it ran of meanwhile is a page or two of stack.
        ensure!(pages("added") <= 4 && pages("removed") == 0 && pages("changed") <= 16, "round {round}: {all:?}");
    }
    host.pod(&["rm", "memory"])?;
    bed.nothing_left(&before)
}

/// There is room for the checkpoint, and none for the smaller one that is made of it.
#[test]
fn a_disk_that_is_full_when_it_is_packed_ends_no_pod() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let host = bed.a();
    host.guest("memory", &[], 0)?;
    let [whole, disk] = ["whole.pod", "disk"].map(|name| bed.shared().join(name));
    let made = host.pod(&["--json", "checkpoint", "create", "memory", "-e", &whole.to_string_lossy()])?;
    let made: Value = serde_json::from_str(&made)?;
    let [bytes, unpacked] = ["bytes", "unpacked_bytes"].map(|name| made[name].as_u64().unwrap_or(0));
    ensure!(bytes > 16 << 20, "there is much that cannot be packed: {made}");
    std::fs::create_dir(&disk)?;
    let at = disk.to_string_lossy().into_owned();
    let size = format!("size={}", unpacked + bytes / 2);
    host.run(&["mount", "-n", "-t", "tmpfs", "-o", &size, "full", &at])?;
    let path = disk.join("memory.pod").to_string_lossy().into_owned();
    for (round, more) in [&[][..], &["--stop"]].into_iter().enumerate() {
        let (_, words) = host.pod_fails(&[&["checkpoint", "create", "memory", "-e", &path], more].concat())?;
        ensure!(words.contains("error[E-IMAGE-WRITE]") && words.contains("room for a second file"), "it says: {words}");
        host.pod(&["kill", "-s", "USR1", "memory"])?;
        said(host, "memory", &format!("ok {}", round + 1))?;
        ensure!(host.run(&["ls", "-A", &at])?.is_empty(), "something is left on the disk");
    }
    host.run(&["umount", "-n", &at])?;
    host.pod(&["rm", "-f", "memory"])?;
    bed.nothing_left(&before)
}
