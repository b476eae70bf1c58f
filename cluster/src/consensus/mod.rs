//! The register held by openraft: every voter keeps its vote and its log of changes in a small database of its own (`store`),
//! and openraft replicates them. The only place that knows openraft. What carries its messages comes in as [`Carrier`]; what
//! decides about changes is `failover`, which knows nothing of this.

mod guard;
mod network;
mod rows;
mod storage;
mod store;
pub(crate) mod types;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use openraft::error::{ClientWriteError, RaftError};
use openraft::{BasicNode, ChangeMembers, Config, Raft, SnapshotPolicy};
use tokio::sync::watch;

use crate::agent::types::RegisterView;
use crate::member::{MemberName, Proved};
use crate::register::{Change, ClusterState, MemberId, Outcome};

pub use network::Carrier;
pub use rows::Identity;
pub use store::RegisterStore;
use types::REGISTER_BYTES_MAX;
pub use types::{REGISTER_FILE, REGISTER_FILES, RegisterError, Rpc, RpcReply, Types, register_path};

fn engine(error: RaftError<u64, ClientWriteError<u64, BasicNode>>) -> RegisterError {
    RegisterError::Engine(error.to_string())
}

/// After so many changes the log of changes is folded into the state.
const CHANGES_PER_SNAPSHOT: u64 = 64;

/// A term, and the index of the last change in the log when it began here.
type Since = (u64, Option<u64>);

/// This member's part of the register.
#[derive(Clone)]
pub struct Register {
    me: MemberId,
    raft: Raft<Types>,
    state: watch::Receiver<ClusterState>,
    /// The term in which this member controls, and the end of its log when that began.
    since: Arc<Mutex<Option<Since>>>,
}

