//! Memory that is still on the host that the pod has left, and comes when it is asked for.
//!
//! ```text
//! program ─ touches a page ─> userfaultfd ─> filler ── WANT ──> carrier ── the link ──> pod migrate, at the source
//!                                               <── PAGES ──          <──            ── reads its copy, which stands still
//! ```
//!
//! The filler asks for all that is missing, some megabytes ahead, in the order of addresses; what somebody waits for is asked for
//! as urgent, and comes first. It listens for whoever carries its words ([`connect`]): a carrier that is lost, with its link or by
//! itself, takes nothing along. What had been asked for is asked for again of the next, and until there is one whoever touches what is
//! missing waits. When nothing is missing any more it says so, and the source can bury its copy.
//!
//! What comes is put where it is missing and nowhere else, whoever sends it.

use super::{Filler, NO_ROOM, PAGE, Put, put, put_all, turns};
use crate::ids::MmId;
use crate::{Doing, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pod_runtime::store::Pod;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

/// Asked for and not come yet, bytes: enough for a long link, and what is urgent does not wait for it.
const MOST_ASKED: u64 = 8 << 20;
/// Bytes of a [`Want`].
pub const WANT: usize = 32;
/// Bytes before pages: whose they are, from which address on, and how many bytes.
pub const PAGES: usize = 24;
/// In the place of a memory's number: nothing is missing any more.
const WHOLE: u64 = u64::MAX;

/// Pages that are asked for: some of a window, which are few or many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// Somebody waits for them.
    pub urgent: bool,
    pub mm: u64,
    /// Where the window begins, a multiple of its size.
    pub address: u64,
    /// A bit for each of its pages.
    pub pages: u64,
}

/// Bytes of a window: a page for each bit of a word.
pub const WINDOW: u64 = 64 * PAGE;

/// What a filler says.
#[derive(Debug, PartialEq, Eq)]
pub enum Word {
    Want(Want),
    /// Nothing is missing any more.
    Whole,
}

impl Want {
    fn words(self) -> [u8; WANT] {
        let mut bytes = [0; WANT];
        let words = [self.mm, self.address, self.pages, self.urgent.into()];
        bytes.chunks_exact_mut(8).zip(words).for_each(|(place, word)| place.copy_from_slice(&word.to_le_bytes()));
        bytes
    }
}

/// What the bytes of a filler mean.
pub fn word(bytes: &[u8; WANT]) -> Word {
    let word = |at: usize| bytes[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
    match word(0) {
        WHOLE => Word::Whole,
        mm => Word::Want(Want { mm, address: word(8), pages: word(16), urgent: word(24) != 0 }),
    }
}

/// What comes before pages.
pub fn head(mm: MmId, address: u64, bytes: u64) -> [u8; PAGES] {
    let mut head = [0; PAGES];
    let words = [mm.0, address, bytes];
    head.chunks_exact_mut(8).zip(words).for_each(|(place, word)| place.copy_from_slice(&word.to_le_bytes()));
    head
}

/// Where the filler of a pod that came by this job listens.
fn path(pod: &Pod, job: &str) -> PathBuf {
    pod.run_dir().join(format!("behind-{job}.sock"))
}

/// Whether something of a pod that came by this job is still missing.
pub fn is_missing(pod: &Pod, job: &str) -> bool {
    path(pod, job).exists()
}

/// To the filler of a pod whose memory is behind it. None when there is none.
pub fn connect(pod: &Pod, job: &str) -> Result<Option<UnixStream>> {
    match UnixStream::connect(path(pod, job)) {
        Ok(stream) => Ok(Some(stream)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ECONNREFUSED)) => Ok(None),
        Err(error) => Err(error).doing(|| format!("reach the filler of pod {}", pod.id())),
    }
}

/// The way to the source.
pub(super) struct Behind {
    listener: UnixListener,
    path: PathBuf,
    /// Whose memory each record is.
    owners: Vec<MmId>,
    carrier: Option<Carrier>,
    /// Record and window of what was asked for and has not come, and how many bytes of it that is.
    asked: BTreeMap<(usize, u64), u64>,
    asked_bytes: u64,
    urgent: BTreeSet<(usize, u64)>,
    /// What has come and could not be put yet.
    come: VecDeque<(usize, u64, Vec<u8>)>,
}

