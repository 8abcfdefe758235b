//! 1 GiB of memory: saved and restored, beside what the machine can do at most.

use crate::report::Report;
use crate::subjects::fill;
use crate::table::{Table, ms};
use crate::{frozen, pod, said, us};
use anyhow::{Context, Result, ensure};
use nix::libc;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use std::fs::File;
use std::io::IoSliceMut;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const RUNS: usize = 5;
const MIB: usize = 1024;
/// What is copied at once: half of a second-level cache.
const PIECE: usize = 256 << 10;

fn speed(took: Duration) -> f64 {
    MIB as f64 / 1024.0 / took.as_secs_f64()
}

/// Reads a filled GiB of another process in pieces that stay in the cache.
fn read_at_most() -> Result<f64> {
    let mut other = Command::new(us()?).args(["__memory", &MIB.to_string()]).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(other.stdout.as_mut().context("a pipe")?), &mut line)?;
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", other.id()))?;
    let mut large = maps.lines().filter_map(|line| {
        let (from, rest) = line.split_once('-')?;
        let to = rest.split(' ').next()?;
        let from = usize::from_str_radix(from, 16).ok()?;
        let bytes = usize::from_str_radix(to, 16).ok()? - from;
        (bytes >= MIB << 20).then_some(from)
    });
    let base = large.next_back().context("a large mapping")?;
    let mut buffer = vec![0; 2 * PIECE];
    let piece = on_a_page(&mut buffer);
    let begun = Instant::now();
    for at in (0..MIB << 20).step_by(PIECE) {
        let remote = [RemoteIoVec { base: base + at, len: PIECE }];
        let got = process_vm_readv(Pid::from_raw(other.id() as i32), &mut [IoSliceMut::new(piece)], &remote)?;
        ensure!(got == PIECE, "short read");
    }
    let took = begun.elapsed();
    other.kill()?;
    other.wait()?;
    Ok(speed(took))
}

/// Where an allocator puts a buffer, 16 bytes behind the begin of a page, the kernel copies at a quarter of the speed.
fn on_a_page(buffer: &mut [u8]) -> &mut [u8] {
    let skip = buffer.as_ptr().align_offset(4096);
    &mut buffer[skip..skip + PIECE]
}

/// Writes a GiB to a new file in memory: what one thread needs for a checkpoint after it has read the bytes.
fn write_at_most() -> Result<f64> {
    let file = tempfile_in_memory()?;
    let mut buffer = vec![1; 2 * PIECE];
    let piece = on_a_page(&mut buffer);
    let begun = Instant::now();
    for at in (0..MIB << 20).step_by(PIECE) {
        file.write_all_at(piece, at as u64)?;
    }
    Ok(speed(begun.elapsed()))
}

fn tempfile_in_memory() -> Result<File> {
    let flags = libc::O_TMPFILE;
    Ok(File::options().read(true).write(true).custom_flags(flags).open("/dev/shm")?)
}

fn first_touch() -> f64 {
    let begun = Instant::now();
    std::hint::black_box(fill(MIB << 20));
    speed(begun.elapsed())
}

/// The speed of this machine's memory as the table needs it: reading another's, and touching one's own.
pub fn limits(table: &mut Table) -> Result<(f64, f64)> {
    let reads = (0..RUNS).map(|_| read_at_most()).collect::<Result<Vec<_>>>()?;
    let touches = (0..RUNS).map(|_| first_touch()).collect();
    Ok((table.row("limit: process_vm_readv", reads), table.row("limit: first touch", touches)))
}

pub fn saved(report: &mut Report) -> Result<()> {
    let mut table = Table::new("checkpoint and restore of 1 GiB, file in /dev/shm", "GiB/s");
    let (read, touch) = limits(&mut table)?;
    let writes = (0..RUNS).map(|_| write_at_most()).collect::<Result<Vec<_>>>()?;
    let write = table.row("limit: write of a new file", writes);
    pod(&["run", "-d", "--name", "memory", "--network", "none", "--", &us()?, "__memory", &MIB.to_string()])?;
    said("memory", "ready")?;
    let (mut create, mut still, mut restore) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let (json, took) =
            pod(&["checkpoint", "create", "memory", "-e", "/dev/shm/memory", "--compress", "none", "--json"])?;
        create.push(speed(took));
        still.push(speed(frozen(&json)?));
        pod(&["rm", "-f", "memory"])?;
        restore.push(speed(pod(&["restore", "-i", "/dev/shm/memory"])?.1));
        std::fs::remove_file("/dev/shm/memory")?;
    }
    pod(&["rm", "-f", "memory"])?;
    table.against("pod checkpoint create", create.clone(), read, "process_vm_readv");
    // One after the other, by one thread.
    table.against("  beside what it must do", create, 1.0 / (1.0 / read + 1.0 / write), "read and then write");
    let still = table.against("  while frozen", still, read, "process_vm_readv");
    let restored = table.against("pod restore", restore, touch, "first touch");
    report.add(table);
    report.aim("1 GiB, file in memory: frozen, beside reading it once", 1.15, "times", read / still);
    // Speeds of one after the other: their inverses are added.
    report.aim(
        "1 GiB: restored, beside first touch and a copy",
        1.15,
        "times",
        (1.0 / restored) / (1.0 / touch + 1.0 / read),
    );
    Ok(())
}

