//! The destination of a move: `pod receive`, which ssh starts, and the monitor that it forks.
//!
//! `pod receive` speaks until the pod's place on this host is taken; then the monitor is forked with the link in its
//! hands. In it the pod gets all that does not depend on its files before the source hears RESERVED, so that little is
//! left to be done while it is frozen there: the file tree, then the filling. Every phase owns what must be undone: [`Reservation`] until the fork, the monitor
//! after it. Silence, errors and an end of the link all mean "no" until COMMIT.

use super::arrived;
use super::commit::await_commit;
use super::following;
use super::journal::{self, Job, Journal, Phase, Role, ask};
use super::offer;
use super::protocol::{Answer, Arrival, Fate, Hello, Offer, Purpose, STOPS, Say};
use super::questions;
use super::repair;
use super::supersede::supersede;
use super::way;
use crate::arrival::{self, Reservation};
use crate::image::{Kind, Record, Writer, damaged};
use crate::laps::{self, lap};
use crate::letting_go::logged;
use crate::link::{Link, Outgoing, PROTOCOL};
use crate::objects::files::opener;
use crate::restore::filler::Filling as BeingFilled;
use crate::restore::{Ahead, Manner, Restored, Running};
use pod_runtime::birth::{Clocks, Conceived};
use pod_runtime::monitor::{self, About, Beginning, Filled, Filling, Launch, Newborn, Size};
use pod_runtime::network::announce::{Mac, mac_of};
use pod_runtime::network::hold::Holder;
use pod_runtime::network::knocks::{MOST, is_knock};
use pod_runtime::network::{self, Attachment, Claim};
use pod_runtime::spec::Spec;
use pod_runtime::status::{ProcessKey, State, now};
use pod_runtime::store::{Pod, Store};
use pod_runtime::usher::Inside;
use pod_runtime::{Problem, Result};
use serde_bytes::ByteBuf;
use std::os::fd::OwnedFd;
use std::time::Instant;

/// Speaks with the source on these descriptors (neither may be 0, 1 or 2).
pub fn receive(store: &Store, from: OwnedFd, to: OwnedFd) -> Result<()> {
    let mut link = Link::open(from, to, "the source", None)?;
    let Say::Hello(hello) = link.hear()? else { return Err(out_of_order("HELLO")) };
    link.say(&Answer::Hello(Hello { room: offer::free(store), ..Hello::new(hello.purpose.clone()) }))?;
    let Some(agreed) = hello.agreed() else {
        return link.say(&Answer::Refused(vec![hello.strange().report()]));
    };
    link.protocol = agreed;
    journal::known(store, &hello.settled, |job| job.peer == hello.host && written_down(store, job));
    match &hello.purpose {
        Purpose::Check => questions::answer(store, link, &hello),
        Purpose::Ask { job } => {
            let fate = if ask(store, job, "")? == Phase::Running { Fate::Ran } else { Fate::Never };
            link.say(&Answer::Outcome(fate))
        }
        Purpose::Bring { job } => following::brought(store, link, job),
        Purpose::Move { job } => {
            let job = job.clone();
            arrive(store, link, &hello, &job)
        }
    }
}

/// What follows from the entry of a job that ran here has been done; it is not needed for that any more.
fn written_down(store: &Store, job: &Job) -> bool {
    let under_way = |pod: Pod| pod.status().map_or(true, |status| status.job.as_deref() == Some(&job.id));
    job.role == Role::Destination && job.phase == Phase::Running && !store.by_id(&job.pod).is_some_and(under_way)
}

pub(super) fn out_of_order(due: &str) -> Problem {
    Problem::new(PROTOCOL, format!("something else came where {due} was due"))
}

fn offered(link: &mut Link) -> Result<Box<Offer>> {
    match way::hear(link)? {
        Say::Offer(offer) => Ok(offer),
        _ => Err(out_of_order("OFFER")),
    }
}

