//! A quick few of the programs of `integration/workloads/`, so that the way that all of them go stays tested, and they with
//! it. All of them: `integration/workloads/run`.

use anyhow::{Context, Result, ensure};
use integration::bed;
use std::path::Path;
use std::process::Command;

fn works(name: &str) -> Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("workloads").join(name).with_extension("sh");
    let bed = bed::beside_us("bed").context("bed is built with us")?;
    let output = Command::new("bash").arg(&script).env("BED", bed).env_remove("BED_NAME").output()?;
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    ensure!(output.status.success(), "{name}: {}", said.lines().last().unwrap_or("nothing was said"));
    Ok(())
}

macro_rules! programs {
    ($($name:ident)*) => { $( #[test] fn $name() -> anyhow::Result<()> {
        works(stringify!($name))
    } )* };
}

programs! { haproxy php redis sqlite ssh tmux }
