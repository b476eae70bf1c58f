//! What a member keeps of the register on its disk: who it is, what it promised, its vote, its log of changes, and the state
//! that they make. A few kilobytes in one redb file, mirrored in memory; every write is one transaction on a thread that may
//! block, so that heartbeats never wait behind this disk. Opened by the node, used by openraft through its storage traits.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use redb::{Database, Durability};
use tokio::sync::watch;
use walferry_engine::atomic_create::create_atomically;
use walferry_engine::durable::believe_flush_of;
use walferry_engine::lsn::Epoch;

use super::guard::{FileId, Writes, Written, examine};
use super::rows::{Identity, Machine, Mirror, PROMISED, Row, count, json, load, write_rows};
use super::types::{RegisterError, register_path};
use crate::member::MemberName;
use crate::register::{ClusterState, MemberId};

/// What the clones of a store have in common.
struct OpenStore {
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

impl OpenStore {
    /// Writes rows in one transaction.
    fn write(&self, rows: Vec<Row>, durable: bool) -> Result<(), redb::Error> {
        let mut writing = self.database.begin_write()?;
        // What is not durable yet becomes so with the next transaction that is.
        writing.set_durability(if durable { Durability::Immediate } else { Durability::None })?;
        let number = write_rows(&writing, rows, durable)?;
        writing.commit()?;
        let Some(number) = number else { return Ok(()) };
        // A vote or a promise that only memory holds must not be told.
        believe_flush_of(&self.path)
            .and_then(|()| self.writes.save(Written { number, to: self.file }))
            .map_err(redb::Error::Io)
    }
}

/// The store; clones are the same store, of the same incarnation.
#[derive(Clone)]
pub struct RegisterStore {
    open: Arc<OpenStore>,
    /// Which of the incarnations that this process has had in it; what still works for an earlier one writes nothing any more.
    incarnation: u64,
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
        let open = OpenStore {
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
            open.write(rows, true).map_err(|error| failed(error.to_string()))?;
        }
        Ok(RegisterStore { open: Arc::new(open), incarnation: 0 })
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
        self.open.state.send_replace(state);
        Ok(RegisterStore { open: Arc::clone(&self.open), incarnation: self.incarnation + 1 })
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

    /// Tells those that watch the register of this state, if it is another than they know.
    pub(super) fn publish(&self, state: ClusterState) {
        self.open.state.send_if_modified(|seen| {
            let news = *seen != state;
            *seen = state;
            news
        });
    }

    pub(super) fn watch(&self) -> watch::Receiver<ClusterState> {
        self.open.state.subscribe()
    }

    pub(super) fn machine(&self) -> RegisterStore {
        self.clone()
    }

    pub(super) fn mirror(&self) -> MutexGuard<'_, Mirror> {
        self.open.mirror.lock().expect("nobody panics with it")
    }

    /// Writes rows, and changes the mirror once they are durable.
    pub(super) async fn write(
        &self,
        rows: Vec<Row>,
        durable: bool,
        change: impl FnOnce(&mut Mirror),
    ) -> io::Result<()> {
        let _order = self.open.order.lock().await;
        if self.mirror().incarnation != self.incarnation {
            return Err(io::Error::other("this node has begun anew"));
        }
        let open = Arc::clone(&self.open);
        let written = tokio::task::spawn_blocking(move || open.write(rows, durable)).await;
        match written.map_err(io::Error::other)? {
            Ok(()) => {
                change(&mut self.mirror());
                Ok(())
            }
            Err(error) => {
                let text = format!("{}: {error}", self.open.path.display());
                self.open.failed.send_replace(Some(text.clone()));
                Err(io::Error::other(text))
            }
        }
    }

    /// Waits until a write fails. What the file holds then is not known, and the database takes nothing more: only another start
    /// finds out.
    pub async fn failure(&self) -> String {
        let mut failed = self.open.failed.subscribe();
        let failure = failed.wait_for(Option::is_some).await.map(|text| text.clone());
        failure.ok().flatten().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use walferry_mounts as mounts;

    use super::super::storage::Raised;
    use super::super::types::Types;
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
    async fn promise_is_known_after_a_restart_of_the_process() {
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
