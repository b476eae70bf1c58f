//! Positions in the log and the other numbers that must never be mixed up.
//! Everything above uses these types; none of them knows a file or a socket.

use std::cmp::Ordering;
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

/// An epoch lies at most so many after the newest that a node knows.
pub const EPOCHS_AHEAD_MAX: u32 = 1 << 17;

/// A leadership. Its number (the low 32 bits) grows by one at every promotion and every start of a leader. Where no register
/// numbers the epochs, two nodes may begin the same number: a leader that was started again and the replica that was promoted
/// meanwhile. A random tag (the high 32 bits) tells the two apart; 0 where the register numbers them. As text: `3`,
/// with a tag `3-9f21c4aa`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch that follows this one, in the same line of leaders.
    pub fn next(self) -> Epoch {
        self.skip(1)
    }

    /// The epoch that lies so many later, in the same line of leaders.
    pub fn skip(self, epochs: u32) -> Epoch {
        Epoch(self.0 & !u64::from(u32::MAX) | u64::from(self.number().saturating_add(epochs)))
    }

    /// No member is so far behind another, nor a promise so far ahead of the register, that an epoch further on could be an honest
    /// one: who names it is not believed, so that nobody can use the numbers up.
    pub fn is_near(self, current: Epoch) -> bool {
        self.number().saturating_sub(current.number()) <= EPOCHS_AHEAD_MAX
    }

    /// The epoch that follows this one, begun without a register; `random` makes it this leader's own.
    pub fn next_alone(self, random: u64) -> Epoch {
        let tag = (random as u32).max(1);
        Epoch(u64::from(tag) << 32 | u64::from(self.next().number()))
    }

    /// How many leaderships there were in its line, with this one.
    pub fn number(self) -> u32 {
        self.0 as u32
    }

    /// What tells it from others with its number.
    fn tag(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

impl Ord for Epoch {
    fn cmp(&self, other: &Epoch) -> Ordering {
        (self.number(), self.tag()).cmp(&(other.number(), other.tag()))
    }
}

impl PartialOrd for Epoch {
    fn partial_cmp(&self, other: &Epoch) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.tag() {
            0 => self.number().fmt(f),
            tag => f.pad(&format!("{}-{tag:08x}", self.number())),
        }
    }
}

/// The text is not an epoch: a number, and where it has a tag `-` and 8 hexadecimal digits.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an epoch such as 3 or 3-9f21c4aa")]
pub struct EpochSyntax(String);

impl FromStr for Epoch {
    type Err = EpochSyntax;
    fn from_str(text: &str) -> Result<Epoch, EpochSyntax> {
        let decimal = |digits: &str| {
            let plain = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
            plain.then(|| digits.parse::<u32>().ok()).flatten()
        };
        let tag = |digits: &str| {
            let plain = digits.len() == 8 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
            plain.then(|| u32::from_str_radix(digits, 16).ok()).flatten().filter(|tag| *tag > 0)
        };
        let (number, tag) = match text.split_once('-') {
            Some((number, digits)) => (decimal(number), tag(digits)),
            None => (decimal(text), Some(0)),
        };
        let whole = number.zip(tag).map(|(number, tag)| Epoch(u64::from(tag) << 32 | u64::from(number)));
        whole.ok_or_else(|| EpochSyntax(text.to_owned()))
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
    fn epoch_next_alone_is_newer_and_leaders_own() {
        let before = Epoch(4);
        let (one, other) = (before.next_alone(0xABCD_0000_0001), before.next_alone(2));
        assert_ne!(one, other);
        assert!(before < one && one < other && other < one.next() && one.next() < one.next_alone(0).next());
        assert_eq!((one.number(), one.next().to_string().as_str()), (5, "6-00000001"));
        for epoch in [before, one, other, Epoch(u64::MAX), Epoch(u64::MAX).next()] {
            assert_eq!(epoch.to_string().parse(), Ok(epoch));
        }
        for wrong in ["", "-", "5-", "5-1", "-00000001", "5-00000000", "5-0000000x", "+5", "4294967296"] {
            assert!(wrong.parse::<Epoch>().is_err(), "{wrong:?} must not parse");
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
