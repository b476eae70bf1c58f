//! `walferry join` and `walferry remove`: who belongs to a cluster, changed while it runs. One command over RESP each; the leader
//! does the rest. `join` then watches the node catch up, by what `DESCRIBE` tells.

use std::time::{Duration, Instant};

use clap::Args;
use serde_json::Value;
use walferry_cluster::MemberName;
use walferry_cluster::agent::FORMING_TEXT;

use crate::client::{Client, Url};
use crate::failure::{Failure, say};
use walferry_node::units::HostPort;

/// Examples for the help text.
pub const JOIN_EXAMPLES: &str = "\
Examples:
  walferry start --data d --name d --listen 10.0.1.14:6400 --peer-listen 10.0.1.14:6401 --peer-secret peer.secret \\
      --members a=10.0.1.11:6401,b=10.0.1.12:6401,c=10.0.1.13:6401,d=10.0.1.14:6401 &
  walferry join --name d --url redis://10.0.1.11:6400
  walferry join --name w --peer 10.0.2.20:6401 --url redis://10.0.1.11:6400

Start the node first, or a witness; --members names it and at least one member. Any member takes the command. The node's
confirmations count once it has caught up, and a sync policy that follows the members then asks for a majority of them.

Exit codes: 0 it is a member, and has caught up unless --no-wait; 1 the cluster refused, with the reason; 2 wrong usage.";

/// Examples for the help text.
pub const REMOVE_EXAMPLES: &str = "\
Examples:
  walferry remove --name b --url redis://10.0.1.11:6400

Any member takes the command. First the members that stay confirm what only the leaving one may have, so that nothing is
missed without it. A removed member that still runs learns of it, and waits for `walferry join`; its data stays where it is.
Of a leader without --members it drops the slot of a replica that does not come back, as `walferry slot drop` does.

Exit codes: 0 it is removed; 1 the cluster refused or gave up, with the reason; 2 wrong usage.";

/// The node bounds its own time; this is later.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(75);
/// A node that is just starting is asked again for so long.
const BEGIN_TIME_MAX: Duration = Duration::from_secs(10);
/// Between two looks at a node that catches up, or is starting.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// While it catches up nobody may have answered for so many looks in a row.
const LOOKS_FAILED_MAX: usize = 60;

/// Flags of `walferry join`.
#[derive(Debug, Args)]
pub struct JoinArgs {
    /// The node that is to be a member
    #[arg(long, value_name = "NAME")]
    name: MemberName,
    /// Where members reach it [default: its address in its own --members]
    #[arg(long, value_name = "HOST:PORT")]
    peer: Option<HostPort>,
    /// Any member of the cluster
    #[arg(long, value_name = "URL", default_value = "redis://127.0.0.1:6400")]
    url: Url,
    /// Do not wait until it has caught up
    #[arg(long)]
    no_wait: bool,
}

/// Flags of `walferry remove`.
#[derive(Debug, Args)]
pub struct RemoveArgs {
    /// The member that is to go
    #[arg(long, value_name = "NAME")]
    name: MemberName,
    /// Any member of the cluster
    #[arg(long, value_name = "URL", default_value = "redis://127.0.0.1:6400")]
    url: Url,
}

fn command(url: &Url, words: &[&str]) -> Result<(), Failure> {
    let mut client = Client::connect(url).map_err(Failure::failed)?;
    client.set_answer_time_max(ANSWER_TIME_MAX).map_err(Failure::failed)?;
    let answer = client.call(words).map_err(Failure::failed)?;
    say(answer.text().unwrap_or_default())
}

/// A node that was started a moment ago does not listen yet, or has no leader yet.
fn is_beginning(text: &str) -> bool {
    text.contains(FORMING_TEXT) || text.contains("Connection refused")
}

/// Runs `walferry join`.
pub fn join(args: &JoinArgs) -> Result<(), Failure> {
    let peer = args.peer.as_ref().map(HostPort::to_string);
    let words: Vec<&str> =
        ["JOIN", args.name.as_str()].into_iter().chain(peer.iter().flat_map(|peer| ["PEER", peer])).collect();
    let until = Instant::now() + BEGIN_TIME_MAX;
    loop {
        match command(&args.url, &words) {
            Err(Failure::Failed(text)) if is_beginning(&text) && Instant::now() < until => {
                std::thread::sleep(LOOK_INTERVAL);
            }
            outcome => break outcome?,
        }
    }
    if args.no_wait { Ok(()) } else { watch(args) }
}

/// Tells how the node catches up, until it counts.
fn watch(args: &JoinArgs) -> Result<(), Failure> {
    let (mut said, mut failed) = (String::new(), 0);
    loop {
        let (member, policy) = match crate::describe::ask_leader(&args.url) {
            Ok(told) => {
                failed = 0;
                let mut members = told["members"].as_array().into_iter().flatten();
                let member = members.find(|member| member["name"] == args.name.as_str());
                (member.cloned(), told["policy"].clone())
            }
            Err(error) if failed == LOOKS_FAILED_MAX => return Err(error),
            // A leader may be replaced meanwhile.
            Err(_) => {
                failed += 1;
                std::thread::sleep(LOOK_INTERVAL);
                continue;
            }
        };
        let Some(member) = member else {
            return Err(Failure::failed(format_args!("{} is no member any more", args.name)));
        };
        if member["kind"] == "witness" {
            return Ok(());
        }
        if member["log_status"] == "complete" {
            let policy = policy.as_str().unwrap_or_default();
            return say(format_args!(
                "{} has caught up and counts; commits at remote levels wait for {policy}",
                args.name
            ));
        }
        let news = progress(&member);
        if news != said {
            say(format_args!("{}: {news}", args.name))?;
            said = news;
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

fn progress(member: &Value) -> String {
    match (member["state"].as_str(), member["lag_bytes"].as_u64()) {
        (Some(state), Some(lag)) => format!("{state}, {lag} bytes to go"),
        _ => "not connected to the leader yet".to_owned(),
    }
}

/// Runs `walferry remove`.
pub fn remove(args: &RemoveArgs) -> Result<(), Failure> {
    command(&args.url, &["REMOVE", args.name.as_str()])
}
