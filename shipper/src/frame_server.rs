//! Giving a node back what it lost of its log: any node, whatever its role, sends the frames that it holds itself. It reads each
//! from its own files and verifies it before it sends them; it sends nothing that it does not know to be flushed. A thread for each
//! request, at most REQUESTS_MAX. `judge` is the core; the shipper hands over sockets of its links, a node that does not lead those
//! of all its peers.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use walferry_cluster::error::ReadError;
use walferry_cluster::member::{Caller, ClusterId, MemberName};
use walferry_cluster::message::{
    FETCHED_FRAMES_BYTES_MAX, FetchFrames, FetchedFrames, Message, PROTOCOL_VERSION, Refuse, RefuseCode, read_message,
};
use walferry_engine::epoch::EpochHistory;
use walferry_engine::limits::FRAME_ALIGN_BYTES;
use walferry_engine::log::Log;
use walferry_engine::lsn::Lsn;
use walferry_engine::reader::LogReader;

use crate::refuse::{not_leading, turn_away};

/// Requests that are answered at once; another is asked to come again.
pub const REQUESTS_MAX: usize = 8;
/// A peer of a node that does not lead has to say within this time what it wants.
const FIRST_MESSAGE_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a peer may take nothing.
const SEND_TIME_MAX: Duration = Duration::from_secs(10);

/// What a node holds, as of a moment.
#[derive(Clone, Debug)]
pub struct LogSnapshot {
    /// Its cluster.
    pub cluster_id: ClusterId,
    /// Its name.
    pub name: MemberName,
    /// Its segment size.
    pub segment_bytes: u64,
    /// Where its segments are.
    pub log_dir: PathBuf,
    /// Its epochs.
    pub history: EpochHistory,
    /// The oldest byte that it still has.
    pub start: Lsn,
    /// Its durable end.
    pub flushed: Lsn,
    /// Who gets any of it: the members with a log, where a register names them.
    pub members: Option<BTreeSet<MemberName>>,
}

impl LogSnapshot {
    /// What the node called `name` has in its log now.
    pub fn of(log: &Log, cluster_id: ClusterId, name: MemberName, history: &EpochHistory) -> LogSnapshot {
        LogSnapshot {
            cluster_id,
            name,
            segment_bytes: log.config().segment_bytes,
            log_dir: log.log_dir().to_owned(),
            history: history.clone(),
            start: log.start(),
            flushed: log.flushed(),
            members: None,
        }
    }

    /// For these members alone.
    pub fn for_members(self, members: Option<BTreeSet<MemberName>>) -> LogSnapshot {
        LogSnapshot { members, ..self }
    }
}

/// Up to where this node can send what is asked for.
pub fn judge(request: &FetchFrames, log: &LogSnapshot) -> Result<Lsn, Refuse> {
    let refuse = |code, text: String| Err(Refuse { code, text });
    let name = &log.name;
    if request.protocol != PROTOCOL_VERSION {
        let text = format!("{name} speaks protocol {PROTOCOL_VERSION}, the node that asks {}", request.protocol);
        return refuse(RefuseCode::Protocol, text);
    }
    if request.cluster_id != log.cluster_id {
        let text = format!("{} belongs to cluster {}, {name} to {}", request.name, request.cluster_id, log.cluster_id);
        return refuse(RefuseCode::ClusterId, text);
    }
    if log.members.as_ref().is_some_and(|members| !members.contains(&request.name)) {
        let text = format!("{} is no member of {name}'s cluster that has a log", request.name);
        return refuse(RefuseCode::Protest, text);
    }
    if request.segment_bytes != log.segment_bytes {
        let text = format!("{name} has segments of {} bytes, not of {}", log.segment_bytes, request.segment_bytes);
        return refuse(RefuseCode::SegmentBytes, text);
    }
    let Some(theirs) = EpochHistory::from_entries(&request.history) else {
        return refuse(RefuseCode::Protest, format!("{} has an impossible epoch history", request.name));
    };
    if request.from < log.start {
        return refuse(RefuseCode::NotHeld, format!("the log of {name} begins at {}", log.start));
    }
    let fork = log.history.fork_with(&theirs, Lsn::MAX);
    if request.from >= fork {
        let text = format!("the log of {name} parts from that of {} at {fork}", request.name);
        return refuse(RefuseCode::NotHeld, text);
    }
    if request.from >= log.flushed {
        return refuse(RefuseCode::NotHeld, format!("the log of {name} ends at {}", log.flushed));
    }
    Ok(fork.min(log.flushed))
}

