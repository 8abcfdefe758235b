//! `pod logs`: what the program wrote.

use super::{Context, Exit};
use crate::elsewhere::there;
use crate::output;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use pod_runtime::monitor::log::{History, Record, Stream};
use pod_runtime::monitor::{client, moved_problem};
use pod_runtime::status::State;
use pod_runtime::store::Pod;
use pod_runtime::{Doing, Problem, Result, when};
use serde_json::json;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::Stdio;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  pod logs -f --tail 20 web\n  pod logs --since 10m -t web")]
pub struct Args {
    /// Go on until the pod ends
    #[arg(short, long)]
    follow: bool,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "N", default_value = "all")]
    tail: String,
    /// Only what was written after: 10m, 2026-11-21T02:00:00Z, seconds since the epoch
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Only what was written before
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// With the time of each line
    #[arg(short, long)]
    timestamps: bool,
    /// Go on from this place, on behalf of who followed the log where the pod came from
    #[arg(long, hide = true)]
    offset: Option<u64>,
    /// Name or id of the pod
    pod: String,
}

struct Printer<'a> {
    args: &'a Args,
    json: bool,
    since: Option<u64>,
    until: Option<u64>,
    /// Whether the last thing shown of stdout and stderr ended its line.
    fresh_line: bool,
    history: History,
    /// What was shown ends here.
    at: u64,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let point = |text: &Option<String>| match text {
        None => Ok(None),
        Some(text) => when::parse(text, when::now_ns()).map(Some).ok_or_else(|| {
            Problem::new("E-USAGE", format!("'{text}' is no time"))
                .fix("10m, 2026-11-21T02:00:00Z or seconds since the epoch")
        }),
    };
    let (since, until) = (point(&args.since)?, point(&args.until)?);
    let tail = match args.tail.as_str() {
        "all" => None,
        text => Some(text.parse::<usize>().map_err(|_| {
            Problem::new("E-USAGE", format!("'{text}' is no number of lines")).fix("--tail 20, or --tail all")
        })?),
    };
    let pod = context.store()?.pod(&args.pod)?;
    let status = pod.status()?;
    if let (State::Moved, Some(to)) = (status.state, &status.moved_to) {
        return match args.offset {
            Some(at) => Ok(Exit(elsewhere(&pod, to, at, &args, context.json))),
            None => Err(moved_problem(&pod.name()?, to)),
        };
    }
    let history = open(&pod)?;
    let at = match (args.offset, tail) {
        (Some(offset), _) => offset,
        (None, Some(lines)) => history.tail(lines).doing(|| "read the log".into())?,
        (None, None) => history.start(),
    };
    let (json, fresh_line) = (context.json, true);
    let mut printer = Printer { args: &args, json, since, until, fresh_line, history, at };
    if args.follow { follow(&pod, &mut printer) } else { printer.catch_up().map(|_| Exit::OK) }
}

fn open(pod: &Pod) -> Result<History> {
    History::open(&pod.dir()).doing(|| format!("open the log {}", pod.log_path().display()))
}

impl Printer<'_> {
    /// Shows what there is; whether somebody still wants to see more.
    fn catch_up(&mut self) -> Result<bool> {
        loop {
            let (records, end) = self.history.read(self.at, 1 << 20).doing(|| "read the log".into())?;
            if end == self.at {
                return Ok(true);
            }
            self.at = end;
            for record in records {
                if !self.show(&record) {
                    return Ok(false);
                }
            }
        }
    }

    fn show(&mut self, record: &Record) -> bool {
        let time = when::parse(&record.time, 0).unwrap_or(0);
        if self.since.is_some_and(|since| time < since) || self.until.is_some_and(|until| time > until) {
            return true;
        }
        let mut line = Vec::new();
        if self.json {
            let text = String::from_utf8_lossy(&record.bytes);
            let object = json!({ "time": record.time, "stream": record.stream, "log": text });
            line.extend(object.to_string().into_bytes());
            line.push(b'\n');
        } else {
            if self.args.timestamps && self.fresh_line {
                line.extend(record.time.as_bytes());
                line.push(b' ');
            }
            if record.stream == Stream::Note {
                line.extend(b"[pod] ");
            } else {
                self.fresh_line = record.bytes.ends_with(b"\n");
            }
            line.extend(&record.bytes);
        }
        let done = match record.stream {
            // Our own words are no data either.
            Stream::Stderr | Stream::Note if !self.json => std::io::stderr().write_all(&line),
            _ => {
                let mut out = std::io::stdout().lock();
                out.write_all(&line).and_then(|()| out.flush())
            }
        };
        done.is_ok()
    }
}

