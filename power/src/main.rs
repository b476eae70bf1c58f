//! `power`: walferry in a machine whose power is cut and whose disk fails. The machine is QEMU's, its disk is this program's, so
//! every order in which a disk may lose, keep or tear what was not flushed can be made from one run.
//!
//! ```text
//! main ─┬─ loss     a run under load, its disk at many moments, recovery on each ── promise (core)
//!       │    └─ bench     where an image is recovered: another guest, or this host
//!       ├─ faults   a disk that fails, fills up, stands still
//!       │    └─ node      scripts that start, verify and read a node
//!       ├─ ktls     two nodes over TLS that the kernel speaks
//!       ├─ machine  boots, asks, cuts ─┬─ kernel, initramfs
//!       │                              └─ disk ── nbd, image (core), trace (core)
//!       └─ guest    what runs inside: agent, writers, readers
//! ```

mod bench;
mod disk;
mod error;
mod faults;
mod guest;
mod initramfs;
mod kernel;
mod ktls;
mod loss;
mod machine;
mod node;
mod promise;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use error::{During, Failure};
use guest::{agent, fill, place, write};

#[derive(Debug, Parser)]
#[command(name = "power", about = "Cut the power of a walferry node, and let its disk fail", after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  power loss                                   ext4 and XFS, 200 cuts each
  power loss --filesystem xfs --cuts 500 --seed 7
  power loss --bus scsi                        a disk that makes single writes durable (FUA)
  power loss --members                         three members in one machine, level remote_flush
  power loss --broken level-off                the checker's own test: must find lost values
  power faults                                 EIO, bad sectors, failed flush, read-only, full disk, 10 s stall
  power ktls                                   leader and replica over kTLS
  power ktls --tests target/debug/deps/tls-0123456789abcdef

Needs qemu-system-x86_64, busybox, mkfs.ext4, mkfs.xfs and, the first time, Debian's kernel by apt-get.

Exit codes: 0 every promise was kept; 1 one was not, or the run failed; 2 wrong usage; 3 the system lacks something, nothing
was tested.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Cut the power at many moments of a run and recover from each
    Loss(loss::LossArgs),
    /// Let the disk fail in every way and see what the node says and keeps
    Faults(faults::FaultsArgs),
    /// Let the guest's kernel speak TLS between two nodes, and compare
    Ktls(ktls::KtlsArgs),
    /// In the guest: do what the host asks
    #[command(hide = true)]
    Agent,
    /// In the guest: write, and tell the host what was acknowledged
    #[command(hide = true)]
    Write(write::WriteArgs),
    /// In the guest: write so much, and print how long it took
    #[command(hide = true)]
    Fill(fill::FillArgs),
    /// In the guest: print what a node says of itself
    #[command(hide = true)]
    Info(fill::InfoArgs),
    /// In the guest: print what a node holds
    #[command(hide = true)]
    Read(write::ReadArgs),
    /// In the guest: print where a byte of a file stands on the disk
    #[command(hide = true)]
    Place(place::PlaceArgs),
    /// In the guest: wait for a file
    #[command(hide = true)]
    Await(write::AwaitArgs),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Loss(args) => loss::run(&args),
        Command::Faults(args) => faults::run(&args),
        Command::Agent => agent::run().during("serve the host"),
        Command::Ktls(args) => ktls::run(&args),
        Command::Fill(args) => fill::fill(&args),
        Command::Info(args) => fill::info(&args),
        Command::Place(args) => place::place(&args),
        Command::Write(args) => write::write(&args),
        Command::Read(args) => write::read(&args),
        Command::Await(args) => write::wait(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Missing(text)) => {
            eprintln!("power: skipped: {text}");
            ExitCode::from(3)
        }
        Err(Failure::Failed(text)) => {
            eprintln!("power: {text}");
            ExitCode::FAILURE
        }
    }
}
