//! /sys/kernel/btf/vmlinux: where the running kernel keeps what. Documentation/bpf/btf.rst.
//!
//! Only what is asked for is looked at, in one pass over the types.

const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;
const KIND_FUNC: u32 = 12;

/// The two sections of a BTF file.
pub struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
}

/// What was found; `None` for what is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Bytes from the start of each struct to each member that was asked for.
    pub members: Vec<Option<u32>>,
    /// Type of the function.
    pub function: Option<u32>,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)
}

impl<'a> Btf<'a> {
    pub fn parse(bytes: &'a [u8]) -> Option<Btf<'a>> {
        let magic = u16::from_le_bytes(bytes.get(..2)?.try_into().ok()?);
        if magic != MAGIC {
            return None;
        }
        let header = word(bytes, 4)? as usize;
        let section = |at: usize| {
            let start = header.checked_add(word(bytes, at)? as usize)?;
            bytes.get(start..start.checked_add(word(bytes, at + 4)? as usize)?)
        };
        Some(Btf { types: section(8)?, strings: section(16)? })
    }

    fn named(&self, at: u32, name: &str) -> bool {
        let text = self.strings.get(at as usize..).unwrap_or_default();
        text.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }

    /// Looks for members of named structs, each `(struct, member)`, and for a function.
    pub fn find(&self, members: &[(&str, &str)], function: &str) -> Found {
        let mut found = Found { members: vec![None; members.len()], function: None };
        let (mut at, mut id) = (0, 0);
        while let Some((name, info)) = word(self.types, at).zip(word(self.types, at + 4)) {
            id += 1;
            let (kind, count) = (info >> 24 & 31, (info & 0xffff) as usize);
            let tail = at + 12;
            if kind == KIND_FUNC && self.named(name, function) {
                found.function = Some(id);
            }
            if kind == KIND_STRUCT && name != 0 {
                for (slot, (_, member)) in
                    found.members.iter_mut().zip(members).filter(|(_, (outer, _))| self.named(name, outer))
                {
                    *slot = slot.or_else(|| self.member(tail, count, info >> 31 != 0, member));
                }
            }
            at = tail + tail_bytes(kind, count);
        }
        found
    }

    fn member(&self, tail: usize, count: usize, with_bits: bool, wanted: &str) -> Option<u32> {
        (0..count).find_map(|index| {
            let at = tail + index * 12;
            let bits = word(self.types, at + 8)? & if with_bits { 0xff_ffff } else { u32::MAX };
            self.named(word(self.types, at)?, wanted).then_some(bits / 8)
        })
    }
}

/// What follows the three words of a type.
fn tail_bytes(kind: u32, count: usize) -> usize {
    match kind {
        1 | 14 | 17 => 4,
        3 => 12,
        4 | 5 | 15 | 19 => 12 * count,
        6 | 13 => 8 * count,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn finds_what_this_kernel_has() {
        let Ok(bytes) = std::fs::read("/sys/kernel/btf/vmlinux") else { return };
        let found = Btf::parse(&bytes)
            .unwrap()
            .find(&[("task_struct", "pid"), ("task_struct", "no_such"), ("hrtimer_sleeper", "task")], "bpf_iter_task");
        assert!(found.function.is_some() && found.members[0].is_some() && found.members[2].is_some());
        assert_eq!(found.members[1], None);
    }

    #[test]
    fn finds_a_member() {
        // One struct "s" of one member "m" at bit 64.
        let types: Vec<u8> = [1u32, 4 << 24 | 1, 16, 3, 0, 64].iter().flat_map(|word| word.to_le_bytes()).collect();
        let btf = Btf { types: &types, strings: b"\0s\0m\0" };
        assert_eq!(btf.find(&[("s", "m"), ("s", "x")], "f"), Found { members: vec![Some(8), None], function: None });
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut bytes = bytes;
            if let Some(head) = bytes.get_mut(..2) { head.copy_from_slice(&MAGIC.to_le_bytes()); }
            if let Some(btf) = Btf::parse(&bytes) { btf.find(&[("a", "b")], "c"); }
            Btf { types: &bytes, strings: &bytes }.find(&[("a", "b")], "c");
        }
    }
}
