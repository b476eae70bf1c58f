//! One user's session: writes at the leader, reads wherever what the session has seen is there. Each is one round trip: the token
//! goes out with the command and comes back with its answer. Drives `cluster`; what an error means is told by `answer`.

use std::fmt;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use crate::answer::{Refused, code, read_elsewhere, refusal};
use crate::backoff::Backoff;
use crate::cluster::Cluster;
use crate::error::Error;
use crate::pool::{Pool, TcpPool};
use crate::reply::Reply;
use crate::token::Token;

/// What a write waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CommitLevel {
    /// In the leader's memory.
    Off,
    /// Durable on the leader.
    Local,
    /// And received by the replicas of the sync policy.
    RemoteWrite,
    /// And durable there.
    RemoteFlush,
    /// And visible to readers there.
    RemoteApply,
}

impl CommitLevel {
    /// As `COMMITLEVEL` takes it.
    pub fn name(self) -> &'static str {
        match self {
            CommitLevel::Off => "off",
            CommitLevel::Local => "local",
            CommitLevel::RemoteWrite => "remote_write",
            CommitLevel::RemoteFlush => "remote_flush",
            CommitLevel::RemoteApply => "remote_apply",
        }
    }
}

/// What a read asks for beyond what the session has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadMode {
    /// Nothing.
    #[default]
    Any,
    /// A state that is at most so old.
    AtMost(Duration),
    /// What no failover takes back.
    Committed,
    /// Everything that anybody was told is written; only the leader can answer.
    Strong,
}

/// Which node answers a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// The leader.
    Leader,
    /// Any replica that has what the session has seen; the leader if none has it in time.
    Replica,
}

/// How a session writes and reads; may be changed between two calls.
#[derive(Clone, Debug)]
pub struct Options {
    /// What writes wait for; none: what the node is configured to.
    pub commit_level: Option<CommitLevel>,
    /// What reads ask for.
    pub read_mode: ReadMode,
    /// How long a replica may wait until it has what the session has seen, before another one is asked. What is left of it is for
    /// the others.
    pub replica_wait: Duration,
    /// How long the leader may wait until what is read is as fresh, or as safe, as the read mode asks.
    pub leader_wait: Duration,
    /// A call ends within this time and the time for one answer.
    pub give_up_after: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            commit_level: None,
            read_mode: ReadMode::Any,
            replica_wait: Duration::from_millis(100),
            leader_wait: Duration::from_secs(1),
            give_up_after: Duration::from_secs(10),
        }
    }
}

/// One user's session.
pub struct Session<P: Pool = TcpPool> {
    cluster: Cluster<P>,
    token: Option<Token>,
    answered_by: Option<String>,
    /// How it writes and reads.
    pub options: Options,
}

impl<P: Pool> fmt::Debug for Session<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("token", &self.token).field("options", &self.options).finish_non_exhaustive()
    }
}

/// How one node's answer leads on.
enum Next {
    Answered(Reply),
    /// The leader is elsewhere, and known.
    Moved,
    /// Another node, or a pause, because of this.
    Elsewhere(String),
}

/// What became of a command that was to be sent.
enum Sent {
    /// The command was not sent, so it was not executed; why.
    Not(String),
    /// The connection broke before the answer.
    Broke(String),
    /// The node answered.
    Answered(Answers),
}

/// The answers to a command and to what went with it.
struct Answers {
    /// To the token.
    token: Reply,
    /// The first error among those to the settings.
    setting_error: Option<String>,
    command: Reply,
    /// The new token.
    new_token: Reply,
}

/// One command as bytes.
fn bytes<A: AsRef<[u8]>>(command: &[A]) -> Vec<&[u8]> {
    command.iter().map(AsRef::as_ref).collect()
}

impl<P: Pool> Session<P> {
    /// A session that has seen nothing yet.
    pub fn new(cluster: &Cluster<P>) -> Session<P> {
        Session { cluster: cluster.clone(), token: None, answered_by: None, options: Options::default() }
    }

    /// Goes on where a session with this token was, here or in another process.
    pub fn resume(cluster: &Cluster<P>, token: &str) -> Result<Session<P>, Error> {
        let token = token.parse().map_err(Error::Token)?;
        Ok(Session { token: Some(token), ..Session::new(cluster) })
    }

    /// What the session has seen, to go on from elsewhere. Characters that a cookie may have; none before the first answer.
    pub fn token(&self) -> Option<String> {
        self.token.as_ref().map(Token::to_string)
    }

    /// The node that the last answer came from, `HOST:PORT`.
    pub fn answered_by(&self) -> Option<&str> {
        self.answered_by.as_deref()
    }

    /// Forgets what the session has seen: after [`Error::Lost`], to go on with what there is.
    pub fn reset(&mut self) {
        self.token = None;
    }