fn arrive(store: &Store, mut link: Link, hello: &Hello, job: &str) -> Result<()> {
    let offer = offered(&mut link)?;
    supersede(store, &offer.spec.id, &hello.host)?;
    let (mut problems, warnings) = offer::against(store, &offer, hello);
    problems.extend(offer::cannot_follow(&offer));
    if !problems.is_empty() {
        return link.say(&Answer::Refused(problems.iter().map(Problem::report).collect()));
    }
    let reservation = match Reservation::take(store, offer.spec, Claim::Arriving) {
        Ok(reservation) => reservation,
        Err(problem) => return link.say(&Answer::Refused(vec![problem.report()])),
    };
    repair::it_left(store, &reservation.spec.id)?;
    let journal = begin(store, &reservation, hello, job)?;
    link.interrupted_by(&journal.given_up()?)?;
    let (note, behind) = (format!("moved here from {}", hello.host), offer.behind);
    let (warnings, arrival, sessions, ahead) = (Some(warnings), Arrival::default(), Vec::new(), Ahead::default());
    spawn(reservation, Arriving { link, journal, note, warnings, arrival, sessions, ahead, holder: None, behind })
}

fn begin(store: &Store, reservation: &Reservation, hello: &Hello, job: &str) -> Result<Journal> {
    let pod = reservation.pod()?;
    pod.update(|status| status.job = Some(job.to_owned()))?;
    // Long before the freeze: with these and the journal's decision, the one thing that is waited for in the commit, the
    // pod is found after a power cut.
    pod.sync()?;
    let myself = ProcessKey::myself()?;
    let (pod, name) = (pod.id().to_owned(), reservation.spec.name.clone());
    let job = Job::here(job, Phase::Receiving, myself);
    Journal::begin(store, Job { pod, name, peer: hello.host.clone(), receiver: Some(myself), ..job })
}

/// Forks the monitor, which speaks from here on.
fn spawn(mut reservation: Reservation, arriving: Arriving) -> Result<()> {
    let (pod, spec) = (reservation.pod()?.clone(), reservation.spec.clone());
    let (store, job) = (pod.store().clone(), arriving.journal.job.id.clone());
    reservation.hand_over();
    let beginning = Beginning::Fill(Box::new(arriving));
    let launch = Launch { pod, spec, beginning, size: Size { rows: 24, columns: 80 }, attach: false };
    let settled = monitor::spawn(launch).map(drop).or_else(|problem| match arrived::settle(&store, &job) {
        Ok(Phase::Running) => Ok(()),
        Ok(_) => Err(problem),
        Err(left) => Err(left),
    });
    // One that runs here and could not be settled yet has to keep what it has.
    if settled.is_ok() || Journal::open(&store, &job).is_ok_and(|journal| journal.job.phase == Phase::Running) {
        reservation.keep();
    }
    settled
}

/// In the monitor: takes in the files while the pod runs on at the source, then fills the newborn, and on COMMIT lets it
/// run.
struct Arriving {
    link: Link,
    journal: Journal,
    /// For the pod's log.
    note: String,
    /// To go with RESERVED, until that was said.
    warnings: Option<Vec<String>>,
    arrival: Arrival,
    /// Of `pod exec`.
    sessions: Vec<About>,
    /// Memory that came while the pod ran.
    ahead: Ahead,
    /// Of a pod on a bridge, from the birth's first half on.
    holder: Option<Holder>,
    /// Memory may come when the pod runs.
    behind: bool,
}

