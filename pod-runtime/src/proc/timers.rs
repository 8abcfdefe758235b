//! /proc/PID/timers: the POSIX timers of a process.

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Timer {
    pub id: i32,
    pub signal: i32,
    /// sigev_value.
    pub value: u64,
    /// SIGEV_SIGNAL, SIGEV_NONE or SIGEV_THREAD, with SIGEV_THREAD_ID added.
    pub notify: i32,
    /// Process or thread that is signalled, as the reader's /proc numbers it.
    pub target: i32,
    pub clock: i32,
}

pub fn parse(text: &str) -> Vec<Timer> {
    let mut timers: Vec<Timer> = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        if key == "ID" {
            timers.push(Timer { id: value.parse().unwrap_or(-1), ..Timer::default() });
            continue;
        }
        let Some(timer) = timers.last_mut() else { continue };
        match key {
            "signal" => {
                let (signal, address) = value.split_once('/').unwrap_or((value, "0"));
                timer.signal = signal.parse().unwrap_or(0);
                timer.value = u64::from_str_radix(address.trim_start_matches("0x"), 16).unwrap_or(0);
            }
            "notify" => {
                let (how, whom) = value.split_once('/').unwrap_or((value, ""));
                timer.notify = match how {
                    "none" => libc::SIGEV_NONE,
                    "thread" => libc::SIGEV_THREAD,
                    _ => libc::SIGEV_SIGNAL,
                };
                let (kind, id) = whom.split_once('.').unwrap_or((whom, "0"));
                if kind == "tid" {
                    timer.notify |= libc::SIGEV_THREAD_ID;
                }
                timer.target = id.parse().unwrap_or(0);
            }
            "ClockID" => timer.clock = value.parse().unwrap_or(0),
            _ => {}
        }
    }
    timers
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_the_manual_page() {
        let text = "ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n\
                    ID: 7\nsignal: 34/0000000000000000\nnotify: signal/tid.12\nClockID: 1\n";
        let timers = parse(text);
        assert_eq!(timers.len(), 2);
        assert_eq!((timers[0].id, timers[0].signal, timers[0].value), (1, 60, 0x7fff_86e4_52a8));
        assert_eq!((timers[1].notify, timers[1].target, timers[1].clock), (libc::SIGEV_THREAD_ID, 12, 1));
    }

    proptest! {
        #[test]
        fn never_panics(text in "(ID: \\PC*\n|signal: \\PC*\n|notify: \\PC*\n|\\PC*\n)*") { parse(&text); }
    }
}
