//! The store as openraft uses it: its log of changes, its vote, and the state that the changes make. Called by openraft only; what is
//! durable when is decided by `store`.

use std::fmt::Debug;
use std::io::{self, Cursor};
use std::ops::{Bound, RangeBounds};

use openraft::storage::{LogFlushed, RaftLogStorage, RaftStateMachine};
use openraft::{
    BasicNode, Entry, EntryPayload, ErrorSubject, ErrorVerb, LogId, LogState, RaftLogId, RaftLogReader,
    RaftSnapshotBuilder, Snapshot, SnapshotMeta, StorageError, StoredMembership, Vote,
};

use super::rows::{MACHINE, Machine, PURGED, Row, VOTE, json};
use super::store::RegisterStore;
use super::types::Types;
use crate::register::Outcome;

pub(super) type Raised = StorageError<u64>;

fn raised(subject: ErrorSubject<u64>, verb: ErrorVerb) -> impl FnOnce(io::Error) -> Raised {
    move |error| StorageError::from_io_error(subject, verb, error)
}

impl RaftLogReader<Types> for RegisterStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry<Types>>, Raised> {
        let bounds: (Bound<u64>, Bound<u64>) = (range.start_bound().cloned(), range.end_bound().cloned());
        Ok(self.mirror().log.range(bounds).map(|(_, entry)| entry.clone()).collect())
    }
}

impl RaftLogStorage<Types> for RegisterStore {
    type LogReader = RegisterStore;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, Raised> {
        let mirror = self.mirror();
        let last = mirror.log.values().next_back().map(|entry| *entry.get_log_id());
        Ok(LogState { last_purged_log_id: mirror.purged, last_log_id: last.or(mirror.purged) })
    }

    async fn get_log_reader(&mut self) -> RegisterStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<(), Raised> {
        let vote = *vote;
        let written = self.write(vec![Row::Fact(VOTE, json(&vote))], true, |mirror| mirror.vote = Some(vote)).await;
        written.map_err(raised(ErrorSubject::Vote, ErrorVerb::Write))
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>, Raised> {
        Ok(self.mirror().vote)
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<Types>) -> Result<(), Raised>
    where
        I: IntoIterator<Item = Entry<Types>> + Send,
        I::IntoIter: Send,
    {
        let entries: Vec<Entry<Types>> = entries.into_iter().collect();
        let rows = entries.iter().map(|entry| Row::Entry(entry.log_id.index, json(entry))).collect();
        let written = self
            .write(rows, true, |mirror| {
                mirror.log.extend(entries.into_iter().map(|entry| (entry.log_id.index, entry)));
            })
            .await;
        match written {
            Ok(()) => {
                callback.log_io_completed(Ok(()));
                Ok(())
            }
            Err(error) => Err(raised(ErrorSubject::Logs, ErrorVerb::Write)(error)),
        }
    }

    async fn truncate(&mut self, log_id: LogId<u64>) -> Result<(), Raised> {
        let rows = self.mirror().log.range(log_id.index..).map(|(index, _)| Row::Remove(*index)).collect();
        let written = self.write(rows, true, |mirror| drop(mirror.log.split_off(&log_id.index))).await;
        written.map_err(raised(ErrorSubject::Logs, ErrorVerb::Delete))
    }

    async fn purge(&mut self, log_id: LogId<u64>) -> Result<(), Raised> {
        let mut rows: Vec<Row> =
            self.mirror().log.range(..=log_id.index).map(|(index, _)| Row::Remove(*index)).collect();
        rows.push(Row::Fact(PURGED, json(&log_id)));
        let written = self
            .write(rows, true, |mirror| {
                mirror.log = mirror.log.split_off(&(log_id.index + 1));
                mirror.purged = Some(log_id);
            })
            .await;
        written.map_err(raised(ErrorSubject::Logs, ErrorVerb::Delete))
    }
}

impl RegisterStore {
    pub(super) async fn save_machine(&self, machine: Machine, durable: bool) -> Result<(), Raised> {
        let state = machine.state.clone();
        let written =
            self.write(vec![Row::Fact(MACHINE, json(&machine))], durable, |mirror| mirror.machine = machine).await;
        written.map_err(raised(ErrorSubject::StateMachine, ErrorVerb::Write))?;
        self.publish(state);
        Ok(())
    }

    fn snapshot(&self) -> Snapshot<Types> {
        let machine = self.mirror().machine.clone();
        let index = machine.applied.map_or(0, |applied| applied.index);
        let meta = SnapshotMeta {
            last_log_id: machine.applied,
            last_membership: machine.membership.clone(),
            snapshot_id: format!("{}-{index}", machine.state.version),
        };
        Snapshot { meta, snapshot: Box::new(Cursor::new(json(&machine.state))) }
    }
}

impl RaftSnapshotBuilder<Types> for RegisterStore {
    async fn build_snapshot(&mut self) -> Result<Snapshot<Types>, Raised> {
        // The log is purged up to here next: what stands in its place has to be durable.
        let machine = self.mirror().machine.clone();
        self.save_machine(machine, true).await?;
        Ok(self.snapshot())
    }
}

impl RaftStateMachine<Types> for RegisterStore {
    type SnapshotBuilder = RegisterStore;

    async fn applied_state(&mut self) -> Result<(Option<LogId<u64>>, StoredMembership<u64, BasicNode>), Raised> {
        let mirror = self.mirror();
        Ok((mirror.machine.applied, mirror.machine.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Outcome>, Raised>
    where
        I: IntoIterator<Item = Entry<Types>> + Send,
        I::IntoIter: Send,
    {
        let mut machine = self.mirror().machine.clone();
        let mut outcomes = Vec::new();
        for entry in entries {
            machine.applied = Some(entry.log_id);
            outcomes.push(match entry.payload {
                EntryPayload::Blank => Outcome::Taken,
                EntryPayload::Normal(change) => machine.state.apply(change),
                EntryPayload::Membership(membership) => {
                    machine.membership = StoredMembership::new(Some(entry.log_id), membership);
                    Outcome::Taken
                }
            });
        }
        // The changes are in the log, durably: after a crash they are applied once more.
        self.save_machine(machine, false).await?;
        Ok(outcomes)
    }

    async fn get_snapshot_builder(&mut self) -> RegisterStore {
        self.clone()
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, Raised> {
        Ok(Box::new(Cursor::new(Vec::new())))
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta<u64, BasicNode>,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), Raised> {
        let state = serde_json::from_slice(snapshot.get_ref()).map_err(io::Error::from);
        let state = state.map_err(raised(ErrorSubject::Snapshot(None), ErrorVerb::Read))?;
        let machine = Machine { applied: meta.last_log_id, membership: meta.last_membership.clone(), state };
        self.save_machine(machine, true).await
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<Types>>, Raised> {
        let nothing = self.mirror().machine.applied.is_none();
        Ok((!nothing).then(|| self.snapshot()))
    }
}
