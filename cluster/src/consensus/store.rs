//! What a member keeps of the register on its disk: who it is, what it promised, its vote, its log of changes, and the state
//! that they make. A few kilobytes in one redb file, mirrored in memory; every write is one transaction on a thread that may
//! block, so that heartbeats never wait behind this disk. Opened by the node, used by openraft through its storage traits.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io::{self, Cursor};
use std::ops::{Bound, RangeBounds};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use openraft::storage::{LogFlushed, RaftLogStorage, RaftStateMachine};
use openraft::{
    BasicNode, Entry, EntryPayload, ErrorSubject, ErrorVerb, LogId, LogState, RaftLogId, RaftLogReader,
    RaftSnapshotBuilder, Snapshot, SnapshotMeta, StorageError, StoredMembership, Vote,
};
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use walferry_engine::atomic_create::create_atomically;
use walferry_engine::durable::believe_flush_of;
use walferry_engine::lsn::Epoch;

use super::guard::{FileId, Writes, Written, examine};
use super::types::{RegisterError, Types, register_path};
use crate::member::MemberName;
use crate::register::{ClusterState, MemberId, Outcome};

/// Changes by their index, as JSON.
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
/// Everything else by its name, as JSON.
const FACTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("facts");
const IDENTITY: &str = "identity";
const PROMISED: &str = "promised";
const VOTE: &str = "vote";
const PURGED: &str = "purged";
const MACHINE: &str = "machine";
const REMOVED: &str = "removed";
/// How many durable writes there were, this one included; see `guard`.
const WRITES: &str = "writes";

type Raised = StorageError<u64>;

/// The incarnation of the member that this store belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Made with the store.
    pub id: MemberId,
}

/// The state and how many changes made it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Machine {
    applied: Option<LogId<u64>>,
    membership: StoredMembership<u64, BasicNode>,
    state: ClusterState,
}

#[derive(Debug)]
struct Mirror {
    incarnation: u64,
    identity: Identity,
    /// The version of the register with which an earlier incarnation ceased to be a member, if that is why this one began.
    removed: Option<u64>,
    promised: Epoch,
    vote: Option<Vote<u64>>,
    purged: Option<LogId<u64>>,
    log: BTreeMap<u64, Entry<Types>>,
    machine: Machine,
}

impl Mirror {
    /// What an incarnation begins with.
    fn begin(incarnation: u64, id: MemberId, removed: Option<u64>, promised: Epoch, machine: Machine) -> Mirror {
        let identity = Identity { id };
        Mirror { incarnation, identity, removed, promised, vote: None, purged: None, log: BTreeMap::new(), machine }
    }

    /// What makes the file hold that; `old` are the entries of an incarnation before.
    fn rows<'a>(&self, old: impl Iterator<Item = &'a u64>) -> Vec<Row> {
        let mut rows = vec![Row::Fact(IDENTITY, json(&self.identity)), Row::Fact(PROMISED, json(&self.promised))];
        rows.push(Row::Fact(MACHINE, json(&self.machine)));
        rows.push(self.removed.map_or(Row::Forget(REMOVED), |version| Row::Fact(REMOVED, json(&version))));
        rows.extend([VOTE, PURGED].map(Row::Forget));
        rows.extend(old.map(|index| Row::Remove(*index)));
        rows
    }
}

struct Shared {
    path: PathBuf,
    database: Database,
    file: FileId,
    writes: Writes,
    mirror: Mutex<Mirror>,
    /// Transactions go to the disk in the order in which the mirror changed.
    order: tokio::sync::Mutex<()>,
    state: watch::Sender<ClusterState>,
    /// Why nothing can be written any more.
    failed: watch::Sender<Option<String>>,
}

/// The store; clones are the same store, of the same incarnation.
#[derive(Clone)]
pub struct RegisterStore {
    shared: Arc<Shared>,
    /// Which of the incarnations that this process has had in it; what still works for an earlier one writes nothing any more.
    incarnation: u64,
}

