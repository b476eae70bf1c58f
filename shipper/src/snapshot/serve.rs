//! Giving a snapshot to one replica: a thread for each, which waits for the copy, sends heartbeats meanwhile, and sends piece
//! after piece by `sendfile(2)` at the pace that all copies share, so that commits keep disk, network and processor. Started by
//! `snapshots`; knows one socket and one file.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nix::sys::socket::{Shutdown, setsockopt, shutdown, sockopt};
use nix::sys::time::TimeVal;
use walferry_cluster::message::{Fetch, Message, Offer, Piece, Refuse, RefuseCode};
use walferry_cluster::snapshot::{CopyPhase, CopyProgress, PIECE_BYTES, Pace, piece_bytes};
use walferry_engine::lsn::Lsn;
use walferry_engine::waker::Waker;
use walferry_engine::world;

use super::file::SnapshotFile;

/// The longest sleep before a thread looks whether it is to end.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// A copy is read ahead of the socket by this much.
const READAHEAD_BYTES: i64 = 4 << 20;

/// The copy that is offered, or what becomes of it: shared by the ring thread, the thread that makes it, and those that serve it.
#[derive(Debug, Default)]
pub struct Shelf {
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// About so many bytes of so many are written.
    making: (u64, u64),
    copy: Option<Arc<SnapshotFile>>,
    /// Why the last attempt to make one failed, and how many have.
    failure: Option<String>,
    failures: u64,
}

impl Shelf {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }

    /// The copy on offer.
    pub fn copy(&self) -> Option<Arc<SnapshotFile>> {
        self.lock().copy.clone()
    }

    /// The next copy is written up to here.
    pub fn making(&self, done: u64, total: u64) {
        self.lock().making = (done, total);
    }

    /// There is a copy, or none any more.
    pub fn put(&self, copy: Option<Arc<SnapshotFile>>) {
        let mut state = self.lock();
        (state.copy, state.making, state.failure) = (copy, (0, 0), None);
        self.moved.notify_all();
    }

    /// No copy can be made.
    pub fn fail(&self, text: String) {
        let mut state = self.lock();
        state.failures += 1;
        state.failure = Some(text);
        self.moved.notify_all();
    }

    /// Waits until something moved, for so long at most; how far the next copy is then.
    fn wait(&self, state: MutexGuard<'_, State>, time: Duration) -> (u64, u64) {
        if world::is_simulated() {
            // There nobody else runs while this thread holds the lock.
            drop(state);
            world::sleep(time);
            return self.lock().making;
        }
        let (state, _) = self.moved.wait_timeout(state, time).expect("nobody panics with it");
        state.making
    }

    fn failures(&self) -> u64 {
        self.lock().failures
    }
}

/// What one thread is to do.
pub(super) struct Job {
    pub(super) socket: OwnedFd,
    pub(super) fetch: Fetch,
    /// All but what belongs to the copy.
    pub(super) offer: Offer,
    pub(super) shelf: Arc<Shelf>,
    pub(super) pace: Arc<Mutex<Pace>>,
    pub(super) heartbeat_interval: Duration,
    pub(super) peer_timeout: Duration,
    pub(super) waker: Waker,
}

/// A copy on its way to a replica; dropped, it ends.
#[derive(Debug)]
pub(super) struct Serving {
    pub(super) progress: Arc<CopyProgress>,
    /// Why it is to end.
    stop: Arc<Mutex<Option<Refuse>>>,
    stopping: Arc<AtomicBool>,
    outcome: Arc<Mutex<Option<Result<(), String>>>>,
    /// The LSN of the copy once it is offered; else 0.
    snapshot: Arc<AtomicU64>,
}

impl Serving {
    pub(super) fn start(job: Job) -> io::Result<Serving> {
        setsockopt(&job.socket, sockopt::SendTimeout, &TimeVal::new(0, LOOK_INTERVAL.as_micros() as i64))?;
        let progress = Arc::new(CopyProgress::default());
        let (stop, stopping, snapshot) = (Arc::default(), Arc::default(), Arc::default());
        let outcome: Arc<Mutex<Option<Result<(), String>>>> = Arc::default();
        let server = Server {
            failures: job.shelf.failures(),
            progress: Arc::clone(&progress),
            stop: Arc::clone(&stop),
            stopping: Arc::clone(&stopping),
            snapshot: Arc::clone(&snapshot),
            job,
        };
        let report = Arc::clone(&outcome);
        let serve = move || {
            give_way();
            let ended = server.run();
            server.progress.end();
            *report.lock().expect("nobody panics with it") = Some(ended);
            server.job.waker.wake();
        };
        world::spawn_blocking("snapshot-serve", Box::new(serve))?;
        Ok(Serving { progress, stop, stopping, outcome, snapshot })
    }

