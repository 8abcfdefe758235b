//! Making the monitor: two forks, so that it is nobody's child, then the birth of the pod in it.
//!
//! The spawner waits on a socket for the one line that says how it went. It may be killed meanwhile: the monitor goes
//! on. When the monitor is killed before the line, the spawner removes what there is of the pod.

use super::exec::{self, Ended, Session};
use super::log::Log;
use super::serve::Monitor;
use super::stdio::Stdio;
use super::{Arrived, Beginning, Filled, Launch, Newborn, Started};
use crate::birth::{self, Born, Clocks, Purpose};
use crate::lifecycle;
use crate::network::{self, Attachment};
use crate::problem::{Doing, Problem, Report, Result};
use crate::spec::Spec;
use crate::status::{self, ProcessKey, State, Status};
use crate::store::Pod;
use crate::sys::daemon::{self, Fork};
use nix::sys::signal::SigSet;
use nix::sys::stat::{Mode, umask};
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The one line from the monitor.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum News {
    Started { init: i32, monitor: i32, warnings: Vec<String> },
    Failed(Report),
}

/// Forks the monitor and returns when the pod runs, or with the problem that kept it from it; then nothing is left of
/// the pod. The caller must be single-threaded.
pub fn spawn(launch: Launch) -> Result<Started> {
    let pair = || UnixStream::pair().doing(|| "make a socket pair".into());
    let (news, tell) = pair()?;
    let (client, watched) = if launch.attach { pair().map(|(a, b)| (Some(a), Some(b)))? } else { (None, None) };
    let (pod, maker) = (launch.pod.clone(), ProcessKey::myself()?);
    match daemon::fork().doing(|| "fork the monitor".into())? {
        Fork::Parent(child) => {
            let filled = matches!(launch.beginning, Beginning::Fill(_));
            drop((tell, watched, launch));
            let _ = daemon::reap(child);
            hear(&pod, news, filled).map(|started| Started { client, ..started })
        }
        Fork::Child => {
            let _ = nix::unistd::setsid();
            match daemon::fork() {
                Ok(Fork::Child) => {
                    drop((news, client));
                    let _ = catch_unwind(AssertUnwindSafe(|| live(launch, maker, tell, watched)));
                    daemon::exit_now(0)
                }
                _ => daemon::exit_now(0),
            }
        }
    }
}

fn hear(pod: &Pod, news: UnixStream, filled: bool) -> Result<Started> {
    let mut line = String::new();
    let heard = BufReader::new(news).read_line(&mut line);
    match serde_json::from_str(&line) {
        Ok(News::Started { init, monitor, warnings }) => Ok(Started { init, monitor, warnings, client: None }),
        Ok(News::Failed(report)) => Err(report.into()),
        Err(_) => {
            let last = std::fs::read_to_string(pod.monitor_log_path()).unwrap_or_default();
            let last = last.lines().last().unwrap_or("it was killed").to_owned();
            match pod.status() {
                // A pod that was filled runs from before this is written, with or without its monitor.
                Ok(Status { state: State::Running, init: Some(init), .. }) if filled => {
                    return Ok(Started { init: init.pid, monitor: 0, warnings: vec![LOST.into()], client: None });
                }
                // One that arrives may have been decided to run here: who receives it knows. One that is restored may have
                // spoken: who restores it lets it run.
                Ok(Status { job: Some(_), .. } | Status { let_go: true, .. }) => {}
                _ => drop(lifecycle::remove(pod)),
            }
            let mut problem = Problem::new("E-MONITOR", format!("the monitor ended before the pod ran: {last}"));
            if let Err(error) = heard {
                problem = problem.because(error);
            }
            Err(problem)
        }
    }
}

/// A warning: the pod runs without the monitor that brought it to life.
pub const LOST: &str = "the pod's monitor was killed, and its terminal or pipes are gone";

