//! The destination of a move: `pod receive`, which ssh starts, and the monitor that it forks.
//!
//! `pod receive` speaks until the files on disk have arrived; then the monitor is forked with the link in its hands,
//! the pod is born in it and filled. Every phase owns what must be undone: [`Reservation`] until the fork, the monitor
//! after it. Silence, errors and an end of the link all mean "no" until COMMIT.

use super::commit::await_commit;
use super::journal::{Job, Journal, Phase, Role, ask};
use super::offer;
use super::protocol::{Answer, Arrival, Fate, Hello, Offer, PROTOCOL as VERSION, Purpose, Say};
use crate::arrival::{self, Reservation};
use crate::image::{Kind, Record, damaged};
use crate::link::{Link, PROTOCOL};
use pod_runtime::monitor::{self, Beginning, Filled, Launch, Newborn, Size};
use pod_runtime::network::hold::Holder;
use pod_runtime::network::{self, Claim};
use pod_runtime::status::{ProcessKey, State, now};
use pod_runtime::store::Store;
use pod_runtime::{Problem, Result};
use std::os::fd::OwnedFd;

/// Speaks with the source on these descriptors (neither may be 0, 1 or 2).
pub fn receive(store: &Store, from: OwnedFd, to: OwnedFd) -> Result<()> {
    let mut link = Link::open(from, to, "the source", None)?;
    let Say::Hello(hello) = link.hear()? else { return Err(out_of_order("HELLO")) };
    link.say(&Answer::Hello(Hello::new(hello.purpose.clone())))?;
    if hello.protocol != VERSION {
        let what = format!("{} speaks protocol {}, this host {VERSION}", hello.host, hello.protocol);
        let problem = Problem::new(PROTOCOL, what).fix("use the same version of pod on both hosts");
        return link.say(&Answer::Refused(vec![problem.report()]));
    }
    match &hello.purpose {
        Purpose::Check => check(store, link, &hello),
        Purpose::Ask { job } => {
            let fate = if ask(store, job, "")? == Phase::Running { Fate::Ran } else { Fate::Never };
            link.say(&Answer::Outcome(fate))
        }
        Purpose::Move { job } => {
            let job = job.clone();
            arrive(store, link, &hello, &job)
        }
    }
}

fn out_of_order(due: &str) -> Problem {
    Problem::new(PROTOCOL, format!("something else came where {due} was due"))
}

fn offered(link: &mut Link) -> Result<Box<Offer>> {
    match link.hear()? {
        Say::Offer(offer) => Ok(offer),
        _ => Err(out_of_order("OFFER")),
    }
}

fn check(store: &Store, mut link: Link, hello: &Hello) -> Result<()> {
    let offer = offered(&mut link)?;
    let (mut problems, warnings) = offer::against(store, &offer, hello);
    if problems.is_empty() {
        problems.extend(offer::network_could(store, &offer.spec).err());
    }
    match problems.is_empty() {
        true => link.say(&Answer::Reserved { warnings }),
        false => link.say(&Answer::Refused(problems.iter().map(Problem::report).collect())),
    }
}

fn arrive(store: &Store, mut link: Link, hello: &Hello, job: &str) -> Result<()> {
    let offer = offered(&mut link)?;
    let (problems, warnings) = offer::against(store, &offer, hello);
    if !problems.is_empty() {
        return link.say(&Answer::Refused(problems.iter().map(Problem::report).collect()));
    }
    let reservation = match Reservation::take(store, offer.spec, Claim::Arriving) {
        Ok(reservation) => reservation,
        Err(problem) => return link.say(&Answer::Refused(vec![problem.report()])),
    };
    let journal = begin(store, &reservation, hello, job)?;
    link.say(&Answer::Reserved { warnings })?;
    fetch(link, reservation, journal, hello)
}

