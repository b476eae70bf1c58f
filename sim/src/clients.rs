//! Clients of a simulated cluster and what they were told. Each speaks RESP to a session of some node, one command at a time, and
//! follows the leader when it is sent away. Everything that was acknowledged is written down.

mod growers;

use std::time::Duration;

use walferry_cluster::level::CommitLevel;
use walferry_engine::lsn::Epoch;

use crate::growing::Growing;
use crate::history::{Call, Registers};
use crate::resp::{Value, command, reply};
use crate::world::NodeNo;

/// A reply that takes longer is not waited for; some clients wait for less.
const PATIENCE: Duration = Duration::from_secs(3);
const PATIENCE_MIN: Duration = Duration::from_millis(200);
/// After an error.
const PAUSE_US: u64 = 40_000;

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientKind {
    /// Writes keys of its own, each once.
    Writer(CommitLevel),
    /// Reads and writes keys that it shares with others, strongly.
    Register,
    /// Writes a growing number, reads it elsewhere with its session's token.
    Reader(CommitLevel),
    /// Appends to strings and streams, alone and in transactions.
    Grower,
    /// Appends at `local`, most often upon what it has watched for a while.
    Watcher,
    /// Reads what others append at `READ AT MOST`, on any node.
    Recent,
    /// The same at `READ COMMITTED`.
    Committed,
}

/// What a reply to a commit at a remote level says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answers {
    /// It holds this level.
    AtTheLevel,
    /// It does, or nobody is in sync: then a failover waits for its leader.
    OrWithNobodyInSync,
    /// It may hold a lower one, which COMMITINFO tells.
    Degraded,
}

/// How much time clients let pass.
#[derive(Clone, Copy, Debug)]
pub struct Tempo {
    /// Between two commands, at most.
    pub think_us: u64,
    /// Between WATCH and EXEC, at most.
    pub watch_us: u64,
}

/// What was asked last.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Doing {
    /// Between two commands, or without a connection.
    Nothing,
    /// A command that only sets the session up; so many are left.
    Setup,
    Write {
        key: String,
        value: String,
    },
    RegisterWrite {
        call: Call,
    },
    RegisterRead {
        call: Call,
    },
    /// Asks at which level the write is held that was just answered.
    Evidence(Acknowledged),
    Count(u64),
    Token,
    /// Reads back; what it must find at least.
    ReadBack(u64),
    Growing(growers::GrowerStep),
}

/// A write that was acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acknowledged {
    pub key: String,
    pub value: String,
    pub level: CommitLevel,
    pub epoch: Epoch,
    pub node: NodeNo,
    pub at_us: u64,
    pub took_us: u64,
}

/// What a client wants of the cluster.
#[derive(Debug, PartialEq, Eq)]
pub enum Wants {
    /// A new connection to some node, which first gets these bytes.
    Connect(NodeNo, Vec<u8>),
    /// These bytes to its session.
    Send(Vec<u8>),
}

/// One client.
pub struct Client {
    pub number: usize,
    pub kind: ClientKind,
    /// Where it is connected, and its session there.
    pub session: Option<(NodeNo, u64)>,
    pub node: NodeNo,
    doing: Doing,
    setup: Vec<Vec<u8>>,
    input: Vec<u8>,
    /// Replies so far, of so many.
    replies: Vec<Value>,
    expected: usize,
    /// The key that it watches, and what that held.
    watched: Option<(String, String)>,
    /// It lets so much time pass, for once.
    rest_us: Option<u64>,
    tempo: Tempo,
    answers: Answers,
    pub asked_at_us: u64,
    /// Counts its commands, so that a late timeout finds out that it is late.
    pub turn: u64,
    written: u64,
    /// The number that its session has seen.
    seen: u64,
    token: Option<String>,
    /// Its next operation is a read.
    reads: bool,
    rng: fastrand::Rng,
    nodes: usize,
}

