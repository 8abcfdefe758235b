//! /proc/PID/fdinfo/N: what the kernel tells about one open file. See proc_pid_fdinfo(5) and, for the lines of each kind,
//! the kernel's `Documentation/filesystems/proc.rst`.

/// What every open file has, and the lines of its kind as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FdInfo {
    pub position: u64,
    /// O_* with O_CLOEXEC of the descriptor.
    pub flags: i32,
    pub mount: i32,
    lines: String,
}

/// A registration of an epoll descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EpollTarget {
    pub fd: i32,
    pub events: u32,
    pub data: u64,
    pub inode: u64,
    /// As the kernel numbers devices internally.
    pub device: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Timer {
    pub clock: i32,
    pub ticks: u64,
    pub settime_flags: u32,
    pub remaining_ns: u64,
    pub interval_ns: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InotifyWatch {
    pub wd: i32,
    pub inode: u64,
    pub device: u64,
    pub mask: u32,
    pub handle_type: i32,
    pub handle: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockClass {
    Posix,
    Ofd,
    Flock,
    Lease,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lock {
    pub class: LockClass,
    pub exclusive: bool,
    pub start: u64,
    /// Inclusive; `u64::MAX` is the end of the file.
    pub end: u64,
}

/// Lines that do not parse are left out: a kernel may say more than is known here.
pub fn parse(text: &str) -> FdInfo {
    let mut info = FdInfo { lines: text.to_owned(), ..FdInfo::default() };
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        match key {
            "pos" => info.position = value.parse().unwrap_or(0),
            "flags" => info.flags = i32::from_str_radix(value, 8).unwrap_or(0),
            "mnt_id" => info.mount = value.parse().unwrap_or(0),
            _ => {}
        }
    }
    info
}

impl FdInfo {
    /// What every open file has, of one that has no other lines.
    pub fn short(position: u64, flags: i32, mount: i32) -> FdInfo {
        FdInfo { position, flags, mount, lines: String::new() }
    }

    /// The value of the first line with this key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.lines.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name == key).then(|| value.trim())
        })
    }

    /// The counter of an eventfd and whether it is a semaphore.
    pub fn eventfd(&self) -> Option<(u64, bool)> {
        let count = u64::from_str_radix(self.get("eventfd-count")?, 16).ok()?;
        Some((count, self.get("eventfd-semaphore").is_some_and(|v| v == "1")))
    }

    /// The mask of a signalfd.
    pub fn signal_mask(&self) -> Option<u64> {
        u64::from_str_radix(self.get("sigmask")?, 16).ok()
    }

    /// What a pidfd refers to, in each pid namespace from the reader's to its own: `NSpid`. -1: gone.
    pub fn pidfd(&self) -> Option<Vec<i32>> {
        let own: i32 = self.get("Pid")?.parse().ok()?;
        let all = self.get("NSpid").map(|v| v.split_ascii_whitespace().filter_map(|n| n.parse().ok()).collect());
        Some(all.filter(|v: &Vec<i32>| !v.is_empty()).unwrap_or_else(|| vec![own]))
    }

    /// The index of the pty of a master.
    pub fn pty_index(&self) -> Option<u32> {
        self.get("tty-index")?.parse().ok()
    }

    pub fn timer(&self) -> Option<Timer> {
        Some(Timer {
            clock: self.get("clockid")?.parse().ok()?,
            ticks: self.get("ticks")?.parse().ok()?,
            settime_flags: u32::from_str_radix(self.get("settime flags")?, 8).ok()?,
            remaining_ns: nanoseconds(self.get("it_value")?)?,
            interval_ns: nanoseconds(self.get("it_interval")?)?,
        })
    }

    pub fn epoll(&self) -> Vec<EpollTarget> {
        self.lines.lines().filter(|line| line.starts_with("tfd:")).filter_map(epoll_target).collect()
    }

    pub fn inotify(&self) -> Vec<InotifyWatch> {
        self.lines.lines().filter_map(|line| line.strip_prefix("inotify ")).filter_map(inotify_watch).collect()
    }

    /// Locks of the file that were taken through this description (POSIX ones: also by the table it was read from).
    pub fn locks(&self) -> Vec<Lock> {
        self.lines.lines().filter_map(|line| line.strip_prefix("lock:")).filter_map(lock).collect()
    }
}

/// `(seconds, nanoseconds)`.
fn nanoseconds(text: &str) -> Option<u64> {
    let (seconds, nanoseconds) = text.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
    let seconds: u64 = seconds.trim().parse().ok()?;
    seconds.checked_mul(1_000_000_000)?.checked_add(nanoseconds.trim().parse().ok()?)
}

/// Values of a line like `tfd: 3 events: 19 data: 3  pos:0 ino:40f sdev:10`: blanks after a colon are optional.
fn fields(line: &str) -> impl Fn(&str) -> Option<String> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    for word in line.split_ascii_whitespace() {
        match word.split_once(':') {
            Some((key, value)) => pairs.push((key.to_owned(), value.to_owned())),
            None => {
                if let Some(last) = pairs.last_mut()
                    && last.1.is_empty()
                {
                    last.1 = word.to_owned();
                }
            }
        }
    }
    move |key| pairs.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone())
}

