//! Where the node's log lines go: to journald when systemd started it with its journal as stderr, else to stderr.
//! Called once by `start`; everything else only uses `tracing`.

use std::io::IsTerminal;
use std::os::fd::AsFd;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::Failure;

/// Starts logging what `filter` lets through.
pub fn start(filter: &str) -> Result<(), Failure> {
    let wrong = |error: &dyn std::fmt::Display| {
        Failure::Usage(format!(
            "log_filter = {filter:?}: {error}; choose error, warn, info, debug or trace, or per module `info,walferry_engine=debug`"
        ))
    };
    // The engine of the register tells of each of its votes; what matters of them the node says itself.
    let quiet = if filter.contains("openraft") { String::new() } else { ",openraft=off".to_owned() };
    let parsed = EnvFilter::builder().parse(format!("{filter}{quiet}")).map_err(|error| wrong(&error))?;
    let registry = tracing_subscriber::registry().with(parsed);
    let started = match journal() {
        Some(journal) => registry.with(journal).try_init(),
        None => {
            let colors = std::io::stderr().is_terminal();
            registry.with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(colors)).try_init()
        }
    };
    started.map_err(|error| Failure::failed(format_args!("cannot start logging: {error}")))
}

/// The journal, if stderr is connected to it: `JOURNAL_STREAM` then names stderr's device and inode. The variable alone
/// is inherited by children whose stderr goes elsewhere.
fn journal() -> Option<tracing_journald::Layer> {
    let stream = std::env::var("JOURNAL_STREAM").ok()?;
    let (device, inode) = stream.split_once(':')?;
    let stderr = nix::sys::stat::fstat(std::io::stderr().as_fd()).ok()?;
    if (device.parse(), inode.parse()) != (Ok(stderr.st_dev), Ok(stderr.st_ino)) {
        return None;
    }
    Some(tracing_journald::layer().ok()?.with_syslog_identifier("walferry".to_owned()))
}