    /// Writes at the leader. An error answer of the command is [`Error::Refused`]. When the connection breaks before the answer,
    /// the write is not sent again: [`Error::Uncertain`].
    pub fn write<A: AsRef<[u8]>>(&mut self, command: &[A]) -> Result<Reply, Error> {
        self.write_until_answered(&bytes(command), false)
    }

    /// As `write`, for a command that may be executed twice (a `SET`, not an `INCR`): sent again when its fate is not known.
    pub fn write_idempotent<A: AsRef<[u8]>>(&mut self, command: &[A]) -> Result<Reply, Error> {
        self.write_until_answered(&bytes(command), true)
    }

    /// Reads. The command may be sent more than once, and to more than one node.
    pub fn read<A: AsRef<[u8]>>(&mut self, route: Route, command: &[A]) -> Result<Reply, Error> {
        self.read_until_answered(route, &bytes(command))
    }

    fn write_until_answered(&mut self, command: &[&[u8]], idempotent: bool) -> Result<Reply, Error> {
        let mut backoff = Backoff::new(self.options.give_up_after);
        self.cluster.refresh_if_old();
        let mut was_moved = false;
        loop {
            let reason = match self.cluster.leader() {
                None => "nobody is known to lead".to_owned(),
                Some(leader) => match self.write_at(&leader, command) {
                    Ok(Next::Answered(reply)) => return Ok(reply),
                    // Twice in a row, two nodes point to each other.
                    Ok(Next::Moved) if !was_moved => {
                        was_moved = true;
                        continue;
                    }
                    Ok(Next::Moved) => format!("{leader} does not lead any more"),
                    Ok(Next::Elsewhere(reason)) => reason,
                    Err(error @ Error::Uncertain { .. }) if idempotent && !backoff.is_over() => error.to_string(),
                    Err(error) => return Err(error),
                },
            };
            was_moved = false;
            if !backoff.pause() {
                return Err(Error::Unavailable(reason));
            }
            self.look_for_leader();
        }
    }

    fn write_at(&mut self, leader: &str, command: &[&[u8]]) -> Result<Next, Error> {
        let level = self.options.commit_level.map_or("DEFAULT", CommitLevel::name);
        let settings = [vec![b"COMMITLEVEL".as_slice(), level.as_bytes()]];
        let uncertain = |reason: String| Error::Uncertain { address: leader.to_owned(), reason };
        let answers = match self.send(leader, &settings, command) {
            Sent::Not(reason) => return Ok(Next::Elsewhere(reason)),
            Sent::Broke(reason) => return Err(uncertain(reason)),
            Sent::Answered(answers) => answers,
        };
        match answers.command {
            Reply::Error(text) => match refusal(&text) {
                Some(refused) => Ok(self.follow(leader, &refused, &text)),
                None if code(&text) == "LOST" => Err(Error::Lost(text)),
                None if code(&text) == "BUSY" => Ok(Next::Elsewhere(format!("{leader}: {text}"))),
                None if code(&text) == "UNCERTAIN" => {
                    // It was executed there: the token tells up to where.
                    self.take_token(leader, &answers.new_token);
                    Err(uncertain(text))
                }
                None => Err(Error::Refused { address: leader.to_owned(), text }),
            },
            reply => {
                self.take_token(leader, &answers.new_token);
                // Done, and perhaps not as safely as was asked.
                answers.setting_error.map_or(Ok(Next::Answered(reply)), |text| Err(uncertain(text)))
            }
        }
    }

    fn read_until_answered(&mut self, route: Route, command: &[&[u8]]) -> Result<Reply, Error> {
        let mut backoff = Backoff::new(self.options.give_up_after);
        self.cluster.refresh_if_old();
        loop {
            let replicas_until = Instant::now() + self.options.replica_wait;
            let mut reason = "nobody is known to lead".to_owned();
            for address in self.to_read(route) {
                let leads = self.cluster.leader().as_ref() == Some(&address);
                let wait = if leads {
                    self.options.leader_wait
                } else {
                    replicas_until.saturating_duration_since(Instant::now())
                };
                match self.read_at(&address, wait, command)? {
                    Next::Answered(reply) => return Ok(reply),
                    Next::Moved => reason = format!("{address} does not lead any more"),
                    Next::Elsewhere(why) => reason = why,
                }
                if backoff.is_over() {
                    break;
                }
            }
            if !backoff.pause() {
                return Err(Error::Unavailable(reason));
            }
            self.look_for_leader();
        }
    }

    fn to_read(&self, route: Route) -> Vec<String> {
        match route {
            Route::Replica if self.options.read_mode != ReadMode::Strong => {
                let floor = self.token.as_ref().map_or(0, Token::lsn);
                self.cluster.topology().reading_order(floor, Instant::now())
            }
            _ => self.cluster.leader().into_iter().collect(),
        }
    }

