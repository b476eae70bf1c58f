//! Replies of the Redis protocol, RESP2 or RESP3, written into one growing buffer. Used by `session` and the commands; knows
//! neither why a reply is given nor when it may leave.

use std::fmt::Write;

use bytes::{BufMut, BytesMut};

/// One reply is at most this long; a longer one is replaced by an error that names this bound.
pub const REPLY_BYTES_MAX: usize = 64 << 20;

const _: () = assert!(REPLY_BYTES_MAX > 2 * crate::session::resp::VALUE_BYTES_MAX);

/// Where replies are written.
#[derive(Debug, Default)]
pub struct Reply {
    bytes: BytesMut,
    /// RESP3 was asked for with HELLO 3.
    pub resp3: bool,
    /// Where the reply in writing starts.
    start: usize,
    /// Bytes of the reply that this is going to be a part of.
    outer: usize,
    overflown: bool,
}

impl Reply {
    /// A new reply starts here.
    pub fn begin(&mut self) {
        self.start = self.bytes.len();
        self.overflown = false;
    }

    /// Takes back what was written since `begin`.
    pub fn undo(&mut self) {
        self.bytes.truncate(self.start);
        self.overflown = false;
    }

    /// Takes back what was written after the first `bytes` of the reply in writing.
    pub fn undo_to(&mut self, bytes: usize) {
        self.bytes.truncate(self.start + bytes);
    }

    /// The reply is complete: replaced by an error if it grew beyond its bound.
    pub fn finish(&mut self) {
        if self.overflown {
            self.undo();
            self.error(format_args!(
                "ERR the reply would be larger than {REPLY_BYTES_MAX} bytes: ask for less (COUNT, fewer keys)"
            ));
        }
    }

    /// An empty one for a part whose length must be known before it is written here.
    pub fn scratch(&self) -> Reply {
        Reply { resp3: self.resp3, outer: self.outer + self.written(), ..Reply::default() }
    }

    /// Adds a part that was written apart.
    pub fn append(&mut self, part: Reply) {
        if part.overflown || self.outer + self.written() + part.buffered() > REPLY_BYTES_MAX {
            self.overflown = true;
        } else if self.written() == 0 && self.start == 0 && self.bytes.capacity() < part.buffered() {
            self.bytes = part.bytes;
        } else {
            self.bytes.extend_from_slice(&part.bytes);
        }
    }

    /// True when the reply in writing passed its bound: the rest is not kept, a loop may stop.
    pub fn is_over(&self) -> bool {
        self.overflown
    }

    /// What was written.
    pub fn bytes(&mut self) -> &mut BytesMut {
        &mut self.bytes
    }

    /// Bytes of the reply in writing.
    pub fn written(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Bytes written and not taken.
    pub fn buffered(&self) -> usize {
        self.bytes.len()
    }

    fn header(&mut self, kind: u8, number: i64) {
        self.bytes.put_u8(kind);
        self.digits(number);
        self.bytes.extend_from_slice(b"\r\n");
    }

    fn digits(&mut self, number: i64) {
        if let 0..10 = number {
            return self.bytes.put_u8(b'0' + number as u8);
        }
        let mut text = [0; 20];
        self.bytes.extend_from_slice(decimal(number, &mut text));
    }

    /// `+text`
    pub fn simple(&mut self, text: &str) {
        self.bytes.put_u8(b'+');
        self.bytes.extend_from_slice(text.as_bytes());
        self.bytes.extend_from_slice(b"\r\n");
    }

    /// `+OK`
    pub fn ok(&mut self) {
        self.bytes.extend_from_slice(b"+OK\r\n");
    }

    /// `-text`; `text` starts with its code. Line ends in it become spaces.
    pub fn error(&mut self, text: impl std::fmt::Display) {
        self.bytes.put_u8(b'-');
        let start = self.bytes.len();
        write!(self.bytes, "{text}").expect("writing to memory does not fail");
        for byte in &mut self.bytes[start..] {
            if matches!(byte, b'\r' | b'\n') {
                *byte = b' ';
            }
        }
        self.bytes.extend_from_slice(b"\r\n");
    }

    /// `:number`
    pub fn integer(&mut self, number: i64) {
        self.header(b':', number);
    }

    /// A count or position as `:number`.
    pub fn count(&mut self, count: usize) {
        self.integer(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// `$length` and the bytes.
    pub fn bulk(&mut self, bytes: &[u8]) {
        if self.outer + self.written() + bytes.len() > REPLY_BYTES_MAX {
            self.overflown = true;
            return;
        }
        self.header(b'$', bytes.len() as i64);
        self.bytes.extend_from_slice(bytes);
        self.bytes.extend_from_slice(b"\r\n");
    }

    /// Text as a bulk string.
    pub fn text(&mut self, text: impl std::fmt::Display) {
        self.bulk(text.to_string().as_bytes());
    }

    /// Text for people: a verbatim string in RESP3, a bulk string in RESP2.
    pub fn verbatim(&mut self, text: &str) {
        if !self.resp3 {
            return self.bulk(text.as_bytes());
        }
        self.header(b'=', text.len() as i64 + 4);
        self.bytes.extend_from_slice(b"txt:");
        self.bytes.extend_from_slice(text.as_bytes());
        self.bytes.extend_from_slice(b"\r\n");
    }

    /// Nothing where a string could be.
    pub fn null(&mut self) {
        self.bytes.extend_from_slice(if self.resp3 { b"_\r\n" } else { b"$-1\r\n" });
    }

    /// Nothing where an array could be.
    pub fn null_array(&mut self) {
        self.bytes.extend_from_slice(if self.resp3 { b"_\r\n" } else { b"*-1\r\n" });
    }

    /// An array of `length` elements, which follow.
    pub fn array(&mut self, length: usize) {
        self.header(b'*', length as i64);
    }

    /// A map of `length` pairs, which follow: in RESP2 an array twice as long.
    pub fn map(&mut self, length: usize) {
        if self.resp3 { self.header(b'%', length as i64) } else { self.array(length * 2) }
    }

    /// A set of `length` elements, which follow: in RESP2 an array.
    pub fn set(&mut self, length: usize) {
        self.header(if self.resp3 { b'~' } else { b'*' }, length as i64);
    }

    /// An optional string.
    pub fn bulk_or_null(&mut self, bytes: Option<&[u8]>) {
        match bytes {
            Some(bytes) => self.bulk(bytes),
            None => self.null(),
        }
    }
}

/// `number` in decimal, written into `text`.
pub fn digits(mut number: u64, text: &mut [u8; 20]) -> &[u8] {
    let mut at = text.len();
    loop {
        at -= 1;
        text[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &text[at..];
        }
    }
}

/// The same with a sign where one is needed.
pub fn decimal(number: i64, text: &mut [u8; 20]) -> &[u8] {
    let at = text.len() - digits(number.unsigned_abs(), text).len();
    if number >= 0 {
        return &text[at..];
    }
    text[at - 1] = b'-';
    &text[at - 1..]
}
