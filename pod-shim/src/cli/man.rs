//! `pod man`: manual pages made from the same definitions as the help.

use super::{Cli, Exit};
use crate::output;
use clap::CommandFactory;
use pod_runtime::{Doing, Result};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  pod man | man -l -\n  pod man /usr/local/share/man/man1")]
pub struct Args {
    /// Write one page a verb into this folder instead
    folder: Option<PathBuf>,
}

pub fn run(args: Args) -> Result<Exit> {
    let command = Cli::command();
    match args.folder {
        Some(folder) => {
            std::fs::create_dir_all(&folder).doing(|| format!("make the folder {}", folder.display()))?;
            clap_mangen::generate_to(command, &folder).doing(|| format!("write pages to {}", folder.display()))?;
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command).render(&mut page).doing(|| "write the page".into())?;
            output::bytes(&page)?;
        }
    }
    Ok(Exit::OK)
}
