//! A table: a line for each thing measured, its median and spread, and its ratio to a limit of the machine.

use std::time::Duration;

/// Median of some runs.
pub fn median(runs: &[f64]) -> f64 {
    let mut sorted = runs.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Lines of a table, all in one unit.
pub struct Table {
    title: String,
    unit: &'static str,
    rows: Vec<Row>,
}

struct Row {
    name: String,
    runs: Vec<f64>,
    limit: Option<(f64, String)>,
}

impl Row {
    fn ratio(&self) -> Option<String> {
        self.limit.as_ref().map(|(limit, name)| format!("{:.2} of {name}", median(&self.runs) / limit))
    }
}

impl Table {
    pub fn new(title: &str, unit: &'static str) -> Table {
        Table { title: title.into(), unit, rows: Vec::new() }
    }

    /// A line without a limit, or one that is a limit itself.
    pub fn row(&mut self, name: &str, runs: Vec<f64>) -> f64 {
        let value = median(&runs);
        self.rows.push(Row { name: name.into(), runs, limit: None });
        value
    }

    /// A line beside a limit. Returns its median.
    pub fn against(&mut self, name: &str, runs: Vec<f64>, limit: f64, limit_name: &str) -> f64 {
        let value = median(&runs);
        self.rows.push(Row { name: name.into(), runs, limit: Some((limit, limit_name.into())) });
        value
    }

    pub fn print(&self) {
        let width = self.rows.iter().map(|row| row.name.len()).max().unwrap_or(0).max(20);
        println!("\n{}", self.title);
        println!("{:width$} {:>12} {:>12} {:>12} {:>5}  ratio", "", "median", "least", "most", "runs");
        for row in &self.rows {
            let least = row.runs.iter().copied().fold(f64::INFINITY, f64::min);
            let most = row.runs.iter().copied().fold(0.0, f64::max);
            let middle = median(&row.runs);
            let ratio = row.ratio();
            println!(
                "{:width$} {middle:>12.3} {least:>12.3} {most:>12.3} {:>5}  {}   [{}]",
                row.name,
                row.runs.len(),
                ratio.unwrap_or_default(),
                self.unit
            );
        }
    }

    pub fn markdown(&self) -> String {
        let mut text = format!(
            "### {}\n\n| {} | median | least | most | runs | ratio |\n|---|---|---|---|---|---|\n",
            self.title, self.unit
        );
        for row in &self.rows {
            let least = row.runs.iter().copied().fold(f64::INFINITY, f64::min);
            let most = row.runs.iter().copied().fold(0.0, f64::max);
            let (name, middle, count) = (row.name.trim(), median(&row.runs), row.runs.len());
            let ratio = row.ratio().unwrap_or_default();
            text += &format!("| {name} | {middle:.3} | {least:.3} | {most:.3} | {count} | {ratio} |\n");
        }
        text
    }
}