impl Register {
    /// Opens this member's part with the store in `dir`. `election_timeout` is the one after which a silent *leader of the log*
    /// is replaced: by then the register has to have a controller, so its own timeouts are parts of that one.
    pub async fn open(
        store: RegisterStore,
        election_timeout: Duration,
        carrier: Arc<dyn Carrier>,
    ) -> Result<Register, RegisterError> {
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).max(1);
        let config = Config {
            cluster_name: "walferry".to_owned(),
            heartbeat_interval: ms(election_timeout / 8),
            // openraft waits for its lease (the longest timeout) and then for a random one between these two: from 0.7 to 0.9.
            election_timeout_min: ms(election_timeout / 4),
            election_timeout_max: ms(election_timeout * 9 / 20),
            install_snapshot_timeout: ms(election_timeout * 4),
            snapshot_policy: SnapshotPolicy::LogsSinceLast(CHANGES_PER_SNAPSHOT),
            max_in_snapshot_log_to_keep: CHANGES_PER_SNAPSHOT,
            ..Config::default()
        };
        let config = config.validate().map_err(|error| RegisterError::Engine(error.to_string()))?;
        let (me, state) = (store.identity().id, store.watch());
        let network = network::Network::new(carrier);
        let raft = Raft::new(me.0, Arc::new(config), network, store.clone(), store.machine()).await;
        let raft = raft.map_err(|error| RegisterError::Engine(error.to_string()))?;
        Ok(Register { me, raft, state, since: Arc::default() })
    }

    /// What the register holds, as far as this member knows.
    pub fn state(&self) -> ClusterState {
        self.state.borrow().clone()
    }

    /// Tells of every change.
    pub fn watch(&self) -> watch::Receiver<ClusterState> {
        self.state.clone()
    }

    /// Makes a new register of these voters, empty. Only once for a cluster, by one member.
    pub async fn form(&self, voters: BTreeMap<MemberId, String>) -> Result<(), RegisterError> {
        let nodes: BTreeMap<u64, BasicNode> =
            voters.into_iter().map(|(id, peer)| (id.0, BasicNode::new(peer))).collect();
        self.raft.initialize(nodes).await.map_err(|error| RegisterError::Engine(error.to_string()))
    }

    /// True once this member belongs to a register. Asks the engine, which tells its metrics anew for each question.
    pub async fn is_formed(&self) -> bool {
        self.raft.is_initialized().await.unwrap_or(false)
    }

    /// The same by the engine's metrics, for whoever looks each time that they were told.
    pub fn seems_formed(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        metrics.last_log_index.is_some() || metrics.vote != openraft::Vote::default()
    }

    /// Who may change the register, as far as this member knows.
    pub fn controller(&self) -> Option<MemberId> {
        self.raft.metrics().borrow().current_leader.map(MemberId)
    }

    /// True when this member may, and knows all that was changed before: it has applied what its log held when it came to
    /// control, at its election or, since a controller stays one over a restart, at the start of the process.
    pub fn controls(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        if metrics.current_leader != Some(self.me.0) {
            return false;
        }
        let mut since = self.since.lock().expect("nobody panics with it");
        if since.is_none_or(|(term, _)| term != metrics.current_term) {
            *since = Some((metrics.current_term, metrics.last_log_index));
        }
        let applied = metrics.last_applied.map(|applied| applied.index);
        since.is_some_and(|(_, index)| applied >= index)
    }

    /// Tells when the controller changes.
    pub fn metrics(&self) -> watch::Receiver<openraft::RaftMetrics<u64, BasicNode>> {
        self.raft.metrics()
    }

    /// Changes the register. An error leaves it open whether the change was taken.
    pub async fn change(&self, change: Change, timeout: Duration) -> Result<Outcome, RegisterError> {
        match tokio::time::timeout(timeout, self.raft.client_write(change)).await {
            Err(_) => Err(RegisterError::Timeout(timeout)),
            Ok(Ok(written)) => Ok(written.data),
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward)))) => {
                Err(RegisterError::NotController(forward.leader_id.map(MemberId)))
            }
            Ok(Err(error)) => Err(RegisterError::Engine(error.to_string())),
        }
    }

    /// Lets the register be told to a node that is no voter, and waits until it has it; the controller only.
    pub async fn admit(&self, id: MemberId, peer: String, timeout: Duration) -> Result<(), RegisterError> {
        let admitted = self.raft.add_learner(id.0, BasicNode::new(peer), true);
        match tokio::time::timeout(timeout, admitted).await {
            Err(_) => Err(RegisterError::Timeout(timeout)),
            Ok(admitted) => admitted.map(drop).map_err(engine),
        }
    }

    /// Changes who votes about the register; the controller only. Those who are to vote have the register before.
    pub async fn set_voters(&self, voters: &BTreeSet<MemberId>, timeout: Duration) -> Result<(), RegisterError> {
        let voters = voters.iter().map(|id| id.0).collect();
        self.change_membership(ChangeMembers::ReplaceAllVoters(voters), true, timeout).await
    }

    /// Tells the register to these no more; the controller only.
    pub async fn forget(&self, ids: &BTreeSet<MemberId>, timeout: Duration) -> Result<(), RegisterError> {
        let ids = ids.iter().map(|id| id.0).collect();
        self.change_membership(ChangeMembers::RemoveNodes(ids), false, timeout).await
    }

    /// `retain`: those that vote no more are told the register still.
    async fn change_membership(
        &self,
        change: ChangeMembers<u64, BasicNode>,
        retain: bool,
        timeout: Duration,
    ) -> Result<(), RegisterError> {
        match tokio::time::timeout(timeout, self.raft.change_membership(change, retain)).await {
            Err(_) => Err(RegisterError::Timeout(timeout)),
            Ok(changed) => changed.map(drop).map_err(engine),
        }
    }

    /// What this member knows of the register and of its engine; `formed` is asked for separately.
    pub fn view(&self, formed: bool) -> RegisterView {
        let metrics = self.raft.metrics();
        let (voters, told, joint) = {
            let metrics = metrics.borrow();
            let membership = metrics.membership_config.membership();
            let told = membership.nodes().map(|(id, _)| MemberId(*id)).collect();
            (membership.voter_ids().map(MemberId).collect(), told, membership.get_joint_config().len() > 1)
        };
        let (controller, controls) = (self.controller(), self.controls());
        RegisterView { state: self.state(), formed, controller, controls, voters, told, joint }
    }

    /// Answers a message of another member, which proved to be `proved`. An incarnation that was removed gets no vote, and by asking for one
    /// disturbs nobody. An incarnation that this member does not know is taken for one that joined while it was away.
    pub async fn answer(&self, rpc: Rpc, proved: Option<&Proved>) -> Result<RpcReply, RegisterError> {
        check_message(&self.state.borrow(), &rpc, proved)?;
        Ok(match rpc {
            Rpc::Append(request) => RpcReply::Append(self.raft.append_entries(request).await),
            Rpc::Vote(request) => RpcReply::Vote(self.raft.vote(request).await),
            Rpc::Snapshot(request) => RpcReply::Snapshot(self.raft.install_snapshot(request).await),
        })
    }

    /// Whether this member may control, or try to. One that reaches no majority must not: it would come back with a vote that
    /// topples a controller that everybody else hears (Raft's PreVote). One that no majority reaches must not: its heartbeats
    /// would keep the others from a controller that they can ask.
    pub fn may_elect(&self, may: bool) {
        let config = self.raft.runtime_config();
        config.elect(may);
        config.heartbeat(may);
    }

    /// Ends this member's part.
    pub async fn close(&self) -> io::Result<()> {
        self.raft.shutdown().await.map_err(io::Error::other)
    }
}