/// The monitor's whole life.
fn live(launch: Launch, maker: ProcessKey, tell: UnixStream, watched: Option<UnixStream>) {
    let pod = launch.pod.clone();
    if !take_over(&pod, maker) {
        return;
    }
    let keep: Vec<RawFd> = [Some(&tell), watched.as_ref()].into_iter().flatten().map(AsRawFd::as_raw_fd).collect();
    let mut tell = Some(tell);
    let mut say = |news: &News| {
        if let (Some(mut tell), Ok(mut line)) = (tell.take(), serde_json::to_vec(news)) {
            line.push(b'\n');
            let _ = tell.write_all(&line);
        }
    };
    let began = settle(&launch, &keep).and_then(|foreign| {
        let (mut monitor, rest) = begin(launch, &foreign)?;
        watched.map_or(Ok(()), |watched| monitor.welcome(watched))?;
        Ok((monitor, rest))
    });
    match began {
        Ok((monitor, Rest { warnings, remains, _sync })) => {
            say(&News::Started { init: monitor.init, monitor: std::process::id() as i32, warnings });
            drop(remains);
            monitor.run();
        }
        Err(problem) => {
            tracing::error!(problem = problem.chain(), "the pod did not come to life");
            if let Err(left) = lifecycle::remove(&pod) {
                tracing::error!(problem = left.chain(), "something of it is left");
            }
            say(&News::Failed(problem.report()));
        }
    }
}

/// The pod is this process's from here on, and not any more that of who forked it: should that be killed, whoever looks for
/// pods that never began would take this one away, and make it anew beside us. `false`: that has happened.
fn take_over(pod: &Pod, maker: ProcessKey) -> bool {
    let Ok(myself) = ProcessKey::myself() else { return false };
    let written = pod.update_quickly(|status| {
        if status.state == State::Creating && status.monitor == Some(maker) {
            status.monitor = Some(myself);
        }
    });
    match written {
        Ok(status) => status.monitor == Some(myself),
        // A full disk says so again where it is told. Without its folder the pod is gone.
        Err(_) => pod.status().is_ok_and(|status| status.monitor == Some(maker)),
    }
}

/// Leaves everything of the process that it was forked from but `keep`. Returns the descriptors that the closure of a
/// fill came with.
fn settle(launch: &Launch, keep: &[RawFd]) -> Result<BTreeSet<Inherited>> {
    daemon::set_comm(c"pod-monitor");
    // Whoever shows the pod keeps signals back meanwhile.
    SigSet::empty().thread_set_mask().doing(|| "unblock signals".into())?;
    umask(Mode::from_bits_truncate(0o022));
    std::env::set_current_dir("/").doing(|| "leave the working folder".into())?;
    if matches!(launch.beginning, Beginning::Run) {
        daemon::close_all_but(keep);
    }
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").doing(|| "open /dev/null".into())?;
    let path = launch.pod.monitor_log_path();
    let own = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
    let own = own.doing(|| format!("open {}", path.display()))?;
    for (fd, number) in [(&null, 0), (&null, 1), (&own, 2)] {
        daemon::replace_stdio(fd.as_fd(), number).doing(|| "leave the terminal".into())?;
    }
    drop((null, own));
    let mut foreign = inherited();
    foreign.retain(|(fd, ..)| !keep.contains(fd));
    Ok(foreign)
}

/// A descriptor, and what it refers to, so that a number that was reused meanwhile is not taken for it.
type Inherited = (RawFd, u64, u64);

fn inherited() -> BTreeSet<Inherited> {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return BTreeSet::new() };
    let numbers: Vec<RawFd> = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect();
    numbers.into_iter().filter_map(|fd| identity(fd).filter(|_| fd > 2)).collect()
}

fn identity(fd: RawFd) -> Option<Inherited> {
    let meta = std::fs::metadata(format!("/proc/self/fd/{fd}")).ok()?;
    Some((fd, meta.dev(), meta.ino()))
}

