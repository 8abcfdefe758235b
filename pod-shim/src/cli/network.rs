//! `pod network`: the named networks of this host.

use super::{Context, Exit};
use crate::output::{self, Table};
use pod_runtime::network::leases;
use pod_runtime::network::named::{self, Definition, Subnet};
use pod_runtime::{Doing, Problem, Result};
use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// List networks
    #[command(visible_alias = "list")]
    Ls,
    /// Show a network and who has which address
    Inspect {
        /// Its name
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Make a network: of its own with NAT outward, or over a bridge of the host
    Create(Create),
    /// Forget networks that no pod uses
    #[command(visible_alias = "remove")]
    Rm {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
struct Create {
    /// Its name
    name: String,
    /// Addresses of the network: 10.77.0.0/24; also an IPv6 one [default: a free private range]
    #[arg(long, value_name = "A.B.C.D/N")]
    subnet: Vec<String>,
    /// Router of the network [default: the bridge of a network of its own; none over a bridge of the host]
    #[arg(long, value_name = "ADDRESS")]
    gateway: Vec<IpAddr>,
    /// Lease only these IPv4 addresses: 10.77.0.100-10.77.0.200
    #[arg(long, alias = "ip-range", value_name = "FIRST-LAST")]
    range: Option<String>,
    /// Use this bridge of the host, which is its LAN, instead of making one
    #[arg(long, value_name = "IFACE")]
    bridge: Option<String>,
    /// No NAT: pods reach the other pods and this host only
    #[arg(long)]
    internal: bool,
    /// Bytes of a packet
    #[arg(long)]
    mtu: Option<u32>,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let dir = context.store()?.network_dir()?;
    match args.verb {
        Verb::Ls => list(&dir, context),
        Verb::Inspect { names } => inspect(&dir, &names),
        Verb::Create(create) => self::create(&dir, &create, context),
        Verb::Rm { names } => {
            for name in &names {
                named::remove(&dir, name)?;
                if !context.json {
                    output::data(&format!("{name}\n"))?;
                }
            }
            Ok(Exit::OK)
        }
    }
}

fn subnets(definition: &Definition) -> String {
    definition.subnets.iter().map(Subnet::to_string).collect::<Vec<_>>().join(", ")
}

fn list(dir: &Path, context: &Context) -> Result<Exit> {
    let networks = named::list(dir)?;
    let leases = leases::all(dir)?;
    let pods = |name: &str| leases.values().filter(|lease| lease.network.as_deref() == Some(name)).count();
    if context.json {
        let items = networks.iter().map(|n| described(n, json!(pods(&n.name)))).collect();
        output::json_list("networks", items)?;
        return Ok(Exit::OK);
    }
    let mut table = Table::new(&["NAME", "BRIDGE", "SUBNETS", "NAT", "PODS"]);
    for network in &networks {
        let nat = if network.nat { "yes" } else { "no" };
        let row = [&network.name, &network.bridge, &subnets(network), nat, &pods(&network.name).to_string()];
        table.row(row.map(str::to_owned).to_vec());
    }
    table.show()?;
    Ok(Exit::OK)
}

fn described(network: &Definition, pods: Value) -> Value {
    let mut value = json!(network);
    value["name"] = json!(network.name);
    value["pods"] = pods;
    value
}

fn inspect(dir: &Path, names: &[String]) -> Result<Exit> {
    let leases = leases::all(dir)?;
    let mut found = Vec::new();
    for name in names {
        let network = named::load(dir, name)?;
        let mut pods: Vec<Value> = Vec::new();
        for (id, lease) in leases.iter().filter(|(_, lease)| lease.network.as_ref() == Some(name)) {
            let mut value = json!(lease);
            value["id"] = json!(id);
            pods.push(value);
        }
        let mut value = described(&network, json!(pods));
        value["ipv6_outward"] = json!(network.nat && named::forwards_ipv6());
        value["nat_in_place"] = json!(network.nat && pod_runtime::network::nat::present());
        found.push(value);
    }
    output::json_list("networks", found)?;
    Ok(Exit::OK)
}

fn usage(what: String) -> Problem {
    Problem::new("E-USAGE", what).fix("pod network create --help")
}

fn create(dir: &Path, args: &Create, context: &Context) -> Result<Exit> {
    let wanted: Vec<Subnet> =
        args.subnet.iter().map(|text| text.parse()).collect::<Result<_, String>>().map_err(usage)?;
    let mut definition = match &args.bridge {
        None => named::invent(
            dir,
            &args.name,
            &format!("pb-{}", args.name),
            wanted.iter().copied().find(|s| s.base.is_ipv4()),
        )?,
        Some(bridge) => {
            if wanted.is_empty() {
                return Err(usage(format!("which --subnet is behind {bridge}?")));
            }
            Definition {
                name: args.name.clone(),
                bridge: bridge.clone(),
                managed: false,
                subnets: wanted.clone(),
                gateways: Vec::new(),
                range: None,
                nat: false,
                mtu: None,
            }
        }
    };
    if let Some(v6) = wanted.iter().find(|subnet| subnet.base.is_ipv6()).filter(|_| definition.managed) {
        definition.subnets.retain(|subnet| subnet.base.is_ipv4());
        definition.subnets.push(*v6);
        definition.gateways.retain(|gateway| gateway.is_ipv4());
    }
    if !args.gateway.is_empty() {
        definition.gateways.clone_from(&args.gateway);
    }
    if let Some(gateway) = definition.gateways.iter().find(|g| !definition.subnets.iter().any(|s| s.contains(**g))) {
        return Err(usage(format!("the gateway {gateway} is in no subnet of the network")));
    }
    definition.range = args.range.as_deref().map(parse_range).transpose()?;
    if let Some((first, last)) = definition.range
        && ![first, last].iter().all(|ip| definition.subnets.iter().any(|s| s.contains(IpAddr::V4(*ip))))
    {
        return Err(usage(format!("{first}-{last} is not in the network")));
    }
    definition.nat &= !args.internal;
    definition.mtu = args.mtu;
    named::create(dir, &definition).doing(|| format!("make the network '{}'", args.name))?;
    if context.json {
        output::json(&described(&definition, json!(0)))?;
    } else {
        output::data(&format!("{}\n", definition.name))?;
    }
    Ok(Exit::OK)
}

fn parse_range(text: &str) -> Result<(Ipv4Addr, Ipv4Addr)> {
    let wrong = || usage(format!("'{text}' is no range like 10.77.0.100-10.77.0.200"));
    let (first, last) = text.split_once('-').ok_or_else(wrong)?;
    let parse = |ip: &str| ip.trim().parse::<Ipv4Addr>().map_err(|_| wrong());
    let (first, last) = (parse(first)?, parse(last)?);
    if first > last { Err(wrong()) } else { Ok((first, last)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        assert_eq!(parse_range("10.0.0.1-10.0.0.9").unwrap().1, Ipv4Addr::new(10, 0, 0, 9));
        for bad in ["10.0.0.1", "10.0.0.9-10.0.0.1", "a-b"] {
            assert_eq!(parse_range(bad).unwrap_err().code(), "E-USAGE");
        }
    }
}
