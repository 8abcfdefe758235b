//! A checkpoint that is not what it was: it is refused, nothing of it runs and nothing is left.

use anyhow::{Context, Result, ensure};
use integration::bed::{self, Bed};
use integration::pods::said;
use std::fs::File;
use std::os::unix::fs::FileExt;

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