    fn read_at(&mut self, address: &str, wait: Duration, command: &[&[u8]]) -> Result<Next, Error> {
        let wait = wait.as_millis().to_string();
        let age = match self.options.read_mode {
            ReadMode::AtMost(age) => format!("{}ms", age.as_millis()),
            _ => String::new(),
        };
        let mode = match self.options.read_mode {
            ReadMode::Any => vec![b"READ".as_slice(), b"ANY"],
            ReadMode::AtMost(_) => vec![b"READ".as_slice(), b"AT", b"MOST", age.as_bytes()],
            ReadMode::Committed => vec![b"READ".as_slice(), b"COMMITTED"],
            ReadMode::Strong => vec![b"READ".as_slice(), b"STRONG"],
        };
        let settings = [vec![b"READ".as_slice(), b"TIMEOUT", wait.as_bytes()], mode];
        let answers = match self.send(address, &settings, command) {
            Sent::Not(reason) | Sent::Broke(reason) => return Ok(Next::Elsewhere(reason)),
            Sent::Answered(answers) => answers,
        };
        if let Reply::Error(text) = answers.token {
            // What follows may be older than what the session has seen.
            return match code(&text) {
                "LOST" => Err(Error::Lost(text)),
                "NOAUTH" => Err(Error::Refused { address: address.to_owned(), text }),
                _ => Err(Error::Token(text)),
            };
        }
        let (answer, error) = (answers.command, answers.setting_error);
        match error.map_or(answer, Reply::Error) {
            Reply::Error(text) => match refusal(&text) {
                Some(refused) => Ok(self.follow(address, &refused, &text)),
                None if code(&text) == "LOST" => Err(Error::Lost(text)),
                None if read_elsewhere(&text) => Ok(Next::Elsewhere(format!("{address}: {text}"))),
                None => Err(Error::Refused { address: address.to_owned(), text }),
            },
            reply => {
                self.take_token(address, &answers.new_token);
                Ok(Next::Answered(reply))
            }
        }
    }

    /// Sends the token, the settings and the command, and asks for the new token, at once.
    fn send(&self, address: &str, settings: &[Vec<&[u8]>], command: &[&[u8]]) -> Sent {
        let token = self.token();
        // A connection of a pool may have served another session.
        let mut commands = vec![vec![b"SESSION".as_slice(), b"RESET"]];
        commands.push(match &token {
            Some(token) => vec![b"SESSION", token.as_bytes()],
            None => vec![b"SESSION"],
        });
        commands.extend_from_slice(settings);
        commands.push(command.to_vec());
        commands.push(vec![b"SESSION"]);
        let failed = || self.cluster.topology().handle_failed(address, Instant::now());
        let mut answers = match self.cluster.send(address, &commands) {
            Err(error) => {
                // A pool without a free connection says nothing of the node.
                if error.kind() != ErrorKind::TimedOut {
                    failed();
                }
                return Sent::Not(error.to_string());
            }
            Ok(Err(error)) => {
                failed();
                return Sent::Broke(error.to_string());
            }
            Ok(Ok(answers)) => answers.into_iter(),
        };
        let mut next = || answers.next().unwrap_or(Reply::Nil);
        let (_, token) = (next(), next());
        let error = |reply| if let Reply::Error(text) = reply { Some(text) } else { None };
        let setting_errors: Vec<String> = settings.iter().filter_map(|_| error(next())).collect();
        let setting_error = setting_errors.into_iter().next();
        Sent::Answered(Answers { token, setting_error, command: next(), new_token: next() })
    }

    /// A node refused because of the leader: what follows from that.
    fn follow(&self, address: &str, refused: &Refused, text: &str) -> Next {
        let mut topology = self.cluster.topology();
        match refused {
            Refused::Moved(leader) if leader != address => {
                topology.handle_moved(leader);
                Next::Moved
            }
            _ => {
                topology.handle_leaderless(address);
                Next::Elsewhere(format!("{address}: {text}"))
            }
        }
    }

    /// The node answered, and told what the session has now seen.
    fn take_token(&mut self, address: &str, told: &Reply) {
        self.answered_by = Some(address.to_owned());
        let Some(Ok(told)) = told.text().map(|text| text.parse::<Token>()) else { return };
        // One that is behind would forget something: the old one stays, and the next read says what is the matter.
        if self.token.as_ref().is_none_or(|token| told.is_past(token)) {
            self.cluster.topology().handle_seen(address, told.lsn());
            self.token = Some(told);
        }
    }

    /// Somebody who does not do what the leader does may have been told of another one since.
    fn look_for_leader(&self) {
        // Whoever cannot be reached is left for the next attempt.
        let _ = self.cluster.refresh();
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
