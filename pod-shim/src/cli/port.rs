//! `pod port`: the published ports of a pod.

use super::{Context, Exit};
use crate::output;
use pod_runtime::{Problem, Result};
use serde_json::json;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name or id of the pod
    pod: String,
    /// Only this port of the pod: 80, 53/udp
    port: Option<String>,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let ports = context.store()?.pod(&args.pod)?.spec()?.network.ports;
    let wanted = match &args.port {
        None => None,
        Some(text) => {
            let (number, kind) = text.split_once('/').unwrap_or((text, "tcp"));
            let number: u16 = number
                .parse()
                .map_err(|_| Problem::new("E-USAGE", format!("'{text}' is no port")).fix("80 or 53/udp"))?;
            Some((number, kind == "udp"))
        }
    };
    let shown: Vec<_> = ports.iter().filter(|p| wanted.is_none_or(|w| w == (p.pod, p.udp))).collect();
    if context.json {
        output::json_list("ports", shown.iter().map(|port| json!(port)).collect())?;
        return Ok(Exit::OK);
    }
    if let (Some(text), true) = (&args.port, shown.is_empty()) {
        return Err(Problem::new("E-STATE", format!("port {text} of '{}' is not published", args.pod)));
    }
    let mut text = String::new();
    for port in shown {
        let kind = if port.udp { "udp" } else { "tcp" };
        let ip = port.host_ip.map_or("0.0.0.0".to_owned(), |ip| ip.to_string());
        let ip = if ip.contains(':') { format!("[{ip}]") } else { ip };
        match wanted {
            Some(_) => text.push_str(&format!("{ip}:{}\n", port.host)),
            None => text.push_str(&format!("{}/{kind} -> {ip}:{}\n", port.pod, port.host)),
        }
    }
    output::data(&text)?;
    Ok(Exit::OK)
}
