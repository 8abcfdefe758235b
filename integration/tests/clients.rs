//! Who is attached to a pod when it moves: goes with it, and loses nothing.

use anyhow::{Context, Result, ensure};
use integration::bed::{Bed, Host};
use integration::terminal::Terminal;
use integration::wait::{SOON, until_true};
use std::io::{Read, Write};
use std::process::{Child, Stdio};

/// Moves a pod that somebody is attached to.
fn move_it(from: &Host, to: &Host, pod: &str) -> Result<()> {
    from.pod(&["migrate", pod, "--to", to.name()])?;
    ensure!(to.runs(pod) && !from.runs(pod), "{pod} is not on {} alone", to.name());
    Ok(())
}

/// A program that says what its environment is, at a terminal that goes there and back with it.
fn terminal_follows(bed: &Bed, mut terminal: Terminal, pod: &str, code: i32) -> Result<()> {
    terminal.say("PS1='no''w> '; x=41\n", "now> ")?;
    move_it(bed.a(), bed.b(), pod)?;
    terminal.expect(&format!("moved to {}", bed.b().name()))?;
    terminal.say("echo $((x+1)) there\n", "42 there")?;
    move_it(bed.b(), bed.a(), pod)?;
    terminal.expect(&format!("moved to {}", bed.a().name()))?;
    terminal.say("echo $((x+2)) back; stty size\n", "43 back\r\n40 120")?;
    terminal.type_in(&format!("exit {code}\n"))?;
    ensure!(terminal.ended()? == code, "the shell's exit code is another");
    Ok(())
}

#[test]
fn the_terminal_of_a_pod_follows_it() -> Result<()> {
    let bed = Bed::new()?;
    let run = ["run", "-it", "--name", "shell", "--network", "none", "--", "bash", "--norc"];
    let mut terminal = Terminal::pod(bed.a(), &run)?;
    terminal.expect("# ")?;
    terminal_follows(&bed, terminal, "shell", 7)
}

#[test]
fn the_terminal_of_an_exec_session_follows_it_and_can_be_taken_there() -> Result<()> {
    let bed = Bed::new()?;
    bed.a().pod(&["run", "-d", "--name", "p", "--network", "none", "--", "sleep", "1000"])?;
    let mut left = Terminal::pod(bed.a(), &["exec", "-it", "p", "bash", "--norc"])?;
    left.expect("# ")?;
    left.say("PS1='le''ft> '; y=1\n", "left> ")?;
    left.detach()?;
    let mut terminal = Terminal::pod(bed.a(), &["exec", "-it", "p", "bash", "--norc"])?;
    terminal.expect("# ")?;
    terminal_follows(&bed, terminal, "p", 9)?;
    move_it(bed.a(), bed.b(), "p")?;
    let sessions = bed.b().pod(&["inspect", "p", "--format", "json"])?;
    ensure!(sessions.contains("\"bash\"") && sessions.contains("\"id\": 1"), "{sessions}");
    let mut taken = Terminal::pod(bed.b(), &["attach", "p", "--exec", "1"])?;
    taken.say("echo $((y+1)) taken\n", "2 taken")?;
    taken.type_in("exit 3\n")?;
    ensure!(taken.ended()? == 3, "the session's exit code is another");
    Ok(())
}

