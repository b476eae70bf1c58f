//! One client: bytes in, bytes out, commands executed in between. Driven by `clients` through the duties that `host` lists;
//! knows no socket and reads no clock.
//!
//! ```text
//! handle_input -> Parser -> Spec::run -> Reply + effects -> Host::commit -> Outbox (held) -> release -> output
//!                              \-> Park: nothing further is executed until resume finds what was waited for
//! ```

pub(crate) mod command;
pub(crate) mod commit_queue;
pub(crate) mod host;
pub(crate) mod outbox;
pub(crate) mod parked;
pub(crate) mod parking;
pub(crate) mod reading;
pub(crate) mod reply;
pub mod resp;

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

use std::cell::RefCell;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Once;
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};
use walferry_cluster::level::CommitLevel;
use walferry_engine::mutants;

use self::command::transaction::{self, Transaction, Watched};
use self::command::view::View;
use self::command::{Outcome, Run, Spec, Writer};
use self::host::{Host, Refusal, SessionId, Wait};
use self::outbox::{Acknowledged, CommittedReads, Hold, Outbox};
use self::parked::Parked;
use self::reading::{Facts, Guarantee, Missing, Mode, Position, Strong, Verdict};
use self::resp::{
    Args, COMMAND_BYTES_MAX, KEY_BYTES_MAX, Parser, Progress, ProtocolError, UNAUTHENTICATED_ARG_BYTES_MAX,
};
use crate::clients::limits::{DisconnectReason, INPUT_UNREAD_BYTES_MAX, Place, Places};
use crate::users::login::FailedLogins;
use crate::users::{Check, Grant, Judged, User, Users};
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

/// What a node gives each new session.
#[derive(Clone, Debug, Default)]
pub struct SessionSettings {
    /// Who may connect; shared by all sessions, and replaced as a whole.
    pub users: Rc<RefCell<Users>>,
    /// The places of those who have logged in; shared by all sessions.
    pub places: Rc<Places>,
    /// The level of a session that never said COMMITLEVEL.
    pub commit_level: Option<CommitLevel>,
    /// After this a commit that is durable here and unconfirmed elsewhere is answered `-UNCERTAIN`; none: it waits.
    pub commit_timeout: Option<Duration>,
    /// A read waits so long for a state that is good enough for it; zero: not at all.
    pub read_wait_timeout: Duration,
}

impl SessionSettings {
    fn level(&self) -> CommitLevel {
        self.commit_level.unwrap_or(CommitLevel::Local)
    }
}

/// What commands know of the session and may change.
#[derive(Debug)]
pub struct Client {
    /// The connection's number.
    pub id: SessionId,
    /// At which address of this host it reached the node; none where it came by no network.
    pub reached_at: Option<IpAddr>,
    /// Where its connection comes from.
    pub comes_from: Option<IpAddr>,
    /// CLIENT SETNAME.
    pub name: Vec<u8>,
    /// Who it is; none until it has authenticated.
    pub user: Option<Rc<User>>,
    /// COMMITLEVEL.
    pub level: CommitLevel,
    /// COMMITTIMEOUT.
    pub commit_timeout: Option<Duration>,
    /// READ TIMEOUT.
    pub read_timeout: Duration,
    /// READ.
    pub mode: Mode,
    /// SESSION was used: no read is older than `seen`, on no node and after no failover.
    pub tracked: bool,
    /// The end of the session's last record. A failover may have taken it back: then the log has another record there, or none.
    pub last_commit: Position,
    /// The session has been told of changes up to here, or is about to be, or relies on them; `last_commit <= seen`.
    pub seen: Position,
    /// Of `seen`, what does not hang on a reply that is held until it is committed; `firm <= seen`.
    pub firm: Position,
    /// What COMMITINFO tells of.
    pub acknowledged: Option<Acknowledged>,
    /// Between MULTI and EXEC.
    pub transaction: Option<Transaction>,
    /// WATCH.
    pub watched: Watched,
    /// Wrong passwords since the last right one.
    pub failures: u32,
    /// Of them, those that `clients` has not counted yet.
    failed_logins: FailedLogins,
    /// Its place among those who have logged in.
    place: Option<Place>,
    turned_away: bool,
    /// What the node gave it at its start.
    settings: SessionSettings,
}

