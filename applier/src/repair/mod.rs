//! A node gives its log back what its disk lost, from whoever holds it, before it takes part in anything: with the model of
//! protocol-aware recovery, damage is told from a torn tail, what a peer holds intact is fetched, and what nobody holds is never
//! guessed. `plan` says whom to ask, the engine's `repair` which frames fit; here are the sockets and the files. Used by a node
//! that opens its log, by its scrubber, and by `walferry log repair`. Blocks; no thread of its own.

pub mod plan;

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use walferry_cluster::error::ReadError;
use walferry_cluster::member::{ClusterId, MemberName};
use walferry_cluster::message::{FetchFrames, FetchedFrames, Message, PROTOCOL_VERSION, RefuseCode, read_message};
use walferry_engine::epoch::EpochHistory;
use walferry_engine::error::Gap;
use walferry_engine::error::RecoverError;
use walferry_engine::log::LOG_DIR;
use walferry_engine::lsn::Lsn;
use walferry_engine::mend::Mender;
use walferry_engine::repair::Patch;
use walferry_engine::segment::DirBytes;
use walferry_engine::world;
use walferry_tls::PeerLinks;

use crate::connect::connect_to;
use plan::{Answer, Next, Plan, Source};

/// How long a question may take to be answered.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a connection may take to open.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(1);

/// Whose log is repaired, and by whom.
#[derive(Clone, Debug)]
pub struct Repairer {
    /// The data directory.
    pub data: PathBuf,
    /// The node's cluster.
    pub cluster_id: u128,
    /// Its name.
    pub name: MemberName,
    /// Its segment size.
    pub segment_bytes: u64,
    /// Its epochs.
    pub history: EpochHistory,
    /// Who may hold what is missing.
    pub sources: Vec<Source>,
    /// How they are reached, if not in the clear.
    pub links: Arc<PeerLinks>,
    /// For how long those that cannot be reached are waited for.
    pub wait_max: Duration,
}

/// What was given back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repaired {
    /// From here,
    pub from: Lsn,
    /// up to here,
    pub to: Lsn,
    /// in this segment's file (the first, when it goes over several),
    pub path: PathBuf,
    /// by these nodes.
    pub by: String,
}