/// What came with the birth besides.
struct Rest {
    warnings: Vec<String>,
    /// Put away when nobody waits any more. The attachment holds the pod's network namespace, and is found again by name
    /// when it is needed.
    remains: (Option<Attachment>, Option<Box<dyn Any>>),
    /// The first process may still hold the other end.
    _sync: UnixStream,
}

/// Brings the pod to life.
fn begin(launch: Launch, foreign: &BTreeSet<Inherited>) -> Result<(Monitor, Rest)> {
    let Launch { pod, spec, mut beginning, size, .. } = launch;
    let user = &spec.process.user;
    let run = matches!(beginning, Beginning::Run);
    let (stdio, given) = if run && !spec.process.terminal {
        let (ours, given) = Stdio::pipes(spec.process.interactive, user.uid, user.gid)?;
        (ours, birth::Stdio::Files(given))
    } else {
        (Stdio::default(), birth::Stdio::Terminal { rows: size.rows, columns: size.columns })
    };
    let (mut newborn, (listener, log)) = bear(pod, spec, &mut beginning, given)?;
    let begun = match beginning {
        Beginning::Run => set_off(&mut newborn, stdio),
        Beginning::Fill(filling) => filling.fill(&mut newborn).map(|filled| fill_in(&newborn, filled, foreign)),
    };
    let Begun { stdio, roots, others, sessions, ended: unheard, unwritten, remains } = match begun {
        Ok(begun) => begun,
        Err(problem) => {
            end_it(&newborn.born);
            return Err(problem);
        }
    };
    let Newborn { pod, spec, born, attachment } = newborn;
    // A fill has brought the log of the pod's life so far. The pod may run already: nothing may fail any more.
    let log = Log::open(&pod.dir(), spec.log).unwrap_or_else(|error| {
        tracing::error!(%error, "the log that arrived cannot be opened");
        log
    });
    let Born { init, pidfd, cgroup, sync, warnings, .. } = born;
    let monitor = Monitor {
        pod,
        spec,
        init,
        pidfd,
        cgroup,
        stdio,
        log,
        _mounts: File::open(format!("/proc/{init}/ns/mnt")).ok(),
        listener: Some(listener),
        clients: Vec::new(),
        next_session: sessions.iter().map(Session::id).chain(unheard.iter().map(|e| e.about.id)).max().unwrap_or(0),
        sessions,
        unheard,
        roots,
        others,
        next_id: 0,
        ended: false,
        held: None,
        throttle: None,
        unwritten,
        farewell: None,
        remains: None,
        cleared: None,
    };
    Ok((monitor, Rest { warnings, remains: (attachment, remains), _sync: sync }))
}

/// What else a monitor needs: where it listens, and the log.
type Equipment = (UnixListener, Log);

/// The birth, and what the monitor can do while the first process is at work. One that is to be filled takes its files
/// in while it is only half born.
fn bear(pod: Pod, spec: Spec, beginning: &mut Beginning, given: birth::Stdio) -> Result<(Newborn, Equipment)> {
    let equip = || -> Result<Equipment> {
        let log = Log::open(&pod.dir(), spec.log).doing(|| format!("open the log {}", pod.log_path().display()))?;
        Ok((listen(&pod)?, log))
    };
    let born = pod.store().network_dir().and_then(|dir| match beginning {
        Beginning::Run => {
            let meanwhile = |init| Ok((network::attach(&dir, &spec, init, false)?, equip()?));
            let clocks = Some(Clocks::default());
            let (conceived, (attachment, equipment)) =
                birth::conceive(&spec, &pod, clocks, Purpose::Run, given, meanwhile)?;
            Ok((conceived.birth(&pod, None)?, attachment, equipment))
        }
        Beginning::Fill(filling) => {
            let purpose = Purpose::Fill(filling.inside());
            let meanwhile = |init| {
                let attachment = network::attach(&dir, &spec, init, true)?;
                let equipment = equip()?;
                write_who(&pod, init, State::Creating)?;
                let clocks = filling.at_rest().then(|| filling.files(&pod, &spec, None, &attachment)).transpose()?;
                Ok((attachment, equipment, clocks))
            };
            let (conceived, (attachment, equipment, clocks)) =
                birth::conceive(&spec, &pod, None, purpose, given, meanwhile)?;
            let clocks = match clocks {
                Some(clocks) => clocks,
                // Not before: whoever hears of this freezes the pod where it is.
                None => filling.files(&pod, &spec, Some(&conceived), &attachment)?,
            };
            Ok((conceived.birth(&pod, Some(clocks))?, attachment, equipment))
        }
    });
    match (born, beginning) {
        (Ok((born, attachment, equipment)), _) => {
            Ok((Newborn { pod, spec, born, attachment: Some(attachment) }, equipment))
        }
        (Err(problem), Beginning::Fill(filling)) => {
            filling.failed(&problem);
            Err(problem)
        }
        (Err(problem), Beginning::Run) => Err(problem),
    }
}

