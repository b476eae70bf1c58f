//! Changed keys in memory, in front of whatever lies below: the store's newest changes over its file, and the leader's not yet
//! durable changes over the store. Knows no file and no log.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};
use hashbrown::HashTable;
use walferry_engine::lsn::Lsn;

use crate::record::{Effect, StreamId};
use crate::store::error::StoreError;
use crate::view::{About, StreamMeta, Value};

/// Keys are spread over this many tables by the top bits of their hash, so that SCAN sorts a small part at a time.
const SHARDS: usize = 1024;
const SHARD_SHIFT: u32 = u64::BITS - SHARDS.trailing_zeros();
/// What a key costs besides its bytes, for the accounting.
const ENTRY_BYTES: usize = 96;
/// What a stream entry costs besides its bytes.
const STREAM_ENTRY_BYTES: usize = 48;

const _: () = assert!(SHARDS.is_power_of_two());

/// The hash of a key: decides its place in memory, in the file and in SCAN's order, so it never changes.
pub fn hash_of(key: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(key)
}

/// What the overlay says of a key.
#[derive(Clone, Debug)]
pub enum State {
    /// Deleted: nothing below counts.
    Absent,
    /// A string.
    String(Bytes),
    /// A string that goes on from the one underneath: what was appended, whatever the length of the whole.
    Appended(Box<StringTail>),
    /// A stream: its newest entries.
    Stream(StreamTail),
}

/// What was appended to the string underneath.
#[derive(Clone, Debug, Default)]
pub struct StringTail {
    /// The length of the string underneath.
    before: usize,
    bytes: BytesMut,
    /// Which commit appended how many of the bytes, where what lies below gets them one after the other.
    parts: VecDeque<(Lsn, usize)>,
}

impl StringTail {
    /// The length of the whole string.
    fn len(&self) -> usize {
        self.before + self.bytes.len()
    }

    /// The whole string over what is underneath, which may have the first of what was appended already.
    fn over(&self, below: &[u8]) -> Bytes {
        debug_assert!((self.before..=self.len()).contains(&below.len()), "nothing else changes what is underneath");
        let there = below.len().saturating_sub(self.before).min(self.bytes.len());
        [below, &self.bytes[there..]].concat().into()
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn push(&mut self, bytes: &[u8], part_of: Option<Lsn>) {
        self.bytes.extend_from_slice(bytes);
        if let Some(version) = part_of {
            self.parts.push_back((version, bytes.len()));
        }
    }

    /// What was appended by commits up to `version` lies underneath now; how many bytes that are.
    fn forget(&mut self, version: Lsn) -> usize {
        let mut forgotten = 0;
        while let Some((_, length)) = self.parts.front().filter(|(lsn, _)| *lsn <= version) {
            forgotten += length;
            self.parts.pop_front();
        }
        self.bytes.advance(forgotten);
        self.before += forgotten;
        forgotten
    }
}

/// The newest entries of a stream.
#[derive(Clone, Debug)]
pub struct StreamTail {
    /// The whole stream, what lies below included.
    pub meta: StreamMeta,
    /// True when nothing below belongs to it.
    pub fresh: bool,
    /// Ascending; each id greater than all below.
    pub entries: Vec<(StreamId, Box<[u8]>)>,
}

impl StreamTail {
    /// The entries from `from` to `to` that are newer than `below`, ascending.
    pub fn between(&self, from: StreamId, to: StreamId, below: Option<StreamId>) -> &[(StreamId, Box<[u8]>)] {
        let start = self.entries.partition_point(|entry| entry.0 < from || below.is_some_and(|below| entry.0 <= below));
        let end = self.entries.partition_point(|entry| entry.0 <= to);
        &self.entries[start.min(end)..end]
    }
}

/// A changed key.
#[derive(Clone, Debug)]
pub struct Slot {
    hash: u64,
    /// The key.
    pub key: Box<[u8]>,
    /// The LSN of the last commit that changed it.
    pub version: Lsn,
    /// What it holds.
    pub state: State,
    /// Whether the key exists underneath, where that is known: for counting keys.
    below: Option<bool>,
}

impl Slot {
    /// The key's hash.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// What the key holds, without its bytes; `None` when it is deleted.
    pub fn about(&self) -> Option<About> {
        match &self.state {
            State::Absent => None,
            State::String(value) => Some(About::String(value.len())),
            State::Appended(tail) => Some(About::String(tail.len())),
            State::Stream(tail) => Some(About::Stream(tail.meta)),
        }
    }

