//! Fetching a snapshot, on a thread of its own: asks the leader, takes piece after piece into `incoming`, reads the whole back,
//! and reports. Started by `replica`, which decides when; plain blocking reads with a timeout, since the leader always has
//! something to say. Changes nothing outside `DIR/snapshot`.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver as Inbox, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use walferry_cluster::error::{MessageError, ReadError};
use walferry_cluster::member::{ClusterId, MemberName};
use walferry_cluster::message::{Fetch, Message, Offer, PROTOCOL_VERSION, Piece, RefuseCode, read_message};
use walferry_cluster::snapshot::{CopyPhase, CopyProgress, PIECE_BYTES, piece_bytes};
use walferry_engine::epoch::EpochHistory;
use walferry_engine::lock::{DirLock, LockError};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::waker::Waker;
use walferry_engine::world;
use walferry_tls::PeerLinks;

use super::SnapshotError;
use super::incoming::{Facts, Incoming, make_dir};
use crate::connect::connect_to;

/// What is fetched, and for whom.
#[derive(Clone, Debug)]
pub struct FetchConfig {
    /// The replica's data directory.
    pub data: PathBuf,
    /// The leader's peer address.
    pub leader: String,
    /// The replica's cluster; 0 for none yet.
    pub cluster_id: u128,
    /// The replica's name.
    pub name: MemberName,
    /// Its segment size.
    pub segment_bytes: u64,
    /// A leader that says nothing for so long is dead.
    pub peer_timeout: Duration,
    /// An older leadership's copy is not taken.
    pub epoch_min: Epoch,
    /// A copy that does not hold everything before this is of no use.
    pub floor: Lsn,
    /// Up to where nothing of this node's log may be cut: what it knows to be committed.
    pub keeps: Lsn,
    /// The replica's epochs and durable end: what both logs have in common must be in the copy.
    pub history: EpochHistory,
    /// See `history`.
    pub flushed: Lsn,
    /// A piece of the copy under way arrived damaged.
    pub suspect: bool,
    /// Peers speak TLS.
    pub links: Arc<PeerLinks>,
}

/// The reason for not following a leader without what was committed, and the ways out.
pub(crate) fn cuts_commits(fork: Lsn, committed: Lsn) -> String {
    format!(
        "the leader's log parts from this node's at {fork}, and commits up to {committed} are here: was it restored from an older copy, \
         or is a replica behind this one promoted? `walferry promote` lets this node lead with what it has; a start with --become \
         replica follows that leader, cuts them off, and keeps them in DIR/lost/"
    )
}

