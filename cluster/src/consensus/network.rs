//! openraft's messages on their way to other members, over whatever carries them.
//!
//! openraft gives an answer to changes one of its heartbeat intervals, then it drops the question and asks again. Where the way
//! there and back takes longer than that, no answer would ever count. So the question stays under way here, and its answer
//! is the answer to the same question asked again.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use openraft::BasicNode;
use openraft::error::{InstallSnapshotError, NetworkError, RPCError, RaftError, RemoteError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse, VoteRequest,
    VoteResponse,
};
use openraft::{LogId, Vote};

use super::types::{Rpc, RpcReply, Types};
use crate::register::MemberId;

/// A member that was not reached is tried again after this.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// Of the time that openraft waits for an answer: how long a question stays under way.
const UNDER_WAY_TIMES: u32 = 8;

/// The answer of a carrier, when it comes.
pub type Carried = Pin<Box<dyn Future<Output = io::Result<RpcReply>> + Send>>;

/// Brings messages to other members. Sockets in a node, queues in a test.
pub trait Carrier: Send + Sync {
    /// Asks `to`, which listens at `peer`. An error: it was not reached, or did not answer within `timeout`.
    fn carry(&self, to: MemberId, peer: &str, rpc: Rpc, timeout: Duration) -> Carried;
}

pub(super) struct Network {
    carrier: Arc<dyn Carrier>,
}

impl Network {
    pub(super) fn new(carrier: Arc<dyn Carrier>) -> Network {
        Network { carrier }
    }
}

pub(super) struct Peer {
    carrier: Arc<dyn Carrier>,
    id: MemberId,
    address: String,
    /// Never locked: the lock says only that it is used by one at a time.
    under_way: Mutex<Option<UnderWay>>,
}

/// Changes that were sent, and whose answer is still awaited.
struct UnderWay {
    vote: Vote<u64>,
    previous: Option<LogId<u64>>,
    last: LogId<u64>,
    carried: Carried,
}

impl UnderWay {
    /// True when the answer says something about this request too.
    fn answers(&self, request: &AppendEntriesRequest<Types>) -> bool {
        self.vote == request.vote
            && self.previous == request.prev_log_id
            && request.entries.iter().any(|entry| entry.log_id == self.last)
    }
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        let (carrier, address) = (Arc::clone(&self.carrier), node.addr.clone());
        Peer { carrier, id: MemberId(target), address, under_way: Mutex::new(None) }
    }
}

type Failed<E> = RPCError<u64, BasicNode, RaftError<u64, E>>;

impl Peer {
    async fn ask<E: std::error::Error>(&self, rpc: Rpc, option: &RPCOption) -> Result<RpcReply, Failed<E>> {
        let carried = self.carrier.carry(self.id, &self.address, rpc, option.hard_ttl()).await;
        carried.map_err(|error| RPCError::Unreachable(Unreachable::new(&error)))
    }

    fn failed<E: std::error::Error>(&self, error: RaftError<u64, E>) -> Failed<E> {
        RPCError::RemoteError(RemoteError::new(self.id.0, error))
    }
}

fn misfit<E: std::error::Error>() -> Failed<E> {
    let error = io::Error::new(io::ErrorKind::InvalidData, "the answer is not to what was asked");
    RPCError::Network(NetworkError::new(&error))
}

impl RaftNetwork<Types> for Peer {
    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, Failed<openraft::error::Infallible>> {
        let Some(last) = request.entries.last().map(|entry| entry.log_id) else {
            // A heartbeat: that it arrives is all that matters.
            return match self.ask(Rpc::Append(request), &option).await? {
                RpcReply::Append(reply) => reply.map_err(|error| self.failed(error)),
                _ => Err(misfit()),
            };
        };
        let (vote, previous) = (request.vote, request.prev_log_id);
        let under_way = self.under_way.get_mut().expect("never locked");
        if !under_way.as_ref().is_some_and(|earlier| earlier.answers(&request)) {
            let timeout = option.hard_ttl() * UNDER_WAY_TIMES;
            let carried = self.carrier.carry(self.id, &self.address, Rpc::Append(request), timeout);
            *under_way = Some(UnderWay { vote, previous, last, carried });
        }
        let asked = under_way.as_mut().expect("just set");
        // openraft may drop this future here; what was asked stays where it is.
        let (answer, reached) = (asked.carried.as_mut().await, asked.last);
        *under_way = None;
        match answer.map_err(|error| RPCError::Unreachable(Unreachable::new(&error)))? {
            RpcReply::Append(Ok(AppendEntriesResponse::Success)) if reached != last => {
                Ok(AppendEntriesResponse::PartialSuccess(Some(reached)))
            }
            RpcReply::Append(reply) => reply.map_err(|error| self.failed(error)),
            _ => Err(misfit()),
        }
    }