/// The frames that this node can send.
pub fn look_up(request: &FetchFrames, log: &LogSnapshot) -> Result<Vec<u8>, Refuse> {
    read(request, log, judge(request, log)?)
}

/// The whole frames from `request.from` on, verified, as they stand in the log.
fn read(request: &FetchFrames, log: &LogSnapshot, until: Lsn) -> Result<Vec<u8>, Refuse> {
    let not_held = |text: String| Refuse { code: RefuseCode::NotHeld, text };
    let damaged = |error: &dyn std::fmt::Display| not_held(format!("{} cannot send it: {error}", log.name));
    let reader = LogReader::open(&log.log_dir, log.segment_bytes, request.from, until);
    let mut reader = reader.map_err(|error| damaged(&error))?;
    let mut bytes = Vec::new();
    while reader.position() < request.to {
        let at = reader.position();
        let frame = match reader.next_frame() {
            Ok(Some(frame)) => frame,
            // What is whole before damage of its own may be all that is wanted.
            Ok(None) => break,
            Err(_) if !bytes.is_empty() => break,
            Err(error) => return Err(damaged(&error)),
        };
        let header = frame.header();
        if at == request.from && request.crc.is_some_and(|crc| frame.follows(crc).is_err()) {
            return Err(not_held(format!(
                "the frame of {} at {at} follows another than the one before it there",
                log.name
            )));
        }
        let fits = bytes.len() + header.span_bytes() <= FETCHED_FRAMES_BYTES_MAX as usize;
        if header.end() > until || header.epoch != log.history.epoch_at(at) || !fits {
            break;
        }
        bytes.extend_from_slice(frame.wire());
        bytes.resize(bytes.len().next_multiple_of(FRAME_ALIGN_BYTES), 0);
    }
    if bytes.is_empty() {
        return Err(not_held(format!("{} has no whole frame at {}", log.name, request.from)));
    }
    Ok(bytes)
}

/// The requests that are being answered.
#[derive(Clone, Debug, Default)]
pub struct FrameServer {
    running: Arc<AtomicUsize>,
}

/// One of them, until it is dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl FrameServer {
    fn place(&self) -> Option<Place> {
        let before = self.running.fetch_add(1, Ordering::AcqRel);
        let place = Place(Arc::clone(&self.running));
        (before < REQUESTS_MAX).then_some(place)
    }

    fn run(place: Place, work: impl FnOnce() + Send + 'static) {
        let spawned = std::thread::Builder::new().name("frame-server".to_owned()).spawn(move || {
            work();
            drop(place);
        });
        if let Err(error) = spawned {
            // The socket is closed with the work; whoever asks comes again.
            tracing::warn!("no thread to answer a peer: {error}");
        }
    }

    /// Answers a request that was read from this socket.
    pub fn answer(&self, socket: OwnedFd, request: FetchFrames, log: LogSnapshot) {
        match self.place() {
            Some(place) => FrameServer::run(place, move || serve(TcpStream::from(socket), &request, &log)),
            None => turn_away(&socket, &full(&log)),
        }
    }

    /// A peer of a node that does not lead: it may fetch frames; every other request is refused with `text`.
    pub fn greet(&self, socket: OwnedFd, caller: Caller, text: String, log: LogSnapshot) {
        let Some(place) = self.place() else { return not_leading(socket, &text) };
        FrameServer::run(place, move || {
            let mut stream = TcpStream::from(socket);
            let said = stream.set_read_timeout(Some(FIRST_MESSAGE_TIME_MAX)).map_err(ReadError::from);
            match said.and_then(|()| read_message(&mut stream)) {
                Ok(Message::FetchFrames(request)) => match caller.check(&request.name) {
                    Ok(()) => serve(stream, &request, &log),
                    Err(error) => {
                        turn_away(&stream, &Refuse { code: RefuseCode::Protest, text: error.to_string() });
                    }
                },
                Ok(_) | Err(ReadError::Message(_)) => not_leading(stream.into(), &text),
                Err(ReadError::Stream(error)) => tracing::debug!("a peer said nothing: {error}"),
            }
        });
    }
}

