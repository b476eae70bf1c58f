//! Requests of the Redis protocol, from bytes that arrive in any pieces: arrays of bulk strings, and inline commands for
//! people with a terminal. Used by `session`; knows no command and no reply.
//!
//! Written by hand rather than taken from `redis-protocol`: that decoder starts an array again from its first byte with each
//! piece that arrives (a 16 MiB value in 16 KiB pieces would be walked a thousand times), allocates for each array, and has no
//! bounds. This one keeps its place between the pieces, reuses one list of ranges, and refuses by declared length, before the
//! bytes arrive. The crate's decoder reads our replies in the tests.

use std::ops::Index;

use walferry_cluster::message::{TLS_FIRST_BYTES, is_of_a_peer};

/// A value, key or any other argument is at most this long.
pub const VALUE_BYTES_MAX: usize = 16 << 20;
/// A key that is written is at most this long.
pub const KEY_BYTES_MAX: usize = 64 << 10;
/// A command is at most this long, lengths and line ends included. A longer one is read past and answered with an error.
pub const COMMAND_BYTES_MAX: usize = 24 << 20;
/// A command has at most this many arguments; more is a protocol error.
pub const COMMAND_ARGS_MAX: usize = 1 << 20;
/// An inline command, or a line with a length, is at most this long; longer is a protocol error.
pub const LINE_BYTES_MAX: usize = 64 << 10;
/// A command beyond `COMMAND_BYTES_MAX` is read past up to this length; longer is a protocol error.
pub const SKIP_BYTES_MAX: usize = 512 << 20;
/// Before authentication a command has at most this many arguments...
pub const UNAUTHENTICATED_ARGS_MAX: usize = 10;
/// ...of at most this length.
pub const UNAUTHENTICATED_ARG_BYTES_MAX: usize = 16 << 10;

const _: () = assert!(VALUE_BYTES_MAX < COMMAND_BYTES_MAX);
const _: () = assert!(COMMAND_BYTES_MAX < walferry_engine::limits::FRAME_BYTES_MAX);
const _: () = assert!(COMMAND_BYTES_MAX < SKIP_BYTES_MAX && SKIP_BYTES_MAX < u32::MAX as usize);

/// Why the bytes are not the Redis protocol. The connection cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A count of arguments that is no number or beyond `COMMAND_ARGS_MAX`.
    #[error("invalid multibulk length")]
    Count,
    /// A length that is no number, negative, or beyond `SKIP_BYTES_MAX`.
    #[error("invalid bulk length")]
    Length,
    /// Too many arguments for a client that has not authenticated.
    #[error("unauthenticated multibulk length")]
    UnauthenticatedCount,
    /// Too long an argument for a client that has not authenticated.
    #[error("unauthenticated bulk length")]
    UnauthenticatedLength,
    /// Not a bulk string where one must stand.
    #[error("expected '$', got '{}'", char::from(*.0).escape_default())]
    Dollar(u8),
    /// The line end after a bulk string is missing.
    #[error("expected CRLF after a bulk string")]
    LineEnd,
    /// An endless line.
    #[error("too big inline request")]
    Line,
    /// A TLS handshake.
    #[error("this port does not speak TLS; the port that does is tls_listen")]
    Tls,
    /// A greeting of a node that takes this for a port for peers.
    #[error("this port is for clients, and not for peers: give the node's peer address instead, its --peer-listen")]
    Peer,
    /// An inline command whose quotes do not match.
    #[error("unbalanced quotes in request")]
    Quotes,
}

/// How far the parser came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// More bytes are needed. The first `forget` of those given are done with; the rest must be given again, with more.
    More {
        /// Bytes that need not be given again.
        forget: usize,
    },
    /// A command of `bytes` stands at the start; its arguments are in `Parser::args`. None for an empty line.
    Command {
        /// The command's length.
        bytes: usize,
    },
    /// A command beyond the bounds ended here; nothing of it was kept.
    TooLarge {
        /// Bytes up to its end, of those given.
        bytes: usize,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Start,
    Inline,
    Count,
    Length {
        args_left: usize,
    },
    Body {
        args_left: usize,
        length: usize,
    },
    /// In a command beyond the bounds, with this much of an argument still to come.
    Skip {
        args_left: usize,
        body_left: usize,
        total: usize,
    },
}

