//! Starting a pod, and saving and restoring small and many things: fixed costs.

use crate::report::Report;
use crate::table::{Table, ms};
use crate::{frozen, pod, said, timed};
use anyhow::Result;

/// `pod run -- true` beside a bare fork and exec.
pub fn start(report: &mut Report) -> Result<()> {
    let mut table = Table::new("start of `true`", "ms");
    let (mut bare, mut none, mut network) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..11 {
        bare.push(ms(timed(&["true"])?.1));
        none.push(ms(pod(&["run", "--rm", "--network", "none", "--", "true"])?.1));
        network.push(ms(pod(&["run", "--rm", "--", "true"])?.1));
    }
    let limit = table.row("fork and exec", bare);
    table.against("pod run --network none", none, limit, "fork and exec");
    table.against("pod run", network, limit, "fork and exec");
    report.add(table);
    Ok(())
}

/// What is saved and restored.
pub struct Subject<'a> {
    pub what: &'a str,
    pub program: &'a [&'a str],
    pub runs: usize,
}

/// Medians, in milliseconds.
pub struct Costs {
    pub create: f64,
    pub frozen: f64,
    pub restore: f64,
}

/// Checkpoint and restore of a program that does nothing: frozen time, and that of the whole restore.
pub fn saved(report: &mut Report, &Subject { what, program, runs }: &Subject<'_>) -> Result<Costs> {
    let mut table = Table::new(&format!("checkpoint and restore of {what}"), "ms");
    pod(&[&["run", "-d", "--name", "subject", "--network", "none", "--"], program].concat())?;
    if program.len() > 2 {
        said("subject", "ready")?;
    }
    let (mut own, mut create, mut still, mut restore) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        own.push(ms(pod(&["--version"])?.1));
        let (json, took) =
            pod(&["checkpoint", "create", "subject", "-e", "/dev/shm/subject", "--compress", "none", "--json"])?;
        create.push(ms(took));
        still.push(ms(frozen(&json)?));
        pod(&["rm", "-f", "subject"])?;
        restore.push(ms(pod(&["restore", "-i", "/dev/shm/subject"])?.1));
        std::fs::remove_file("/dev/shm/subject")?;
    }
    pod(&["rm", "-f", "subject"])?;
    let limit = table.row("pod --version (the command itself)", own);
    let create = table.against("pod checkpoint create", create, limit, "the command itself");
    let frozen = table.row("  of it frozen", still);
    let restore = table.against("pod restore", restore, limit, "the command itself");
    report.add(table);
    Ok(Costs { create, frozen, restore })
}

/// Of many of a kind, beside the aim for each of them: the frozen time and the whole restore by their number.
pub fn many(report: &mut Report, count: u32, subject: &Subject<'_>, each: f64) -> Result<()> {
    let costs = saved(report, subject)?;
    let one = |ms: f64| ms * 1e3 / f64::from(count);
    report.aim(format!("{}, each: frozen", subject.what), each, "µs", one(costs.frozen));
    report.aim(format!("{}, each: restored", subject.what), each, "µs", one(costs.restore));
    Ok(())
}
