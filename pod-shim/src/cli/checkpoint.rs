//! `pod checkpoint`: saving pods in files.

mod diff;
mod inspect;

use super::{Context, Exit};
use crate::output::{self, Table};
use pod_migrate::checkpoint::{self, Compression, Identity, Made, Recipient};
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
    /// Show what a checkpoint holds, without restoring it
    Inspect(inspect::Args),
    /// Show what is different between two checkpoints
    Diff(diff::Args),
    /// Make an identity for encrypted checkpoints and print its recipient
    Keygen {
        /// A new file, for whoever is to open them
        #[arg(value_name = "FILE")]
        identity: PathBuf,
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
    /// none, zstd or zstd:LEVEL, after the pod goes on [default: none; with -e zstd:1]
    #[arg(short = 'c', long, value_name = "HOW", value_parser = compression, allow_hyphen_values = true)]
    compress: Option<Compression>,
    /// Only who has the identity of this recipient (age1…) can open it; may be given several times
    #[arg(long, value_name = "RECIPIENT", value_parser = recipient)]
    encrypt_to: Vec<Recipient>,
}

fn recipient(text: &str) -> std::result::Result<Recipient, String> {
    Recipient::parse(text).ok_or_else(|| {
        let hint = "age1…, as `pod checkpoint keygen FILE` or age-keygen prints it";
        format!("'{text}' is no X25519 recipient: {hint}")
    })
}

/// `--identity FILE`.
#[derive(Debug, clap::Args)]
pub struct Keys {
    /// What an encrypted checkpoint is opened with: a file of age identities
    #[arg(long, value_name = "FILE")]
    identity: Vec<PathBuf>,
}

impl Keys {
    pub fn read(&self) -> Result<Vec<Identity>> {
        let mut all = Vec::new();
        for path in &self.identity {
            all.extend(Identity::read(path)?);
        }
        Ok(all)
    }
}

fn keygen(path: &std::path::Path, context: &Context) -> Result<Exit> {
    let identity = Identity::new()?;
    identity.write(path)?;
    let recipient = identity.recipient().to_string();
    if context.json {
        output::json(&with_version(json!({ "recipient": recipient, "identity": path })))?;
    } else {
        output::data(&format!("{recipient}\n"))?;
    }
    Ok(Exit::OK)
}

fn compression(text: &str) -> std::result::Result<Compression, String> {
    let levels = Compression::LEVELS;
    Compression::parse(text)
        .ok_or_else(|| format!("'{text}' is not none, zstd or zstd:LEVEL with {} to {}", levels.start(), levels.end()))
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    match args.verb {
        Verb::Create(args) => create(args, context),
        Verb::Ls => list(context),
        Verb::Inspect(args) => inspect::run(args, context),
        Verb::Diff(args) => diff::run(args, context),
        Verb::Keygen { identity } => keygen(&identity, context),
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
    let options = checkpoint::Options {
        name: args.name,
        export: args.export,
        stop: args.stop,
        compression: args.compress,
        recipients: args.encrypt_to,
    };
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
    if made.bytes < made.unpacked_bytes {
        let before = output::size(made.unpacked_bytes);
        let twice = output::size(made.duplicate_bytes);
        text.push_str(&format!("\npacked from {before}, of which {twice} were there already"));
    }
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

/// The file of a checkpoint: what has a slash is one, all else is a name in the store.
fn file(name: &str, context: &Context) -> Result<PathBuf> {
    if name.contains('/') { Ok(PathBuf::from(name)) } else { checkpoint::find(&context.store()?, name) }
}

pub fn with_version(mut value: Value) -> Value {
    if let Some(object) = value.as_object_mut() {
        object.insert("schema_version".into(), json!(output::SCHEMA_VERSION));
    }
    value
}