/// What the monitor begins with.
#[derive(Default)]
struct Begun {
    stdio: Stdio,
    roots: BTreeMap<i32, OwnedFd>,
    others: Vec<OwnedFd>,
    sessions: Vec<Session>,
    ended: Vec<Ended>,
    /// Its status says that the pod does not run yet.
    unwritten: bool,
    remains: Option<Box<dyn Any>>,
}

/// Lets the program begin.
fn set_off(newborn: &mut Newborn, stdio: Stdio) -> Result<Begun> {
    let Newborn { pod, spec, born, attachment } = newborn;
    if let Some(attachment) = attachment {
        attachment.announce()?;
    }
    network::publish(&pod.store().network_dir()?, spec)?;
    let stdio = match born.console.take() {
        Some(console) => Stdio::new([Some(console), None, None, None])?,
        None => stdio,
    };
    write_down(newborn, State::Running)?;
    newborn.born.start()?;
    newborn.pod.store().event(&newborn.pod, "start", &[]);
    Ok(Begun { stdio, ..Begun::default() })
}

/// Takes over from the engine. The pod runs and may have no copy anywhere: nothing here fails.
fn fill_in(newborn: &Newborn, filled: Filled, foreign: &BTreeSet<Inherited>) -> Begun {
    // The closure is gone with all that it owned; what is still open of the spawner's nobody owns.
    let taken: Vec<RawFd> = [&filled.console, &filled.stdin, &filled.stdout, &filled.stderr]
        .into_iter()
        .flatten()
        .chain(&filled.others)
        .chain(filled.sessions.iter().flat_map(|session| session.fds.iter().flatten()))
        .map(AsRawFd::as_raw_fd)
        .collect();
    for old in foreign.iter().filter(|old| identity(old.0).as_ref() == Some(old) && !taken.contains(&old.0)) {
        daemon::close_number(old.0);
    }
    let Filled { console, stdin, stdout, stderr, roots, sessions, awaited, others, remains } = filled;
    let stdio = Stdio::new([console, stdin, stdout, stderr]).unwrap_or_else(|problem| {
        tracing::error!(problem = problem.chain(), "the pod's terminal or pipes are lost");
        Stdio::default()
    });
    let pidfd = |pid: i32| daemon::pidfd_open(pid).ok().map(|fd| (pid, fd));
    let others = others.into_iter().filter(|fd| super::stdio::nonblocking(fd.as_fd()).is_ok()).collect();
    let mut roots: BTreeMap<i32, OwnedFd> = roots.into_iter().filter_map(pidfd).collect();
    let (sessions, ended) = sessions_of(sessions, &mut roots, awaited);
    let unwritten = match newborn.pod.status() {
        Ok(status) if status.state != State::Creating => false,
        _ => write_down(newborn, State::Running).is_err(),
    };
    newborn.pod.store().event(&newborn.pod, "restore", &[]);
    Begun { stdio, roots, others, sessions, ended, unwritten, remains }
}

