//! What a disk was asked to do, in order: each write with its bytes, each flush, when it arrived and when it was answered.
//! Core: no I/O, no clock; a [`Moment`] is a count of events, which also stamps the acknowledgements that clients saw.
//!
//! ```text
//! a cut at moment N:   flushed = the latest arrival among the flushes that were answered by N
//!                      a write answered before `flushed`, or a forced one answered by N   must be there
//!                      any other write that arrived by N                                  may be, whole or in parts
//! ```
//!
//! A flush covers what was answered before it *arrived*: a write that was on its way beside it is not covered.

/// The disk tears writes at this size.
pub const SECTOR_BYTES: usize = 512;

/// A position in the order of everything that happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub u64);

/// What a write put on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// These bytes.
    Bytes(Vec<u8>),
    /// So many zeros; segments are prepared with them, and they would fill the memory.
    Zeros(usize),
}

impl Content {
    /// Takes bytes, keeps zeros short.
    pub fn new(bytes: Vec<u8>) -> Content {
        if bytes.iter().all(|byte| *byte == 0) { Content::Zeros(bytes.len()) } else { Content::Bytes(bytes) }
    }

    /// How long it is.
    pub fn len(&self) -> usize {
        match self {
            Content::Bytes(bytes) => bytes.len(),
            Content::Zeros(length) => *length,
        }
    }

    /// Copies the part from `from` on into `into`.
    pub fn copy(&self, from: usize, into: &mut [u8]) {
        match self {
            Content::Bytes(bytes) => into.copy_from_slice(&bytes[from..from + into.len()]),
            Content::Zeros(_) => into.fill(0),
        }
    }
}

/// One write.
#[derive(Clone, Debug)]
pub struct Write {
    /// Where, in bytes.
    pub offset: u64,
    /// What.
    pub content: Content,
    /// Durable when it is answered, without a flush (FUA).
    pub forced: bool,
    /// The disk got it.
    pub arrived: Moment,
    /// The disk said that it is written; `arrived < answered`.
    pub answered: Option<Moment>,
}

/// One flush.
#[derive(Clone, Copy, Debug)]
pub struct Flush {
    /// The disk got it.
    pub arrived: Moment,
    /// The disk said that everything is durable.
    pub answered: Moment,
}

/// Everything since the recording began.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// Writes in the order of their arrival.
    pub writes: Vec<Write>,
    /// Flushes in the order of their answers.
    pub flushes: Vec<Flush>,
    /// What the writes hold, zeros aside.
    pub bytes: u64,
}

/// A write as it stands at a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It must be there.
    Durable,
    /// It may be.
    Uncertain,
}

impl Trace {
    /// Notes a write that arrived; the number names it when it is answered.
    pub fn write(&mut self, offset: u64, content: Content, forced: bool, arrived: Moment) -> usize {
        self.bytes += if let Content::Bytes(bytes) = &content { bytes.len() as u64 } else { 0 };
        self.writes.push(Write { offset, content, forced, arrived, answered: None });
        self.writes.len() - 1
    }

    /// The last thing that a cut at `at` must find flushed: whatever was answered before this moment.
    pub fn flushed(&self, at: Moment) -> Moment {
        let done = self.flushes.iter().filter(|flush| flush.answered <= at);
        done.map(|flush| flush.arrived).max().unwrap_or_default()
    }

    /// The writes that reached the disk by `at`, in the order in which it took them, and what became of each.
    pub fn at(&self, at: Moment) -> Vec<(&Write, Standing)> {
        let flushed = self.flushed(at);
        let answered = |write: &Write| write.answered.filter(|answered| *answered <= at);
        let standing = |write: &Write| match answered(write) {
            Some(answered) if answered < flushed || write.forced => Standing::Durable,
            _ => Standing::Uncertain,
        };
        let mut found: Vec<_> = self.writes.iter().filter(|write| write.arrived <= at).collect();
        // Those without an answer are the last: the disk may have done them at any time since.
        found.sort_by_key(|write| (answered(write).is_none(), answered(write), write.arrived));
        found.into_iter().map(|write| (write, standing(write))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(arrived: u64, answered: Option<u64>, forced: bool) -> Write {
        let answered = answered.map(Moment);
        Write { offset: arrived, content: Content::Zeros(1), forced, arrived: Moment(arrived), answered }
    }

    #[test]
    fn a_flush_covers_what_was_answered_before_it_arrived() {
        let trace = Trace {
            // Answered before the flush; answered while it was under way; forced; not answered; later.
            writes: vec![
                write(1, Some(2), false),
                write(3, Some(5), false),
                write(6, Some(8), true),
                write(7, None, false),
                write(20, Some(21), false),
            ],
            flushes: vec![Flush { arrived: Moment(4), answered: Moment(9) }],
            bytes: 0,
        };
        let at = |moment| {
            let found = trace.at(Moment(moment));
            found.iter().map(|(write, standing)| (write.offset, *standing == Standing::Durable)).collect::<Vec<_>>()
        };
        assert_eq!(at(0), []);
        assert_eq!(at(5), [(1, false), (3, false)], "the flush has not been answered");
        assert_eq!(at(7), [(1, false), (3, false), (6, false), (7, false)], "nor the forced write");
        assert_eq!(at(9), [(1, true), (3, false), (6, true), (7, false)]);
        assert_eq!(at(21), [(1, true), (3, false), (6, true), (20, false), (7, false)]);
    }

    #[test]
    fn zeros_are_kept_short_and_read_as_zeros() {
        let zeros = Content::new(vec![0; 1 << 20]);
        assert_eq!((&zeros, zeros.len()), (&Content::Zeros(1 << 20), 1 << 20));
        let mut into = [1; 4];
        zeros.copy(8, &mut into);
        assert_eq!(into, [0; 4]);
        Content::new(vec![0, 1, 2, 3]).copy(2, &mut into[..2]);
        assert_eq!(into, [2, 3, 0, 0]);
    }
}
