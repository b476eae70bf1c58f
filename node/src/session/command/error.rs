//! Why a command fails, in the words of redis-server where it has any, and what commands share to read their arguments.

use std::time::Duration;

use crate::session::host::Refusal;
use crate::session::reply::Reply;

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

/// As redis-server words it; `name` in lower case, a subcommand as `command|subcommand`.
pub fn wrong_arity(name: &str) -> String {
    format!("ERR wrong number of arguments for '{}' command", name.to_ascii_lowercase())
}

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

/// Puts the error of a command that failed in place of what it had written after `from` bytes of the reply.
pub fn answer(executed: Executed, from: usize, reply: &mut Reply) {
    if let Err(error) = executed {
        reply.undo_to(from);
        reply.error(error);
    }
}

/// A timeout of at most 24 days, in milliseconds: beyond it, clock arithmetic is the least of the worries.
pub const TIMEOUT_MS_MAX: i64 = i32::MAX as i64;

/// A timeout in milliseconds; on a bad one writes redis-server's error.
pub fn timeout(text: &[u8], reply: &mut Reply) -> Option<Duration> {
    match integer(text) {
        Some(ms @ 0..=TIMEOUT_MS_MAX) => Some(Duration::from_millis(ms as u64)),
        Some(..0) => {
            reply.error("ERR timeout is negative");
            None
        }
        _ => {
            reply.error("ERR timeout is not an integer or out of range");
            None
        }
    }
}
