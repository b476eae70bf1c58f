//! How a subcommand fails, with its exit code; and the one way to write a line to the standard output. Used by every subcommand.

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use walferry_node::DaemonError;
use walferry_node::config::ConfigError;
use walferry_node::logging::LoggingError;

/// How a subcommand ends when it does not end well.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The command line or the configuration is wrong: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// The configuration is wrong: exit code 2.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// What was asked for failed: exit code 1.
    #[error("{0}")]
    Failed(String),
    /// The output could not be written: exit code 1.
    #[error("cannot write the output: {0}")]
    Output(#[from] std::io::Error),
    /// Logging did not start: exit code 2 where `log_filter` is wrong, else 1.
    #[error(transparent)]
    Logging(#[from] LoggingError),
    /// The node stopped on an error: exit code 1.
    #[error(transparent)]
    Node(#[from] DaemonError),
}

impl Failure {
    /// A failure with this text; exit code 1.
    pub fn failed(text: impl std::fmt::Display) -> Failure {
        Failure::Failed(text.to_string())
    }

    /// True when the reader of the output closed its pipe.
    pub fn is_closed_pipe(&self) -> bool {
        matches!(self, Failure::Output(error) if error.kind() == ErrorKind::BrokenPipe)
    }

    /// The exit code of the process, as documented in the help text.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Failure::Usage(_)
            | Failure::Logging(LoggingError::Filter { .. })
            | Failure::Config(_)
            | Failure::Node(DaemonError::Config(_) | DaemonError::Users(_)) => ExitCode::from(2),
            Failure::Node(DaemonError::Role(error)) if error.is_usage() => ExitCode::from(2),
            Failure::Failed(_) | Failure::Output(_) | Failure::Logging(_) | Failure::Node(_) => ExitCode::from(1),
        }
    }
}

/// One line on the standard output; a closed pipe is an error that `main` keeps quiet about.
pub fn say(line: impl std::fmt::Display) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    Ok(writeln!(out, "{line}")?)
}
