//! What the log says, kept beside the nodes: every frame is read once, before any node may have recycled it. A store that was made
//! from a snapshot, or whose log is gone, has to hold the same.

use std::collections::BTreeMap;
use std::path::Path;

use walferry_applier::record::{Effect, StreamId, effects};
use walferry_applier::store::Store;
use walferry_applier::view::{Value, View};
use walferry_engine::lsn::Lsn;
use walferry_engine::reader::LogReader;

use crate::limits::SEGMENT_BYTES;

/// Keys that one step of a scan reads.
const SCANNED_AT_ONCE: usize = 1024;

/// It may be behind by so much, and never by a segment.
const BEHIND_BYTES_MAX: u64 = 32 << 10;

/// What a key holds.
#[derive(Debug, PartialEq, Eq)]
enum Held {
    String(Vec<u8>),
    Stream(Vec<(StreamId, Vec<u8>)>),
}

/// The state that the log up to `at` makes.
#[derive(Default)]
pub struct Model {
    at: Lsn,
    /// Log was gone before it was read.
    lost: bool,
    keys: BTreeMap<Vec<u8>, Held>,
}

impl Model {
    /// How far it has read.
    pub fn at(&self) -> Lsn {
        self.at
    }

    /// What follows here in the log is gone.
    pub fn lose(&mut self) {
        self.lost = true;
    }

    /// It knows nothing any more.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// Whether it has to read on, now that the log is confirmed up to `confirmed`.
    pub fn is_behind(&self, confirmed: Lsn) -> bool {
        let segment = |lsn: Lsn| lsn.segment(SEGMENT_BYTES);
        confirmed > self.at && (confirmed.since(self.at) > BEHIND_BYTES_MAX || segment(confirmed) > segment(self.at))
    }

    /// Reads up to `end` from a log that has it.
    pub fn read(&mut self, log_dir: &Path, end: Lsn) -> Result<(), String> {
        let mut reader = LogReader::open(log_dir, SEGMENT_BYTES, self.at, end).map_err(|error| error.to_string())?;
        while let Some(frame) = reader.next_frame().map_err(|error| error.to_string())? {
            if frame.header().end() > end {
                break;
            }
            for (_, record) in frame.records() {
                for effect in effects(record) {
                    self.apply(&effect.map_err(|error| error.to_string())?)?;
                }
            }
            self.at = frame.header().end();
        }
        Ok(())
    }

    fn apply(&mut self, effect: &Effect<'_>) -> Result<(), String> {
        let wrong = |what: &str| Err(format!("{what}: {effect:?}"));
        match *effect {
            Effect::Put { key, value } => drop(self.keys.insert(key.to_vec(), Held::String(value.to_vec()))),
            Effect::Delete { key } => drop(self.keys.remove(key)),
            Effect::Append { key, bytes } => {
                match self.keys.entry(key.to_vec()).or_insert_with(|| Held::String(Vec::new())) {
                    Held::String(value) => value.extend_from_slice(bytes),
                    Held::Stream(_) => return wrong("appended to a stream"),
                }
            }
            Effect::StreamAdd { key, id, fields } => {
                match self.keys.entry(key.to_vec()).or_insert_with(|| Held::Stream(Vec::new())) {
                    Held::Stream(all) if all.last().is_none_or(|(last, _)| *last < id) => {
                        all.push((id, fields.to_vec()))
                    }
                    _ => return wrong("added to what is no stream, or not at its end"),
                }
            }
        }
        Ok(())
    }

    /// Where the store differs, if it does.
    pub fn compare(&self, store: &Store) -> Result<(), String> {
        let failed = |error: walferry_applier::store::StoreError| error.to_string();
        let (mut count, mut cursor) = (0, 0);
        loop {
            let (next, keys) = store.scan(cursor, SCANNED_AT_ONCE).map_err(failed)?;
            (count, cursor) = (count + keys.len() as u64, next);
            if cursor == 0 {
                break;
            }
        }
        let counted = store.counted_keys().map_err(failed)?;
        if counted.is_exact && counted.keys != count {
            return Err(format!("the store has {count} keys and counts {}", counted.keys));
        }
        if count != self.keys.len() as u64 {
            return Err(format!("the store has {count} keys, the log makes {}", self.keys.len()));
        }
        for (key, held) in &self.keys {
            let same = match (store.get(key).map_err(failed)?, held) {
                (Some(Value::String(found)), Held::String(value)) => found[..] == value[..],
                (Some(Value::Stream(meta)), Held::Stream(all)) => {
                    let mut found = Vec::new();
                    let mut take = |id: StreamId, fields: &[u8]| {
                        found.push((id, fields.to_vec()));
                        true
                    };
                    let ends = ((0, 0), (u64::MAX, u64::MAX));
                    store.stream_range(key, ends.0, ends.1, false, usize::MAX, &mut take).map_err(failed)?;
                    found == *all && meta.entries == all.len() as u64
                }
                _ => false,
            };
            if !same {
                return Err(format!("{} is not what the log says", String::from_utf8_lossy(key)));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_holds_what_the_effects_make() {
        let mut model = Model::default();
        let fields: &[u8] = b"\x01f\x01v";
        for effect in [
            Effect::Put { key: b"k", value: b"one" },
            Effect::Append { key: b"k", bytes: b", two" },
            Effect::Append { key: b"new", bytes: b"x" },
            Effect::Put { key: b"gone", value: b"" },
            Effect::Delete { key: b"gone" },
            Effect::StreamAdd { key: b"s", id: (1, 2), fields },
        ] {
            model.apply(&effect).expect("fits");
        }
        let held: Vec<&Held> = model.keys.values().collect();
        let stream = Held::Stream(vec![((1, 2), fields.to_vec())]);
        assert_eq!(held, [&Held::String(b"one, two".to_vec()), &Held::String(b"x".to_vec()), &stream]);
        assert!(model.apply(&Effect::StreamAdd { key: b"s", id: (1, 2), fields }).is_err(), "an id comes once");
        assert!(model.apply(&Effect::Append { key: b"s", bytes: b"" }).is_err(), "no string");
        assert!(model.is_behind(Lsn(SEGMENT_BYTES)) && !model.is_behind(Lsn(4096)));
    }
}