fn epoll_target(line: &str) -> Option<EpollTarget> {
    let get = fields(line);
    let hex = |key: &str| u64::from_str_radix(&get(key)?, 16).ok();
    Some(EpollTarget {
        fd: get("tfd")?.parse().ok()?,
        events: u32::try_from(hex("events")?).ok()?,
        data: hex("data")?,
        inode: hex("ino").unwrap_or(0),
        device: hex("sdev").unwrap_or(0),
    })
}

fn inotify_watch(line: &str) -> Option<InotifyWatch> {
    let get = fields(line);
    let hex = |key: &str| u64::from_str_radix(&get(key)?, 16).ok();
    Some(InotifyWatch {
        wd: i32::try_from(hex("wd")?).ok()?,
        inode: hex("ino")?,
        device: hex("sdev")?,
        mask: u32::try_from(hex("mask")?).ok()?,
        handle_type: hex("fhandle-type").and_then(|t| i32::try_from(t).ok()).unwrap_or(0),
        handle: get("f_handle").and_then(|text| bytes(&text)).unwrap_or_default(),
    })
}

fn bytes(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u32> = text.chars().map(|c| c.to_digit(16)).collect::<Option<_>>()?;
    Some(digits.chunks_exact(2).map(|pair| (pair[0] * 16 + pair[1]) as u8).collect())
}

/// `1: FLOCK  ADVISORY  WRITE 123 fe:00:17 0 EOF`.
fn lock(line: &str) -> Option<Lock> {
    let mut words = line.split_ascii_whitespace();
    words.next()?.strip_suffix(':')?;
    let class = match words.next()? {
        "POSIX" => LockClass::Posix,
        "OFDLCK" => LockClass::Ofd,
        "FLOCK" => LockClass::Flock,
        "LEASE" => LockClass::Lease,
        _ => return None,
    };
    words.next()?;
    let exclusive = match words.next()? {
        "WRITE" => true,
        "READ" => false,
        _ => return None,
    };
    let start = words.nth(2)?.parse().ok()?;
    let end = match words.next()? {
        "EOF" => u64::MAX,
        number => number.parse().ok()?,
    };
    Some(Lock { class, exclusive, start, end })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn eventfd() {
        let info = parse(
            "pos:\t0\nflags:\t02\nmnt_id:\t17\nino:\t1039\neventfd-count:              12c\neventfd-id: 1\neventfd-semaphore: 1\n",
        );
        assert_eq!(info.eventfd(), Some((0x12c, true)));
        assert_eq!(info.flags, 2);
        assert_eq!(info.mount, 17);
    }

    #[test]
    fn epoll() {
        let info = parse("pos:\t0\ntfd:        3 events: 80000019 data:  ffffffff00000003  pos:0 ino:40f sdev:10\n");
        let target =
            EpollTarget { fd: 3, events: 0x8000_0019, data: 0xffff_ffff_0000_0003, inode: 0x40f, device: 0x10 };
        assert_eq!(info.epoll(), vec![target]);
    }

    #[test]
    fn timer() {
        let info = parse("clockid: 1\nticks: 2\nsettime flags: 01\nit_value: (9, 999975117)\nit_interval: (1, 5)\n");
        let timer =
            Timer { clock: 1, ticks: 2, settime_flags: 1, remaining_ns: 9_999_975_117, interval_ns: 1_000_000_005 };
        assert_eq!(info.timer(), Some(timer));
    }

    #[test]
    fn inotify() {
        let info = parse(
            "inotify wd:1 ino:3c4a7 sdev:fe00000 mask:fff ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:a7c4030000000000\n",
        );
        let watch = &info.inotify()[0];
        assert_eq!((watch.wd, watch.inode, watch.mask, watch.handle_type), (1, 0x3c4a7, 0xfff, 1));
        assert_eq!(watch.handle, [0xa7, 0xc4, 3, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn locks() {
        let info = parse(
            "lock:\t1: FLOCK  ADVISORY  WRITE 12 fe:00:17 0 EOF\nlock:\t2: POSIX  ADVISORY  READ 12 fe:00:17 5 14\nlock:\t3: LEASE  ACTIVE    READ 12 fe:00:17 0 EOF\n",
        );
        let found: Vec<_> = info.locks().iter().map(|l| (l.class, l.exclusive, l.start, l.end)).collect();
        assert_eq!(
            found,
            [
                (LockClass::Flock, true, 0, u64::MAX),
                (LockClass::Posix, false, 5, 14),
                (LockClass::Lease, false, 0, u64::MAX)
            ]
        );
    }

    #[test]
    fn pidfds() {
        assert_eq!(parse("Pid:\t31256\nNSpid:\t31256\t7\n").pidfd(), Some(vec![31256, 7]));
        assert_eq!(parse("Pid:\t-1\nNSpid:\t-1\n").pidfd(), Some(vec![-1]));
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "(pos|tfd|lock|inotify|it_value|eventfd-count|[a-z ]{0,8}):?[ -~\n\t\u{100}]{0,200}") {
            let info = parse(&text);
            let _ = (info.epoll(), info.inotify(), info.locks(), info.timer(), info.eventfd(), info.pidfd());
        }

        #[test]
        fn epoll_round_trip(fd in 0i32.., events: u32, data: u64, inode in 0u64.., device in 0u64..1 << 32) {
            let text = format!("tfd: {fd:8} events: {events:8x} data: {data:16x}  pos:0 ino:{inode:x} sdev:{device:x}\n");
            prop_assert_eq!(parse(&text).epoll(), vec![EpollTarget { fd, events, data, inode, device }]);
        }
    }
}
