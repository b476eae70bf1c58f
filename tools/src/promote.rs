//! `walferry promote`: makes a replica the leader. One command over RESP; the node does the rest. Or, for a member that does not
//! run and whose cluster has lost its majority, a change of its data directory.

use std::path::{Path, PathBuf};

use clap::Args;
use rand::RngExt;
use walferry_cluster::MemberName;
use walferry_cluster::consensus::{RegisterStore, register_path};
use walferry_cluster::register::MemberId;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::lock::DirLock;
use walferry_engine::lsn::Lsn;
use walferry_engine::meta::Meta;
use walferry_engine::watermark::{KnownWatermark, Watermark};

use crate::client::{Client, ClientError, Url};
use crate::failure::{Failure, say};
use walferry_node::role::Role;

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry promote --url redis://10.0.1.13:6400
  walferry promote --allow-unclean --url redis://10.0.1.13:6400
  walferry promote --force-new-cluster --url redis://10.0.1.13:6400
  walferry promote --force-new-cluster --data /var/lib/walferry/a      and then start the node as before

The replica begins a new epoch at the end of its log and takes writes. Stop the old leader first: two leaders would
each take writes that the other never sees. The old leader comes back as a replica with --follow; what it wrote and
nobody confirmed is cut from its log.

The members of a cluster (--members) choose their leader by themselves, and choose none rather than lose a commit that
a replica confirmed; `walferry describe` tells whom they wait for. --allow-unclean ends the wait, and tells what may be lost.

When a majority of the members is gone for good, no member can be chosen. --force-new-cluster makes the one at --url, or the
stopped one whose directory is --data, a cluster of its own, with the log that it has, and remembers the others as removed: those
that come back are refused, and `walferry join` takes them in anew. Commits that only the others held are lost, so choose the
survivor whose log reaches furthest. Be sure that they are gone: members that still reach each other would go on without this one.

Exit codes: 0 it leads; 1 it cannot be reached or refused, with the reason; 2 wrong usage.";

/// Flags of `walferry promote`.
#[derive(Debug, Args)]
pub struct PromoteArgs {
    /// The replica that is to lead
    #[arg(long, value_name = "URL", required_unless_present = "data")]
    url: Option<Url>,
    /// In a cluster that waits for a leader: take the best member that is there, and lose what only others have
    #[arg(long)]
    allow_unclean: bool,
    /// The majority of the members is gone for good: this member goes on alone, as a cluster of its own
    #[arg(long, conflicts_with = "allow_unclean")]
    force_new_cluster: bool,
    /// With --force-new-cluster: the data directory of a member that does not run
    #[arg(long, value_name = "DIR", requires = "force_new_cluster", conflicts_with = "url")]
    data: Option<PathBuf>,
}

/// Runs `walferry promote`.
pub fn run(args: &PromoteArgs) -> Result<(), Failure> {
    if let Some(data) = &args.data {
        return say(force_stopped(data)?);
    }
    let url = args.url.as_ref().ok_or_else(|| Failure::Usage("give --url".to_owned()))?;
    let mut client = Client::connect(url).map_err(Failure::failed)?;
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

/// Makes the stopped member in `data` a cluster of its own, durably; what its operator is told.
fn force_stopped(data: &Path) -> Result<String, Failure> {
    let refused = |text: &dyn std::fmt::Display| Failure::failed(format_args!("--data {}: {text}", data.display()));
    match Role::load(data).map_err(Failure::failed)? {
        Some(Role::Member) if register_path(data).exists() => {}
        Some(Role::Witness) => return Err(refused(&"a witness has no log to go on with")),
        _ => return Err(refused(&"no member of a cluster is here")),
    }
    // A running member is told by --url: it has the directory's lock.
    let _lock =
        DirLock::take(data).map_err(|error| refused(&format_args!("{error}; give --url to a running member")))?;
    let meta = Meta::load(data).map_err(|error| refused(&error))?.ok_or_else(|| refused(&"it has no log"))?;
    let name: MemberName = meta.name.parse().map_err(|error| refused(&error))?;
    let id = MemberId(rand::rng().random());
    // A copy of a directory is as good as another survivor: the operator says that there is none that is newer.
    let store = RegisterStore::open(data, id, None).map_err(|error| refused(&error))?;
    let state = store.state();
    if !state.knows(&name, store.identity().id) {
        return Err(refused(&format_args!("{name} is no member: it knows of no cluster that it could go on with")));
    }
    if state.members.len() == 1 {
        return Err(refused(&format_args!("{name} is the only member of its cluster: start it")));
    }
    let history = EpochHistory::load(data).map_err(|error| refused(&error))?;
    let flushed = match Watermark::load(data).map_err(|error| refused(&error))? {
        KnownWatermark::As(watermark) => watermark.bound(&history),
        KnownWatermark::Never | KnownWatermark::Damaged => Lsn::ZERO,
    };
    let mut forced = state.forced(&name);
    let text = state.forced_text(&name, &forced);
    forced.begin_alone(&name, id);
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime.block_on(store.begin_alone(id, forced))?;
    Ok(format!(
        "{text}: this member's log is durable up to {flushed} at least, its newest epoch is {}. Start it with the flags that it had",
        history.last_epoch()
    ))
}
