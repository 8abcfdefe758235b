//! A server with workers: memory that is written before they are forked and shared by all since, but for what one of them
//! has written, given back, unmapped, protected or moved. Every page says what it is, and each process counts those that it
//! has not alone (pagemap, bit 56): as many as before, or the sharing was lost on the way.

use crate::sys::{Map, Region};
use crate::{Guest, sys};
use anyhow::{Context, Result, bail, ensure};
use libc::{MAP_GROWSDOWN, MAP_PRIVATE, PROT_NONE, PROT_READ, PROT_WRITE};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

const PAGE: usize = 4096;
const PAGES: usize = 256;
/// Of anonymous memory; then one that grows downwards, one of a file, and one that is to be of huge pages.
const PLAIN: usize = 16;
const DOWN: usize = PLAIN;
const OF_FILE: usize = PLAIN + 1;
const HUGE: usize = PLAIN + 2;
const CHUNKS: usize = PLAIN + 3;

/// What a process is asked: to look at its pages, and to count those that it shares, too.
const LOOK: u8 = 0;
const COUNT: u8 = 1;

/// What becomes of a chunk that a process has no more, or may not read.
#[derive(Clone, Copy, PartialEq)]
enum State {
    There,
    Unreadable,
    Unmapped,
}

struct Chunk {
    region: Region,
    state: State,
    /// It was moved: nobody else has it at its place.
    moved: bool,
    /// What each page says; 0 for zeros.
    said: Vec<u64>,
}

/// What a process has.
struct Memory {
    name: &'static str,
    chunks: Vec<Chunk>,
    /// Pages that others have too, by chunk, as they were found first.
    shared: Option<Vec<usize>>,
}

/// Pages that the server writes when it has some of its workers already. Those have them together and the later ones have
/// them with the server; only the one or the other is kept.
fn between(page: usize) -> bool {
    page % 64 == 3
}

fn page_of(said: u64) -> Vec<u8> {
    said.to_ne_bytes().repeat(PAGE / 8)
}

impl Memory {
    fn new() -> Result<Memory> {
        let path = "/var/tmp/guest-prefork";
        let mut file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        file.write_all(&page_of(7).repeat(PAGES))?;
        let mut chunks = Vec::new();
        for number in 0..CHUNKS {
            let map = match number {
                DOWN => Map::anonymous(PAGES * PAGE, MAP_PRIVATE | MAP_GROWSDOWN),
                OF_FILE => Map::of(file.as_raw_fd(), PAGES * PAGE, MAP_PRIVATE),
                _ => Map::anonymous(PAGES * PAGE, MAP_PRIVATE),
            };
            let before = if number == OF_FILE { 7 } else { 0 };
            chunks.push(Chunk { region: map.map()?, state: State::There, moved: false, said: vec![before; PAGES] });
        }
        chunks[HUGE].region.advise(libc::MADV_HUGEPAGE)?;
        let mut memory = Memory { name: "server", chunks, shared: None };
        // Some pages are never touched, and some are zeros that were written.
        memory.write(1, |page| page % 16 != 6);
        for chunk in &mut memory.chunks {
            (0..PAGES).filter(|page| page % 16 == 5).for_each(|page| {
                chunk.region.write(page * PAGE, &[0; PAGE]);
                chunk.said[page] = 0;
            });
        }
        Ok(memory)
    }

    /// Pages of all chunks.
    fn write(&mut self, by: u64, which: impl Fn(usize) -> bool) {
        for (number, chunk) in self.chunks.iter_mut().enumerate().filter(|(_, chunk)| chunk.state == State::There) {
            for page in (0..PAGES).filter(|page| which(*page)) {
                chunk.said[page] = (by << 32) | (number * PAGES + page) as u64;
                chunk.region.write(page * PAGE, &page_of(chunk.said[page]));
            }
        }
    }

    fn give_back(&mut self, chunk: usize, pages: std::ops::Range<usize>) -> Result<()> {
        let chunk = &mut self.chunks[chunk];
        chunk.region.give_back(pages.start * PAGE, pages.len() * PAGE)?;
        chunk.said[pages].fill(0);
        Ok(())
    }

    fn unmap(&mut self, chunk: usize) -> Result<()> {
        self.chunks[chunk].state = State::Unmapped;
        self.chunks[chunk].region.unmap_place()
    }