fn full(log: &LogSnapshot) -> Refuse {
    let text = format!("{} answers {REQUESTS_MAX} requests already, which is the limit", log.name);
    Refuse { code: RefuseCode::Full, text }
}

fn serve(mut stream: TcpStream, request: &FetchFrames, log: &LogSnapshot) {
    match look_up(request, log) {
        Err(refuse) => {
            tracing::info!(asked_by = %request.name, from = %request.from, "cannot send a part of the log: {refuse}");
            turn_away(&stream, &refuse);
        }
        Ok(frames) => {
            let mut head = Vec::new();
            Message::FetchedFrames(FetchedFrames { from: request.from, bytes: frames.len() as u64 }).encode(&mut head);
            let sent = stream
                .set_write_timeout(Some(SEND_TIME_MAX))
                .and_then(|()| stream.write_all(&head))
                .and_then(|()| stream.write_all(&frames));
            match sent {
                Ok(()) => {
                    let to = request.from.advance(frames.len() as u64);
                    tracing::info!(to_node = %request.name, from = %request.from, %to, "sent a part of the log");
                }
                Err(error) => tracing::warn!(to_node = %request.name, "cannot send a part of the log: {error}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use walferry_engine::lsn::Epoch;

    fn entries(entries: &[(u64, u64)]) -> Vec<(Epoch, Lsn)> {
        entries.iter().map(|&(epoch, lsn)| (Epoch(epoch), Lsn(lsn))).collect()
    }

    #[test]
    fn every_kind_of_request_gets_its_answer() {
        let log = LogSnapshot {
            cluster_id: ClusterId(7),
            name: "b".parse().expect("a name"),
            segment_bytes: 1 << 26,
            log_dir: PathBuf::from("log"),
            history: EpochHistory::from_entries(&entries(&[(1, 0), (3, 100), (4, 200)])).expect("ascending"),
            start: Lsn(50),
            flushed: Lsn(300),
            members: Some(["a", "b"].map(|name| name.parse().expect("a name")).into()),
        };
        let request = |from, history: &[(u64, u64)]| FetchFrames {
            protocol: PROTOCOL_VERSION,
            cluster_id: ClusterId(7),
            name: "a".parse().expect("a name"),
            from: Lsn(from),
            to: Lsn(from + 10),
            segment_bytes: 1 << 26,
            crc: None,
            history: entries(history),
        };
        let all = &[(1, 0), (3, 100), (4, 200)][..];
        use RefuseCode::{NotHeld, Protest, Protocol, SegmentBytes};
        let table = [
            ("in the middle", request(60, all), Ok(300)),
            ("at the end", request(290, all), Ok(300)),
            ("asked by one that knows an older epoch only", request(60, &all[..2]), Ok(200)),
            ("asked by one that led since", request(60, &[(1, 0), (3, 100), (4, 200), (5, 250)]), Ok(250)),
            ("of a leadership of its own", request(95, &[(1, 0), (2, 90)]), Err(NotHeld)),
            ("before that", request(60, &[(1, 0), (2, 90)]), Ok(90)),
            ("recycled here", request(40, all), Err(NotHeld)),
            ("not here yet", request(300, all), Err(NotHeld)),
            ("not here, of an epoch that is", request(250, &all[..2]), Err(NotHeld)),
            ("nothing in common", request(60, &[(9, 0)]), Err(NotHeld)),
            (
                "a witness or an unknown name",
                FetchFrames { name: "w".parse().expect("a name"), ..request(60, all) },
                Err(Protest),
            ),
            ("impossible epochs", request(60, &[(3, 0), (2, 50)]), Err(Protest)),
            ("other cluster", FetchFrames { cluster_id: ClusterId(8), ..request(60, all) }, Err(RefuseCode::ClusterId)),
            ("other segments", FetchFrames { segment_bytes: 1 << 24, ..request(60, all) }, Err(SegmentBytes)),
            ("other protocol", FetchFrames { protocol: PROTOCOL_VERSION + 1, ..request(60, all) }, Err(Protocol)),
        ];
        for (what, request, expected) in table {
            let verdict = judge(&request, &log).map(|until| until.0).map_err(|refuse| refuse.code);
            assert_eq!(verdict, expected, "{what}");
        }
    }
}
