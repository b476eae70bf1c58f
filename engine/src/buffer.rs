//! The log buffer: the newest part of the log in memory, in LSN order, from which the disk writes and the shipper
//! sends. A ring of bytes in which position `lsn` stands at `lsn % capacity`. The same pages are mapped twice in a
//! row, so every range of up to `capacity` bytes is contiguous, wherever it starts: a frame never wraps.
//! `log.rs` is the only caller. The buffer knows frames only by their length, to evict whole ones from the front.
//!
//! ```text
//!  hot_start            sealed (log.rs)    tail
//!  | frame | frame | frame | open frame ... |          free           | = hot_start + capacity
//! ```

use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::frame::UnverifiedFrame;
use crate::limits::FRAME_ALIGN_BYTES;
use crate::lsn::Lsn;

/// The most pins at once; a caller that holds more has lost count.
pub const PINS_MAX: usize = 4096;
/// The buffer's size is a multiple of this, so that the kernel can back it with huge pages.
pub const LOG_BUFFER_ALIGN_BYTES: usize = 2 << 20;

/// Keeps memory from a position on in place. Give it back with `unpin`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PinId(u32);

/// The memory, mapped twice in a row.
struct Mirror {
    base: NonNull<u8>,
    bytes: usize,
    /// Not unmapped at the end.
    keep: bool,
}

impl Mirror {
    fn new(bytes: usize) -> io::Result<Mirror> {
        let memory = memfd_create(c"walferry-log-buffer", MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&memory, bytes as i64)?;
        let twice = NonZeroUsize::new(bytes * 2).expect("a buffer has bytes");
        let once = NonZeroUsize::new(bytes).expect("a buffer has bytes");
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: fresh address space, taken to keep both halves in a row; nothing else is mapped there.
        let base = unsafe { mmap_anonymous(None, twice, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE)? };
        let mirror = Mirror { base: base.cast(), bytes, keep: false };
        for half in 0..2 {
            let address = NonZeroUsize::new(base.as_ptr() as usize + half * bytes);
            let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
            // SAFETY: replaces a half of the reservation above, which nobody uses yet.
            unsafe { mmap(address, once, access, flags, &memory, 0)? };
        }
        Ok(mirror)
    }

    /// Brings every page in, in huge pages when the kernel can: fewer faults, fewer pieces per disk write.
    fn populate(&self) {
        const MADV_COLLAPSE: i32 = 25;
        // One small page for each huge one: the kernel collapses no range that is empty, and has little to copy so.
        for at in (0..self.bytes).step_by(LOG_BUFFER_ALIGN_BYTES) {
            // SAFETY: within the mapping, which nobody else uses yet.
            unsafe { self.base.add(at).write_volatile(0) };
        }
        // SAFETY: advice about our own mapping; no contents change. Refused on kernels before 6.1 and where huge pages
        // are off: the buffer works without.
        unsafe { libc::madvise(self.base.as_ptr().cast::<c_void>(), self.bytes, MADV_COLLAPSE) };
        // SAFETY: as above; both halves lie within the mapping. Pages that are not brought in now come at first use.
        let _ = unsafe { madvise(self.base.cast(), self.bytes * 2, MmapAdvise::MADV_POPULATE_WRITE) };
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        if !self.keep {
            // SAFETY: the whole reservation, made by us, and nothing of ours refers to it any more.
            let _ = unsafe { munmap(self.base.cast(), self.bytes * 2) };
        }
    }
}

/// The newest part of the log in memory.
pub struct LogBuffer {
    memory: Mirror,
    /// The oldest frame that is still here; `hot_start <= tail <= hot_start + capacity`.
    hot_start: Lsn,
    /// Positions that are pinned, by pin number; `None` is free.
    pins: Vec<Option<Lsn>>,
}