    /// The LSN of the copy that the replica was offered.
    pub(super) fn snapshot(&self) -> Option<Lsn> {
        Some(Lsn(self.snapshot.load(Ordering::Acquire))).filter(|snapshot| *snapshot > Lsn::ZERO)
    }

    /// How it ended, once it has.
    pub(super) fn outcome(&self) -> Option<Result<(), String>> {
        self.outcome.lock().expect("nobody panics with it").take()
    }

    /// Ends it with a word to the replica.
    pub(super) fn end(&self, refuse: Refuse) {
        self.stop.lock().expect("nobody panics with it").get_or_insert(refuse);
        self.stopping.store(true, Ordering::Release);
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // The thread owns what it uses; nobody waits for it.
        self.end(Refuse { code: RefuseCode::Stopping, text: "the leader stops".to_owned() });
    }
}

/// The processor and the disk belong to the commits first: a thread of snapshots comes after them. A tenth of an ordinary
/// thread's share, and not the least that there is: where the processors are never idle, that would be no progress for minutes.
pub fn give_way() {
    // A simulated node has no thread of its own.
    if world::is_simulated() {
        return;
    }
    const NICE: i32 = 10;
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const IOPRIO_BEST_EFFORT_LOWEST: libc::c_int = (2 << 13) | 7;
    // SAFETY: both calls name the calling thread (0) and no memory. Where they are refused, the pace still holds.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, NICE);
        libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_BEST_EFFORT_LOWEST);
    }
}

/// Waits until `bytes` may be moved; false when `go_on` says no meanwhile.
pub fn keep_pace(pace: &Mutex<Pace>, bytes: usize, go_on: impl Fn() -> bool) -> bool {
    let begun = world::now();
    let until = begun + pace.lock().expect("nobody panics with it").wait(bytes, begun);
    while go_on() {
        let left = until.saturating_duration_since(world::now());
        if left.is_zero() {
            return true;
        }
        world::sleep(left.min(LOOK_INTERVAL));
    }
    false
}

