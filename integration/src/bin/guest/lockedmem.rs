//! Locked memory: at once, on first use, and all that is mapped from now on.

use crate::sys::{Map, Region};
use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use libc::{MAP_PRIVATE, MCL_FUTURE, MCL_ONFAULT};

const PAGE: usize = 4096;

struct Locked {
    regions: [Region; 2],
    /// What was asked of fresh memory last: nothing, locked, locked on its first use.
    future: i32,
    before: Vec<String>,
}

/// lo, lf: the flags of a mapping that are about locks.
fn flags(region: &Region) -> Result<String> {
    let text = std::fs::read_to_string("/proc/self/smaps")?;
    let mut inside = false;
    for line in text.lines() {
        if let Some((range, _)) = line.split_once(' ').filter(|(range, _)| range.contains('-')) {
            let (start, end) = range.split_once('-').context("a range")?;
            let (start, end) = (usize::from_str_radix(start, 16)?, usize::from_str_radix(end, 16)?);
            inside = (start..end).contains(&region.at());
        } else if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| inside) {
            return Ok(flags.split_whitespace().filter(|flag| ["lo", "lf"].contains(flag)).collect());
        }
    }
    Ok("not there".into())
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    // Another protection keeps the kernel from joining two mappings into one.
    let regions = [
        Map::anonymous(2 * PAGE, MAP_PRIVATE),
        Map { protection: libc::PROT_READ, ..Map::anonymous(3 * PAGE, MAP_PRIVATE) },
    ];
    let regions = [regions[0].map()?, regions[1].map()?];
    sys::call(libc::SYS_mlock2, [regions[0].at() as i64, 2 * PAGE as i64, 0, 0, 0])?;
    sys::call(libc::SYS_mlock2, [regions[1].at() as i64, 3 * PAGE as i64, libc::MLOCK_ONFAULT.into(), 0, 0])?;
    let before = regions.iter().map(flags).collect::<Result<Vec<_>>>()?;
    ensure!(before == ["lo", "lolf"], "{before:?}");
    Ok(Box::new(Locked { regions, future: 0, before }))
}

impl Guest for Locked {
    fn verify(&mut self) -> Result<()> {
        for (region, before) in self.regions.iter().zip(&self.before) {
            let now = flags(region)?;
            ensure!(now == *before, "{now:?}, not {before:?}");
        }
        let fresh = Map { protection: libc::PROT_READ, ..Map::anonymous(5 * PAGE, MAP_PRIVATE) }.map()?;
        let (now, expected) = (flags(&fresh)?, ["", "lo", "lolf"][self.future as usize]);
        fresh.unmap()?;
        ensure!(now == expected, "fresh memory is {now:?}, not {expected:?}");
        // One after the other.
        self.future = if self.future == 1 { 2 } else { 1 };
        let how = [0, MCL_FUTURE, MCL_FUTURE | MCL_ONFAULT][self.future as usize];
        sys::call(libc::SYS_mlockall, [how.into(), 0, 0, 0, 0])?;
        Ok(())
    }
}
