//! One client: bytes in, bytes out, commands executed in between. Driven by `clients` through the duties that `host` lists;
//! knows no socket and reads no clock.
//!
//! ```text
//! handle_input -> Parser -> Spec::run -> Reply + effects -> Host::commit -> Outbox (held) -> release -> output
//!                              \-> Park: nothing further is executed until resume finds what was waited for
//! ```

pub(crate) mod client;
pub(crate) mod command;
pub(crate) mod commit_queue;
pub(crate) mod description;
mod execute;
mod guard;
pub(crate) mod host;
pub(crate) mod id;
pub(crate) mod outbox;
pub(crate) mod parked;
pub(crate) mod parking;
pub(crate) mod reading;
mod reads;
pub(crate) mod reply;
pub mod resp;
mod status;
mod waiting;

#[cfg(test)]
mod command_tests;
#[cfg(test)]
mod reading_session_tests;
#[cfg(test)]
mod resp_tests;
#[cfg(test)]
mod session_tests;
#[cfg(test)]
pub(crate) mod test_host;
#[cfg(test)]
mod transaction_tests;

use guard::Executed;

use std::net::IpAddr;
use std::sync::Once;
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};

use crate::clients::limits::{DisconnectReason, INPUT_UNREAD_BYTES_MAX};
use crate::session::client::{Client, SessionSettings};
use crate::session::host::Host;
use crate::session::id::SessionId;
use crate::session::outbox::{Hold, Outbox};
use crate::session::parked::Parked;
use crate::session::resp::{COMMAND_BYTES_MAX, Parser, Progress, ProtocolError};
use crate::watchdog;

/// While a session cannot go on, no more than this is received for it.
const BACKLOG_BYTES_MAX: usize = 64 << 10;
/// A buffer that one large command made larger than this is given back.
const KEPT_CAPACITY_BYTES_MAX: usize = 1 << 20;

/// A session that executed commands for so long in one turn goes on with the next one: the others are served in between.
const SLICE: Duration = Duration::from_millis(2);
/// The same in a turn that has lasted so long already.
const LONG_TURN: Duration = Duration::from_millis(10);
/// The clock is read after so many light commands, and after every other one.
const LIGHT_COMMANDS: usize = 8;
/// What a watched key takes besides its bytes.
const WATCHED_BYTES: usize = 96;

const _: () = assert!(SLICE.as_millis() < LONG_TURN.as_millis() && LONG_TURN.as_millis() < watchdog::SLOW.as_millis());
const _: () = assert!(BACKLOG_BYTES_MAX < KEPT_CAPACITY_BYTES_MAX && 2 * COMMAND_BYTES_MAX < INPUT_UNREAD_BYTES_MAX);

/// One client's session.
pub struct Session {
    client: Client,
    parser: Parser,
    input: BytesMut,
    outbox: Outbox,
    /// The record in making; kept for its memory.
    record: Vec<u8>,
    parked: Option<Parked>,
    /// The command in front waits for a state that is good enough, until then.
    reads_until: Option<Instant>,
    /// The command in front waits for space in the log; a leader that may not answer says so then.
    writes_until: Option<Instant>,
    closing: bool,
    /// Why the client has to be disconnected at once, without its replies.
    expelled: Option<DisconnectReason>,
    /// The client takes nothing of what is sent to it: it may have to write everything before it reads.
    reads_ahead: bool,
    /// Commands were left because too much output was waiting.
    stalled: bool,
    /// Commands were left for the next turn, because others have to be served.
    yielded: bool,
    /// Commands that were executed since the clock was read, if all of them were light.
    light: usize,
    commands: u64,
    last_command: &'static str,
}

impl Session {
    /// A session of a client that just connected.
    pub fn new(id: SessionId, reached_at: Option<IpAddr>, settings: &SessionSettings) -> Session {
        let client = Client::new(id, reached_at, settings.clone());
        Session {
            closing: client.is_turned_away(),
            client,
            parser: Parser::default(),
            input: BytesMut::new(),
            outbox: Outbox::default(),
            record: Vec::new(),
            parked: None,
            reads_until: None,
            writes_until: None,
            expelled: None,
            reads_ahead: false,
            stalled: false,
            yielded: false,
            light: 0,
            commands: 0,
            last_command: "",
        }
    }