impl LogBuffer {
    /// A buffer of about `bytes` (rounded up) whose first byte will be `start`.
    pub fn new(bytes: usize, start: Lsn) -> io::Result<LogBuffer> {
        let bytes = bytes.next_multiple_of(LOG_BUFFER_ALIGN_BYTES);
        let memory = Mirror::new(bytes)?;
        memory.populate();
        Ok(LogBuffer { memory, hot_start: start, pins: Vec::new() })
    }

    /// Bytes that the buffer holds.
    pub fn capacity(&self) -> usize {
        self.memory.bytes
    }

    /// The oldest frame that is still here.
    pub fn hot_start(&self) -> Lsn {
        self.hot_start
    }

    /// What to register with the ring: the first of the two mappings. A range that runs into the second is not in it.
    pub fn fixed_range(&self) -> libc::iovec {
        libc::iovec { iov_base: self.memory.base.as_ptr().cast(), iov_len: self.memory.bytes }
    }

    /// True when the range lies within [`LogBuffer::fixed_range`].
    pub fn is_fixed(&self, from: Lsn, bytes: usize) -> bool {
        self.offset(from) + bytes <= self.memory.bytes
    }

    fn offset(&self, lsn: Lsn) -> usize {
        (lsn.0 % self.memory.bytes as u64) as usize
    }

    /// The address of a position; valid for `capacity` bytes.
    pub fn address(&self, lsn: Lsn) -> *mut u8 {
        // SAFETY: the offset is below `bytes`, within the mapping.
        unsafe { self.memory.base.as_ptr().add(self.offset(lsn)) }
    }

    /// The bytes at a position.
    pub fn bytes(&self, from: Lsn, bytes: usize) -> &[u8] {
        assert!(bytes <= self.memory.bytes);
        // SAFETY: mapped (twice in a row), initialised to zero by the kernel; `&self` keeps writers away.
        unsafe { std::slice::from_raw_parts(self.address(from), bytes) }
    }

    /// The bytes at a position, to fill.
    pub fn bytes_mut(&mut self, from: Lsn, bytes: usize) -> &mut [u8] {
        assert!(bytes <= self.memory.bytes);
        // SAFETY: as above, and `&mut self` makes it the only one.
        unsafe { std::slice::from_raw_parts_mut(self.address(from), bytes) }
    }

    /// Bytes free after `tail`.
    pub fn free_bytes(&self, tail: Lsn) -> usize {
        self.memory.bytes - (tail - self.hot_start) as usize
    }

    /// Makes `wanted` bytes of free space after `tail` by evicting the oldest frames, none that ends beyond `limit` or
    /// beyond a pin. Evicts no more than needed; false when that is not enough.
    pub fn evict_for(&mut self, tail: Lsn, wanted: usize, limit: Lsn) -> bool {
        if self.free_bytes(tail) >= wanted {
            return true;
        }
        let limit = self.evictable(limit);
        while self.hot_start < limit && self.free_bytes(tail) < wanted {
            let end = self.frame_end(self.hot_start);
            if end > limit {
                break;
            }
            self.hot_start = end;
        }
        self.free_bytes(tail) >= wanted
    }

    /// `limit`, or the lowest pin before it.
    fn evictable(&self, limit: Lsn) -> Lsn {
        self.pins.iter().flatten().fold(limit, |limit, pin| limit.min(*pin))
    }

    /// Bytes that `evict_for` could free after `tail` at most.
    pub fn free_bytes_after_eviction(&self, tail: Lsn, limit: Lsn) -> usize {
        self.free_bytes(tail) + self.evictable(limit).since(self.hot_start) as usize
    }

    fn frame_end(&self, at: Lsn) -> Lsn {
        self.parse(at).expect("the log buffer holds whole frames from its start on").claimed().end()
    }

    /// The header of the frame at `at`, unverified; `None` when no frame starts there.
    pub fn parse(&self, at: Lsn) -> Option<UnverifiedFrame> {
        UnverifiedFrame::parse(self.bytes(at, FRAME_ALIGN_BYTES), at).ok()
    }

