//! `walferry promote`: makes a replica the leader. One command over RESP; the node does the rest.

use clap::Args;

use crate::cli::{Failure, say};
use crate::client::{Client, ClientError, Url};

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry promote --url redis://10.0.1.13:6400
  walferry promote --allow-unclean --url redis://10.0.1.13:6400

The replica begins a new epoch at the end of its log and takes writes. Stop the old leader first: two leaders would
each take writes that the other never sees. The old leader comes back as a replica with --follow; what it wrote and
nobody confirmed is cut from its log.

The members of a cluster (--members) choose their leader by themselves, and choose none rather than lose a commit that
a replica confirmed; `walferry describe` tells whom they wait for. --allow-unclean ends the wait, and tells what may be lost.

Exit codes: 0 it leads; 1 it cannot be reached or refused, with the reason; 2 wrong usage.";

/// Flags of `walferry promote`.
#[derive(Debug, Args)]
pub struct PromoteArgs {
    /// The replica that is to lead
    #[arg(long, value_name = "URL")]
    url: Url,
    /// In a cluster that waits for a leader: take the best member that is there, and lose what only others have
    #[arg(long)]
    allow_unclean: bool,
}

/// Runs `walferry promote`.
pub fn run(args: &PromoteArgs) -> Result<(), Failure> {
    let mut client = Client::connect(&args.url).map_err(Failure::failed)?;
    if args.allow_unclean {
        let answer = client.call(&["PROMOTE", "UNCLEAN"]).map_err(Failure::failed)?;
        return say(answer.text().unwrap_or_default());
    }
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