    /// Bytes arrived.
    pub fn handle_input(&mut self, bytes: &[u8], host: &mut dyn Host) {
        if self.closing {
            return;
        }
        if self.input.is_empty() {
            // The usual case: whole commands, executed where they were received.
            let used = self.execute_all(bytes, host);
            self.keep(&bytes[used..]);
        } else {
            self.keep(bytes);
            self.execute_kept(host);
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        if bytes.is_empty() || self.closing {
            return;
        }
        let expected = self.parser.expected_bytes();
        if self.input.len() + bytes.len() < expected {
            // Nothing is touched before it arrives, so a large declared length costs address space only.
            self.input.reserve(expected - self.input.len());
        }
        if self.input.len() + bytes.len() > INPUT_UNREAD_BYTES_MAX {
            // A command is far smaller: these wait for the client to read.
            return self.expel(DisconnectReason::Unread(self.input.len() + bytes.len()));
        }
        self.input.extend_from_slice(bytes);
    }

    fn execute_kept(&mut self, host: &mut dyn Host) {
        let mut input = std::mem::take(&mut self.input);
        let used = self.execute_all(&input, host);
        input.advance(used);
        if input.is_empty() && input.capacity() > KEPT_CAPACITY_BYTES_MAX {
            input = BytesMut::new();
        }
        self.input = input;
    }

    /// Executes the commands in `bytes` and returns how many bytes are done with.
    fn execute_all(&mut self, bytes: &[u8], host: &mut dyn Host) -> usize {
        let mut at = 0;
        let mut parser = std::mem::take(&mut self.parser);
        let began = host.turn_time();
        let mut looked = began;
        while at < bytes.len() && self.is_runnable() {
            parser.unauthenticated = self.client.user.is_none();
            match parser.parse(&bytes[at..]) {
                Ok(Progress::More { forget }) => {
                    at += forget;
                    break;
                }
                Ok(Progress::Command { .. }) if parser.speaks_http(&parser.args(&bytes[at..])) => {
                    self.expel(DisconnectReason::Http);
                }
                Ok(Progress::Command { bytes: length }) => {
                    if let Executed::Again = self.execute(&parser.args(&bytes[at..]), host) {
                        break;
                    }
                    at += length;
                    parser.next();
                    if self.light.is_multiple_of(LIGHT_COMMANDS) {
                        let now = host.turn_time();
                        if now - looked >= watchdog::SLOW {
                            host.report_slow(self.last_command, now - looked);
                        }
                        looked = now;
                        self.yielded = at < bytes.len() && (now - began >= SLICE || now >= LONG_TURN);
                    }
                }
                Ok(Progress::TooLarge { bytes: length }) => {
                    self.refuse_large(host);
                    at += length;
                    parser.next();
                }
                Err(error) => {
                    // Who speaks TLS reads no plain answer, and a node is not at its log's end: this log has to tell as well, once.
                    static SAID: [Once; 2] = [Once::new(), Once::new()];
                    match error {
                        ProtocolError::Tls => {
                            SAID[0].call_once(|| tracing::warn!("a client speaks TLS to `listen`: {error}"));
                        }
                        ProtocolError::Peer => {
                            SAID[1].call_once(|| tracing::warn!("a node connected to `listen` as a peer: {error}"));
                        }
                        _ => {}
                    }
                    self.outbox.reply.begin();
                    self.outbox.reply.error(format_args!("ERR Protocol error: {error}"));
                    self.push(Hold::Nothing, host);
                    self.closing = true;
                }
            }
        }
        self.parser = parser;
        self.stalled = at < bytes.len() && self.outbox.is_full();
        self.outbox.end_batch(self.client.id, host);
        if self.closing { bytes.len() } else { at }
    }

    fn is_runnable(&self) -> bool {
        self.parked.is_none() && !self.closing && !self.yielded && !self.outbox.is_full()
    }

    fn expel(&mut self, why: DisconnectReason) {
        self.closing = true;
        self.expelled = Some(why);
        self.input = BytesMut::new();
    }

    fn push(&mut self, hold: Hold, host: &mut dyn Host) {
        let timeout = match hold {
            Hold::Committed(_) => Some(self.client.read_timeout),
            _ => self.client.commit_timeout,
        };
        self.outbox.push(hold, timeout, self.client.id, host);
        self.client.note_committed(self.outbox.take_committed_reads());
    }

    /// A level reached more: lets go of the replies that were held for it.
    pub fn release(&mut self, host: &mut dyn Host) {
        let was_full = self.outbox.is_full();
        self.release_held(host);
        if was_full && self.parked.is_none() && !self.closing {
            self.execute_kept(host);
        }
    }

    fn release_held(&mut self, host: &mut dyn Host) {
        self.outbox.release(self.client.id, host);
        self.client.note_committed(self.outbox.take_committed_reads());
    }

    /// What the session waits for may have come, or its deadline has passed, or its output drained.
    pub fn resume(&mut self, host: &mut dyn Host) {
        self.release_held(host);
        if let Some(parked) = self.parked.take() {
            self.outbox.reply.begin();
            let began = host.turn_time();
            let polled = parked.poll(&mut self.client, host, &mut self.outbox.reply);
            let took = host.turn_time() - began;
            if took >= watchdog::SLOW {
                host.report_slow(self.last_command, took);
            }
            match polled {
                Err(parked) => {
                    host.park(self.client.id, parked.wait());
                    self.parked = Some(parked);
                    return;
                }
                Ok(None) => host.unpark(self.client.id),
                Ok(Some(hold)) => {
                    host.unpark(self.client.id);
                    self.closing |= self.client.is_turned_away();
                    self.push(hold, host);
                }
            }
        }
        if !self.closing {
            self.execute_kept(host);
        }
    }

    /// Goes on with the commands that were left in the last turn.
    pub fn go_on(&mut self, host: &mut dyn Host) {
        if std::mem::take(&mut self.yielded) && self.parked.is_none() && !self.closing {
            self.execute_kept(host);
        }
    }

    /// The node no longer answers commits (it stepped down, or its log stopped): held replies become `-UNCERTAIN` and leave.
    pub fn abandon(&mut self, reason: &str) {
        self.outbox.abandon(reason);
        self.client.note_committed(self.outbox.take_committed_reads());
    }

    /// Whether more than the usual backlog is received although nothing can be executed, up to `INPUT_UNREAD_BYTES_MAX`: while the
    /// client takes nothing of its replies. It may not be able to before it has sent all of its pipeline.
    pub fn read_ahead(&mut self, on: bool) {
        self.reads_ahead = on;
    }

    /// True when all that it waits for is entries of streams: a client that is gone needs none.
    pub fn only_awaits_entries(&self) -> bool {
        self.parked.as_ref().is_some_and(Parked::is_for_streams) && !self.outbox.is_holding()
    }

    /// Commands executed since the last call.
    pub fn take_commands(&mut self) -> u64 {
        std::mem::take(&mut self.commands)
    }
}
