//! Feeding a replica from segment files: a thread for each replica that is behind the log buffer. While it runs it owns
//! the write side of the socket, so that a slow disk or a slow replica never holds up the ring thread. It sends chunks
//! by `sendfile(2)` with explicit readahead, heartbeats between them, and gives the socket back when the replica is well
//! inside the log buffer again. Started by `link.rs`; knows only positions, files and one socket.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use walferry_cluster::message::{CHUNK_BYTES_MAX, Chunk, LinkHeartbeat, Message};
use walferry_engine::lsn::{Epoch, Lsn, SegmentNo};
use walferry_engine::waker::Waker;
use walferry_engine::world::{self, Pace, Task};

use crate::link::LinkNo;
use crate::sender::View;
use crate::status::SentBytes;

/// File bytes that are read ahead of the socket. Enough to keep a disk busy at a depth of several requests.
const READAHEAD_BYTES: u64 = 16 << 20;
/// Each request for readahead.
const READAHEAD_STEP_BYTES: u64 = 2 << 20;
/// Bytes of one `sendfile` call; between calls the thread looks up.
const SENDFILE_BYTES_MAX: u64 = 1 << 20;
/// How long the thread waits when it has sent all that is in the files and the log buffer is too far ahead still.
const IDLE_WAIT: Duration = Duration::from_millis(1);

const _: () = assert!(READAHEAD_STEP_BYTES >= SENDFILE_BYTES_MAX);

/// What the ring thread and a catch-up thread tell each other.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    // Written in the order sealed, flushed, committed and read in the opposite one, so that their inequality holds.
    sealed: AtomicU64,
    flushed: AtomicU64,
    committed: AtomicU64,
    /// Written after them and read before them: what `sealed` is then includes all that was durable at the stamp.
    stamp_us: AtomicU64,
    hot_start: AtomicU64,
    hot_bytes_max: AtomicU64,
    /// Announced to the replica, so that it may acknowledge it.
    sent: AtomicU64,
    sendfile_bytes: AtomicU64,
    copy_bytes: AtomicU64,
    stop: AtomicBool,
    /// The last message on this connection, sent when `stop` is seen.
    last_message: Mutex<Vec<u8>>,
}

impl Shared {
    pub(crate) fn publish(&self, view: &View, stamp_us: u64) {
        self.hot_bytes_max.store(view.hot_bytes_max, Ordering::Relaxed);
        self.hot_start.store(view.hot_start.0, Ordering::Relaxed);
        self.sealed.store(view.sealed.0, Ordering::Release);
        self.flushed.store(view.flushed.0, Ordering::Release);
        self.committed.store(view.committed.0, Ordering::Release);
        self.stamp_us.store(stamp_us, Ordering::Release);
    }

    fn stamp_us(&self) -> u64 {
        self.stamp_us.load(Ordering::Acquire)
    }

    fn view(&self) -> View {
        let committed = Lsn(self.committed.load(Ordering::Acquire));
        let flushed = Lsn(self.flushed.load(Ordering::Acquire));
        let sealed = Lsn(self.sealed.load(Ordering::Acquire));
        let hot_start = Lsn(self.hot_start.load(Ordering::Relaxed));
        let hot_bytes_max = self.hot_bytes_max.load(Ordering::Relaxed);
        View { hot_start, sealed, flushed, committed, hot_bytes_max }
    }

    pub(crate) fn sent(&self) -> Lsn {
        Lsn(self.sent.load(Ordering::Acquire))
    }

    pub(crate) fn bytes(&self) -> SentBytes {
        let (sendfile, copy) = (&self.sendfile_bytes, &self.copy_bytes);
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        SentBytes { zero_copy: 0, copy: load(copy), sendfile: load(sendfile) }
    }

    /// The thread ends as soon as it may, with these bytes as the connection's last.
    pub(crate) fn stop(&self, last_message: Vec<u8>) {
        *self.last_message.lock().expect("nobody panics with it") = last_message;
        self.stop.store(true, Ordering::Release);
    }
}

