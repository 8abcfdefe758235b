//! The windows of a connection in repair mode (TCP_REPAIR_WINDOW).

use serde::{Deserialize, Serialize};

/// `struct tcp_repair_window`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    pub snd_wl1: u32,
    pub snd_wnd: u32,
    pub max_window: u32,
    pub rcv_wnd: u32,
    pub rcv_wup: u32,
}

impl Window {
    pub(super) fn parse(bytes: &[u8]) -> Option<Window> {
        let mut words = bytes.chunks_exact(4).map(|four| u32::from_ne_bytes(four.try_into().expect("four bytes")));
        Some(Window {
            snd_wl1: words.next()?,
            snd_wnd: words.next()?,
            max_window: words.next()?,
            rcv_wnd: words.next()?,
            rcv_wup: words.next()?,
        })
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let Window { snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup } = *self;
        [snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup].iter().flat_map(|word| word.to_ne_bytes()).collect()
    }
}
