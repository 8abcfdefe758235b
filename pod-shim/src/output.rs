//! How answers look: problems, exit codes, tables, sizes, times, JSON.
//!
//! Data goes to stdout, words for people to stderr. With `--json` both are objects with a `schema_version`; their
//! fields are only ever added.

use pod_runtime::{Problem, Result};
use serde::Serialize;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write};

/// Of everything that `--json` prints.
pub const SCHEMA_VERSION: u32 = 1;

/// The tool's log, on stderr: `POD_LOG` in the form of `RUST_LOG`, `--debug`, else warnings.
pub fn start_logging(debug: bool) {
    let filter = std::env::var("POD_LOG").unwrap_or_else(|_| if debug { "debug".into() } else { "warn".into() });
    let filter = tracing_subscriber::EnvFilter::try_new(&filter).unwrap_or_default();
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        // It would be said on stderr, too, and what cannot be written there is a panic: a monitor has its log on a disk, which
        // may be full.
        .log_internal_errors(false)
        .try_init();
}

/// Shows a problem: code and chain once, the way out, where to read more.
pub fn problem(problem: &Problem, as_json: bool) {
    if as_json {
        let report = problem.report();
        let object = json!({ "schema_version": SCHEMA_VERSION, "error": report });
        let _ = writeln!(std::io::stderr(), "{object}");
        return;
    }
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let (red, bold, plain) = if colour { ("\x1b[1;31m", "\x1b[1m", "\x1b[0m") } else { ("", "", "") };
    let mut text = format!("{red}error[{}]{plain}: {}\n", harmless(problem.code()), harmless(&problem.chain()));
    if let Some(fix) = problem.way_out() {
        let _ = writeln!(text, "{bold}fix:{plain} {}", harmless(fix));
    }
    if pod_runtime::problem::page(problem.code()).is_some() {
        let _ = writeln!(text, "{bold}see:{plain} pod explain {}", problem.code());
    }
    // A closed stderr is no reason to fail differently.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// What a peer or an image says is shown on a terminal, which must not take it for commands.
pub fn harmless(text: &str) -> Cow<'_, str> {
    let harms = |c: char| c.is_control() && c != '\n' && c != '\t';
    if !text.contains(harms) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.chars().map(|c| if harms(c) { char::REPLACEMENT_CHARACTER } else { c }).collect())
}

/// What a shell sees for a problem: 2 usage, 3 not found or wrong state, 4 no privilege, else 1. Verbs with finer codes
/// (run, exec, check, migrate) return them as [`crate::cli::Exit`].
pub fn exit_code(problem: &Problem) -> i32 {
    match problem.code() {
        "E-USAGE" => 2,
        "E-NOPOD" | "E-NOSESSION" | "E-STATE" | "E-BUSY" | "E-NAME" | "E-MOVED" | "E-NOCHECKPOINT" => 3,
        "E-ROOT" => 4,
        _ => 1,
    }
}

/// Prints one JSON document.
pub fn json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Problem::new("E-SYSTEM", "write JSON").because(e))?;
    data(&format!("{text}\n"))
}

/// Prints a list under a name, with the version of its schema: `{"schema_version": 1, "pods": [...]}`.
pub fn json_list(name: &str, items: Vec<Value>) -> Result<()> {
    json(&json!({ "schema_version": SCHEMA_VERSION, name: items }))
}

/// Writes to stdout. A reader that went away (`| head`) is not an error.
pub fn data(text: &str) -> Result<()> {
    bytes(text.as_bytes())
}

/// As [`data`].
pub fn bytes(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Problem::new("E-SYSTEM", "write to stdout").because(error))
        }
        _ => Ok(()),
    }
}

/// Words for a person.
pub fn say(text: impl AsRef<str>) {
    let _ = writeln!(std::io::stderr(), "{}", harmless(text.as_ref()));
}

/// Columns, as wide as they need to be, two spaces apart.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(head: &[&str]) -> Table {
        Table { rows: vec![head.iter().map(|s| (*s).to_owned()).collect()] }
    }

    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub fn show(&self) -> Result<()> {
        data(&self.text())
    }

    /// As a part of a longer text, two columns in.
    pub fn indented(&self) -> String {
        self.text().lines().map(|line| format!("  {line}\n")).collect()
    }

    fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |c: usize| self.rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                let _ = write!(line, "{cell:<width$}  ");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// What comes from elsewhere and goes to a terminal, as one line: nothing in it has the terminal do something.
pub fn plain(text: &str) -> String {
    let safe = |c: char| match c {
        '\n' | '\t' => ' ',
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    text.chars().map(safe).collect()
}

/// Bytes as a person reads them: "412 MiB".
pub fn size(bytes: u64) -> String {
    const UNITS: &[&str] = &["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value >= 100.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// A length of time in its largest unit: "45s", "3m", "2h", "5d".
pub fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ages() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(412 << 20), "412 MiB");
        assert_eq!(age(59), "59s");
        assert_eq!(age(7200), "2h");
        assert_eq!(age(200_000), "2d");
    }

    #[test]
    fn an_escape_sequence_stays_text() {
        assert_eq!(plain("a\x1b[2J\nb\u{9b}c"), "a\u{fffd}[2J b\u{fffd}c");
        assert_eq!(plain("größe.txt"), "größe.txt");
    }

    #[test]
    fn a_table_has_straight_columns() {
        let mut table = Table::new(&["NAME", "X"]);
        table.row(vec!["a-long-name".into(), "1".into()]);
        assert_eq!(table.text(), "NAME         X\na-long-name  1\n");
    }
}
