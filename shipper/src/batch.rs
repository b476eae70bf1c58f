//! What goes to a socket in one `sendmsg`: the rest of a frame, small messages, and frames straight from the log buffer,
//! each an envelope and its header and payload without padding. Built and accounted by `link.rs`.

use walferry_cluster::message::{ENVELOPE_BYTES, frame_envelope};
use walferry_engine::log::Log;
use walferry_engine::lsn::Lsn;

use crate::traces::Traces;

/// Frames in a batch; each takes two of the kernel's 1024 vectors.
const BATCH_FRAMES_MAX: usize = 64;
/// A batch that reached this takes no further frame.
const BATCH_BYTES_MAX: usize = 4 << 20;
const _: () = assert!(BATCH_FRAMES_MAX * 2 + 2 <= 1024);

/// A frame of which the socket has taken a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PartialFrame {
    pub(crate) lsn: Lsn,
    /// Of `ENVELOPE_BYTES + wire_bytes`.
    pub(crate) sent_bytes: usize,
    pub(crate) wire_bytes: usize,
    /// The replica is asked where its time for it goes.
    pub(crate) traced: bool,
}

impl PartialFrame {
    pub(crate) fn left_bytes(&self) -> usize {
        ENVELOPE_BYTES + self.wire_bytes - self.sent_bytes
    }
}

/// One part of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Piece {
    /// The rest of a frame.
    Rest(PartialFrame),
    /// All of the batch's small messages.
    Control,
    /// A whole frame.
    Frame {
        /// The frame, nothing of it sent.
        frame: PartialFrame,
        /// Where it ends in the log.
        end: Lsn,
        /// The flushed LSN in its header.
        flushed: Lsn,
        /// The commit LSN in its header.
        committed: Lsn,
    },
}

/// What goes to a socket at once. The vectors point into the log buffer, which must not change under them.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) pieces: Vec<Piece>,
    pub(crate) control: Vec<u8>,
    envelopes: Vec<[u8; ENVELOPE_BYTES]>,
    vectors: Vec<libc::iovec>,
    bytes: usize,
}

// SAFETY of the vectors: `gather` points them at `control` and `envelopes`, which do not grow until the next `gather`,
// and at log memory, which the caller keeps in place until the send is over.
impl Batch {
    /// Fills the batch: what is left of `rest`, then `control`, then frames from `position` up to `until`.
    pub(crate) fn gather(
        &mut self,
        log: &Log,
        rest: Option<PartialFrame>,
        control: Vec<u8>,
        position: Lsn,
        until: Lsn,
        traces: &Traces,
    ) {
        self.pieces.clear();
        self.vectors.clear();
        self.envelopes.clear();
        self.control = control;
        self.bytes = 0;
        if let Some(rest) = rest {
            self.pieces.push(Piece::Rest(rest));
            self.bytes += rest.left_bytes();
        }
        if !self.control.is_empty() {
            self.pieces.push(Piece::Control);
            self.bytes += self.control.len();
        }
        let (mut at, mut frames) = (position, 0);
        while at < until && frames < BATCH_FRAMES_MAX && self.bytes < BATCH_BYTES_MAX {
            let hot = log.hot_frame(at).expect("the hot path sends only frames that are in the log buffer");
            let wire_bytes = hot.wire_bytes().len();
            let traced = traces.contains(at, hot.end());
            let frame = PartialFrame { lsn: at, sent_bytes: 0, wire_bytes, traced };
            let (flushed, committed) = (hot.header().flushed, hot.header().committed);
            self.pieces.push(Piece::Frame { frame, end: hot.end(), flushed, committed });
            self.bytes += frame.left_bytes();
            at = hot.end();
            frames += 1;
        }
        self.point(log);
    }

    /// Makes the vectors, once nothing that they point to will move any more.
    fn point(&mut self, log: &Log) {
        let frame_of = |piece: &Piece| match piece {
            Piece::Rest(frame) | Piece::Frame { frame, .. } => Some(*frame),
            Piece::Control => None,
        };
        let envelopes =
            self.pieces.iter().filter_map(frame_of).map(|frame| frame_envelope(frame.wire_bytes, frame.traced));
        self.envelopes.extend(envelopes);
        let mut envelopes = self.envelopes.iter();
        let mut add = |bytes: &[u8]| {
            if !bytes.is_empty() {
                let iov_base = bytes.as_ptr().cast_mut().cast();
                self.vectors.push(libc::iovec { iov_base, iov_len: bytes.len() });
            }
        };
        for piece in &self.pieces {
            let Some(frame) = frame_of(piece) else {
                add(&self.control);
                continue;
            };
            let hot = log.hot_frame(frame.lsn).expect("pinned, or just gathered");
            add(&envelopes.next().expect("one for each frame")[frame.sent_bytes.min(ENVELOPE_BYTES)..]);
            add(&hot.wire_bytes()[frame.sent_bytes.saturating_sub(ENVELOPE_BYTES)..]);
        }
    }

    /// Bytes in the batch.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The oldest log memory that the batch points to.
    pub(crate) fn oldest(&self) -> Option<Lsn> {
        self.pieces.iter().find_map(|piece| match piece {
            Piece::Rest(frame) | Piece::Frame { frame, .. } => Some(frame.lsn),
            Piece::Control => None,
        })
    }

    /// Where the batch's last whole frame ends in the log.
    pub(crate) fn end(&self) -> Option<Lsn> {
        self.pieces.iter().rev().find_map(|piece| match piece {
            Piece::Frame { end, .. } => Some(*end),
            Piece::Rest(_) | Piece::Control => None,
        })
    }

    /// The message for `sendmsg`; points to the batch's vectors.
    pub(crate) fn header(&mut self) -> libc::msghdr {
        // SAFETY: all zeros is a valid message without address and control data.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = self.vectors.as_mut_ptr();
        header.msg_iovlen = self.vectors.len() as _;
        header
    }
}