/// Waits for more with inotify, until the pod ends; goes with it when it moves.
fn follow(pod: &Pod, printer: &mut Printer<'_>) -> Result<Exit> {
    let watch = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).doing(|| "watch the log".into())?;
    // The folder: a log that is full makes way for another.
    let changes = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_MOVED_TO;
    watch.add_watch(&pod.dir(), changes).doing(|| "watch the log".into())?;
    let end = match client::wait_later(pod) {
        Ok(end) => end,
        Err(problem) if ["E-MONITOR", "E-MOVED"].contains(&problem.code()) => {
            printer.catch_up()?;
            return Err(problem);
        }
        // It has ended.
        Err(_) => return printer.catch_up().map(|_| Exit::OK),
    };
    let stdout = std::io::stdout();
    loop {
        // When the pod moves its log goes; what was open can still be read.
        let history = open(pod)?;
        let wanted = printer.catch_up()?;
        if !history.is_empty() {
            printer.history = history;
        }
        if !wanted || !printer.catch_up()? {
            return Ok(Exit::OK);
        }
        let mut fds = [
            PollFd::new(watch.as_fd(), PollFlags::POLLIN),
            PollFd::new(end.as_fd(), PollFlags::POLLIN),
            // Only to notice that nobody reads any more.
            PollFd::new(stdout.as_fd(), PollFlags::empty()),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).doing(|| "wait for the log".into()),
        }
        let happened = |at: usize| fds[at].revents().is_some_and(|flags| !flags.is_empty());
        let (ended, unread) = (happened(1), fds[2].revents().is_some_and(|f| f.contains(PollFlags::POLLERR)));
        let _ = watch.read_events();
        if ended || unread {
            printer.catch_up()?;
            if let Ok(history) = open(pod).map_err(drop)
                && !history.is_empty()
            {
                printer.history = history;
                printer.catch_up()?;
            }
            return last_words(pod, printer, unread);
        }
    }
}

fn last_words(pod: &Pod, printer: &Printer<'_>, unread: bool) -> Result<Exit> {
    let Ok(status) = pod.status() else { return Ok(Exit::OK) };
    match (status.state, &status.moved_to) {
        (State::Moved, Some(to)) if !unread => {
            return Ok(Exit(elsewhere(pod, to, printer.at, printer.args, printer.json)));
        }
        _ if status.monitor_lost && !unread => {
            return Err(Problem::new("E-MONITOR", "the pod's monitor is gone: what it writes now is lost"));
        }
        _ => {}
    }
    Ok(Exit::OK)
}

/// Goes on where the pod is now, behind what was shown: the log has the same places there. Or says how to.
fn elsewhere(pod: &Pod, to: &str, at: u64, args: &Args, json: bool) -> i32 {
    let name = pod.name().unwrap_or_else(|_| pod.id().to_owned());
    let at = at.to_string();
    let mut words = vec!["logs", "--follow", "--offset", &at];
    words.extend(args.timestamps.then_some("--timestamps"));
    words.extend(json.then_some("--json"));
    let quoted = |text: &String| format!("'{}'", text.replace('\'', "'\\''"));
    let (since, until) = (args.since.as_ref().map(quoted), args.until.as_ref().map(quoted));
    for (flag, value) in [("--since", &since), ("--until", &until)] {
        words.extend(value.as_ref().map(|value| [flag, value]).into_iter().flatten());
    }
    words.push(pod.id());
    output::say(format!("[pod] moved to {to}"));
    let followed =
        there(pod.store(), pod.id(), &words).ok().and_then(|mut command| command.stdin(Stdio::null()).status().ok());
    match followed.and_then(|status| status.code()) {
        // ssh's own.
        None | Some(255) => {
            output::say(format!("moved to {to}; go on there with: ssh {to} pod logs -f {name}"));
            0
        }
        Some(code) => code,
    }
}