/// A reply as text: a string begins with `$`, an error with `-`.
fn text_of(value: &Value) -> String {
    match value {
        Value::Simple(text) => format!("+{text}"),
        Value::Error(text) => format!("-{text}"),
        Value::Bulk(text) => format!("${text}"),
        Value::Nil => "nil".to_owned(),
        Value::Integer(_) | Value::Array(_) => panic!("nobody asked for {value:?}"),
    }
}

/// Everything that clients were told.
#[derive(Default)]
pub struct Told {
    pub acknowledged: Vec<Acknowledged>,
    pub registers: Registers,
    pub growing: Growing,
    pub commands: u64,
    /// A session's read went back.
    pub broken: Vec<String>,
}

impl Client {
    pub fn new(number: usize, kind: ClientKind, nodes: usize, tempo: Tempo, answers: Answers, seed: u64) -> Client {
        let mut rng = fastrand::Rng::with_seed(seed);
        Client {
            number,
            kind,
            session: None,
            node: rng.usize(0..nodes),
            doing: Doing::Nothing,
            setup: Vec::new(),
            input: Vec::new(),
            replies: Vec::new(),
            expected: 1,
            watched: None,
            rest_us: None,
            tempo,
            answers,
            asked_at_us: 0,
            turn: 0,
            written: 0,
            seen: 0,
            token: None,
            reads: false,
            rng,
            nodes,
        }
    }

    /// How long it waits for a reply.
    pub fn patience(&self) -> Duration {
        if self.kind == ClientKind::Register && self.number.is_multiple_of(2) { PATIENCE_MIN } else { PATIENCE }
    }

    pub fn is_waiting(&self) -> bool {
        self.doing != Doing::Nothing
    }

    fn level(&self) -> CommitLevel {
        match self.kind {
            ClientKind::Writer(level) | ClientKind::Reader(level) => level,
            ClientKind::Register | ClientKind::Grower | ClientKind::Recent | ClientKind::Committed => {
                CommitLevel::RemoteFlush
            }
            ClientKind::Watcher => CommitLevel::Local,
        }
    }

    /// What it does next, when it is not waiting.
    pub fn next(&mut self, now_us: u64, told: &mut Told) -> Wants {
        self.asked_at_us = now_us;
        self.turn += 1;
        self.expected = 1;
        if self.session.is_none() {
            return self.connect();
        }
        if let Some(bytes) = self.setup.pop() {
            self.doing = Doing::Setup;
            return Wants::Send(bytes);
        }
        told.commands += 1;
        let size = if self.rng.u8(0..8) == 0 { self.rng.usize(0..20_000) } else { self.rng.usize(0..200) };
        let (doing, bytes) = match self.kind {
            ClientKind::Writer(_) => {
                self.written += 1;
                let key = format!("w{}.{}", self.number, self.written);
                let value = format!("{key}:{}", "x".repeat(size));
                let bytes = command(&["SET", &key, &value]);
                (Doing::Write { key, value }, bytes)
            }
            ClientKind::Register => {
                let key = format!("r{}", self.rng.u8(0..3));
                if self.rng.bool() {
                    self.written += 1;
                    let value = self.number as u64 * 1_000_000 + self.written;
                    let call = told.registers.invoke_write(&key, value);
                    (Doing::RegisterWrite { call }, command(&["SET", &key, &value.to_string()]))
                } else {
                    let call = told.registers.invoke_read(&key);
                    (Doing::RegisterRead { call }, command(&["GET", &key]))
                }
            }
            ClientKind::Grower | ClientKind::Watcher | ClientKind::Recent | ClientKind::Committed => {
                return Wants::Send(self.begin_to_grow(now_us, told));
            }
            ClientKind::Reader(_) if self.reads => {
                (Doing::ReadBack(self.seen), command(&["GET", &format!("s{}", self.number)]))
            }
            ClientKind::Reader(_) => {
                self.written += 1;
                let (key, number) = (format!("s{}", self.number), self.written);
                (Doing::Count(number), command(&["SET", &key, &number.to_string()]))
            }
        };
        self.doing = doing;
        Wants::Send(bytes)
    }

