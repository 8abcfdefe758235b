//! `bed`: hosts on this machine, from the shell. `bed --help` lists the commands.

use anyhow::{Context, Result, bail};
use integration::bed::{self, Bed, Census, Config};
use integration::wait;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::Duration;

const HELP: &str = "bed: several hosts on one machine, made of namespaces

  bed up                       make the hosts (nothing to do when they are up)
  bed exec HOST CMD...         run CMD on HOST, with the built pod on its PATH
  bed down                     end everything, remove all state
  bed run CMD...               up, CMD here, always down; the status is CMD's
  bed status                   a line a host: name, pid, address
  bed pid HOST                 pid of a host's init
  bed crash HOST               power failure: every process of HOST is killed
  bed partition HOST           pull its cable; `bed heal HOST` plugs it in
  bed shape HOST RATE|off      limit its cable both ways, e.g. 1gbit
  bed loss HOST PERCENT|off    drop that much of what goes to it
  bed leaks HOST save FILE     keep what is on HOST now
  bed leaks HOST FILE          print what still differs from then after a while; exit 1 if anything does
  bed until SECONDS CMD...     repeat CMD until it succeeds; exit 1 when it has not by then
  bed list                     all beds on this machine

Environment: BED_NAME (default \"bed\"; beds of different names live side by side), BED_HOSTS (\"hostA hostB client\"),
POD_PROGRAM (the pod to put on every host's PATH).";

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let status = bed::internal(&args).unwrap_or_else(|| command(&args));
    match status {
        Ok(status) => std::process::exit(status),
        Err(error) => {
            eprintln!("bed: {error:#}");
            std::process::exit(125);
        }
    }
}

fn name() -> String {
    std::env::var("BED_NAME").unwrap_or_else(|_| "bed".into())
}

fn config(persist: bool) -> Config {
    let mut config = Config { name: name(), persist, ..Config::fresh() };
    if let Ok(hosts) = std::env::var("BED_HOSTS") {
        config.hosts = hosts.split_whitespace().map(String::from).collect();
    }
    config
}

fn command(args: &[String]) -> Result<i32> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["up"] => {
            if Bed::open(&name()).is_err() {
                Bed::up(&config(true))?;
            }
        }
        ["down"] => bed::down(&name())?,
        ["exec", host, program, rest @ ..] => {
            return status(Bed::open(&name())?.host(host).command(program).args(rest));
        }
        ["run", program, rest @ ..] => {
            let bed = Bed::up(&config(false))?;
            // By way of __exec: the command must not outlive us, who own the bed.
            let mut command = Command::new(std::env::current_exe()?);
            return status(command.args(["__exec", program]).args(rest).env("BED_NAME", bed.name()));
        }
        ["until", seconds, program, rest @ ..] => {
            let deadline = Duration::from_secs(seconds.parse().context("SECONDS is a number")?);
            let once = || Command::new(program).args(rest).stdout(Stdio::null()).stderr(Stdio::null()).status();
            wait::until_true(&args[2..].join(" "), deadline, || once().is_ok_and(|status| status.success()))?;
        }
        ["list"] => bed::all().iter().for_each(|name| println!("{name}")),
        ["status"] => {
            for host in Bed::open(&name())?.hosts() {
                let state = host.pid().map_or("down".into(), |pid| pid.to_string());
                println!("{} {state} {} {}", host.name(), host.address(), host.address6());
            }
        }
        ["pid", host] => println!("{}", Bed::open(&name())?.host(host).pid()?),
        [verb, host, rest @ ..] => return on_host(verb, host, rest),
        _ => {
            eprintln!("{HELP}");
            return Ok(2);
        }
    }
    Ok(0)
}

fn on_host(verb: &str, host: &str, rest: &[&str]) -> Result<i32> {
    let bed = Bed::open(&name())?;
    let host = bed.host(host);
    match (verb, rest) {
        ("crash", []) => host.crash()?,
        ("partition", []) => bed.partition(host)?,
        ("heal", []) => bed.heal(host)?,
        ("shape", ["off"]) => bed.shape(host, None)?,
        ("shape", [rate]) => bed.shape(host, Some(rate))?,
        ("loss", ["off"]) => bed.loss(host, 0.0)?,
        ("loss", [percent]) => bed.loss(host, percent.parse().context("PERCENT is a number")?)?,
        ("leaks", ["save", file]) => std::fs::write(file, serde_json::to_vec(&Census::of(host)?)?)?,
        ("leaks", [file]) => {
            let before: Census = serde_json::from_slice(&std::fs::read(file)?)?;
            // A pod's monitor is the last to go: its end has the disk hold what the pod wrote.
            let differs = before.settled(host, 2 * integration::wait::SOON)?;
            differs.iter().for_each(|line| println!("{line}"));
            return Ok(i32::from(!differs.is_empty()));
        }
        _ => bail!("no such command; bed alone lists them"),
    }
    Ok(0)
}

fn status(command: &mut Command) -> Result<i32> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}