/// The name of the member with this id, as the register has it.
pub fn name_of(state: &ClusterState, id: MemberId) -> Option<&MemberName> {
    state.members.iter().find(|(_, member)| member.id == id).map(|(name, _)| name)
}

/// Whether a message is its sender's own and within bounds.
fn check_message(state: &ClusterState, rpc: &Rpc, proved: Option<&Proved>) -> Result<(), RegisterError> {
    let sender = match rpc {
        Rpc::Append(request) => &request.vote,
        Rpc::Vote(request) => &request.vote,
        Rpc::Snapshot(request) => &request.vote,
    };
    let sender = MemberId(sender.leader_id.node_id);
    if let Rpc::Vote(_) = rpc
        && let Some(version) = state.removed_at(sender)
    {
        return Err(RegisterError::Removed { id: sender, version });
    }
    if let (Some(name), Some(proved)) = (name_of(state, sender), proved) {
        proved.check(name)?;
    }
    if let Rpc::Snapshot(request) = rpc
        && request.offset.saturating_add(request.data.len() as u64) > REGISTER_BYTES_MAX
    {
        return Err(RegisterError::Large { offset: request.offset, bytes: request.data.len() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use openraft::Vote;
    use openraft::raft::{InstallSnapshotRequest, VoteRequest};

    use super::*;
    use crate::testing::formed;

    #[test]
    fn message_of_another_or_beyond_bounds_is_refused() {
        let state = formed("a b c", "");
        let (of_a, b) = (state.members[&"a".parse().expect("a name")].id, Proved::of(["b"]));
        let vote = |id: MemberId| Rpc::Vote(VoteRequest::new(Vote::new(9, id.0), None));
        assert!(check_message(&state, &vote(of_a), Some(&Proved::of(["a"]))).is_ok());
        assert!(check_message(&state, &vote(of_a), None).is_ok(), "where nothing is proved");
        let error = check_message(&state, &vote(of_a), Some(&b)).expect_err("b speaks for a").to_string();
        assert!(error.contains("b says that it is a"), "{error}");
        let part = |offset| {
            let (vote, data, done) = (Vote::new(9, of_a.0), vec![0; 16], true);
            Rpc::Snapshot(InstallSnapshotRequest { vote, meta: Default::default(), offset, data, done })
        };
        assert!(check_message(&state, &part(0), None).is_ok());
        for offset in [REGISTER_BYTES_MAX - 15, 35 << 40, u64::MAX] {
            assert!(matches!(check_message(&state, &part(offset), None), Err(RegisterError::Large { .. })), "{offset}");
        }
    }
}