impl Filling for Arriving {
    /// RESERVED is said only now: all that can be done before the freeze is done before it.
    fn files(&mut self, pod: &Pod, spec: &Spec, conceived: Option<&Conceived>, cable: &Attachment) -> Result<Clocks> {
        self.holder = Holder::start(cable)?;
        // The job is this process's from here on.
        self.journal.take_over()?;
        let warnings = self.warnings.take().unwrap_or_default();
        self.link.say(&Answer::Reserved { warnings })?;
        arrival::origin(&mut self.link.reader)?;
        let Arriving { link: Link { reader, writer, .. }, holder, .. } = self;
        let stopped = |record: &Record, _: &mut _| hold(record, writer, holder.as_ref());
        let (moment, arrived, ahead) = arrival::receive_at_rest(reader, (pod, spec), conceived, &self.note, stopped)?;
        lap("files");
        self.ahead = ahead;
        (self.arrival.files, self.arrival.bytes) = (arrived.files, arrived.bytes);
        let clocks = arrival::clocks(&moment)?;
        self.sessions = moment.sessions;
        Ok(clocks)
    }

    fn inside(&self) -> Option<Inside> {
        Some(opener::run_inside)
    }

    fn fill(mut self: Box<Self>, newborn: &mut Newborn) -> Result<Filled> {
        let arrival = std::mem::take(&mut self.arrival);
        let ahead = std::mem::take(&mut self.ahead);
        let holder = self.holder.take();
        let job = self.journal.job.id.clone();
        let manner = match self.behind {
            true => BeingFilled::begin(&newborn.pod).map(|filling| Manner::Behind(filling, job.clone())),
            false => Ok(Manner::AtOnce),
        };
        let running = manner
            .and_then(|manner| ready(&mut self.link, &mut self.journal, (arrival, ahead, holder), manner, newborn));
        let sessions = std::mem::take(&mut self.sessions);
        let filled = running.map(|running| arrival::filled(running, sessions, true));
        match &filled {
            Err(problem) => self.failed(problem),
            // The source returns by itself to a pod that waits for its memory.
            Ok(_) if self.behind => {
                logged("memory does not follow", following::carry_on(self.link, &newborn.pod, &job))
            }
            Ok(_) => {}
        }
        filled
    }

    fn failed(&mut self, problem: &Problem) {
        if self.journal.decide(Phase::Aborted).is_ok_and(|phase| phase == Phase::Aborted) {
            let report = problem.report();
            let answer = match self.warnings.take() {
                Some(_) => Answer::Refused(vec![report]),
                None => Answer::Failed(report),
            };
            let _ = self.link.say(&answer);
        }
    }
}

fn ready(
    link: &mut Link,
    journal: &mut Journal,
    (mut arrival, ahead, holder): (Arrival, Ahead, Option<Holder>),
    manner: Manner,
    newborn: &mut Newborn,
) -> Result<Running> {
    lap("birth");
    if link.protocol < STOPS {
        draw(&mut link.writer, holder.as_ref())?;
    }
    let memory = arrival::receive_memory(&mut link.reader, newborn)?;
    lap("wait for what is in memory");
    arrival.files += memory.files;
    arrival.bytes += memory.bytes;
    if let Some(holder) = &holder {
        holder.announce()?; // the source's last words may have drawn the switches back to it
    }
    let mut knocks = Vec::new();
    let mac = mac_of(&newborn.spec);
    let is_sent = |record: &Record| is_sent(record, mac, &mut knocks);
    let mut restored = arrival::restore(&mut link.reader, newborn, ahead, manner, is_sent)?;
    lap("registers");
    restored.outlive(&newborn.born.cgroup)?;
    lap("outlive");
    if let Some(holder) = &holder {
        holder.gather();
    }
    arrival.laps = laps::take();
    await_commit(link, journal, &arrival)?;
    lap("decide");
    Ok(let_go(link, arrival, newborn, &mut restored, (holder.as_ref(), &knocks)))
}

