//! The memory that client sockets receive into: one ring of buffers that the kernel picks from when bytes arrive, so that an
//! idle connection costs no buffer. Used by `clients`; knows nothing of what the bytes mean.

use std::ptr;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use walferry_engine::ring::Ring;

/// Buffers in the group; when all are in use a receive fails with ENOBUFS and is armed again on the next turn.
pub const RECV_BUFFERS: u16 = 1024;
/// Size of one buffer: what one receive delivers at most.
pub const RECV_BUFFER_BYTES: usize = 16 << 10;
/// The group's number on this ring.
pub const RECV_GROUP: u16 = 1;

const _: () = assert!(RECV_BUFFERS.is_power_of_two());

/// The buffer group. Registered with the ring until the process ends.
pub struct RecvBuffers {
    entries: ptr::NonNull<BufRingEntry>,
    memory: ptr::NonNull<u8>,
    tail: u16,
}

fn map(bytes: usize) -> std::io::Result<ptr::NonNull<libc::c_void>> {
    let length = std::num::NonZeroUsize::new(bytes).expect("a buffer group is not empty");
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // All of its pages now: receives of every size would touch the last of them only after hours, and a node whose memory creeps
    // up looks like one that leaks, or is refused a page when the machine has none left.
    // SAFETY: an anonymous private mapping aliases nothing.
    Ok(unsafe { mmap_anonymous(None, length, access, MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE)? })
}

impl RecvBuffers {
    /// Maps the memory and registers the group.
    pub fn register(ring: &Ring) -> std::io::Result<RecvBuffers> {
        let entries = map(usize::from(RECV_BUFFERS) * size_of::<BufRingEntry>())?.cast();
        let memory = map(usize::from(RECV_BUFFERS) * RECV_BUFFER_BYTES)?.cast();
        let mut buffers = RecvBuffers { entries, memory, tail: 0 };
        // SAFETY: the mapping is page aligned, holds RECV_BUFFERS entries and outlives the ring's use of it.
        unsafe { ring.submitter().register_buf_ring_with_flags(entries.as_ptr() as u64, RECV_BUFFERS, RECV_GROUP, 0)? };
        for id in 0..RECV_BUFFERS {
            buffers.give_back(id);
        }
        Ok(buffers)
    }

    /// The first `length` bytes of buffer `id`, which the kernel handed to us with a completion.
    pub fn bytes(&self, id: u16, length: usize) -> &[u8] {
        assert!(id < RECV_BUFFERS && length <= RECV_BUFFER_BYTES);
        // SAFETY: in bounds by the assertion; the kernel does not touch a buffer until it is given back.
        unsafe {
            let start = self.memory.as_ptr().add(usize::from(id) * RECV_BUFFER_BYTES);
            std::slice::from_raw_parts(start, length)
        }
    }

    /// Returns buffer `id` to the kernel.
    pub fn give_back(&mut self, id: u16) {
        assert!(id < RECV_BUFFERS);
        let slot = usize::from(self.tail & (RECV_BUFFERS - 1));
        // SAFETY: slot and id are in bounds; only this thread writes entries, and the tail is published after the entry.
        unsafe {
            let entry = &mut *self.entries.as_ptr().add(slot);
            entry.set_addr(self.memory.as_ptr().add(usize::from(id) * RECV_BUFFER_BYTES) as u64);
            entry.set_len(RECV_BUFFER_BYTES as u32);
            entry.set_bid(id);
            self.tail = self.tail.wrapping_add(1);
            let tail = BufRingEntry::tail(self.entries.as_ptr()) as *const AtomicU16;
            (*tail).store(self.tail, Ordering::Release);
        }
    }
}

impl Drop for RecvBuffers {
    fn drop(&mut self) {
        // SAFETY: both mappings were made by `map` with these lengths; the ring is closed before this is dropped.
        unsafe {
            let _ = munmap(self.entries.cast(), usize::from(RECV_BUFFERS) * size_of::<BufRingEntry>());
            let _ = munmap(self.memory.cast(), usize::from(RECV_BUFFERS) * RECV_BUFFER_BYTES);
        }
    }
}
