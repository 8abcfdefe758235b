//! All tables of a run, and what they say of each aim: on the terminal, and as docs/benchmarks.md.

use crate::table::Table;
use anyhow::Result;
use std::fmt::Write;
use std::path::Path;

/// Where Markdown is written to, if anywhere.
const FILE: &str = "BENCH_MARKDOWN";

/// What a figure is to be at most.
struct Aim {
    what: String,
    most: f64,
    unit: &'static str,
    measured: f64,
}

#[derive(Default)]
pub struct Report {
    tables: Vec<Table>,
    aims: Vec<Aim>,
}

impl Report {
    /// Shows a finished table and keeps it.
    pub fn add(&mut self, table: Table) {
        table.print();
        self.tables.push(table);
    }

    pub fn aim(&mut self, what: impl Into<String>, most: f64, unit: &'static str, measured: f64) {
        self.aims.push(Aim { what: what.into(), most, unit, measured });
    }

    /// The aims beside what was measured; and the file, if one is asked for.
    pub fn finish(self) -> Result<()> {
        if !self.aims.is_empty() {
            println!("\naims\n{}", self.aims());
        }
        if let Some(file) = std::env::var_os(FILE) {
            std::fs::write(Path::new(&file), self.markdown())?;
        }
        Ok(())
    }

    fn aims(&self) -> String {
        let mut text = "| what | aim, at most | measured | |\n|---|---|---|---|\n".to_owned();
        for Aim { what, most, unit, measured } in &self.aims {
            let word =
                if measured <= most { "met".to_owned() } else { format!("missed, {:.2} times", measured / most) };
            let _ = writeln!(text, "| {what} | {most} {unit} | {measured:.3} {unit} | {word} |");
        }
        text
    }

    fn markdown(&self) -> String {
        let mut text = format!("## Aims\n\n{}", self.aims());
        for table in &self.tables {
            let _ = write!(text, "\n{}", table.markdown());
        }
        text
    }
}
