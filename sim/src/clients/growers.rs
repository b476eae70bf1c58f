//! Clients whose values only grow: they append to strings and streams, alone and in transactions, upon what they watched or upon
//! whatever is there, and read at every guarantee that there is.

use std::collections::BTreeMap;

use walferry_cluster::level::CommitLevel;

use super::{AfterReply, Client, ClientKind, Doing, Told, is_elsewhere, is_refusal};
use crate::growing::{Became, END, tokens};
use crate::resp::{Value, command};

/// Keys of each sort.
const KEYS: u8 = 3;
/// Keys that are watched: the same one is seldom written twice in a short leadership.
const WATCHED_KEYS: u8 = 8;
/// What readers at `READ AT MOST` ask for, and what their node's clock and the leader's may be wrong by meanwhile.
const AGE_MAX_MS: u64 = 100;
const AGE_SLACK_US: u64 = 10_000;

/// What a growing client asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum GrowerStep {
    Append {
        key: String,
        token: String,
    },
    /// To a stream.
    Add {
        key: String,
        token: String,
    },
    /// To two strings in one transaction.
    Pair {
        keys: [String; 2],
        tokens: [String; 2],
    },
    /// A read of these at one moment.
    Look {
        keys: Vec<String>,
    },
    /// A read of what is committed, of what was there lately.
    Committed {
        key: String,
    },
    LookBack {
        key: String,
        as_of_us: u64,
    },
    Watch {
        key: String,
    },
    /// An append, if the key is as it was watched.
    Exec {
        key: String,
        token: String,
    },
}

impl Client {
    fn key(&mut self, sort: char) -> String {
        format!("{sort}{}", self.rng.u8(0..if sort == 'w' { WATCHED_KEYS } else { KEYS }))
    }

    /// Of one length, whoever's it is.
    fn token(&mut self) -> String {
        self.written += 1;
        format!("t{:02}.{:05}", self.number, self.written)
    }

    /// What it asks for next, and how many replies that takes.
    pub(super) fn grow(&mut self, now_us: u64, told: &mut Told) -> (GrowerStep, Vec<Vec<u8>>) {
        if let Some((key, upon)) = self.watched.take() {
            let token = self.token();
            told.growing.ask(&key, &token, now_us, None, Some(&upon));
            let words = [command(&["MULTI"]), append(&key, &token), command(&["EXEC"])];
            return (GrowerStep::Exec { key, token }, words.to_vec());
        }
        let get = |key: &str| command(&["GET", key]);
        match (self.kind, self.rng.u8(0..10)) {
            (ClientKind::Recent, _) => {
                let key = self.key('g');
                let as_of_us = now_us.saturating_sub(AGE_MAX_MS * 1000 + AGE_SLACK_US);
                (GrowerStep::LookBack { key: key.clone(), as_of_us }, vec![get(&key)])
            }
            (ClientKind::Committed, _) => {
                let key = self.key('g');
                (GrowerStep::Committed { key: key.clone() }, vec![get(&key)])
            }
            (ClientKind::Watcher, 0 | 1) | (ClientKind::Grower, 0..3) => {
                let sort = if self.kind == ClientKind::Watcher { 'w' } else { 'g' };
                let (key, token) = (self.key(sort), self.token());
                told.growing.ask(&key, &token, now_us, None, None);
                let words = vec![append(&key, &token)];
                (GrowerStep::Append { key, token }, words)
            }
            // Read before and after: what was watched is what was read.
            (ClientKind::Watcher, _) | (_, 3) => {
                let key = self.key(if self.kind == ClientKind::Watcher { 'w' } else { 'g' });
                (GrowerStep::Watch { key: key.clone() }, vec![get(&key), command(&["WATCH", &key]), get(&key)])
            }
            (_, 4..6) => {
                let (key, token) = (self.key('x'), self.token());
                told.growing.ask(&key, &token, now_us, None, None);
                let words = vec![command(&["XADD", &key, "*", "t", &token])];
                (GrowerStep::Add { key, token }, words)
            }
            (_, 6..8) => {
                let keys = [self.key('g'), self.key('p')];
                let both = [self.token(), self.token()];
                for (own, other) in [(0, 1), (1, 0)] {
                    told.growing.ask(&keys[own], &both[own], now_us, Some(&both[other]), None);
                }
                let [first, second] = [0, 1].map(|each| append(&keys[each], &both[each]));
                (GrowerStep::Pair { keys, tokens: both }, vec![command(&["MULTI"]), first, second, command(&["EXEC"])])
            }
            _ => {
                let keys = vec![self.key('g'), self.key('p')];
                let words = vec![command(&["MULTI"]), get(&keys[0]), get(&keys[1]), command(&["EXEC"])];
                (GrowerStep::Look { keys }, words)
            }
        }
    }