struct Carrier {
    stream: UnixStream,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
}

impl Behind {
    pub fn open(pod: &Pod, job: &str, owners: Vec<MmId>) -> Result<Behind> {
        let path = path(pod, job);
        let _ = fs::remove_file(&path); // of an attempt that failed
        let listener = UnixListener::bind(&path).doing(|| format!("listen at {}", path.display()))?;
        listener.set_nonblocking(true).doing(|| "set up a socket".into())?;
        Ok(Behind {
            listener,
            path,
            owners,
            carrier: None,
            asked: BTreeMap::new(),
            asked_bytes: 0,
            urgent: BTreeSet::new(),
            come: VecDeque::new(),
        })
    }

    pub fn descriptor(&self) -> i32 {
        self.listener.as_raw_fd()
    }

    /// Whether a window of a record is under way already.
    fn is_asked(&self, record: usize, window: u64, urgent: bool) -> bool {
        let key = (record, window);
        self.carrier.is_none() || if urgent { self.urgent.contains(&key) } else { self.asked.contains_key(&key) }
    }

    /// Asks for pages of a window of a record.
    fn ask(&mut self, record: usize, window: u64, pages: u64, urgent: bool) {
        let key = (record, window);
        let Some(carrier) = &mut self.carrier else { return };
        if urgent {
            self.urgent.insert(key);
        }
        // What is urgent may be other pages than were asked for before, which then do not come.
        let bytes = u64::from(pages.count_ones()) * PAGE;
        self.asked_bytes += bytes;
        self.asked_bytes -= self.asked.insert(key, bytes).unwrap_or(0);
        let want = Want { urgent, mm: self.owners[record].0, address: window, pages };
        carrier.outgoing.extend(want.words());
    }

    /// Pages of a window have come.
    fn came(&mut self, record: usize, window: u64, bytes: u64) {
        let key = (record, window);
        let Some(left) = self.asked.get_mut(&key) else { return };
        let counted = bytes.min(*left);
        *left -= counted;
        self.asked_bytes -= counted;
        if *left == 0 {
            self.asked.remove(&key);
            self.urgent.remove(&key);
        }
    }

    /// Somebody carries from now on; what was asked of who did before is lost.
    fn accept(&mut self) -> bool {
        let Ok((stream, _)) = self.listener.accept() else { return false };
        if stream.set_nonblocking(true).is_err() {
            return false;
        }
        self.lost();
        self.carrier = Some(Carrier { stream, incoming: Vec::new(), outgoing: Vec::new() });
        true
    }

    fn lost(&mut self) {
        self.carrier = None;
        self.asked.clear();
        self.urgent.clear();
        self.asked_bytes = 0;
    }

    /// Takes in what has come and sends what is to be sent. False when the carrier is lost.
    fn exchange(&mut self) -> bool {
        let Some(carrier) = &mut self.carrier else { return true };
        let alive = carrier.send() && carrier.receive() && carrier.makes_sense();
        while let Some((mm, address, bytes)) = self.carrier.as_mut().and_then(Carrier::next) {
            let Some(record) = self.owners.iter().position(|owner| owner.0 == mm) else { continue };
            self.came(record, address & !(WINDOW - 1), bytes.len() as u64);
            self.come.push_back((record, address, bytes));
        }
        if !alive {
            self.lost();
        }
        alive
    }
}

