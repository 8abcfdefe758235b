//! Texts of /proc. The kernel writes them, but names in them are the program's. The first byte says which.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pod_runtime::proc::{fdinfo, limits, maps, mountinfo, stat, status, timers};

fuzz_target!(|data: &[u8]| {
    let Some((which, rest)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(rest);
    match which {
        b'f' => {
            let info = fdinfo::parse(&text);
            let _ = (info.epoll(), info.inotify(), info.locks(), info.timer(), info.eventfd(), info.pidfd());
            let _ = (info.signal_mask(), info.pty_index());
        }
        b'l' => drop(limits::parse(&text)),
        b'm' => maps::parse(&text).iter().for_each(|map| assert!(map.bytes() > 0)),
        b'i' => drop(mountinfo::parse(rest)),
        b's' => drop(stat::parse(&text)),
        b'u' => drop(status::parse(&text)),
        b't' => drop(timers::parse(&text)),
        _ => {}
    }
});
