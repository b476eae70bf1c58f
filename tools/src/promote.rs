//! `walferry promote`: makes a replica the leader. One command over RESP; the node does the rest.

use clap::Args;

use crate::cli::{Failure, say};
use crate::client::{Client, ClientError, Url};

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry promote --url redis://10.0.1.13:6400

The replica begins a new epoch at the end of its log and takes writes. Stop the old leader first: two leaders would
each take writes that the other never sees. The old leader comes back as a replica with --follow; what it wrote and
nobody confirmed is cut from its log.

Exit codes: 0 it leads; 1 it cannot be reached or refused, with the reason; 2 wrong usage.";

/// Flags of `walferry promote`.
#[derive(Debug, Args)]
pub struct PromoteArgs {
    /// The replica that is to lead
    #[arg(long, value_name = "URL")]
    url: Url,
}

/// Runs `walferry promote`.
pub fn run(args: &PromoteArgs) -> Result<(), Failure> {
    let mut client = Client::connect(&args.url).map_err(Failure::failed)?;
    match client.call(&["PROMOTE"]) {
        Ok(epoch) => {
            let epoch = epoch.text().unwrap_or_default();
            say(format_args!("{} leads, epoch {epoch}", client.address()))
        }
        Err(ClientError::Refused { text, .. }) if text.contains("unknown command") => {
            Err(Failure::failed(format_args!("{} is not a walferry node: {text}", client.address())))
        }
        Err(error) => Err(Failure::failed(error)),
    }
}
