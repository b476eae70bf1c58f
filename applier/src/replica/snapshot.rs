//! The snapshot that takes the place of a log which the leader no longer has: when it is fetched, and how the old state gives way.

use std::sync::Arc;
use std::time::Instant;

use walferry_cluster::snapshot::CopyProgress;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::log::Log;
use walferry_engine::lsn::{Epoch, Lsn};

use super::{LinkError, Phase, Replica};
use crate::error::ReplicaError;
use crate::snapshot::fetch::{FetchConfig, Fetching};
use crate::snapshot::incoming::Incoming;
use crate::store::Store;

impl Replica {
    /// How far the snapshot is that is being received, if one is.
    pub fn snapshot(&self) -> Option<&Arc<CopyProgress>> {
        match &self.phase {
            Phase::Fetching(fetching) => Some(fetching.progress()),
            _ => None,
        }
    }

    /// A snapshot is there, and nothing is in flight that would keep the node from putting it in place.
    pub fn has_snapshot(&self, log: &Log) -> bool {
        let quiet = self.is_quiet() && log.idle() && log.flushed() == log.sealed() && log.stopped().is_none();
        matches!(self.phase, Phase::Fetched(_)) && quiet
    }

    /// The last use of the old log: what the snapshot does not contain is kept in `lost/`. Then the snapshot is marked ready: from
    /// here on only `snapshot::install` may touch log and store.
    pub fn give_way_to_snapshot(
        &mut self,
        log: &Log,
        store: &mut Store,
        history: &EpochHistory,
    ) -> Result<(), ReplicaError> {
        let Phase::Fetched(facts) = &self.phase else { unreachable!("`has_snapshot` was asked first") };
        let end = log.sealed();
        let fork = facts.history.fork_with(history, end);
        if fork < end {
            let from = fork.max(log.start());
            let lost = log.put_aside(from, history.epoch_at(Lsn(end.0 - 1)))?;
            tracing::warn!(file = %lost.path.display(), "{lost}");
            self.lost_commits += lost.records;
            if from > fork {
                // A checkpoint that ends later would change the file that is kept, and what it is called after.
                store.finish_checkpoint()?;
                let kept = crate::snapshot::install::keep_store(&self.config.dir, store.durable_position())?;
                tracing::warn!(
                    file = %kept.display(),
                    "commits from {fork} to {from} are lost as well and their log was recycled: the store that held them is kept"
                );
            }
        }
        tracing::info!(snapshot = %facts.snapshot, before = %end, "a snapshot takes the place of log and store");
        Incoming::declare_ready(&self.config.dir)?;
        Ok(())
    }

    /// Fetches a snapshot that holds everything before `floor`.
    pub(super) fn fetch(&mut self, floor: Lsn, log: &Log, history: &EpochHistory, now: Instant) {
        let gives_up = self.gives_up(log, history);
        let config = FetchConfig {
            data: self.config.dir.clone(),
            leader: self.config.leader.clone(),
            cluster_id: self.config.meta.cluster_id,
            name: self.config.name.clone(),
            segment_bytes: self.config.meta.segment_bytes,
            peer_timeout: self.config.peer_timeout,
            epoch_min: self.config.promised.max(if gives_up { Epoch(0) } else { history.last_epoch() }),
            floor,
            keeps: self.keeps(log, history),
            history: history.clone(),
            flushed: log.flushed(),
            suspect: self.suspect,
            links: Arc::clone(&self.config.links),
        };
        self.socket = None;
        match Fetching::start(config, self.waker.clone()) {
            Ok(fetching) => self.phase = Phase::Fetching(fetching),
            Err(error) => self.fail(LinkError::Io(error), now),
        }
    }
}