/// The sessions that came, each with its process out of `roots`; and those that have ended unheard.
fn sessions_of(came: Vec<Arrived>, roots: &mut BTreeMap<i32, OwnedFd>, awaited: bool) -> (Vec<Session>, Vec<Ended>) {
    let inside: BTreeMap<i32, i32> = roots.keys().map(|host| (exec::pid_inside(*host), *host)).collect();
    let (mut sessions, mut ended) = (Vec::new(), Vec::new());
    for Arrived { about, fds } in came {
        match inside.get(&about.pid) {
            Some(host) if about.exit_code.is_none() => match Session::arrived(about, *host, fds, awaited) {
                Ok(session) => {
                    roots.remove(host);
                    sessions.push(session);
                }
                Err(problem) => tracing::error!(problem = problem.chain(), "a session of pod exec is lost"),
            },
            _ if about.exit_code.is_some() => ended.push(Ended { about, output: Vec::new() }),
            _ => tracing::warn!(session = about.id, "a session of pod exec came without its process"),
        }
    }
    (sessions, ended)
}

/// Ends this monitor as if it had been killed: of a pod that has to run nothing may be taken away by an error. Who
/// waits for the monitor lets the pod run.
pub fn abandon(problem: &Problem) -> ! {
    tracing::error!(problem = problem.chain(), "the monitor leaves the pod to who waits for it");
    daemon::exit_now(1)
}

/// Who the pod is on this host from now on. Not waited for to be on the disk: after a power cut nothing of it is true.
fn write_down(newborn: &Newborn, state: State) -> Result<()> {
    write_who(&newborn.pod, newborn.born.init, state)
}

pub(super) fn write_who(pod: &Pod, init: i32, state: State) -> Result<()> {
    let init = ProcessKey::of(init)?;
    let monitor = ProcessKey::myself()?;
    pod.update_quickly(|status| {
        status.state = state;
        status.init = Some(init);
        status.monitor = Some(monitor);
        status.started = (state == State::Running).then(status::now);
        status.let_go = false;
        if state == State::Running {
            status.job = None;
        }
    })?;
    Ok(())
}

/// Kills what was born and waits for its end.
fn end_it(born: &Born) {
    let _ = born.cgroup.kill();
    let _ = daemon::pidfd_send_signal(born.pidfd.as_fd(), 9);
    // Other children (a helper of the engine, exec'ed roots) go with it, and it only after them.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while std::time::Instant::now() < deadline {
        match daemon::reap_any() {
            Ok(Some((pid, _))) if pid == born.init => return,
            Ok(Some(_)) => {}
            _ => {
                let mut fds = [nix::poll::PollFd::new(born.pidfd.as_fd(), nix::poll::PollFlags::POLLIN)];
                let _ = nix::poll::poll(&mut fds, nix::poll::PollTimeout::from(10u8));
            }
        }
    }
}

/// The control socket. Bound by a short way, because a socket's path may be no longer than 107 bytes.
fn listen(pod: &Pod) -> Result<UnixListener> {
    let dir = pod.run_dir();
    DirBuilder::new().recursive(true).mode(0o700).create(&dir).doing(|| format!("make {}", dir.display()))?;
    let opened = File::open(&dir).doing(|| format!("open {}", dir.display()))?;
    let path = format!("/proc/self/fd/{}/ctl.sock", opened.as_raw_fd());
    let _ = std::fs::remove_file(pod.socket_path());
    let listener = UnixListener::bind(&path).doing(|| format!("listen on {}", pod.socket_path().display()))?;
    std::fs::set_permissions(pod.socket_path(), PermissionsExt::from_mode(0o600))
        .doing(|| format!("close {} to others", pod.socket_path().display()))?;
    listener.set_nonblocking(true).doing(|| "set up the control socket".into())?;
    Ok(listener)
}
