//! Memory of which a program has said how it will be used: madvise(2), huge pages, NUMA policies of maps and of the task.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};

const BYTES: usize = 2 << 20;
const ADVICE: [i32; 8] = [
    libc::MADV_DONTFORK,
    libc::MADV_WIPEONFORK,
    libc::MADV_HUGEPAGE,
    libc::MADV_NOHUGEPAGE,
    libc::MADV_DONTDUMP,
    libc::MADV_SEQUENTIAL,
    libc::MADV_RANDOM,
    libc::MADV_MERGEABLE,
];
const BIND: i32 = libc::MPOL_BIND;
const PREFERRED: i32 = libc::MPOL_PREFERRED;

struct Advised {
    regions: Vec<sys::Region>,
    flags: Vec<String>,
}

/// VmFlags of the map at an address.
fn flags(address: usize) -> Result<String> {
    let text = std::fs::read_to_string("/proc/self/smaps")?;
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&format!("{address:x}-")));
    let line = lines.find_map(|line| line.strip_prefix("VmFlags:")).context("a map has flags")?;
    // MAP_NORESERVE, with which all come back and are not accounted for, and what is only of this moment: as long as memory
    // comes lazily its faults are watched.
    Ok(line.split(' ').filter(|flag| !["nr", "ac", "sd", "um", ""].contains(flag)).collect::<Vec<_>>().join(" "))
}

/// Of the task.
fn policy() -> Result<(i32, u64)> {
    let (mut mode, mut nodes) = (0i32, [0u64; 16]);
    let (to, room) = (nodes.as_mut_ptr() as i64, 1024);
    sys::call(libc::SYS_get_mempolicy, [(&raw mut mode) as i64, to, room, 0, 0])?;
    Ok((mode, nodes[0]))
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let mut regions = Vec::new();
    for (number, advice) in ADVICE.into_iter().enumerate() {
        // Apart from its neighbours, so that they stay maps of their own.
        let mut region = sys::Map::anonymous(BYTES + 2 * 4096, libc::MAP_PRIVATE).map()?.keep(4096, BYTES)?;
        // A kernel without same-page merging has no such advice.
        if let Err(error) = region.advise(advice) {
            ensure!(advice == libc::MADV_MERGEABLE, "advice {advice}: {error:#}");
        }
        region.write(8192, &[number as u8; 3]);
        regions.push(region);
    }
    for mode in [BIND, PREFERRED] {
        let mut region = sys::Map::anonymous(BYTES + 2 * 4096, libc::MAP_PRIVATE).map()?.keep(4096, BYTES)?;
        region.write(8192, &[regions.len() as u8; 3]);
        region.bind(mode)?;
        regions.push(region);
    }
    let nodes = [1u64];
    sys::call(libc::SYS_set_mempolicy, [PREFERRED.into(), nodes.as_ptr() as i64, 64, 0, 0])?;
    let flags = regions.iter().map(|region| flags(region.at())).collect::<Result<_>>()?;
    let mut advised = Advised { regions, flags };
    advised.verify()?;
    Ok(Box::new(advised))
}

impl Guest for Advised {
    fn verify(&mut self) -> Result<()> {
        for (number, (region, before)) in self.regions.iter().zip(&self.flags).enumerate() {
            let now = flags(region.at())?;
            ensure!(now == *before, "the flags of map {number} are {now:?}, and were {before:?}");
            ensure!(region.read(8192, 3) == [number as u8; 3], "map {number} has other bytes");
            ensure!(region.read(0, 2) == [0; 2] && region.read(BYTES - 2, 2) == [0; 2], "map {number} is not empty");
            let policy = region.policy()?;
            let wanted = match number.checked_sub(ADVICE.len()) {
                None => (libc::MPOL_DEFAULT, 0),
                Some(0) => (BIND, 1),
                Some(_) => (PREFERRED, 1),
            };
            ensure!(policy == wanted, "the policy of map {number} is {policy:?}");
        }
        ensure!(policy()? == (PREFERRED, 1), "the policy of the task is {:?}", policy()?);
        Ok(())
    }
}
