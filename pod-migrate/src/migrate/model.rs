//! Every way in which the commit can go, looked at one by one.
//!
//! A [`World`] is what there is of one move on both hosts: who is at which line of the code, the journals, the pod's
//! status, both copies, and what is on its way over the link. [`steps`] lists what can happen next. A step bears the
//! name of the function that it stands for; where others can see a function half done, the halves are two steps.
//! [`explore`] follows all steps from the beginning, breadth first, and looks at every world that can be met:
//!
//! 1. Never two: when a copy was let go at the destination, none at the source could run ([`untrue`]).
//! 2. Never none for good: exactly one copy runs and both journals are at their end in a world that can be reached
//!    without another fault, unless a host has gone down with the only copy ([`is_settled`]).
//! 3. Nobody says "moved" of a pod that did not move, or "it runs on here" of one that ran there ([`untrue`]).
//!
//! What goes wrong is a *fault* and is counted. A message that takes long and a tool that is slow are none: that is the
//! order of the steps. A [`Slip`] is a rule that is not kept. Every slip must be found, else the rule is not needed or
//! the model does not see it. Without slips the model is the code; the later half of the slips are what the code once did.
//!
//! Nothing here depends on how many faults there are, so by default their number has no limit. With one, as for the
//! slips, the shortest way to what is wrong is also told apart by how much has to go wrong.
//!
//! Left out: the network and its holds, HELLO and HOLDING, which decide nothing, a second fault inside the undoing of a
//! failed write, and what a person does to the pod meanwhile (`pod rm -f`). A host that went down is up again at once:
//! one that is down is one that cannot be asked.

mod steps;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::time::Instant;
use steps::{Model, Step};

