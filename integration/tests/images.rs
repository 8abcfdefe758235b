//! A checkpoint that is not what it was: it is refused, nothing of it runs and nothing is left.

use anyhow::{Context, Result, ensure};
use integration::bed::{self, Bed};
use integration::pods::said;
use pod_migrate::image::{Owner, PageRun, Reader, Writer};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// One bit of a page, deep in the file: what is compared only while the pod is put together.
#[test]
fn a_damaged_page_does_not_run() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let guest = bed::beside_us("guest").context("guest is built with us")?;
    bed.a().pod(&["run", "-d", "--name", "memory", "--network", "none", "--", &guest.to_string_lossy(), "memory"])?;
    said(bed.a(), "memory", "ready")?;
    let path = bed.shared().join("memory.pod");
    let name = path.to_string_lossy().into_owned();
    bed.a().pod(&["checkpoint", "create", "memory", "-e", &name])?;
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
    let program = bed::beside_us("guest").context("guest is built with us")?;
    let program = program.to_string_lossy();
    bed.a().pod(&["run", "-d", "--name", guest, "--network", "none", "--", &program, guest])?;
    said(bed.a(), guest, "ready")?;
    let [good, same, hostile] = ["good", "same", "hostile"].map(|name| bed.shared().join(format!("{name}.pod")));
    bed.a().pod(&["checkpoint", "create", guest, "-e", &good.to_string_lossy()])?;
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