/// Why a catch-up ended without reaching the log buffer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CatchupError {
    #[error("catch-up was stopped")]
    Stopped,
    #[error("cannot send: {0}")]
    Socket(#[source] io::Error),
    #[error("cannot {what} {}: {source}", path.display())]
    File { what: &'static str, path: PathBuf, source: io::Error },
}

/// How a catch-up ended.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) link: LinkNo,
    /// The position from which memory goes on.
    pub(crate) outcome: Result<Lsn, CatchupError>,
}

/// What a catch-up thread is started with.
pub(crate) struct Job {
    pub(crate) link: LinkNo,
    pub(crate) socket: Arc<OwnedFd>,
    /// The rest of an envelope that goes first.
    pub(crate) envelope_rest: Vec<u8>,
    /// The part of a frame, in the files, that the socket has not taken yet; it follows.
    pub(crate) frame_rest: Option<(Lsn, u64)>,
    /// Messages that follow.
    pub(crate) messages: Vec<u8>,
    /// Where the first chunk starts.
    pub(crate) from: Lsn,
    pub(crate) log_dir: PathBuf,
    pub(crate) segment_bytes: u64,
    pub(crate) epoch: Epoch,
    /// What heartbeats count from.
    pub(crate) origin: Instant,
    pub(crate) shared: Arc<Shared>,
    pub(crate) reports: mpsc::Sender<Report>,
    pub(crate) waker: Waker,
}

/// The thread.
#[derive(Debug)]
pub(crate) struct Catchup {
    pub(crate) shared: Arc<Shared>,
    task: Option<Task>,
}

impl Catchup {
    pub(crate) fn start(job: Job, view: &View, stamp_us: u64) -> io::Result<Catchup> {
        let shared = Arc::clone(&job.shared);
        shared.publish(view, stamp_us);
        shared.sent.store(job.from.0, Ordering::Release);
        let (link, reports, waker) = (job.link, job.reports.clone(), job.waker.clone());
        let mut feed = Feed::new(job);
        let step = move || {
            let outcome = match feed.step() {
                Ok(Step::Go(pace)) => return pace,
                Ok(Step::HandOver(position)) => Ok(position),
                Err(error) => Err(error),
            };
            // Nobody listens any more when the leader has stepped down.
            let _ = reports.send(Report { link, outcome });
            waker.wake();
            Pace::Over
        };
        let task = world::spawn("catch-up", Box::new(step))?;
        Ok(Catchup { shared, task: Some(task) })
    }

    /// Waits for the thread, which has reported or whose socket is shut down.
    pub(crate) fn join(mut self) {
        if let Some(task) = self.task.take() {
            task.join();
        }
    }
}

/// The segment files that are being read.
struct Files {
    log_dir: PathBuf,
    segment_bytes: u64,
    /// Adjacent segments, oldest first: the one being sent, and the one being read ahead.
    open: VecDeque<(SegmentNo, File)>,
    /// Everything before this was asked for.
    advised: Lsn,
}

impl Files {
    fn path(&self, number: SegmentNo) -> PathBuf {
        self.log_dir.join(number.file_name())
    }

    fn open(&mut self, number: SegmentNo) -> Result<&File, CatchupError> {
        if let Some(index) = self.open.iter().position(|(open, _)| *open == number) {
            return Ok(&self.open[index].1);
        }
        let path = self.path(number);
        let file = File::open(&path);
        let file = file.map_err(|source| CatchupError::File { what: "open", path, source })?;
        self.open.push_back((number, file));
        Ok(&self.open.back().expect("just pushed").1)
    }