/// The same with the file on the disk.
pub fn on_disk(report: &mut Report) -> Result<()> {
    let mut table = Table::new("checkpoint of 1 GiB, file on the disk", "ms");
    let reads = (0..RUNS).map(|_| Ok(1e3 / read_at_most()?)).collect::<Result<Vec<_>>>()?;
    let read = table.row("limit: process_vm_readv", reads);
    pod(&["run", "-d", "--name", "memory", "--network", "none", "--", &us()?, "__memory", &MIB.to_string()])?;
    said("memory", "ready")?;
    let (mut disk, mut create, mut still) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        // In turns: what a disk can do changes from minute to minute.
        disk.push(disk_at_most(MIB << 20)?);
        let (json, took) = pod(&["checkpoint", "create", "memory", "-e", ON_DISK, "--compress", "none", "--json"])?;
        create.push(ms(took));
        still.push(ms(frozen(&json)?));
        std::fs::remove_file(ON_DISK)?;
    }
    pod(&["rm", "-f", "memory"])?;
    let disk = table.row("limit: 1 GiB to the disk", disk);
    table.against("pod checkpoint create", create, disk, "1 GiB to the disk");
    let still = table.against("  of it frozen", still, read, "process_vm_readv");
    report.add(table);
    report.aim("1 GiB, file on the disk: frozen, beside reading it once", 1.15, "times", still / read);
    Ok(())
}

/// What the tool itself needs.
pub fn of_the_tool(report: &mut Report) -> Result<()> {
    let mut table = Table::new("most memory of `pod checkpoint create`, file in /dev/shm", "MiB");
    for (what, mib) in [("1 GiB", MIB), ("4 GiB", 4 * MIB)] {
        pod(&["run", "-d", "--name", "memory", "--network", "none", "--", &us()?, "__memory", &mib.to_string()])?;
        said("memory", "ready")?;
        let mut most = Vec::new();
        for _ in 0..RUNS {
            most.push(watched(&["checkpoint", "create", "memory", "-e", "/dev/shm/memory", "--compress", "none"])?);
            std::fs::remove_file("/dev/shm/memory")?;
        }
        pod(&["rm", "-f", "memory"])?;
        let most = table.row(what, most);
        if mib > MIB {
            report.aim("memory of the tool while it saves 4 GiB", 100.0, "MiB", most);
        }
    }
    report.add(table);
    Ok(())
}

/// Runs `pod`: the most memory that it had, in MiB.
fn watched(args: &[&str]) -> Result<f64> {
    // What we ourselves needed at most would be counted as the child's, which begins as us: from now on only.
    std::fs::write("/proc/self/clear_refs", "5")?;
    let child = Command::new("pod").args(args).stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
    // SAFETY: both live across the call, and the child is ours and has not been waited for.
    let ended = unsafe { libc::wait4(child.id() as i32, &mut status, 0, usage.as_mut_ptr()) };
    ensure!(ended == child.id() as i32 && status == 0, "pod {}: status {status}", args.join(" "));
    // SAFETY: all of it may be zero, and wait4 has filled it.
    let kibibytes = unsafe { usage.assume_init() }.ru_maxrss;
    Ok(kibibytes as f64 / 1024.0)
}

/// A file on the disk that takes what is left of [`crate::subjects::mixed`].
const ON_DISK: &str = "/var/lib/bench-mixed";

/// How `pod checkpoint create --export` packs.
const EXPORTED: &str = "zstd:1";

/// Has the disk hold so many bytes.
fn disk_at_most(bytes: usize) -> Result<f64> {
    let file = File::create(ON_DISK)?;
    let mut buffer = vec![1; 2 * PIECE];
    let piece = on_a_page(&mut buffer);
    let begun = Instant::now();
    for at in (0..bytes).step_by(PIECE) {
        file.write_all_at(piece, at as u64)?;
    }
    file.sync_all()?;
    let took = begun.elapsed();
    std::fs::remove_file(ON_DISK)?;
    Ok(ms(took))
}

/// 1 GiB of which six tenths are zeros and two tenths pages that were there before, on the disk.
pub fn mixed(report: &mut Report) -> Result<()> {
    let mut times = Table::new("checkpoint and restore of 1 GiB: 60 % zeros, 20 % duplicates, file on the disk", "ms");
    let mut sizes = Table::new("what is in the file", "MiB");
    let (mut disk, mut all) = (Vec::new(), Vec::new());
    pod(&["run", "-d", "--name", "mixed", "--network", "none", "--", &us()?, "__mixed", &MIB.to_string()])?;
    said("mixed", "ready")?;
    for how in ["none", "zstd:-5", "zstd:1", "zstd:3"] {
        let (mut create, mut still, mut restore, mut bytes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..RUNS {
            // In turns: what a disk can do changes from minute to minute.
            disk.push(disk_at_most(MIB << 20)?);
            let (json, took) = pod(&["checkpoint", "create", "mixed", "-e", ON_DISK, "--compress", how, "--json"])?;
            create.push(ms(took));
            still.push(ms(frozen(&json)?));
            bytes.push(std::fs::metadata(ON_DISK)?.len() as f64 / f64::from(1 << 20));
            pod(&["rm", "-f", "mixed"])?;
            restore.push(ms(pod(&["restore", "-i", ON_DISK])?.1));
            std::fs::remove_file(ON_DISK)?;
        }
        all.push((how, create, still, restore));
        let bytes = sizes.row(&format!("--compress {how}"), bytes);
        if how == EXPORTED {
            report.aim("60 % zeros, 20 % duplicates, exported: the file, of 1 GiB", 206.0, "MiB", bytes);
        }
    }
    let disk = times.row("limit: 1 GiB to the disk", disk);
    for (how, create, still, restore) in all {
        let name = format!("pod checkpoint create --compress {how}");
        let create = times.against(&name, create, disk, "1 GiB to the disk");
        times.row("  of it frozen", still);
        times.row("pod restore", restore);
        if how == EXPORTED {
            report.aim("the same: the command, beside the disk with a GiB", 1.0, "times", create / disk);
        }
    }
    pod(&["rm", "-f", "mixed"])?;
    report.add(times);
    report.add(sizes);
    Ok(())
}