/// One row to be written or removed.
enum Row {
    Fact(&'static str, Vec<u8>),
    Entry(u64, Vec<u8>),
    Remove(u64),
    Forget(&'static str),
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("these values are JSON")
}

impl RegisterStore {
    /// Opens or makes the store in the data directory `dir`; `new_id` becomes the identity of a new one. A copy of a directory has
    /// forgotten what its member promised and confirmed later: it begins anew as well, where `configured` are members that can tell
    /// it what holds now. `None` takes a copy for what it is a copy of.
    pub fn open(
        dir: &Path,
        new_id: MemberId,
        configured: Option<&BTreeMap<MemberName, String>>,
    ) -> Result<RegisterStore, RegisterError> {
        let path = register_path(dir);
        let failed = |text: String| RegisterError::Store { path: path.display().to_string(), text };
        let damaged = |text: String| RegisterError::Damaged { path: path.display().to_string(), text };
        examine(&path).map_err(|error| failed(error.to_string()))?.map_err(damaged)?;
        let (writes, known) = Writes::open(dir).map_err(|error| failed(error.to_string()))?;
        let there = std::fs::metadata(&path).is_ok_and(|facts| facts.len() > 0);
        if let Some(Written { number, .. }) = known.filter(|_| !there) {
            return Err(damaged(format!("nothing is left of it, and {number} writes to it were durable")));
        }
        // A file whose power went while the library made it would be refused at every later start.
        let made = create_atomically(&path, |partial| Database::create(partial).map(drop).map_err(redb::Error::from));
        made.map_err(|error| failed(error.to_string()))?;
        let database = Database::create(&path).map_err(|error| failed(error.to_string()))?;
        let written = count(&database).map_err(|error| failed(error.to_string()))?;
        if let Some(Written { number, .. }) = known.filter(|known| written < known.number) {
            return Err(damaged(format!("it holds {written} writes, and {number} were durable")));
        }
        let file = FileId::of(&path).map_err(|error| failed(error.to_string()))?;
        let mirror = load(&database).map_err(|error| damaged(error.to_string()))?;
        let mut rows = Vec::new();
        let mirror = match (mirror, configured) {
            (Some(copy), Some(configured)) if known.is_some_and(|known| known.to != file) => {
                let state = &copy.machine.state;
                if state.members.len() <= 1 || !state.members.keys().all(|member| configured.contains_key(member)) {
                    return Err(RegisterError::Copied { dir: dir.display().to_string() });
                }
                tracing::warn!(
                    dir = %dir.display(),
                    "this is a copy of a member's directory: its vote and promises are forgotten, and what it holds counts for nothing \
                     until it has caught up"
                );
                let anew = Mirror::begin(0, new_id, copy.removed, Epoch(0), Machine::default());
                rows = anew.rows(copy.log.keys());
                anew
            }
            (Some(mirror), _) => mirror,
            (None, _) => {
                let anew = Mirror::begin(0, new_id, None, Epoch(0), Machine::default());
                rows = anew.rows([].iter());
                anew
            }
        };
        let (state, _) = watch::channel(mirror.machine.state.clone());
        let shared = Shared {
            path: path.clone(),
            database,
            file,
            writes,
            mirror: Mutex::new(mirror),
            order: tokio::sync::Mutex::new(()),
            state,
            failed: watch::channel(None).0,
        };
        if !rows.is_empty() || known.is_some_and(|known| known.to != file) {
            write(&shared, rows, true).map_err(|error| failed(error.to_string()))?;
        }
        Ok(RegisterStore { shared: Arc::new(shared), incarnation: 0 })
    }

    /// Begins anew as `id`: this incarnation is no member (any more, since version `removed` of the register), and so its vote
    /// and promises bind nobody. The store of the next incarnation; this one writes nothing any more.
    pub async fn begin_anew(&self, id: MemberId, removed: Option<u64>) -> io::Result<RegisterStore> {
        self.replace(id, removed, Epoch(0), Machine::default()).await
    }

    /// Begins anew as `id`, the only member of a cluster whose register begins with `state`. What was promised stays.
    pub async fn begin_alone(&self, id: MemberId, state: ClusterState) -> io::Result<RegisterStore> {
        self.replace(id, None, self.promised(), Machine { state, ..Machine::default() }).await
    }

    async fn replace(
        &self,
        id: MemberId,
        removed: Option<u64>,
        promised: Epoch,
        machine: Machine,
    ) -> io::Result<RegisterStore> {
        let state = machine.state.clone();
        let anew = Mirror::begin(self.incarnation + 1, id, removed, promised, machine);
        let rows = anew.rows(self.mirror().log.keys());
        self.write(rows, true, |mirror| *mirror = anew).await?;
        self.shared.state.send_replace(state);
        Ok(RegisterStore { shared: Arc::clone(&self.shared), incarnation: self.incarnation + 1 })
    }

    /// The register's value as this member last knew it.
    pub fn state(&self) -> ClusterState {
        self.mirror().machine.state.clone()
    }

    /// With which version of the register an earlier incarnation of this node ceased to be a member.
    pub fn removed(&self) -> Option<u64> {
        self.mirror().removed
    }

    /// The incarnation of the member.
    pub fn identity(&self) -> Identity {
        self.mirror().identity
    }

    /// What this member has promised: it refuses leaders of older epochs.
    pub fn promised(&self) -> Epoch {
        self.mirror().promised
    }

    /// Makes the promise to refuse leaders of epochs before `epoch` durable. Only then may it be told.
    pub async fn promise(&self, epoch: Epoch) -> io::Result<()> {
        if epoch <= self.promised() {
            return Ok(());
        }
        self.write(vec![Row::Fact(PROMISED, json(&epoch))], true, move |mirror| {
            mirror.promised = mirror.promised.max(epoch);
        })
        .await
    }

    pub(super) fn watch(&self) -> watch::Receiver<ClusterState> {
        self.shared.state.subscribe()
    }

    pub(super) fn machine(&self) -> RegisterStore {
        self.clone()
    }

    fn mirror(&self) -> MutexGuard<'_, Mirror> {
        self.shared.mirror.lock().expect("nobody panics with it")
    }

    /// Writes rows, and changes the mirror once they are durable.
    async fn write(&self, rows: Vec<Row>, durable: bool, change: impl FnOnce(&mut Mirror)) -> io::Result<()> {
        let _order = self.shared.order.lock().await;
        if self.mirror().incarnation != self.incarnation {
            return Err(io::Error::other("this node has begun anew"));
        }
        let shared = Arc::clone(&self.shared);
        let written = tokio::task::spawn_blocking(move || write(&shared, rows, durable)).await;
        match written.map_err(io::Error::other)? {
            Ok(()) => {
                change(&mut self.mirror());
                Ok(())
            }
            Err(error) => {
                let text = format!("{}: {error}", self.shared.path.display());
                self.shared.failed.send_replace(Some(text.clone()));
                Err(io::Error::other(text))
            }
        }
    }

    /// Waits until a write fails. What the file holds then is not known, and the database takes nothing more: only another start
    /// finds out.
    pub async fn failure(&self) -> String {
        let mut failed = self.shared.failed.subscribe();
        let failure = failed.wait_for(Option::is_some).await.map(|text| text.clone());
        failure.ok().flatten().unwrap_or_default()
    }
}

fn load(database: &Database) -> Result<Option<Mirror>, redb::Error> {
    let reading = database.begin_read()?;
    let facts = match reading.open_table(FACTS) {
        Ok(facts) => facts,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    fn fact<T: DeserializeOwned>(
        facts: &redb::ReadOnlyTable<&'static str, &'static [u8]>,
        name: &str,
    ) -> Result<Option<T>, redb::Error> {
        let damaged = |error: serde_json::Error| redb::Error::Corrupted(format!("{name}: {error}"));
        facts.get(name)?.map(|bytes| serde_json::from_slice(bytes.value()).map_err(damaged)).transpose()
    }
    let Some(identity) = fact(&facts, IDENTITY)? else { return Ok(None) };
    let mut log = BTreeMap::new();
    match reading.open_table(LOG) {
        Ok(table) => {
            for row in table.iter()? {
                let (index, bytes) = row?;
                let damaged = |error: serde_json::Error| redb::Error::Corrupted(format!("log: {error}"));
                log.insert(index.value(), serde_json::from_slice(bytes.value()).map_err(damaged)?);
            }
        }
        Err(redb::TableError::TableDoesNotExist(_)) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(Some(Mirror {
        incarnation: 0,
        identity,
        removed: fact(&facts, REMOVED)?,
        promised: fact(&facts, PROMISED)?.unwrap_or_default(),
        vote: fact(&facts, VOTE)?,
        purged: fact(&facts, PURGED)?,
        log,
        machine: fact(&facts, MACHINE)?.unwrap_or_default(),
    }))
}

/// The number of durable writes that the database holds.
fn count(database: &Database) -> Result<u64, redb::Error> {
    let reading = database.begin_read()?;
    let facts = match reading.open_table(FACTS) {
        Ok(facts) => facts,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(0),
        Err(error) => return Err(error.into()),
    };
    writes_in(&facts)
}

fn writes_in(facts: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<u64, redb::Error> {
    Ok(facts.get(WRITES)?.map_or(0, |bytes| serde_json::from_slice(bytes.value()).unwrap_or(0)))
}

fn write(shared: &Shared, rows: Vec<Row>, durable: bool) -> Result<(), redb::Error> {
    let mut number = None;
    let mut writing = shared.database.begin_write()?;
    // What is not durable yet becomes so with the next transaction that is.
    writing.set_durability(if durable { Durability::Immediate } else { Durability::None })?;
    {
        let mut facts = writing.open_table(FACTS)?;
        let mut log = writing.open_table(LOG)?;
        if durable {
            let next = writes_in(&facts)? + 1;
            facts.insert(WRITES, json(&next).as_slice())?;
            number = Some(next);
        }
        for row in rows {
            match row {
                Row::Fact(name, bytes) => drop(facts.insert(name, bytes.as_slice())?),
                Row::Entry(index, bytes) => drop(log.insert(index, bytes.as_slice())?),
                Row::Remove(index) => drop(log.remove(index)?),
                Row::Forget(name) => drop(facts.remove(name)?),
            }
        }
    }
    writing.commit()?;
    let Some(number) = number else { return Ok(()) };
    // A vote or a promise that only memory holds must not be told.
    believe_flush_of(&shared.path)
        .and_then(|()| shared.writes.save(Written { number, to: shared.file }))
        .map_err(redb::Error::Io)
}

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
    async fn save_machine(&self, machine: Machine, durable: bool) -> Result<(), Raised> {
        let state = machine.state.clone();
        let written =
            self.write(vec![Row::Fact(MACHINE, json(&machine))], durable, |mirror| mirror.machine = machine).await;
        written.map_err(raised(ErrorSubject::StateMachine, ErrorVerb::Write))?;
        self.shared.state.send_if_modified(|seen| {
            let news = *seen != state;
            *seen = state;
            news
        });
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

#[cfg(test)]
mod tests {
    use walferry_mounts as mounts;

    use super::*;
    use crate::register::{Kind, LogStatus, Member};

    /// openraft's own examination of a store.
    #[test]
    fn the_store_is_what_openraft_asks_for() {
        struct Builder;
        impl openraft::testing::StoreBuilder<Types, RegisterStore, RegisterStore, tempfile::TempDir> for Builder {
            async fn build(&self) -> Result<(tempfile::TempDir, RegisterStore, RegisterStore), Raised> {
                let dir = tempfile::tempdir().expect("a directory");
                let store = RegisterStore::open(dir.path(), MemberId(1), None).expect("a store");
                Ok((dir, store.clone(), store))
            }
        }
        openraft::testing::Suite::test_all(Builder).expect("a right store");
    }

    #[tokio::test]
    async fn what_was_promised_is_known_to_the_next_life_of_the_process() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = RegisterStore::open(dir.path(), MemberId(7), None).expect("a store");
        store.promise(Epoch(5)).await.expect("written");
        store.promise(Epoch(4)).await.expect("nothing to do");
        drop(store);
        let store = RegisterStore::open(dir.path(), MemberId(8), None).expect("the same store");
        assert_eq!((store.identity().id, store.promised()), (MemberId(7), Epoch(5)));
    }

    #[tokio::test]
    async fn a_promise_that_a_read_only_filesystem_took_is_not_made() {
        let dir = tempfile::tempdir().expect("a directory");
        if let Err(error) = mounts::own() {
            println!("skipped: this user may not mount a filesystem ({error})");
            return;
        }
        let store = RegisterStore::open(dir.path(), MemberId(7), None).expect("a store");
        store.promise(Epoch(5)).await.expect("written");
        // The database's own descriptor still takes writes, as ext4 does after a remount by force: only its path tells.
        mounts::make_read_only(dir.path()).expect("read-only now");
        let refused = store.promise(Epoch(6)).await.expect_err("nothing is durable there");
        assert!(refused.to_string().contains("Read-only file system"), "{refused}");
        assert_eq!(store.promised(), Epoch(5), "nobody is told");
        mounts::make_writable(dir.path()).expect("writable again");
        store.promise(Epoch(6)).await.expect("written");
    }

    #[tokio::test]
    async fn removed_incarnation_ends_and_the_next_promised_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let old = RegisterStore::open(dir.path(), MemberId(7), None).expect("a store");
        old.promise(Epoch(5)).await.expect("written");
        old.save_machine(
            Machine { state: ClusterState { version: 9, ..ClusterState::default() }, ..Machine::default() },
            true,
        )
        .await
        .expect("written");
        let new = old.begin_anew(MemberId(8), Some(10)).await.expect("written");
        assert!(old.promise(Epoch(6)).await.is_err(), "the incarnation before writes nothing any more");
        let is_anew = |store: &RegisterStore| {
            assert_eq!((store.identity().id, store.promised(), store.removed()), (MemberId(8), Epoch(0), Some(10)));
            assert_eq!(store.watch().borrow().version, 0);
        };
        is_anew(&new);
        drop((old, new));
        is_anew(&RegisterStore::open(dir.path(), MemberId(9), None).expect("the same store"));
    }

    #[tokio::test]
    async fn copied_directory_begins_anew_or_is_refused() {
        let name = |name: &str| name.parse::<MemberName>().expect("a name");
        let configured: BTreeMap<_, _> = ["a", "b"].map(|member| (name(member), "h:1".to_owned())).into();
        for (members, begins) in [(vec!["a", "b"], true), (vec!["a"], false), (vec!["a", "b", "c"], false)] {
            let root = tempfile::tempdir().expect("a directory");
            let (own, copy) = (root.path().join("own"), root.path().join("copy"));
            std::fs::create_dir(&own).and_then(|()| std::fs::create_dir(&copy)).expect("directories");
            let store = RegisterStore::open(&own, MemberId(7), Some(&configured)).expect("a store");
            store.promise(Epoch(5)).await.expect("written");
            let member =
                Member { id: MemberId(7), peer: "h:1".to_owned(), kind: Kind::Data, log_status: LogStatus::Complete };
            let members = members.into_iter().map(|member_name| (name(member_name), member.clone())).collect();
            let state = ClusterState { version: 9, members, ..ClusterState::default() };
            store.save_machine(Machine { state, ..Machine::default() }, true).await.expect("written");
            drop(store);
            for file in std::fs::read_dir(&own).expect("a directory") {
                let file = file.expect("an entry");
                std::fs::copy(file.path(), copy.join(file.file_name())).expect("copied");
            }
            let seen = |dir: &Path, configured| {
                RegisterStore::open(dir, MemberId(8), configured)
                    .map(|store| (store.identity().id, store.promised(), store.state().version))
            };
            let unchanged = (MemberId(7), Epoch(5), 9);
            assert_eq!(seen(&own, Some(&configured)).expect("its own"), unchanged);
            match seen(&copy, Some(&configured)) {
                Ok(found) if begins => assert_eq!(found, (MemberId(8), Epoch(0), 0)),
                Err(RegisterError::Copied { dir }) if !begins => assert!(dir.ends_with("copy")),
                other => panic!("{other:?}"),
            }
            if !begins {
                // The operator's word: from then on the copy is the directory.
                assert_eq!(seen(&copy, None).expect("taken as it is"), unchanged);
                assert_eq!(seen(&copy, Some(&configured)).expect("known now"), unchanged);
            }
        }
    }
}