    /// Asks for the next `READAHEAD_BYTES` after `position`, nothing beyond `limit`: what is not written yet must not
    /// enter the page cache.
    fn read_ahead(&mut self, position: Lsn, limit: Lsn) -> Result<(), CatchupError> {
        self.open.retain(|(number, _)| *number >= position.segment(self.segment_bytes));
        self.advised = self.advised.max(position);
        let until = limit.min(position.advance(READAHEAD_BYTES));
        while self.advised < until {
            let (at, segment) = (self.advised, self.advised.segment(self.segment_bytes));
            let end = until.min(segment.next().start(self.segment_bytes)).min(at.advance(READAHEAD_STEP_BYTES));
            // A short request is only worth its system call when it is all there is.
            if end - at < READAHEAD_STEP_BYTES && end == until && until != limit {
                return Ok(());
            }
            let offset = at.offset(self.segment_bytes) as i64;
            let fd = self.open(segment)?.as_raw_fd();
            // SAFETY: advice about an open file; it changes no memory of ours.
            unsafe { libc::posix_fadvise(fd, offset, (end - at) as i64, libc::POSIX_FADV_WILLNEED) };
            self.advised = end;
        }
        Ok(())
    }
}

/// Bytes that the socket has not taken yet.
enum Part {
    Bytes { bytes: Vec<u8>, sent: usize, flags: i32 },
    File { at: Lsn, end: Lsn },
}

/// What one step of a catch-up came to.
enum Step {
    Go(Pace),
    /// Memory goes on from here.
    HandOver(Lsn),
}

/// The state of a running catch-up.
struct Feed {
    job: Job,
    files: Files,
    /// Where the next chunk starts.
    position: Lsn,
    /// Chunks are sent up to here. A flushed LSN is the end of a frame: there the stream can change over to frames.
    target: Lsn,
    /// What goes out before the next chunk, in order.
    parts: VecDeque<Part>,
}

impl Feed {
    fn new(job: Job) -> Feed {
        let files = Files {
            log_dir: job.log_dir.clone(),
            segment_bytes: job.segment_bytes,
            open: VecDeque::new(),
            advised: job.frame_rest.map_or(job.from, |(at, _)| at),
        };
        let target = job.shared.view().flushed;
        let mut feed = Feed { position: job.from, target, job, files, parts: VecDeque::new() };
        let envelope_rest = std::mem::take(&mut feed.job.envelope_rest);
        feed.put(envelope_rest, libc::MSG_MORE);
        if let Some((at, bytes)) = feed.job.frame_rest {
            feed.parts.push_back(Part::File { at, end: at.advance(bytes) });
        }
        let messages = std::mem::take(&mut feed.job.messages);
        feed.put(messages, 0);
        feed
    }

    fn put(&mut self, bytes: Vec<u8>, flags: i32) {
        if !bytes.is_empty() {
            self.parts.push_back(Part::Bytes { bytes, sent: 0, flags });
        }
    }

    /// Sends what is due, or decides what is. Between messages it looks up.
    fn step(&mut self) -> Result<Step, CatchupError> {
        if let Some(part) = self.parts.pop_front() {
            return self.send(part).map(Step::Go);
        }
        self.look_up()?;
        if self.position < self.target {
            self.put_chunk();
            return Ok(Step::Go(Pace::Again));
        }
        let view = self.job.shared.view();
        if view.can_hand_over(self.position) {
            return Ok(Step::HandOver(self.position));
        }
        self.target = view.flushed;
        let pace = if self.position < self.target { Pace::Again } else { Pace::Idle(IDLE_WAIT) };
        Ok(Step::Go(pace))
    }

    /// Between messages: the end, if it was asked for.
    fn look_up(&mut self) -> Result<(), CatchupError> {
        if !self.job.shared.stop.load(Ordering::Acquire) {
            return Ok(());
        }
        let last_message = std::mem::take(&mut *self.job.shared.last_message.lock().expect("nobody panics with it"));
        // Without regard to `stop`, which is what brought us here; a peer that is gone needs no last message.
        let _ = send_some(&self.job.socket, &last_message, libc::MSG_DONTWAIT);
        let _ = nix::sys::socket::shutdown(self.job.socket.as_raw_fd(), nix::sys::socket::Shutdown::Write);
        Err(CatchupError::Stopped)
    }

