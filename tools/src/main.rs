//! `walferry`: one binary for the node and for everything that an operator does with it.
//! This file only starts the chosen subcommand and turns its end into an exit code.

mod cli;
mod client;
mod config;
mod daemon;
mod demo;
mod distance;
mod fsync;
mod init;
mod inspect;
mod link;
mod load;
mod logging;
mod nodes;
mod promote;
mod status;
mod units;

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let failure = match cli::run(cli::Cli::parse()) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(failure) => failure,
    };
    // A reader that closed the pipe (`walferry log dump | head`) is not an error.
    if !failure.is_closed_pipe() {
        // stderr may be closed as well; there is nobody left to tell.
        let _ = writeln!(std::io::stderr(), "walferry: {failure}");
    }
    failure.exit_code()
}

impl cli::Failure {
    fn is_closed_pipe(&self) -> bool {
        matches!(self, cli::Failure::Output(error) if error.kind() == ErrorKind::BrokenPipe)
    }
}