/// The place in the command that is arriving.
#[derive(Debug, Default)]
pub struct Parser {
    state: State,
    /// Bytes of the command that were walked: they are not looked at again.
    at: usize,
    ranges: Vec<(u32, u32)>,
    /// The arguments of an inline command, unquoted.
    inline: Vec<u8>,
    is_inline: bool,
    /// Strict bounds until the client has authenticated.
    pub unauthenticated: bool,
}

/// The arguments of one command; the first is its name.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    bytes: &'a [u8],
    ranges: &'a [(u32, u32)],
}

impl<'a> Args<'a> {
    /// Arguments that stand at `ranges` of `bytes`.
    pub fn new(bytes: &'a [u8], ranges: &'a [(u32, u32)]) -> Args<'a> {
        Args { bytes, ranges }
    }

    /// How many, the name included.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// True for an empty line.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Argument `at`, if there is one.
    pub fn get(&self, at: usize) -> Option<&'a [u8]> {
        let &(start, end) = self.ranges.get(at)?;
        Some(&self.bytes[start as usize..end as usize])
    }

    /// The arguments from `first` on.
    pub fn from(&self, first: usize) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let bytes = self.bytes;
        self.ranges.iter().skip(first).map(move |&(start, end)| &bytes[start as usize..end as usize])
    }

    /// The arguments from `first` on and before `last`.
    pub fn span(&self, first: usize, last: usize) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        self.from(first).take(last.saturating_sub(first))
    }

    /// The length of all arguments together.
    pub fn bytes_len(&self) -> usize {
        self.ranges.iter().map(|(start, end)| (end - start) as usize).sum()
    }
}

impl Index<usize> for Args<'_> {
    type Output = [u8];
    fn index(&self, at: usize) -> &[u8] {
        self.get(at).expect("the command's arity was checked")
    }
}

impl Parser {
    /// The arguments of the command that `parse` found at the start of `bytes`.
    pub fn args<'a>(&'a self, bytes: &'a [u8]) -> Args<'a> {
        Args { bytes: if self.is_inline { &self.inline } else { bytes }, ranges: &self.ranges }
    }

    /// True when the command that `parse` found is a part of an HTTP request: a web page can have a browser send one to any port.
    /// No command is called POST or `Host:`, as in redis-server; a request line of another method is known by its end.
    pub fn speaks_http(&self, args: &Args<'_>) -> bool {
        let Some(name) = args.get(0) else { return false };
        let request_line = || self.is_inline && args.len() == 3 && args[2].starts_with(b"HTTP/");
        name.eq_ignore_ascii_case(b"post") || name.eq_ignore_ascii_case(b"host:") || request_line()
    }

    /// Ready for the next command. `parse` may be called on a command that was already complete, until this is called.
    pub fn next(&mut self) {
        self.state = State::Start;
        self.at = 0;
        self.is_inline = false;
        self.ranges.clear();
        // One large MSET must not keep its list until the connection closes.
        if self.ranges.capacity() > 1024 {
            self.ranges.shrink_to(64);
        }
    }