    fn protect(&mut self, chunk: usize, protection: i32) -> Result<()> {
        let chunk = &mut self.chunks[chunk];
        chunk.region.protect(0, PAGES * PAGE, protection)?;
        chunk.state = if protection == PROT_NONE { State::Unreadable } else { State::There };
        Ok(())
    }

    fn move_away(&mut self, chunk: usize) -> Result<()> {
        self.chunks[chunk].moved = true;
        self.chunks[chunk].region.move_away()
    }

    /// Nothing of it makes a copy of a page.
    fn verify(&mut self) -> Result<()> {
        for (number, chunk) in self.chunks.iter_mut().enumerate() {
            let bytes = PAGES * PAGE;
            match chunk.state {
                State::Unmapped => {
                    ensure!(!chunk.region.readable(0), "{}: chunk {number} is there", self.name);
                    continue;
                }
                State::Unreadable => {
                    ensure!(!chunk.region.readable(0), "{}: chunk {number} can be read", self.name);
                    chunk.region.protect(0, bytes, PROT_READ)?;
                }
                State::There => {}
            }
            for (page, said) in chunk.said.iter().enumerate() {
                let found = chunk.region.read(page * PAGE, PAGE);
                let word = u64::from_ne_bytes(found[..8].try_into()?);
                let name = self.name;
                ensure!(found == page_of(*said), "{name}: page {page} of chunk {number} says {word:x}, not {said:x}");
            }
            if chunk.state == State::Unreadable {
                chunk.region.protect(0, bytes, PROT_NONE)?;
            }
        }
        Ok(())
    }

    /// Pages that others have too, by chunk.
    fn shared(&self) -> Result<Vec<usize>> {
        const PRESENT: u64 = 1 << 63;
        const OF_A_FILE: u64 = 1 << 61;
        const MAPPED_ONCE: u64 = 1 << 56;
        let pagemap = File::open("/proc/self/pagemap")?;
        let mut all = Vec::new();
        for (number, chunk) in self.chunks.iter().enumerate() {
            // Others have them at another place; and huge pages come and go.
            if chunk.state == State::Unmapped || chunk.moved || number == HUGE {
                all.push(0);
                continue;
            }
            let mut written = Vec::new();
            // A page that the kernel is moving, to make room for a huge one, is not there meanwhile, and one of a file not
            // before it is touched.
            crate::until("all pages to be there", || {
                let mut entries = vec![0; PAGES * 8];
                if pagemap.read_exact_at(&mut entries, (chunk.region.at() / PAGE * 8) as u64).is_err() {
                    return false;
                }
                let entry = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
                // The page of zeros, which whoever reads what was never touched gets, is everybody's.
                let pages = entries.chunks_exact(8).map(entry).zip(&chunk.said).enumerate();
                let pages: Vec<_> = pages.filter(|(page, (_, said))| **said != 0 && !between(*page)).collect();
                let away = pages.iter().filter(|(_, (entry, _))| entry & PRESENT == 0);
                away.filter(|_| chunk.state == State::There)
                    .for_each(|(page, _)| drop(chunk.region.read(page * PAGE, 1)));
                written = pages.iter().map(|(_, (entry, _))| *entry).collect();
                written.iter().all(|entry| entry & PRESENT != 0)
            })?;
            all.push(written.iter().filter(|entry| *entry & (OF_A_FILE | MAPPED_ONCE) == 0).count());
        }
        Ok(all)
    }

    /// That as many pages are shared as when it was asked first.
    fn verify_shared(&mut self) -> Result<()> {
        let now = self.shared()?;
        let before = self.shared.get_or_insert_with(|| now.clone());
        ensure!(now == *before, "{}: of each chunk so many pages are shared: {now:?}, not {before:?}", self.name);
        Ok(())
    }

    /// Answers with what is wrong, a line each time.
    fn serve(mut self, mut link: UnixStream) -> i32 {
        let mut byte = [0];
        while link.read_exact(&mut byte).is_ok() {
            let found = self.verify().and_then(|()| if byte == [COUNT] { self.verify_shared() } else { Ok(()) });
            let line = found.map_or_else(|error| format!("{error:#}\n"), |()| "right\n".into());
            if link.write_all(line.as_bytes()).is_err() {
                break;
            }
        }
        0
    }
}

