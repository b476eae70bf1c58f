//! `walferry fsync`: pg_test_fsync's job for the disk of a data directory. The engine measures; this prints.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use walferry_engine::probe::{self, ProbeConfig};

use crate::failure::{Failure, say};

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry fsync --data /var/lib/walferry/a
  walferry fsync --data . --seconds 60

Writes to a scratch file in the directory, by method, size and number of writes in flight (depth), through the same
ring that the log writes through; removes it afterwards. On a busy disk the figures are those of a busy disk.

Exit codes: 0 measured; 1 the directory cannot be written, or there is no io_uring; 2 wrong usage.";

/// The shortest measurement that says something: 75 combinations share it.
const SECONDS_MIN: u64 = 3;
const SECONDS_MAX: u64 = 3_600;

/// Flags of `walferry fsync`.
#[derive(Debug, Args)]
pub struct FsyncArgs {
    /// A directory on the disk to measure
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// How long all trials together may take
    #[arg(long, value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u64).range(SECONDS_MIN..=SECONDS_MAX))]
    seconds: u64,
}

/// Runs `walferry fsync`.
pub fn run(args: &FsyncArgs) -> Result<(), Failure> {
    if !args.data.is_dir() {
        return Err(Failure::failed(format_args!("--data {}: no such directory", args.data.display())));
    }
    say(format_args!(
        "durable writes in {}, {} seconds for all trials (O_DIRECT unless buffered)",
        args.data.display(),
        args.seconds
    ))?;
    let config = ProbeConfig::full(Duration::from_secs(args.seconds));
    let report = probe::run(&args.data, &config).map_err(Failure::failed)?;
    say(format_args!("\n{report}"))
}
