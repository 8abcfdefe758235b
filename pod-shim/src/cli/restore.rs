//! `pod restore`: a pod from a checkpoint.

use super::checkpoint::{Keys, with_version};
use super::{Context, Exit};
use crate::output;
use pod_migrate::checkpoint::{find, restore};
use pod_runtime::spec::Address;
use pod_runtime::{Problem, Result};
use serde_json::json;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The checkpoint
    #[arg(required_unless_present = "import")]
    name: Option<String>,
    /// A file instead
    #[arg(short = 'i', long, value_name = "FILE")]
    import: Option<PathBuf>,
    /// As a new pod of this name, beside the original
    #[arg(short = 'n', long = "name", value_name = "NEW")]
    new: Option<String>,
    /// With another address
    #[arg(long, value_name = "ADDRESS/PREFIX", value_parser = address)]
    ip: Option<Address>,
    /// Let it run before all of its memory is there: what it touches comes first, the rest behind it
    #[arg(long)]
    lazy: bool,
    #[command(flatten)]
    keys: Keys,
}

fn address(text: &str) -> std::result::Result<Address, String> {
    let (ip, prefix) = text.split_once('/').unwrap_or((text, "24"));
    let ip = ip.parse().map_err(|_| format!("'{ip}' is no address"))?;
    let prefix = prefix.parse().map_err(|_| format!("'{prefix}' is no prefix length"))?;
    Ok(Address { ip, prefix })
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let store = context.store()?;
    let path = match (args.import, args.name) {
        (Some(_), Some(_)) => return Err(Problem::new("E-USAGE", "give a checkpoint's name or -i FILE, not both")),
        (Some(path), None) => path,
        (None, name) => find(&store, &name.unwrap_or_default())?,
    };
    let identities = args.keys.read()?;
    let options = restore::Options { name: args.new, address: args.ip, identities, lazily: args.lazy };
    let restored = restore::restore(&store, &path, &options)?;
    if context.json {
        output::json(&with_version(json!(restored)))?;
        return Ok(Exit::OK);
    }
    output::data(&format!("{}\n", restored.name))?;
    for warning in restored.warnings {
        output::say(format!("warning: {warning}"));
    }
    Ok(Exit::OK)
}
