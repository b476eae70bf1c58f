//! Positions in the log and the other numbers that must never be mixed up.
//! Everything above uses these types; none of them knows a file or a socket.

use std::fmt;
use std::ops::Sub;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A byte position in the log. Always an exclusive end: "everything before this byte".
/// Printed as PostgreSQL prints it, `16/B374D848` (high and low half in hex).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Lsn(pub u64);

impl Lsn {
    /// The beginning of every log.
    pub const ZERO: Lsn = Lsn(0);
    /// Beyond every position; a bound for "nothing holds this back".
    pub const MAX: Lsn = Lsn(u64::MAX);

    /// The position `bytes` further on.
    pub fn advance(self, bytes: u64) -> Lsn {
        Lsn(self.0 + bytes)
    }

    /// The segment that holds the byte at this position.
    pub fn segment(self, segment_bytes: u64) -> SegmentNo {
        SegmentNo(self.0 / segment_bytes)
    }

    /// The offset of this position in its segment's file, in bytes.
    pub fn offset(self, segment_bytes: u64) -> u64 {
        self.0 % segment_bytes
    }

    /// Bytes from `earlier` to here, 0 when `earlier` is in fact later.
    pub fn since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// `later - earlier` is bytes of lag.
impl Sub for Lsn {
    type Output = u64;
    fn sub(self, earlier: Lsn) -> u64 {
        self.0 - earlier.0
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 as u32)
    }
}

/// What was given is not an LSN.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not an LSN: expected two hexadecimal halves such as 16/B374D848")]
pub struct LsnSyntax(String);

impl FromStr for Lsn {
    type Err = LsnSyntax;
    fn from_str(text: &str) -> Result<Lsn, LsnSyntax> {
        let half = |digits: &str| {
            let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
            plain.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
        };
        text.split_once('/')
            .and_then(|(high, low)| Some((half(high)?, half(low)?)))
            .map(|(high, low)| Lsn(u64::from(high) << 32 | u64::from(low)))
            .ok_or_else(|| LsnSyntax(text.to_owned()))
    }
}

impl TryFrom<String> for Lsn {
    type Error = LsnSyntax;
    fn try_from(text: String) -> Result<Lsn, LsnSyntax> {
        text.parse()
    }
}

impl From<Lsn> for String {
    fn from(lsn: Lsn) -> String {
        lsn.to_string()
    }
}

/// The number of a leadership; grows by one at every promotion and every start of a leader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch that follows this one.
    pub fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The number of a segment: the LSN of its first byte divided by the segment size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentNo(pub u64);

impl SegmentNo {
    /// The position of the segment's first byte.
    pub fn start(self, segment_bytes: u64) -> Lsn {
        Lsn(self.0 * segment_bytes)
    }

    /// The segment that follows this one.
    pub fn next(self) -> SegmentNo {
        SegmentNo(self.0 + 1)
    }

    /// The name of the segment's file: 16 hexadecimal digits and `.wal`.
    pub fn file_name(self) -> String {
        format!("{:016X}.wal", self.0)
    }

    /// The segment that a file of this name holds, if it is one.
    pub fn from_file_name(name: &str) -> Option<SegmentNo> {
        let digits = name.strip_suffix(".wal").filter(|d| d.len() == 16)?;
        u64::from_str_radix(digits, 16).ok().map(SegmentNo)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lsn_prints_and_parses_as_postgresql_does() {
        let lsn = Lsn(0x16_B374_D848);
        assert_eq!(lsn.to_string(), "16/B374D848");
        assert_eq!("16/B374D848".parse(), Ok(lsn));
        assert_eq!("0/0".parse(), Ok(Lsn::ZERO));
        for wrong in ["", "16", "/", "1/", "x/1", "1/123456789", "+1/2", "1/2/3"] {
            assert!(wrong.parse::<Lsn>().is_err(), "{wrong:?} must not parse");
        }
    }

    #[test]
    fn segment_names_round_trip() {
        let name = SegmentNo(0x1F).file_name();
        assert_eq!(name, "000000000000001F.wal");
        assert_eq!(SegmentNo::from_file_name(&name), Some(SegmentNo(0x1F)));
        assert_eq!(SegmentNo::from_file_name("1F.wal"), None);
        assert_eq!(SegmentNo::from_file_name("000000000000001F.tmp"), None);
    }
}
