//! The leader's changes that are not durable yet, laid over the store: what the next command executes against. Each is
//! forgotten when the store has it. Knows no log; the node tells it the LSNs.

use std::collections::VecDeque;

use walferry_engine::lsn::Lsn;

use crate::record::{StreamId, effects};
use crate::store::overlay::{Overlay, State, hash_of};
use crate::store::{Store, StoreError};
use crate::view::{About, Value, View};

/// Changes between the store's applied LSN and the end of the log. Bounded by the log buffer.
#[derive(Debug)]
pub struct Pending {
    overlay: Overlay,
    /// The LSN and the key's hash of each change, in order.
    order: VecDeque<(Lsn, u64)>,
}

impl Default for Pending {
    fn default() -> Pending {
        Pending { overlay: Overlay::draining(), order: VecDeque::new() }
    }
}

impl Pending {
    /// True when the store has everything.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Memory in use, about.
    pub fn bytes(&self) -> usize {
        self.overlay.bytes()
    }

    /// The record that ends at `lsn` was appended.
    pub fn record(&mut self, lsn: Lsn, record: &[u8], store: &Store) -> Result<(), StoreError> {
        for effect in effects(record) {
            let effect = effect.map_err(|source| StoreError::Record { lsn, source })?;
            let hash = self.overlay.apply(&effect, lsn, |_, key| Ok(store.about(key)?.0))?;
            self.order.push_back((lsn, hash));
        }
        Ok(())
    }

    /// The store has everything up to `applied`.
    pub fn forget(&mut self, applied: Lsn) {
        while let Some(&(lsn, hash)) = self.order.front() {
            if lsn > applied {
                break;
            }
            self.order.pop_front();
            self.overlay.forget(hash, lsn);
        }
    }

    /// Keys with changes.
    pub fn keys(&self) -> usize {
        self.overlay.keys()
    }

    /// The leadership ended: what is pending will not be read any more.
    pub fn clear(&mut self) {
        self.order.clear();
        self.overlay.clear();
    }

    /// The newest state: these changes over `store`.
    pub fn over<'a>(&'a self, store: &'a Store) -> PendingView<'a> {
        PendingView { pending: self, store }
    }
}

/// The store with the leader's pending changes over it.
#[derive(Clone, Copy)]
pub struct PendingView<'a> {
    pending: &'a Pending,
    store: &'a Store,
}

impl PendingView<'_> {
    /// What the pending changes add to the number of keys in the store: a lookup for each.
    pub fn net_keys(&self) -> Result<i64, StoreError> {
        let mut net = 0;
        for slot in self.pending.overlay.slots() {
            let below = self.store.kind(&slot.key)?.is_some();
            net += i64::from(!matches!(slot.state, State::Absent)) - i64::from(below);
        }
        Ok(net)
    }
}

impl View for PendingView<'_> {
    fn about(&self, key: &[u8]) -> Result<(Option<About>, Lsn), StoreError> {
        match self.pending.overlay.find(hash_of(key), key) {
            Some(slot) => Ok((slot.about(), slot.version)),
            None => self.store.about(key),
        }
    }

    fn entry(&self, key: &[u8]) -> Result<Option<(Value, Lsn)>, StoreError> {
        match self.pending.overlay.find(hash_of(key), key) {
            Some(slot) => Ok(slot.value(|| self.store.get(key))?.map(|value| (value, slot.version))),
            None => self.store.entry(key),
        }
    }

    fn stream_range(
        &self,
        key: &[u8],
        from: StreamId,
        to: StreamId,
        reverse: bool,
        limit: usize,
        each: &mut dyn FnMut(StreamId, &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        let tail = match self.pending.overlay.find(hash_of(key), key).map(|slot| &slot.state) {
            Some(State::Stream(tail)) => tail,
            Some(State::Absent | State::String(_) | State::Appended(_)) => return Ok(()),
            None => return self.store.stream_range(key, from, to, reverse, limit, each),
        };
        // The store may have the first of the pending entries already.
        let below = match self.store.about(key)?.0 {
            Some(About::Stream(meta)) if !tail.fresh => Some(meta.last_id),
            _ => None,
        };
        let newer = tail.between(from, to, below);
        let mut left = limit;
        let mut wants_more = true;
        let mut counted = |id: StreamId, fields: &[u8]| {
            left -= 1;
            wants_more = each(id, fields) && left > 0;
            wants_more
        };
        if limit == 0 || (reverse && !newer.iter().rev().all(|(id, fields)| counted(*id, fields))) {
            return Ok(());
        }
        if !tail.fresh {
            self.store.stream_range(key, from, to, reverse, limit, &mut counted)?;
        }
        if !reverse && wants_more {
            let mut each = |id: StreamId, fields: &[u8]| {
                left -= 1;
                each(id, fields) && left > 0
            };
            newer.iter().all(|(id, fields)| each(*id, fields));
        }
        Ok(())
    }

    fn scan(&self, cursor: u64, count: usize) -> Result<(u64, Vec<Vec<u8>>), StoreError> {
        let (next, mut keys) = self.store.scan(cursor, count)?;
        let overlay = &self.pending.overlay;
        let to = (next > 0).then_some(next);
        let mut changed: Vec<_> = overlay.slots_between(cursor, to).collect();
        let mut end = to;
        if changed.len() > count {
            changed.sort_unstable_by_key(|slot| slot.hash());
            // All keys of one hash come together.
            let last = changed[count.max(1) - 1].hash();
            if let Some(after) = changed.iter().map(|slot| slot.hash()).find(|hash| *hash > last) {
                end = Some(after);
            }
        }
        let inside = |hash: u64| end.is_none_or(|end| hash < end);
        keys.retain(|key| inside(hash_of(key)) && overlay.find(hash_of(key), key).is_none());
        let exist = changed.into_iter().filter(|slot| inside(slot.hash()) && !matches!(slot.state, State::Absent));
        keys.extend(exist.map(|slot| slot.key.to_vec()));
        Ok((end.unwrap_or(0), keys))
    }
}
