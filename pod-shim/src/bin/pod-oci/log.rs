//! The log that callers read: a line an event, in JSON or as text, appended to a file or written to stderr.
//!
//! In JSON the last line of level "error" is what their users see; nothing else may be in the file.

use pod_runtime::when;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

#[derive(Debug, Default)]
pub struct Log {
    pub file: Option<PathBuf>,
    pub json: bool,
    pub debug: bool,
}

impl Log {
    /// What the caller is told, also on stderr.
    pub fn error(&self, text: &str) {
        match &self.file {
            Some(_) => {
                self.write("error", text);
                eprintln!("{text}");
            }
            None if self.json => self.write("error", text),
            None => eprintln!("{text}"),
        }
    }

    pub fn warning(&self, text: &str) {
        self.write("warning", text);
    }

    pub fn debug(&self, text: &str) {
        if self.debug {
            self.write("debug", text);
        }
    }

    fn write(&self, level: &str, text: &str) {
        let time = when::rfc3339_seconds(when::now_ns() / 1_000_000_000);
        let line = match self.json {
            true => serde_json::json!({"level": level, "msg": text, "time": time}).to_string(),
            false => format!("time=\"{time}\" level={level} msg={text:?}"),
        };
        let Some(path) = &self.file else {
            eprintln!("{line}");
            return;
        };
        // In one write: several may log to one file.
        let written = OpenOptions::new().append(true).create(true).open(path);
        let written = written.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
        if let Err(error) = written {
            eprintln!("the log {} cannot be written: {error}", path.display());
        }
    }
}