    /// Forgets everything and starts anew at `start`.
    pub fn reset(&mut self, start: Lsn) {
        assert!(!self.is_pinned(), "the log buffer is reset while something sends from it");
        self.hot_start = start;
    }

    /// Keeps everything from `lsn` on in place until `unpin`.
    pub fn pin(&mut self, lsn: Lsn) -> PinId {
        assert!(lsn >= self.hot_start, "{lsn} has left the log buffer");
        let free = self.pins.iter().position(Option::is_none);
        let slot = free.unwrap_or_else(|| {
            assert!(self.pins.len() < PINS_MAX, "more than {PINS_MAX} pins in the log buffer");
            self.pins.push(None);
            self.pins.len() - 1
        });
        self.pins[slot] = Some(lsn);
        PinId(slot as u32)
    }

    /// True while anything is pinned.
    pub fn is_pinned(&self) -> bool {
        self.pins.iter().any(Option::is_some)
    }

    /// Gives a pin back.
    pub fn unpin(&mut self, pin: PinId) {
        assert!(self.pins[pin.0 as usize].take().is_some(), "unpinned twice");
    }

    /// The pin with the lowest position, if it is below `limit`.
    pub fn lowest_pin(&self, limit: Lsn) -> Option<PinId> {
        let pins = self.pins.iter().enumerate();
        let lowest = pins.filter_map(|(slot, pin)| Some(((*pin)?, slot))).min()?;
        (lowest.0 < limit).then_some(PinId(lowest.1 as u32))
    }

    /// Leaves the memory mapped for good: the kernel may still read from it for an operation in flight.
    pub fn keep_mapped(&mut self) {
        self.memory.keep = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::FrameHeader;
    use crate::lsn::Epoch;

    fn put(buffer: &mut LogBuffer, lsn: Lsn, payload_bytes: u32) -> Lsn {
        let header = FrameHeader {
            filler: true,
            epoch: Epoch(1),
            lsn,
            payload_bytes,
            record_count: 0,
            previous_crc: 0,
            crc: 0,
            flushed: Lsn::ZERO,
            committed: Lsn::ZERO,
            sealed_at_us: 0,
        };
        let header = header.seal(buffer.bytes_mut(lsn, header.span_bytes()));
        header.end()
    }

    #[test]
    fn a_range_across_the_end_is_contiguous() {
        let mut buffer = LogBuffer::new(1, Lsn::ZERO).expect("memory");
        let capacity = buffer.capacity();
        let at = Lsn(capacity as u64 * 7 - 3);
        buffer.bytes_mut(at, 6).copy_from_slice(b"abcdef");
        assert_eq!(buffer.bytes(Lsn(capacity as u64 * 7), 3), b"def");
        assert!(!buffer.is_fixed(at, 6) && buffer.is_fixed(at, 3));
    }

    #[test]
    fn eviction_stops_at_the_limit_and_at_the_lowest_pin() {
        let start = Lsn(12 << 12);
        let mut buffer = LogBuffer::new(1, start).expect("memory");
        let mut ends = vec![start];
        while buffer.free_bytes(*ends.last().unwrap()) >= 8192 {
            let end = put(&mut buffer, *ends.last().unwrap(), 5000);
            ends.push(end);
        }
        let tail = *ends.last().unwrap();
        assert_eq!(buffer.free_bytes(tail), 0);
        assert!(!buffer.evict_for(tail, 8192, start));
        let pin = buffer.pin(ends[1]);
        assert!(buffer.evict_for(tail, 8192, tail));
        assert_eq!(buffer.hot_start(), ends[1]);
        assert!(!buffer.evict_for(tail, 8193, tail));
        assert_eq!(buffer.lowest_pin(tail), Some(pin));
        buffer.unpin(pin);
        assert_eq!(buffer.lowest_pin(tail), None);
        assert!(!buffer.evict_for(tail, 8192 * 3, ends[2]));
        assert!(buffer.evict_for(tail, 8192 * 3, tail));
        assert_eq!(buffer.hot_start(), ends[3]);
    }
}