/// What a system call moved.
fn count_or_error(moved: isize) -> io::Result<usize> {
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

struct Server {
    job: Job,
    /// Failures of the shelf before this was asked for.
    failures: u64,
    progress: Arc<CopyProgress>,
    stop: Arc<Mutex<Option<Refuse>>>,
    stopping: Arc<AtomicBool>,
    snapshot: Arc<AtomicU64>,
}

/// Why serving ended early.
enum End {
    /// Tell the replica.
    Refuse(Refuse),
    Socket(io::Error),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> End {
        End::Socket(error)
    }
}

impl Server {
    fn run(&self) -> Result<(), String> {
        let outcome = self.await_copy().and_then(|copy| self.send_copy(&copy));
        let outcome = match outcome {
            Ok(()) => Ok(()),
            Err(End::Socket(error)) => Err(format!("the connection failed: {error}")),
            Err(End::Refuse(refuse)) => {
                let mut bytes = Vec::new();
                Message::Refuse(refuse.clone()).encode(&mut bytes);
                // A replica that is gone needs no answer.
                let _ = nix::sys::socket::send(
                    self.job.socket.as_raw_fd(),
                    &bytes,
                    nix::sys::socket::MsgFlags::MSG_NOSIGNAL | nix::sys::socket::MsgFlags::MSG_DONTWAIT,
                );
                Err(refuse.text)
            }
        };
        let _ = shutdown(self.job.socket.as_raw_fd(), Shutdown::Write);
        outcome
    }

    fn goes_on(&self) -> bool {
        !self.stopping.load(Ordering::Acquire)
    }

    fn look_up(&self) -> Result<(), End> {
        if self.goes_on() {
            return Ok(());
        }
        let refuse = self.stop.lock().expect("nobody panics with it").clone();
        Err(End::Refuse(refuse.expect("said before `stopping` was set")))
    }

    /// Waits until there is a copy that will do, and sends heartbeats.
    fn await_copy(&self) -> Result<Arc<SnapshotFile>, End> {
        let mut said: Option<Instant> = None;
        loop {
            self.look_up()?;
            let (done, total) = {
                let state = self.job.shelf.lock();
                if let Some(copy) = state.copy.as_ref().filter(|copy| copy.snapshot >= self.job.fetch.floor) {
                    return Ok(Arc::clone(copy));
                }
                if state.failures > self.failures {
                    let text = state.failure.clone().unwrap_or_default();
                    return Err(End::Refuse(Refuse { code: RefuseCode::NoSnapshot, text }));
                }
                self.job.shelf.wait(state, LOOK_INTERVAL.min(self.job.heartbeat_interval))
            };
            self.progress.set(CopyPhase::Preparing, done, total);
            let now = world::now();
            if said.is_none_or(|at| now - at >= self.job.heartbeat_interval) {
                said = Some(now);
                let mut bytes = Vec::new();
                Message::Preparing { done, total }.encode(&mut bytes);
                self.send(&bytes, 0)?;
            }
        }
    }

    fn send_copy(&self, copy: &SnapshotFile) -> Result<(), End> {
        let fetch = &self.job.fetch;
        let goes_on = fetch.snapshot == copy.snapshot && fetch.offset <= copy.bytes && !fetch.suspect;
        let ends_at_a_piece = fetch.offset == copy.bytes || fetch.offset.is_multiple_of(PIECE_BYTES as u64);
        let mut at = if goes_on && ends_at_a_piece { fetch.offset } else { 0 };
        let offer =
            Offer { snapshot: copy.snapshot, crc: copy.crc, bytes: copy.bytes, offset: at, ..self.job.offer.clone() };
        self.progress.keep(at);
        self.snapshot.store(copy.snapshot.0, Ordering::Release);
        let mut bytes = Vec::new();
        Message::Offer(offer).encode(&mut bytes);
        self.send(&bytes, 0)?;
        while at < copy.bytes {
            self.progress.set(CopyPhase::Copying, at, copy.bytes);
            let length = piece_bytes(at, copy.bytes);
            let piece = Piece { offset: at, bytes: length as u32, crc: copy.piece_crc(at) };
            bytes.clear();
            Message::Piece(piece).encode(&mut bytes);
            self.send(&bytes, libc::MSG_MORE)?;
            self.send_file(copy, at, length)?;
            at += length as u64;
        }
        self.progress.set(CopyPhase::Copying, at, copy.bytes);
        Ok(())
    }

    fn send_file(&self, copy: &SnapshotFile, from: u64, bytes: usize) -> Result<(), End> {
        let step = self.job.pace.lock().expect("nobody panics with it").step_bytes();
        let end = from + bytes as u64;
        let mut at = from;
        // SAFETY: advice about an open file; it changes no memory of ours.
        unsafe { libc::posix_fadvise(copy.fd(), from as i64, READAHEAD_BYTES, libc::POSIX_FADV_WILLNEED) };
        while at < end {
            let count = step.min((end - at) as usize);
            if !keep_pace(&self.job.pace, count, || self.goes_on()) {
                self.look_up()?;
            }
            let until = at + count as u64;
            let mut heard = world::now();
            while at < until {
                let sent = world::retry_until(LOOK_INTERVAL, || {
                    let mut offset = at as libc::off_t;
                    // SAFETY: both descriptors are open for the call, `offset` is ours.
                    count_or_error(unsafe {
                        libc::sendfile(self.job.socket.as_raw_fd(), copy.fd(), &mut offset, (until - at) as usize)
                    })
                });
                match sent {
                    Ok(0) => return Err(End::Socket(io::ErrorKind::UnexpectedEof.into())),
                    Ok(sent) => {
                        at += sent as u64;
                        heard = world::now();
                    }
                    Err(error) => self.retry(error, heard)?,
                }
            }
        }
        Ok(())
    }

    fn send(&self, bytes: &[u8], flags: i32) -> Result<(), End> {
        let mut rest = bytes;
        let mut heard = world::now();
        while !rest.is_empty() {
            let socket = self.job.socket.as_raw_fd();
            let sent = world::retry_until(LOOK_INTERVAL, || {
                // SAFETY: `rest` lives for the call.
                count_or_error(unsafe {
                    libc::send(socket, rest.as_ptr().cast(), rest.len(), flags | libc::MSG_NOSIGNAL)
                })
            });
            match sent {
                Ok(sent) => {
                    rest = &rest[sent..];
                    heard = world::now();
                }
                Err(error) => self.retry(error, heard)?,
            }
        }
        Ok(())
    }

    /// `Ok` when the operation is worth repeating: the socket took nothing, not for too long.
    fn retry(&self, error: io::Error, heard: Instant) -> Result<(), End> {
        self.look_up()?;
        let waits = matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN));
        if waits && world::now() - heard < self.job.peer_timeout {
            return Ok(());
        }
        let silent = || io::Error::new(io::ErrorKind::TimedOut, "the replica takes nothing (peer_timeout)");
        Err(End::Socket(if waits { silent() } else { error }))
    }
}
