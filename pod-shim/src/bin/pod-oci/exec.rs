//! `exec`: a further process in a container, as a file of JSON or as options describe it.

use crate::args::{Given, Known, Until, switch, usage, value};
use crate::foreground::Foreground;
use crate::{Context, verbs};
use pod_runtime::oci::{Container, bundle, enter, sealed, terminal, unsupported, write_file};
use pod_runtime::problem::{Doing, Result};
use serde_json::{Value, json};
use std::path::Path;

const KNOWN: [Known; 20] = [
    value("console-socket"),
    value("cwd"),
    value("env").or('e'),
    switch("tty").or('t'),
    value("user").or('u'),
    value("additional-gids").or('g'),
    value("process").or('p'),
    switch("detach").or('d'),
    value("pid-file"),
    value("process-label"),
    value("apparmor"),
    switch("no-new-privs"),
    value("cap").or('c'),
    value("preserve-fds"),
    value("cgroup"),
    switch("ignore-paused"),
    switch("no-subreaper"),
    switch("no-new-keyring"),
    switch("no-pivot"),
    switch("help").or('h'),
];

pub fn run(context: &Context<'_>, args: &[String]) -> Result<i32> {
    let given = Given::parse(args, &KNOWN, Until::Word(2))?;
    verbs::helped("exec", &given, |given| exec(context, given))
}

fn exec(context: &Context<'_>, given: &Given) -> Result<i32> {
    let (id, command) = given.words.split_first().ok_or_else(|| usage("pod-oci: \"exec\" requires a container ID"))?;
    if given.get("cgroup").is_some_and(|path| !path.is_empty()) {
        return Err(unsupported("exec --cgroup is not supported"));
    }
    let file = given.get("process").filter(|path| !path.is_empty()).map(|path| bundle::read(Path::new(path)));
    let given_here =
        file.and_then(Result::ok).unwrap_or_else(|| given.all("cap").collect::<Vec<_>>().join(" ").into_bytes());
    sealed::for_container(&context.containers, id, &given_here)?;
    let container = context.containers.get(id)?;
    let process = match given.get("process").filter(|path| !path.is_empty()) {
        Some(path) => {
            let mut process: Value =
                serde_json::from_slice(&bundle::read(Path::new(path))?).doing(|| format!("read {path}"))?;
            check_shape(&process)?;
            if given.has("tty") {
                process["terminal"] = json!(true);
            }
            process
        }
        None => describe(&container, given, command)?,
    };
    let text = serde_json::to_vec(&process).doing(|| "describe the process".into())?;
    let process = bundle::parse_process(&text)?;
    // Before anything of ours is open.
    let preserve_fds = verbs::preserved(given)?;
    let socket = given.get("console-socket").filter(|path| !path.is_empty());
    let mut options = enter::Options {
        console: socket.map(|path| terminal::connect(Path::new(path))).transpose()?,
        preserve_fds,
        ignore_paused: given.has("ignore-paused"),
    };
    let detach = given.has("detach");
    let here = process.terminal().unwrap_or(false) && options.console.is_none() && !detach;
    let mut foreground = if detach { None } else { Some(Foreground::begin(here)?) };
    if let Some(console) = foreground.as_mut().map(Foreground::console).transpose()?.flatten() {
        options.console = Some(console);
    }
    let pid = enter::exec(&container, &process, &options)?;
    drop(options);
    if let Some(path) = given.get("pid-file").filter(|path| !path.is_empty()) {
        write_file(Path::new(path), pid.to_string().as_bytes(), 0o644)?;
    }
    match foreground {
        None => Ok(0),
        Some(mut foreground) => foreground.stay(pid),
    }
}

/// The container's own process with another command, and what the options change.
fn describe(container: &Container, given: &Given, command: &[String]) -> Result<Value> {
    if command.is_empty() {
        return Err(usage("pod-oci: \"exec\" requires a command, or --process"));
    }
    let config: Value = serde_json::from_slice(&container.config()?).doing(|| "read the configuration".into())?;
    let mut process = config["process"].clone();
    check_shape(&process)?;
    process["args"] = json!(command);
    process["terminal"] = json!(given.has("tty"));
    if let Some(cwd) = given.get("cwd") {
        process["cwd"] = json!(cwd);
    }
    if given.has("no-new-privs") {
        process["noNewPrivileges"] = json!(true);
    }
    if let Some(label) = given.get("process-label") {
        process["selinuxLabel"] = json!(label);
    }
    if let Some(profile) = given.get("apparmor") {
        process["apparmorProfile"] = json!(profile);
    }
    add(&mut process["env"], given.all("env").map(|line| json!(line)));
    if let Some(user) = given.get("user") {
        let (uid, gid) = numbers(user)?;
        process["user"] = json!({"uid": uid, "gid": gid.unwrap_or(0)});
    }
    let groups = given.all("additional-gids").map(|text| {
        text.parse::<u32>()
            .map(|gid| json!(gid))
            .map_err(|_| usage(format!("invalid group {text:?}: it must be a number")))
    });
    add(&mut process["user"]["additionalGids"], groups.collect::<Result<Vec<_>>>()?.into_iter());
    let capabilities: Vec<Value> = given.all("cap").map(|name| json!(name)).collect();
    for set in ["bounding", "effective", "permitted"] {
        if !capabilities.is_empty() {
            // Never to the inheritable ones: a file could hand those on.
            add(&mut process["capabilities"][set], capabilities.iter().cloned());
        }
    }
    Ok(process)
}

/// That the fields that are changed here can be: what can be read as a process may be written as a list, too.
fn check_shape(process: &Value) -> Result<()> {
    let fine = |value: &Value| value.is_object() || value.is_null();
    match process.is_object() && ["user", "capabilities"].iter().all(|name| fine(&process[*name])) {
        true => Ok(()),
        false => Err(usage("this is no process as the runtime specification has it")),
    }
}

fn add(list: &mut Value, more: impl Iterator<Item = Value>) {
    let mut all = list.as_array().cloned().unwrap_or_default();
    all.extend(more);
    if !all.is_empty() {
        *list = Value::Array(all);
    }
}

/// `UID[:GID]`, digits and nothing else.
fn numbers(text: &str) -> Result<(u32, Option<u32>)> {
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<u32>().ok()).flatten().filter(|number| *number != u32::MAX)
    };
    let wrong = || usage(format!("invalid user {text:?}: it must be UID[:GID] in numbers"));
    match text.split_once(':') {
        Some((uid, gid)) => Ok((number(uid).ok_or_else(wrong)?, Some(number(gid).ok_or_else(wrong)?))),
        None => Ok((number(text).ok_or_else(wrong)?, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_process_is_refused() {
        for text in ["[]", "null", "1", "\"x\"", r#"{"user": []}"#, r#"{"capabilities": "CAP_KILL"}"#] {
            assert!(check_shape(&serde_json::from_str(text).unwrap()).is_err(), "{text}");
        }
        check_shape(&json!({"user": {"uid": 0}})).unwrap();
    }

    #[test]
    fn users_are_numbers() {
        assert_eq!(numbers("1000").unwrap(), (1000, None));
        assert_eq!(numbers("1000:7").unwrap(), (1000, Some(7)));
        for text in ["root", "-1", "1:", ":1", "1:2:3", "4294967295", "0x1", " 1", ""] {
            assert!(numbers(text).is_err(), "{text}");
        }
    }
}
