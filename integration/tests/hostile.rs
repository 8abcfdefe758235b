//! A peer that means harm, or is broken: whoever speaks to it says what is wrong, by a code, and ends; nothing was run or written for
//! it, and the next honest move works.
//!
//! As a source it speaks to `pod receive` over a pipe, which is all that ssh is; what an honest source says is recorded first, so
//! that harm can come at any place in it. As a destination it is a program that `--remote-pod` names. What neither side can be kept
//! from is to lie about what it has done itself: who may log in as root on a host has that host, and a destination that says
//! RUNNING is believed.

use anyhow::{Context, Result, bail, ensure};
use integration::bed::{Bed, Census, Host};
use integration::pods::said;
use integration::wait::{SOON, until_true};
use pod_migrate::ids::MmId;
use pod_migrate::image::{Kind, PageRun, Reader, Writer};
use pod_migrate::link::direct::Door;
use pod_migrate::migrate::protocol::{Answer, Arrival, Hello, Offer, PROTOCOL, Purpose, Say};
use pod_migrate::storage::{Entry, Meta, Node};
use pod_runtime::Problem;
use serde::Serialize;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::Duration;
use xxhash_rust::xxh3::xxh3_64_with_seed;

const POD: &str = "counter";

/// What one side says, made of records.
struct Words(Writer<Vec<u8>>);

impl Words {
    fn new() -> Words {
        Words(Writer::new(Vec::new()))
    }

    fn say<T: Serialize>(mut self, message: &T) -> Result<Words> {
        self.0.put(Kind::MESSAGE, 0, message)?;
        Ok(self)
    }

    fn put<T: Serialize>(mut self, kind: Kind, id: u64, state: &T) -> Result<Words> {
        self.0.put(kind, id, state)?;
        Ok(self)
    }

    fn bytes(mut self) -> Result<Vec<u8>> {
        Ok(std::mem::take(self.0.sink()?))
    }
}

fn hello(purpose: Purpose) -> Say {
    Say::Hello(Hello { host: "hostA".into(), ..Hello::new(purpose) })
}

fn a_move(job: &str) -> Say {
    hello(Purpose::Move { job: job.into() })
}

/// The head of a record with a checksum that fits, so that what it claims is read.
fn head(kind: u16, version: u16, length: u64, sequence: u64) -> [u8; 48] {
    let mut b = [0; 48];
    b[..2].copy_from_slice(&kind.to_le_bytes());
    b[2..4].copy_from_slice(&version.to_le_bytes());
    b[16..24].copy_from_slice(&length.to_le_bytes());
    b[32..40].copy_from_slice(&xxhash_rust::xxh3::xxh3_64(b"").to_le_bytes());
    let check = xxh3_64_with_seed(&b[..40], sequence);
    b[40..].copy_from_slice(&check.to_le_bytes());
    b
}

/// How `pod receive` took something.
#[derive(Debug)]
struct Heard {
    code: i32,
    said: String,
    answers: Vec<Answer>,
    resident_kib: u64,
}

impl Heard {
    /// The codes of what was said on either way.
    fn codes(&self) -> Vec<String> {
        let mut codes: Vec<String> =
            self.said.split("error[").skip(1).filter_map(|rest| Some(rest.split_once(']')?.0.to_owned())).collect();
        for answer in &self.answers {
            match answer {
                Answer::Refused(reports) => codes.extend(reports.iter().map(|report| report.code.clone())),
                Answer::Failed(report) => codes.push(report.code.clone()),
                _ => {}
            }
        }
        codes
    }
}

/// Says all of it to a `pod receive`, then nothing more, or (`open`) nothing but does not hang up.
fn speak(host: &Host, words: &[u8], open: bool) -> Result<Heard> {
    let mut command = host.command("/usr/bin/time");
    command.args(["-f", "resident %M", "pod", "receive"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let (mut stdin, mut stdout) = (stdin.context("a pipe")?, stdout.context("a pipe")?);
    let mut stderr = child.stderr.take().context("a pipe")?;
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || {
            // It may have hung up long before.
            let _ = stdin.write_all(words);
            open.then_some(stdin)
        });
        let errors = scope.spawn(move || {
            let mut said = String::new();
            stderr.read_to_string(&mut said).map(|_| said)
        });
        let answers = scope.spawn(move || {
            let mut bytes = Vec::new();
            let _ = stdout.read_to_end(&mut bytes);
            let mut answers = Vec::new();
            if let Ok(mut reader) = Reader::new(&bytes[..]) {
                while let Ok(Some(record)) = reader.next() {
                    answers.extend(record.state::<Answer>().ok());
                }
            }
            answers
        });
        let ended = until_true("pod receive to end", SOON * 3, || matches!(child.try_wait(), Ok(Some(_)) | Err(_)));
        if ended.is_err() {
            child.kill()?;
        }
        let code = child.wait()?.code().unwrap_or(-1);
        drop(writer.join());
        let said = errors.join().map_err(|_| anyhow::anyhow!("a thread"))??;
        let answers = answers.join().map_err(|_| anyhow::anyhow!("a thread"))?;
        ended.with_context(|| said.clone())?;
        let resident = said.lines().find_map(|line| line.strip_prefix("resident ")?.parse().ok()).unwrap_or(0);
        Ok(Heard { code, said, answers, resident_kib: resident })
    })
}

