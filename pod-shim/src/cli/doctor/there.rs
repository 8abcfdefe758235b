//! `pod doctor --to HOST`: what lies between this host and another, by the way that a move takes, and what that host's own
//! `pod doctor` says.

use super::{Finding, Health, finding};
use crate::output;
use pod_migrate::link::dial::Dial;
use pod_migrate::migrate::inquiry::Inquiry;
use pod_migrate::migrate::offer;
use pod_migrate::migrate::protocol::{PROTOCOL, Room};
use serde_json::Value;
use std::process::Stdio;

/// A link below this makes moves of anything large long.
const SLOW: u64 = 10 << 20;
const MOVES: &str = "pod migrate and pod drain to that host";

pub fn examine(host: &str, dial: &Dial) -> Vec<Finding> {
    let mut there = match Inquiry::open(dial) {
        Ok(there) => there,
        Err(problem) => {
            let fix = problem.way_out().map_or_else(|| format!("ssh {host} pod --version"), str::to_owned);
            return vec![finding(format!("{host}: reach"), false, Health::Fail, problem.chain(), MOVES, fix)];
        }
    };
    let mut all = vec![version(host, &there), clock(host, &there)];
    all.extend(there.room().map(|room| free(host, room)));
    all.push(speed(host, &mut there));
    all.extend(its_own(host, dial));
    all
}

fn version(host: &str, there: &Inquiry) -> Finding {
    let hello = &there.peer.hello;
    let found =
        format!("pod {} on Linux {}, spoken with by protocol {}", hello.version, hello.kernel, there.peer.agreed);
    let fix = "install the newer of the two versions of pod on both hosts";
    let without = "several questions in one connection, measures of the link";
    finding(format!("{host}: pod"), there.peer.agreed == PROTOCOL, Health::Warn, found, without, fix)
}

fn clock(host: &str, there: &Inquiry) -> Finding {
    let found = there.peer.ahead.map_or_else(
        || "not known".to_owned(),
        |(ms, within)| {
            format!("{} ms {}, give or take {within} ms", ms.unsigned_abs(), if ms < 0 { "behind" } else { "ahead" })
        },
    );
    let without = "the time of day going on without a jump in pods that move";
    let fix = "let both follow one source of time: apt-get install chrony; chronyc tracking";
    finding(format!("{host}: clock"), there.peer.skew().is_none(), Health::Warn, found, without, fix)
}

fn free(host: &str, room: Room) -> Finding {
    let found = format!("{} of memory, {} of disk", output::size(room.memory), output::size(room.disk));
    let good = room.memory > 256 << 20 && room.disk > 1 << 30;
    finding(
        format!("{host}: free"),
        good,
        Health::Warn,
        found,
        "room for pods that arrive",
        "free some, or choose another host",
    )
}

fn speed(host: &str, there: &mut Inquiry) -> Finding {
    let (good, found) = match there.measure() {
        Ok(Some(speed)) => (speed >= SLOW, format!("{}/s by the way that memory takes", output::size(speed))),
        Ok(None) => (true, "not measured: the version there is too old".to_owned()),
        Err(problem) => (false, problem.chain()),
    };
    let fix = "another network; --ssh-option Ciphers=aes128-gcm@openssh.com; for one move --on-stall throttle, --downtime TIME";
    finding(format!("{host}: link"), good, Health::Warn, found, "quick moves of pods with much memory", fix)
}

/// What it finds when it is asked about itself, and whether its processor has what ours has.
fn its_own(host: &str, dial: &Dial) -> Vec<Finding> {
    let mut command = dial.command(&["doctor", "--json"]);
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output();
    let answer: Value = output.ok().and_then(|out| serde_json::from_slice(&out.stdout).ok()).unwrap_or_default();
    let text = |finding: &Value, name: &str| finding[name].as_str().unwrap_or_default().to_owned();
    let its = |one: &Value| {
        let (good, health) = match one["health"].as_str() {
            Some("ok") => (true, Health::Ok),
            Some("warn") => (false, Health::Warn),
            _ => (false, Health::Fail),
        };
        let what = text(one, "what");
        finding(format!("{host}: {what}"), good, health, text(one, "found"), text(one, "disables"), text(one, "fix"))
    };
    let mut all: Vec<Finding> = answer["findings"].as_array().into_iter().flatten().map(its).collect();
    if all.is_empty() {
        let (found, fix) = ("`pod doctor` there said nothing".to_owned(), format!("ssh {host} pod doctor"));
        all.push(finding(format!("{host}: itself"), false, Health::Warn, found, "knowing what it lacks", fix));
    }
    all.extend(processor(host, &answer));
    all
}

fn processor(host: &str, answer: &Value) -> Option<Finding> {
    let theirs: Vec<&str> = answer["processor"]["flags"].as_array()?.iter().filter_map(Value::as_str).collect();
    let ours = offer::cpu();
    let missing: Vec<&str> = ours.flags.iter().map(String::as_str).filter(|flag| !theirs.contains(flag)).collect();
    let model = answer["processor"]["model"].as_str().unwrap_or("?");
    let found = match missing.is_empty() {
        true => format!("{model}: has all that this one has"),
        false => format!("{model} lacks {}", missing.join(", ")),
    };
    let (without, fix) =
        ("moves of pods from here to there (E-CPU)", "a host with a processor of the same or a newer kind");
    Some(finding(format!("{host}: processor"), missing.is_empty(), Health::Warn, found, without, fix))
}