impl Client {
    fn new(id: SessionId, reached_at: Option<IpAddr>, settings: SessionSettings) -> Client {
        let user = settings.users.borrow().at_start();
        let mut client = Client {
            id,
            reached_at,
            comes_from: None,
            name: Vec::new(),
            user,
            level: settings.level(),
            commit_timeout: settings.commit_timeout,
            read_timeout: settings.read_wait_timeout,
            mode: Mode::Any,
            tracked: false,
            last_commit: Position::default(),
            seen: Position::default(),
            firm: Position::default(),
            acknowledged: None,
            transaction: None,
            watched: Watched::new(),
            failures: 0,
            failed_logins: FailedLogins::default(),
            place: None,
            turned_away: false,
            settings,
        };
        client.take_place();
        client
    }

    /// The client says who it is. What cannot be right is counted as a failure; what has to be compared first is counted later.
    pub fn authenticate(&mut self, name: &[u8], password: &[u8]) -> Judged {
        // Longer ones are nobody's, and hashing them would take long.
        let fits = name.len().max(password.len()) <= UNAUTHENTICATED_ARG_BYTES_MAX;
        let judged = if fits { self.settings.users.borrow().authenticate(name, password) } else { Judged::Wrong };
        if let Judged::Wrong = judged {
            let users = Rc::clone(&self.settings.users);
            let named = std::str::from_utf8(name).ok().and_then(|name| users.borrow().get(name).cloned());
            self.failed(named.as_ref());
        }
        judged
    }

    /// The password was compared and is right: the user, unless the users are others by now.
    pub fn verified(&self, check: &Check) -> Option<Rc<User>> {
        self.settings.users.borrow().verified(check)
    }

    /// A login failed, of this user if there is one.
    pub fn failed(&mut self, user: Option<&Rc<User>>) {
        self.failures = self.failures.saturating_add(1);
        self.failed_logins.add(user);
    }

    /// The client is this user from now on, or is turned away: its place is kept for operators.
    pub fn log_in(&mut self, user: Rc<User>) {
        self.failures = 0;
        // A client that logs in anew has the place of before.
        self.place = None;
        self.user = Some(user);
        self.take_place();
    }

    /// Whoever has logged in, or need not, takes a place.
    fn take_place(&mut self) {
        if let Some(user) = &self.user {
            self.place = self.settings.places.take(user.grant == Grant::All);
            self.user.take_if(|_| self.place.is_none());
            self.turned_away = self.place.is_none();
        }
    }

    /// The connection is to be closed: there is no place for its user.
    pub fn is_turned_away(&self) -> bool {
        self.turned_away
    }

    /// Everybody is `default` without a password: AUTH with one is likely to be a mistake.
    pub fn needs_no_password(&self) -> bool {
        self.settings.users.borrow().at_start().is_some()
    }

    /// The users' lines, as ACL LIST tells them.
    pub fn user_lines(&self) -> Vec<String> {
        self.settings.users.borrow().lines()
    }

    /// The level of a client that just connected.
    pub fn level_default(&self) -> CommitLevel {
        self.settings.level()
    }

    /// As a client that just connected.
    pub fn reset(&mut self) {
        self.place = None;
        *self = Client {
            comes_from: self.comes_from,
            failures: self.failures,
            failed_logins: std::mem::take(&mut self.failed_logins),
            ..Client::new(self.id, self.reached_at, self.settings.clone())
        };
    }