/// Two hosts, a pod on the first, and every byte that an honest source has said of it.
struct Scene {
    bed: Bed,
    before: Vec<Census>,
    session: Vec<u8>,
    job: String,
    offer: Offer,
}

impl Scene {
    fn new() -> Result<Scene> {
        let bed = Bed::new()?;
        let before = bed.census()?;
        bed.a().guest(POD, &[], 0)?;
        // Something of its own on disk.
        bed.a().pod(&["exec", POD, "sh", "-c", "mkdir -p /srv/own && echo a file >/srv/own/file"])?;
        let session = bed.shared().join("session");
        let recorder = script(&bed, "recorder", &format!("tee {} | pod \"$@\"\n", session.display()))?;
        bed.a().pod(&["migrate", POD, "--to", "hostB", "--tunnelled", "--remote-pod", &recorder])?;
        bed.b().pod(&["migrate", POD, "--to", "hostA"])?;
        bed.b().pod(&["rm", POD])?;
        let session = fs::read(session)?;
        let mut reader = Reader::new(&session[..])?;
        let mut said = || -> Result<Say> { Ok(reader.next()?.context("it said more")?.state()?) };
        let (Say::Hello(hello), Say::Offer(offer)) = (said()?, said()?) else { bail!("it began otherwise") };
        let Purpose::Move { job } = hello.purpose else { bail!("it wanted something else") };
        Ok(Scene { bed, before, session, job, offer: *offer })
    }

    /// What an honest source said, with another job, up to the nth record of that kind (which does not come any more).
    fn until(&self, kind: Kind, nth: usize, job: &str) -> Result<Words> {
        let mut reader = Reader::new(&self.session[..])?;
        let mut words = Words::new().say(&a_move(job))?;
        reader.next()?;
        let mut met = usize::from(kind == Kind::MESSAGE);
        // The far end of the recording is where the source hung up.
        while let Ok(Some(record)) = reader.next() {
            met += usize::from(record.kind == kind);
            if met == nth && record.kind == kind {
                return Ok(words);
            }
            match record.run {
                None => words.0.again(&record)?,
                Some(run) => {
                    let mut bytes = vec![0; run.bytes as usize];
                    let mut at = 0;
                    while at < bytes.len() {
                        at += reader.read_pages(&mut bytes[at..])?;
                    }
                    words.0.pages(PageRun { ..run }, &[&bytes])?;
                }
            }
        }
        bail!("there is no {kind} record {nth}")
    }

    fn offered(&self, job: &str, change: impl FnOnce(&mut Offer)) -> Result<Words> {
        let mut offer = self.offer.clone();
        change(&mut offer);
        Words::new().say(&a_move(job))?.say(&Say::Offer(Box::new(offer)))
    }

    /// The second host says one of these codes, and has nothing of it.
    fn refuses(&self, what: &str, words: &[u8], codes: &[&str]) -> Result<Heard> {
        let heard = speak(self.bed.b(), words, false).with_context(|| what.to_owned())?;
        self.was_refused(what, &heard, codes)?;
        self.took_nothing(what)?;
        Ok(heard)
    }

    fn was_refused(&self, what: &str, heard: &Heard, codes: &[&str]) -> Result<()> {
        let said = heard.codes();
        println!("{what}: exit {}, {said:?}, {} MiB", heard.code, heard.resident_kib >> 10);
        let refused = heard.answers.iter().any(|answer| matches!(answer, Answer::Refused(_)));
        ensure!(said.iter().any(|code| codes.contains(&code.as_str())), "{what}: {heard:?}");
        ensure!((1..4).contains(&heard.code) || heard.code == 0 && refused, "{what}: exit {}: {heard:?}", heard.code);
        ensure!(!heard.said.contains("panicked"), "{what}: {}", heard.said);
        ensure!(heard.resident_kib < 100 << 10, "{what}: {} KiB of memory", heard.resident_kib);
        Ok(())
    }

