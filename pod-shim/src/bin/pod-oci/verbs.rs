//! The verbs: each takes its options, makes one call into the library, and prints the answer.

use crate::args::{Given, Known, Until, switch, usage, value};
use crate::{Context, exec, foreground, show, update};
use pod_runtime::oci::{self, Container, create, features, life, sealed, stats, template, terminal};
use pod_runtime::problem::{Doing, Problem, Result};
use pod_runtime::sys::process;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

const CREATE: [Known; 8] = [
    value("bundle").or('b'),
    value("console-socket"),
    value("pid-file"),
    value("preserve-fds"),
    switch("no-pivot"),
    switch("no-new-keyring"),
    switch("no-subreaper"),
    switch("help").or('h'),
];

const ID_ONLY: [Known; 1] = [switch("help").or('h')];

pub fn run(context: &Context<'_>, verb: &str, args: &[String]) -> Result<i32> {
    let parse = |known: &[Known]| Given::parse(args, known, Until::End);
    match verb {
        "create" => helped(verb, &parse(&CREATE)?, |given| make(context, given)),
        "run" => {
            let known = [&CREATE[..], &[switch("detach").or('d'), switch("keep")]].concat();
            helped(verb, &parse(&known)?, |given| run_whole(context, given))
        }
        "exec" => exec::run(context, args),
        "update" => update::run(context, args),
        "start" => helped(verb, &parse(&ID_ONLY)?, |given| on(context, given, verb, life::start)),
        "pause" => helped(verb, &parse(&ID_ONLY)?, |given| on(context, given, verb, life::pause)),
        "resume" => helped(verb, &parse(&ID_ONLY)?, |given| on(context, given, verb, life::resume)),
        "state" => helped(verb, &parse(&ID_ONLY)?, |given| on(context, given, verb, state)),
        "kill" => helped(verb, &parse(&[switch("all").or('a'), switch("help").or('h')])?, |given| kill(context, given)),
        "delete" => {
            let known = [switch("force").or('f'), switch("help").or('h')];
            helped(verb, &parse(&known)?, |given| delete(context, given))
        }
        "list" => {
            let known = [value("format").or('f'), switch("quiet").or('q'), switch("help").or('h')];
            helped(verb, &parse(&known)?, |given| show::list(context, given))
        }
        "ps" => {
            let given = Given::parse(args, &[value("format").or('f'), switch("help").or('h')], Until::Word(1))?;
            helped(verb, &given, |given| show::processes(context, given))
        }
        "events" => {
            let known = [value("interval"), switch("stats"), switch("help").or('h')];
            helped(verb, &parse(&known)?, |given| events(context, given))
        }
        "spec" => {
            let known = [value("bundle").or('b'), switch("rootless"), switch("help").or('h')];
            helped(verb, &parse(&known)?, spec)
        }
        "features" => helped(verb, &parse(&ID_ONLY)?, |_| print(&features::document())),
        "checkpoint" | "restore" => Err(oci::unsupported(format!(
            "{verb} of an OCI container is not supported yet: `pod {verb}` does it for pods"
        ))),
        other => Err(usage(format!("No help topic for '{other}': pod-oci has no such command"))),
    }
}

/// `--help` of a verb is an answer.
pub fn helped(verb: &str, given: &Given, run: impl FnOnce(&Given) -> Result<i32>) -> Result<i32> {
    if given.has("help") {
        show::help_of(verb);
        return Ok(0);
    }
    run(given)
}

fn on(context: &Context<'_>, given: &Given, verb: &str, act: impl FnOnce(&Container) -> Result<()>) -> Result<i32> {
    let [id] = given.exactly(verb)?;
    act(&context.containers.get(id)?)?;
    Ok(0)
}

fn options(context: &Context<'_>, given: &Given) -> Result<create::Options> {
    // Before anything of ours is open.
    let preserve_fds = preserved(given)?;
    let console = given.get("console-socket").filter(|path| !path.is_empty());
    Ok(create::Options {
        bundle: bundle(given),
        console: console.map(|path| terminal::connect(Path::new(path))).transpose()?,
        pid_file: given.get("pid-file").filter(|path| !path.is_empty()).map(PathBuf::from),
        preserve_fds,
        no_pivot: given.has("no-pivot"),
        no_new_keyring: given.has("no-new-keyring"),
        no_cgroups: context.no_cgroups,
    })
}

fn bundle(given: &Given) -> PathBuf {
    given.get("bundle").filter(|path| !path.is_empty()).map_or_else(|| ".".into(), PathBuf::from)
}

