//! What a command is: its name, its bounds, how it is executed; and a list of commands that wait for EXEC.

use std::collections::HashMap;

use crate::session::client::Client;
use crate::session::command::error::Executed;
use crate::session::command::stream::XREAD_STREAMS_MAX;
use crate::session::command::view::View;
use crate::session::command::writer::Writer;
use crate::session::host::Host;
use crate::session::outbox::Hold;
use crate::session::parked::Parked;
use crate::session::reading::Position;
use crate::session::reply::Reply;
use crate::session::resp::{Args, COMMAND_BYTES_MAX, KEY_BYTES_MAX};
use crate::users::Grant;

/// Keys (of MSET: pairs) of one command at most.
pub const KEYS_MAX: usize = 16 << 10;
/// Names or numbers that COMMAND and CLIENT are asked for at most.
pub const NAMES_MAX: usize = 1 << 10;
/// Arguments of a command that is not named in `Spec::args_max`; the least of all these bounds.
pub const ARGS_MAX: usize = 64;
/// Subcommands that only the full role has, of commands that everybody has.
const ADMIN_SUBCOMMANDS: &[(&str, &str)] = &[
    ("acl", "list"),
    ("acl", "load"),
    ("acl", "users"),
    ("client", "kill"),
    ("client", "list"),
    ("slot", "drop"),
    ("waterfall", "reset"),
];
pub const ONE: (i32, i32, i32) = (1, 1, 1);

/// A transaction has at most this many commands...
pub const TRANSACTION_COMMANDS_MAX: usize = 16 << 10;
/// ...and so many arguments, the commands' names included...
pub const TRANSACTION_ARGS_MAX: usize = 64 << 10;
/// ...and so many of the commands that take long for how small they are: it is executed in one go.
pub const TRANSACTION_HEAVY_MAX: usize = 8;
/// All of it takes at most so many bytes.
pub const TRANSACTION_BYTES_MAX: usize = COMMAND_BYTES_MAX;
/// A session watches at most this many keys.
pub const WATCHED_KEYS_MAX: usize = 4096;

/// What became of a control command.
pub enum Outcome {
    /// Its reply is written, to be held for this.
    Done(Hold),
    /// Its reply is written; the connection is then closed.
    Close,
    /// It has no reply yet.
    Park(Parked),
}

impl Outcome {
    /// The reply may leave at once.
    pub const DONE: Outcome = Outcome::Done(Hold::Nothing);
}

/// What a control command is: it may do anything to its session, and ask anything of the node.
pub type Control = fn(&mut Client, &Args<'_>, &mut dyn Host, &mut Reply) -> Outcome;
/// A command that only reads.
pub type Read = fn(&View<'_>, &Args<'_>, &mut Reply) -> Executed;
/// A command that may write.
pub type Write = fn(&mut Writer<'_>, &Args<'_>, &mut Reply) -> Executed;

/// How a command is executed.
#[derive(Clone, Copy)]
pub enum Run {
    /// Reads keys.
    Read(Read),
    /// Reads and writes keys.
    Write(Write),
    /// Reads keys, and may wait for them to change; the first is for transactions, which never wait.
    Await(Read, Control),
    /// Concerns the session or the node.
    Control(Control),
    /// EXEC: all that was queued.
    Exec,
}

/// One command.
pub struct Spec {
    /// In lower case.
    pub name: &'static str,
    /// Number of arguments with the name; negative: at least so many.
    pub arity: i32,
    /// redis-server's names for what it is like.
    pub flags: &'static [&'static str],
    /// First key, last key, step; as in COMMAND.
    pub keys: (i32, i32, i32),
    /// redis-server's group; `walferry` for our own.
    pub group: &'static str,
    /// The version of redis-server, or of walferry for our own, that has it first.
    pub since: &'static str,
    /// What it does, in one line, for COMMAND DOCS.
    pub summary: &'static str,
    /// What it does.
    pub run: Run,
}

impl Spec {
    /// Allowed to a client that has not authenticated.
    pub fn before_auth(&self) -> bool {
        self.flags.contains(&"no_auth")
    }

    /// What a user must be granted for it.
    pub fn needs(&self, args: &Args<'_>) -> Grant {
        let flagged = |flag| self.flags.contains(&flag);
        let subcommand = |word: &str| args.get(1).is_some_and(|arg| arg.eq_ignore_ascii_case(word.as_bytes()));
        let of_operators = ADMIN_SUBCOMMANDS.iter().any(|(name, word)| *name == self.name && subcommand(word));
        match () {
            () if flagged("admin") || of_operators => Grant::All,
            () if flagged("write") => Grant::Write,
            () => Grant::Read,
        }
    }

    /// Arguments with the name at most: what one command may take of the loop's time.
    pub fn args_max(&self) -> usize {
        match self.name {
            "exists" | "del" | "mget" => KEYS_MAX + 1,
            "mset" | "xadd" => 2 * KEYS_MAX + 3,
            "watch" => WATCHED_KEYS_MAX + 1,
            // COUNT, BLOCK and STREAMS; then keys and ids.
            "xread" => 2 * XREAD_STREAMS_MAX + 6,
            "client" | "command" => NAMES_MAX + 3,
            _ => ARGS_MAX,
        }
    }