/// Plain enums, the default first.
macro_rules! states {
    ($($(#[$about:meta])* $name:ident: $first:ident $(, $state:ident $(($($of:ty),+))?)*;)+) => {$(
        $(#[$about])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        enum $name { #[default] $first, $($state $(($($of),+))?),* }
    )+};
}

states! {
    /// What a journal says: nothing; nothing that can be read; the phases of the source, of the destination, of both.
    Word: Nothing, Torn, Copying, Frozen, Committing, Done, Receiving, Running, Aborted;
    /// The pod's state at the source. `Again`: migrating, of a later job.
    Status: Running, Migrating, Again, Moved, Dead;
    /// Who looks into the journal at the source: `repair`, as in `pod ps`, or `resume`, which is `pod job resume`.
    Who: Ps, Resume;
    /// Where somebody at the source is: in `migrate` up to `GivingUp`, then in what settles a job.
    Hand: Gone, Offered, Reserved, Copying, Freezing, Holding, Sent, Ready, Stopping, Stopped, Written, Said, GivingUp,
        Look(Who, Word), Asking, Told(bool), Burying, Looked, GoingOn, Closing(Word);
    /// `pod receive`.
    Receiver: Gone, Waiting, Begun, Spawned, Settling;
    /// The new monitor, which `pod receive` forks.
    Monitor: Gone, Fresh, Files, Filled, Outliving, Waiting, Written, Decided, LetGo, Serving, Failing, Removing;
    /// The copy at the destination. `Filled` dies with its monitor, `Held` does not.
    There: Gone, Filled, Held, Runs;
    Message: Offer, Sent, Commit, Abort, Reserved, Ready, Running, Failed;
    /// A rule that is not kept.
    Slip:
        RunsUnsynced,          // the destination does not wait until its decision is on the disk
        LateCommitRuns,        // a COMMIT runs the pod whatever the journal says
        AskingWritesNothing,   // a question does not make an undecided job an aborted one
        UnknownRan,            // of a job that it never heard of the destination says that it ran
        NeverGivesUp,          // the destination waits for ever
        DiesWithItsMonitor,    // the copy that waits for COMMIT does not outlive its monitor
        NobodyFinishes,        // nobody lets a pod go whose monitor died after the decision
        ResumesAtTimeout,      // a source that hears nothing after COMMIT goes on
        NoCgroupFreeze,        // in the commit the copy at the source is held by its tool alone
        SaysBeforeItWrites,    // COMMIT is said before the journal says so
        // What the code once did.
        FreezesBeforeItWrites, // Still::stop_for_good: killed in between it leaves a pod that nobody thaws
        WritesBeforeItThaws,   // go_on: the same
        AbortsWhatIsHeld,      // Sent::commit: the job is aborted also where Still::resume has failed
        NotMigratingIsMoved,   // repair: in the commit a pod that is not migrating is one that has moved
        ReadsOldEntries,       // repair: what a power cut left of the journal is taken for its last word
        RepairsWhatItSaw,      // repair: the entry was read before the tool was seen to be dead
        ResumesWhatItSaw,      // resume: the same
        LooksThenActs,         // put_back: others are not kept out between its look at the status and its end
        BuriesWhatCameBack,    // conclude: it is not looked whether the pod is still the one that left
        TornIsAnError,         // journal::ask: there is no answer where the entry cannot be read
        TrustsTheUnsynced,     // Journal::decide: what another has decided may not be on the disk yet
        ForgetsWhatRan,        // forget_old: the source may not have asked yet
        TellsTheUnsynced,      // journal::settled: the disk of the source may not have it yet
        LeavesTheAborted;      // repair: a copy whose job was aborted, but not removed, stays
}

const TWO: &str = "at the source is a copy that could run, and the pod ran at the destination";
const NONE: &str = "no copy runs for good, or something of the other is left";
const NOT_MOVED: &str = "it is said that the pod moved, and it did not";
const NOT_HERE: &str = "it is said that the pod runs on here, and it ran there";

/// Each rule, how many faults it takes to need it, and what is wrong without it.
const RULES: [(Slip, u8, &str); 24] = [
    (Slip::RunsUnsynced, 1, TWO),
    (Slip::LateCommitRuns, 1, TWO),
    (Slip::AskingWritesNothing, 1, TWO),
    (Slip::UnknownRan, 1, NOT_MOVED),
    (Slip::NeverGivesUp, 1, NONE),
    (Slip::DiesWithItsMonitor, 1, NONE),
    (Slip::NobodyFinishes, 1, NONE),
    (Slip::ResumesAtTimeout, 1, TWO),
    (Slip::NoCgroupFreeze, 0, TWO),
    (Slip::SaysBeforeItWrites, 1, TWO),
    (Slip::FreezesBeforeItWrites, 1, NONE),
    (Slip::WritesBeforeItThaws, 2, NONE),
    (Slip::AbortsWhatIsHeld, 2, NONE),
    (Slip::NotMigratingIsMoved, 1, NOT_MOVED),
    (Slip::ReadsOldEntries, 1, NOT_HERE),
    (Slip::RepairsWhatItSaw, 2, TWO),
    (Slip::ResumesWhatItSaw, 2, NOT_HERE),
    (Slip::LooksThenActs, 3, TWO),
    (Slip::BuriesWhatCameBack, 2, NONE),
    (Slip::TornIsAnError, 1, NONE),
    (Slip::TrustsTheUnsynced, 2, TWO),
    (Slip::ForgetsWhatRan, 2, TWO),
    (Slip::TellsTheUnsynced, 1, NOT_HERE),
    (Slip::LeavesTheAborted, 2, NONE),
];

impl Word {
    /// `Phase::is_over`
    fn is_over(self) -> bool {
        matches!(self, Word::Done | Word::Running | Word::Aborted)
    }

    /// What a power cut may leave of it where nobody waited for the disk. At the source one that is torn is none, and
    /// *copying* is as *frozen*.
    fn remains(self, source: bool) -> Vec<Word> {
        use Word::*;
        let before: &[Word] = match (self, source) {
            (Nothing | Torn, _) => &[],
            (Copying | Frozen, _) => &[Nothing],
            (Committing, _) => &[Nothing, Frozen],
            (Done | Aborted, true) => &[Nothing, Frozen, Committing],
            (Receiving, _) => &[Nothing, Torn],
            _ => &[Nothing, Torn, Receiving],
        };
        before.iter().copied().chain([self]).collect()
    }
}

/// The two directions of the link, and who speaks in each.
const OUT: usize = 0;
const BACK: usize = 1;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
struct World {
    /// The tool that moves the pod, and two for those who come later.
    hands: [Hand; 3],
    /// The source's journal, and the pod's status there.
    entry: Word,
    status: Status,
    /// The disk there has that it is done.
    kept: bool,
    /// The copy at the source is there; is held by its tool, with ptrace; by its cgroup.
    here: bool,
    held: bool,
    frozen: bool,
    queues: [[Option<Message>; 2]; 2],
    cut: [bool; 2],
    ended: [bool; 2],
    receiver: Receiver,
    monitor: Monitor,
    /// `repair` at the destination has decided the job and not yet done what follows.
    sweeping: bool,
    /// The destination's journal, and whether the disk has it.
    decision: Word,
    synced: bool,
    there: There,
    // What the code does not know.
    /// The decision was *running* at some time; the copy there was let go.
    decided: bool,
    ran: bool,
    /// A host went down with the only copy.
    lost: bool,
    /// A later job has moved the pod.
    again: bool,
    /// Somebody was told that it runs on here, besides the journal.
    said_here: bool,
    faults: u8,
}

impl World {
    fn begin() -> World {
        World {
            hands: [Hand::Offered, Hand::Gone, Hand::Gone],
            here: true,
            queues: [[Some(Message::Offer), None], [None; 2]],
            receiver: Receiver::Waiting,
            ..World::default()
        }
    }

    fn say(&mut self, way: usize, message: Message) {
        if !self.cut[way] && !self.ended[1 - way] {
            let free = self.queues[way].iter_mut().find(|place| place.is_none());
            *free.expect("nobody says more than two things without an answer") = Some(message);
        }
    }

    /// The first message of that direction is heard.
    fn hear(&mut self, way: usize) {
        self.queues[way] = [self.queues[way][1], None];
    }

    /// Whether who listens can notice that nothing more comes: the other side has ended, or ssh, which looks in both
    /// directions, finds nobody.
    fn broken(&self, way: usize) -> bool {
        self.cut[OUT] || self.cut[BACK] || (self.ended[way] && self.queues[way][0].is_none())
    }

    /// Who speaks in that direction ends, and listens no more.
    fn end(&mut self, way: usize) {
        self.ended[way] = true;
        self.queues[1 - way] = [None; 2];
    }

    /// Somebody at the source ends. With the tool the kernel lets the tasks go.
    fn quit(&mut self, hand: usize) {
        self.hands[hand] = Hand::Gone;
        if hand == 0 {
            self.held = false;
            self.end(OUT);
        }
    }

    fn monitor_ends(&mut self) {
        self.monitor = Monitor::Gone;
        self.end(BACK);
    }

    /// `Journal::decide(Aborted)` by somebody else.
    fn give_up(&mut self, rules: Rules) {
        if !self.decision.is_over() {
            self.decision = Word::Aborted;
        }
        self.synced |= self.decision == Word::Running && !rules.slip(Slip::TrustsTheUnsynced);
    }

    /// The rest of `arrived::settle`.
    fn make_true(&mut self, rules: Rules) {
        match (self.decision, self.there) {
            (Word::Running, There::Held) if !rules.slip(Slip::NobodyFinishes) => self.let_go(),
            (Word::Aborted, There::Held) => self.there = There::Gone,
            _ => {}
        }
    }

    fn let_go(&mut self) {
        (self.there, self.ran) = (There::Runs, true);
    }

    /// One of the two things that stop the copy at the source for good.
    fn stop(&mut self, by_cgroup: bool, rules: Rules) {
        match by_cgroup {
            true => self.frozen = !rules.slip(Slip::NoCgroupFreeze),
            false => self.status = Status::Migrating,
        }
    }

    /// One of the two things that let it go on.
    fn go_on(&mut self, thaws: bool) {
        match thaws {
            true => self.frozen = false,
            false => self.status = Status::Running,
        }
    }

    /// Whether somebody who settles the job holds `capture.lock`.
    fn is_locked(&self) -> bool {
        self.hands.iter().any(|hand| matches!(hand, Hand::Looked | Hand::GoingOn))
    }

    /// Whether somebody buries the copy, with the store to himself.
    fn is_buried(&self) -> bool {
        self.hands.contains(&Hand::Burying)
    }
}

/// The rules that are not kept.
#[derive(Debug, Clone, Copy)]
struct Rules(u32);

impl Rules {
    fn slip(self, slip: Slip) -> bool {
        self.0 & 1 << slip as u32 != 0
    }

    /// Whether he goes by what he read before he saw that the tool is dead.
    fn is_late(self, who: Who) -> bool {
        self.slip(if who == Who::Ps { Slip::RepairsWhatItSaw } else { Slip::ResumesWhatItSaw })
    }
}

/// What is wrong with a world, whatever comes after it.
fn untrue(w: &World) -> Option<&'static str> {
    // What only its tool holds the kernel lets go at any moment.
    let could_run = w.here && !w.frozen;
    if w.ran && could_run {
        Some(TWO)
    } else if w.again {
        None
    } else if w.entry == Word::Done && (!w.decided || could_run) {
        Some(NOT_MOVED)
    } else {
        (w.ran && (w.said_here || w.entry == Word::Aborted)).then_some(NOT_HERE)
    }
}

/// A good end.
fn is_settled(w: &World) -> bool {
    let idle = w.hands == [Hand::Gone; 3]
        && w.receiver == Receiver::Gone
        && matches!(w.monitor, Monitor::Gone | Monitor::Serving)
        && !w.sweeping;
    let runs_here = w.here && !w.frozen && w.status == Status::Running;
    let copies = usize::from(runs_here) + usize::from(w.there == There::Runs);
    let nothing_held = runs_here == w.here && matches!(w.there, There::Gone | There::Runs);
    let over = |word: Word| word.is_over() || matches!(word, Word::Nothing | Word::Torn);
    idle && nothing_held && over(w.entry) && over(w.decision) && (copies == 1 || (w.lost && copies == 0))
}

/// Quick, and nobody chooses what goes in.
#[derive(Default)]
struct Fold(u64);

impl Hasher for Fold {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u8(*byte));
    }

    fn write_u8(&mut self, byte: u8) {
        self.0 = (self.0.rotate_left(5) ^ u64::from(byte)).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    fn write_isize(&mut self, number: isize) {
        self.write_u8(number as u8);
    }
}