    fn exists(&self) -> bool {
        !matches!(self.state, State::Absent)
    }

    /// What the key adds to the number of keys underneath.
    fn net(&self) -> i64 {
        self.below.map_or(0, |below| i64::from(self.exists()) - i64::from(below))
    }

    /// The key's value; `None` when it is deleted. `below` is asked where it goes on from what is underneath.
    pub fn value(
        &self,
        below: impl FnOnce() -> Result<Option<Value>, StoreError>,
    ) -> Result<Option<Value>, StoreError> {
        Ok(match &self.state {
            State::Absent => None,
            State::String(value) => Some(Value::String(value.clone())),
            State::Appended(tail) => Some(Value::String(match below()? {
                Some(Value::String(value)) => tail.over(&value),
                Some(Value::Stream(_)) | None => tail.over(b""),
            })),
            State::Stream(tail) => Some(Value::Stream(tail.meta)),
        })
    }
}

/// Changed keys.
#[derive(Debug)]
pub struct Overlay {
    shards: Vec<HashTable<Slot>>,
    keys: usize,
    bytes: usize,
    /// Strings underneath to which something was appended: they are written anew with it.
    below_bytes: usize,
    /// The last deletion.
    last_delete: Lsn,
    /// Kept where somebody counts keys.
    count: Option<Count>,
    /// What lies below gets the changes commit by commit, while they are here.
    drains: bool,
}

/// What changed keys add to the number of keys underneath.
#[derive(Debug, Default)]
pub struct Count {
    /// Hashes of the keys of which it is not known whether they exist underneath.
    uncounted: Vec<u64>,
    counted: usize,
    net: i64,
}

impl Count {
    /// True when it is known of every key.
    pub fn is_exact(&self) -> bool {
        self.uncounted.is_empty()
    }

    /// What the keys add. Those that are not counted yet are taken to be like the others.
    pub fn net(&self) -> i64 {
        match (self.counted, self.uncounted.len()) {
            (_, 0) => self.net,
            (0, uncounted) => uncounted as i64,
            (counted, uncounted) => self.net + (i128::from(self.net) * uncounted as i128 / counted as i128) as i64,
        }
    }

    /// Counts up to `lookups` keys, each for what `net_of` says that the one with this hash adds.
    fn go_on(
        &mut self,
        lookups: &mut usize,
        mut net_of: impl FnMut(u64) -> Result<i64, StoreError>,
    ) -> Result<(), StoreError> {
        while *lookups > 0
            && let Some(hash) = self.uncounted.pop()
        {
            *lookups -= 1;
            self.counted += 1;
            self.net += net_of(hash)?;
        }
        Ok(())
    }

    /// Finds out about up to `lookups` keys of `overlay`, which does not change any more.
    pub fn go_on_in(
        &mut self,
        overlay: &Overlay,
        lookups: &mut usize,
        mut exists_below: impl FnMut(u64, &[u8]) -> Result<bool, StoreError>,
    ) -> Result<(), StoreError> {
        self.go_on(lookups, |hash| {
            // Of two keys of one hash, which nobody meets by accident, the first counts twice.
            let shard = &overlay.shards[Overlay::shard(hash)];
            let Some(slot) = shard.find(hash, |slot| slot.hash == hash && slot.below.is_none()) else { return Ok(0) };
            Ok(i64::from(slot.exists()) - i64::from(exists_below(hash, &slot.key)?))
        })
    }
}

impl Default for Overlay {
    fn default() -> Overlay {
        Overlay {
            shards: (0..SHARDS).map(|_| HashTable::new()).collect(),
            keys: 0,
            bytes: 0,
            below_bytes: 0,
            last_delete: Lsn::ZERO,
            count: None,
            drains: false,
        }
    }
}

impl Overlay {
    /// Changed keys, deleted ones included.
    pub fn keys(&self) -> usize {
        self.keys
    }

    /// Memory in use, about.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What a file may need for it. A value that is longer than a page stands in twice its length at most, and so does what is inserted
    /// between others; what is written anew has its old place the next time.
    pub fn file_bytes_max(&self) -> u64 {
        2 * self.bytes as u64 + self.below_bytes as u64
    }

    /// The last commit that deleted a key.
    pub fn last_delete(&self) -> Lsn {
        self.last_delete
    }

