//! What a command reads: the durable store, or the leader's newest state (store and pending changes), and in a transaction also
//! what its earlier commands changed. Used by the commands; the merging of store and pending is the applier's.

use std::collections::HashMap;

use bytes::Bytes;
use walferry_applier::pending::Pending;
use walferry_applier::record::{Effect, Fields};
use walferry_applier::store::{KeyCount, Store, StoreError};
use walferry_applier::view::{About, Value};
use walferry_engine::lsn::Lsn;

use crate::session::host::Host;

use crate::session::command::error::CommandError;

pub use walferry_applier::record::StreamId as Id;
pub use walferry_applier::view::Kind;

/// DBSIZE in a transaction looks up at most so many keys that are not in the store yet.
const NET_LOOKUPS_MAX: usize = 4096;

/// What there is to know of a stream without its entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// How many entries.
    pub entries: u64,
    /// The id of the last one.
    pub last_id: Id,
}

/// The state of all keys at one moment.
#[derive(Clone, Copy)]
pub struct View<'a> {
    store: &'a Store,
    pending: Option<&'a Pending>,
    overlay: Option<&'a Overlay>,
}

/// What a transaction has changed so far, over the view that it runs against.
#[derive(Default)]
pub struct Overlay {
    changes: HashMap<Vec<u8>, Change>,
}

enum Change {
    Deleted,
    Put(Vec<u8>),
    /// The value below with this after it.
    Append(Vec<u8>),
    Stream {
        /// Nothing below counts: the stream begins here.
        fresh: bool,
        entries: Vec<(Id, Vec<u8>)>,
    },
}

impl Overlay {
    /// True when the transaction has changed the key.
    pub fn has(&self, key: &[u8]) -> bool {
        self.changes.contains_key(key)
    }

    /// A command of the transaction made this change.
    pub fn apply(&mut self, effect: &Effect<'_>) {
        match *effect {
            Effect::Put { key, value } => {
                self.changes.insert(key.to_vec(), Change::Put(value.to_vec()));
            }
            Effect::Delete { key } => {
                self.changes.insert(key.to_vec(), Change::Deleted);
            }
            Effect::Append { key, bytes } => match self.changes.get_mut(key) {
                Some(Change::Put(value) | Change::Append(value)) => value.extend_from_slice(bytes),
                Some(change @ Change::Deleted) => *change = Change::Put(bytes.to_vec()),
                Some(Change::Stream { .. }) => {
                    debug_assert!(false, "the command saw a stream here")
                }
                None => {
                    self.changes.insert(key.to_vec(), Change::Append(bytes.to_vec()));
                }
            },
            Effect::StreamAdd { key, id, fields } => {
                let entry = (id, fields.to_vec());
                match self.changes.get_mut(key) {
                    Some(Change::Stream { entries, .. }) => entries.push(entry),
                    known => {
                        let fresh = known.is_some();
                        self.changes.insert(key.to_vec(), Change::Stream { fresh, entries: vec![entry] });
                    }
                }
            }
        }
    }
}

impl<'a> View<'a> {
    /// What is durable.
    pub fn durable(host: &'a dyn Host) -> View<'a> {
        View { store: host.store(), pending: None, overlay: None }
    }

    /// The newest state.
    pub fn pending(host: &'a dyn Host) -> View<'a> {
        View { store: host.store(), pending: Some(host.pending()), overlay: None }
    }

    /// True when it holds what is not durable yet.
    pub fn is_newest(&self) -> bool {
        self.pending.is_some()
    }
}

impl<'a> View<'a> {
    /// This view with a transaction's changes over it.
    pub fn with<'b>(&self, overlay: &'b Overlay) -> View<'b>
    where
        'a: 'b,
    {
        View { overlay: Some(overlay), ..*self }
    }

    /// Asks the state below the transaction.
    fn below<T>(
        &self,
        ask: impl FnOnce(&dyn walferry_applier::view::View) -> Result<T, StoreError>,
    ) -> Result<T, CommandError> {
        let answer = match self.pending {
            Some(pending) => ask(&pending.over(self.store)),
            None => ask(self.store),
        };
        answer.map_err(|error| CommandError::Store(error.to_string()))
    }

    fn change(&self, key: &[u8]) -> Option<&'a Change> {
        self.overlay?.changes.get(key)
    }

