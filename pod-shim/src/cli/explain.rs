//! `pod explain`: the page of a code.

use super::{Context, Exit};
use crate::output;
use pod_runtime::store::closest;
use pod_runtime::{Problem, Result, problem};
use serde_json::json;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The code, as E-STATE; without it all codes are listed
    code: Option<String>,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let Some(code) = args.code else {
        return list(context);
    };
    let Some(page) = problem::page(&code) else {
        let wanted = code.to_ascii_uppercase();
        let problem = Problem::new("E-USAGE", format!("there is no code '{code}'"));
        return Err(match closest(&wanted, problem::codes()) {
            Some(near) => problem.fix(format!("did you mean {near}? `pod explain` lists all codes")),
            None => problem.fix("`pod explain` lists all codes"),
        });
    };
    if context.json {
        output::json(
            &json!({ "schema_version": output::SCHEMA_VERSION, "code": code.to_ascii_uppercase(), "page": page }),
        )?;
    } else {
        output::data(page)?;
    }
    Ok(Exit::OK)
}

fn list(context: &Context) -> Result<Exit> {
    let title = |code: &str| {
        let first = problem::page(code).and_then(|page| page.lines().next()).unwrap_or_default();
        first.split_once(": ").map_or("", |(_, title)| title).to_owned()
    };
    if context.json {
        let codes = problem::codes().map(|code| json!({ "code": code, "title": title(code) })).collect();
        output::json_list("codes", codes)?;
    } else {
        let mut table = output::Table::new(&["CODE", "MEANING"]);
        for code in problem::codes() {
            table.row(vec![code.into(), title(code)]);
        }
        table.show()?;
    }
    Ok(Exit::OK)
}
