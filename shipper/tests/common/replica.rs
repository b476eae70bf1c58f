//! A replica for tests: receives on a thread, checks every message's place, keeps the log in memory, acknowledges at once.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use walferry_cluster::message::*;
use walferry_cluster::register::MemberId;
use walferry_engine::frame::{Frame, UnverifiedFrame};
use walferry_engine::limits::FRAME_HEADER_BYTES;
use walferry_engine::lsn::{Epoch, Lsn};

use super::{CLUSTER, SEGMENT_BYTES};

/// What the replica has seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The log from position 0 on.
    pub log: Vec<u8>,
    /// The end of the last whole frame.
    pub whole: Lsn,
    pub leader_flushed: Lsn,
    pub welcome: Option<Welcome>,
    pub refuse: Option<Refuse>,
    pub frames: usize,
    pub chunks: usize,
    /// Changes between chunks and frames.
    pub switches: usize,
    pub heartbeats: usize,
    pub over: bool,
}

#[derive(Default)]
struct Gate {
    seen: Mutex<Seen>,
    /// While true, nothing is read from the socket.
    paused: Mutex<bool>,
    unpaused: Condvar,
}

/// A running replica; dropping it ends the connection.
pub struct Replica {
    gate: Arc<Gate>,
    stream: TcpStream,
    thread: Option<thread::JoinHandle<()>>,
}

pub fn hello(name: &str, log: &[u8], history: &[(u64, u64)]) -> Hello {
    Hello {
        client_address: String::new(),
        protocol: PROTOCOL_VERSION,
        cluster_id: Some(CLUSTER),
        name: name.parse().expect("a name"),
        flushed: Lsn(log.len() as u64),
        segment_bytes: SEGMENT_BYTES,
        crc: last_crc(log),
        member: MemberId(0),
        gives_up: Epoch(0),
        history: history.iter().map(|&(epoch, lsn)| (Epoch(epoch), Lsn(lsn))).collect(),
    }
}

fn last_crc(log: &[u8]) -> u32 {
    let (mut at, mut crc) = (0, 0);
    while at < log.len() {
        let frame = UnverifiedFrame::parse(&log[at..], Lsn(at as u64)).expect("a whole log");
        crc = frame.claimed().crc;
        at = frame.claimed().end().0 as usize;
    }
    crc
}

impl Replica {
    /// Connects with the usual hello.
    pub fn connect(leader: SocketAddr, name: &str, log: Vec<u8>) -> Replica {
        let hello = hello(name, &log, &[(1, 0)]);
        Replica::connect_as(leader, hello, log, true)
    }

    /// Connects with this hello; `acknowledge`: says what it has.
    pub fn connect_as(leader: SocketAddr, hello: Hello, log: Vec<u8>, acknowledge: bool) -> Replica {
        let mut stream = TcpStream::connect(leader).expect("the leader listens");
        stream.set_nodelay(true).expect("a socket");
        let mut bytes = Vec::new();
        Message::Hello(hello).encode(&mut bytes);
        stream.write_all(&bytes).expect("the leader listens");
        let gate = Arc::new(Gate::default());
        let whole = Lsn(log.len() as u64);
        *gate.seen.lock().unwrap() = Seen { log, whole, ..Seen::default() };
        let (theirs, socket) = (Arc::clone(&gate), stream.try_clone().expect("a socket"));
        let thread = thread::spawn(move || {
            let mut receiver = Receiver { stream: socket, gate: theirs, acknowledge, buffer: Vec::new(), taken: 0 };
            while matches!(receiver.step(), Ok(true)) {}
            receiver.gate.seen.lock().unwrap().over = true;
        });
        Replica { gate, stream, thread: Some(thread) }
    }

    pub fn seen(&self) -> Seen {
        self.gate.seen.lock().unwrap().clone()
    }

    /// Of what was seen, without copying the log.
    pub fn ask<T>(&self, question: impl FnOnce(&Seen) -> T) -> T {
        question(&self.gate.seen.lock().unwrap())
    }

    pub fn pause(&self, paused: bool) {
        *self.gate.paused.lock().unwrap() = paused;
        self.gate.unpaused.notify_all();
    }

    /// Ends the connection and gives the whole frames that it has.
    pub fn disconnect(mut self) -> Vec<u8> {
        self.end();
        let seen = self.seen();
        seen.log[..seen.whole.0 as usize].to_vec()
    }

    fn end(&mut self) {
        self.pause(false);
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let failed = thread.join().is_err();
            assert!(!failed || thread::panicking(), "the replica failed");
        }
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.end();
    }
}

struct Receiver {
    stream: TcpStream,
    gate: Arc<Gate>,
    acknowledge: bool,
    buffer: Vec<u8>,
    taken: usize,
}