/// Those that the caller says it hands on, and those that it hands on as systemd does, to this process and not to one that
/// this has inherited the environment of. All must be there: a number that is
/// free now would be one of ours later.
pub fn preserved(given: &Given) -> Result<i32> {
    let count: i32 = given.number("preserve-fds")?.unwrap_or(0);
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<i32>().ok());
    let to_us = number("LISTEN_PID").is_some_and(|pid| u32::try_from(pid) == Ok(std::process::id()));
    let activated = if to_us { number("LISTEN_FDS").unwrap_or(0) } else { 0 };
    let count = count.checked_add(activated).filter(|count| (0..=1024).contains(count));
    let count = count.ok_or_else(|| usage("invalid value for flag -preserve-fds"))?;
    for number in 3..3 + count {
        if !process::is_open(number) {
            return Err(usage(format!("file descriptor {number} is to be preserved and is not open")));
        }
    }
    // All others are for nobody but us.
    let first = u32::try_from(3 + count).unwrap_or(3);
    process::close_on_exec_from(first).doing(|| "mark descriptors to close at exec".into())?;
    Ok(count)
}

fn make(context: &Context<'_>, given: &Given) -> Result<i32> {
    let [id] = given.exactly("create")?;
    sealed::for_bundle(&bundle(given))?;
    create::create(&context.containers, id, &options(context, given)?)?;
    Ok(0)
}

fn run_whole(context: &Context<'_>, given: &Given) -> Result<i32> {
    let [id] = given.exactly("run")?;
    sealed::for_bundle(&bundle(given))?;
    let mut options = options(context, given)?;
    if given.has("detach") {
        create::run(&context.containers, id, &options)?;
        return Ok(0);
    }
    let wants = oci::Bundle::load(&options.bundle)?.spec.process().as_ref().and_then(|process| process.terminal());
    let mut foreground = foreground::Foreground::begin(wants.unwrap_or(false) && options.console.is_none())?;
    if let Some(console) = foreground.console()? {
        options.console = Some(console);
    }
    let container = create::run(&context.containers, id, &options)?;
    // Our ends of the console are the only ones now.
    drop(options);
    let code = foreground.stay(container.state()?.pid)?;
    if !given.has("keep") {
        warn(context, life::delete(&container, true)?);
    }
    Ok(code)
}

fn state(container: &Container) -> Result<()> {
    let state = container.state()?;
    let status = container.status(&state)?;
    print(&serde_json::to_value(container.shown(&state, status)).doing(|| "show a state".into())?).map(drop)
}

/// Pretty JSON and a line's end.
pub fn print(value: &serde_json::Value) -> Result<i32> {
    let text = serde_json::to_string_pretty(value).doing(|| "show an answer".into())?;
    writeln!(std::io::stdout(), "{text}").doing(|| "write the answer".into())?;
    Ok(0)
}

fn kill(context: &Context<'_>, given: &Given) -> Result<i32> {
    let (id, signal) = match given.words.as_slice() {
        [id] => (id, "SIGTERM"),
        [id, signal] => (id, signal.as_str()),
        _ => return Err(usage("pod-oci: \"kill\" requires a container ID and at most a signal")),
    };
    let signal = life::signal(signal)?;
    life::kill(&context.containers.get(id)?, signal, given.has("all"))?;
    Ok(0)
}

fn delete(context: &Context<'_>, given: &Given) -> Result<i32> {
    let [id] = given.exactly("delete")?;
    let warnings = match given.has("force") {
        true => life::delete_if_there(&context.containers, id)?,
        false => life::delete(&context.containers.get(id)?, false)?,
    };
    warn(context, warnings);
    Ok(0)
}

fn warn(context: &Context<'_>, problems: Vec<Problem>) {
    problems.iter().for_each(|problem| context.log.warning(&problem.chain()));
}

fn events(context: &Context<'_>, given: &Given) -> Result<i32> {
    let [id] = given.exactly("events")?;
    let container = context.containers.get(id)?;
    let interval = given.get("interval").unwrap_or("5s");
    let interval = pod_runtime::when::parse_duration(interval).filter(|ns| *ns > 0);
    let interval = interval.ok_or_else(|| usage("invalid value for flag -interval"))?;
    loop {
        let running = container.status(&container.state()?)? != oci::Status::Stopped;
        if !running && given.has("stats") {
            return Err(Problem::new("E-OCI-STATE", "container not running"));
        }
        if !running {
            return Ok(0);
        }
        writeln!(std::io::stdout(), "{}", stats::of(&container)?).doing(|| "write an event".into())?;
        if given.has("stats") {
            return Ok(0);
        }
        std::thread::sleep(Duration::from_nanos(interval));
    }
}

fn spec(given: &Given) -> Result<i32> {
    let [] = given.exactly("spec")?;
    let folder = given.get("bundle").map_or_else(|| PathBuf::from("."), PathBuf::from);
    let path = folder.join("config.json");
    if path.exists() {
        return Err(usage("File config.json exists. Remove it first"));
    }
    let text = serde_json::to_string_pretty(&template::config(given.has("rootless"))).doing(|| "write JSON".into())?;
    std::fs::write(&path, text + "\n").doing(|| format!("write {}", path.display()))?;
    Ok(0)
}
