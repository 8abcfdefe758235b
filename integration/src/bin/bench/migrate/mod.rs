//! Moves as their clients see them: `bench migrate [WORKLOAD…] [--json]`, on hosts that it makes itself.
//!
//! Each workload has a bed of its own, moves there and back `$MOVES` times (20) under its clients, and is then looked at for
//! what was acknowledged and is lost. The clients and the capture are threads of this process in the network of the client
//! host, so that everything has one clock. With `$BENCH_FOLDER` the page and the plots are written there.

mod capture;
mod clock;
mod figures;
mod limits;
mod load;
mod mover;
mod page;
mod talk;
mod tools;
mod workloads;

use crate::plot;
use crate::table::median;
use anyhow::{Context, Result, bail};
use capture::Capture;
use figures::Figures;
use integration::bed::Bed;
use integration::pods::ADDRESS;
use load::Heard;
use std::path::Path;
use std::time::Duration;
use workloads::{POD, Workload};

/// What came of a workload.
pub struct Outcome {
    workload: &'static Workload,
    figures: Vec<Figures>,
    /// Any of them makes the row fail.
    errors: Vec<String>,
    notes: Vec<String>,
    /// By the client's own account, ms.
    slowest: f64,
    plot: Option<Vec<u8>>,
}

static ALL: [Workload; 7] = workloads::ALL;

pub fn run(args: &[&str]) -> Result<()> {
    let (options, names): (Vec<&str>, Vec<&str>) = args.iter().partition(|word| word.starts_with("--"));
    if let Some(other) = options.iter().find(|option| **option != "--json") {
        bail!("no option {other}; there is --json");
    }
    let chosen = chosen(&names)?;
    let moves = std::env::var("MOVES").map_or(Ok(20), |text| text.parse().context("MOVES is a number"))?;
    let folder = std::env::var_os("BENCH_FOLDER");
    if let Some(folder) = &folder {
        std::fs::create_dir_all(folder).context("make $BENCH_FOLDER")?;
    }
    let limits = limits::measure(&Bed::new()?)?;
    limits.iter().for_each(|table| table.print());
    let mut outcomes = Vec::new();
    for workload in chosen {
        eprintln!("\n{}: {moves} moves", workload.title);
        let outcome = measured(workload, moves, !options.is_empty());
        outcome.errors.iter().for_each(|error| eprintln!("FAILED {}: {error}", workload.name));
        outcomes.push(outcome);
    }
    let text = page::text(&outcomes, &limits);
    println!("{text}");
    if let Some(folder) = folder {
        write(Path::new(&folder), &outcomes, &text)?;
    }
    if outcomes.iter().any(|outcome| !outcome.errors.is_empty()) {
        bail!("a workload failed: see above");
    }
    Ok(())
}

fn chosen(names: &[&str]) -> Result<Vec<&'static Workload>> {
    let known = || ALL.iter().map(|workload| workload.name).collect::<Vec<_>>().join(", ");
    if names.is_empty() || names == ["all"] {
        return Ok(ALL.iter().collect());
    }
    let find = |name: &&str| {
        let found = ALL.iter().find(|workload| workload.name == *name);
        found.with_context(|| format!("no workload {name:?}; there are {}", known()))
    };
    names.iter().map(find).collect()
}

fn write(folder: &Path, outcomes: &[Outcome], text: &str) -> Result<()> {
    for outcome in outcomes {
        if let Some(plot) = &outcome.plot {
            std::fs::write(folder.join(page::plot_name(outcome.workload)), plot)?;
        }
    }
    Ok(std::fs::write(folder.join("migration.md"), text)?)
}

/// A workload from its start to its figures; what goes wrong is among its errors.
fn measured(workload: &'static Workload, moves: usize, json: bool) -> Outcome {
    let nothing = Outcome { workload, figures: vec![], errors: vec![], notes: vec![], slowest: 0.0, plot: None };
    attempt(workload, moves, json).unwrap_or_else(|error| Outcome { errors: vec![format!("{error:#}")], ..nothing })
}