    /// Keeps count from now on; it is empty.
    pub fn counted() -> Overlay {
        Overlay { count: Some(Count::default()), ..Overlay::default() }
    }

    /// What lies below gets the changes commit by commit, and then they are forgotten here; it is empty.
    pub fn draining() -> Overlay {
        Overlay { drains: true, ..Overlay::default() }
    }

    /// What the changed keys add to the number of keys underneath.
    pub fn count(&self) -> &Count {
        self.count.as_ref().expect("the store's overlays keep count")
    }

    /// Takes the count out: the overlay changes no more.
    pub fn take_count(&mut self) -> Count {
        self.count.take().unwrap_or_default()
    }

    /// Finds out about up to `lookups` keys whether they exist underneath.
    pub fn count_some(
        &mut self,
        lookups: &mut usize,
        mut exists_below: impl FnMut(u64, &[u8]) -> Result<bool, StoreError>,
    ) -> Result<(), StoreError> {
        let Some(count) = &mut self.count else { return Ok(()) };
        let shards = &mut self.shards;
        count.go_on(lookups, |hash| {
            let shard = &mut shards[Overlay::shard(hash)];
            let Some(slot) = shard.find_mut(hash, |slot| slot.hash == hash && slot.below.is_none()) else {
                return Ok(0);
            };
            slot.below = Some(exists_below(hash, &slot.key)?);
            Ok(slot.net())
        })
    }

    fn shard(hash: u64) -> usize {
        (hash >> SHARD_SHIFT) as usize
    }

    /// The key, if it changed.
    pub fn find(&self, hash: u64, key: &[u8]) -> Option<&Slot> {
        self.shards[Overlay::shard(hash)].find(hash, |slot| *slot.key == *key)
    }

    /// Every changed key, in no order.
    pub fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.shards.iter().flat_map(HashTable::iter)
    }

    /// Changed keys whose hash is `from` or greater, and less than `to` (none: all), in no order.
    pub fn slots_between(&self, from: u64, to: Option<u64>) -> impl Iterator<Item = &Slot> {
        let last = to.map_or(SHARDS - 1, Overlay::shard);
        let slots = self.shards[Overlay::shard(from)..=last].iter().flat_map(HashTable::iter);
        slots.filter(move |slot| slot.hash >= from && to.is_none_or(|to| slot.hash < to))
    }

    /// At least `count` changed keys in hash order from `from` on, and from where on there may be more.
    pub fn scan(&self, from: u64, count: usize) -> (Vec<&Slot>, Option<u64>) {
        let mut found: Vec<&Slot> = Vec::new();
        for shard in Overlay::shard(from)..SHARDS {
            let before = found.len();
            found.extend(self.shards[shard].iter().filter(|slot| slot.hash >= from));
            found[before..].sort_unstable_by_key(|slot| slot.hash);
            if found.len() >= count && shard + 1 < SHARDS {
                return (found, Some(((shard + 1) as u64) << SHARD_SHIFT));
            }
        }
        (found, None)
    }

    /// Makes a change. `below` is asked what the key holds underneath where that matters, and never for the value: what a change
    /// costs in memory is what its record says.
    pub fn apply(
        &mut self,
        effect: &Effect<'_>,
        version: Lsn,
        below: impl FnOnce(u64, &[u8]) -> Result<Option<About>, StoreError>,
    ) -> Result<u64, StoreError> {
        let key = effect.key();
        let hash = hash_of(key);
        if let Effect::Delete { .. } = effect {
            self.last_delete = self.last_delete.max(version);
        }
        let part_of = self.drains.then_some(version);
        let shard = &mut self.shards[Overlay::shard(hash)];
        if let Some(slot) = shard.find_mut(hash, |slot| *slot.key == *key) {
            slot.version = version;
            let net_before = slot.net();
            let (added, freed) = change(&mut slot.state, effect, part_of);
            self.bytes = (self.bytes + added).saturating_sub(freed);
            if let Some(count) = &mut self.count {
                count.net += slot.net() - net_before;
            }
            return Ok(hash);
        }
        let state = first_change(effect, part_of, || below(hash, key))?;
        self.bytes += ENTRY_BYTES + key.len() + state_bytes(&state);
        if let State::Appended(tail) = &state {
            self.below_bytes += tail.before;
        }
        self.keys += 1;
        let slot = Slot { hash, key: key.into(), version, state, below: None };
        if let Some(count) = &mut self.count {
            count.uncounted.push(hash);
        }
        shard.insert_unique(hash, slot, |slot| slot.hash);
        Ok(hash)
    }

