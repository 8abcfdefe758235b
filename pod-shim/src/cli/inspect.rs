//! `pod inspect`: everything that is known of a pod, as a JSON array.

use super::format::Format;
use super::{Context, Exit, ps};
use crate::output;
use pod_runtime::Result;
use serde_json::{Value, json};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  pod inspect web\n  pod inspect --format '{{.Ip}}' web")]
pub struct Args {
    /// Fields: '{{.Name}}' or name,ip,…
    #[arg(short, long)]
    format: Option<String>,
    /// Names or ids
    #[arg(required = true, num_args = 1.., value_name = "POD")]
    pods: Vec<String>,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let store = context.store()?;
    let mut found = Vec::new();
    for name in &args.pods {
        let pod = store.pod(name)?;
        let (spec, status) = (pod.spec()?, pod.status()?);
        let mut row = ps::row(&pod, &spec, &status, true);
        let more = json!({
            "schema_version": output::SCHEMA_VERSION,
            "pid": status.init.map(|key| key.pid),
            "monitor_pid": status.monitor.map(|key| key.pid),
            "oom_killed": status.oom_killed,
            "problem": status.problem,
            "memory_to_come": !pod_migrate::restore::filler::is_filled(&pod),
            "job": status.job,
            "spec": spec,
            "dir": pod.dir(),
            "log": pod.log_path(),
        });
        if let (Value::Object(row), Value::Object(more)) = (&mut row, more) {
            row.extend(more);
        }
        found.push(row);
    }
    match &args.format {
        Some(format) if format == "json" => output::json(&found)?,
        Some(format) => Format::parse(format)?.show(&found)?,
        None => output::json(&found)?,
    }
    Ok(Exit::OK)
}