    fn took_nothing(&self, what: &str) -> Result<()> {
        ensure!(!self.bed.b().runs(POD), "{what}: it runs there");
        let jobs = self.bed.b().pod(&["job", "ls"])?;
        ensure!(!jobs.contains("receiving"), "{what}: a job is open: {jobs}");
        Ok(())
    }

    /// The pod goes there and back, knows all that it knew, and nothing is left.
    fn end(self, round: usize) -> Result<()> {
        let left = self.before[1].settled(self.bed.b(), SOON * 2)?;
        ensure!(left.is_empty(), "left on hostB:\n{}", left.join("\n"));
        for (from, to, round) in [(self.bed.a(), self.bed.b(), round), (self.bed.b(), self.bed.a(), round + 1)] {
            from.pod(&["migrate", POD, "--to", to.name()])?;
            from.pod(&["rm", POD])?;
            to.pod(&["kill", "-s", "USR1", POD])?;
            said(to, POD, &format!("ok {round}"))?;
        }
        self.bed.a().pod(&["rm", "-f", POD])?;
        self.bed.nothing_left(&self.before)
    }
}

/// A program on every host.
fn script(bed: &Bed, name: &str, lines: &str) -> Result<String> {
    let path = bed.shared().join(name);
    fs::write(&path, format!("#!/bin/sh\n{lines}"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path.to_string_lossy().into_owned())
}

const SPEAKS: &[&str] = &["E-PROTOCOL"];
const DAMAGED: &[&str] = &["E-IMAGE-DAMAGED", "E-LINK"];

/// Bytes that are no stream, or one that claims what is not so.
#[test]
fn a_source_that_does_not_speak_the_protocol() -> Result<()> {
    let scene = Scene::new()?;
    let start = Words::new().bytes()?;
    let begun = Words::new().say(&a_move("0badc0de"))?.bytes()?;
    let after = |head: [u8; 48], rest: &[u8]| [&begun, &head[..], rest].concat();
    scene.refuses("another protocol", b"GET / HTTP/1.1\r\nHost: hostB\r\nAccept: everything\r\n\r\n", &["E-LINK"])?;
    scene.refuses("nothing", b"", &["E-LINK"])?;
    scene.refuses("half of a header", &start[..10], &["E-LINK"])?;
    let mut other = start.clone();
    other[8] = 99;
    scene.refuses("a header that was changed", &other, &["E-LINK"])?;
    let check = xxhash_rust::xxh3::xxh3_64(&other[..24]).to_le_bytes();
    other[24..32].copy_from_slice(&check);
    scene.refuses("another format", &other, &["E-IMAGE-VERSION", "E-LINK"])?;
    for cut in [begun.len() - 1, start.len() + 20, begun.len() / 2] {
        scene.refuses("a record that ends in the middle", &begun[..cut], DAMAGED)?;
    }
    let message = 60_000;
    let known = Kind::MESSAGE.0;
    scene.refuses("a length of 2^64 - 1", &after(head(known, 1, u64::MAX, 1), b"x"), DAMAGED)?;
    scene.refuses("a length one above what is allowed", &after(head(known, 1, (64 << 20) + 1, 1), b"x"), DAMAGED)?;
    scene.refuses("64 MiB of which one byte comes", &after(head(known, 1, 64 << 20, 1), b"x"), DAMAGED)?;
    scene.refuses("a record of no kind", &after(head(message, 1, 0, 1), b""), &["E-IMAGE-VERSION"])?;
    scene.refuses("a record of a later version", &after(head(known, 900, 0, 1), b""), &["E-IMAGE-VERSION"])?;
    scene.refuses("a head that was changed", &after([7; 48], b""), DAMAGED)?;
    scene.refuses("a record that comes twice", &[&begun[..], &begun[start.len()..]].concat(), DAMAGED)?;
    // CBOR: 100,000 arrays in each other; a map that claims 2^60 entries; text that is none.
    for (what, state) in
        [("arrays", vec![0x81; 100_000]), ("a map", vec![0xbb, 0x10, 0, 0, 0, 0, 0, 0, 0]), ("text", vec![0x61, 0xff])]
    {
        let mut h = head(known, 1, state.len() as u64, 1);
        h[32..40].copy_from_slice(&xxhash_rust::xxh3::xxh3_64(&state).to_le_bytes());
        let check = xxh3_64_with_seed(&h[..40], 1);
        h[40..].copy_from_slice(&check.to_le_bytes());
        scene.refuses(&format!("{what} without end"), &after(h, &state), SPEAKS)?;
    }
    scene.end(1)
}

/// Sound messages where they are not due, of jobs that are not theirs, and the same once more.
#[test]
fn a_source_that_says_things_out_of_order() -> Result<()> {
    let scene = Scene::new()?;
    let offer = || Say::Offer(Box::new(scene.offer.clone()));
    let version = Hello { protocol: PROTOCOL + 1, ..Hello::new(Purpose::Check) };
    scene.refuses("a later protocol", &Words::new().say(&Say::Hello(version))?.bytes()?, SPEAKS)?;
    let comes = Words::new().say(&a_move("0badc0d7"))?.say(&Say::Comes { directly: true })?;
    scene.refuses("it comes where nobody has opened", &comes.bytes()?, SPEAKS)?;
    scene.refuses("COMMIT first", &Words::new().say(&Say::Commit)?.bytes()?, SPEAKS)?;
    scene.refuses("OFFER first", &Words::new().say(&offer())?.bytes()?, SPEAKS)?;
    for (what, message) in [("COMMIT", Say::Commit), ("SENT", Say::Sent), ("HELLO", a_move("0badc0de"))] {
        let words = Words::new().say(&a_move("0badc0de"))?.say(&message)?;
        scene.refuses(&format!("{what} where OFFER is due"), &words.bytes()?, SPEAKS)?;
        let words = Words::new().say(&a_move("0badc0d0"))?.say(&offer())?.say(&message)?;
        scene.refuses(&format!("{what} where the pod is due"), &words.bytes()?, DAMAGED)?;
        scene.bed.b().run(&["sh", "-c", "rm -f /var/lib/pod/jobs/0badc0d*"])?;
    }
    let messages = scene.session.len();
    ensure!(messages > 10_000, "the recording has {messages} bytes");
    // The nth MESSAGE of a source: HELLO, OFFER, STOPPED, SENT, COMMIT.
    let running = scene.until(Kind::MESSAGE, 3, "0badc0d8")?.say(&Say::Commit)?;
    scene.refuses("COMMIT where STOPPED is due", &running.bytes()?, &["E-PROTOCOL", "E-IMAGE-DAMAGED"])?;
    let never_sent = scene.until(Kind::MESSAGE, 4, "0badc0de")?.say(&Say::Commit)?;
    scene.refuses("COMMIT where SENT is due", &never_sent.bytes()?, SPEAKS)?;
    let sent_twice = scene.until(Kind::MESSAGE, 5, "0badc0df")?.say(&Say::Sent)?;
    scene.refuses("SENT where COMMIT is due", &sent_twice.bytes()?, SPEAKS)?;
    let no_tree = scene.until(Kind::TREE, 1, "0badc0da")?.say(&Say::Sent)?.say(&Say::Commit)?;
    scene.refuses("COMMIT of a pod without processes", &no_tree.bytes()?, DAMAGED)?;
    let no_memory = scene.until(Kind::MM, 1, "0badc0db")?.say(&Say::Sent)?.say(&Say::Commit)?;
    scene.refuses("COMMIT of a pod without memory", &no_memory.bytes()?, DAMAGED)?;
    let early = scene.until(Kind::MOMENT, 1, "0badc0dc")?.say(&Say::Commit)?;
    scene.refuses("COMMIT among the files", &early.bytes()?, &["E-PROTOCOL", "E-IMAGE-DAMAGED"])?;
    let quiet = scene.until(Kind::MESSAGE, 5, "0badc0dd")?;
    scene.refuses("all of it and no COMMIT", &quiet.bytes()?, &["E-LINK"])?;
    let other = scene.until(Kind::MESSAGE, 5, "0badc0d9")?.say(&a_move("0badc0de"))?;
    scene.refuses("the HELLO of another job where COMMIT is due", &other.bytes()?, SPEAKS)?;
    // The whole of a job that has ended, byte by byte, COMMIT and all.
    scene.refuses("the same once more", &scene.session, SPEAKS)?;
    let theirs = Words::new().say(&a_move(&scene.job))?.say(&offer())?;
    scene.refuses("another offer under a job that ran", &theirs.bytes()?, SPEAKS)?;
    for id in ["../../etc/passwd", "", "abc", "0BADC0DE", "0badc0de\0", "0badc0de/../0badc0df", &"a".repeat(64)] {
        let words = Words::new().say(&a_move(id))?.say(&offer())?;
        scene.refuses(&format!("a job called {id:?}"), &words.bytes()?, &["E-USAGE"])?;
        let words = Words::new().say(&hello(Purpose::Ask { job: id.into() }))?;
        scene.refuses(&format!("a question about a job called {id:?}"), &words.bytes()?, &["E-USAGE"])?;
        let words = Words::new().say(&hello(Purpose::Bring { job: id.into() }))?.say(&Say::Still)?;
        scene.refuses(&format!("memory for a job called {id:?}"), &words.bytes()?, &["E-USAGE"])?;
    }
    // Memory of nobody, and of one that has all.
    let nobody = Words::new().say(&hello(Purpose::Bring { job: "0badbad0".into() }))?.say(&Say::Still)?;
    scene.refuses("memory for a job that nobody knows", &nobody.bytes()?, &["E-NOJOB"])?;
    let mut more = Words::new().say(&hello(Purpose::Bring { job: scene.job.clone() }))?.say(&Say::Still)?;
    more.0
        .pages(PageRun { owner: pod_migrate::image::Owner::Mm(MmId(1)), address: 0x10_0000, bytes: 4 }, &[b"mine"])?;
    let whole = speak(scene.bed.b(), &more.bytes()?, false)?;
    ensure!(format!("{:?}", whole.answers).contains("Whole"), "{whole:?}");
    // It ran: whoever asks is told so, as often as they ask, and it stays so.
    for _ in 0..2 {
        let asked =
            speak(scene.bed.b(), &Words::new().say(&hello(Purpose::Ask { job: scene.job.clone() }))?.bytes()?, false)?;
        ensure!(format!("{:?}", asked.answers).contains("Ran"), "{asked:?}");
    }
    scene.end(1)
}

/// What it is, the codes of which one is due, and what is changed.
type BadOffer = (&'static str, &'static [&'static str], fn(&mut Offer));
/// What it is, all that is said, and the exit codes and codes of which one is due.
type BadAnswer<'a> = (&'a str, Vec<u8>, &'a [i32], &'a [&'a str]);

fn meta() -> Option<Meta> {
    Some(Meta { mode: 0o755, uid: 0, gid: 0, accessed: (0, 0), modified: (0, 0), attributes: Vec::new() })
}

fn entry(path: &[u8], node: Node) -> Entry {
    Entry { path: path.to_vec().into(), node, meta: meta() }
}

/// Names and paths that lead elsewhere.
#[test]
fn a_source_that_wants_to_write_elsewhere() -> Result<()> {
    let scene = Scene::new()?;
    let b = scene.bed.b();
    b.run(&["sh", "-c", "mkdir -p /var/lib/prize && echo mine >/var/lib/prize/file"])?;
    let before = Census::of(b)?;
    let offers: &[BadOffer] = &[
        ("an id that is a path", &["E-USAGE", "E-NOPOD", "E-IMAGE-DAMAGED"], |offer| {
            offer.spec.id = "../../../prize".into()
        }),
        ("an id with NUL", &["E-USAGE", "E-NOPOD", "E-IMAGE-DAMAGED"], |offer| offer.spec.id = "0123456789a\0".into()),
        ("a name that is a path", &["E-NAME", "E-USAGE"], |offer| offer.spec.name = "../../prize".into()),
        ("a name that is an option", &["E-NAME", "E-USAGE"], |offer| offer.spec.name = "-rf".into()),
        ("a name with NUL", &["E-NAME", "E-USAGE"], |offer| offer.spec.name = "a\0b".into()),
        ("a later spec", &["E-IMAGE-VERSION"], |offer| offer.spec.version = 99),
        ("2^64 - 1 bytes of memory", &["E-MEMORY"], |offer| offer.memory = u64::MAX),
        ("2^64 - 1 bytes of files", &["E-DISK"], |offer| offer.files = u64::MAX),
        ("a root that is not here", &["E-ROOTFS-MISSING"], |offer| {
            offer.spec.root.base = pod_runtime::spec::Base::Directory("/var/lib/../nowhere".into());
        }),
    ];
    for (number, (what, codes, change)) in offers.iter().enumerate() {
        let words = scene.offered(&format!("0badf00{number}"), change)?;
        scene.refuses(what, &words.bytes()?, codes)?;
    }
    let volumes: [(&str, &str); 4] =
        [("../prize", "/x"), ("/var/lib/x/../prize", "/x"), ("/var/lib/y", "x"), ("/var/lib/y", "/../x")];
    for (source, destination) in volumes {
        let words = scene.offered("0badf00e", |offer| {
            offer.spec.volumes = vec![pod_runtime::spec::Volume {
                source: source.into(),
                destination: destination.into(),
                read_only: false,
                shared: false,
            }];
        })?;
        scene.refuses(&format!("a volume from {source} at {destination}"), &words.bytes()?, DAMAGED)?;
    }
    let link = |target: &[u8]| Node::Symlink(target.to_vec().into());
    let file = Node::File { size: 4 };
    let long = vec![b'x'; 300];
    let layers: Vec<(&str, Vec<Entry>)> = vec![
        ("a path with ..", vec![entry(b"../../prize/file", file.clone())]),
        ("an absolute path", vec![entry(b"/var/lib/prize/file", file.clone())]),
        ("a path with NUL", vec![entry(b"a\0b", file.clone())]),
        ("a path with an empty part", vec![entry(b"a//b", file.clone())]),
        ("a name that is too long", vec![entry(&long, file.clone())]),
        ("a path through a link", vec![entry(b"way", link(b"/var/lib/prize")), entry(b"way/file", file.clone())]),
        (
            "one through a link of relative",
            vec![entry(b"way", link(b"../../../../..")), entry(b"way/file", file.clone())],
        ),
        ("a hard link to elsewhere", vec![entry(b"way", Node::HardLink(b"../../../prize/file".to_vec().into()))]),
        (
            "a hard link through a link",
            vec![entry(b"way", link(b"/var/lib/prize")), entry(b"other", Node::HardLink(b"way/file".to_vec().into()))],
        ),
        ("to remove elsewhere", vec![entry(b"way", link(b"/var/lib/prize")), entry(b"way/file", Node::Removed)]),
        ("a root that is a file", vec![entry(b"", file.clone())]),
    ];
    for (number, (what, entries)) in layers.into_iter().enumerate() {
        // Among the first files of the pod.
        let mut words = scene.until(Kind::STORAGE_END, 1, &format!("0badfee{number:x}"))?;
        for (id, one) in entries.iter().enumerate() {
            words = words.put(Kind::STORAGE_ENTRY, 9_000 + id as u64, one)?;
        }
        scene.refuses(what, &words.bytes()?, &["E-IMAGE-PATH", "E-IMAGE-DAMAGED"])?;
        ensure!(b.run(&["cat", "/var/lib/prize/file"])? == "mine\n", "{what}: it was written");
    }
    let beyond =
        scene.until(Kind::STORAGE_END, 1, "0badfe00")?.put(Kind::STORAGE_ENTRY, 9_000, &entry(b"short", file))?;
    let mut words = beyond;
    let run = PageRun { owner: pod_migrate::image::Owner::Storage(9_000), address: 4 << 40, bytes: 4 };
    words.0.pages(run, &[b"mine"])?;
    scene.refuses("contents beyond the end of their file", &words.bytes()?, DAMAGED)?;
    let left = before.settled(b, SOON * 2)?;
    ensure!(left.is_empty(), "left:\n{}", left.join("\n"));
    b.run(&["rm", "-r", "/var/lib/prize"])?;
    scene.end(1)
}

/// A flood of filler keeps nobody but who sends it; silence is outwaited; meanwhile others are served.
#[test]
fn a_source_that_floods_or_is_silent() -> Result<()> {
    let scene = Scene::new()?;
    let mut words = Words::new();
    for _ in 0..300_000 {
        words.0.keep_alive()?;
    }
    let words = words.say(&Say::Commit)?;
    scene.refuses("14 MB of filler, then COMMIT", &words.bytes()?, SPEAKS)?;
    let mut log = scene.until(Kind::MOMENT, 1, "0badc0de")?;
    let piece = vec![b'x'; 1 << 20];
    for at in 0..200_u64 {
        log.0.pages(PageRun { owner: pod_migrate::image::Owner::Log, address: at << 20, bytes: 1 << 20 }, &[&piece])?;
    }
    scene.refuses("200 MiB of log", &log.say(&Say::Commit)?.bytes()?, &["E-IMAGE-DAMAGED", "E-SYSTEM"])?;
    let (start, begun) = (Words::new().bytes()?, scene.until(Kind::MOMENT, 1, "0badc0df")?.bytes()?);
    let silent = |words: &[u8], what: &str| -> Result<()> {
        let heard = speak(scene.bed.b(), words, true)?;
        scene.was_refused(what, &heard, &["E-LINK"])
    };
    std::thread::scope(|scope| {
        let one = scope.spawn(|| silent(&start, "silence from the beginning"));
        let two = scope.spawn(|| silent(&begun, "silence among the files"));
        // Others are served: another pod comes and goes.
        let moved = (|| -> Result<()> {
            let bed = &scene.bed;
            bed.a().pod(&["run", "-d", "--name", "other", "--network", "none", "--", "sleep", "1000"])?;
            for (from, to) in [(bed.a(), bed.b()), (bed.b(), bed.a())] {
                from.pod(&["migrate", "other", "--to", to.name()])?;
                from.pod(&["rm", "other"])?;
            }
            bed.a().pod(&["rm", "-f", "other"]).map(drop)
        })();
        for thread in [one, two] {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        moved
    })?;
    scene.took_nothing("silence")?;
    scene.end(1)
}

#[test]
fn a_source_that_nobody_knows() -> Result<()> {
    let scene = Scene::new()?;
    let keyless = ["--ssh-option", "IdentityFile=/dev/null", "--ssh-option", "IdentitiesOnly=yes"];
    let (code, said) = scene.bed.a().pod_fails(&[&["migrate", POD, "--to", "hostB"], &keyless[..]].concat())?;
    ensure!(code == 12 && said.contains("E-LINK") && said.contains("Permission denied"), "{code}: {said}");
    // And a host that is another than its name says.
    scene.bed.a().run(&[
        "sh",
        "-c",
        "sed -i 's/^hostB,[^ ]*/hostX/; s/^client,/hostB,client,/' /root/.ssh/known_hosts",
    ])?;
    let (code, said) = scene.bed.a().pod_fails(&["migrate", POD, "--to", "hostB"])?;
    ensure!(code == 12 && said.contains("E-LINK"), "{code}: {said}");
    let known = scene.bed.b().run(&["cat", "/root/.ssh/known_hosts"])?;
    fs::write(scene.bed.a().root()?.join("root/.ssh/known_hosts"), known)?;
    scene.end(1)
}

/// What a destination may say, and what comes of it: exit codes and codes, and the pod runs on.
#[test]
fn a_destination_that_does_not_keep_to_the_protocol() -> Result<()> {
    let scene = Scene::new()?;
    let (bed, file) = (&scene.bed, scene.bed.shared().join("answers"));
    // Says it at once, and does not hang up before the other side does.
    let liar = script(bed, "liar", &format!("cat {}\nexec cat >/dev/null\n", file.display()))?;
    let hello = Answer::Hello(Hello { host: "hostB".into(), ..Hello::new(Purpose::Check) });
    let reserved = Answer::Reserved { warnings: vec!["\u{1b}[2Jnothing to see".into()] };
    let arrival = Answer::Running(Arrival::default());
    let answers = |all: &[&Answer]| -> Result<Vec<u8>> {
        all.iter().try_fold(Words::new(), |words, answer| words.say(*answer))?.bytes()
    };
    let later = Answer::Hello(Hello { protocol: PROTOCOL + 1, ..Hello::new(Purpose::Check) });
    let bad = Problem::new("E-NAME", "\u{1b}[31mno\u{7}").report();
    let greeted = answers(&[&hello])?;
    let cases: Vec<BadAnswer<'_>> = vec![
        ("a banner", b"Welcome to hostB!\nThis machine belongs to somebody.\n".to_vec(), &[12], &["E-LINK"]),
        ("a later protocol", answers(&[&later])?, &[12], SPEAKS),
        ("RUNNING first", answers(&[&arrival])?, &[12], SPEAKS),
        ("READY where RESERVED is due", answers(&[&hello, &Answer::Ready(Arrival::default())])?, &[12], SPEAKS),
        ("RUNNING where RESERVED is due", answers(&[&hello, &arrival])?, &[12], SPEAKS),
        ("a refusal without a reason", answers(&[&hello, &Answer::Refused(vec![])])?, &[12], SPEAKS),
        ("a refusal", answers(&[&hello, &Answer::Refused(vec![bad.clone()])])?, &[11], &["E-NAME"]),
        ("RUNNING where HOLDING is due", answers(&[&hello, &reserved, &arrival])?, &[12], SPEAKS),
        ("HOLDING twice", answers(&[&hello, &reserved, &Answer::Holding, &Answer::Holding])?, &[12], SPEAKS),
        ("RUNNING where READY is due", answers(&[&hello, &reserved, &Answer::Holding, &arrival])?, &[12], SPEAKS),
        ("FAILED", answers(&[&hello, &reserved, &Answer::Failed(bad.clone())])?, &[13], &["E-NAME"]),
        ("a length of 2^64 - 1", [&greeted[..], &head(Kind::MESSAGE.0, 1, u64::MAX, 1)].concat(), &[12], DAMAGED),
        (
            "a record of a pod",
            [&greeted[..], &head(Kind::TREE.0, 1, 0, 1)].concat(),
            &[12],
            &["E-PROTOCOL", "E-IMAGE-DAMAGED"],
        ),
    ];
    // Where it is asked for a way past ssh. To go through ssh instead is no harm.
    let door = |address: &str| -> Result<Answer> {
        Ok(Answer::Door(Door { address: address.parse()?, key: b"no key".to_vec().into() }))
    };
    let (nobody, ssh) = (door("127.0.0.1:1")?, door("127.0.0.1:22")?);
    let past: Vec<BadAnswer<'_>> = vec![
        ("RESERVED where DOOR is due", answers(&[&hello, &reserved])?, &[12], SPEAKS),
        ("a door where nobody listens", answers(&[&hello, &nobody, &arrival])?, &[12], SPEAKS),
        ("a door of somebody else", answers(&[&hello, &ssh, &arrival])?, &[12], SPEAKS),
        (
            "no door, for a reason that it makes up",
            answers(&[&hello, &Answer::NoDoor(bad.clone()), &arrival])?,
            &[12],
            SPEAKS,
        ),
    ];
    let through = cases.into_iter().map(|case| (case, Some("--tunnelled")));
    for ((what, bytes, exits, codes), how) in through.chain(past.into_iter().map(|case| (case, None))) {
        fs::write(&file, bytes)?;
        let args: Vec<&str> = ["migrate", POD, "--to", "hostB", "--remote-pod", &liar].into_iter().chain(how).collect();
        let (code, said) = bed.a().pod_fails(&args)?;
        println!("{what}: exit {code}: {}", said.lines().last().unwrap_or_default());
        ensure!(
            exits.contains(&code) && codes.iter().any(|one| said.contains(&format!("[{one}]"))),
            "{what}: {code}: {said}"
        );
        ensure!(!said.contains("panicked") && !said.contains('\u{1b}') && !said.contains('\u{7}'), "{what}: {said:?}");
        ensure!(bed.a().runs(POD), "{what}: it does not run on");
        ensure!(!bed.a().pod(&["job", "ls"])?.contains("committing"), "{what}: a job is open");
    }
    // Something else where RUNNING is due: nobody knows. It stands still until somebody honest could be asked.
    fs::write(
        &file,
        answers(&[&hello, &reserved, &Answer::Holding, &Answer::Ready(Arrival::default()), &Answer::Holding])?,
    )?;
    let (code, said) = bed.a().pod_fails(&["migrate", POD, "--to", "hostB", "--tunnelled", "--remote-pod", &liar])?;
    ensure!(code == 14 && said.contains("E-UNKNOWN"), "{code}: {said}");
    let job = integration::faults::to_resume(&said).context("no job was named")?;
    let (code, again) = bed.a().pod_fails(&["job", "resume", &job])?;
    ensure!(again.contains("E-PROTOCOL"), "{code}: {again}");
    script(bed, "liar", "exec pod \"$@\"\n")?;
    bed.a().pod(&["job", "resume", &job])?;
    ensure!(bed.a().runs(POD), "it does not run on after all");
    scene.end(1)
}

/// It takes everything and says nothing.
#[test]
fn a_destination_that_is_silent() -> Result<()> {
    let scene = Scene::new()?;
    let bed = &scene.bed;
    let silent = script(bed, "silent", "exec cat >/dev/null\n")?;
    let began = std::time::Instant::now();
    let (code, said) = bed.a().pod_fails(&["migrate", POD, "--to", "hostB", "--remote-pod", &silent])?;
    ensure!(code == 12 && said.contains("E-LINK") && said.contains("30 s"), "{code}: {said}");
    ensure!(began.elapsed() < Duration::from_secs(50), "after {:?}", began.elapsed());
    scene.end(1)
}
