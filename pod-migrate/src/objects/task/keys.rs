//! Protection keys (pkeys(7)) of which a process has some that protect nothing yet. Memory under a key is refused
//! ([`crate::objects::memory::dump::KIND`]); which keys are given out the kernel shows to nobody, and it can only be guessed
//! from the rights that a thread has to them, which are saved with its registers. A CPU that has none has nothing to say.

use crate::freeze::Process;
use pod_runtime::Problem;
use pod_runtime::sys::{ptrace, task};

/// Protection keys that a process holds are free again.
pub const FREED: &str = "W-PKEYS";

/// Of a task that has asked for no key: all but the first may be used for nothing.
const USUAL: u32 = 0x5555_5554;
/// In an XSAVE area: which parts of it say something, a bit each, and that of the rights.
const PARTS: usize = 512;
const RIGHTS: u32 = 9;

pub fn downgrade(process: &Process) -> Option<Problem> {
    let at = task::key_rights_at()?;
    let has = |tid| ptrace::xstate(tid).ok().and_then(|area| rights(&area, at)).is_some_and(|rights| rights != USUAL);
    process.threads.iter().any(|thread| has(thread.host.0)).then(|| {
        let what = format!("{} has protection keys that protect nothing yet: they are free again", process.name());
        Problem::new(FREED, what)
    })
}

fn rights(area: &[u8], at: usize) -> Option<u32> {
    let parts = u64::from_le_bytes(*area.get(PARTS..)?.first_chunk()?);
    let rights = u32::from_le_bytes(*area.get(at..)?.first_chunk()?);
    (parts >> RIGHTS & 1 != 0).then_some(rights)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_of_a_state() {
        const AT: usize = 2688;
        let mut area = vec![0; AT + 8];
        assert_eq!(rights(&area, AT), None);
        area[PARTS + 1] = 2;
        area[AT..AT + 4].copy_from_slice(&0x5555_5550u32.to_le_bytes());
        assert_eq!(rights(&area, AT), Some(0x5555_5550));
        assert_eq!(rights(&area, AT + 8), None);
        assert_eq!(rights(&area[..PARTS], AT), None);
    }
}
