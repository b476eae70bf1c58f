//! The rows of the register's database and the mirror of them in memory: names, encoding, reading and writing. Used by `store`, which
//! decides what is written when.
//!
//! ```text
//!  table log     index of a change -> the change, as JSON
//!  table facts   name -> value, as JSON: identity, promised, vote, purged, machine, removed, writes
//! ```

use std::collections::BTreeMap;

use openraft::{BasicNode, Entry, LogId, StoredMembership, Vote};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use walferry_engine::lsn::Epoch;

use super::types::Types;
use crate::register::{ClusterState, MemberId};

/// Changes by their index, as JSON.
pub(super) const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
/// Everything else by its name, as JSON.
pub(super) const FACTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("facts");
pub(super) const IDENTITY: &str = "identity";
pub(super) const PROMISED: &str = "promised";
pub(super) const VOTE: &str = "vote";
pub(super) const PURGED: &str = "purged";
pub(super) const MACHINE: &str = "machine";
pub(super) const REMOVED: &str = "removed";
/// How many durable writes there were, this one included; see `guard`.
pub(super) const WRITES: &str = "writes";

/// The incarnation of the member that this store belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Made with the store.
    pub id: MemberId,
}

/// The state and how many changes made it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Machine {
    pub(super) applied: Option<LogId<u64>>,
    pub(super) membership: StoredMembership<u64, BasicNode>,
    pub(super) state: ClusterState,
}

/// What the file holds, in memory.
#[derive(Debug)]
pub(super) struct Mirror {
    pub(super) incarnation: u64,
    pub(super) identity: Identity,
    /// The version of the register with which an earlier incarnation ceased to be a member, if that is why this one began.
    pub(super) removed: Option<u64>,
    pub(super) promised: Epoch,
    pub(super) vote: Option<Vote<u64>>,
    pub(super) purged: Option<LogId<u64>>,
    pub(super) log: BTreeMap<u64, Entry<Types>>,
    pub(super) machine: Machine,
}

impl Mirror {
    /// What an incarnation begins with.
    pub(super) fn begin(
        incarnation: u64,
        id: MemberId,
        removed: Option<u64>,
        promised: Epoch,
        machine: Machine,
    ) -> Mirror {
        let identity = Identity { id };
        Mirror { incarnation, identity, removed, promised, vote: None, purged: None, log: BTreeMap::new(), machine }
    }

    /// What makes the file hold that; `old` are the entries of an incarnation before.
    pub(super) fn rows<'a>(&self, old: impl Iterator<Item = &'a u64>) -> Vec<Row> {
        let mut rows = vec![Row::Fact(IDENTITY, json(&self.identity)), Row::Fact(PROMISED, json(&self.promised))];
        rows.push(Row::Fact(MACHINE, json(&self.machine)));
        rows.push(self.removed.map_or(Row::Forget(REMOVED), |version| Row::Fact(REMOVED, json(&version))));
        rows.extend([VOTE, PURGED].map(Row::Forget));
        rows.extend(old.map(|index| Row::Remove(*index)));
        rows
    }
}

/// One row to be written or removed.
pub(super) enum Row {
    Fact(&'static str, Vec<u8>),
    Entry(u64, Vec<u8>),
    Remove(u64),
    Forget(&'static str),
}

pub(super) fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("these values are JSON")
}

pub(super) fn load(database: &Database) -> Result<Option<Mirror>, redb::Error> {
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
pub(super) fn count(database: &Database) -> Result<u64, redb::Error> {
    let reading = database.begin_read()?;
    let facts = match reading.open_table(FACTS) {
        Ok(facts) => facts,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(0),
        Err(error) => return Err(error.into()),
    };
    writes_in(&facts)
}

pub(super) fn writes_in(facts: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<u64, redb::Error> {
    Ok(facts.get(WRITES)?.map_or(0, |bytes| serde_json::from_slice(bytes.value()).unwrap_or(0)))
}

/// Writes rows in a transaction. The number that it has among the durable writes, if it is to be one.
pub(super) fn write_rows(
    writing: &WriteTransaction,
    rows: Vec<Row>,
    durable: bool,
) -> Result<Option<u64>, redb::Error> {
    let mut facts = writing.open_table(FACTS)?;
    let mut log = writing.open_table(LOG)?;
    let mut number = None;
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
    Ok(number)
}
