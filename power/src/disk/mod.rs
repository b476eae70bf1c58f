//! A disk that remembers everything: the machine's only disk, served to QEMU over NBD by this process. It has a volatile cache,
//! answers in any order that a disk may, and fails on demand. The same lock stamps its events and the clients'
//! acknowledgements, so their order is exact.
//!
//! ```text
//! guest ── virtio-blk or virtio-scsi ── QEMU ── NBD, a socket ── nbd (protocol) ──┬─ mod (order, faults) ─┬─ image (core)
//! this host's kernel ── loop device ── FUSE, a file ──────────── fuse (protocol) ─┘                       └─ trace (core)
//! ```

mod fuse;
mod image;
mod nbd;
mod trace;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

pub use fuse::DiskFile;
pub use image::{Cuts, Image, Layer, Mood, cut};
pub use trace::{Content, Flush, Moment, Trace};

/// What the disk does wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// Reads of any byte of it fail, until a write covers all of it: a bad sector, which a disk replaces then.
    pub bad: Option<(u64, u64)>,
    /// Writes fail, before anything of them is on the disk.
    pub writes: bool,
    /// So many flushes fail from now on, and each takes with it what it should have flushed: a disk that lost its cache.
    pub flushes: u32,
    /// Nothing is answered.
    pub stalled: bool,
}

impl Fault {
    fn hits(&self, offset: u64, length: usize) -> bool {
        self.bad.is_some_and(|(from, to)| offset < to && offset + length as u64 > from)
    }

    fn heal(&mut self, offset: u64, length: usize) {
        self.bad = self.bad.filter(|(from, to)| offset > *from || offset + (length as u64) < *to);
    }
}

/// What stands on the disk, and what happened to it.
#[derive(Debug)]
pub struct State {
    /// Its content.
    pub image: Image,
    /// What it does wrong.
    pub fault: Fault,
    trace: Option<Recording>,
    now: Moment,
    rng: StdRng,
}

#[derive(Debug)]
struct Recording {
    trace: Trace,
    /// What was over the base when the recording began.
    beginning: Layer,
}

/// The disk.
#[derive(Clone, Debug)]
pub struct Disk {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    fault_changed: Condvar,
}

/// A request that the disk has and has not answered.
#[derive(Debug)]
enum Request {
    Read { offset: u64, length: usize },
    Write { offset: u64, content: Content, forced: bool },
    Flush,
}

/// A request on its way, with what the trace knows it by.
#[derive(Debug)]
struct Pending {
    cookie: u64,
    request: Request,
    arrived: Moment,
    number: Option<usize>,
}

/// The disk could not: EIO.
#[derive(Debug)]
struct Failed;

impl Disk {
    /// A disk with this content; the seed decides in which order it answers.
    pub fn new(content: Vec<u8>, seed: u64) -> Disk {
        let state = State {
            image: Image::new(content),
            fault: Fault::default(),
            trace: None,
            now: Moment(0),
            rng: StdRng::seed_from_u64(seed),
        };
        Disk { shared: Arc::new(Shared { state: Mutex::new(state), fault_changed: Condvar::new() }) }
    }

    /// Serves it at a socket to one machine after another, on a thread of its own, as long as this process lives.
    pub fn serve(&self, socket: &Path) -> std::io::Result<()> {
        nbd::serve(self.clone(), socket)
    }

    /// Its state, locked.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().expect("the disk's lock: a holder panicked")
    }

    /// From now on it does this wrong.
    pub fn set_fault(&self, fault: Fault) {
        self.state().fault = fault;
        self.shared.fault_changed.notify_all();
    }

    /// Returns when the disk answers again.
    fn wait_while_stalled(&self) {
        let state = self.state();
        drop(self.shared.fault_changed.wait_while(state, |state| state.fault.stalled).expect("the disk's lock"));
    }
}

impl State {
    /// A moment after everything that has happened.
    pub fn stamp(&mut self) -> Moment {
        self.now.0 += 1;
        self.now
    }

    /// Begins to record, from the present content on.
    pub fn record(&mut self) {
        self.trace = Some(Recording { trace: Trace::default(), beginning: self.image.layer() });
    }

    /// Ends the recording.
    pub fn recorded(&mut self) -> Trace {
        self.trace.take().map(|recording| recording.trace).unwrap_or_default()
    }

    /// How much the recording holds by now: events, bytes.
    pub fn recorded_so_far(&self) -> (usize, u64) {
        self.trace.as_ref().map_or((0, 0), |recording| (recording.trace.writes.len(), recording.trace.bytes))
    }

    fn arrive(&mut self, cookie: u64, request: Request) -> Pending {
        let arrived = self.stamp();
        let number = match (&request, &mut self.trace) {
            (Request::Write { offset, content, forced }, Some(recording)) => {
                Some(recording.trace.write(*offset, content.clone(), *forced, arrived))
            }
            _ => None,
        };
        Pending { cookie, request, arrived, number }
    }