fn attempt(workload: &'static Workload, count: usize, json: bool) -> Result<Outcome> {
    let busy = others_busy()?;
    let bed = Bed::new()?;
    let finish = workload.start(&bed).context("it did not start")?;
    let capture = Capture::start(bed.client(), ADDRESS.parse()?)?;
    let (moves, broken) =
        moved(&bed, count, &std::env::var("ON_STALL").unwrap_or_else(|_| workload.on_stall.to_owned()));
    let mut heard = finish().context("its clients")?;
    let seen = capture.finish()?;
    heard.errors.extend(broken);
    if busy > QUIET {
        heard.notes.push(format!("before it began other work kept the processors {busy:.0} % busy: too long by that"));
    }
    if seen.missed > 0 {
        heard.notes.push(format!("the capture had no room for {} frames", seen.missed));
    }
    let figures = figures::of(moves, &heard, &seen);
    let resets: usize = figures.iter().map(|figures| figures.resets).sum();
    if resets > 0 {
        heard.errors.push(format!("{resets} resets on the LAN"));
    }
    for (at, figures) in figures.iter().enumerate() {
        eprintln!("{}", page::line(at + 1, figures));
        if json {
            println!("{}", page::json(workload, at + 1, figures));
        }
    }
    let plot = chart(workload, &figures, &heard).map(|chart| plot::draw(&chart));
    let slowest = figures.iter().map(|figures| figures.slowest).chain(heard.slowest).fold(0.0, f64::max);
    Ok(Outcome { workload, figures, errors: heard.errors, notes: heard.notes, slowest, plot })
}

/// Percent of the processors' time that other work may take without a word.
const QUIET: f64 = 10.0;

/// How busy the processors are for a second in which nothing of ours runs, in percent.
fn others_busy() -> Result<f64> {
    // user nice system idle iowait …
    let times = || -> Result<Vec<f64>> {
        let text = std::fs::read_to_string("/proc/stat")?;
        let line = text.lines().next().context("a line of all processors")?;
        Ok(line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect())
    };
    let before = times()?;
    std::thread::sleep(Duration::from_secs(1));
    let spent: Vec<f64> = times()?.iter().zip(&before).map(|(after, before)| after - before).collect();
    let (all, idle) = (spent.iter().sum::<f64>(), spent.iter().skip(3).take(2).sum::<f64>());
    Ok(100.0 * (1.0 - idle / all.max(1.0)))
}

/// There and back, so many moves in all; what stopped it, if anything did.
fn moved(bed: &Bed, count: usize, on_stall: &str) -> (Vec<mover::Move>, Option<String>) {
    let mut moves = Vec::new();
    let (mut from, mut to) = (bed.a(), bed.b());
    for step in 1..=count {
        // A second before a move shows how it is without one, and the second after it belongs to it.
        std::thread::sleep(Duration::from_nanos(2 * figures::AFTER));
        match mover::once(from, to, POD, on_stall) {
            Ok(one) => {
                eprintln!("move {step} of {count}: {:.0} ms, frozen {:.1}", one.total_ms, one.frozen_ms);
                moves.push(one);
            }
            Err(error) => return (moves, Some(format!("move {step} of {count}: {error:#}"))),
        }
        std::mem::swap(&mut from, &mut to);
    }
    std::thread::sleep(Duration::from_nanos(figures::AFTER));
    (moves, None)
}

/// The move whose silence is the median's, the others behind it.
fn chart(workload: &Workload, figures: &[Figures], heard: &Heard) -> Option<plot::Chart> {
    // Nothing can be shown of moves that all failed.
    let _ = figures.first()?;
    let middle = median(&figures.iter().map(|figures| figures.at_freeze.ms()).collect::<Vec<_>>());
    let off = |figures: &&Figures| (figures.at_freeze.ms() - middle).abs();
    let typical = figures.iter().min_by(|a, b| off(a).total_cmp(&off(b)))?;
    let to = (2.5 * typical.at_freeze.ms()).max(60.0);
    let span = (-to / 2.5, to);
    let points = |figures: &Figures| figures::points(&heard.samples, &figures.moved, span);
    let since = |time: u64| (time as f64 - typical.moved.frozen_at as f64) / 1e6;
    let others = figures.iter().filter(|figures| !std::ptr::eq(*figures, typical));
    let mut at = 0.0;
    let band = |(part, ms): &(String, f64)| {
        at += ms;
        (at - ms, *ms, part.clone())
    };
    Some(plot::Chart {
        title: workload.title.replace('`', ""),
        under: format!("{}; grey: other moves", workload.seen_by),
        span,
        points: points(typical),
        faint: others.flat_map(points).collect(),
        silence: (since(typical.at_freeze.from), since(typical.at_freeze.to)),
        bands: typical.moved.parts.iter().map(band).collect(),
    })
}