    /// What kind of value the key has, if it exists.
    pub fn kind(&self, key: &[u8]) -> Result<Option<Kind>, CommandError> {
        match self.change(key) {
            Some(Change::Deleted) => Ok(None),
            Some(Change::Put(_) | Change::Append(_)) => Ok(Some(Kind::String)),
            Some(Change::Stream { .. }) => Ok(Some(Kind::Stream)),
            None => self.below(|view| view.kind(key)),
        }
    }

    /// The length of the key's string value. Copies nothing of it.
    pub fn length(&self, key: &[u8]) -> Result<Option<usize>, CommandError> {
        match self.change(key) {
            Some(Change::Deleted) => Ok(None),
            Some(Change::Put(value)) => Ok(Some(value.len())),
            Some(Change::Append(tail)) => Ok(Some(self.length_below(key)?.unwrap_or(0) + tail.len())),
            Some(Change::Stream { .. }) => Err(CommandError::WrongType),
            None => self.length_below(key),
        }
    }

    fn length_below(&self, key: &[u8]) -> Result<Option<usize>, CommandError> {
        match self.below(|view| view.about(key))?.0 {
            Some(About::String(length)) => Ok(Some(length)),
            Some(About::Stream(_)) => Err(CommandError::WrongType),
            None => Ok(None),
        }
    }

    /// The key's string value.
    pub fn string(&self, key: &[u8]) -> Result<Option<Bytes>, CommandError> {
        match self.change(key) {
            Some(Change::Deleted) => Ok(None),
            Some(Change::Put(value)) => Ok(Some(Bytes::copy_from_slice(value))),
            Some(Change::Append(tail)) => {
                let below = self.string_below(key)?.unwrap_or_default();
                Ok(Some([&below[..], tail].concat().into()))
            }
            Some(Change::Stream { .. }) => Err(CommandError::WrongType),
            None => self.string_below(key),
        }
    }

    fn string_below(&self, key: &[u8]) -> Result<Option<Bytes>, CommandError> {
        match self.below(|view| view.get(key))? {
            Some(Value::String(value)) => Ok(Some(value)),
            Some(Value::Stream(_)) => Err(CommandError::WrongType),
            None => Ok(None),
        }
    }

    /// The key's stream, without its entries.
    pub fn stream(&self, key: &[u8]) -> Result<Option<Stream>, CommandError> {
        match self.change(key) {
            Some(Change::Deleted) => Ok(None),
            Some(Change::Put(_) | Change::Append(_)) => Err(CommandError::WrongType),
            Some(Change::Stream { fresh, entries }) => {
                let below = if *fresh { None } else { self.stream_below(key)? };
                let count = below.map_or(0, |stream| stream.entries) + entries.len() as u64;
                let last = entries.last().map_or((0, 0), |(id, _)| *id);
                Ok(Some(Stream { entries: count, last_id: last }))
            }
            None => self.stream_below(key),
        }
    }

    fn stream_below(&self, key: &[u8]) -> Result<Option<Stream>, CommandError> {
        match self.below(|view| view.about(key))?.0 {
            Some(About::Stream(meta)) => Ok(Some(Stream { entries: meta.entries, last_id: meta.last_id })),
            Some(About::String(_)) => Err(CommandError::WrongType),
            None => Ok(None),
        }
    }

