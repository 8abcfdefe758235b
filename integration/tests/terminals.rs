//! Programs at a terminal: start with `pod run -it`, leave, move, attach on the other host, go on typing.

use anyhow::{Result, ensure};
use integration::bed::Bed;
use integration::pods::move_around;
use integration::terminal::Terminal;

/// Starts a program at a terminal, lets `before` use it, moves it, and gives `after` a new terminal on the other host.
fn moved(
    name: &str,
    program: &[&str],
    before: impl FnOnce(&mut Terminal) -> Result<()>,
    after: impl FnOnce(&mut Terminal, &Bed) -> Result<()>,
) -> Result<()> {
    let bed = Bed::new()?;
    let run = [&["run", "-it", "--name", name, "--network", "none", "--"], program].concat();
    let mut terminal = Terminal::pod(bed.a(), &run)?;
    before(&mut terminal)?;
    terminal.detach()?;
    move_around(&bed, name, 1)?;
    let mut terminal = Terminal::pod(bed.b(), &["attach", name])?;
    after(&mut terminal, &bed)
}

#[test]
fn bash_with_its_variables_and_jobs() -> Result<()> {
    moved(
        "shell",
        &["bash", "--norc"],
        |terminal| {
            terminal.expect("# ")?;
            terminal.say("PS1='no''w> '; x=41\n", "now> ")?;
            terminal.say("sleep 1000 &\n", "now> ")?;
            terminal.say("echo pid $$\n", "pid 1")
        },
        |terminal, _| {
            terminal.say("echo $((x+1)) done\n", "42 done")?;
            terminal.say("jobs\n", "Running")?;
            terminal.expect("now> ")?;
            terminal.say("fg\n", "sleep 1000\r\n")?;
            terminal.say("\x1a", "Stopped")?;
            // A job that bash still takes for stopped it would not wait for.
            terminal.say("bg\n", "sleep 1000 &")?;
            terminal.say("kill %1; wait; echo gone\n", "gone\r\n")?;
            terminal.type_in("exit 7\n")?;
            ensure!(terminal.ended()? == 7, "the shell's exit code is another");
            Ok(())
        },
    )
}

#[test]
fn python_with_its_variables() -> Result<()> {
    moved(
        "python",
        &["python3", "-q", "-i"],
        |terminal| {
            terminal.expect(">>> ")?;
            terminal.say("import threading; numbers = [1, 2, 39]\n", ">>> ")
        },
        |terminal, _| {
            terminal.say("print('sum', sum(numbers))\n", "sum 42")?;
            terminal.type_in("exit(3)\n")?;
            ensure!(terminal.ended()? == 3, "python's exit code is another");
            Ok(())
        },
    )
}

#[test]
fn vim_with_its_text() -> Result<()> {
    moved(
        "vim",
        &["vim", "-u", "NONE", "-N", "/tmp/text"],
        |terminal| {
            terminal.expect("/tmp/text")?;
            terminal.say("ifirst line\x1b", "first line")
        },
        |terminal, bed| {
            terminal.say("osecond line\x1b", "second line")?;
            terminal.say(":w\n", "written")?;
            let text = bed.b().pod(&["exec", "vim", "cat", "/tmp/text"])?;
            ensure!(text == "first line\nsecond line\n", "the file holds {text:?}");
            terminal.type_in(":q\n")?;
            ensure!(terminal.ended()? == 0, "vim's exit code is another");
            Ok(())
        },
    )
}

#[test]
fn top_goes_on() -> Result<()> {
    moved(
        "top",
        &["top", "-d", "0.2"],
        |terminal| terminal.expect("load average"),
        |terminal, _| {
            terminal.expect("load average")?;
            terminal.expect("COMMAND")?;
            terminal.type_in("q")?;
            ensure!(terminal.ended()? == 0, "top's exit code is another");
            Ok(())
        },
    )
}