fn begin(store: &Store, reservation: &Reservation, hello: &Hello, job: &str) -> Result<Journal> {
    let pod = reservation.pod()?;
    let id = job.to_owned();
    pod.update(|status| status.job = Some(id.clone()))?;
    Journal::begin(
        store,
        Job {
            id,
            role: Role::Destination,
            pod: pod.id().to_owned(),
            name: reservation.spec.name.clone(),
            peer: hello.host.clone(),
            port: None,
            ssh_options: Vec::new(),
            remote_pod: None,
            phase: Phase::Receiving,
            tool: ProcessKey::myself()?,
            started: now(),
            updated: now(),
            problem: None,
        },
    )
}

/// Takes the files and forks the monitor for the rest.
fn fetch(mut link: Link, mut reservation: Reservation, mut journal: Journal, hello: &Hello) -> Result<()> {
    let note = format!("moved here from {}", hello.host);
    let received = arrival::origin(&mut link.reader)
        .and_then(|_| arrival::receive_at_rest(&mut link.reader, &reservation, &note))
        .and_then(|(moment, arrived)| Ok((arrival::clocks(&moment)?, arrived)));
    let (clocks, arrived) = match received {
        Ok(received) => received,
        Err(problem) => {
            journal.decide(Phase::Aborted)?;
            drop(reservation);
            let _ = link.say(&Answer::Failed(problem.report()));
            return Err(problem);
        }
    };
    let (pod, spec) = (reservation.pod()?.clone(), reservation.spec.clone());
    let arrival = Arrival { files: arrived.files, bytes: arrived.bytes, ..Arrival::default() };
    reservation.hand_over();
    let launch = Launch {
        pod,
        spec,
        beginning: Beginning::Fill(Box::new(move |newborn| fill(link, journal, arrival, newborn))),
        clocks,
        size: Size { rows: 24, columns: 80 },
        attach: false,
    };
    monitor::spawn(launch)?;
    reservation.keep();
    Ok(())
}

/// In the monitor: fills the newborn, and on COMMIT lets it run.
fn fill(mut link: Link, mut journal: Journal, arrival: Arrival, newborn: &mut Newborn) -> Result<Filled> {
    let filled = ready(&mut link, &mut journal, arrival, newborn);
    if let Err(problem) = &filled
        && journal.decide(Phase::Aborted).is_ok_and(|phase| phase == Phase::Aborted)
    {
        let _ = link.say(&Answer::Failed(problem.report()));
    }
    filled
}

fn ready(link: &mut Link, journal: &mut Journal, mut arrival: Arrival, newborn: &mut Newborn) -> Result<Filled> {
    // The job is this process's from here on.
    journal.take_over()?;
    let holder = match &newborn.attachment {
        Some(attachment) => Holder::start(attachment)?,
        None => None,
    };
    if let Some(holder) = &holder {
        holder.announce()?;
    }
    link.say(&Answer::Holding)?;
    let memory = arrival::receive_memory(&mut link.reader, newborn)?;
    arrival.files += memory.files;
    arrival.bytes += memory.bytes;
    if let Some(holder) = &holder {
        holder.announce()?; // the source's last words may have drawn the switches back to it
    }
    let restored = arrival::restore(&mut link.reader, newborn, is_sent)?;
    await_commit(link, journal, &arrival)?;
    // The pod is ours. From here on nothing may end it but itself.
    if let Some(attachment) = &newborn.attachment {
        attachment.join()?;
        attachment.announce()?;
    }
    let filled = arrival::filled(restored.go()?);
    if let Some(holder) = &holder {
        holder.inject();
    }
    written(newborn)?;
    let _ = link.say(&Answer::Running(arrival));
    if let Err(problem) = network::publish(&newborn.pod.store().network_dir()?, &newborn.spec) {
        tracing::error!(problem = problem.chain(), "published ports are not open");
    }
    if let Some(holder) = &holder {
        holder.inject(); // what strayed in meanwhile
    }
    Ok(filled)
}

/// Whether the source says that it has sent everything.
fn is_sent(record: &Record) -> Result<bool> {
    if record.kind != Kind::MESSAGE {
        return Err(damaged(format!("a {} record where SENT was due", record.kind)));
    }
    match record.state()? {
        Say::Sent => Ok(true),
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
