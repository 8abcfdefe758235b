//! `pod checkpoint`: saving pods in files.

use super::{Context, Exit};
use crate::output::{self, Table};
use pod_migrate::checkpoint::{self, Inspected, Made};
use pod_runtime::Result;
use pod_runtime::status::now;
use serde_json::{Value, json};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Save a pod; it runs on, unless told otherwise
    Create(Create),
    /// List the saved pods
    #[command(visible_alias = "list")]
    Ls,
    /// Show what a checkpoint holds
    Inspect {
        /// Its name
        #[arg(required_unless_present = "import")]
        name: Option<String>,
        /// A file instead
        #[arg(short = 'i', long, value_name = "FILE")]
        import: Option<PathBuf>,
    },
    /// Remove checkpoints
    Rm {
        #[arg(required = true)]
        names: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
struct Create {
    /// The pod
    pod: String,
    /// The checkpoint's name [default: POD-1, POD-2, …]
    name: Option<String>,
    /// End the pod with it
    #[arg(long)]
    stop: bool,
    /// Let the pod run on, which it does anyway
    #[arg(short = 'R', long, conflicts_with = "stop")]
    leave_running: bool,
    /// Into this file instead of the store
    #[arg(short = 'e', long, value_name = "FILE")]
    export: Option<PathBuf>,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    match args.verb {
        Verb::Create(args) => create(args, context),
        Verb::Ls => list(context),
        Verb::Inspect { name, import } => inspect(name, import, context),
        Verb::Rm { names } => {
            let store = context.store()?;
            for name in names {
                checkpoint::remove(&store, &name)?;
                output::data(&format!("{name}\n"))?;
            }
            Ok(Exit::OK)
        }
    }
}

fn create(args: Create, context: &Context) -> Result<Exit> {
    let _ = args.leave_running;
    let store = context.store()?;
    let pod = store.pod(&args.pod)?;
    let options = checkpoint::Options { name: args.name, export: args.export, stop: args.stop };
    let made = checkpoint::create(&store, &pod, &options)?;
    if context.json {
        output::json(&with_version(json!(made)))?;
        return Ok(Exit::OK);
    }
    output::data(&format!("{}\n", made.name))?;
    output::say(words(&made, options.stop));
    Ok(Exit::OK)
}

fn words(made: &Made, stopped: bool) -> String {
    let mut text = format!(
        "{} in {:.0} ms, frozen {:.1} ms: {} processes, {} files, {} connections, {}{}",
        made.path.display(),
        made.total.as_secs_f64() * 1e3,
        made.frozen.as_secs_f64() * 1e3,
        made.processes,
        made.files,
        made.connections,
        output::size(made.bytes),
        if stopped { "; the pod has ended" } else { "; the pod runs on" },
    );
    for warning in &made.warnings {
        text.push_str(&format!("\nwarning: {warning}"));
    }
    text
}

fn list(context: &Context) -> Result<Exit> {
    let found = checkpoint::list(&context.store()?)?;
    if context.json {
        output::json_list("checkpoints", found.iter().map(|c| json!(c)).collect())?;
        return Ok(Exit::OK);
    }
    let mut table = Table::new(&["NAME", "POD", "HOST", "AGE", "SIZE"]);
    for c in found {
        let pod = c.problem.map_or(c.pod, |problem| format!("({problem})"));
        table.row(vec![c.name, pod, c.host, output::age(now().saturating_sub(c.written)), output::size(c.bytes)]);
    }
    table.show()?;
    Ok(Exit::OK)
}

fn inspect(name: Option<String>, import: Option<PathBuf>, context: &Context) -> Result<Exit> {
    let path = match (import, name) {
        (Some(path), _) => path,
        (None, name) => checkpoint::find(&context.store()?, &name.unwrap_or_default())?,
    };
    let inspected = checkpoint::inspect(&path)?;
    if context.json {
        output::json(&with_version(json!(inspected)))?;
    } else {
        output::data(&description(&inspected))?;
    }
    Ok(Exit::OK)
}

fn description(of: &Inspected) -> String {
    let mut text = format!(
        "{}: whole, {}\npod      {} ({}) of {}, saved {} ago by pod {}\ncommand  {}\nmemory   {}\nfiles    {}, {}\n",
        of.path.display(),
        output::size(of.bytes),
        of.pod,
        of.id,
        of.host,
        output::age(now().saturating_sub(of.written)),
        of.version,
        of.command.join(" "),
        output::size(of.memory_bytes),
        of.files,
        output::size(of.file_bytes),
    );
    let open: Vec<String> = of.open_files.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
    text.push_str(&format!("open     {}\n", open.join(", ")));
    if of.exposed {
        text.push_str("warning  others can read this file, and it holds the programs' memory: chmod 600\n");
    }
    text.push_str("    PID  PARENT  THREADS     MAPPED  COMMAND\n");
    for p in &of.processes {
        let mapped = output::size(p.mapped_bytes);
        text.push_str(&format!("{:>7} {:>7} {:>8} {mapped:>10}  {}\n", p.pid, p.parent, p.threads, p.command));
    }
    text
}

pub fn with_version(mut value: Value) -> Value {
    if let Some(object) = value.as_object_mut() {
        object.insert("schema_version".into(), json!(output::SCHEMA_VERSION));
    }
    value
}
