//! `walferry promote`: makes a replica the leader. One command over RESP; the node does the rest.

use clap::Args;

use crate::cli::{Failure, say};
use crate::client::{Client, ClientError, Url};

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry promote --url redis://10.0.1.13:6400
  walferry promote --allow-unclean --url redis://10.0.1.13:6400
  walferry promote --force-new-cluster --url redis://10.0.1.13:6400

The replica begins a new epoch at the end of its log and takes writes. Stop the old leader first: two leaders would
each take writes that the other never sees. The old leader comes back as a replica with --follow; what it wrote and
nobody confirmed is cut from its log.

The members of a cluster (--members) choose their leader by themselves, and choose none rather than lose a commit that
a replica confirmed; `walferry describe` tells whom they wait for. --allow-unclean ends the wait, and tells what may be lost.

When a majority of the members is gone for good, no member can be chosen. --force-new-cluster makes the one at --url a cluster of
its own, with the log that it has, and remembers the others as removed: those that come back are refused, and `walferry join` takes
them in anew. Be sure that they are gone: members that still reach each other would go on without this one.

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
    /// The majority of the members is gone for good: this member goes on alone, as a cluster of its own
    #[arg(long, conflicts_with = "allow_unclean")]
    force_new_cluster: bool,
}

/// Runs `walferry promote`.
pub fn run(args: &PromoteArgs) -> Result<(), Failure> {
    let mut client = Client::connect(&args.url).map_err(Failure::failed)?;
    let force = [(args.allow_unclean, "UNCLEAN"), (args.force_new_cluster, "FORCE-NEW-CLUSTER")];
    if let Some((_, word)) = force.into_iter().find(|(given, _)| *given) {
        let answer = client.call(&["PROMOTE", word]).map_err(Failure::failed)?;
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