    /// Walks on in `bytes`, which start at the command's first byte (less what was to be forgotten).
    pub fn parse(&mut self, bytes: &[u8]) -> Result<Progress, ProtocolError> {
        loop {
            match self.state {
                State::Start => match bytes.first() {
                    None => return Ok(Progress::More { forget: 0 }),
                    Some(b'*') => (self.state, self.at) = (State::Count, 1),
                    // No command begins like this, and what follows need not ever hold a line's end.
                    Some(first) if *first == TLS_FIRST_BYTES[0] => return Err(ProtocolError::Tls),
                    Some(_) => self.state = State::Inline,
                },
                // It holds no line's end either, and waits for an answer.
                State::Inline if is_of_a_peer(bytes) => return Err(ProtocolError::Peer),
                State::Inline => return self.inline(bytes),
                State::Count => {
                    let Some((count, after)) = number_line(bytes, self.at, ProtocolError::Count)? else {
                        return Ok(Progress::More { forget: 0 });
                    };
                    if count > COMMAND_ARGS_MAX as i64 {
                        return Err(ProtocolError::Count);
                    }
                    if self.unauthenticated && count > UNAUTHENTICATED_ARGS_MAX as i64 {
                        return Err(ProtocolError::UnauthenticatedCount);
                    }
                    self.at = after;
                    self.state = State::Length { args_left: count.max(0) as usize };
                }
                State::Length { args_left: 0 } => return Ok(Progress::Command { bytes: self.at }),
                State::Length { args_left } => match self.length(bytes, self.at)? {
                    None => return Ok(Progress::More { forget: 0 }),
                    Some((length, after)) => self.body(args_left, length, after),
                },
                State::Body { args_left, length } => {
                    let end = self.at + length;
                    if bytes.len() < end + 2 {
                        return Ok(Progress::More { forget: 0 });
                    }
                    if bytes[end..end + 2] != *b"\r\n" {
                        return Err(ProtocolError::LineEnd);
                    }
                    self.ranges.push((self.at as u32, end as u32));
                    self.at = end + 2;
                    self.state = State::Length { args_left: args_left - 1 };
                }
                State::Skip { .. } => return self.skip(bytes),
            }
        }
    }

    /// How many bytes the command that is arriving has at least: what a buffer may reserve at once.
    pub fn expected_bytes(&self) -> usize {
        match self.state {
            State::Body { length, .. } => self.at + length + 2,
            _ => self.at,
        }
    }

    fn length(&self, bytes: &[u8], at: usize) -> Result<Option<(usize, usize)>, ProtocolError> {
        match bytes.get(at) {
            None => return Ok(None),
            Some(b'$') => {}
            Some(&other) => return Err(ProtocolError::Dollar(other)),
        }
        let Some((length, after)) = number_line(bytes, at + 1, ProtocolError::Length)? else {
            return Ok(None);
        };
        let length = usize::try_from(length).map_err(|_| ProtocolError::Length)?;
        if length > SKIP_BYTES_MAX {
            return Err(ProtocolError::Length);
        }
        if self.unauthenticated && length > UNAUTHENTICATED_ARG_BYTES_MAX {
            return Err(ProtocolError::UnauthenticatedLength);
        }
        Ok(Some((length, after)))
    }

    fn body(&mut self, args_left: usize, length: usize, after: usize) {
        self.at = after;
        self.state = if length > VALUE_BYTES_MAX || after + length + 2 > COMMAND_BYTES_MAX {
            self.ranges.clear();
            State::Skip { args_left: args_left - 1, body_left: length + 2, total: after + length + 2 }
        } else {
            State::Body { args_left, length }
        };
    }

    /// Reads past a command beyond the bounds; keeps nothing of it.
    fn skip(&mut self, bytes: &[u8]) -> Result<Progress, ProtocolError> {
        let mut at = std::mem::take(&mut self.at);
        loop {
            let State::Skip { args_left, body_left, total } = self.state else { unreachable!("only called in Skip") };
            let eaten = body_left.min(bytes.len() - at);
            at += eaten;
            if eaten < body_left {
                self.state = State::Skip { args_left, body_left: body_left - eaten, total };
                return Ok(Progress::More { forget: at });
            }
            if args_left == 0 {
                return Ok(Progress::TooLarge { bytes: at });
            }
            self.state = State::Skip { args_left, body_left: 0, total };
            let Some((length, after)) = self.length(bytes, at)? else {
                return Ok(Progress::More { forget: at });
            };
            let total = total + (after - at) + length + 2;
            if total > SKIP_BYTES_MAX {
                return Err(ProtocolError::Length);
            }
            at = after;
            self.state = State::Skip { args_left: args_left - 1, body_left: length + 2, total };
        }
    }