    /// Does one of the requests; a random one, as the queue of a disk does.
    fn answer_one(&mut self, waiting: &mut VecDeque<Pending>) -> Option<(u64, Result<Vec<u8>, Failed>)> {
        let chosen = if waiting.is_empty() { return None } else { self.rng.random_range(0..waiting.len()) };
        let pending = waiting.remove(chosen)?;
        let answered = self.stamp();
        let result = match &pending.request {
            Request::Read { offset, length } if self.fault.hits(*offset, *length) => Err(Failed),
            Request::Read { offset, length } => {
                let mut bytes = vec![0; *length];
                self.image.read(*offset, &mut bytes);
                Ok(bytes)
            }
            Request::Write { .. } if self.fault.writes => Err(Failed),
            Request::Write { offset, content, .. } => {
                self.image.write(*offset, content);
                self.fault.heal(*offset, content.len());
                if let (Some(number), Some(recording)) = (pending.number, &mut self.trace) {
                    recording.trace.writes[number].answered = Some(answered);
                }
                Ok(Vec::new())
            }
            Request::Flush if self.fault.flushes > 0 => {
                self.fault.flushes -= 1;
                self.lose_cache();
                Err(Failed)
            }
            Request::Flush => {
                if let Some(recording) = &mut self.trace {
                    recording.trace.flushes.push(Flush { arrived: pending.arrived, answered });
                }
                Ok(Vec::new())
            }
        };
        Some((pending.cookie, result))
    }

    /// Goes back to what was flushed, and forgets that it ever had the rest.
    fn lose_cache(&mut self) {
        let Some(recording) = &mut self.trace else { return };
        self.image.set_layer(recording.beginning.clone());
        cut(&mut self.image, &recording.trace, self.now, Mood::Lose, &mut self.rng);
        let flushed = recording.trace.flushed(self.now);
        for write in &mut recording.trace.writes {
            write.answered = write.answered.filter(|answered| *answered < flushed || write.forced);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::trace::SECTOR_BYTES;
    use super::*;

    fn write(state: &mut State, value: u8) {
        let content = Content::new(vec![value; SECTOR_BYTES]);
        let pending = state.arrive(0, Request::Write { offset: 0, content, forced: false });
        assert!(state.answer_one(&mut [pending].into()).is_some_and(|(_, result)| result.is_ok()));
    }

    fn flush(state: &mut State) -> bool {
        let pending = state.arrive(0, Request::Flush);
        state.answer_one(&mut [pending].into()).is_some_and(|(_, result)| result.is_ok())
    }

    fn first_byte(state: &State) -> u8 {
        let mut byte = [0];
        state.image.read(0, &mut byte);
        byte[0]
    }

    #[test]
    fn a_failed_flush_takes_with_it_what_it_should_have_flushed() {
        let disk = Disk::new(vec![0; 4096], 1);
        let mut state = disk.state();
        state.record();
        write(&mut state, 1);
        assert!(flush(&mut state));
        write(&mut state, 2);
        state.fault.flushes = 1;
        assert!(!flush(&mut state));
        assert_eq!(first_byte(&state), 1);
        assert!(flush(&mut state), "the next one finds nothing to do and succeeds: that is the trap");
        let (trace, now) = (state.recorded(), state.stamp());
        let mut image = Image::new(vec![0; 4096]);
        cut(&mut image, &trace, now, Mood::Lose, &mut StdRng::seed_from_u64(1));
        let mut byte = [0];
        image.read(0, &mut byte);
        assert_eq!(byte, [1], "what was lost stays lost");
    }

    #[test]
    fn requests_that_fail_change_nothing() {
        let disk = Disk::new(vec![9; 4096], 1);
        let mut state = disk.state();
        state.fault = Fault { writes: true, bad: Some((0, 1)), ..Fault::default() };
        let write = Request::Write { offset: 0, content: Content::Zeros(SECTOR_BYTES), forced: false };
        let mut waiting: VecDeque<_> =
            [state.arrive(1, write), state.arrive(2, Request::Read { offset: 0, length: 8 })].into();
        while let Some((_, result)) = state.answer_one(&mut waiting) {
            assert!(result.is_err());
        }
        assert_eq!(first_byte(&state), 9);
    }

    #[test]
    fn a_bad_sector_is_replaced_by_a_write_that_covers_it() {
        let disk = Disk::new(vec![0; 8192], 1);
        let mut state = disk.state();
        state.fault.bad = Some((512, 1024));
        let reads = |state: &mut State, offset| {
            let read = state.arrive(0, Request::Read { offset, length: 512 });
            state.answer_one(&mut [read].into()).is_some_and(|(_, result)| result.is_ok())
        };
        assert!(reads(&mut state, 0) && reads(&mut state, 1024) && !reads(&mut state, 768) && !reads(&mut state, 512));
        write(&mut state, 1);
        assert!(!reads(&mut state, 512), "another sector was written");
        let pending = state.arrive(0, Request::Write { offset: 0, content: Content::Zeros(4096), forced: false });
        assert!(state.answer_one(&mut [pending].into()).is_some_and(|(_, result)| result.is_ok()));
        assert!(reads(&mut state, 512));
    }
}
