//! `walferry switchover`: another leader, without any loss. One command over RESP; the cluster does the rest.

use clap::Args;
use walferry_cluster::MemberName;

use crate::client::{Client, Url};
use crate::failure::{Failure, say};

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry switchover
  walferry switchover --to b --url redis://10.0.1.12:6400

Any member takes the command. The leader takes no writes until the next one has everything, then steps down; it
goes on as a replica by itself. No commit is lost at any level.

Exit codes: 0 it leads; 1 no member answers or the cluster refused, with the reason; 2 wrong usage.";

/// Flags of `walferry switchover`.
#[derive(Debug, Args)]
pub struct SwitchoverArgs {
    /// Who is to lead [default: a replica that is in sync]
    #[arg(long, value_name = "NAME")]
    to: Option<MemberName>,
    /// Any node of the cluster
    #[arg(long, value_name = "URL", default_value = "redis://127.0.0.1:6400")]
    url: Url,
}

/// Runs `walferry switchover`.
pub fn run(args: &SwitchoverArgs) -> Result<(), Failure> {
    let mut client = Client::connect(&args.url).map_err(Failure::failed)?;
    let to = args.to.as_ref().map(MemberName::to_string);
    let words: Vec<&str> = ["SWITCHOVER"].into_iter().chain(to.iter().flat_map(|to| ["TO", to])).collect();
    let answer = client.call(&words).map_err(Failure::failed)?;
    say(answer.text().unwrap_or_default())
}
