//! What is told of the moves: a line each on the terminal, and the page for readers.

use super::Outcome;
use super::figures::Figures;
use super::workloads::{Aim, Workload};
use crate::table::{Table, median};
use std::fmt::Write;

pub fn plot_name(workload: &Workload) -> String {
    format!("migration-{}.png", workload.name)
}

/// A move, for who watches.
pub fn line(number: usize, figures: &Figures) -> String {
    let moved = &figures.moved;
    let parts: Vec<String> = moved.parts.iter().map(|(part, ms)| format!("{part} {ms:.1}")).collect();
    format!(
        "move {number}: silent {:.1} ms ({:.1} at the freeze, {:.1} before the move), slowest reply {:.1}, LAN {:.1}; \
         frozen {:.1} ({}), in all {:.0} ms, {} passes, {:.1} MiB; {} sent again, {} resets",
        figures.stall,
        figures.at_freeze.ms(),
        figures.calm,
        figures.slowest,
        figures.lan,
        moved.frozen_ms,
        parts.join(", "),
        moved.total_ms,
        moved.rounds,
        moved.bytes_sent as f64 / f64::from(1 << 20),
        figures.again,
        figures.resets,
    )
}

pub fn json(workload: &Workload, number: usize, figures: &Figures) -> serde_json::Value {
    let moved = &figures.moved;
    let parts: serde_json::Map<_, _> = figures.parts().into_iter().map(|(part, us)| (part, us.into())).collect();
    serde_json::json!({
        "workload": workload.name, "move": number, "stall_ms": figures.stall, "stall_at_freeze_ms": figures.at_freeze.ms(),
        "calm_ms": figures.calm, "slowest_ms": figures.slowest, "lan_ms": figures.lan, "frozen_ms": moved.frozen_ms,
        "total_ms": moved.total_ms, "bytes_sent": moved.bytes_sent, "rounds": moved.rounds, "sent_again": figures.again,
        "resets": figures.resets, "parts_us": parts,
    })
}

/// Whether what was seen is within what is aimed at, and if not by how much.
fn verdict(median: f64, worst: f64, aim: Aim) -> String {
    match (median / aim.median).max(worst / aim.worst) {
        ..=1.0 => "met".to_owned(),
        times => format!("missed, {times:.1} times"),
    }
}

fn words(aim: Aim) -> String {
    match aim.worst {
        worst if worst == aim.median => format!("{worst} ms"),
        f64::INFINITY => format!("median {} ms", aim.median),
        worst => format!("median {} ms, worst {worst} ms", aim.median),
    }
}

/// Median and worst of one figure of all moves.
fn spread(outcome: &Outcome, figure: impl Fn(&Figures) -> f64) -> (f64, f64) {
    let all: Vec<f64> = outcome.figures.iter().map(figure).collect();
    (median(&all), all.into_iter().fold(0.0, f64::max))
}

/// What the client noticed, beside what is aimed at.
fn stalls(outcomes: &[Outcome]) -> String {
    let mut text = "| workload | moves | silence at the client: median | worst | aim | | slowest reply | silence without a move | \
                    silence on the LAN: median | worst |\n|---|---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    for outcome in outcomes {
        let Workload { title, aim, .. } = outcome.workload;
        if outcome.figures.is_empty() {
            let _ = writeln!(text, "| {title} | 0 | – | – | {} | **failed** | – | – | – | – |", words(*aim));
            continue;
        }
        let (middle, worst) = spread(outcome, |figures| figures.stall);
        let (calm, (lan, lan_worst)) =
            (spread(outcome, |figures| figures.calm).0, spread(outcome, |figures| figures.lan));
        let word = if outcome.errors.is_empty() { verdict(middle, worst, *aim) } else { "**failed**".into() };
        let (count, aim, slowest) = (outcome.figures.len(), words(*aim), outcome.slowest);
        let _ = writeln!(
            text,
            "| {title} | {count} | {middle:.1} ms | {worst:.1} ms | {aim} | {word} | {slowest:.1} ms | {calm:.1} ms | \
             {lan:.1} ms | {lan_worst:.1} ms |"
        );
    }
    text
}

/// The move in all, beside the link where there is a slow one.
fn totals(outcomes: &[Outcome]) -> String {
    let mut text =
        "| workload | in all: median | worst | frozen: median | worst | passes | MiB sent | sent again | resets | |\n\
                    |---|---|---|---|---|---|---|---|---|---|\n"
            .to_owned();
    for outcome in moved(outcomes) {
        let (total, longest) = spread(outcome, |figures| figures.moved.total_ms);
        let (frozen, most) = spread(outcome, |figures| figures.moved.frozen_ms);
        let passes = spread(outcome, |figures| figures.moved.rounds as f64).0;
        let sent = spread(outcome, |figures| figures.moved.bytes_sent as f64 / f64::from(1 << 20)).0;
        let count = |what: fn(&Figures) -> usize| outcome.figures.iter().map(what).sum::<usize>();
        let (again, resets) = (count(|figures| figures.again), count(|figures| figures.resets));
        let link = outcome.workload.gbit.map_or_else(String::new, |gbit| beside_the_link(outcome, gbit));
        let _ = writeln!(
            text,
            "| {} | {total:.0} ms | {longest:.0} ms | {frozen:.1} ms | {most:.1} ms | {passes} | {sent:.0} | {again} | \
             {resets} | {link} |",
            outcome.workload.title
        );
    }
    text
}

