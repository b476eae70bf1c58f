//! The read side of a store: what commands ask. Implemented by the durable `Store` and by `PendingView`, which lays the leader's
//! not yet durable changes over it.

use bytes::Bytes;
use walferry_engine::lsn::Lsn;

use crate::record::StreamId;
use crate::store::error::StoreError;

/// What a key can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A string.
    String,
    /// A stream.
    Stream,
}

/// A stream without its entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamMeta {
    /// How many entries it has.
    pub entries: u64,
    /// The id of the last one.
    pub last_id: StreamId,
}

/// What a key holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A string.
    String(Bytes),
    /// A stream; `View::stream_range` reads its entries.
    Stream(StreamMeta),
}

/// What there is to know of a key's value without its bytes: never a copy of the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// A string of this length.
    String(usize),
    /// A stream.
    Stream(StreamMeta),
}

impl About {
    /// Which of the two.
    pub fn kind(&self) -> Kind {
        match self {
            About::String(_) => Kind::String,
            About::Stream(_) => Kind::Stream,
        }
    }
}

/// The state of all keys at one moment.
pub trait View {
    /// The key's value and the LSN of the last commit that changed it; `None` for a key that does not exist.
    fn entry(&self, key: &[u8]) -> Result<Option<(Value, Lsn)>, StoreError>;

    /// What the key holds, if it exists, and a bound on the commit that changed it last: no commit behind that LSN did. For a key that
    /// exists, or was deleted lately, it is that very commit.
    fn about(&self, key: &[u8]) -> Result<(Option<About>, Lsn), StoreError>;

    /// Calls `each` with id and encoded fields of up to `limit` entries from `from` to `to`, both included, in ascending order or
    /// in `reverse`, until it returns false. A key without a stream has no entries.
    fn stream_range(
        &self,
        key: &[u8],
        from: StreamId,
        to: StreamId,
        reverse: bool,
        limit: usize,
        each: &mut dyn FnMut(StreamId, &[u8]) -> bool,
    ) -> Result<(), StoreError>;

    /// At least `count` keys in hash order from `cursor` on (all that share a hash, so possibly more), and the cursor to go on
    /// with; 0 after the last. A key that exists during a whole iteration is returned at least once.
    fn scan(&self, cursor: u64, count: usize) -> Result<(u64, Vec<Vec<u8>>), StoreError>;

    /// The key's value.
    fn get(&self, key: &[u8]) -> Result<Option<Value>, StoreError> {
        Ok(self.entry(key)?.map(|entry| entry.0))
    }

    /// What the key holds, if it exists.
    fn kind(&self, key: &[u8]) -> Result<Option<Kind>, StoreError> {
        Ok(self.about(key)?.0.map(|about| about.kind()))
    }
}
