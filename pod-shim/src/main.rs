//! `pod`: the command line for people. It parses, makes one call into the libraries, and shows the answer.
//!
//! A verb is a file in [`cli`]: its arguments, and a `run` that returns the exit code or the [`Problem`] that stands in
//! the way. How problems and tables are shown, and which exit code a problem has, is in [`output`]; nothing else prints
//! errors. The process stays single-threaded, because `run` and `restore` fork the monitor out of it.
#![deny(unsafe_code)]

mod cli;
mod elsewhere;
mod output;
mod terminal;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    pod_runtime::sys::daemon::expect_children();
    let cli = cli::Cli::try_parse().unwrap_or_else(|error| misused(&error));
    output::start_logging(cli.global.debug);
    let context = cli::Context::new(&cli.global);
    let own_failure = cli.command.exit_code_of_own_failure();
    let code = match cli.command.run(&context) {
        Ok(exit) => exit.0,
        Err(problem) => {
            output::problem(&problem, context.json);
            own_failure.unwrap_or(output::exit_code)(&problem)
        }
    };
    ExitCode::from(code.clamp(0, 255) as u8)
}

/// Help and version are answers. A mistake is 2, but 125 for the verbs whose other codes are the program's.
fn misused(error: &clap::Error) -> ! {
    let verb = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let of_program = error.use_stderr() && matches!(verb.as_deref(), Some("run" | "exec"));
    let _ = error.print();
    std::process::exit(if of_program { 125 } else { error.exit_code() })
}
