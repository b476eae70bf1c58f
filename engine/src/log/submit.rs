//! The log's writes on the ring: which frames go into one write, what the entries look like, and what a completion
//! means. A write counts as durable only when every byte of it was written and a flush that began after that
//! succeeded, on a filesystem that still takes writes; a failed write or flush is never repeated.

use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use io_uring::{opcode, squeue, types};

use super::flights::Flight;
use super::{LOG_BUFFER_INDEX, LastWrite, Log, LogError, LogFailure, SyncMethod};
use crate::commit::{Commit, WriteNo};
use crate::durable::refuses_writes;
use crate::flush_accounting::DurableWrite;
use crate::limits::{FRAME_ALIGN_BYTES, FRAME_TARGET_BYTES};
use crate::lock::DirLock;
use crate::lsn::SegmentNo;
use crate::mutants;
use crate::ring::{Completion, Owner, Ring, Token};
use crate::world;

/// When more than FRAME_TARGET_BYTES for each free write wait, one write takes this much (a replica that catches up).
const WRITE_BYTES_MAX: usize = 4 << 20;
/// A write that was written short (or interrupted) this often is given up as failed.
const SHORT_WRITES_MAX: u32 = 16;
/// How long `shutdown` waits for writes in flight.
const SHUTDOWN_WAIT_MAX: Duration = Duration::from_secs(4);
/// How often `shutdown` looks whether a segment became ready.
const SHUTDOWN_POLL_INTERVAL: Duration = Duration::from_millis(50);

const _: () = assert!(WRITE_BYTES_MAX >= FRAME_TARGET_BYTES);
const _: () = assert!(Commit::WINDOW <= u64::BITS as usize);

/// Which of a write's entries completed; the lowest bit of the token's id.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Write,
    Flush,
}

fn token(number: WriteNo, part: Part) -> u64 {
    Token::new(Owner::Log, number.0 << 1 | u64::from(part == Part::Flush)).into()
}

impl Log {
    /// Seals and submits what the disk can take; once per turn of the ring thread's loop.
    pub fn poll(&mut self, ring: &mut Ring, now: Instant) {
        self.take_segments();
        if self.short_since.is_some() {
            let needed = self.segment_of(self.written());
            match self.segment_file(needed) {
                Some(_) => self.short_since = None,
                None => self.wait_for_segment(needed),
            }
        }
        if self.stopped.is_some() {
            return;
        }
        self.watermark.raise(self.commit.flushed(), self.newest_epoch(), now);
        if self.open.records > 0 && self.open.since.is_none() {
            self.open.since = Some(now);
        }
        if self.written() < self.sealed() {
            self.queued_since = self.queued_since.or(Some(now));
        }
        while self.flights.short != 0 {
            let slot = self.flights.short.trailing_zeros() as usize;
            self.flights.short &= self.flights.short - 1;
            self.push_write(ring, slot);
        }
        while self.commit.can_submit() {
            if self.written() == self.sealed() {
                if !self.open_frame_is_due(now) {
                    break;
                }
                self.seal_open();
            }
            if !self.submit_next(ring, now) {
                break;
            }
        }
    }

    /// Submits the next sealed frames as one write; false when their segment is not ready.
    fn submit_next(&mut self, ring: &mut Ring, now: Instant) -> bool {
        let start = self.written();
        let segment = self.segment_of(start);
        if self.segment_file(segment).is_none() {
            self.wait_for_segment(segment);
            return false;
        }
        let mut flight = Flight { start, from: start, submitted: Some(now), ..Flight::default() };
        flight.end = start;
        self.gather(&mut flight, segment);
        flight.queue = self.queued_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        flight.number = self.commit.submit(flight.end);
        let slot = flight.number.slot();
        self.queued_since = (self.written() < self.sealed()).then_some(now);
        self.want_segments(self.segment_of(flight.end));
        self.flights.slots[slot] = flight;
        self.push_write(ring, slot);
        true
    }

    /// Takes whole frames of one segment into the write, at least one.
    fn gather(&self, flight: &mut Flight, segment: SegmentNo) {
        let limit = self.sealed().min(segment.next().start(self.config.segment_bytes));
        let free = self.commit.depth() - self.commit.in_flight();
        let waiting = (self.sealed() - flight.start) as usize;
        let bytes_max = if waiting > free * FRAME_TARGET_BYTES { WRITE_BYTES_MAX } else { FRAME_TARGET_BYTES };
        while flight.end < limit {
            let frame = self.buffer.parse(flight.end).expect("sealed frames stay until they are durable");
            let header = frame.claimed();
            let first = flight.end == flight.start;
            if !first && (header.end() - flight.start) as usize > bytes_max {
                return;
            }
            flight.end = header.end();
            flight.records += header.record_count;
            flight.wire_bytes += if header.filler { 0 } else { header.wire_bytes() as u64 };
        }
        assert!(flight.end <= limit, "a frame crosses the end of its segment");
    }