    fn connect(&mut self) -> Wants {
        self.input.clear();
        self.replies.clear();
        self.setup.clear();
        let first = match self.kind {
            ClientKind::Reader(_) if self.reads => {
                self.node = self.rng.usize(0..self.nodes);
                self.setup.push(command(&["READ", "TIMEOUT", "200"]));
                let token = self.token.clone().unwrap_or_default();
                command(&["SESSION", &token])
            }
            ClientKind::Register => {
                self.setup.push(command(&["READ", "STRONG"]));
                command(&["COMMITLEVEL", self.level().name()])
            }
            ClientKind::Reader(_) if self.token.is_some() => {
                self.setup.push(command(&["SESSION", self.token.as_deref().unwrap_or_default()]));
                command(&["COMMITLEVEL", self.level().name()])
            }
            ClientKind::Grower | ClientKind::Watcher | ClientKind::Recent | ClientKind::Committed => {
                if matches!(self.kind, ClientKind::Recent | ClientKind::Committed) {
                    self.node = self.rng.usize(0..self.nodes);
                }
                self.grower_setup()
            }
            ClientKind::Reader(_) | ClientKind::Writer(_) => command(&["COMMITLEVEL", self.level().name()]),
        };
        self.doing = Doing::Setup;
        Wants::Connect(self.node, first)
    }

    /// The connection is gone, or was given up: of what was asked nobody knows what became.
    pub fn lose(&mut self) {
        self.session = None;
        self.watched = None;
        self.doing = Doing::Nothing;
        self.turn += 1;
        self.node = self.rng.usize(0..self.nodes);
    }

    /// When it goes on.
    pub fn pause_us(&mut self, after_error: bool) -> u64 {
        let rest_us = self.rest_us.take();
        rest_us.unwrap_or_else(|| if after_error { PAUSE_US } else { 1 + self.rng.u64(0..self.tempo.think_us) })
    }

    /// A write is held at the level that the node tells, which is the one that was asked for unless the node may degrade.
    fn take_evidence(&self, ack: Acknowledged, reply: &Value, told: &mut Told) {
        if let Some(met) = met_of(reply) {
            if met > ack.level || met < ack.level && self.answers == Answers::AtTheLevel {
                let Acknowledged { key, level, node, at_us, .. } = &ack;
                told.broken.push(format!("{key} was answered at {level} by node {node} at {at_us} us, and met {met}"));
            }
            if self.answers == Answers::Degraded {
                told.acknowledged.push(Acknowledged { level: met, ..ack });
            }
        } else if reply.error().is_none() {
            told.broken.push(format!("client {}: COMMITINFO says {reply:?}", self.number));
        }
    }