fn piped(host: &Host, args: &[&str]) -> Result<Child> {
    let mut command = host.command("pod");
    Ok(command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

/// Feeds `child` from a thread as fast as it takes it.
fn feed(child: &mut Child, data: Vec<u8>) -> std::thread::JoinHandle<()> {
    let mut stdin = child.stdin.take().expect("it is piped");
    std::thread::spawn(move || {
        for piece in data.chunks(16 << 10) {
            if stdin.write_all(piece).is_err() {
                return;
            }
        }
    })
}

#[test]
fn what_is_piped_into_and_out_of_an_exec_arrives_whole() -> Result<()> {
    let bed = Bed::new()?;
    bed.a().pod(&["run", "-d", "--name", "p", "--network", "none", "--", "sleep", "1000"])?;
    // Reads slowly, so that all that lies between is full when the pod moves; what it says depends on every byte.
    let slow = "import sys,hashlib,time\nh=hashlib.sha256()\n\
        while b:=sys.stdin.buffer.read(1<<20):\n h.update(b); time.sleep(.05); print(len(b), flush=True)\n\
        print(h.hexdigest())\nsys.exit(5)";
    let data: Vec<u8> = (0..60_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let expected = sum(&data)?;
    let mut child = piped(bed.a(), &["exec", "-i", "p", "python3", "-c", slow])?;
    let feeder = feed(&mut child, data);
    let mut out = child.stdout.take().context("it is piped")?;
    let mut first = [0; 8];
    out.read_exact(&mut first)?;
    move_it(bed.a(), bed.b(), "p")?;
    move_it(bed.b(), bed.a(), "p")?;
    let mut rest = String::new();
    out.read_to_string(&mut rest)?;
    let _ = feeder.join();
    let ended = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    ensure!(said.matches("moved to").count() == 2, "it says {said:?}");
    ensure!(rest.lines().last() == Some(expected.as_str()), "the program read something else: {said}");
    ensure!(ended.status.code() == Some(5), "{:?}", ended.status);
    Ok(())
}

#[test]
fn what_an_exec_writes_arrives_whole() -> Result<()> {
    let bed = Bed::new()?;
    bed.a().pod(&["run", "-d", "--name", "p", "--network", "none", "--", "sleep", "1000"])?;
    let mut child = piped(bed.a(), &["exec", "p", "sh", "-c", "seq 1 2000000; exit 6"])?;
    let mut out = child.stdout.take().context("it is piped")?;
    let mut first = vec![0; 4096];
    out.read_exact(&mut first)?;
    // Nobody reads: everything is full, and the program waits in write(2).
    move_it(bed.a(), bed.b(), "p")?;
    out.read_to_end(&mut first)?;
    let text = String::from_utf8(first)?;
    let wrong = text.lines().zip(1..).find(|(line, number)| *line != number.to_string());
    ensure!(wrong.is_none() && text.lines().count() == 2_000_000, "{wrong:?} of {} lines", text.lines().count());
    ensure!(child.wait()?.code() == Some(6), "the exit code is another");
    Ok(())
}

#[test]
fn a_followed_log_goes_on_behind_a_move_and_when_it_is_full() -> Result<()> {
    let bed = Bed::new()?;
    let count = "i=0; while [ $i -lt 4000 ]; do i=$((i+1)); echo line $i; sleep 0.001; done";
    let limits = "max-size=20k,max-file=2";
    bed.a().pod(&["run", "-d", "--name", "log", "--log-opt", limits, "--network", "none", "--", "sh", "-c", count])?;
    let follower = piped(bed.a(), &["logs", "-f", "log"])?;
    let shows = |host: &Host, line: &str| host.pod(&["logs", "--tail", "50", "log"]).is_ok_and(|t| t.contains(line));
    until_true("some lines", SOON, || shows(bed.a(), "line 5"))?;
    move_it(bed.a(), bed.b(), "log")?;
    bed.b().pod(&["wait", "log"])?;
    let output = follower.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let wrong = text.lines().zip(1..).find(|(line, number)| *line != format!("line {number}"));
    ensure!(wrong.is_none() && text.lines().count() == 4000, "{wrong:?} of {} lines", text.lines().count());
    let left = bed.b().pod(&["logs", "log"])?;
    ensure!(left.len() < 40_000 && left.ends_with("line 4000\n"), "{} bytes are left", left.len());
    Ok(())
}

fn sum(data: &[u8]) -> Result<String> {
    let mut child = std::process::Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().context("it is piped")?.write_all(data)?;
    let output = child.wait_with_output()?;
    Ok(String::from_utf8(output.stdout)?.split(' ').next().unwrap_or_default().to_owned())
}

/// What an exec had open in the monitor goes when it ends, which may be after the hold and before the pod stands still.
#[test]
fn execs_that_end_meanwhile_fail_no_checkpoint() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    bed.a().pod(&["run", "-d", "--name", "p", "--network", "none", "--", "sleep", "1000"])?;
    let line = "while pod exec p sh -c 'sleep 0.0$((RANDOM % 6))1'; do :; done";
    let loops = (0..5).map(|_| Ok(bed.a().command("bash").args(["-c", line]).stderr(Stdio::null()).spawn()?));
    let loops = loops.collect::<Result<Vec<_>>>()?;
    for round in 0..40 {
        bed.a().pod(&["checkpoint", "create", "p", "saved"]).with_context(|| format!("round {round}"))?;
        bed.a().pod(&["checkpoint", "rm", "saved"])?;
    }
    bed.a().pod(&["rm", "-f", "p"])?;
    for mut one in loops {
        one.wait()?;
    }
    bed.nothing_left(&before)
}
