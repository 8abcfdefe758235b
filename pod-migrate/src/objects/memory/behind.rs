//! Memory that comes behind its pod: pages that are not sent while it stands still, but brought when it runs elsewhere.
//!
//! A [`Behind`] record says which pages those are. What may come behind is what nothing has to be done with before the pod runs
//! ([`can_wait`]), but for what is touched when it is put together there: by system calls in which its threads wait, by the kernel
//! for each thread, by the next instruction ([`touched`]). At that time nobody brings anything yet.

use super::ranges::Ranges;
use super::{Backing, Map};
use crate::objects::task::{ProcessState, Registers, ThreadState};
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
    let mut touched = by_registers(&thread.registers);
    // What a thread has for itself, which the kernel writes to on its way out: rseq, and the number that it clears.
    touched.extend((thread.clear_tid != 0).then(|| near(thread.clear_tid)));
    touched.extend(thread.rseq.map(|rseq| rseq.address..rseq.address.saturating_add(rseq.bytes.into())));
    touched.extend(thread.robust_list.as_ref().map(|list| near(list.head)));
    let polls = thread.waiting.is_some_and(|waiting| waiting.number == libc::SYS_poll);
    touched.extend(polls.then(|| looked_at(&thread.registers)));
    touched
}

fn near(at: u64) -> Range<u64> {
    at.saturating_sub(NEAR)..at.saturating_add(NEAR)
}

/// Its stack, what is its own by fs and gs, and whatever else the next instruction or a call that is begun anew may use.
fn by_registers(r: &Registers) -> Vec<Range<u64>> {
    let values =
        [r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15];
    let stack = r.rsp.saturating_sub(STACK.start)..r.rsp.saturating_add(STACK.end);
    let own = [r.fs_base, r.gs_base].into_iter().filter(|at| *at != 0);
    values.into_iter().chain(own).map(near).chain([stack]).collect()
}

/// The array of a poll(2).
fn looked_at(r: &Registers) -> Range<u64> {
    r.rdi..r.rdi.saturating_add(r.rsi.saturating_mul(POLLFD))
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
    fn what_registers_point_to_is_touched() {
        let at = |page: u64| page << 12;
        let r = Registers {
            rsp: at(10) + 8,
            rdi: at(20) + 4090,
            rsi: 3,
            r10: at(40) + 100,
            fs_base: at(30) + 1,
            ..Default::default()
        };
        let touched = Ranges::of_any(by_registers(&r).into_iter().filter_map(pages));
        for page in [9, 10, 13, 14, 20, 21, 29, 30, 39, 40] {
            assert!(touched.has(&(at(page)..at(page + 1))), "page {page}");
        }
        for page in [7, 15, 18, 23, 28, 32, 42] {
            assert!(!touched.touches(&(at(page)..at(page + 1))), "page {page}");
        }
        assert_eq!(pages(looked_at(&r)), Some(at(20)..at(22)), "three of eight bytes each");
    }

    #[test]
    fn ranges_are_widened_to_pages() {
        assert_eq!(pages(1..2), Some(0..4096));
        assert_eq!(pages(4095..4097), Some(0..8192));
        assert_eq!(pages(4096..8192), Some(4096..8192));
        assert_eq!(pages(u64::MAX - 1..u64::MAX), None);
        assert_eq!(pages(8192..8192), None);
    }
}
