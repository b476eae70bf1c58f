//! `walferry`: one binary for the node and for everything that an operator does with it. A module for each subcommand; the node
//! itself is the crate `walferry_node`.

mod cli;
mod client;
mod demo;
mod describe;
mod distance;
mod drill;
mod failure;
mod fsync;
mod init;
mod inspect;
mod link;
mod load;
mod members;
mod nodes;
mod passwd;
mod promote;
mod slot;
mod status;
mod switchover;
mod witness;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use walferry_node::logging;

/// Runs the subcommand that the command line names, and turns its end into an exit code.
fn main() -> ExitCode {
    walferry_engine::panics::end_the_process(logging::finish);
    walferry_engine::file_size::refuse_by_error();
    let code = match cli::run(cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // A reader that closed the pipe (`walferry log dump | head`) is not an error.
            if !failure.is_closed_pipe() && !logging::tell_last(&format!("walferry: {failure}")) {
                // stderr may be closed as well; there is nobody left to tell.
                let _ = writeln!(std::io::stderr(), "walferry: {failure}");
            }
            failure.exit_code()
        }
    };
    logging::finish();
    code
}
