//! Everything that the binary `walferry` is made of. It is a library for one reason: what reads bytes that anybody may send or
//! write (the RESP parser, the configuration) is called by the fuzz targets too, and by nobody else; see `hostile`.

mod cli;
mod client;
mod config;
mod daemon;
mod demo;
mod describe;
mod distance;
mod drill;
mod fsync;
mod init;
mod inspect;
mod link;
mod load;
mod logging;
mod members;
mod nodes;
mod own_files;
mod passwd;
mod promote;
mod role;
mod slot;
mod status;
mod switchover;
mod units;

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use clap::Parser;

/// Readers of bytes that may come from anybody, for the fuzz targets and their regression tests.
pub mod hostile {
    pub use crate::config::{ConfigError, NodeConfig, Settings};
    pub use crate::daemon::{resp, users};
}

/// A node whose clock, threads, disk and network are a simulator's.
#[cfg(feature = "simulation")]
pub mod simulated {
    pub use crate::config::{NodeConfig, PeerAuth};
    pub use crate::daemon::DaemonError;
    pub use crate::daemon::simulated::{Control, Member, Order, Report, witness_agent};
}

/// Runs the subcommand that the command line names, and turns its end into an exit code.
pub fn main() -> ExitCode {
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

impl cli::Failure {
    fn is_closed_pipe(&self) -> bool {
        matches!(self, cli::Failure::Output(error) if error.kind() == ErrorKind::BrokenPipe)
    }
}