    fn inline(&mut self, bytes: &[u8]) -> Result<Progress, ProtocolError> {
        let window = &bytes[self.at..bytes.len().min(LINE_BYTES_MAX)];
        let Some(end) = window.iter().position(|&byte| byte == b'\n') else {
            if bytes.len() >= LINE_BYTES_MAX {
                return Err(ProtocolError::Line);
            }
            self.at = bytes.len();
            return Ok(Progress::More { forget: 0 });
        };
        let end = self.at + end;
        // The command may be looked at again: leave the place where its line end is found at once.
        self.at = end;
        self.is_inline = true;
        let line = &bytes[..end];
        unquote(line.strip_suffix(b"\r").unwrap_or(line), &mut self.inline, &mut self.ranges)?;
        Ok(Progress::Command { bytes: end + 1 })
    }
}

/// The number from `at` to the next CR LF, and where the next line starts.
fn number_line(bytes: &[u8], at: usize, wrong: ProtocolError) -> Result<Option<(i64, usize)>, ProtocolError> {
    let (mut value, mut digits, mut i) = (0i64, 0, at);
    let negative = bytes.get(i) == Some(&b'-');
    i += usize::from(negative);
    loop {
        match bytes.get(i) {
            None => return Ok(None),
            Some(digit @ b'0'..=b'9') if digits < 18 => {
                value = value * 10 + i64::from(digit - b'0');
                digits += 1;
            }
            Some(b'\r') if digits > 0 => break,
            Some(_) => return Err(wrong),
        }
        i += 1;
    }
    match bytes.get(i + 1) {
        None => Ok(None),
        Some(b'\n') => Ok(Some((if negative { -value } else { value }, i + 2))),
        Some(_) => Err(wrong),
    }
}

/// Splits an inline command as redis-server does: words, "with \"escapes\" \x00" or 'without'.
fn unquote(line: &[u8], text: &mut Vec<u8>, ranges: &mut Vec<(u32, u32)>) -> Result<(), ProtocolError> {
    text.clear();
    ranges.clear();
    let mut rest = line;
    loop {
        rest = rest.trim_ascii_start();
        if rest.is_empty() {
            return Ok(());
        }
        let start = text.len() as u32;
        rest = word(rest, text)?;
        ranges.push((start, text.len() as u32));
    }
}

/// Takes one word off `rest`.
fn word<'a>(mut rest: &'a [u8], text: &mut Vec<u8>) -> Result<&'a [u8], ProtocolError> {
    while let Some((&byte, tail)) = rest.split_first() {
        match byte {
            b'"' | b'\'' => {
                rest = quoted(byte, tail, text)?;
                // A closing quote ends the word: something glued to it is a mistake.
                return match rest.first() {
                    Some(next) if !next.is_ascii_whitespace() => Err(ProtocolError::Quotes),
                    _ => Ok(rest),
                };
            }
            _ if byte.is_ascii_whitespace() || byte == 0 => return Ok(tail),
            _ => text.push(byte),
        }
        rest = tail;
    }
    Ok(rest)
}

fn quoted<'a>(quote: u8, mut rest: &'a [u8], text: &mut Vec<u8>) -> Result<&'a [u8], ProtocolError> {
    let hex = |digit: u8| char::from(digit).to_digit(16);
    loop {
        let (&byte, tail) = rest.split_first().ok_or(ProtocolError::Quotes)?;
        rest = tail;
        match (byte, tail) {
            (end, _) if end == quote => return Ok(rest),
            (b'\\', [b'x', high, low, after @ ..]) if quote == b'"' && hex(*high).is_some() && hex(*low).is_some() => {
                text.push((hex(*high).unwrap_or(0) * 16 + hex(*low).unwrap_or(0)) as u8);
                rest = after;
            }
            (b'\\', [escaped, after @ ..]) if quote == b'"' => {
                text.push(match escaped {
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'b' => 8,
                    b'a' => 7,
                    other => *other,
                });
                rest = after;
            }
            (b'\\', [b'\'', after @ ..]) => {
                text.push(b'\'');
                rest = after;
            }
            _ => text.push(byte),
        }
    }
}