/// The pod is ours: from here on nothing may end it but itself. So nothing here fails: what can be done without is
/// logged, and without the rest this process ends as if it had been killed, and [`arrived`] does it.
fn let_go(
    link: &mut Link,
    arrival: Arrival,
    newborn: &Newborn,
    restored: &mut Restored,
    (holder, knocks): (Option<&Holder>, &[ByteBuf]),
) -> Running {
    if let Some(holder) = holder {
        holder.gather();
    }
    if let Some(attachment) = &newborn.attachment {
        logged("the pod is not on the network", attachment.join());
        // Its kernel may have said a word before it was not noticed.
        let unnoticed = |holder: &Holder| attachment.notice(false).and_then(|()| holder.announce());
        logged("what comes now may overtake what was held", holder.map_or(Ok(()), unnoticed));
    }
    lap("join");
    restored.speak().unwrap_or_else(|problem| monitor::abandon(&problem));
    lap("speak");
    if let Some(holder) = holder {
        holder.hand(knocks);
        holder.inject();
    }
    lap("hand on");
    if let Some(attachment) = &newborn.attachment {
        logged("the bridge does not learn where the pod is", attachment.notice(true));
        logged("the neighbours were not told of the pod", attachment.announce());
    }
    if let Some(holder) = holder {
        holder.inject();
    }
    lap("announce");
    let running = restored.go(&newborn.born.cgroup).unwrap_or_else(|problem| monitor::abandon(&problem));
    lap("go");
    logged("the arrival could not be written down", written(newborn));
    lap("write down");
    let _ = link.say(&Answer::Running(Arrival { laps: laps::take(), ..arrival }));
    let published = newborn.pod.store().network_dir().and_then(|dir| network::publish(&dir, &newborn.spec));
    logged("published ports are not open", published);
    if let Some(holder) = holder {
        holder.inject(); // what strayed in meanwhile
    }
    running
}

/// The source says that the pod stands still, before it sends the rest of its files: its frames are drawn here while they come
/// and the pod is born.
fn hold(record: &Record, writer: &mut Writer<Outgoing>, holder: Option<&Holder>) -> Result<()> {
    if record.kind != Kind::MESSAGE {
        return Err(arrival::misplaced(record));
    }
    match record.state()? {
        Say::Stopped => {}
        Say::Abort(report) => return Err(report.into()),
        _ => return Err(out_of_order("STOPPED")),
    }
    draw(writer, holder)
}

/// Frames for the pod come here from now on.
fn draw(writer: &mut Writer<Outgoing>, holder: Option<&Holder>) -> Result<()> {
    laps::begin(Instant::now());
    if let Some(holder) = holder {
        holder.forget();
        holder.announce()?;
    }
    writer.put(Kind::MESSAGE, 0, &Answer::Holding)?;
    writer.flush()?;
    lap("hold");
    Ok(())
}

/// Whether the source says that it has sent everything. It may say before whom it has kept out.
fn is_sent(record: &Record, mac: Option<Mac>, knocks: &mut Vec<ByteBuf>) -> Result<bool> {
    if record.kind != Kind::MESSAGE {
        return Err(damaged(format!("a {} record where SENT was due", record.kind)));
    }
    match record.state()? {
        Say::Sent => Ok(true),
        Say::Knocks(frames) => {
            let ours = |frame: &ByteBuf| mac.is_some_and(|mac| is_knock(frame, &mac));
            if !knocks.is_empty() || frames.len() > MOST || !frames.iter().all(ours) {
                return Err(damaged("KNOCKS that nobody can have heard of this pod"));
            }
            *knocks = frames;
            Ok(false)
        }
        Say::Abort(report) => Err(report.into()),
        _ => Err(out_of_order("SENT")),
    }
}

/// The pod runs here, whatever happens to this monitor.
fn written(newborn: &Newborn) -> Result<()> {
    let (init, monitor) = (ProcessKey::of(newborn.born.init)?, ProcessKey::myself()?);
    newborn.pod.update_quickly(|status| {
        status.state = State::Running;
        status.init = Some(init);
        status.monitor = Some(monitor);
        status.started = Some(now());
        status.job = None;
    })?;
    newborn.pod.store().event(&newborn.pod, "arrived", &[]);
    Ok(())
}