impl Carrier {
    fn send(&mut self) -> bool {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(n) => drop(self.outgoing.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }

    fn receive(&mut self) -> bool {
        let mut buffer = vec![0; 256 << 10];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return false,
                Ok(n) => self.incoming.extend(&buffer[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
            // Some at a time, so that it is put before there is more of it.
            if self.incoming.len() as u64 >= MOST_ASKED {
                return true;
            }
        }
    }

    /// Whether what comes next is no more than anybody asks for at once.
    fn makes_sense(&self) -> bool {
        let length = self.incoming.get(16..PAGES).and_then(|word| word.first_chunk()).copied();
        length.is_none_or(|word| u64::from_le_bytes(word) <= WINDOW)
    }

    fn next(&mut self) -> Option<(u64, u64, Vec<u8>)> {
        let head: &[u8; PAGES] = self.incoming.first_chunk()?;
        let word = |at: usize| head[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
        let (mm, address, bytes) = (word(0), word(8), usize::try_from(word(16)).ok()?);
        let end = PAGES.checked_add(bytes)?;
        if self.incoming.len() < end {
            return None;
        }
        let rest = self.incoming.split_off(end);
        let mut all = std::mem::replace(&mut self.incoming, rest);
        Some((mm, address, all.split_off(PAGES)))
    }
}

impl Filler {
    fn behind(&mut self) -> &mut Behind {
        match &mut self.from {
            super::From::Behind(behind) => behind,
            super::From::File(_) => unreachable!("a filler of this kind has one"),
        }
    }

    /// Until nothing is missing any more, or the pod has ended; false when the keeper has gone before.
    pub(super) fn fill_from_behind(&mut self, keeper: &mut UnixStream) -> Result<bool> {
        loop {
            let room = self.put_what_has_come()?;
            if !self.listen(keeper, PollTimeout::ZERO)? {
                return Ok(false);
            }
            self.answer_faults()?;
            if self.spaces.values().all(|space| space.missing.is_empty()) {
                self.whole();
                return Ok(true);
            }
            self.ask_for_more();
            if !self.behind().exchange() {
                self.begin_anew();
                continue;
            }
            if !self.behind().come.is_empty() && room {
                continue;
            }
            if self.wait_behind(keeper, room)? {
                return Ok(true);
            }
        }
    }

    /// Waits until something happens: whether the pod has ended.
    fn wait_behind(&mut self, keeper: &UnixStream, room: bool) -> Result<bool> {
        let super::From::Behind(behind) = &self.from else { return Ok(true) };
        let read = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![read(self.init.as_fd()), read(behind.listener.as_fd()), read(keeper.as_fd())];
        fds.extend(self.spaces.values().map(|space| read(space.fault.as_fd())));
        fds.extend(behind.carrier.as_ref().map(|carrier| {
            let mut flags = PollFlags::POLLIN;
            flags.set(PollFlags::POLLOUT, !carrier.outgoing.is_empty());
            PollFd::new(carrier.stream.as_fd(), flags)
        }));
        let patience = if room { PollTimeout::NONE } else { PollTimeout::from(NO_ROOM) };
        match poll(&mut fds, patience) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).doing(|| "wait for memory".into()),
        }
        let happened = |at: usize| fds[at].any() == Some(true);
        let (ended, called) = (happened(0), happened(1));
        drop(fds);
        if called && self.behind().accept() {
            self.begin_anew();
            self.waits_for_somebody(false);
        }
        Ok(ended)
    }

    /// What is missing has to be asked for from the beginning.
    fn begin_anew(&mut self) {
        self.turns = turns(self.spaces.iter().map(|(number, space)| (*number, &space.missing)));
        if self.behind().carrier.is_none() {
            self.waits_for_somebody(true);
        }
    }

    /// Writes down that nobody brings it, for a person who wonders why the pod stands still; or that somebody does again.
    fn waits_for_somebody(&self, nobody: bool) {
        let text =
            "some of its memory is still on the host that it left, and the way there is lost: `pod job resume` there";
        let _ = self.filling.pod.update_quickly(|status| status.problem = nobody.then(|| text.to_owned()));
    }

    /// False when there was no room for some of it.
    fn put_what_has_come(&mut self) -> Result<bool> {
        while let Some((record, from, bytes)) = self.behind().come.pop_front() {
            let mut patience = PollTimeout::ZERO;
            if self.put_everywhere(record, from, &bytes, &mut patience)? == Put::Again {
                self.behind().come.push_front((record, from, bytes));
                return Ok(patience == PollTimeout::ZERO);
            }
        }
        Ok(true)
    }

    /// Puts pages into every space that misses them: children that were forked meanwhile miss what their parents do.
    fn put_everywhere(&mut self, record: usize, from: u64, bytes: &[u8], patience: &mut PollTimeout) -> Result<Put> {
        let end = from + bytes.len() as u64;
        let numbers: Vec<usize> = self.spaces.keys().copied().collect();
        for number in numbers {
            let Some(space) = self.spaces.get(&number) else { continue };
            // Where it was at first, which is where it is mostly.
            let mut places = space.missing.within(from..end);
            places.retain(|(start, piece)| piece.record == record && piece.into == *start);
            if self.moved {
                let all = space.missing.iter().filter(|(start, piece)| piece.record == record && piece.into != *start);
                places.extend(all.filter_map(|(start, piece)| part(start, piece, from..end)));
            }
            for (start, piece) in places {
                let at = (piece.into - from) as usize;
                let these = &bytes[at..at + (piece.end - start) as usize];
                let Some(space) = self.spaces.get(&number) else { break };
                let doubt = self.doubt.filter(|(of, _)| *of == number).map(|(_, address)| address);
                let (there, outcome) = put_all(&space.fault, start, these, doubt, patience)?;
                let outcome = self.done(number, there, outcome)?;
                if outcome == Put::Again {
                    return Ok(Put::Again);
                }
            }
        }
        Ok(Put::Done)
    }

    /// Asks for pages that somebody waits for; those that are nobody's are zeros.
    fn answer_faults(&mut self) -> Result<()> {
        for (number, address) in std::mem::take(&mut self.faults) {
            let Some(space) = self.spaces.get(&number) else { continue };
            match space.missing.at(address) {
                Some((start, piece)) => {
                    self.ask_around(number, (start, piece), address, true);
                    // Until it is there: the next carrier may have to be asked.
                    self.faults.push((number, address));
                }
                None => {
                    let mut patience = PollTimeout::ZERO;
                    let outcome = put(|| space.fault.zero(address), &mut patience)?;
                    // It may have been put while nobody looked.
                    let _ = space.fault.wake(address);
                    if self.done(number, address..address + PAGE, outcome)? == Put::Again {
                        self.faults.push((number, address));
                    }
                }
            }
        }
        Ok(())
    }

    /// Asks for what is next, as far ahead as that may be.
    fn ask_for_more(&mut self) {
        while self.behind().carrier.is_some() && self.behind().asked_bytes < MOST_ASKED {
            let Some((number, start, piece)) = self.turns.pop() else {
                let missing = self.behind().asked.is_empty();
                if missing {
                    // What mremap(2) and fork(2) have put elsewhere meanwhile.
                    let moved = turns(self.spaces.iter().map(|(number, space)| (*number, &space.missing)));
                    self.turns = moved;
                }
                if self.turns.is_empty() {
                    return;
                }
                continue;
            };
            let rest = start + ((piece.into & !(WINDOW - 1)) + WINDOW - piece.into);
            if rest < piece.end {
                let into = piece.into + (rest - start);
                self.turns.push((number, rest, super::Piece { into, ..piece }));
            }
            self.ask_around(number, (start, piece), start, false);
        }
    }

    /// Asks for what is missing of the window in which an address of a piece was, unless that is under way.
    fn ask_around(&mut self, number: usize, (start, piece): (u64, super::Piece), address: u64, urgent: bool) {
        let at = piece.into + (address - start);
        let window = at & !(WINDOW - 1);
        if self.behind().is_asked(piece.record, window, urgent) {
            return;
        }
        let Some(space) = self.spaces.get(&number) else { return };
        // All of it that is where it was at first; or of the piece, if that was moved.
        let mut parts = space.missing.within(window..window + WINDOW);
        parts.retain(|(start, found)| found.record == piece.record && found.into == *start);
        if piece.into != start {
            parts = part(start, piece, window..window + WINDOW).into_iter().collect();
        }
        let pages = mask(window, &parts);
        if pages != 0 {
            self.behind().ask(piece.record, window, pages, urgent);
        }
    }

    /// Tells the source, if it hears us.
    fn whole(&mut self) {
        self.waits_for_somebody(false);
        let _ = fs::remove_file(&self.behind().path);
        let Some(carrier) = &mut self.behind().carrier else { return };
        carrier.outgoing.extend(Want { urgent: false, mm: WHOLE, address: 0, pages: 0 }.words());
        let _ = carrier.stream.set_nonblocking(false);
        carrier.send();
    }
}

/// The pages of a window that lie in these pieces, by where those were at first.
fn mask(window: u64, parts: &[(u64, super::Piece)]) -> u64 {
    let bits = |(start, piece): &(u64, super::Piece)| {
        let (first, count) = ((piece.into - window) / PAGE, (piece.end - start) / PAGE);
        u64::MAX.checked_shr(64 - count as u32).unwrap_or(0) << first
    };
    parts.iter().map(bits).fold(0, |all, bits| all | bits)
}

/// What of a piece lies in a range of its record.
fn part(start: u64, piece: super::Piece, range: std::ops::Range<u64>) -> Option<(u64, super::Piece)> {
    let end = piece.into + (piece.end - start);
    let (from, to) = (piece.into.max(range.start), end.min(range.end));
    let at = start + from.checked_sub(piece.into)?;
    (from < to).then(|| (at, super::Piece { end: at + (to - from), record: piece.record, into: from }))
}

#[cfg(test)]
mod tests {
    use super::super::Piece;
    use super::*;