    /// The view that a read of this session needs, and what its reply is then held for.
    pub fn read<'a>(&mut self, host: &'a dyn Host) -> (View<'a>, Hold) {
        let newest = self.mode == Mode::Strong || self.seen.lsn > host.applied();
        let pending = newest && !host.pending().is_empty();
        let (view, at) = match pending {
            true => (View::pending(host), host.log_end()),
            false => (View::durable(host), host.applied()),
        };
        let position = Position::at(at, host.history());
        let committed = !matches!(self.mode, Mode::Committed | Mode::Strong) || host.committed_here() >= at;
        if !committed {
            self.seen = self.seen.max(position);
            return (view, Hold::Committed(position));
        }
        self.see(position);
        (view, if pending { Hold::Seen(at) } else { Hold::Nothing })
    }

    /// The session sees `position`, whatever becomes of replies that are held.
    fn see(&mut self, position: Position) {
        self.firm = self.firm.max(position);
        self.seen = self.seen.max(self.firm);
    }

    /// What was read of a state that was not committed yet was told, or was not.
    fn note_committed(&mut self, reads: CommittedReads) {
        if reads.untold {
            self.seen = self.firm;
        }
        if let Some(position) = reads.told {
            self.see(position);
        }
    }

    /// False when any state will do: nothing needs to be asked.
    fn is_guarded(&self) -> bool {
        self.tracked || self.mode.is_timed()
    }

    fn guarantee(&self) -> Guarantee {
        Guarantee { floor: if self.tracked { self.seen } else { Position::default() }, mode: self.mode }
    }

    fn facts<'a>(&self, host: &'a dyn Host) -> Facts<'a> {
        let applied = host.applied();
        let readable = if host.pending().is_empty() { applied } else { host.log_end() };
        let now = if self.mode.is_timed() { host.clock() } else { host.now() };
        let strong = if self.mode == Mode::Strong { host.strong(now) } else { Strong::Held };
        Facts { history: host.history(), applied, readable, staleness: host.staleness(now), strong }
    }

    /// Whether the node's state is good enough for a read of this session.
    pub fn judge(&self, host: &dyn Host) -> Verdict {
        if !self.is_guarded() || mutants::is_on("forget-the-session") {
            return Verdict::Ready;
        }
        reading::judge(&self.guarantee(), &self.facts(host))
    }

    /// What a read answers that waited in vain.
    pub fn waited(&self, missing: Missing, host: &dyn Host) -> String {
        reading::waited(missing, &self.guarantee(), &self.facts(host))
    }

    /// The session learned of the newest state without changing it: what its reply is held for.
    pub fn observe(&mut self, host: &dyn Host) -> Hold {
        // A replica's log may run ahead of what its readers see, but it has nothing pending: nothing of that was looked at.
        if host.pending().is_empty() {
            self.see(Position::at(host.applied(), host.history()));
            return Hold::Nothing;
        }
        let end = host.log_end();
        self.see(Position::at(end, host.history()));
        Hold::Seen(end)
    }

    /// Appends `record` and says what its reply is held for.
    pub fn commit(&mut self, record: &[u8], host: &mut dyn Host) -> Result<Hold, Refusal> {
        let lsn = host.commit(record, self.level)?;
        let position = Position::at(lsn, host.history());
        debug_assert!(self.last_commit < position);
        self.last_commit = position;
        self.see(position);
        Ok(Hold::Commit(self.level, lsn))
    }
}

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

/// What a session tells of itself, for CLIENT LIST.
#[derive(Clone, Copy, Debug)]
pub struct Description<'a> {
    /// CLIENT SETNAME.
    pub name: &'a [u8],
    /// Who it is authenticated as; empty: nobody.
    pub user: &'a str,
    /// The last command that it was admitted to.
    pub last_command: &'static str,
    /// It waits for something other than a commit.
    pub blocked: bool,
    /// Commands since MULTI, in a transaction.
    pub queued: Option<usize>,
    /// Received and not executed, or queued for EXEC.
    pub input_bytes: usize,
    /// Replies that are not yet handed to the socket.
    pub output_bytes: usize,
    /// Of them, those that are held.
    pub held_replies: usize,
    /// HELLO 3.
    pub resp3: bool,
    /// COMMITLEVEL.
    pub level: CommitLevel,
}

/// What a command asks of the node's state.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asks {
    /// It does not read.
    Nothing,
    /// It reads.
    Read,
    /// EXEC of a transaction that only reads.
    ReadAll,
    /// It writes: what the session has seen must be in the log still.
    Lineage,
}

/// What became of one command.
enum Step {
    Done,
    /// Not executed: it must be tried again.
    Again,
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