#[derive(Debug, Default)]
struct Explored {
    states: usize,
    steps: usize,
    depth: usize,
    /// Settled worlds in which the pod runs here, there, nowhere.
    ends: [usize; 3],
    /// What is wrong, and how it came to it.
    wrong: Option<(&'static str, String)>,
}

/// All worlds that so many faults lead to.
fn explore(slips: &[Slip], faults: Option<u8>) -> Explored {
    let rules = Rules(slips.iter().fold(0, |all, slip| all | 1 << *slip as u32));
    let mut model = Model { rules, faults, found: Vec::new() };
    let mut known: HashMap<World, u32, BuildHasherDefault<Fold>> = HashMap::from_iter([(World::begin(), 0)]);
    // Each world, and from which it was met first and how. Then all steps that are no fault.
    let mut worlds = vec![(World::begin(), 0, "")];
    let mut quiet: Vec<(u32, u32)> = Vec::new();
    let mut found = Explored::default();
    let mut layer = 0..1;
    while !layer.is_empty() {
        for at in layer.clone() {
            let world = worlds[at].0;
            if let Some(wrong) = untrue(&world) {
                return Explored { wrong: Some((wrong, trace(&worlds, at))), ..found };
            }
            model.steps(&world);
            found.steps += model.found.len();
            for Step { what, is_fault, to } in model.found.drain(..) {
                let number = *known.entry(to).or_insert_with(|| {
                    worlds.push((to, at, what));
                    worlds.len() as u32 - 1
                });
                if !is_fault {
                    quiet.push((at as u32, number));
                }
            }
        }
        layer = layer.end..worlds.len();
        found.depth += usize::from(!layer.is_empty());
    }
    found.states = worlds.len();
    let settled: Vec<bool> = worlds.iter().map(|(world, ..)| is_settled(world)).collect();
    for (world, ..) in worlds.iter().filter(|(world, ..)| is_settled(world)) {
        found.ends[if world.there == There::Runs { 1 } else { usize::from(!world.here) * 2 }] += 1;
    }
    found.wrong = hopeless(settled, &quiet).map(|at| (NONE, trace(&worlds, at)));
    found
}

/// The first world from which no settled one is reached by these steps.
fn hopeless(mut hope: Vec<bool>, steps: &[(u32, u32)]) -> Option<usize> {
    let mut more = true;
    while std::mem::take(&mut more) {
        // Most steps lead to a later number.
        for (from, to) in steps.iter().rev() {
            more |= hope[*to as usize] && !hope[*from as usize];
            hope[*from as usize] |= hope[*to as usize];
        }
    }
    hope.iter().position(|hope| !hope)
}

/// How a world was met, one step a line.
fn trace(worlds: &[(World, usize, &str)], mut at: usize) -> String {
    let mut lines = Vec::new();
    while at != 0 {
        let (_, before, what) = worlds[at];
        lines.push(format!("    {what}\n"));
        at = before;
    }
    lines.into_iter().rev().collect()
}

/// Any number of faults, or as many as MODEL_FAULTS says.
#[test]
fn one_copy_runs_whatever_breaks() {
    let faults = std::env::var("MODEL_FAULTS").ok().and_then(|text| text.parse().ok());
    let began = Instant::now();
    let Explored { states, steps, depth, ends, wrong } = explore(&[], faults);
    let took = began.elapsed().as_secs_f64();
    println!("faults {faults:?}: {states} states, {steps} transitions, depth {depth}, ends {ends:?}, {took:.1} s");
    assert_eq!(wrong, None, "{}", wrong.as_ref().map_or("", |(_, trace)| trace));
    assert!(faults == Some(0) || ends.iter().all(|count| *count > 0), "{ends:?}: all ends were met");
}

#[test]
fn without_a_fault_the_pod_moves() {
    let found = explore(&[], Some(0));
    assert_eq!((found.wrong, found.ends[0], found.ends[2]), (None, 0, 0));
    assert!(found.ends[1] > 0);
}

/// Each slip is found with that many faults, and not with fewer.
#[test]
fn every_rule_is_needed() {
    for (slip, faults, expected) in &RULES {
        let (wrong, trace) = explore(&[*slip], Some(*faults)).wrong.unwrap_or_default();
        println!("{slip:?}, {faults} faults: {wrong}\n{trace}");
        assert_eq!(wrong, *expected, "{slip:?} with {faults} faults\n{trace}");
        if let Some(fewer) = faults.checked_sub(1) {
            assert_eq!(explore(&[*slip], Some(fewer)).wrong, None, "{slip:?} takes {faults} faults");
        }
    }
}
