//! A record: the changes of one client commit, as they stand in the log. The leader encodes what a command did, every node
//! decodes and applies it; nobody executes a command twice. Pure bytes.
//!
//! ```text
//! record   effect, effect, ...
//! effect   tag 1 | key bytes | per tag:
//!   1 put         value bytes
//!   2 delete
//!   3 append      bytes
//!   4 stream add  id: milliseconds 8, sequence 8 (little-endian) | fields bytes
//! bytes    length as LEB128 (at most 5 bytes) | that many bytes
//! fields   bytes, bytes, ...: field and value in turn
//! ```

/// The id of a stream entry: milliseconds and sequence.
pub type StreamId = (u64, u64);

const PUT: u8 = 1;
const DELETE: u8 = 2;
const APPEND: u8 = 3;
const STREAM_ADD: u8 = 4;

/// One change of a key, as the record holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect<'a> {
    /// The key holds this string, whatever it held before.
    Put {
        /// The key.
        key: &'a [u8],
        /// The whole value.
        value: &'a [u8],
    },
    /// The key is gone.
    Delete {
        /// The key.
        key: &'a [u8],
    },
    /// The key's string is longer by this; an absent key was empty.
    Append {
        /// The key.
        key: &'a [u8],
        /// What comes after the value.
        bytes: &'a [u8],
    },
    /// The key's stream has one more entry at its end; an absent key was empty.
    StreamAdd {
        /// The key.
        key: &'a [u8],
        /// Greater than every id in the stream.
        id: StreamId,
        /// Fields and values, as `Fields` reads them.
        fields: &'a [u8],
    },
}

/// The record is not one that this build wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("byte {at} of the record: {reason}")]
pub struct RecordError {
    /// Where, from 0.
    pub at: usize,
    /// What is wrong.
    pub reason: &'static str,
}

fn push_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    let mut length = u32::try_from(bytes.len()).expect("nothing in a record reaches 4 GiB");
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend_from_slice(bytes);
}

/// Takes length and bytes off the front of `rest`; allocates nothing, whatever the length says.
fn take_bytes<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let mut length = 0_u64;
    for (index, &byte) in rest.iter().enumerate().take(5) {
        length |= u64::from(byte & 0x7f) << (7 * index);
        if byte < 0x80 {
            let (bytes, after) = rest[index + 1..].split_at_checked(usize::try_from(length).ok()?)?;
            *rest = after;
            return Some(bytes);
        }
    }
    None
}

impl<'a> Effect<'a> {
    /// The key that changes.
    pub fn key(&self) -> &'a [u8] {
        match *self {
            Effect::Put { key, .. }
            | Effect::Delete { key }
            | Effect::Append { key, .. }
            | Effect::StreamAdd { key, .. } => key,
        }
    }

    /// Appends the effect to a record.
    pub fn encode_into(&self, record: &mut Vec<u8>) {
        let (tag, key) = match self {
            Effect::Put { key, .. } => (PUT, key),
            Effect::Delete { key } => (DELETE, key),
            Effect::Append { key, .. } => (APPEND, key),
            Effect::StreamAdd { key, .. } => (STREAM_ADD, key),
        };
        record.push(tag);
        push_bytes(record, key);
        match self {
            Effect::Put { value: bytes, .. } | Effect::Append { bytes, .. } => push_bytes(record, bytes),
            Effect::Delete { .. } => {}
            Effect::StreamAdd { id, fields, .. } => {
                record.extend_from_slice(&id.0.to_le_bytes());
                record.extend_from_slice(&id.1.to_le_bytes());
                push_bytes(record, fields);
            }
        }
    }
}

/// The effects of a record in order. Ends after the first error.
#[derive(Clone, Debug)]
pub struct Effects<'a> {
    rest: &'a [u8],
    bytes: usize,
}

/// Reads `record`; borrows from it.
pub fn effects(record: &[u8]) -> Effects<'_> {
    Effects { rest: record, bytes: record.len() }
}

impl<'a> Effects<'a> {
    fn next_effect(&mut self) -> Result<Effect<'a>, &'static str> {
        let (&tag, rest) = self.rest.split_first().ok_or("nothing where an effect begins")?;
        let mut rest = rest;
        let mut bytes = || take_bytes(&mut rest).ok_or("a length runs over the end");
        let effect = match tag {
            PUT => Effect::Put { key: bytes()?, value: bytes()? },
            DELETE => Effect::Delete { key: bytes()? },
            APPEND => Effect::Append { key: bytes()?, bytes: bytes()? },
            STREAM_ADD => {
                let key = bytes()?;
                let (id, after) = rest.split_at_checked(16).ok_or("a stream id is cut short")?;
                rest = after;
                let half = |at: usize| u64::from_le_bytes(id[at..at + 8].try_into().expect("eight bytes"));
                let fields = take_bytes(&mut rest).ok_or("a length runs over the end")?;
                Effect::StreamAdd { key, id: (half(0), half(8)), fields }
            }
            _ => return Err("no effect has this tag"),
        };
        self.rest = rest;
        Ok(effect)
    }
}

impl<'a> Iterator for Effects<'a> {
    type Item = Result<Effect<'a>, RecordError>;

    fn next(&mut self) -> Option<Result<Effect<'a>, RecordError>> {
        if self.rest.is_empty() {
            return None;
        }
        let at = self.bytes - self.rest.len();
        Some(self.next_effect().map_err(|reason| {
            self.rest = &[];
            RecordError { at, reason }
        }))
    }
}

/// The fields and values of a stream entry in turn. Ends early where the bytes are not what `push` wrote.
#[derive(Clone, Debug)]
pub struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    /// Reads what `push` wrote.
    pub fn new(encoded: &'a [u8]) -> Fields<'a> {
        Fields { rest: encoded }
    }

    /// Appends a field or a value.
    pub fn push(encoded: &mut Vec<u8>, part: &[u8]) {
        push_bytes(encoded, part);
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        take_bytes(&mut self.rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effects_round_trip() {
        let long = vec![7; 300_000];
        let all = [
            Effect::Put { key: b"k", value: b"" },
            Effect::Put { key: b"", value: &long },
            Effect::Delete { key: b"gone" },
            Effect::Append { key: b"k", bytes: b"more" },
            Effect::StreamAdd { key: b"s", id: (u64::MAX, 7), fields: b"\x01f\x01v" },
        ];
        let mut record = Vec::new();
        all.iter().for_each(|effect| effect.encode_into(&mut record));
        let read: Vec<_> = effects(&record).map(|effect| effect.expect("what was encoded")).collect();
        assert_eq!(read, all);
    }

    #[test]
    fn any_bytes_are_read_without_panic_and_every_cut_is_an_error() {
        let mut record = Vec::new();
        Effect::StreamAdd { key: b"stream", id: (1, 2), fields: b"\x05field\x05value" }.encode_into(&mut record);
        for cut in 1..record.len() {
            assert!(effects(&record[..cut]).any(|effect| effect.is_err()), "cut at {cut}");
        }
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        for _ in 0..20_000 {
            let noise: Vec<u8> = (0..24)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 59) as u8
                })
                .collect();
            assert!(effects(&noise).count() <= noise.len());
        }
    }

    #[test]
    fn fields_round_trip() {
        let mut encoded = Vec::new();
        for part in [&b"field"[..], b"", b"value"] {
            Fields::push(&mut encoded, part);
        }
        assert_eq!(Fields::new(&encoded).collect::<Vec<_>>(), [&b"field"[..], b"", b"value"]);
    }
}
