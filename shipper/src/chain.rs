//! Whether a replica's log ends with the very frame that ours has there. The epochs say where the logs agree; the chain
//! of checksums proves it. Reads one header, from memory or from a segment file; called once per handshake.

use std::fs::File;
use std::os::unix::fs::FileExt;

use walferry_cluster::message::{Hello, Refuse};
use walferry_engine::frame::UnverifiedFrame;
use walferry_engine::limits::FRAME_HEADER_BYTES;
use walferry_engine::log::Log;
use walferry_engine::lsn::Lsn;

use crate::handshake::diverged;

/// Refuses a replica whose stream would start at `start` when that is no frame boundary here, or when its last frame
/// is another than ours.
pub(crate) fn check(log: &Log, hello: &Hello, start: Lsn) -> Result<(), Refuse> {
    let Some(crc) = crc_before(log, start) else { return Err(diverged(hello, start)) };
    // A replica that truncates keeps the frame that our frame at `start` names, or its own log would tell it.
    if start == hello.flushed && crc != hello.crc { Err(diverged(hello, start)) } else { Ok(()) }
}

/// The crc of the frame that ends at `at`; `None` when no frame ends there.
pub(crate) fn crc_before(log: &Log, at: Lsn) -> Option<u32> {
    if at == log.sealed() {
        return Some(log.crc_at_end());
    }
    if let Some(hot) = log.hot_frame(at) {
        return Some(hot.header().previous_crc);
    }
    let segment_bytes = log.config().segment_bytes;
    let file = File::open(log.segment_path(at.segment(segment_bytes))).ok()?;
    let mut header = [0; FRAME_HEADER_BYTES];
    file.read_exact_at(&mut header, at.offset(segment_bytes)).ok()?;
    UnverifiedFrame::parse(&header, at).ok().map(|frame| frame.claimed().previous_crc)
}