    /// Queues the entries for what is left of a write.
    fn push_write(&mut self, ring: &mut Ring, slot: usize) {
        let flight = self.flights.slots[slot];
        let segment = self.segment_of(flight.from);
        let file = self.segment_file(segment).expect("a segment stays open while writes to it are in flight");
        let fd = types::Fd(file.as_raw_fd());
        let bytes = (flight.end - flight.from) as usize;
        let offset = flight.from.offset(self.config.segment_bytes);
        let unflushed = mutants::is_on("write-without-a-flush");
        let linked = (self.config.buffered || self.config.sync_method == SyncMethod::Fdatasync) && !unflushed;
        let flags = if linked || unflushed { 0 } else { libc::RWF_DSYNC };
        let address = self.buffer.address(flight.from).cast_const();
        let entry = match self.fixed_index(flight.from, bytes) {
            Some(_) => opcode::WriteFixed::new(fd, address, bytes as u32, LOG_BUFFER_INDEX)
                .offset(offset)
                .rw_flags(flags)
                .build(),
            None => opcode::Write::new(fd, address, bytes as u32).offset(offset).rw_flags(flags).build(),
        };
        let write = entry.user_data(token(flight.number, Part::Write));
        // SAFETY: the log buffer keeps these bytes until they are durable, and is leaked when the log is dropped
        // before; the file stays open until then as well.
        if linked {
            let write = write.flags(squeue::Flags::IO_LINK);
            let flush = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
            unsafe { ring.push_chain(&[write, flush.user_data(token(flight.number, Part::Flush))]) };
        } else {
            unsafe { ring.push(write) };
        }
        let parts = if linked { 2 } else { 1 };
        self.flights.slots[slot].outstanding = parts;
        self.flights.slots[slot].synced = !linked;
        self.flights.outstanding += usize::from(parts);
    }

    /// Takes a completion of [`Owner::Log`]. An error means that the log has stopped for good; it is told once.
    pub fn handle_completion(&mut self, completion: &Completion, now: Instant) -> Result<(), LogFailure> {
        let number = WriteNo(completion.token.id() >> 1);
        let part = if completion.token.id() & 1 == 0 { Part::Write } else { Part::Flush };
        let slot = number.slot();
        let flight = &mut self.flights.slots[slot];
        assert!(flight.number == number && flight.outstanding > 0, "a completion that nobody waits for");
        flight.outstanding -= 1;
        self.flights.outstanding -= 1;
        if self.stopped.is_some() {
            return Ok(());
        }
        match part {
            Part::Write => self.handle_write(slot, completion)?,
            Part::Flush => self.handle_flush(slot, completion)?,
        }
        let flight = &mut self.flights.slots[slot];
        if flight.outstanding > 0 {
            return Ok(());
        }
        if flight.from < flight.end || !flight.synced {
            // Written short, so its flush counts for nothing: the rest goes out with a flush of its own.
            self.flights.short |= 1 << slot;
            return Ok(());
        }
        let segment = self.segment_of(self.flights.slots[slot].start);
        if self.segment_file(segment).is_some_and(refuses_writes) {
            return Err(self.fail("flush", slot, io::Error::from_raw_os_error(libc::EROFS)));
        }
        self.complete(number, now);
        Ok(())
    }

    fn handle_write(&mut self, slot: usize, completion: &Completion) -> Result<(), LogFailure> {
        let flight = &mut self.flights.slots[slot];
        let left = flight.end - flight.from;
        let written = match completion.outcome() {
            Ok(bytes) => u64::from(bytes),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(self.fail("write", slot, error)),
        };
        assert!(written <= left);
        if written < left {
            flight.short_writes += 1;
            if flight.short_writes > SHORT_WRITES_MAX {
                let text = format!("{written} of {left} bytes written, again and again");
                return Err(self.fail("write", slot, io::Error::new(io::ErrorKind::WriteZero, text)));
            }
        }
        // A part of a block is written again: O_DIRECT wants whole ones, and nobody was told about this one.
        let whole = written - written % FRAME_ALIGN_BYTES as u64;
        flight.from = flight.from.advance(whole);
        Ok(())
    }

