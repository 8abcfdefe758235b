//! Memory that comes behind its pod: pages that are not sent while it stands still, but brought when it runs elsewhere.
//!
//! A [`Behind`] record says which pages those are. What may come behind is what nothing has to be done with before the pod runs
//! ([`can_wait`]), but for what is touched when it is put together there: by system calls in which its threads wait, by the kernel
//! for each thread, by the next instruction ([`touched`]). At that time nobody brings anything yet.

use super::ranges::Ranges;
use super::{Backing, Map};
use crate::objects::task::{ProcessState, ThreadState};
use serde::{Deserialize, Serialize};
use std::ops::Range;

const PAGE: u64 = 4096;
/// Below where a stack ends and above: what the functions at hand have there.
const STACK: Range<u64> = 1024..16 << 10;
/// Around any other address that a thread has in its registers.
const NEAR: u64 = 512;
/// struct pollfd.
const POLLFD: u64 = 8;

/// State of BEHIND: pages of a space that are there and come when the pod runs. In order; several records may be needed for a
/// space.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Behind {
    /// First address, and the one after the last.
    pub ranges: Vec<(u64, u64)>,
}

/// Where memory may wait: nothing has to be done with it before the pod runs, and a child of the process has it, too.
pub fn can_wait(maps: &[Map]) -> Ranges {
    const HARMLESS: &[i32] = &[libc::MADV_SEQUENTIAL, libc::MADV_RANDOM, libc::MADV_NOHUGEPAGE, libc::MADV_DONTDUMP];
    let can_wait = |map: &&Map| {
        let special = map.shared || map.grows_down || map.locked || map.droppable || map.sealed || map.huge != 0;
        map.backing == Backing::Anonymous
            && map.protection & libc::PROT_READ as u32 != 0
            && !special
            && map.guards.is_empty()
            && map.advice.iter().all(|advice| HARMLESS.contains(advice))
    };
    Ranges::of(maps.iter().filter(can_wait).map(|map| map.start..map.end))
}

/// Pages that are needed before the pod runs, or at once when it does.
pub fn touched(state: &ProcessState) -> Ranges {
    Ranges::of_any(state.threads.iter().flat_map(of_thread).filter_map(pages))
}

fn of_thread(thread: &ThreadState) -> Vec<Range<u64>> {
    let r = &thread.registers;
    let near = |at: u64| at.saturating_sub(NEAR)..at.saturating_add(NEAR);
    let values =
        [r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15];
    let mut touched: Vec<Range<u64>> = values.into_iter().map(near).collect();
    touched.push(r.rsp.saturating_sub(STACK.start)..r.rsp.saturating_add(STACK.end));
    // What a thread has for itself, which the kernel writes to on its way out: rseq, and the number that it clears.
    touched.extend([r.fs_base, r.gs_base, thread.clear_tid].into_iter().filter(|at| *at != 0).map(near));
    touched.extend(thread.rseq.map(|rseq| rseq.address..rseq.address.saturating_add(rseq.bytes.into())));
    touched.extend(thread.robust_list.as_ref().map(|list| near(list.head)));
    if thread.waiting.is_some_and(|waiting| waiting.number == libc::SYS_poll) {
        touched.push(r.rdi..r.rdi.saturating_add(r.rsi.saturating_mul(POLLFD)));
    }
    touched
}

/// Whole pages.
fn pages(range: Range<u64>) -> Option<Range<u64>> {
    let end = range.end.checked_next_multiple_of(PAGE)?;
    let start = range.start & !(PAGE - 1);
    (start < end).then_some(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_widened_to_pages() {
        assert_eq!(pages(1..2), Some(0..4096));
        assert_eq!(pages(4095..4097), Some(0..8192));
        assert_eq!(pages(4096..8192), Some(4096..8192));
        assert_eq!(pages(u64::MAX - 1..u64::MAX), None);
        assert_eq!(pages(8192..8192), None);
    }
}