    /// Calls `each` with the id and the encoded fields of up to `limit` entries from `from` to `to`, both included, until it
    /// returns false.
    pub fn range(
        &self,
        key: &[u8],
        (from, to): (Id, Id),
        reverse: bool,
        limit: usize,
        each: &mut dyn FnMut(Id, &[u8]) -> bool,
    ) -> Result<(), CommandError> {
        let Some(Change::Stream { fresh, entries }) = self.change(key) else {
            return self.below(|view| view.stream_range(key, from, to, reverse, limit, each));
        };
        let mut left = limit;
        let own = |left: &mut usize, each: &mut dyn FnMut(Id, &[u8]) -> bool| {
            let start = entries.partition_point(|(id, _)| *id < from);
            let end = entries.partition_point(|(id, _)| *id <= to);
            let inside = entries[start.min(end)..end].iter();
            let mut ordered: Box<dyn Iterator<Item = &(Id, Vec<u8>)>> =
                if reverse { Box::new(inside.rev()) } else { Box::new(inside) };
            *left > 0
                && ordered.by_ref().take(*left).all(|(id, fields)| {
                    *left -= 1;
                    each(*id, fields)
                })
        };
        // Every entry of the transaction has a greater id than those below.
        if reverse && !own(&mut left, each) {
            return Ok(());
        }
        let mut wants_more = true;
        if !fresh && left > 0 {
            let most = left;
            self.below(|view| {
                view.stream_range(key, from, to, reverse, most, &mut |id, fields| {
                    left -= 1;
                    wants_more = each(id, fields);
                    wants_more
                })
            })?;
        }
        if !reverse && wants_more {
            own(&mut left, each);
        }
        Ok(())
    }

    /// About `count` keys from `cursor` on, and the cursor to go on with: 0 after the last.
    pub fn scan(&self, cursor: u64, count: usize) -> Result<(u64, Vec<Vec<u8>>), CommandError> {
        let (next, mut keys) = self.below(|view| view.scan(cursor, count))?;
        if let Some(overlay) = self.overlay {
            keys.retain(|key| !matches!(overlay.changes.get(key), Some(Change::Deleted)));
            if next == 0 {
                for (key, change) in &overlay.changes {
                    if !matches!(change, Change::Deleted) && self.below(|view| view.kind(key))?.is_none() {
                        keys.push(key.clone());
                    }
                }
            }
        }
        Ok((next, keys))
    }

    /// What this view adds to the number of keys in the store; none when that takes more than `NET_LOOKUPS_MAX` lookups.
    pub fn net_keys(&self) -> Result<Option<i64>, CommandError> {
        let mut net = 0;
        if let Some(pending) = self.pending {
            if pending.keys() > NET_LOOKUPS_MAX {
                return Ok(None);
            }
            net += pending.over(self.store).net_keys().map_err(|error| CommandError::Store(error.to_string()))?;
        }
        let changes = self.overlay.map(|overlay| &overlay.changes);
        if changes.is_some_and(|changes| changes.len() > NET_LOOKUPS_MAX) {
            return Ok(None);
        }
        for (key, change) in changes.into_iter().flatten() {
            let existed = self.below(|view| view.kind(key))?.is_some();
            net += i64::from(!matches!(change, Change::Deleted)) - i64::from(existed);
        }
        Ok(Some(net))
    }

    /// How many keys the store has, as far as they are counted.
    pub fn stored_keys(&self) -> Result<KeyCount, CommandError> {
        self.store.counted_keys().map_err(|error| CommandError::Store(error.to_string()))
    }

    /// A bound on the commit that changed the key last (below a transaction): none behind it did.
    pub fn version(&self, key: &[u8]) -> Result<Lsn, CommandError> {
        Ok(self.below(|view| view.about(key))?.1)
    }
}

/// The fields and values of an entry, as the record holds them.
pub fn encode_fields<'a>(parts: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut encoded = Vec::new();
    for part in parts {
        Fields::push(&mut encoded, part);
    }
    encoded
}

/// The fields and values in turn.
pub fn fields(encoded: &[u8]) -> Fields<'_> {
    Fields::new(encoded)
}