/// The server, and the links to the others.
struct Prefork {
    memory: Memory,
    links: Vec<UnixStream>,
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let mut memory = Memory::new()?;
    let mut prefork = Links::default();
    for _ in 0..6 {
        let (ours, theirs) = UnixStream::pair()?;
        prefork.ours.push(ours);
        prefork.theirs.push(Some(theirs));
    }
    early_workers(&mut memory, &mut prefork)?;
    memory.write(6, between);
    late_workers(&mut memory, &mut prefork)?;
    // The server's own from here on: the others go on sharing what was there before.
    memory.write(9, |page| page % 16 == 1);
    memory.give_back(7, 10..60)?;
    memory.unmap(8)?;
    memory.protect(9, PROT_NONE)?;
    memory.protect(10, PROT_READ | PROT_WRITE)?;
    let mut prefork = Prefork { memory, links: prefork.ours };
    // Not before all have done what they do is it known what they share.
    prefork.ask(LOOK)?;
    prefork.verify()?;
    let shared: usize = prefork.memory.shared()?.iter().sum();
    ensure!(shared > PLAIN * PAGES / 2, "only {shared} pages are shared");
    Ok(Box::new(prefork))
}

fn early_workers(memory: &mut Memory, links: &mut Links) -> Result<()> {
    worker(memory, links, 0, |memory, _| {
        memory.name = "first";
        memory.write(2, |page| page % 16 == 8);
        memory.protect(1, PROT_READ)
    })?;
    // One that has a child itself. What it moves is where it was in all others.
    worker(memory, links, 1, |memory, links| {
        memory.name = "second";
        memory.write(3, |page| page % 16 == 9);
        memory.move_away(2)?;
        worker(memory, links, 4, |memory, _| {
            memory.name = "grandchild";
            memory.write(4, |page| page % 16 == 10);
            memory.unmap(3)
        })?;
        memory.write(5, |page| page % 64 == 11);
        Ok(())
    })?;
    links.theirs[4] = None;
    worker(memory, links, 2, |memory, _| {
        memory.name = "third";
        memory.give_back(4, 0..PAGES)?;
        memory.give_back(5, 100..120)?;
        memory.give_back(OF_FILE, 0..16)?;
        memory.chunks[OF_FILE].said[..16].fill(7);
        memory.unmap(6)
    })
}

fn late_workers(memory: &mut Memory, links: &mut Links) -> Result<()> {
    worker(memory, links, 3, |memory, _| {
        memory.name = "fourth";
        memory.write(7, |page| page % 32 == 12);
        Ok(())
    })?;
    // One whose parent, the leader of its session, has ended.
    let parent = sys::fork(|| {
        links.ours.clear();
        let made = nix::unistd::setsid().map_err(anyhow::Error::from).and_then(|_| {
            worker(memory, links, 5, |memory, _| {
                memory.name = "orphan";
                memory.write(8, |page| page % 32 == 13);
                Ok(())
            })
        });
        i32::from(made.is_err())
    })?;
    links.theirs[5] = None;
    sys::reap(parent)
}

/// The ends of the server, and those of its workers until they have them.
#[derive(Default)]
struct Links {
    ours: Vec<UnixStream>,
    theirs: Vec<Option<UnixStream>>,
}

/// Forks a process that does something with its memory and then answers on the link of this number.
fn worker(
    memory: &mut Memory,
    links: &mut Links,
    number: usize,
    change: impl FnOnce(&mut Memory, &mut Links) -> Result<()>,
) -> Result<()> {
    sys::fork(|| {
        // Whoever keeps an end of another would keep that waiting when the server ends.
        links.ours.clear();
        let link = links.theirs[number].take();
        let mut memory = Memory { name: memory.name, chunks: std::mem::take(&mut memory.chunks), shared: None };
        match (change(&mut memory, links), link) {
            (Ok(()), Some(link)) => {
                links.theirs.clear();
                memory.serve(link)
            }
            _ => 1,
        }
    })?;
    links.theirs[number] = None;
    Ok(())
}

impl Guest for Prefork {
    fn verify(&mut self) -> Result<()> {
        self.memory.verify()?;
        self.memory.verify_shared()?;
        self.ask(COUNT)
    }
}

impl Prefork {
    fn ask(&mut self, what: u8) -> Result<()> {
        for link in &mut self.links {
            link.write_all(&[what])?;
            let mut line = Vec::new();
            let mut byte = [0];
            while byte != *b"\n" {
                link.read_exact(&mut byte).context("a worker is gone")?;
                line.extend(byte);
            }
            if line != b"right\n" {
                bail!("{}", String::from_utf8_lossy(&line).trim_end());
            }
        }
        Ok(())
    }
}