    /// Bytes from its session. True when an error came.
    pub fn receive(&mut self, bytes: &[u8], now_us: u64, epoch: Epoch, told: &mut Told) -> Option<AfterReply> {
        self.input.extend_from_slice(bytes);
        while self.replies.len() < self.expected {
            let (value, length) = reply(&self.input)?;
            self.input.drain(..length);
            self.replies.push(value);
        }
        let replies = std::mem::take(&mut self.replies);
        self.expected = 1;
        let doing = match std::mem::replace(&mut self.doing, Doing::Nothing) {
            Doing::Growing(step) => return Some(self.grown(step, &replies, now_us, told)),
            Doing::Evidence(ack) => {
                self.take_evidence(ack, &replies[0], told);
                return Some(AfterReply::Next);
            }
            doing => doing,
        };
        let text = text_of(&replies[0]);
        let failed = text.starts_with('-');
        let (node, _) = self.session.expect("only a session replies");
        match doing {
            Doing::Nothing => panic!("client {} was told {text:?} and had asked nothing", self.number),
            Doing::Setup if failed && text.contains("LOST") => {
                self.token = None;
                self.seen = 0;
            }
            // No other member holds the log at the moment: there is nobody to confirm a remote level.
            Doing::Setup if text.starts_with("-NOREPLICAS") => return Some(AfterReply::Leave),
            Doing::Setup => assert!(!failed, "client {}: {text}", self.number),
            Doing::Write { key, value } if !failed => {
                assert_eq!(text, "+OK");
                let (level, took_us) = (self.level(), now_us - self.asked_at_us);
                let ack = Acknowledged { key, value, level, epoch, node, at_us: now_us, took_us };
                let degrades = self.answers == Answers::Degraded;
                if !degrades || !level.is_remote() {
                    told.acknowledged.push(ack.clone());
                }
                if level.is_remote() && (degrades || level == CommitLevel::RemoteFlush) {
                    self.doing = Doing::Evidence(ack);
                    return Some(AfterReply::Ask(command(&["COMMITINFO"])));
                }
            }
            Doing::RegisterWrite { call } => match failed {
                false => told.registers.wrote(call),
                true if is_refusal(&text[1..]) => told.registers.refused(call),
                true => {}
            },
            Doing::RegisterRead { call } => match failed {
                false => told.registers.read(call, text.strip_prefix('$').and_then(|text| text.parse().ok())),
                true => told.registers.refused(call),
            },
            Doing::Count(number) if !failed => {
                self.seen = self.seen.max(number);
                self.doing = Doing::Token;
                return Some(AfterReply::Ask(command(&["SESSION"])));
            }
            Doing::Token if !failed => {
                self.token = text.strip_prefix('$').map(str::to_owned);
                self.reads = !self.reads;
                return Some(AfterReply::Leave);
            }
            Doing::ReadBack(least) if !failed => {
                let found = text.strip_prefix('$').and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
                if found < least {
                    told.broken.push(format!(
                        "client {} had seen {least} of s{} and read {found} on node {node} at {now_us} us (token {:?})",
                        self.number, self.number, self.token
                    ));
                }
                self.seen = self.seen.max(found);
                self.doing = Doing::Token;
                return Some(AfterReply::Ask(command(&["SESSION"])));
            }
            Doing::ReadBack(_) | Doing::Count(_) if text.contains("LOST") => {
                self.token = None;
                self.seen = 0;
                self.reads = false;
                return Some(AfterReply::Leave);
            }
            Doing::ReadBack(_) => {
                // This node is behind: another one, or the leader.
                self.reads = self.rng.bool();
                return Some(AfterReply::Leave);
            }
            Doing::Write { .. } | Doing::Count(_) | Doing::Token => {}
            Doing::Growing(_) | Doing::Evidence(_) => unreachable!("seen to above"),
        }
        if failed && is_elsewhere(&text[1..]) {
            return Some(AfterReply::Leave);
        }
        Some(if failed { AfterReply::Pause } else { AfterReply::Next })
    }
}

/// What COMMITINFO says of the level that a commit is held at; `None` for an error: another epoch has written there since.
fn met_of(reply: &Value) -> Option<CommitLevel> {
    let Value::Array(words) = reply else { return None };
    let at = words.iter().position(|word| *word == Value::Bulk("met".to_owned()))?;
    let Value::Bulk(level) = words.get(at + 1)? else { return None };
    level.parse().ok()
}

/// A refusal says that nothing was done.
fn is_refusal(text: &str) -> bool {
    ["MOVED", "READONLY", "NOREPLICAS", "LOST"].iter().any(|refusal| text.starts_with(refusal))
}

/// An error after which another node is asked.
fn is_elsewhere(text: &str) -> bool {
    ["MOVED", "READONLY", "CLUSTERDOWN"].iter().any(|error| text.starts_with(error))
}

/// How a client goes on after a reply.
#[derive(Debug, PartialEq, Eq)]
pub enum AfterReply {
    Next,
    Pause,
    Leave,
    Ask(Vec<u8>),
}

/// How long 99 of 100 commits at this level took at most, once there are enough of them.
pub fn p99_us(acknowledged: &[Acknowledged], level: CommitLevel) -> Option<u64> {
    let mut times: Vec<u64> = acknowledged.iter().filter(|ack| ack.level == level).map(|ack| ack.took_us).collect();
    times.sort_unstable();
    (times.len() >= 50).then(|| times[times.len() * 99 / 100])
}