    /// The connection's number.
    pub fn id(&self) -> SessionId {
        self.client.id
    }

    /// The connection comes from there.
    pub fn comes_from(&mut self, address: IpAddr) {
        self.client.comes_from = Some(address);
    }

    /// True once it is known who the client is.
    pub fn is_authenticated(&self) -> bool {
        self.client.user.is_some()
    }

    /// Logins that failed since the last call.
    pub fn take_failed_logins(&mut self) -> FailedLogins {
        std::mem::take(&mut self.client.failed_logins)
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
                    if let Step::Again = self.execute(&parser.args(&bytes[at..]), host) {
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

    /// Why the client has to be disconnected at once, if it has to; told once.
    pub fn take_expelled(&mut self) -> Option<DisconnectReason> {
        self.expelled.take()
    }

    fn push(&mut self, hold: Hold, host: &mut dyn Host) {
        let timeout = match hold {
            Hold::Committed(_) => Some(self.client.read_timeout),
            _ => self.client.commit_timeout,
        };
        self.outbox.push(hold, timeout, self.client.id, host);
        self.client.note_committed(self.outbox.take_committed_reads());
    }

    fn refuse_large(&mut self, host: &mut dyn Host) {
        self.outbox.reply.begin();
        let bounds = (crate::session::resp::VALUE_BYTES_MAX, COMMAND_BYTES_MAX);
        self.outbox.reply.error(format_args!(
            "ERR too large: a key or value has at most {} bytes, a command at most {} bytes",
            bounds.0, bounds.1
        ));
        if let Some(transaction) = &mut self.client.transaction {
            transaction.abort();
        }
        self.push(Hold::Nothing, host);
    }

    fn execute(&mut self, args: &Args<'_>, host: &mut dyn Host) -> Step {
        if args.is_empty() {
            return Step::Done;
        }
        self.outbox.reply.begin();
        let spec = match command::find(args).and_then(|spec| self.admit(spec, args, host).map(|()| spec)) {
            Ok(spec) => spec,
            Err(error) => {
                if let Some(transaction) = &mut self.client.transaction {
                    transaction.abort();
                }
                self.outbox.reply.error(error);
                self.push(Hold::Nothing, host);
                return Step::Done;
            }
        };
        self.commands += 1;
        self.last_command = spec.name;
        self.light = if spec.is_light(args) { self.light + 1 } else { 0 };
        if let Some(transaction) = &mut self.client.transaction
            && !spec.ends_queueing(args)
        {
            match transaction.queue(spec, args) {
                Ok(()) => self.outbox.reply.simple("QUEUED"),
                Err(error) => self.outbox.reply.error(error),
            }
            self.push(Hold::Nothing, host);
            return Step::Done;
        }
        let asks = if self.client.is_guarded() { self.asks(spec) } else { Asks::Nothing };
        if let Some(step) = self.guard(asks, host) {
            return step;
        }
        match self.run(spec, args, host) {
            Ok(hold) => {
                self.writes_until = None;
                // What was good enough before it was read may not have been when it was read: the process may have been
                // stopped in between.
                if hold.is_some()
                    && self.client.mode.is_timed()
                    && let Some(step) = self.guard(asks, host)
                {
                    return step;
                }
                if let Some(hold) = hold {
                    self.push(hold, host);
                }
                Step::Done
            }
            Err(Refusal::Busy) => {
                self.outbox.reply.undo();
                let now = host.now();
                let until = self.client.commit_timeout.map(|timeout| *self.writes_until.get_or_insert(now + timeout));
                let over = until.is_some_and(|until| until <= now);
                if over && let Some(reason) = host.silent() {
                    self.writes_until = None;
                    if self.client.transaction.take().is_some() {
                        self.client.watched.clear();
                    }
                    self.outbox.reply.error(command::refusal_text(&Refusal::NoLeader(reason)));
                    self.push(Hold::Nothing, host);
                    return Step::Done;
                }
                self.parked = Some(Parked::for_log_space(until.filter(|_| !over)));
                host.park(self.client.id, Wait::LogSpace);
                Step::Again
            }
            Err(refusal) => {
                self.writes_until = None;
                self.outbox.reply.undo();
                self.outbox.reply.error(command::refusal_text(&refusal));
                self.push(Hold::Nothing, host);
                Step::Done
            }
        }
    }

    /// What a command asks of the node's state.
    fn asks(&self, spec: &Spec) -> Asks {
        match spec.run {
            Run::Read(_) | Run::Await(..) => Asks::Read,
            Run::Write(_) => Asks::Lineage,
            // What is watched is relied on, as what was read.
            Run::Control(_) if spec.name == "watch" => Asks::Lineage,
            Run::Control(_) => Asks::Nothing,
            Run::Exec => match &self.client.transaction {
                Some(transaction) if transaction.writes() => Asks::Lineage,
                Some(transaction) if transaction.reads() => Asks::ReadAll,
                _ => Asks::Nothing,
            },
        }
    }

    /// Whether the state is what the command asks for; `None` when it is. A command that waits is tried again.
    fn guard(&mut self, asks: Asks, host: &mut dyn Host) -> Option<Step> {
        let verdict = match asks {
            Asks::Nothing => return None,
            Asks::Read | Asks::ReadAll => self.client.judge(host),
            Asks::Lineage if !self.client.tracked => return None,
            // It executes on the leader's newest state, which is new enough if it is the same log at all.
            Asks::Lineage => reading::lost(self.client.seen, host.history()).map_or(Verdict::Ready, Verdict::Refuse),
        };
        let error = match verdict {
            Verdict::Ready => {
                self.reads_until = None;
                return None;
            }
            Verdict::Refuse(error) => error,
            Verdict::Wait(missing) => {
                let timeout = self.client.read_timeout;
                let until = *self.reads_until.get_or_insert_with(|| host.now() + timeout);
                // A transaction that was executed is gone.
                let again = asks == Asks::Read || self.client.transaction.is_some();
                if host.now() < until && again {
                    self.outbox.reply.undo();
                    let parked = Parked::for_reading(missing, self.client.seen.lsn, until);
                    host.park(self.client.id, parked.wait());
                    self.parked = Some(parked);
                    return Some(Step::Again);
                }
                self.client.waited(missing, host)
            }
        };
        self.reads_until = None;
        if asks != Asks::Read && self.client.transaction.take().is_some() {
            self.client.watched.clear();
        }
        self.outbox.reply.undo();
        self.outbox.reply.error(error);
        self.push(Hold::Nothing, host);
        Some(Step::Done)
    }

    /// Whether the session may execute (or queue) the command at all.
    fn admit(&self, spec: &Spec, args: &Args<'_>, host: &dyn Host) -> Result<(), String> {
        match &self.client.user {
            _ if spec.before_auth() => {}
            None => return Err("NOAUTH Authentication required.".to_owned()),
            Some(user) if user.grant < spec.needs(args) => {
                let (user, command) = (&user.name, spec.name);
                return Err(format!("NOPERM User {user} has no permissions to run the '{command}' command"));
            }
            Some(_) => {}
        }
        if self.client.transaction.is_some() && spec.outside_transactions() {
            return Err(format!("ERR {} is not allowed in a transaction", String::from_utf8_lossy(&args[0])));
        }
        if let Run::Write(_) = spec.run {
            if spec.has_long_key(args) {
                return Err(format!("ERR too large: a key has at most {KEY_BYTES_MAX} bytes"));
            }
            match host.writable(self.client.level) {
                Ok(()) | Err(Refusal::Busy) => {}
                Err(refusal) => return Err(command::refusal_text(&refusal)),
            }
        }
        Ok(())
    }

    /// Executes one command; `None` when it parked and its reply comes later.
    fn run(&mut self, spec: &Spec, args: &Args<'_>, host: &mut dyn Host) -> Result<Option<Hold>, Refusal> {
        let reply = &mut self.outbox.reply;
        match spec.run {
            Run::Read(read) => {
                let (view, hold) = self.client.read(host);
                let executed = read(&view, args, reply);
                command::answer(executed, 0, reply);
                Ok(Some(hold))
            }
            Run::Write(write) => {
                self.record.clear();
                let now_ms = host.wall_clock_us() / 1000;
                let mut writer = Writer::new(View::pending(host), &mut self.record, now_ms);
                let executed = write(&mut writer, args, reply);
                command::answer(executed, 0, reply);
                if self.record.is_empty() {
                    return Ok(Some(self.client.observe(host)));
                }
                let committed = self.client.commit(&self.record, host).map(Some);
                if self.record.capacity() > KEPT_CAPACITY_BYTES_MAX {
                    self.record = Vec::new();
                }
                committed
            }
            Run::Exec => {
                // A transaction's record may be large, and is rare enough to be made anew.
                transaction::exec(&mut self.client, &mut Vec::new(), reply, host).map(Some)
            }
            Run::Control(control) | Run::Await(_, control) => {
                self.client.acknowledged = self.outbox.acknowledged;
                match control(&mut self.client, args, host, reply) {
                    Outcome::Done(hold) => Ok(Some(hold)),
                    Outcome::Close => {
                        self.closing = true;
                        Ok(Some(Hold::Nothing))
                    }
                    Outcome::Park(parked) => {
                        reply.undo();
                        host.park(self.client.id, parked.wait());
                        self.parked = Some(parked);
                        Ok(None)
                    }
                }
            }
        }
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

    /// True when commands were left for the next turn: call `go_on` then.
    pub fn has_yielded(&self) -> bool {
        self.yielded
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

    /// When `resume` must be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        let parked = self.parked.as_ref().and_then(Parked::deadline);
        parked.into_iter().chain(self.outbox.deadline()).min()
    }

    /// The bytes to send now; the caller takes them out.
    pub fn output(&mut self) -> &mut BytesMut {
        self.outbox.output()
    }

    /// True when the connection is to be closed once everything is sent.
    pub fn closing(&self) -> bool {
        self.closing && !self.outbox.is_holding()
    }

    /// True when commands were left because too much output was waiting, and the caller has since taken it: call `resume`.
    pub fn can_go_on(&self) -> bool {
        self.stalled && !self.outbox.is_full()
    }

    /// True when replies are held.
    pub fn holds_replies(&self) -> bool {
        self.outbox.is_holding()
    }

    /// True while its user is what it was when the client authenticated.
    pub fn is_still_welcome(&self) -> bool {
        let users = self.client.settings.users.borrow();
        self.client.user.as_ref().is_none_or(|user| users.get(&user.name) == Some(user))
    }

    /// True while it waits for the node: replies are held, or it blocks.
    pub fn is_waiting(&self) -> bool {
        self.parked.is_some() || self.outbox.is_holding()
    }

    /// True when no reply will come that is not in `output`, unless more input does.
    pub fn is_done(&self) -> bool {
        !self.is_waiting() && !self.stalled && !self.yielded
    }

    /// The memory that its client takes: what is half sent, queued, and not yet read.
    pub fn buffered_bytes(&self) -> usize {
        let queued = self.client.transaction.as_ref().map_or(0, Transaction::kept_bytes);
        let parked = self.parked.as_ref().map_or(0, Parked::kept_bytes);
        let watched: usize = self.client.watched.keys().map(|key| key.len() + WATCHED_BYTES).sum();
        self.input.len() + queued + parked + watched + self.outbox.kept_bytes()
    }

    /// What CLIENT LIST tells.
    pub fn description(&self) -> Description<'_> {
        let transaction = self.client.transaction.as_ref();
        Description {
            name: &self.client.name,
            user: self.client.user.as_ref().map_or("", |user| &user.name),
            last_command: self.last_command,
            blocked: self.parked.is_some(),
            queued: transaction.map(Transaction::len),
            input_bytes: self.input.len() + transaction.map_or(0, Transaction::kept_bytes),
            output_bytes: self.outbox.kept_bytes(),
            held_replies: self.outbox.held_replies(),
            resp3: self.outbox.reply.resp3,
            level: self.client.level,
        }
    }

    /// False while the socket should not be read: too much is waiting already.
    pub fn wants_input(&self) -> bool {
        !self.closing && (self.is_runnable() || self.reads_ahead || self.input.len() < BACKLOG_BYTES_MAX)
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
