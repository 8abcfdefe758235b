//! What became of all rounds: kind × phase.

use super::draw::{Draw, KINDS, Kind, PHASES, Phase};
use super::lane::Seen;
use anyhow::{Result, ensure};
use std::collections::BTreeMap;
use std::fmt::{self, Display};

#[derive(Debug, Default, Clone, Copy)]
struct Cell {
    rounds: usize,
    moved: usize,
    stayed: usize,
    resumed: usize,
    anew: usize,
    late: usize,
    failed: usize,
}

impl Cell {
    fn add(&mut self, seen: Option<Seen>) {
        self.rounds += 1;
        match seen {
            None => self.failed += 1,
            Some(seen) => {
                *if seen.moved { &mut self.moved } else { &mut self.stayed } += 1;
                self.resumed += usize::from(seen.resumed);
                self.anew += usize::from(seen.anew);
                self.late += usize::from(!seen.struck);
            }
        }
    }
}

#[derive(Debug, Default)]
pub struct Table {
    /// By the phase that the fault met, which may be another than was drawn; none: it came too late.
    cells: BTreeMap<(Kind, Option<Phase>), Cell>,
    kinds: BTreeMap<Kind, Cell>,
    phases: BTreeMap<Option<Phase>, Cell>,
    all: Cell,
}

impl Table {
    pub fn add(&mut self, draw: &Draw, seen: Option<Seen>) {
        let met = seen.map_or(Some(draw.phase), |seen| seen.met);
        self.cells.entry((draw.kind, met)).or_default().add(seen);
        self.kinds.entry(draw.kind).or_default().add(seen);
        self.phases.entry(met).or_default().add(seen);
        self.all.add(seen);
    }

    pub fn failures(&self) -> usize {
        self.all.failed
    }

    /// In a run that has enough rounds for it every kind did something, and most phases were met.
    pub fn all_met(&self, count: usize) -> Result<()> {
        let struck = |kind: &&Kind| self.kinds.get(kind).is_none_or(|cell| cell.rounds == cell.late);
        let idle: Vec<&Kind> = KINDS.iter().filter(struck).collect();
        ensure!(count < KINDS.len() || idle.is_empty(), "nothing was done of {idle:?}");
        let missed: Vec<&Phase> = PHASES.iter().filter(|phase| !self.phases.contains_key(&Some(**phase))).collect();
        println!("never met: {missed:?}");
        // Every phase is drawn as often as the others. One that lasts a millisecond, as hold does, is not always met.
        ensure!(count < 60 || missed.len() <= 3, "never met: {missed:?}");
        Ok(())
    }
}

impl Display for Cell {
    /// `moved/stayed`, and what had to be resumed, begun anew, came too late, failed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = format!("{}/{}", self.moved, self.stayed);
        for (count, letter) in [(self.resumed, 'r'), (self.anew, 'm'), (self.failed, 'F')] {
            if count > 0 {
                text += &format!(" {letter}{count}");
            }
        }
        f.pad(&text)
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "moved/stayed by the phase that the fault met; r: settled by `pod job resume`; m: the pod's monitor was lost; \
             late: the move was over"
        )?;
        let columns: Vec<Option<Phase>> = PHASES.into_iter().map(Some).chain([None]).collect();
        write!(f, "| {:<18} |", "fault")?;
        for phase in &columns {
            write!(f, " {:>10} |", phase.map_or("late", Phase::name))?;
        }
        writeln!(f, " {:>6} | {:>14} |", "rounds", "all")?;
        writeln!(f, "|{}|", "---|".repeat(columns.len() + 2) + "---")?;
        let row = |f: &mut fmt::Formatter<'_>, name: &str, cell: &dyn Fn(Option<Phase>) -> Option<Cell>, all: Cell| {
            write!(f, "| {name:<18} |")?;
            for phase in &columns {
                match cell(*phase) {
                    Some(cell) => write!(f, " {cell:>10} |")?,
                    None => write!(f, " {:>10} |", "")?,
                }
            }
            writeln!(f, " {:>6} | {all:>14} |", all.rounds)
        };
        for kind in KINDS {
            let all = self.kinds.get(&kind).copied().unwrap_or_default();
            row(f, kind.name(), &|phase| self.cells.get(&(kind, phase)).copied(), all)?;
        }
        row(f, "all", &|phase| self.phases.get(&phase).copied(), self.all)
    }
}