    async fn install_snapshot(
        &mut self,
        request: InstallSnapshotRequest<Types>,
        option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, Failed<InstallSnapshotError>> {
        match self.ask(Rpc::Snapshot(request), &option).await? {
            RpcReply::Snapshot(reply) => reply.map_err(|error| self.failed(error)),
            _ => Err(misfit()),
        }
    }

    async fn vote(
        &mut self,
        request: VoteRequest<u64>,
        option: RPCOption,
    ) -> Result<VoteResponse<u64>, Failed<openraft::error::Infallible>> {
        match self.ask(Rpc::Vote(request), &option).await? {
            RpcReply::Vote(reply) => reply.map_err(|error| self.failed(error)),
            _ => Err(misfit()),
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(RETRY_PAUSE))
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use openraft::{CommittedLeaderId, Entry, EntryPayload};
    use tokio::sync::oneshot;

    use super::*;

    /// Keeps every question; the test answers.
    #[derive(Default)]
    struct Asked(Mutex<Vec<oneshot::Sender<RpcReply>>>);

    impl Asked {
        fn count(&self) -> usize {
            self.0.lock().expect("one thread").len()
        }

        fn answer(&self) {
            let last = self.0.lock().expect("one thread").pop().expect("a question");
            assert!(last.send(RpcReply::Append(Ok(AppendEntriesResponse::Success))).is_ok(), "it is still awaited");
        }
    }

    impl Carrier for Asked {
        fn carry(&self, _: MemberId, _: &str, _: Rpc, _: Duration) -> Carried {
            let (sender, answer) = oneshot::channel();
            self.0.lock().expect("one thread").push(sender);
            Box::pin(async { answer.await.map_err(io::Error::other) })
        }
    }

    fn id(index: u64) -> LogId<u64> {
        LogId::new(CommittedLeaderId::new(3, 1), index)
    }

    fn request(term: u64, entries: u64) -> AppendEntriesRequest<Types> {
        let entry = |index| Entry { log_id: id(index), payload: EntryPayload::Blank };
        AppendEntriesRequest {
            vote: Vote::new_committed(term, 1),
            prev_log_id: Some(id(7)),
            entries: (8..8 + entries).map(entry).collect(),
            leader_commit: None,
        }
    }

    /// As openraft does it when its patience is at an end: looks once and drops the question.
    fn look(peer: &mut Peer, request: AppendEntriesRequest<Types>) -> Option<AppendEntriesResponse<u64>> {
        let mut asked = std::pin::pin!(peer.append_entries(request, RPCOption::new(Duration::from_millis(1))));
        match asked.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(answer) => Some(answer.expect("an answer")),
            Poll::Pending => None,
        }
    }

    #[test]
    fn late_answer_counts_when_the_same_is_asked_again() {
        let asked = Arc::new(Asked::default());
        let (carrier, address) = (Arc::<Asked>::clone(&asked), "h:1".to_owned());
        let mut peer = Peer { carrier, id: MemberId(2), address, under_way: Mutex::new(None) };
        assert_eq!(look(&mut peer, request(3, 1)), None);
        assert_eq!(look(&mut peer, request(3, 1)), None);
        assert_eq!(look(&mut peer, request(3, 2)), None);
        assert_eq!(asked.count(), 1, "the same question is not asked twice");
        asked.answer();
        let partly = AppendEntriesResponse::PartialSuccess(Some(id(8)));
        assert_eq!(look(&mut peer, request(3, 2)), Some(partly), "there is more now than was asked then");
        assert_eq!(look(&mut peer, request(3, 2)), None);
        asked.answer();
        assert_eq!(look(&mut peer, request(3, 2)), Some(AppendEntriesResponse::Success));
        assert_eq!(look(&mut peer, request(3, 2)), None);
        assert_eq!(look(&mut peer, request(4, 2)), None);
        assert_eq!(asked.count(), 2, "another controller's changes are another question");
        assert_eq!(look(&mut peer, request(4, 0)), None);
        assert_eq!(asked.count(), 3, "a heartbeat waits for nothing");
    }
}
