//! The commands: how one is found, and what each may do. Used by `session`.
//!
//! A command that reads gets a view; one that writes gets a view and emits effects, which become one record; a control command
//! gets the session itself. None of them knows what its reply is held for: the session decides by what they did.

pub mod connection;
pub mod glob;
pub mod keys;
pub mod reading;
pub mod replication;
pub mod server;
pub mod stream;
pub mod string;
pub mod table;
pub mod transaction;
pub mod view;

use walferry_applier::record::Effect;

use crate::session::Client;
use crate::session::host::{Host, Refusal};
use crate::session::outbox::Hold;
use crate::session::parked::Parked;
use crate::session::reply::Reply;
use crate::session::resp::{Args, KEY_BYTES_MAX};
use view::{Overlay, View};

pub use table::{COMMANDS, Run, Spec};

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

/// What a writing command works with.
pub struct Writer<'a> {
    base: View<'a>,
    record: &'a mut Vec<u8>,
    /// In a transaction: what its earlier commands changed.
    overlay: Option<&'a mut Overlay>,
    now_ms: u64,
    /// Bytes of values that its appends go on from: each node writes them anew with its next checkpoint, however short the record is.
    appended_to: usize,
}

impl<'a> Writer<'a> {
    /// A command on its own: emits into `record`, which is empty.
    pub fn new(base: View<'a>, record: &'a mut Vec<u8>, now_ms: u64) -> Writer<'a> {
        Writer { base, record, overlay: None, now_ms, appended_to: 0 }
    }

    /// A command of a transaction.
    pub fn in_transaction(
        base: View<'a>,
        record: &'a mut Vec<u8>,
        overlay: &'a mut Overlay,
        now_ms: u64,
    ) -> Writer<'a> {
        Writer { base, record, overlay: Some(overlay), now_ms, appended_to: 0 }
    }

    /// The newest state, this transaction's own changes included.
    pub fn view(&self) -> View<'_> {
        match &self.overlay {
            Some(overlay) => self.base.with(overlay),
            None => self.base,
        }
    }

    /// The wall clock, milliseconds since the Unix epoch.
    pub fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// As `emit`, for bytes behind a value of this length.
    pub fn append(&mut self, key: &[u8], bytes: &[u8], length: usize) {
        if !self.overlay.as_ref().is_some_and(|overlay| overlay.has(key)) {
            self.appended_to += length;
        }
        self.emit(Effect::Append { key, bytes });
    }

    /// How long the values are together that its appends went on from.
    pub fn appended_to(&self) -> usize {
        self.appended_to
    }

    /// Adds a change to the record. Only once the command can no longer fail.
    pub fn emit(&mut self, effect: Effect<'_>) {
        effect.encode_into(self.record);
        if let Some(overlay) = &mut self.overlay {
            overlay.apply(&effect);
        }
    }
}

/// The command that `args` call, if it is known and has as many arguments as it takes.
pub fn find(args: &Args<'_>) -> Result<&'static Spec, String> {
    let name = &args[0];
    let Some(spec) = lookup(name) else {
        let shown = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(128)]).into_owned();
        let mut beginning = String::new();
        for arg in args.from(1) {
            if beginning.len() >= 128 {
                break;
            }
            beginning.push_str(&format!("'{}' ", shown(arg)));
        }
        return Err(format!("ERR unknown command '{}', with args beginning with: {beginning}", shown(name)));
    };
    let enough = match spec.arity {
        exact @ 0.. => args.len() == exact as usize,
        at_least => args.len() >= at_least.unsigned_abs() as usize,
    };
    if !enough {
        return Err(wrong_arity(spec.name));
    }
    if args.len() > table::ARGS_MAX && args.len() > spec.args_max() {
        let most = spec.args_max() - 1;
        return Err(format!("ERR too many arguments for '{}' command: it takes at most {most}", spec.name));
    }
    if spec.has_long_argument(args) {
        return Err(format!("ERR too large: an argument of '{}' has at most {KEY_BYTES_MAX} bytes", spec.name));
    }
    Ok(spec)
}