    /// Forgets a key with this hash whose last change is `version`; a later change keeps it, but for what was appended up to there.
    pub fn forget(&mut self, hash: u64, version: Lsn) {
        let shard = &mut self.shards[Overlay::shard(hash)];
        if let Ok(found) = shard.find_entry(hash, |slot| slot.hash == hash && slot.version == version) {
            let (slot, _) = found.remove();
            self.keys -= 1;
            self.bytes = self.bytes.saturating_sub(ENTRY_BYTES + slot.key.len() + state_bytes(&slot.state));
        } else if let Some(slot) = shard.find_mut(hash, |slot| slot.hash == hash)
            && let State::Appended(tail) = &mut slot.state
        {
            self.bytes = self.bytes.saturating_sub(tail.forget(version));
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        let count = self.count.as_ref().map(|_| Count::default());
        *self = Overlay { count, drains: self.drains, ..Overlay::default() };
    }
}

fn state_bytes(state: &State) -> usize {
    match state {
        State::Absent => 0,
        State::String(value) => value.len(),
        State::Appended(tail) => tail.bytes.len(),
        State::Stream(tail) => tail.entries.iter().map(|entry| STREAM_ENTRY_BYTES + entry.1.len()).sum(),
    }
}

/// `value` with `bytes` behind it; in place when nobody else holds the value.
fn appended(value: Bytes, bytes: &[u8]) -> Bytes {
    match value.try_into_mut() {
        Ok(mut value) => {
            value.extend_from_slice(bytes);
            value.freeze()
        }
        Err(value) => [&value[..], bytes].concat().into(),
    }
}

/// Changes what a slot holds; gives the bytes that were added and those that were freed.
fn change(state: &mut State, effect: &Effect<'_>, part_of: Option<Lsn>) -> (usize, usize) {
    match *effect {
        Effect::Put { value, .. } => {
            let freed = state_bytes(state);
            *state = State::String(Bytes::copy_from_slice(value));
            (value.len(), freed)
        }
        Effect::Delete { .. } => {
            let freed = state_bytes(state);
            *state = State::Absent;
            (0, freed)
        }
        Effect::Append { bytes, .. } => {
            match state {
                State::String(value) => *value = appended(std::mem::take(value), bytes),
                State::Appended(tail) => tail.push(bytes, part_of),
                State::Absent | State::Stream(_) => *state = State::String(Bytes::copy_from_slice(bytes)),
            }
            (bytes.len(), 0)
        }
        Effect::StreamAdd { id, fields, .. } => {
            if let State::Stream(tail) = state {
                tail.meta = StreamMeta { entries: tail.meta.entries + 1, last_id: id };
                tail.entries.push((id, fields.into()));
            } else {
                let meta = StreamMeta { entries: 1, last_id: id };
                *state = State::Stream(StreamTail { meta, fresh: true, entries: vec![(id, fields.into())] });
            }
            (STREAM_ENTRY_BYTES + fields.len(), 0)
        }
    }
}

/// What a key that did not change before holds after its first change.
fn first_change(
    effect: &Effect<'_>,
    part_of: Option<Lsn>,
    below: impl FnOnce() -> Result<Option<About>, StoreError>,
) -> Result<State, StoreError> {
    Ok(match *effect {
        Effect::Put { value, .. } => State::String(Bytes::copy_from_slice(value)),
        Effect::Delete { .. } => State::Absent,
        Effect::Append { bytes, .. } => match below()? {
            Some(About::String(before)) => {
                let mut tail = StringTail { before, ..StringTail::default() };
                tail.push(bytes, part_of);
                State::Appended(Box::new(tail))
            }
            Some(About::Stream(_)) | None => State::String(Bytes::copy_from_slice(bytes)),
        },
        Effect::StreamAdd { id, fields, .. } => {
            let (fresh, entries) = match below()? {
                Some(About::Stream(meta)) => (false, meta.entries),
                Some(About::String(_)) | None => (true, 0),
            };
            let meta = StreamMeta { entries: entries + 1, last_id: id };
            State::Stream(StreamTail { meta, fresh, entries: vec![(id, fields.into())] })
        }
    })
}
