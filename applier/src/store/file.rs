//! The store's file: an embedded database (redb) that holds the state at one applied LSN. Written by checkpoints only, read
//! through a snapshot that is renewed after each. Knows the log by that LSN alone.
//!
//! ```text
//! keys     hash 8 (big-endian) | key                             -> version 8 | kind 1 | of a short string: its bytes; of a long one:
//!                                                                   length 8; of a stream: entries 8, last id 16
//! values   hash 8 (big-endian) | key                             -> the bytes of a long string, so that nobody reads them who asks
//!                                                                   for something else
//! entries  hash 8 | key length 4 | key | id 16 (big-endian)      -> fields
//! facts    "applied", "applied_at_us", "epoch", "crc"             -> number, those of the last frame
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use redb::{
    Database, Durability, ReadOnlyTable, ReadableDatabase, ReadableTable, ReadableTableMetadata, Table, TableDefinition,
};
use walferry_engine::atomic_create::create_atomically;
use walferry_engine::durable::believe_flush_of;
use walferry_engine::lsn::{Epoch, Lsn};

use super::error::StoreError;
use super::overlay::{Overlay, Slot, State};
use crate::record::StreamId;
use crate::view::{About, StreamMeta, Value};

pub(super) const KEYS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("keys");
pub(super) const VALUES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("values");
pub(super) const ENTRIES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("entries");
pub(super) const FACTS: TableDefinition<'_, &str, u64> = TableDefinition::new("facts");
const APPLIED: &str = "applied";
const APPLIED_AT_US: &str = "applied_at_us";
const EPOCH: &str = "epoch";
const CRC: &str = "crc";

/// The file in the store's directory.
pub const STORE_FILE: &str = "store.redb";

const HASH_BYTES: usize = 8;
const VALUE_HEAD_BYTES: usize = 9;
const KIND_STRING: u8 = 1;
const KIND_STREAM: u8 = 2;
const KIND_LONG_STRING: u8 = 3;
/// A string that is longer than this stands in `values`: a page of the file holds several that are not.
const SHORT_BYTES_MAX: usize = 1 << 10;

/// Keys with their hashes.
pub type HashedKeys = Vec<(u64, Vec<u8>)>;

/// Where in which log a state of the store is: the end of the last frame in it, and what tells that frame from one that another
/// epoch wrote at the same place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Frames up to here are in the store.
    pub applied: Lsn,
    /// When the leader sealed the last of them, microseconds since the Unix epoch; 0 before the first.
    pub at_us: u64,
    /// Its epoch.
    pub epoch: Epoch,
    /// Its checksum.
    pub crc: u32,
}

impl Position {
    pub(super) fn read(facts: &impl ReadableTable<&'static str, u64>) -> Result<Position, redb::Error> {
        let fact = |name| facts.get(name).map(|found| found.map_or(0, |value| value.value()));
        // A checksum that is not one fits no frame, and so the store is made anew.
        let crc = u32::try_from(fact(CRC)?).unwrap_or_default();
        Ok(Position { applied: Lsn(fact(APPLIED)?), at_us: fact(APPLIED_AT_US)?, epoch: Epoch(fact(EPOCH)?), crc })
    }

    pub(super) fn write(self, facts: &mut Table<'_, &'static str, u64>) -> Result<(), redb::Error> {
        facts.insert(APPLIED, self.applied.0)?;
        facts.insert(APPLIED_AT_US, self.at_us)?;
        facts.insert(EPOCH, self.epoch.0)?;
        facts.insert(CRC, u64::from(self.crc))?;
        Ok(())
    }
}

/// The file, and the snapshot that is read.
pub struct StoreFile {
    database: Arc<Database>,
    path: PathBuf,
    snapshot: Snapshot,
}

struct Snapshot {
    keys: ReadOnlyTable<&'static [u8], &'static [u8]>,
    values: ReadOnlyTable<&'static [u8], &'static [u8]>,
    entries: ReadOnlyTable<&'static [u8], &'static [u8]>,
    position: Position,
}

fn key_name(hash: u64, key: &[u8]) -> Vec<u8> {
    [&hash.to_be_bytes()[..], key].concat()
}