impl Receiver {
    /// Reads until `bytes` are there.
    fn need(&mut self, bytes: usize) -> io::Result<()> {
        while self.buffer.len() - self.taken < bytes {
            let mut paused = self.gate.paused.lock().unwrap();
            while *paused {
                paused = self.gate.unpaused.wait(paused).unwrap();
            }
            drop(paused);
            if self.taken > 1 << 20 {
                self.buffer.drain(..std::mem::take(&mut self.taken));
            }
            let filled = self.buffer.len();
            self.buffer.resize(filled + (256 << 10), 0);
            let read = self.stream.read(&mut self.buffer[filled..]);
            self.buffer.truncate(filled + *read.as_ref().unwrap_or(&0));
            if read? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    fn take(&mut self, bytes: usize) -> &[u8] {
        self.taken += bytes;
        &self.buffer[self.taken - bytes..self.taken]
    }

    /// One message; false after the last.
    fn step(&mut self) -> io::Result<bool> {
        let (message, bytes) = loop {
            match decode(&self.buffer[self.taken..]).expect("the leader speaks the protocol") {
                Some(decoded) => break decoded,
                None => self.need(self.buffer.len() - self.taken + 1)?,
            }
        };
        self.take(bytes);
        let gate = Arc::clone(&self.gate);
        let mut echo_us = 0;
        match message {
            Message::Welcome(welcome) => {
                let mut seen = gate.seen.lock().unwrap();
                seen.log.truncate(welcome.start.0 as usize);
                seen.whole = welcome.start;
                seen.welcome = Some(welcome);
            }
            Message::Refuse(refuse) => {
                gate.seen.lock().unwrap().refuse = Some(refuse);
                return Ok(false);
            }
            Message::Frame { wire_bytes, .. } => self.frame(wire_bytes)?,
            Message::Chunk(chunk) => self.chunk(chunk)?,
            Message::LinkHeartbeat(heartbeat) => {
                let mut seen = gate.seen.lock().unwrap();
                assert!(heartbeat.flushed >= seen.leader_flushed, "the leader went back");
                (seen.leader_flushed, seen.heartbeats) = (heartbeat.flushed, seen.heartbeats + 1);
                echo_us = heartbeat.sent_at_us;
            }
            other => panic!("not for replicas: {other:?}"),
        }
        if self.acknowledge {
            self.confirm(echo_us)?;
        }
        Ok(true)
    }

    fn frame(&mut self, wire_bytes: usize) -> io::Result<()> {
        self.need(wire_bytes)?;
        let gate = Arc::clone(&self.gate);
        let mut seen = gate.seen.lock().unwrap();
        let at = Lsn(seen.log.len() as u64);
        assert_eq!(seen.whole, at, "a frame inside a frame");
        let frame = Frame::read(self.take(wire_bytes), at).expect("a whole frame");
        let header = *frame.header();
        assert_eq!(header.wire_bytes(), wire_bytes);
        let taken = self.taken;
        seen.log.extend_from_slice(&self.buffer[taken - wire_bytes..taken]);
        seen.log.resize(header.end().0 as usize, 0);
        seen.whole = header.end();
        seen.leader_flushed = seen.leader_flushed.max(header.flushed);
        seen.switches += usize::from(seen.frames == 0 && seen.chunks > 0);
        seen.frames += 1;
        Ok(())
    }

    fn chunk(&mut self, chunk: Chunk) -> io::Result<()> {
        assert_eq!(chunk.lsn.0 as usize, self.gate.seen.lock().unwrap().log.len(), "a chunk out of place");
        let mut left = chunk.bytes as usize;
        while left > 0 {
            self.need(1)?;
            let here = left.min(self.buffer.len() - self.taken);
            let gate = Arc::clone(&self.gate);
            let mut seen = gate.seen.lock().unwrap();
            seen.log.extend_from_slice(self.take(here));
            left -= here;
        }
        let gate = Arc::clone(&self.gate);
        let mut seen = gate.seen.lock().unwrap();
        seen.chunks += 1;
        while let Some(rest) = seen.log.get(seen.whole.0 as usize..).filter(|rest| rest.len() >= FRAME_HEADER_BYTES) {
            let frame = UnverifiedFrame::parse(rest, seen.whole).expect("a frame");
            let end = frame.claimed().end();
            if end.0 as usize > seen.log.len() {
                break;
            }
            seen.whole = end;
        }
        Ok(())
    }

    fn confirm(&mut self, echo_us: u64) -> io::Result<()> {
        let (whole, leader_flushed) = self.gate.seen.lock().map(|seen| (seen.whole, seen.leader_flushed)).unwrap();
        let applied = whole.min(leader_flushed);
        let ack = Ack { written: whole, flushed: whole, applied, echo_us, stamp_us: 1, ..Ack::default() };
        let mut bytes = Vec::new();
        Message::Ack(ack).encode(&mut bytes);
        self.stream.write_all(&bytes)
    }
}