/// Why a gap stays.
#[derive(Debug, thiserror::Error)]
pub enum RepairError {
    /// No node returned the lost frames.
    #[error("{damage}. Nobody gave it back: {asked}")]
    NotHeld {
        /// File, offset, position, reason.
        damage: String,
        /// Each peer with its answer.
        asked: String,
    },
    /// What was written is not there when it is read again.
    #[error(
        "{damage}. It was repaired a moment ago and is damaged again: this disk does not keep what is written to it"
    )]
    Again {
        /// File, offset, position, reason.
        damage: String,
    },
    /// The disk.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The log cannot be read at all.
    #[error(transparent)]
    Recover(#[from] RecoverError),
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RepairError + use<> {
    let path = path.to_owned();
    move |source| RepairError::Io { what, path, source }
}

impl Repairer {
    /// Closes the gap that `damage` describes. `waiting` is told now and then what is waited for.
    fn close(&self, damage: &RecoverError, gap: Gap, waiting: &mut dyn FnMut(&str)) -> Result<Repaired, RepairError> {
        let mender = Mender::new(&self.data, self.segment_bytes);
        let mut patch = Patch::new(gap, &self.history, self.segment_bytes);
        let begun = world::now();
        let mut plan = Plan::new(&self.sources, begun, begun + self.wait_max);
        let mut by: Vec<String> = Vec::new();
        loop {
            match plan.next(world::now()) {
                Next::GiveUp => {
                    let asked = match self.sources.is_empty() {
                        true => "no other node is known to ask".to_owned(),
                        false => plan.report(),
                    };
                    return Err(RepairError::NotHeld { damage: damage.to_string(), asked });
                }
                Next::Wait(until) => {
                    waiting(&format!("waits for the log at {} from another node: {}", gap.from, plan.report()));
                    std::thread::sleep(until.saturating_duration_since(world::now()));
                }
                Next::Ask(index) => match self.ask(&plan.source(index).address, &patch, gap.needed) {
                    Err(answer) => plan.answered(index, answer, world::now()),
                    Ok(sent) => match self.take(&sent, &mut patch, &mender)? {
                        Taken::Closed => {
                            by.push(plan.source(index).name.clone());
                            by.dedup();
                            let path = mender.path(gap.from.segment(self.segment_bytes));
                            return Ok(Repaired { from: gap.from, to: patch.position(), path, by: by.join(", ") });
                        }
                        Taken::Some => by.push(plan.source(index).name.clone()),
                        Taken::Unfit(text) => plan.answered(index, Answer::No(text), world::now()),
                    },
                },
            }
        }
    }

    /// Asks one node for the frames from the patch's position on.
    fn ask(&self, address: &str, patch: &Patch<'_>, needed: Lsn) -> Result<Vec<u8>, Answer> {
        let not_now = |error: io::Error| Answer::NotNow(error.to_string());
        let request = FetchFrames {
            protocol: PROTOCOL_VERSION,
            cluster_id: ClusterId(self.cluster_id),
            name: self.name.clone(),
            from: patch.position(),
            to: wanted_end(patch, needed),
            segment_bytes: self.segment_bytes,
            crc: patch.previous_crc(),
            history: self.history.entries().to_vec(),
        };
        let mut bytes = Vec::new();
        Message::FetchFrames(request).encode(&mut bytes);
        let mut answer: Box<dyn Read> = match world::simulated_answer(address, &bytes) {
            Some(answer) => Box::new(io::Cursor::new(answer.map_err(not_now)?)),
            None => Box::new(self.send(address, &bytes).map_err(not_now)?),
        };
        match read_message(&mut answer).map_err(|error| match error {
            ReadError::Message(error) => Answer::No(error.to_string()),
            ReadError::Stream(error) => match error.kind() {
                io::ErrorKind::UnexpectedEof => Answer::NotNow("closed the connection".to_owned()),
                io::ErrorKind::WouldBlock => Answer::NotNow(format!("did not answer within {ANSWER_TIME_MAX:?}")),
                _ => not_now(error),
            },
        })? {
            Message::FetchedFrames(FetchedFrames { from, bytes: length }) if from == patch.position() => {
                // Grows as they come: what is only announced takes no memory.
                let mut frames = Vec::new();
                let read = (&mut answer).take(length).read_to_end(&mut frames).map_err(not_now)?;
                if (read as u64) < length {
                    return Err(Answer::NotNow("closed the connection".to_owned()));
                }
                Ok(frames)
            }
            Message::Refuse(refuse) if refuse.code == RefuseCode::NotHeld || !refuse.code.is_passing() => {
                Err(Answer::No(refuse.text))
            }
            Message::Refuse(refuse) => Err(Answer::NotNow(refuse.text)),
            _ => Err(Answer::No("answered with another message than was asked for".to_owned())),
        }
    }

    /// Sends a question; the answer comes on the socket.
    fn send(&self, address: &str, question: &[u8]) -> io::Result<TcpStream> {
        let mut socket = connect_to(address, CONNECT_TIME_MAX, &self.links)?.stream;
        socket.set_read_timeout(Some(ANSWER_TIME_MAX))?;
        socket.set_write_timeout(Some(ANSWER_TIME_MAX))?;
        socket.write_all(question)?;
        Ok(socket)
    }

    /// Judges what was sent, keeps what stands in its place and writes it.
    fn take(&self, sent: &[u8], patch: &mut Patch<'_>, mender: &Mender) -> Result<Taken, RepairError> {
        let mut own = DirBytes::open(&self.data.join(LOG_DIR), self.segment_bytes)?;
        let begun = patch.position();
        let mut frames = Vec::new();
        let mut taken = Taken::Some;
        while ((patch.position() - begun) as usize) < sent.len() {
            let offset = (patch.position() - begun) as usize;
            let at = patch.position();
            match patch.take(&sent[offset..]) {
                Ok(header) => frames.push((at, &sent[offset..offset + header.wire_bytes()])),
                Err(unfit) => {
                    taken = Taken::Unfit(format!("sent what does not fit: {unfit}"));
                    break;
                }
            }
            if patch.is_closed(&mut own)? {
                taken = Taken::Closed;
                break;
            }
        }
        let (mut from, until) = (begun, patch.position());
        while from < until {
            let segment = from.segment(self.segment_bytes);
            mender.restore_segment(segment).map_err(failed("make", &mender.path(segment)))?;
            let to = until.min(segment.next().start(self.segment_bytes));
            match mender.keep(from, to).map_err(failed("keep the damaged part of", &mender.path(segment)))? {
                Some(kept) => tracing::info!(file = %kept.display(), "what stood there is kept"),
                None => {
                    tracing::warn!(%from, %to, "the directory of damaged bytes is full: what stood there is not kept")
                }
            }
            from = to;
        }
        for of_segment in frames.chunk_by(|a, b| a.0.segment(self.segment_bytes) == b.0.segment(self.segment_bytes)) {
            let path = mender.path(of_segment[0].0.segment(self.segment_bytes));
            mender.write(of_segment).map_err(failed("write", &path))?;
        }
        Ok(taken)
    }

    /// Repairs the damage that a walk over the log met, where `last` was repaired before: not the same place twice.
    pub fn close_next(
        &self,
        damage: RecoverError,
        last: Option<&Repaired>,
        waiting: &mut dyn FnMut(&str),
    ) -> Result<Repaired, RepairError> {
        let Some(gap) = damage.gap() else { return Err(damage.into()) };
        if last.is_some_and(|last| (last.from..last.to).contains(&gap.from)) {
            return Err(RepairError::Again { damage: damage.to_string() });
        }
        let repaired = self.close(&damage, gap, waiting)?;
        let Repaired { from, to, path, by } = &repaired;
        tracing::warn!("repaired {from}..{to} of {} from {by}", path.display());
        Ok(repaired)
    }

    /// Repairs until `look` finds no damage any more; what was repaired, in order. `look` walks the log anew each time.
    pub fn repair_all<T>(
        &self,
        mut look: impl FnMut() -> Result<T, RecoverError>,
        waiting: &mut dyn FnMut(&str),
    ) -> Result<(T, Vec<Repaired>), RepairError> {
        let mut repaired: Vec<Repaired> = Vec::new();
        loop {
            match look() {
                Ok(found) => return Ok((found, repaired)),
                Err(damage) => repaired.push(self.close_next(damage, repaired.last(), waiting)?),
            }
        }
    }
}

/// What is asked for at once: first one frame, since most damage is no larger; where the log does not go on behind that, all of it.
fn wanted_end(patch: &Patch<'_>, needed: Lsn) -> Lsn {
    let one = Lsn(patch.position().0 + 1);
    if patch.is_begun() { needed.max(one) } else { one }
}

enum Taken {
    /// The gap is closed.
    Closed,
    /// More is needed.
    Some,
    /// From here on not from this one.
    Unfit(String),
}