    /// What it makes of the replies.
    pub(super) fn grown(&mut self, step: GrowerStep, replies: &[Value], now_us: u64, told: &mut Told) -> AfterReply {
        let last = replies.last().expect("there is a reply to everything");
        // An acknowledgement below this level promises nothing that a failover keeps.
        let done = if self.level() >= CommitLevel::RemoteFlush { Became::Done } else { Became::Unknown };
        let undone = match last.error() {
            Some(text) if is_refusal(text) || text.starts_with("EXECABORT") => Became::Refused,
            _ => Became::Unknown,
        };
        let asked_us = self.asked_at_us;
        match (step, last) {
            (GrowerStep::Append { token, .. }, Value::Integer(length)) => {
                told.growing.answer(&token, done, Some(length.to_string()), now_us);
            }
            (GrowerStep::Add { token, .. }, Value::Bulk(id)) => {
                told.growing.answer(&token, done, Some(id.clone()), now_us)
            }
            (GrowerStep::Pair { tokens, .. }, Value::Array(lengths)) => {
                for (token, length) in tokens.iter().zip(lengths) {
                    let Value::Integer(length) = length else { panic!("a transaction of appends gave {lengths:?}") };
                    told.growing.answer(token, done, Some(length.to_string()), now_us);
                }
            }
            (GrowerStep::Exec { token, .. }, Value::Array(lengths)) => {
                let [Value::Integer(length)] = lengths[..] else { panic!("a transaction of one gave {lengths:?}") };
                told.growing.answer(&token, done, Some(length.to_string()), now_us);
            }
            (GrowerStep::Exec { token, .. }, Value::Nil) => told.growing.answer(&token, Became::Refused, None, now_us),
            (GrowerStep::Append { token, .. } | GrowerStep::Add { token, .. } | GrowerStep::Exec { token, .. }, _) => {
                told.growing.answer(&token, undone, None, now_us);
            }
            (GrowerStep::Pair { tokens, .. }, _) => {
                tokens.iter().for_each(|token| told.growing.answer(token, undone, None, now_us));
            }
            (GrowerStep::Look { keys }, Value::Array(values)) if values.iter().all(is_value) => {
                let saw: BTreeMap<_, _> = keys.into_iter().zip(values.iter().map(seen)).collect();
                told.growing.look(saw, asked_us, now_us);
            }
            (GrowerStep::Committed { key }, value) if is_value(value) => told.growing.look_committed(&key, seen(value)),
            (GrowerStep::LookBack { key, as_of_us }, value) if is_value(value) => {
                told.growing.look_back(&key, seen(value), as_of_us);
            }
            (GrowerStep::Watch { key }, value) if is_value(value) && *value == replies[0] => {
                let upon = tokens_text(value);
                self.watched = Some((key, upon));
                self.rest_us = Some(self.rng.u64(0..self.tempo.watch_us));
            }
            (
                GrowerStep::Watch { .. }
                | GrowerStep::Look { .. }
                | GrowerStep::Committed { .. }
                | GrowerStep::LookBack { .. },
                _,
            ) => {}
        }
        let failed = replies.iter().find_map(Value::error);
        match failed {
            Some(text) if is_elsewhere(text) || matches!(self.kind, ClientKind::Recent | ClientKind::Committed) => {
                AfterReply::Leave
            }
            Some(_) => AfterReply::Pause,
            // Readers of any node go from one to the next.
            None if matches!(self.kind, ClientKind::Recent | ClientKind::Committed) && self.rng.u8(0..4) == 0 => {
                AfterReply::Leave
            }
            None => AfterReply::Next,
        }
    }

    /// How it sets its session up: the first command, and those that follow.
    pub(super) fn grower_setup(&mut self) -> Vec<u8> {
        match self.kind {
            ClientKind::Recent => {
                self.setup.push(command(&["READ", "TIMEOUT", "200"]));
                command(&["READ", "AT", "MOST", &format!("{AGE_MAX_MS}ms")])
            }
            ClientKind::Committed => command(&["READ", "COMMITTED"]),
            ClientKind::Watcher => command(&["COMMITLEVEL", self.level().name()]),
            _ => {
                self.setup.push(command(&["READ", "STRONG"]));
                command(&["COMMITLEVEL", self.level().name()])
            }
        }
    }

    pub(super) fn begin_to_grow(&mut self, now_us: u64, told: &mut Told) -> Vec<u8> {
        let (step, commands) = self.grow(now_us, told);
        self.doing = Doing::Growing(step);
        self.expected = commands.len();
        commands.concat()
    }
}

fn append(key: &str, token: &str) -> Vec<u8> {
    command(&["APPEND", key, &format!("{token}{END}")])
}

fn is_value(value: &Value) -> bool {
    matches!(value, Value::Bulk(_) | Value::Nil)
}

fn tokens_text(value: &Value) -> String {
    if let Value::Bulk(text) = value { text.clone() } else { String::new() }
}

fn seen(value: &Value) -> Vec<String> {
    tokens(&tokens_text(value))
}