fn beside_the_link(outcome: &Outcome, gbit: f64) -> String {
    const AIM: f64 = 1.15;
    let times = |figures: &Figures| figures.moved.total_ms / (figures.moved.bytes_sent as f64 * 8.0 / (gbit * 1e6));
    let (middle, worst) = spread(outcome, times);
    let word = verdict(middle, worst, Aim { median: AIM, worst: AIM });
    format!("{middle:.3} (worst {worst:.3}) of what was sent / link, aim {AIM}: {word}")
}

/// Names and microseconds out of a move.
type Named = fn(&Figures) -> Vec<(String, f64)>;

/// Names of the parts of all moves, each before those that some move has after it.
fn names_of(outcomes: &[Outcome], parts: Named) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for figures in outcomes.iter().flat_map(|outcome| &outcome.figures) {
        let mut at = 0;
        for (name, _) in parts(figures) {
            match names.iter().position(|known| *known == name) {
                Some(known) => at = known + 1,
                None => {
                    names.insert(at, name);
                    at += 1;
                }
            }
        }
    }
    names
}

/// The median of a part of that name.
fn part_of(outcome: &Outcome, parts: Named, name: &str) -> f64 {
    let one = |figures: &Figures| parts(figures).iter().filter(|(part, _)| part == name).map(|(_, us)| us).sum();
    median(&outcome.figures.iter().map(one).collect::<Vec<f64>>())
}

fn moved(outcomes: &[Outcome]) -> impl Iterator<Item = &Outcome> {
    outcomes.iter().filter(|outcome| !outcome.figures.is_empty())
}

fn phases(outcomes: &[Outcome]) -> String {
    let names = names_of(outcomes, Figures::parts);
    let rule = "---|".repeat(names.len());
    let mut text = format!("| µs, median | {} | silence at the freeze |\n|---|{rule}---|\n", names.join(" | "));
    for outcome in moved(outcomes) {
        let _ = write!(text, "| {} |", outcome.workload.title);
        for name in &names {
            let _ = write!(text, " {:.0} |", part_of(outcome, Figures::parts, name));
        }
        let _ = writeln!(text, " {:.0} |", spread(outcome, |figures| figures.at_freeze.ms() * 1e3).0);
    }
    text
}

/// What both hosts do while the pod stands still, a line each; nothing if the `pod` that is measured does not tell.
fn laps(outcomes: &[Outcome]) -> String {
    let parts: Named = |figures| figures.moved.laps.iter().map(|(name, ms)| (name.clone(), ms * 1e3)).collect();
    let names = names_of(outcomes, parts);
    if names.is_empty() {
        return String::new();
    }
    let workloads: Vec<&str> = moved(outcomes).map(|outcome| outcome.workload.name).collect();
    let mut text = format!("| µs, median | {} |\n|---|{}\n", workloads.join(" | "), "---|".repeat(workloads.len()));
    for name in &names {
        let _ = write!(text, "| {name} |");
        for outcome in moved(outcomes) {
            let _ = write!(text, " {:.0} |", part_of(outcome, parts, name));
        }
        text.push('\n');
    }
    format!("More closely, on each host; both work at the same time.\n\n{text}\n")
}

/// What went wrong, and what else was found.
fn remarks(outcomes: &[Outcome]) -> String {
    let mut text = String::new();
    for outcome in outcomes {
        let errors = outcome.errors.iter().map(|error| format!("**failed**: {}", error.trim().replace('\n', " ")));
        for remark in errors.chain(outcome.notes.iter().cloned()) {
            let _ = writeln!(text, "* {}: {remark}", outcome.workload.title);
        }
    }
    text
}

const STALLS: &str = "*Silence at the client*: the longest time without any reply, from the begin of a move until a second after its \
end. *Slowest reply*: the longest that one request waited, of all moves. *Silence on the LAN*: the same between frames of the pod's \
address at the client's cable; shorter, because the kernel acknowledges for a pod that already stands still. An aim without a word is one for the worst, too. An error of a client, a reset, an aborted \
transaction, a write that was acknowledged and is not there: each makes the line fail.\n";

const PHASES: &str = "Where the silence at the freeze went. What is between the two outer columns is what `pod migrate --json` says \
of the frozen time. The first column is how long there had been no reply when the pod stood still; the last is from when the source \
had heard that the pod runs there until the first reply, and less than nothing where the reply was first. A median has its own move \
in each column: they need not add up.\n";

pub fn text(outcomes: &[Outcome], limits: &[Table]) -> String {
    let mut text = format!("## What the clients saw\n\n{}\n{STALLS}\n", stalls(outcomes));
    let _ = write!(text, "{}\n## The moves\n\n{}\n", remarks(outcomes), totals(outcomes));
    let _ = write!(text, "## Phase by phase\n\n{PHASES}\n{}\n", phases(outcomes));
    text += &laps(outcomes);
    let _ = write!(text, "## Over time\n\nLatency of requests by when they were due; a logarithmic axis.\n");
    for outcome in outcomes.iter().filter(|outcome| outcome.plot.is_some()) {
        let _ = write!(text, "\n![{}]({})\n", outcome.workload.title.replace('`', ""), plot_name(outcome.workload));
    }
    text += "\n## The machine\n";
    limits.iter().for_each(|table| text += &format!("\n{}", table.markdown()));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_counts_where_it_is_aimed_at() {
        let only_median = Aim { median: 25.0, worst: f64::INFINITY };
        assert_eq!(verdict(20.0, 400.0, only_median), "met");
        assert_eq!(verdict(8.0, 60.0, Aim { median: 10.0, worst: 30.0 }), "missed, 2.0 times");
        assert_eq!(
            (words(only_median), words(Aim { median: 20.0, worst: 20.0 })),
            ("median 25 ms".into(), "20 ms".into())
        );
    }
}
