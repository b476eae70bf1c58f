//! Every bound of the engine, with its unit in its name. What happens at a bound is told beside it.

/// Frames start and end on this boundary, so that an O_DIRECT write never rewrites a durable block.
pub const FRAME_ALIGN_BYTES: usize = 4096;
/// The fixed part at the start of a frame.
pub const FRAME_HEADER_BYTES: usize = 64;
/// An open frame that reached this size is sealed even while the disk is busy; a larger single record
/// still gets a frame of its own.
pub const FRAME_TARGET_BYTES: usize = 1 << 20;
/// No frame is larger; a record that does not fit is refused with an error that names this bound.
pub const FRAME_BYTES_MAX: usize = 32 << 20;
/// The length that stands in front of each record in a frame.
pub const RECORD_LENGTH_BYTES: usize = 4;
/// The smallest segment that can be configured.
pub const SEGMENT_BYTES_MIN: u64 = 16 << 20;
/// The smallest segment that a log may have: where the world is simulated, logs are small, and so are their segments.
pub(crate) fn segment_bytes_min() -> u64 {
    if crate::world::is_simulated() { FRAME_ALIGN_BYTES as u64 } else { SEGMENT_BYTES_MIN }
}
/// The largest segment that can be configured.
pub const SEGMENT_BYTES_MAX: u64 = 1 << 30;
/// The segment size of a node that names none.
pub const SEGMENT_BYTES_DEFAULT: u64 = 64 << 20;
/// The most frames in flight at once that can be configured.
pub const WRITE_DEPTH_MAX: usize = 32;
/// Sealed frames stay in this much memory for the shipper (`log_buffer_bytes`, PostgreSQL's wal_buffers).
pub const LOG_BUFFER_BYTES_DEFAULT: usize = 96 << 20;
/// The largest log buffer. What was sealed while another frame was not yet durable lies within it, so recovery looks this far
/// beyond a break for a frame that was written after it.
pub const LOG_BUFFER_BYTES_MAX: usize = 512 << 20;

const _: () = assert!(LOG_BUFFER_BYTES_DEFAULT <= LOG_BUFFER_BYTES_MAX);
const _: () = assert!(FRAME_TARGET_BYTES <= FRAME_BYTES_MAX);
const _: () = assert!(FRAME_BYTES_MAX * 2 <= LOG_BUFFER_BYTES_DEFAULT);
const _: () = assert!(FRAME_TARGET_BYTES as u64 <= SEGMENT_BYTES_MIN);
const _: () = assert!(FRAME_HEADER_BYTES <= FRAME_ALIGN_BYTES);

/// `bytes` rounded up to the alignment of frames.
pub const fn frame_aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(FRAME_ALIGN_BYTES)
}
