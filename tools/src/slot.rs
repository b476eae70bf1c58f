//! `walferry slot`: the slots that hold a leader's log for its replicas, as PostgreSQL's `pg_replication_slots`, and
//! `pg_drop_replication_slot`. One command over RESP each; the leader does the rest.

use clap::{Args, Subcommand};
use walferry_cluster::MemberName;

use crate::client::{Client, Reply, Url};
use crate::failure::{Failure, say};

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry slot list --url redis://10.0.1.11:6400
  walferry slot drop b --url redis://10.0.1.11:6400

A leader keeps the log that a replica still needs, up to slot_keep_bytes_max, under the name of the replica; then the slot is
lost, and the replica gets a snapshot when it comes back. A replica with a new name takes the place of a lost slot when there
are too many. Drop the slot of a replica that does not come back: nothing is kept for it, and it counts nowhere any more. Ask the
leader. A member of a cluster (--members) is removed with `walferry remove`.

Exit codes: 0 done; 1 the node cannot be reached or refused, with the reason; 2 wrong usage.";

/// Flags of `walferry slot`.
#[derive(Debug, Args)]
pub struct SlotArgs {
    #[command(subcommand)]
    what: Option<What>,
    /// The leader
    #[arg(long, value_name = "URL", default_value = "redis://127.0.0.1:6400", global = true)]
    url: Url,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Show every slot: its state, where its replica is in the log, and the log that it holds back [default]
    List,
    /// Drop the slot of a replica that does not come back
    Drop {
        /// The slot, which has its replica's name
        #[arg(value_name = "NAME")]
        name: MemberName,
    },
}

/// Runs `walferry slot`.
pub fn run(args: &SlotArgs) -> Result<(), Failure> {
    let mut client = Client::connect(&args.url).map_err(Failure::failed)?;
    if let Some(What::Drop { name }) = &args.what {
        let answer = client.call(&["SLOT", "DROP", name.as_str()]).map_err(Failure::failed)?;
        return say(answer.text().unwrap_or_default());
    }
    let slots = client.call(&["SLOT", "LIST"]).map_err(Failure::failed)?;
    if slots.items().is_empty() {
        return say("no slots");
    }
    slots.items().iter().try_for_each(|slot| say(line(slot)))
}

fn line(slot: &Reply) -> String {
    let text = |key| slot.field(key).and_then(Reply::text).unwrap_or_default();
    let number = |key| slot.field(key).and_then(Reply::int).unwrap_or_default();
    let there = if number("connected") == 1 { "connected" } else { "away" };
    let (name, state, restart) = (text("name"), text("state"), text("restart_lsn"));
    format!("{name:<16} {state:<6} {there:<9} at {restart}, holds {} bytes", number("held_bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_is_told_in_a_line() {
        let text = |text: &str| Reply::Text(text.into());
        let mut fields =
            vec![text("name"), text("b"), text("state"), text("active"), text("restart_lsn"), text("0/10")];
        fields.extend([text("held_bytes"), Reply::Int(48), text("connected"), Reply::Int(0)]);
        let told = line(&Reply::Array(fields));
        assert_eq!(told, "b                active away      at 0/10, holds 48 bytes");
    }
}
