//! `pod events`: what happened to the pods of this host.

use super::{Context, Exit, options};
use crate::output;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use pod_runtime::events::{self, Event};
use pod_runtime::store::Store;
use pod_runtime::{Doing, Problem, Result, when};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pod events --since 1h
  pod events -f --filter event=die --json

Filters: pod (name or id), event. With -f only what happens from now on is shown, unless --since.")]
pub struct Args {
    /// Go on and show events as they happen
    #[arg(short, long)]
    follow: bool,
    /// Only events after: 10m, 2026-11-21T02:00:00Z, seconds since the epoch
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Only events before
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Only events that fit
    #[arg(long, value_name = "KEY=VALUE")]
    filter: Vec<String>,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let filters = options::filters(&args.filter, &["pod", "event"])?;
    let point = |text: &Option<String>| match text {
        None => Ok(None),
        Some(text) => when::parse(text, when::now_ns()).map(Some).ok_or_else(|| {
            Problem::new("E-USAGE", format!("'{text}' is no time"))
                .fix("10m, 2026-11-21T02:00:00Z or seconds since the epoch")
        }),
    };
    let mut since = point(&args.since)?;
    if args.follow && since.is_none() {
        since = Some(when::now_ns());
    }
    let until = point(&args.until)?;
    let store = context.store()?;
    let show = |event: &Event| -> Result<()> {
        let in_time = since.is_none_or(|s| event.time >= s) && until.is_none_or(|u| event.time <= u);
        if in_time && fits(&filters, event) { output::data(&line(event, context.json)) } else { Ok(()) }
    };
    if !args.follow {
        for path in [store.events_path().with_extension("jsonl.1"), store.events_path()] {
            let text = std::fs::read(path).unwrap_or_default();
            events::parse(&String::from_utf8_lossy(&text)).try_for_each(|event| show(&event))?;
        }
        return Ok(Exit::OK);
    }
    follow(&store, &show)?;
    Ok(Exit::OK)
}

fn fits(filters: &BTreeMap<String, Vec<String>>, event: &Event) -> bool {
    filters.iter().all(|(key, values)| {
        values.iter().any(|value| match key.as_str() {
            "pod" => event.name == *value || event.id.starts_with(value.as_str()),
            _ => event.event == *value,
        })
    })
}

fn line(event: &Event, as_json: bool) -> String {
    let time = when::rfc3339(event.time);
    if as_json {
        let mut object = json!(event);
        if let Value::Object(object) = &mut object {
            object.insert("schema_version".into(), output::SCHEMA_VERSION.into());
            object.insert("time".into(), time.into());
        }
        return format!("{object}\n");
    }
    let details: String = event.details.iter().map(|(k, v)| format!(" {k}={v}")).collect();
    format!("{time} {} {} {}{details}\n", event.event, event.id, event.name)
}

fn follow(store: &Store, show: &dyn Fn(&Event) -> Result<()>) -> Result<()> {
    let path = store.events_path();
    let open = || {
        File::options().create(true).append(true).read(true).open(&path).doing(|| format!("open {}", path.display()))
    };
    let watch = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).doing(|| "watch the journal".into())?;
    // The folder: the journal may be put aside and begun anew.
    let seen = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
    watch.add_watch(store.data(), seen).doing(|| "watch the journal".into())?;
    let mut file = open()?;
    let (mut at, mut kept) = (0, Vec::new());
    loop {
        loop {
            let mut piece = vec![0; 64 << 10];
            let n = file.read_at(&mut piece, at).doing(|| "read the journal".into())?;
            if n == 0 {
                break;
            }
            at += n as u64;
            kept.extend_from_slice(&piece[..n]);
            let whole = kept.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
            let text: Vec<u8> = kept.drain(..whole).collect();
            events::parse(&String::from_utf8_lossy(&text)).try_for_each(|event| show(&event))?;
        }
        let same = std::fs::metadata(&path).is_ok_and(|m| file.metadata().is_ok_and(|own| own.ino() == m.ino()));
        if !same {
            file = open()?;
            at = 0;
            continue;
        }
        let stdout = std::io::stdout();
        let mut fds = [PollFd::new(watch.as_fd(), PollFlags::POLLIN), PollFd::new(stdout.as_fd(), PollFlags::empty())];
        let _ = poll(&mut fds, PollTimeout::NONE);
        if fds[1].revents().is_some_and(|flags| flags.contains(PollFlags::POLLERR)) {
            return Ok(());
        }
        let _ = watch.read_events();
    }
}
