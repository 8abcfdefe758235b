//! /proc/PID/stat.

/// Fields of proc_pid_stat(5) that the engine needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stat {
    pub pid: i32,
    pub comm: String,
    pub state: char,
    pub parent: i32,
    pub group: i32,
    pub session: i32,
    pub terminal: i32,
    pub terminal_group: i32,
    pub nice: i64,
    /// The kernel's PF_ flags of the task.
    pub flags: u32,
    /// Clock ticks since boot.
    pub start_time: u64,
    pub start_code: u64,
    pub end_code: u64,
    pub start_stack: u64,
    pub exit_signal: i32,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    pub exit_code: i32,
}

impl Stat {
    /// On its way out (PF_EXITING): it may share nothing any more with anybody.
    pub fn is_exiting(&self) -> bool {
        const PF_EXITING: u32 = 0x4;
        self.flags & PF_EXITING != 0
    }
}

/// None when it is not a stat line at all.
pub fn parse(text: &str) -> Option<Stat> {
    // The name may hold anything, also ") ": the last parenthesis ends it.
    let (head, tail) = text.rsplit_once(')')?;
    let (pid, comm) = head.split_once(" (")?;
    let fields: Vec<&str> = tail.split_ascii_whitespace().collect();
    // Field 3 of the manual page is index 0 here.
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or("0");
    let unsigned = |number| field(number).parse::<u64>().unwrap_or(0);
    let signed = |number| field(number).parse::<i32>().unwrap_or(0);
    Some(Stat {
        pid: pid.trim().parse().ok()?,
        comm: comm.to_owned(),
        state: field(3).chars().next()?,
        parent: signed(4),
        group: signed(5),
        session: signed(6),
        terminal: signed(7),
        terminal_group: signed(8),
        flags: unsigned(9) as u32,
        nice: i64::from(signed(19)),
        start_time: unsigned(22),
        start_code: unsigned(26),
        end_code: unsigned(27),
        start_stack: unsigned(28),
        exit_signal: signed(38),
        start_data: unsigned(45),
        end_data: unsigned(46),
        start_brk: unsigned(47),
        arg_start: unsigned(48),
        arg_end: unsigned(49),
        env_start: unsigned(50),
        env_end: unsigned(51),
        exit_code: signed(52),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_own() {
        let stat = parse(&std::fs::read_to_string("/proc/self/stat").unwrap()).unwrap();
        assert_eq!(stat.pid, std::process::id() as i32);
        assert!(stat.start_time > 0);
    }

    #[test]
    fn names_with_parentheses() {
        let stat = parse("7 (a) R (b) S 1 7 7 34816 7 0").unwrap();
        assert_eq!((stat.comm.as_str(), stat.state, stat.parent, stat.terminal), ("a) R (b", 'S', 1, 34816));
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC*") { parse(&text); }

        #[test]
        fn never_panics_after_a_name(text in "\\PC*") { parse(&format!("1 (x) {text}")); }
    }
}
