//! Huge pages of this machine, for guests that have some.

use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};

const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// Twice what a guest has, for it is on two hosts at once.
const ENOUGH: u32 = 8;

/// So many more than there were, as long as it lives. Tests that need them take turns.
pub struct HugePages {
    before: u32,
    _turn: Flock<File>,
}

fn pool() -> Result<u32> {
    fs::read_to_string(POOL)?.trim().parse().context("a number of huge pages")
}

impl HugePages {
    pub fn take() -> Result<HugePages> {
        let file = File::create(std::env::temp_dir().join("pod-test-hugepages.lock"))?;
        let turn = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
        let pages = HugePages { before: pool()?, _turn: turn };
        fs::write(POOL, (pages.before + ENOUGH).to_string()).context("ask for huge pages")?;
        ensure!(pool()? == pages.before + ENOUGH, "the machine has no {ENOUGH} huge pages to give: {}", pool()?);
        Ok(pages)
    }

    /// If this guest needs them.
    pub fn of(guest: &str) -> Result<Option<HugePages>> {
        ["hugepages", "sharedhuge"].contains(&guest).then(HugePages::take).transpose()
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(POOL, self.before.to_string());
    }
}