    fn handle_flush(&mut self, slot: usize, completion: &Completion) -> Result<(), LogFailure> {
        let flight = &mut self.flights.slots[slot];
        match completion.outcome() {
            Ok(_) => flight.synced = flight.from == flight.end,
            // The write before it in the chain was short, and goes out again.
            Err(error) if error.raw_os_error() == Some(libc::ECANCELED) => {}
            Err(_) if mutants::is_on("retry-the-flush") => flight.synced = flight.from == flight.end,
            Err(error) => return Err(self.fail("fdatasync", slot, error)),
        }
        Ok(())
    }

    fn complete(&mut self, number: WriteNo, now: Instant) {
        let flight = self.flights.slots[number.slot()];
        let device = flight.submitted.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.last_write = LastWrite { queue: flight.queue, device };
        self.flush_accounting.record(&DurableWrite {
            records: u64::from(flight.records),
            bytes: flight.end - flight.start,
            padding_bytes: flight.end - flight.start - flight.wire_bytes,
            queue_wait: flight.queue,
            device_time: device,
        });
        if self.commit.complete(number) {
            self.retire_segments();
        }
    }

    /// Closes segments whose last write is durable.
    fn retire_segments(&mut self) {
        let current = self.segment_of(self.flushed());
        while self.segments.front().is_some_and(|(number, _)| *number < current) {
            self.segments.pop_front();
        }
    }

    fn fail(&mut self, what: &'static str, slot: usize, source: io::Error) -> LogFailure {
        // A failed flush says nothing about any byte of the write.
        let flight = self.flights.slots[slot];
        let lsn = if what == "write" { flight.from } else { flight.start };
        let path = self.segment_path(self.segment_of(lsn));
        let offset = lsn.offset(self.config.segment_bytes);
        let failure = LogFailure { what, path, offset, lsn, source };
        self.stop(failure.to_string());
        failure
    }

    /// Lets go of the directory, whose log another is about to replace, and gives its lock to whoever opens that. Nothing may be
    /// in flight. This log takes and gives nothing any more; drop it.
    pub fn retire(&mut self, ring: &mut Ring) -> Result<DirLock, LogError> {
        if !self.idle() || self.buffer.is_pinned() {
            return Err(LogError::InFlight(self.sealed()));
        }
        if std::mem::take(&mut self.registered) {
            let _ = ring.unregister_buffers();
        }
        self.stopped.get_or_insert_with(|| "the log is being replaced".to_owned());
        // Waits for the thread: nobody makes a segment from now on.
        self.preparer = None;
        self.segments.clear();
        self.lock.take().ok_or_else(|| LogError::Stopped("the log was retired before".to_owned()))
    }

    /// Makes everything appended durable, waits for the writes in flight, and closes the log. The last to use the
    /// ring: completions of other owners are dropped. An error when something appended is not durable.
    pub fn shutdown(mut self, ring: &mut Ring) -> Result<(), LogError> {
        let deadline = world::now() + SHUTDOWN_WAIT_MAX;
        self.config.commit_delay = Duration::ZERO;
        let mut completions = Vec::new();
        loop {
            let now = world::now();
            self.poll(ring, now);
            let stuck = self.stopped.is_some() || self.space_error.is_some();
            if self.flights.outstanding() == 0 && (stuck || self.idle()) || now >= deadline {
                break;
            }
            ring.submit_and_wait(Some(SHUTDOWN_POLL_INTERVAL)).map_err(|source| LogError::Io {
                what: "wait for writes to",
                path: self.log_dir.clone(),
                source,
            })?;
            ring.completions(&mut completions);
            for completion in completions.drain(..).filter(|c| c.token.owner() == Owner::Log) {
                if let Err(failure) = self.handle_completion(&completion, world::now()) {
                    tracing::error!("{failure}");
                }
            }
        }
        if self.registered && self.flights.outstanding() == 0 {
            let _ = ring.unregister_buffers();
        }
        let marked = self.watermark.close(self.flushed(), self.newest_epoch());
        match self.stopped.take() {
            Some(text) => Err(LogError::Stopped(text)),
            None if marked.is_err() => marked,
            None if self.idle() => Ok(()),
            None => Err(LogError::Unflushed { flushed: self.flushed(), end: self.end() }),
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if self.flights.outstanding > 0 || self.buffer.is_pinned() {
            // The kernel may still read from it; other memory in its place would end up in the log or on the wire.
            self.buffer.keep_mapped();
        }
    }
}
