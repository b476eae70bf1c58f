//! Group commit, the same for all three servers: requests that arrive while a batch is written form the next one. The server
//! does the write; this holds the memory, says what is written where, and who is answered afterwards.
//!
//! A batch in the file, at a multiple of 4 KiB: magic `u64`, number `u64`, payload bytes `u32`, requests `u32` (little endian),
//! payload. The file has a fixed size and is written from its start again when its end is reached.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::session::{CONNECTIONS_MAX, WAITING_BYTES_MAX};

const MAGIC: u64 = 0x31_48_43_54_41_42_54_52;
const HEADER_BYTES: usize = 24;
const PAGE_BYTES: usize = 4096;
/// Requests of all clients fit into one batch, so no client ever waits for free space in it.
const BATCH_BYTES_MAX: usize = CONNECTIONS_MAX * WAITING_BYTES_MAX + PAGE_BYTES;
/// Size of the file.
pub const FILE_BYTES: u64 = 64 << 20;

const _: () = assert!(BATCH_BYTES_MAX as u64 <= FILE_BYTES && BATCH_BYTES_MAX.is_multiple_of(PAGE_BYTES));

/// One client's part of a batch.
pub struct Part {
    /// The client.
    pub id: u64,
    /// How many requests.
    pub requests: u32,
    /// Their length.
    pub bytes: usize,
}

#[derive(Clone)]
#[repr(align(4096))]
struct Page(#[expect(dead_code, reason = "read as bytes of the batch")] [u8; PAGE_BYTES]);

/// Requests that become durable by one write.
pub struct Batch {
    pages: Vec<Page>,
    end: usize,
    /// Whose requests these are.
    pub parts: Vec<Part>,
}

impl Batch {
    fn new() -> Batch {
        Batch { pages: Vec::new(), end: HEADER_BYTES, parts: Vec::new() }
    }

    /// Adds requests of client `id`.
    pub fn add(&mut self, id: u64, requests: u32, payload: &[u8]) {
        let end = self.end + payload.len();
        assert!(end <= BATCH_BYTES_MAX, "a batch has space for all waiting requests");
        if end > self.pages.len() * PAGE_BYTES {
            self.pages.resize(end.div_ceil(PAGE_BYTES), Page([0; PAGE_BYTES]));
        }
        let at = self.end;
        self.memory_mut()[at..end].copy_from_slice(payload);
        self.end = end;
        self.parts.push(Part { id, requests, bytes: payload.len() });
    }

    fn seal(&mut self, number: u64) {
        let requests: u32 = self.parts.iter().map(|part| part.requests).sum();
        let payload_bytes = (self.end - HEADER_BYTES) as u32;
        let header = &mut self.memory_mut()[..HEADER_BYTES];
        header[..8].copy_from_slice(&MAGIC.to_le_bytes());
        header[8..16].copy_from_slice(&number.to_le_bytes());
        header[16..20].copy_from_slice(&payload_bytes.to_le_bytes());
        header[20..].copy_from_slice(&requests.to_le_bytes());
    }

    fn clear(&mut self) {
        self.end = HEADER_BYTES;
        self.parts.clear();
    }

    fn memory_mut(&mut self) -> &mut [u8] {
        // SAFETY: pages are plain bytes without padding, valid for their whole length.
        unsafe { std::slice::from_raw_parts_mut(self.pages.as_mut_ptr().cast(), self.pages.len() * PAGE_BYTES) }
    }

    /// What is written: whole pages, at a page's address, as `O_DIRECT` wants it.
    pub fn written_bytes(&self) -> &[u8] {
        let bytes = self.end.next_multiple_of(PAGE_BYTES);
        // SAFETY: as above; `add` made the pages up to `end`.
        unsafe { std::slice::from_raw_parts(self.pages.as_ptr().cast(), bytes) }
    }
}

/// The open batch, and the place of the next write. At most one write is in flight.
pub struct Log {
    open: Batch,
    /// `None` while it is written.
    other: Option<Batch>,
    position: u64,
    number: u64,
}

impl Default for Log {
    fn default() -> Log {
        Log { open: Batch::new(), other: Some(Batch::new()), position: 0, number: 0 }
    }
}

impl Log {
    /// Where requests go now.
    pub fn open(&mut self) -> &mut Batch {
        &mut self.open
    }

    /// The batch to write and the place in the file; `None` when no request waits or a write is in flight.
    pub fn next_write(&mut self) -> Option<(Batch, u64)> {
        if self.open.parts.is_empty() {
            return None;
        }
        let mut sealed = std::mem::replace(&mut self.open, self.other.take()?);
        self.number += 1;
        sealed.seal(self.number);
        let bytes = sealed.written_bytes().len() as u64;
        let position = if self.position + bytes > FILE_BYTES { 0 } else { self.position };
        self.position = position + bytes;
        Some((sealed, position))
    }

    /// The write is done and its clients are answered.
    pub fn written(&mut self, mut batch: Batch) {
        batch.clear();
        assert!(self.other.replace(batch).is_none(), "one write at a time");
    }
}

/// Creates the file for a log: zeroed, so that a durable write does not change the file's metadata, and opened such that each
/// write is durable when it completes.
pub fn create_file(path: &Path) -> io::Result<File> {
    let zeroes = vec![0; 1 << 20];
    let zeroed = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    for at in (0..FILE_BYTES).step_by(zeroes.len()) {
        zeroed.write_all_at(&zeroes, at)?;
    }
    zeroed.sync_all()?;
    OpenOptions::new().write(true).custom_flags(libc::O_DIRECT | libc::O_DSYNC).open(path)
}

/// The requests in a file that was not written from its start again, each batch's payload in order.
pub fn read_file(path: &Path) -> io::Result<Vec<Vec<u8>>> {
    let file = std::fs::read(path)?;
    let (mut payloads, mut rest) = (Vec::new(), &file[..]);
    while rest.len() >= HEADER_BYTES {
        let long = |at: usize| u64::from_le_bytes(rest[at..at + 8].try_into().expect("eight bytes"));
        if long(0) != MAGIC || long(8) != payloads.len() as u64 + 1 {
            break;
        }
        let end = HEADER_BYTES + (long(16) as u32) as usize;
        payloads.push(rest[HEADER_BYTES..end].to_vec());
        rest = &rest[end.next_multiple_of(PAGE_BYTES)..];
    }
    Ok(payloads)
}