fn entry_name(hash: u64, key: &[u8], id: StreamId) -> Vec<u8> {
    let length = u32::try_from(key.len()).expect("a key is far below 4 GiB");
    let parts: [&[u8]; 5] = [&hash.to_be_bytes(), &length.to_be_bytes(), key, &id.0.to_be_bytes(), &id.1.to_be_bytes()];
    parts.concat()
}

fn id_of(entry_name: &[u8]) -> Option<StreamId> {
    let (_, id) = entry_name.split_last_chunk::<16>()?;
    let (milliseconds, sequence) = id.split_at(8);
    Some((u64::from_be_bytes(milliseconds.try_into().ok()?), u64::from_be_bytes(sequence.try_into().ok()?)))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn stream_meta(bytes: &[u8]) -> Option<StreamMeta> {
    let at = VALUE_HEAD_BYTES;
    let last_id = (u64_at(bytes, at + 8)?, u64_at(bytes, at + 16)?);
    Some(StreamMeta { entries: u64_at(bytes, at)?, last_id })
}

/// What a row of `keys` says of its value, and the version.
fn decode(bytes: &[u8]) -> Option<(About, Lsn)> {
    let version = Lsn(u64_at(bytes, 0)?);
    let about = match *bytes.get(8)? {
        KIND_STRING => About::String(bytes.len() - VALUE_HEAD_BYTES),
        KIND_LONG_STRING => About::String(usize::try_from(u64_at(bytes, VALUE_HEAD_BYTES)?).ok()?),
        KIND_STREAM => About::Stream(stream_meta(bytes)?),
        _ => return None,
    };
    Some((about, version))
}

fn open_database(path: &Path, cache_bytes: usize) -> Result<Database, redb::Error> {
    let mut builder = Database::builder();
    builder.set_cache_size(cache_bytes);
    #[cfg(feature = "simulation")]
    if walferry_engine::world::is_simulated() {
        return Ok(builder.create_with_backend(super::simulated::SimulatedFile::open(path)?)?);
    }
    Ok(builder.create(path)?)
}

impl StoreFile {
    /// Opens or makes the file in `dir`; `cache_bytes` of its pages stay in memory.
    pub fn open(dir: &Path, cache_bytes: usize) -> Result<StoreFile, StoreError> {
        let path = dir.join(STORE_FILE);
        let at = StoreError::at(&path);
        // The library writes a new file in several steps, and refuses one whose power went in between.
        create_atomically(&path, |partial| Database::create(partial).map(drop).map_err(redb::Error::from))
            .map_err(&at)?;
        let database = open_database(&path, cache_bytes).map_err(&at)?;
        StoreFile::make_tables(&database).map_err(at)?;
        let snapshot = Snapshot::take(&database).map_err(StoreError::at(&path))?;
        Ok(StoreFile { database: Arc::new(database), path, snapshot })
    }

    fn make_tables(database: &Database) -> Result<(), redb::Error> {
        let transaction = database.begin_write()?;
        transaction.open_table(KEYS)?;
        transaction.open_table(VALUES)?;
        transaction.open_table(ENTRIES)?;
        transaction.open_table(FACTS)?;
        transaction.commit()?;
        Ok(())
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file holds.
    pub fn position(&self) -> Position {
        self.snapshot.position
    }

    /// From now on the newest checkpoint is read.
    pub fn renew(&mut self) -> Result<(), StoreError> {
        self.snapshot = Snapshot::take(&self.database).map_err(StoreError::at(&self.path))?;
        Ok(())
    }

    fn damaged(&self) -> StoreError {
        StoreError::Damaged { path: self.path.clone() }
    }

    /// The key's value and version.
    pub fn entry(&self, hash: u64, key: &[u8]) -> Result<Option<(Value, Lsn)>, StoreError> {
        let at = StoreError::at(&self.path);
        let name = key_name(hash, key);
        let Some(row) = self.snapshot.keys.get(&name[..]).map_err(|error| at(error.into()))? else { return Ok(None) };
        let row = row.value();
        let (about, version) = decode(row).ok_or_else(|| self.damaged())?;
        let value = match about {
            About::Stream(meta) => Value::Stream(meta),
            About::String(_) if row[8] == KIND_STRING => {
                Value::String(Bytes::copy_from_slice(&row[VALUE_HEAD_BYTES..]))
            }
            About::String(length) => {
                let found = self.snapshot.values.get(&name[..]).map_err(|error| at(error.into()))?;
                let found = found.filter(|value| value.value().len() == length).ok_or_else(|| self.damaged())?;
                Value::String(Bytes::copy_from_slice(found.value()))
            }
        };
        Ok(Some((value, version)))
    }

    /// What the key holds, and its version. Reads and copies nothing of a long value.
    pub fn about(&self, hash: u64, key: &[u8]) -> Result<Option<(About, Lsn)>, StoreError> {
        let at = StoreError::at(&self.path);
        let found = self.snapshot.keys.get(&key_name(hash, key)[..]).map_err(|error| at(error.into()))?;
        found.map(|value| decode(value.value()).ok_or_else(|| self.damaged())).transpose()
    }

    /// How many keys the file has.
    pub fn len(&self) -> Result<u64, StoreError> {
        self.snapshot.keys.len().map_err(|error| StoreError::at(&self.path)(error.into()))
    }

    /// As `View::stream_range`; true when `each` wants more.
    pub fn stream_range(
        &self,
        (hash, key): (u64, &[u8]),
        (from, to): (StreamId, StreamId),
        reverse: bool,
        limit: usize,
        each: &mut dyn FnMut(StreamId, &[u8]) -> bool,
    ) -> Result<bool, StoreError> {
        if from > to || limit == 0 {
            return Ok(true);
        }
        let at = StoreError::at(&self.path);
        let (first, last) = (entry_name(hash, key, from), entry_name(hash, key, to));
        let mut range = self.snapshot.entries.range(&first[..]..=&last[..]).map_err(|error| at(error.into()))?;
        for _ in 0..limit {
            let Some(row) = (if reverse { range.next_back() } else { range.next() }) else { break };
            let (name, fields) = row.map_err(|error| at(error.into()))?;
            let id = id_of(name.value()).ok_or_else(|| self.damaged())?;
            if !each(id, fields.value()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// At least `count` keys in hash order from `from` on, or keys of `bytes_max` bytes, and from where on there may be more.
    pub fn scan(&self, from: u64, count: usize, bytes_max: usize) -> Result<(HashedKeys, Option<u64>), StoreError> {
        let at = StoreError::at(&self.path);
        let first = from.to_be_bytes();
        let range = self.snapshot.keys.range(&first[..]..).map_err(|error| at(error.into()))?;
        let (mut found, mut bytes) = (HashedKeys::new(), 0);
        for row in range {
            let (name, _) = row.map_err(|error| at(error.into()))?;
            let (hash, key) = name.value().split_at_checked(HASH_BYTES).ok_or_else(|| self.damaged())?;
            let hash = u64::from_be_bytes(hash.try_into().expect("split at eight bytes"));
            if (found.len() >= count || bytes >= bytes_max) && found.last().is_some_and(|last| last.0 != hash) {
                return Ok((found, Some(hash)));
            }
            bytes += key.len();
            found.push((hash, key.to_vec()));
        }
        Ok((found, None))
    }

    /// The file, for the thread that writes checkpoints.
    pub fn database(&self) -> Arc<Database> {
        Arc::clone(&self.database)
    }
}

impl Snapshot {
    fn take(database: &Database) -> Result<Snapshot, redb::Error> {
        let transaction = database.begin_read()?;
        let facts = transaction.open_table(FACTS)?;
        Ok(Snapshot {
            keys: transaction.open_table(KEYS)?,
            values: transaction.open_table(VALUES)?,
            entries: transaction.open_table(ENTRIES)?,
            position: Position::read(&facts)?,
        })
    }
}

/// Writes the changes of `overlay` and the position up to which they go, in one transaction: after a crash the file holds all of it or
/// nothing. `path` is the database's.
pub fn write_checkpoint(
    path: &Path,
    database: &Database,
    overlay: &Overlay,
    position: Position,
) -> Result<(), redb::Error> {
    let mut transaction = database.begin_write()?;
    transaction.set_durability(Durability::Immediate)?;
    // Without it, opening the file after a crash would walk all of it.
    transaction.set_quick_repair(true);
    {
        let mut keys = transaction.open_table(KEYS)?;
        let mut values = transaction.open_table(VALUES)?;
        let mut entries = transaction.open_table(ENTRIES)?;
        let mut slots: Vec<&Slot> = overlay.slots().collect();
        // In the file's order, so that neighbours are written together.
        slots.sort_unstable_by(|a, b| (a.hash(), &a.key).cmp(&(b.hash(), &b.key)));
        for slot in slots {
            write_slot(&mut keys, &mut values, &mut entries, slot)?;
        }
        let mut facts = transaction.open_table(FACTS)?;
        position.write(&mut facts)?;
    }
    transaction.commit()?;
    // The log before a checkpoint is thrown away.
    believe_flush_of(path).map_err(redb::Error::Io)
}

/// What the file holds of a string, with `tail` behind it.
fn appended_to(keys: &Rows<'_>, values: &Rows<'_>, name: &[u8], tail: &[u8]) -> Result<Vec<u8>, redb::Error> {
    let row = keys.get(name)?;
    let row = row.as_ref().map_or(&b""[..], |row| row.value());
    Ok(match row.get(8) {
        Some(&KIND_STRING) => [&row[VALUE_HEAD_BYTES..], tail].concat(),
        Some(&KIND_LONG_STRING) => {
            let long = values.get(name)?;
            [long.as_ref().map_or(&b""[..], |long| long.value()), tail].concat()
        }
        _ => tail.to_vec(),
    })
}

type Rows<'a> = Table<'a, &'static [u8], &'static [u8]>;

fn write_slot(
    keys: &mut Rows<'_>,
    values: &mut Rows<'_>,
    entries: &mut Rows<'_>,
    slot: &Slot,
) -> Result<(), redb::Error> {
    let name = key_name(slot.hash(), &slot.key);
    let kind_below = keys.get(&name[..])?.and_then(|old| old.value().get(8).copied());
    let is_long = |value: &[u8]| value.len() > SHORT_BYTES_MAX;
    // One value at a time is whole in memory, here only.
    let whole = match &slot.state {
        State::Appended(tail) => Some(appended_to(keys, values, &name, tail.bytes())?),
        _ => None,
    };
    let string = match &slot.state {
        State::String(value) => Some(&value[..]),
        _ => whole.as_deref(),
    };
    if kind_below == Some(KIND_LONG_STRING) && !string.is_some_and(is_long) {
        values.remove(&name[..])?;
    }
    let below_is_stream = kind_below == Some(KIND_STREAM);
    let keeps_below = matches!(&slot.state, State::Stream(tail) if !tail.fresh);
    if below_is_stream && !keeps_below {
        let first = entry_name(slot.hash(), &slot.key, (0, 0));
        let last = entry_name(slot.hash(), &slot.key, (u64::MAX, u64::MAX));
        entries.retain_in(&first[..]..=&last[..], |_, _| false)?;
    }
    let mut head = Vec::with_capacity(VALUE_HEAD_BYTES);
    head.extend_from_slice(&slot.version.0.to_le_bytes());
    match (&slot.state, string) {
        (_, Some(value)) if is_long(value) => {
            head.push(KIND_LONG_STRING);
            head.extend_from_slice(&(value.len() as u64).to_le_bytes());
            keys.insert(&name[..], &head[..])?;
            values.insert(&name[..], value)?;
        }
        (_, Some(value)) => {
            head.push(KIND_STRING);
            keys.insert(&name[..], &[&head[..], value].concat()[..])?;
        }
        (State::Stream(tail), None) => {
            head.push(KIND_STREAM);
            for part in [tail.meta.entries, tail.meta.last_id.0, tail.meta.last_id.1] {
                head.extend_from_slice(&part.to_le_bytes());
            }
            keys.insert(&name[..], &head[..])?;
            for (id, fields) in &tail.entries {
                entries.insert(&entry_name(slot.hash(), &slot.key, *id)[..], &fields[..])?;
            }
        }
        (State::Absent | State::String(_) | State::Appended(_), None) => {
            keys.remove(&name[..])?;
        }
    }
    Ok(())
}
