//! `pod daemon`: takes pods without ssh; the keys of this host and of those that it trusts.

use super::{Context, Exit};
use crate::output::{self, Table};
use pod_migrate::link::daemon::PORT;
use pod_migrate::link::daemon::call::split;
use pod_migrate::link::daemon::keys::{Keys, Peer, PublicKey};
use pod_migrate::link::daemon::serve::{Daemon, everywhere};
use pod_runtime::store::Store;
use pod_runtime::{Doing, Problem, Result};
use serde_json::json;
use std::net::{SocketAddr, ToSocketAddrs};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Each of two hosts is told the key of the other, once; then pods move between them:
  hostA# pod daemon trust hostB $(ssh hostB pod daemon key)    or by any other way that nobody can tamper with
  hostB# pod daemon trust hostA ed25519:...
  hostB# pod daemon run
  hostA# pod migrate web --to pod://hostB

A host that may send pods here can do what root can: a pod may be given every right.")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Listen for hosts that are trusted, until ended
    Run {
        /// Where to listen: ADDRESS, ADDRESS:PORT or [V6ADDRESS]:PORT [default: everywhere, port 8263]
        #[arg(long, value_name = "ADDRESS", value_delimiter = ',')]
        listen: Vec<String>,
    },
    /// Print the key of this host, for others to trust
    Key,
    /// Trust the host that has this key
    Trust(Trust),
    /// List the hosts that are trusted
    #[command(visible_alias = "list")]
    Ls,
    /// Trust hosts no more
    #[command(visible_alias = "rm")]
    Forget {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
struct Trust {
    /// What it is called here, as in --to pod://NAME
    name: String,
    /// As `pod daemon key` prints it there
    key: PublicKey,
    /// Where it listens, if not at its name
    #[arg(long, value_name = "HOST[:PORT]")]
    address: Option<String>,
    /// Send pods to it, and take none from it
    #[arg(long)]
    outgoing_only: bool,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let store = context.store()?;
    match args.verb {
        Verb::Run { listen } => serve(&store, &listen, context),
        Verb::Key => {
            let key = Keys::of(&store)?.public()?;
            match context.json {
                true => output::json(&json!({ "schema_version": output::SCHEMA_VERSION, "key": key }))?,
                false => output::data(&format!("{key}\n"))?,
            }
            Ok(Exit::OK)
        }
        Verb::Trust(trust) => self::trust(&store, trust),
        Verb::Ls => list(&store, context),
        Verb::Forget { names } => {
            let keys = Keys::of(&store)?;
            names.iter().try_for_each(|name| keys.forget(name))?;
            Ok(Exit::OK)
        }
    }
}

fn trust(store: &Store, trust: Trust) -> Result<Exit> {
    let Trust { name, key, address, outgoing_only } = trust;
    if let Some(address) = &address {
        address_of(address)?;
    }
    Keys::of(store)?.trust(&name, Peer { address, outgoing_only, ..Peer::new(key) })?;
    Ok(Exit::OK)
}

/// What can be an address, whether or not it is anybody's.
fn address_of(text: &str) -> Result<(&str, Option<u16>)> {
    let (host, port) = split(text);
    let written = text.rsplit_once(':').filter(|(before, _)| before.ends_with(']') || !before.contains(':'));
    if host.is_empty() || (written.is_some() && port.is_none()) {
        return Err(Problem::new("E-USAGE", format!("'{text}' is no address"))
            .fix("write it as HOST, HOST:PORT or [V6ADDRESS]:PORT"));
    }
    Ok((host, port))
}

fn list(store: &Store, context: &Context) -> Result<Exit> {
    let peers = Keys::of(store)?.peers()?;
    if context.json {
        let of = |(name, peer): (&String, &Peer)| {
            let mut value = json!(peer);
            value["name"] = json!(name);
            value
        };
        output::json_list("peers", peers.iter().map(of).collect())?;
        return Ok(Exit::OK);
    }
    let mut table = Table::new(&["NAME", "MAY SEND PODS", "ADDRESS", "KEY"]);
    for (name, peer) in &peers {
        let may = if peer.outgoing_only { "no" } else { "yes" };
        let address = peer.address.as_deref().unwrap_or("-");
        table.row([name, may, address, &peer.key.to_string()].map(str::to_owned).to_vec());
    }
    table.show()?;
    Ok(Exit::OK)
}

fn serve(store: &Store, listen: &[String], context: &Context) -> Result<Exit> {
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for text in listen {
        let (host, port) = address_of(text)?;
        let found = (host, port.unwrap_or(PORT)).to_socket_addrs().doing(|| format!("find the address of {host}"))?;
        addresses.extend(found);
    }
    if addresses.is_empty() {
        addresses = everywhere(PORT);
    }
    let daemon = Daemon::open(store, &addresses)?;
    let at = daemon.addresses();
    if context.json {
        output::json(&json!({ "schema_version": output::SCHEMA_VERSION, "listening": at }))?;
    } else {
        let at: Vec<String> = at.iter().map(SocketAddr::to_string).collect();
        output::say(format!("listening at {}", at.join(", ")));
    }
    daemon.serve(|line| output::say(line))?;
    Ok(Exit::OK)
}