/// The command of this name in any case.
pub fn lookup(name: &[u8]) -> Option<&'static Spec> {
    COMMANDS.iter().find(|spec| spec.name.as_bytes().eq_ignore_ascii_case(name))
}

/// As redis-server words it; `name` in lower case, a subcommand as `command|subcommand`.
pub fn wrong_arity(name: &str) -> String {
    format!("ERR wrong number of arguments for '{}' command", name.to_ascii_lowercase())
}

/// Why a command failed, in redis-server's words where it has any.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The key holds something else.
    #[error("WRONGTYPE Operation against a key holding the wrong kind of value")]
    WrongType,
    /// Not a number, or beyond 64 bits.
    #[error("ERR value is not an integer or out of range")]
    NotAnInteger,
    /// Words that make no sense where they stand.
    #[error("ERR syntax error")]
    Syntax,
    /// An option of redis-server that this server does not have.
    #[error("ERR option {option} of {command} is not supported")]
    Unsupported {
        /// The option.
        option: String,
        /// The command.
        command: &'static str,
    },
    /// Any other; starts with its code.
    #[error("{0}")]
    Other(String),
    /// The store could not be read.
    #[error("ERR the store could not be read: {0}")]
    Store(String),
}

impl CommandError {
    /// An error in these words, its code first.
    pub fn text(text: impl Into<String>) -> CommandError {
        CommandError::Other(text.into())
    }

    /// `option` of `command` is known to redis-server and not supported here.
    pub fn unsupported(option: &[u8], command: &'static str) -> CommandError {
        CommandError::Unsupported { option: String::from_utf8_lossy(option).to_uppercase(), command }
    }
}

/// What a command that reads or writes keys returns; its reply is written unless it failed.
pub type Executed = Result<(), CommandError>;

/// A signed 64-bit decimal exactly as redis-server takes it: no plus sign, no leading zeros, no spaces.
pub fn integer(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let plain = match digits {
        [b'0'] => digits.len() == text.len(),
        [b'1'..=b'9', rest @ ..] => rest.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    if !plain {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// The answer to a write that the node does not take.
pub fn refusal_text(refusal: &Refusal) -> String {
    match refusal {
        Refusal::Busy => "BUSY the log's buffer is full".to_owned(),
        Refusal::ReadOnly { leader: Some(leader) } => {
            format!("READONLY You can't write against a read only replica. The leader is {leader}.")
        }
        Refusal::ReadOnly { leader: None } => {
            "READONLY You can't write against a read only replica. The leader is not known.".to_owned()
        }
        // The slot of redis-cluster means nothing here; clients that follow the error look at the address.
        Refusal::Moved { leader } => format!("MOVED 0 {leader}"),
        Refusal::NoLeader(text) => format!("CLUSTERDOWN {text}"),
        Refusal::NoSpace(text) => format!("NOSPACE {text}"),
        Refusal::NoReplicas(text) => format!("NOREPLICAS {text}"),
        Refusal::TooLarge(text) => format!("ERR {text}"),
        Refusal::Stopped(text) => format!("STOPPED {text}"),
    }
}

/// What a control command is: it may do anything to its session, and ask anything of the node.
pub type Control = fn(&mut Client, &Args<'_>, &mut dyn Host, &mut Reply) -> Outcome;
/// A command that only reads.
pub type Read = fn(&View<'_>, &Args<'_>, &mut Reply) -> Executed;
/// A command that may write.
pub type Write = fn(&mut Writer<'_>, &Args<'_>, &mut Reply) -> Executed;

/// Puts the error of a command that failed in place of what it had written after `from` bytes of the reply.
pub fn answer(executed: Executed, from: usize, reply: &mut Reply) {
    if let Err(error) = executed {
        reply.undo_to(from);
        reply.error(error);
    }
}
