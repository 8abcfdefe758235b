//! `pod config`: what `pod` goes by on this host, and where that was said.

use super::{Context, Exit};
use crate::output::{self, Table};
use pod_runtime::Result;
use pod_runtime::network::named;
use serde_json::json;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Show every setting and where it comes from
    Show {
        /// Where each comes from; shown anyway
        #[arg(long)]
        origin: bool,
    },
}

/// A setting, its value, who said so.
type Setting = (String, String, String);

/// What the environment says, or what holds when it says nothing.
fn variable(name: &'static str, setting: &str, otherwise: &str) -> Setting {
    match std::env::var(name).ok().filter(|value| !value.is_empty()) {
        Some(value) => (setting.into(), value, format!("${name}")),
        None => (setting.into(), otherwise.into(), "default".into()),
    }
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let Verb::Show { origin: _ } = args.verb;
    let store = context.store()?;
    let path = |path: &std::path::Path| path.display().to_string();
    let (_, _, data) = variable("POD_ROOT", "", "");
    let (_, _, run) = variable("POD_RUN", "", "");
    let flag = |origin: String| if context.root_was_given() { "--root or $POD_ROOT".into() } else { origin };
    let mut settings: Vec<Setting> = vec![
        ("root".into(), path(store.data()), flag(data)),
        ("run".into(), path(store.run()), flag(run)),
        variable("POD_LOG", "log", "warn"),
        variable("POD_SSH", "ssh", "ssh"),
    ];
    for network in named::list(&store.network_dir()?)? {
        let subnets: Vec<String> = network.subnets.iter().map(ToString::to_string).collect();
        let words = format!("bridge {}, {}", network.bridge, subnets.join(" "));
        let origin = named::origin(&store.network_dir()?, &network.name);
        settings.push((format!("network {}", network.name), words, path(&origin)));
    }
    if context.json {
        let rows = settings.iter().map(|(key, value, origin)| json!({ "key": key, "value": value, "origin": origin }));
        output::json_list("settings", rows.collect())?;
        return Ok(Exit::OK);
    }
    let mut table = Table::new(&["KEY", "VALUE", "ORIGIN"]);
    settings.into_iter().for_each(|(key, value, origin)| table.row(vec![key, value, origin]));
    table.show()?;
    Ok(Exit::OK)
}
