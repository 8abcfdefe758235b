//! What happened to the pods of this host: `events.jsonl`, one JSON object a line, appended by whoever did it.
//!
//! A line is written by one `write` to a file opened for appending, so lines of different processes never mix. The
//! journal is for people and tools to watch; nothing decides by it, so it is not synced and a failure to write it is
//! only logged.

use crate::store::{Pod, Store};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

/// A journal that grew past this is put aside as `events.jsonl.1`.
const KEEP: u64 = 8 << 20;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Nanoseconds since the epoch.
    pub time: u64,
    /// "create", "start", "die", "pause", "unpause", "stop", "kill", "remove", "rename", "exec", "moved", ...
    pub event: String,
    pub id: String,
    pub name: String,
    /// What else there is to say: "exit_code": "0".
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub details: BTreeMap<String, String>,
}

impl Store {
    /// Writes down that `event` happened to `pod`.
    pub fn event(&self, pod: &Pod, event: &str, details: &[(&str, &str)]) {
        let event = Event {
            time: crate::when::now_ns(),
            event: event.into(),
            id: pod.id().into(),
            name: pod.name().unwrap_or_default(),
            details: details.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
        };
        self.append(&event);
    }

    fn append(&self, event: &Event) {
        let path = self.events_path();
        let Ok(mut line) = serde_json::to_vec(event) else { return };
        line.push(b'\n');
        let write = || -> std::io::Result<()> {
            if fs::metadata(&path).is_ok_and(|m| m.len() > KEEP) {
                fs::rename(&path, path.with_extension("jsonl.1"))?;
            }
            OpenOptions::new().append(true).create(true).mode(0o600).open(&path)?.write_all(&line)
        };
        if let Err(error) = write() {
            tracing::warn!(path = %path.display(), %error, "could not write an event");
        }
    }
}

/// The events in a piece of the journal; a line cut short or damaged is skipped.
pub fn parse(text: &str) -> impl Iterator<Item = Event> + '_ {
    text.lines().filter_map(|line| serde_json::from_str(line).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_line_is_skipped() {
        let text =
            "{\"time\":1,\"event\":\"die\",\"id\":\"a\",\"name\":\"n\",\"details\":{\"exit_code\":\"3\"}}\n{\"ti\n";
        let events: Vec<_> = parse(text).collect();
        assert_eq!(events.len(), 1);
        assert_eq!(events[0].details["exit_code"], "3");
    }
}
