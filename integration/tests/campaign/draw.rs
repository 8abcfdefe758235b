//! What is drawn for a round: a kind of fault, a phase of the move, how far into it, and dice for the rest. The draws depend on
//! the seed and the number of the round alone. Kinds come in shuffled decks, and so do the phases of each kind: every kind is
//! drawn once in as many rounds as there are kinds, and none meets a phase again before it has met all.

use integration::faults::Dice;
use std::fmt::{self, Display};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    KillMigrate,
    KillSsh,
    KillReceive,
    KillNewMonitor,
    KillMonitor,
    KillSession,
    /// A cable is pulled until the tool has given up.
    Cut,
    /// And plugged in again before that, mostly.
    Blink,
    /// Frames to one of the hosts are dropped, those from it are not.
    Deaf,
    /// The other way round.
    Mute,
    /// No room where the destination keeps its pods.
    FullThere,
    FullHere,
    /// The kernel gives the processes of one side no more memory.
    ScarceThere,
    ScarceHere,
    /// `pod receive` and the new monitor stand still for a while.
    SlowReceiver,
    SlowSsh,
    /// The tool itself stands still.
    SlowMigrate,
    /// A cable becomes much slower.
    SlowLink,
    /// The wall clock of one side, as `pod` there sees it, is put forward or back.
    Clock,
    /// A second tool moves the pod to the same host.
    TwiceSame,
    TwiceOther,
    /// SIGTERM.
    Interrupt,
}

pub const KINDS: [Kind; 22] = [
    Kind::KillMigrate,
    Kind::KillSsh,
    Kind::KillReceive,
    Kind::KillNewMonitor,
    Kind::KillMonitor,
    Kind::KillSession,
    Kind::Cut,
    Kind::Blink,
    Kind::Deaf,
    Kind::Mute,
    Kind::FullThere,
    Kind::FullHere,
    Kind::ScarceThere,
    Kind::ScarceHere,
    Kind::SlowReceiver,
    Kind::SlowSsh,
    Kind::SlowMigrate,
    Kind::SlowLink,
    Kind::Clock,
    Kind::TwiceSame,
    Kind::TwiceOther,
    Kind::Interrupt,
];

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::KillMigrate => "kill-migrate",
            Kind::KillSsh => "kill-ssh",
            Kind::KillReceive => "kill-receive",
            Kind::KillNewMonitor => "kill-new-monitor",
            Kind::KillMonitor => "kill-monitor",
            Kind::KillSession => "kill-sshd-session",
            Kind::Cut => "cut",
            Kind::Blink => "blink",
            Kind::Deaf => "half-open-to",
            Kind::Mute => "half-open-from",
            Kind::FullThere => "full-destination",
            Kind::FullHere => "full-source",
            Kind::ScarceThere => "enomem-destination",
            Kind::ScarceHere => "enomem-source",
            Kind::SlowReceiver => "slow-receiver",
            Kind::SlowSsh => "slow-ssh",
            Kind::SlowMigrate => "slow-migrate",
            Kind::SlowLink => "slow-link",
            Kind::Clock => "clock-step",
            Kind::TwiceSame => "second-same-host",
            Kind::TwiceOther => "second-other-host",
            Kind::Interrupt => "interrupt",
        }
    }
}

/// In the order in which a move goes through them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// ssh is started, and says hello.
    Connecting,
    /// The offer is made; the destination takes name, address, ports and room, and makes namespaces.
    Reserve,
    /// The files go, the pod runs.
    Files,
    /// Its memory goes, over and over.
    Memory,
    /// The pod is stopped; what has changed of its files goes.
    Freeze,
    /// Until the destination holds its frames.
    Hold,
    /// The state of the tree goes.
    Dump,
    /// It is restored there.
    Restore,
    /// From READY to RUNNING.
    Commit,
    /// The copy here is buried.
    Finishing,
}

pub const PHASES: [Phase; 10] = [
    Phase::Connecting,
    Phase::Reserve,
    Phase::Files,
    Phase::Memory,
    Phase::Freeze,
    Phase::Hold,
    Phase::Dump,
    Phase::Restore,
    Phase::Commit,
    Phase::Finishing,
];

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Connecting => "connecting",
            Phase::Reserve => "reserve",
            Phase::Files => "files",
            Phase::Memory => "memory",
            Phase::Freeze => "freeze",
            Phase::Hold => "hold",
            Phase::Dump => "dump",
            Phase::Restore => "restore",
            Phase::Commit => "commit",
            Phase::Finishing => "finishing",
        }
    }
}

/// One round's.
#[derive(Debug, Clone)]
pub struct Draw {
    /// From 1 on.
    pub number: usize,
    pub kind: Kind,
    pub phase: Phase,
    /// How far into the phase: from 0 to 1.
    pub into: f64,
    pub dice: Dice,
}

impl Display for Draw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>4} {:<18} {:>10}+{:.2}", self.number, self.kind.name(), self.phase.name(), self.into)
    }
}

/// The first `count` rounds of a seed.
pub fn draws(seed: u64, count: usize) -> Vec<Draw> {
    let mut dice = Dice::of(seed);
    let mut phases: Vec<Vec<Phase>> = vec![Vec::new(); KINDS.len()];
    let mut deck: Vec<usize> = Vec::new();
    let (only_kind, only_phase) = only();
    let mut drawn = Vec::new();
    for number in 1..=count {
        if deck.is_empty() {
            deck = (0..KINDS.len()).collect();
            dice.shuffle(&mut deck);
        }
        let kind = deck.pop().unwrap_or_default();
        if phases[kind].is_empty() {
            phases[kind] = PHASES.to_vec();
            dice.shuffle(&mut phases[kind]);
        }
        let phase = phases[kind].pop().unwrap_or(Phase::Commit);
        let into = dice.share();
        let (kind, phase) = (only_kind.unwrap_or(KINDS[kind]), only_phase.unwrap_or(phase));
        drawn.push(Draw { number, kind, phase, into, dice: Dice::of(seed ^ ((number as u64) << 32)) });
    }
    drawn
}

/// To look into something: `ONLY=full-destination`, `ONLY=full-destination/commit`, `ONLY=/commit`.
pub fn only() -> (Option<Kind>, Option<Phase>) {
    let only = std::env::var("ONLY").unwrap_or_default();
    let (kind, phase) = only.split_once('/').unwrap_or((&only, ""));
    (KINDS.into_iter().find(|one| one.name() == kind), PHASES.into_iter().find(|one| one.name() == phase))
}
