//! `pod logs`: what the program wrote.

use super::{Context, Exit};
use crate::output;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use pod_runtime::monitor::log::{self, Record, Stream};
use pod_runtime::monitor::{client, moved_problem};
use pod_runtime::status::State;
use pod_runtime::store::Pod;
use pod_runtime::{Doing, Problem, Result, when};
use serde_json::json;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;

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
        return Err(moved_problem(&pod.name()?, to));
    }
    let path = pod.log_path();
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Exit::OK),
        Err(error) => return Err(error).doing(|| format!("open {}", path.display())),
    };
    let mut at = match tail {
        Some(lines) => log::tail_offset(&file, lines).doing(|| "read the log".into())?,
        None => 0,
    };
    let mut printer = Printer { args: &args, json: context.json, since, until, fresh_line: true };
    if printer.catch_up(&file, &mut at)? && args.follow {
        follow(&pod, &file, &mut at, &mut printer)?;
    }
    Ok(Exit::OK)
}

impl Printer<'_> {
    /// Shows what there is; whether somebody still wants to see more.
    fn catch_up(&mut self, file: &File, at: &mut u64) -> Result<bool> {
        loop {
            let (records, end) = log::read(file, *at, 1 << 20).doing(|| "read the log".into())?;
            if end == *at {
                return Ok(true);
            }
            *at = end;
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

/// Waits for more with inotify, until the pod ends.
fn follow(pod: &Pod, file: &File, at: &mut u64, printer: &mut Printer<'_>) -> Result<()> {
    let watch = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).doing(|| "watch the log".into())?;
    watch.add_watch(&pod.log_path(), AddWatchFlags::IN_MODIFY).doing(|| "watch the log".into())?;
    let end = match client::wait_later(pod) {
        Ok(end) => end,
        Err(problem) if ["E-MONITOR", "E-MOVED"].contains(&problem.code()) => {
            printer.catch_up(file, at)?;
            return Err(problem);
        }
        // It has ended.
        Err(_) => return printer.catch_up(file, at).map(drop),
    };
    let stdout = std::io::stdout();
    loop {
        if !printer.catch_up(file, at)? {
            return Ok(());
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
            printer.catch_up(file, at)?;
            return last_words(pod, unread);
        }
    }
}

fn last_words(pod: &Pod, unread: bool) -> Result<()> {
    let Ok(status) = pod.status() else { return Ok(()) };
    match (status.state, &status.moved_to) {
        (State::Moved, Some(to)) => {
            output::say(format!("moved to {to}; go on there with: pod logs -f {}", pod.name()?))
        }
        _ if status.monitor_lost && !unread => {
            return Err(Problem::new("E-MONITOR", "the pod's monitor is gone: what it writes now is lost"));
        }
        _ => {}
    }
    Ok(())
}
