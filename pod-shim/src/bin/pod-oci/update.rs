//! `update`: new limits for a container that is there, as a file of JSON or as options.

use crate::args::{Given, Known, Until, switch, usage, value};
use crate::{Context, verbs};
use pod_runtime::oci::life;
use pod_runtime::problem::{Doing, Result};
use serde_json::{Value, json};
use std::io::Read;

const KNOWN: [Known; 20] = [
    value("resources").or('r'),
    value("blkio-weight"),
    value("cpu-period"),
    value("cpu-quota"),
    value("cpu-burst"),
    value("cpu-share"),
    value("cpu-rt-period"),
    value("cpu-rt-runtime"),
    value("cpu-idle"),
    value("cpuset-cpus"),
    value("cpuset-mems"),
    value("kernel-memory"),
    value("kernel-memory-tcp"),
    value("memory"),
    value("memory-reservation"),
    value("memory-swap"),
    value("pids-limit"),
    value("l3-cache-schema"),
    value("mem-bw-schema"),
    switch("help").or('h'),
];

/// A description longer than this is none.
const BOUND: u64 = 1 << 20;

pub fn run(context: &Context<'_>, args: &[String]) -> Result<i32> {
    let given = Given::parse(args, &KNOWN, Until::End)?;
    verbs::helped("update", &given, |given| {
        let [id] = given.exactly("update")?;
        let change = match given.get("resources").filter(|path| !path.is_empty()) {
            Some(path) => read(path)?,
            None => describe(given)?,
        };
        life::update(&context.containers.get(id)?, &change)?;
        Ok(0)
    })
}

fn read(path: &str) -> Result<Value> {
    let mut text = Vec::new();
    let read = match path {
        "-" => std::io::stdin().take(BOUND).read_to_end(&mut text),
        path => std::fs::File::open(path).and_then(|file| file.take(BOUND).read_to_end(&mut text)),
    };
    read.doing(|| format!("read the resources from {path}"))?;
    serde_json::from_slice(&text).doing(|| format!("read the resources from {path}"))
}

fn describe(given: &Given) -> Result<Value> {
    for refused in ["l3-cache-schema", "mem-bw-schema"] {
        if given.get(refused).is_some() {
            return Err(pod_runtime::oci::unsupported(format!("--{refused} is not supported: it is of intelRdt")));
        }
    }
    let mut change = json!({});
    for (option, group, field) in [
        ("blkio-weight", "blockIO", "weight"),
        ("cpu-period", "cpu", "period"),
        ("cpu-quota", "cpu", "quota"),
        ("cpu-burst", "cpu", "burst"),
        ("cpu-share", "cpu", "shares"),
        ("cpu-rt-period", "cpu", "realtimePeriod"),
        ("cpu-rt-runtime", "cpu", "realtimeRuntime"),
        ("cpu-idle", "cpu", "idle"),
        ("kernel-memory-tcp", "memory", "kernelTCP"),
        ("pids-limit", "pids", "limit"),
    ] {
        if let Some(number) = given.number::<i64>(option)? {
            change[group][field] = json!(number);
        }
    }
    for (option, field) in [("cpuset-cpus", "cpus"), ("cpuset-mems", "mems")] {
        if let Some(text) = given.get(option) {
            change["cpu"][field] = json!(text);
        }
    }
    for (option, field) in [("memory", "limit"), ("memory-reservation", "reservation"), ("memory-swap", "swap")] {
        if let Some(text) = given.get(option) {
            change["memory"][field] = json!(bytes(text)?);
        }
    }
    Ok(change)
}

/// "-1", "1048576", "64M", "1g".
fn bytes(text: &str) -> Result<i64> {
    let wrong = || usage(format!("invalid size {text:?}"));
    if text == "-1" {
        return Ok(-1);
    }
    let lower = text.to_ascii_lowercase();
    let lower = lower.strip_suffix('b').unwrap_or(&lower);
    let (number, shift) = match lower.char_indices().last() {
        Some((at, 'k')) => (&lower[..at], 10),
        Some((at, 'm')) => (&lower[..at], 20),
        Some((at, 'g')) => (&lower[..at], 30),
        Some((at, 't')) => (&lower[..at], 40),
        _ => (lower, 0),
    };
    let number: i64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).filter(|number| *number >= 0).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, number) in [("-1", -1), ("5", 5), ("64M", 64 << 20), ("1gb", 1 << 30), ("0", 0)] {
            assert_eq!(bytes(text).unwrap(), number, "{text}");
        }
        for text in ["", "x", "-2", "1.5g", "99999999999t"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