    /// Takes long for how few arguments it has and how little it may answer.
    pub fn is_heavy(&self) -> bool {
        const HEAVY: &[&str] = &[
            "scan",
            "info",
            "waterfall",
            "describe",
            "replication",
            "slot",
            "config",
            "command",
            "acl",
            "role",
            "hello",
            "dbsize",
        ];
        HEAVY.contains(&self.name)
    }

    /// One of the commands that take about a microsecond.
    pub fn is_light(&self, args: &Args<'_>) -> bool {
        args.len() <= 8
            && self.keys == ONE
            && matches!(self.run, Run::Read(_) | Run::Write(_))
            && self.group == "string"
    }

    /// Words, numbers and names are not as long as values.
    pub fn has_long_argument(&self, args: &Args<'_>) -> bool {
        let short = matches!(self.run, Run::Control(_)) && !matches!(self.name, "ping" | "echo");
        short && args.from(1).any(|arg| arg.len() > KEY_BYTES_MAX)
    }

    /// True when a key is longer than a key may be.
    pub fn has_long_key(&self, args: &Args<'_>) -> bool {
        let (first, last, step) = self.keys;
        let first = usize::try_from(first).unwrap_or(0);
        let last = if last < 0 { args.len() } else { last as usize + 1 };
        first > 0 && args.span(first, last).step_by(step.max(1) as usize).any(|key| key.len() > KEY_BYTES_MAX)
    }

    /// Not allowed between MULTI and EXEC.
    pub fn outside_transactions(&self) -> bool {
        self.flags.contains(&"no_multi")
    }

    /// Executed at once between MULTI and EXEC instead of being queued.
    pub fn ends_queueing(&self, args: &Args<'_>) -> bool {
        // A SELECT that is going to be refused: the commands after it are meant for another database.
        let refused = self.name == "select" && args.get(1) != Some(&b"0"[..]);
        refused || matches!(self.name, "exec" | "discard" | "multi" | "watch" | "quit" | "reset")
    }
}

/// Keys that EXEC wants unchanged, each since the state in which it was first watched.
pub type Watched = HashMap<Vec<u8>, Position>;

/// What was queued since MULTI.
#[derive(Default)]
pub struct Transaction {
    pub(super) bytes: Vec<u8>,
    pub(super) ranges: Vec<(u32, u32)>,
    pub(super) commands: Vec<Queued>,
    pub(super) heavy: usize,
    pub(super) aborted: bool,
}

pub struct Queued {
    pub(super) spec: &'static Spec,
    pub(super) args: std::ops::Range<usize>,
}

impl std::fmt::Debug for Transaction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Transaction of {} commands, aborted: {}", self.commands.len(), self.aborted)
    }
}

impl Transaction {
    /// Keeps a command for EXEC.
    pub fn queue(&mut self, spec: &'static Spec, args: &Args<'_>) -> Result<(), String> {
        if self.aborted {
            // EXEC will answer EXECABORT: nothing needs to be kept.
            return Ok(());
        }
        let bytes = self.bytes.len() + args.bytes_len() + (self.ranges.len() + args.len()) * size_of::<(u32, u32)>();
        self.heavy += usize::from(spec.is_heavy());
        let fits = self.commands.len() < TRANSACTION_COMMANDS_MAX
            && self.ranges.len() + args.len() <= TRANSACTION_ARGS_MAX
            && bytes <= TRANSACTION_BYTES_MAX
            && self.heavy <= TRANSACTION_HEAVY_MAX;
        if !fits {
            self.abort();
            return Err(format!(
                "ERR a transaction has at most {TRANSACTION_COMMANDS_MAX} commands with {TRANSACTION_ARGS_MAX} arguments of \
                 {TRANSACTION_BYTES_MAX} bytes in all, and {TRANSACTION_HEAVY_MAX} of the kind of SCAN and INFO"
            ));
        }
        let first = self.ranges.len();
        for arg in args.from(0) {
            let start = self.bytes.len() as u32;
            self.bytes.extend_from_slice(arg);
            self.ranges.push((start, self.bytes.len() as u32));
        }
        self.commands.push(Queued { spec, args: first..self.ranges.len() });
        Ok(())
    }

    /// EXEC will refuse: a command could not be queued.
    pub fn abort(&mut self) {
        *self = Transaction { aborted: true, ..Transaction::default() };
    }

    /// Commands that are kept.
    pub fn len(&self) -> usize {
        self.commands.len()
    }

    /// The memory of what is kept.
    pub fn kept_bytes(&self) -> usize {
        self.bytes.len() + self.ranges.len() * size_of::<(u32, u32)>() + self.commands.len() * size_of::<Queued>()
    }

    /// True when it may change something.
    pub fn writes(&self) -> bool {
        self.commands.iter().any(|queued| matches!(queued.spec.run, Run::Write(_)))
    }

    /// True when it looks at keys.
    pub fn reads(&self) -> bool {
        self.commands.iter().any(|queued| matches!(queued.spec.run, Run::Read(_) | Run::Await(..)))
    }
}