    #[test]
    fn words_are_understood() {
        let want = Want { urgent: true, mm: 7, address: 0x4_0000, pages: 0xf0 };
        assert_eq!(word(&want.words()), Word::Want(want));
        assert_eq!(word(&Want { mm: WHOLE, ..want }.words()), Word::Whole);
    }

    #[test]
    fn pages_of_a_window_are_bits() {
        let piece = |from: u64, pages: u64| (from, Piece { end: from + pages * PAGE, record: 3, into: from });
        let window = 7 * WINDOW;
        assert_eq!(mask(window, &[]), 0);
        assert_eq!(mask(window, &[piece(window, 64)]), u64::MAX);
        assert_eq!(mask(window, &[piece(window, 1), piece(window + 63 * PAGE, 1)]), 1 | 1 << 63);
        assert_eq!(mask(window, &[piece(window + 4 * PAGE, 4)]), 0xf0);
        // Moved: it is asked for by where it was.
        assert_eq!(mask(window, &[(0x1000, Piece { end: 0x3000, record: 3, into: window + PAGE })]), 6);
    }

    #[test]
    fn what_has_moved_is_found_by_its_record() {
        let piece = Piece { end: 0x50_0000, record: 3, into: 0x10_0000 };
        let found = part(0x40_0000, piece, 0x10_8000..0x10_9000).unwrap();
        assert_eq!(found, (0x40_8000, Piece { end: 0x40_9000, record: 3, into: 0x10_8000 }));
        assert_eq!(part(0x40_0000, piece, 0x9_0000..0x10_1000).unwrap().0, 0x40_0000);
        assert_eq!(part(0x40_0000, piece, 0x20_0000..0x20_1000), None);
        assert_eq!(part(0x40_0000, piece, 0x9_0000..0x10_0000), None);
    }

    #[test]
    fn pages_come_in_any_pieces() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut carrier = Carrier { stream: ours, incoming: Vec::new(), outgoing: Vec::new() };
        let sent: Vec<u8> = [&head(MmId(5), 0x2000, 3)[..], b"abc", &head(MmId(6), 0, 0)].concat();
        let mut came = Vec::new();
        for piece in sent.chunks(5) {
            (&theirs).write_all(piece).unwrap();
            assert!(carrier.receive());
            came.extend(std::iter::from_fn(|| carrier.next()));
        }
        assert_eq!(came, [(5, 0x2000, b"abc".to_vec()), (6, 0, Vec::new())]);
        assert!(carrier.makes_sense(), "nothing has come");
        // Nobody asks for so much at once.
        (&theirs).write_all(&head(MmId(5), 0, WINDOW + 1)).unwrap();
        assert!(carrier.receive() && !carrier.makes_sense());
        drop(theirs);
        assert!(!carrier.receive());
    }
}