    fn put_chunk(&mut self) {
        let segment_end = self.position.segment(self.job.segment_bytes).next().start(self.job.segment_bytes);
        let end = self.target.min(segment_end).min(self.position.advance(CHUNK_BYTES_MAX));
        let bytes = end - self.position;
        let stamp_us = self.job.shared.stamp_us();
        let view = self.job.shared.view();
        let sent_at_us = world::now().saturating_duration_since(self.job.origin).as_micros() as u64 + 1;
        let View { sealed, flushed, committed, .. } = view;
        let heartbeat = LinkHeartbeat { end: sealed, flushed, committed, sent_at_us, epoch: self.job.epoch, stamp_us };
        let mut head = Vec::with_capacity(128);
        Message::LinkHeartbeat(heartbeat).encode(&mut head);
        Message::Chunk(Chunk { lsn: self.position, bytes }).encode(&mut head);
        // Before it is sent: the acknowledgement may be quicker than we are.
        self.job.shared.sent.store(end.0, Ordering::Release);
        self.put(head, libc::MSG_MORE);
        self.parts.push_back(Part::File { at: self.position, end });
        self.position = end;
    }

    /// Hands a part to the socket; what it does not take is next again.
    fn send(&mut self, part: Part) -> Result<Pace, CatchupError> {
        let (outcome, segment) = match &part {
            Part::Bytes { bytes, sent, flags } => {
                (send_some(&self.job.socket, &bytes[*sent..], *flags), SegmentNo::default())
            }
            Part::File { at, end } => {
                let segment = at.segment(self.job.segment_bytes);
                (self.send_file(*at, *end, segment)?, segment)
            }
        };
        let taken = match outcome {
            Ok(taken) => taken as u64,
            Err(error) => {
                self.parts.push_front(part);
                return self.retry(error, segment);
            }
        };
        let shared = &self.job.shared;
        match part {
            Part::Bytes { bytes, sent, flags } => {
                shared.copy_bytes.fetch_add(taken, Ordering::Relaxed);
                let sent = sent + taken as usize;
                if sent < bytes.len() {
                    self.parts.push_front(Part::Bytes { bytes, sent, flags });
                }
            }
            Part::File { .. } if taken == 0 => {
                let source = io::ErrorKind::UnexpectedEof.into();
                return Err(CatchupError::File { what: "read", path: self.files.path(segment), source });
            }
            Part::File { at, end } => {
                shared.sendfile_bytes.fetch_add(taken, Ordering::Relaxed);
                let at = at.advance(taken);
                if at < end {
                    self.parts.push_front(Part::File { at, end });
                }
            }
        }
        Ok(Pace::Again)
    }

    fn send_file(&mut self, at: Lsn, end: Lsn, segment: SegmentNo) -> Result<io::Result<usize>, CatchupError> {
        self.files.read_ahead(at, self.target.max(end))?;
        let count = (end - at).min(SENDFILE_BYTES_MAX) as usize;
        let mut offset = at.offset(self.job.segment_bytes) as libc::off_t;
        let file = self.files.open(segment)?.as_raw_fd();
        // SAFETY: both descriptors are open for the call, `offset` is ours.
        let sent = unsafe { libc::sendfile(self.job.socket.as_raw_fd(), file, &mut offset, count) };
        Ok(usize::try_from(sent).map_err(|_| io::Error::last_os_error()))
    }

    /// `Ok` when the operation is worth repeating: it was interrupted, or the socket took nothing for a while.
    fn retry(&self, error: io::Error, segment: SegmentNo) -> Result<Pace, CatchupError> {
        match error.raw_os_error() {
            Some(libc::EINTR) => Ok(Pace::Again),
            // The send timeout of the socket. A replica that stays like this is dropped by the ring thread, which
            // shuts the socket down.
            Some(libc::EAGAIN) if world::is_simulated() => Ok(Pace::Idle(IDLE_WAIT)),
            Some(libc::EAGAIN) => Ok(Pace::Again),
            Some(libc::EIO) => Err(CatchupError::File { what: "read", path: self.files.path(segment), source: error }),
            _ => Err(CatchupError::Socket(error)),
        }
    }
}

fn send_some(socket: &OwnedFd, bytes: &[u8], flags: i32) -> io::Result<usize> {
    // SAFETY: `bytes` lives for the call.
    let sent =
        unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags | libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}
