//! One client: bytes in, bytes out, commands executed in between. Driven by `clients` through the duties that `host` lists;
//! knows no socket and reads no clock.
//!
//! ```text
//! handle_input -> Parser -> Spec::run -> Reply + effects -> Host::commit -> Outbox (held) -> release -> output
//!                              \-> Park: nothing further is executed until resume finds what was waited for
//! ```

use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};
use walferry_cluster::level::CommitLevel;
use walferry_engine::lsn::Lsn;

use super::command::transaction::{self, Transaction, Watched};
use super::command::view::View;
use super::command::{self, Outcome, Run, Spec, Writer};
use super::host::{Host, Refusal, SessionId, Wait};
use super::outbox::{Acknowledged, Hold, Outbox};
use super::parked::Parked;
use super::resp::{Args, COMMAND_BYTES_MAX, Parser, Progress};

/// While a session cannot go on, no more than this is received for it.
const BACKLOG_BYTES_MAX: usize = 64 << 10;
/// What a session keeps of its input at the very most; the socket is not read long before.
const INPUT_BYTES_MAX: usize = COMMAND_BYTES_MAX + (16 << 20);
/// A buffer that one large command made larger than this is given back.
const KEPT_CAPACITY_BYTES_MAX: usize = 1 << 20;

const _: () = assert!(BACKLOG_BYTES_MAX < KEPT_CAPACITY_BYTES_MAX && COMMAND_BYTES_MAX < INPUT_BYTES_MAX);

/// What a node gives each new session.
#[derive(Clone, Debug, Default)]
pub struct SessionSettings {
    /// What AUTH must say; none: everybody may do everything.
    pub password: Option<Rc<str>>,
    /// The level of a session that never said COMMITLEVEL.
    pub commit_level: Option<CommitLevel>,
    /// After this a commit that is durable here and unconfirmed elsewhere is answered `-UNCERTAIN`; none: it waits.
    pub commit_timeout: Option<Duration>,
}

/// What commands know of the session and may change.
#[derive(Debug)]
pub struct Client {
    /// The connection's number.
    pub id: SessionId,
    /// CLIENT SETNAME.
    pub name: Vec<u8>,
    /// The password was given, or there is none.
    pub authenticated: bool,
    /// What AUTH must say.
    pub password: Option<Rc<str>>,
    /// COMMITLEVEL.
    pub level: CommitLevel,
    /// COMMITTIMEOUT.
    pub commit_timeout: Option<Duration>,
    /// The end of the session's last record.
    pub last_commit: Lsn,
    /// The session has been told of changes up to here, or relies on them; `last_commit <= seen`. Reads are not older.
    pub seen: Lsn,
    /// What COMMITINFO tells of.
    pub acknowledged: Option<Acknowledged>,
    /// Between MULTI and EXEC.
    pub transaction: Option<Transaction>,
    /// WATCH.
    pub watched: Vec<Watched>,
}

impl Client {
    /// The view that a read of this session needs, and what its reply is then held for.
    pub fn read<'a>(&mut self, host: &'a dyn Host) -> (View<'a>, Hold) {
        if self.seen <= host.applied() || host.pending().is_empty() {
            return (View::durable(host), Hold::Nothing);
        }
        self.seen = host.log_end();
        (View::pending(host), Hold::Seen(self.seen))
    }

    /// The session learned of the newest state without changing it: what its reply is held for.
    pub fn observe(&mut self, host: &dyn Host) -> Hold {
        // A replica's log may run ahead of what its readers see, but it has nothing pending: nothing of that was looked at.
        if host.pending().is_empty() {
            return Hold::Nothing;
        }
        self.seen = host.log_end();
        Hold::Seen(self.seen)
    }

    /// Appends `record` and says what its reply is held for.
    pub fn commit(&mut self, record: &[u8], host: &mut dyn Host) -> Result<Hold, Refusal> {
        let lsn = host.commit(record, self.level)?;
        debug_assert!(self.last_commit < lsn);
        self.last_commit = lsn;
        self.seen = self.seen.max(lsn);
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
    closing: bool,
    /// Commands were left because too much output was waiting.
    stalled: bool,
    commands: u64,
}

/// What became of one command.
enum Step {
    Done,
    /// Not executed: it must be tried again.
    Again,
}

impl Session {
    /// A session of a client that just connected.
    pub fn new(id: SessionId, settings: &SessionSettings) -> Session {
        let client = Client {
            id,
            name: Vec::new(),
            authenticated: settings.password.is_none(),
            password: settings.password.clone(),
            level: settings.commit_level.unwrap_or(CommitLevel::Local),
            commit_timeout: settings.commit_timeout,
            last_commit: Lsn::ZERO,
            seen: Lsn::ZERO,
            acknowledged: None,
            transaction: None,
            watched: Vec::new(),
        };
        Session {
            client,
            parser: Parser::default(),
            input: BytesMut::new(),
            outbox: Outbox::default(),
            record: Vec::new(),
            parked: None,
            closing: false,
            stalled: false,
            commands: 0,
        }
    }

