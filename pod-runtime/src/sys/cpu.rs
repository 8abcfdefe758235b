//! What the processor keeps of a thread beside its general registers.

use std::arch::x86_64::{__cpuid_count, _xgetbv};

/// The XSAVE area as the kernel has set it up: which parts there are (bits of XCR0), how large it is with all of them, and
/// for each part its number, where it lies and how large it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct XsaveArea {
    pub features: u64,
    pub size: u32,
    pub parts: Vec<(u32, u32, u32)>,
}

/// `None` where the kernel does not use XSAVE.
#[allow(unused_unsafe)]
pub fn xsave_area() -> Option<XsaveArea> {
    // SAFETY: every x86-64 processor has CPUID, which touches no memory.
    let cpuid = |leaf, part| unsafe { __cpuid_count(leaf, part) };
    const OSXSAVE: u32 = 1 << 27;
    if cpuid(1, 0).ecx & OSXSAVE == 0 {
        return None;
    }
    // SAFETY: OSXSAVE says that the instruction is there and that the kernel lets programs use it.
    let features = unsafe { enabled() };
    let there = |part: &u32| features & 1 << part != 0;
    // x87 and SSE, the first two, are always in the same place.
    let parts = (2..63).filter(there).map(|part| {
        let leaf = cpuid(0xd, part);
        (part, leaf.ebx, leaf.eax)
    });
    Some(XsaveArea { features, size: cpuid(0xd, 0).ebx, parts: parts.collect() })
}

#[target_feature(enable = "xsave")]
unsafe fn enabled() -> u64 {
    // SAFETY: register 0 is XCR0; that there is one, the caller knows.
    unsafe { _xgetbv(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_lie_in_the_area() {
        let Some(area) = xsave_area() else { return };
        assert_eq!(area.features & 3, 3, "x87 and SSE are always there");
        assert!(area.size >= 576);
        assert!(area.parts.iter().all(|(_, at, size)| *at >= 576 && *size > 0 && at + size <= area.size), "{area:?}");
    }
}