/// Why an attempt ended. Another goes on where it did.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The connection failed.
    #[error("the snapshot is interrupted: {0}")]
    Socket(#[from] io::Error),
    /// The bytes are not a valid message.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// A message that does not belong there.
    #[error("the leader sent {0} in the course of a snapshot")]
    Unexpected(&'static str),
    /// The leader gives none.
    #[error("the leader gives no snapshot: {text}")]
    Refused {
        /// For programs.
        code: RefuseCode,
        /// For people.
        text: String,
    },
    /// Not a copy for this node.
    #[error("the snapshot offered does not fit: {0}")]
    Misfit(String),
    /// The copy would take back what this node has confirmed.
    #[error("the snapshot at {snapshot} is older than what this node has confirmed, {floor}")]
    TooOld {
        /// Where it stands.
        snapshot: Lsn,
        /// What it must hold.
        floor: Lsn,
    },
    /// The copy's log parts from this node's before what was committed.
    #[error("{}", cuts_commits(*fork, *committed))]
    Committed {
        /// Where they part.
        fork: Lsn,
        /// What this node knows to be committed.
        committed: Lsn,
    },
    /// A piece is not what its checksum says.
    #[error("a piece of the snapshot arrived damaged, at offset {0}: it is fetched again")]
    Damaged(u64),
    /// A piece that had come is not what it was when it is read back.
    #[error("a piece of the snapshot is damaged on this node's disk, at offset {0}: it is fetched again")]
    DamagedHere(u64),
    /// The disk.
    #[error(transparent)]
    Keep(#[from] SnapshotError),
    /// An attempt before this is still ending.
    #[error("an earlier fetch is still ending")]
    Busy,
    /// It was asked to end.
    #[error("the snapshot was given up")]
    Stopped,
}

/// What both threads see.
#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    socket: Mutex<Option<TcpStream>>,
}

/// A fetch under way; dropped, it ends.
#[derive(Debug)]
pub struct Fetching {
    shared: Arc<Shared>,
    progress: Arc<CopyProgress>,
    outcome: Inbox<Result<Facts, FetchError>>,
}

impl Fetching {
    /// Starts the thread; `waker` is woken at its end.
    pub fn start(config: FetchConfig, waker: Waker) -> io::Result<Fetching> {
        let (shared, progress) = (Arc::new(Shared::default()), Arc::new(CopyProgress::default()));
        let (outbox, outcome) = channel();
        let fetch = Fetcher { config, shared: Arc::clone(&shared), progress: Arc::clone(&progress) };
        let fetch = move || {
            let outcome = fetch.run();
            fetch.progress.end();
            // Nobody waits for it when the link was closed meanwhile.
            let _ = outbox.send(outcome);
            waker.wake();
        };
        world::spawn_blocking("snapshot-fetch", Box::new(fetch))?;
        Ok(Fetching { shared, progress, outcome })
    }

    /// How far it is.
    pub fn progress(&self) -> &Arc<CopyProgress> {
        &self.progress
    }

    /// How it ended, once.
    pub fn outcome(&self) -> Option<Result<Facts, FetchError>> {
        match self.outcome.try_recv() {
            Ok(outcome) => Some(outcome),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(FetchError::Stopped)),
        }
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(socket) = &*self.shared.socket.lock().expect("nobody panics with it") {
            // Fails only when the connection is gone already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// The leader's socket; it always has something to say within the timeout.
struct LeaderSocket {
    socket: TcpStream,
    timeout: Duration,
}

impl Read for LeaderSocket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        world::retry_until(self.timeout, || self.socket.read(bytes))
    }
}

impl Write for LeaderSocket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        world::retry_until(self.timeout, || self.socket.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

struct Fetcher {
    config: FetchConfig,
    shared: Arc<Shared>,
    progress: Arc<CopyProgress>,
}

impl Fetcher {
    fn run(&self) -> Result<Facts, FetchError> {
        let dir = make_dir(&self.config.data)?;
        // Who was dropped may not have noticed yet.
        let _lock = DirLock::take(&dir).map_err(|error| match error {
            LockError::Held { .. } => FetchError::Busy,
            LockError::Io { path, source } => SnapshotError::Io { what: "lock", path, source }.into(),
        })?;
        let resumed = Incoming::resume(&self.config.data)?;
        let mut incoming = self.receive(resumed)?;
        if !incoming.verify(&self.progress, || self.goes_on())? {
            return Err(if self.goes_on() {
                FetchError::DamagedHere(incoming.verified())
            } else {
                FetchError::Stopped
            });
        }
        Ok(incoming.facts().clone())
    }

    fn goes_on(&self) -> bool {
        !self.shared.stop.load(Ordering::Acquire)
    }

    fn receive(&self, resumed: Option<Incoming>) -> Result<Incoming, FetchError> {
        let mut socket = self.connect()?;
        let (snapshot, offset) =
            resumed.as_ref().map_or((Lsn::ZERO, 0), |part| (part.facts().snapshot, part.verified()));
        let fetch = Fetch {
            protocol: PROTOCOL_VERSION,
            cluster_id: (self.config.cluster_id != 0).then_some(ClusterId(self.config.cluster_id)),
            name: self.config.name.clone(),
            floor: self.config.floor,
            segment_bytes: self.config.segment_bytes,
            snapshot,
            offset,
            suspect: self.config.suspect,
        };
        let mut bytes = Vec::new();
        Message::Fetch(fetch).encode(&mut bytes);
        socket.write_all(&bytes)?;
        let offer = self.await_offer(&mut socket)?;
        let facts = self.judge(&offer)?;
        let kept = resumed.and_then(|mut part| part.goes_on_with(&facts, offer.offset).then_some(part));
        let mut incoming = match kept {
            Some(part) => {
                tracing::info!(leader = %offer.name, snapshot = %offer.snapshot, bytes = offer.bytes, kept = offset, "the snapshot goes on");
                part
            }
            None if offer.offset != 0 => {
                return Err(FetchError::Unexpected("the middle of a copy that was not asked for"));
            }
            None => {
                tracing::info!(leader = %offer.name, snapshot = %offer.snapshot, bytes = offer.bytes, "receiving a snapshot");
                Incoming::begin(&self.config.data, facts)?
            }
        };
        self.progress.keep(incoming.verified());
        let outcome = self.take_pieces(&mut socket, &mut incoming);
        // What has come is kept, however it ended.
        incoming.save()?;
        outcome.map(|()| incoming)
    }

    fn connect(&self) -> Result<LeaderSocket, FetchError> {
        let (leader, links) = (&self.config.leader, &self.config.links);
        let socket = connect_to(leader, self.config.peer_timeout, links)?.stream;
        socket.set_read_timeout(Some(self.config.peer_timeout))?;
        socket.set_write_timeout(Some(self.config.peer_timeout))?;
        *self.shared.socket.lock().expect("nobody panics with it") = Some(socket.try_clone()?);
        let socket = LeaderSocket { socket, timeout: self.config.peer_timeout };
        if self.goes_on() { Ok(socket) } else { Err(FetchError::Stopped) }
    }

    fn await_offer(&self, socket: &mut LeaderSocket) -> Result<Offer, FetchError> {
        loop {
            match self.next_message(socket)? {
                Message::Preparing { done, total } => self.progress.set(CopyPhase::Preparing, done, total),
                Message::Offer(offer) => return Ok(offer),
                Message::Refuse(refuse) => return Err(FetchError::Refused { code: refuse.code, text: refuse.text }),
                _ => return Err(FetchError::Unexpected("something else than an offer")),
            }
        }
    }

    /// Whether this node may become what is offered.
    fn judge(&self, offer: &Offer) -> Result<Facts, FetchError> {
        let misfit = |text: String| Err(FetchError::Misfit(text));
        let facts = match Facts::of(offer) {
            Some(facts) if offer.snapshot > Lsn::ZERO => facts,
            _ => return misfit("its epochs or its position are impossible".to_owned()),
        };
        if self.config.cluster_id != 0 && self.config.cluster_id != offer.cluster_id.0 {
            let ours = ClusterId(self.config.cluster_id);
            return misfit(format!("it is of cluster {}, this node belongs to {ours}", offer.cluster_id));
        }
        if offer.segment_bytes != self.config.segment_bytes {
            let (theirs, ours) = (offer.segment_bytes, self.config.segment_bytes);
            return misfit(format!(
                "the leader has segments of {theirs} bytes, this node of {ours}: start it with an empty data directory and \
                 --segment-bytes {theirs}"
            ));
        }
        let epoch = facts.history.last_epoch();
        if epoch.number() < self.config.epoch_min.number() {
            return misfit(format!("the leader is of epoch {epoch}, this node knows {}", self.config.epoch_min));
        }
        let shared = facts.history.fork_with(&self.config.history, self.config.flushed);
        if shared < self.config.keeps {
            return Err(FetchError::Committed { fork: shared, committed: self.config.keeps });
        }
        let floor = self.config.floor.max(shared);
        if offer.snapshot < floor {
            return Err(FetchError::TooOld { snapshot: offer.snapshot, floor });
        }
        Ok(facts)
    }

    fn take_pieces(&self, socket: &mut LeaderSocket, incoming: &mut Incoming) -> Result<(), FetchError> {
        let total = incoming.facts().bytes;
        let mut bytes = vec![0; PIECE_BYTES];
        while !incoming.is_complete() {
            let at = incoming.verified();
            self.progress.set(CopyPhase::Copying, at, total);
            let piece = match self.next_message(socket)? {
                Message::Piece(piece) => piece,
                Message::Refuse(refuse) => return Err(FetchError::Refused { code: refuse.code, text: refuse.text }),
                _ => return Err(FetchError::Unexpected("something else than a piece")),
            };
            let Piece { offset, bytes: length, crc } = piece;
            if offset != at || length as usize != piece_bytes(at, total) {
                return Err(FetchError::Unexpected("a piece out of turn"));
            }
            let piece = &mut bytes[..length as usize];
            socket.read_exact(piece)?;
            if !incoming.push(piece, crc)? {
                return Err(FetchError::Damaged(at));
            }
            if !self.goes_on() {
                return Err(FetchError::Stopped);
            }
        }
        Ok(())
    }

    fn next_message(&self, socket: &mut LeaderSocket) -> Result<Message, FetchError> {
        read_message(socket).map_err(|error| match error {
            ReadError::Message(error) => error.into(),
            ReadError::Stream(error) => FetchError::Socket(match error.kind() {
                io::ErrorKind::UnexpectedEof => io::Error::new(error.kind(), "the leader closed the connection"),
                io::ErrorKind::WouldBlock => io::Error::new(
                    error.kind(),
                    format!("nothing was heard of the leader for {:?}", self.config.peer_timeout),
                ),
                _ => error,
            }),
        })
    }
}