    /// The connection's number.
    pub fn id(&self) -> SessionId {
        self.client.id
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
        self.input.extend_from_slice(bytes);
        debug_assert!(self.input.len() <= INPUT_BYTES_MAX, "the socket is read although wants_input is false");
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
        while at < bytes.len() && self.is_runnable() {
            parser.unauthenticated = !self.client.authenticated;
            match parser.parse(&bytes[at..]) {
                Ok(Progress::More { forget }) => {
                    at += forget;
                    break;
                }
                Ok(Progress::Command { bytes: length }) => {
                    if let Step::Again = self.execute(&parser.args(&bytes[at..]), host) {
                        break;
                    }
                    at += length;
                    parser.next();
                }
                Ok(Progress::TooLarge { bytes: length }) => {
                    self.refuse_large(host);
                    at += length;
                    parser.next();
                }
                Err(error) => {
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
        self.parked.is_none() && !self.closing && !self.outbox.is_full()
    }

    fn push(&mut self, hold: Hold, host: &mut dyn Host) {
        self.outbox.push(hold, self.client.commit_timeout, self.client.id, host);
    }

    fn refuse_large(&mut self, host: &mut dyn Host) {
        self.outbox.reply.begin();
        let bounds = (super::resp::VALUE_BYTES_MAX, COMMAND_BYTES_MAX);
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
        if let Some(transaction) = &mut self.client.transaction
            && !spec.ends_queueing()
        {
            match transaction.queue(spec, args) {
                Ok(()) => self.outbox.reply.simple("QUEUED"),
                Err(error) => self.outbox.reply.error(error),
            }
            self.push(Hold::Nothing, host);
            return Step::Done;
        }
        match self.run(spec, args, host) {
            Ok(hold) => {
                if let Some(hold) = hold {
                    self.push(hold, host);
                }
                Step::Done
            }
            Err(Refusal::Busy) => {
                self.outbox.reply.undo();
                self.parked = Some(Parked::for_room());
                host.park(self.client.id, Wait::Room);
                Step::Again
            }
            Err(refusal) => {
                self.outbox.reply.undo();
                self.outbox.reply.error(command::refusal_text(&refusal));
                self.push(Hold::Nothing, host);
                Step::Done
            }
        }
    }

    /// Whether the session may execute (or queue) the command at all.
    fn admit(&self, spec: &Spec, args: &Args<'_>, host: &dyn Host) -> Result<(), String> {
        if !self.client.authenticated && !spec.before_auth() {
            return Err("NOAUTH Authentication required.".to_owned());
        }
        if self.client.transaction.is_some() && spec.outside_transactions() {
            return Err(format!("ERR {} is not allowed in a transaction", String::from_utf8_lossy(&args[0])));
        }
        if let Run::Write(_) = spec.run {
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
        self.outbox.release(self.client.id, host);
        if was_full && self.parked.is_none() && !self.closing {
            self.execute_kept(host);
        }
    }

    /// What the session waits for may have come, or its deadline has passed, or its output drained.
    pub fn resume(&mut self, host: &mut dyn Host) {
        self.outbox.release(self.client.id, host);
        if let Some(parked) = self.parked.take() {
            self.outbox.reply.begin();
            match parked.poll(&mut self.client, host, &mut self.outbox.reply) {
                Err(parked) => {
                    host.park(self.client.id, parked.wait());
                    self.parked = Some(parked);
                    return;
                }
                Ok(None) => {}
                Ok(Some(hold)) => {
                    host.unpark(self.client.id);
                    self.push(hold, host);
                }
            }
        }
        if !self.closing {
            self.execute_kept(host);
        }
    }

    /// The node no longer answers commits (it stepped down, or its log stopped): held replies become `-UNCERTAIN` and leave.
    pub fn abandon(&mut self, reason: &str) {
        self.outbox.abandon(reason);
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
    pub fn holding(&self) -> bool {
        self.outbox.is_holding()
    }

    /// False while the socket should not be read: too much is waiting already.
    pub fn wants_input(&self) -> bool {
        !self.closing && (self.is_runnable() || self.input.len() < BACKLOG_BYTES_MAX)
    }

    /// Commands executed since the last call.
    pub fn take_commands(&mut self) -> u64 {
        std::mem::take(&mut self.commands)
    }
}
