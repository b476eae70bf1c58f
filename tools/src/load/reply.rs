//! Finds where an answer ends and whether it is an error, without building it. A load generator that allocates per
//! answer measures itself. Called by the session core; knows no socket and no script.

/// A line longer than this, or a count with more digits, is not RESP.
const LINE_BYTES_MAX: usize = 64 << 10;
/// An answer that announces more elements is refused.
const ELEMENTS_MAX: u64 = 1 << 24;

/// What an answer was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A value, a status, or an array without an error in it.
    Value,
    /// Nil: for EXEC, that a watched key changed.
    Nil,
    /// An error; its text (without `-` and line end) stands at this range of the bytes given to `scan`.
    Error {
        /// Start of the text.
        from: usize,
        /// End of the text.
        to: usize,
    },
}

/// What came is not RESP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the node sent bytes that are not RESP")]
pub struct NotResp;

/// How far into an answer the scan has come; resumes where more bytes were needed.
#[derive(Debug)]
pub struct Scan {
    at: usize,
    /// Elements that are still to come; the answer ends at 0.
    outstanding: u64,
    kind: Option<Kind>,
}

impl Default for Scan {
    fn default() -> Scan {
        Scan { at: 0, outstanding: 1, kind: None }
    }
}

impl Scan {
    /// Looks at `bytes`, which start with the answer. `Some((length, kind))` once it is whole; the scan is then ready
    /// for the next answer. Until then call again with the same bytes and more.
    pub fn scan(&mut self, bytes: &[u8]) -> Result<Option<(usize, Kind)>, NotResp> {
        while self.outstanding > 0 {
            let rest = &bytes[self.at..];
            let Some(end) = rest.windows(2).position(|pair| pair == b"\r\n") else {
                return if rest.len() > LINE_BYTES_MAX { Err(NotResp) } else { Ok(None) };
            };
            let line_bytes = end + 2;
            let count = || -> Result<i64, NotResp> {
                std::str::from_utf8(&rest[1..end]).ok().and_then(|digits| digits.parse().ok()).ok_or(NotResp)
            };
            let mut kind = Kind::Value;
            match rest[0] {
                b'+' | b':' | b',' | b'#' | b'(' => self.at += line_bytes,
                b'_' => {
                    kind = Kind::Nil;
                    self.at += line_bytes;
                }
                b'-' => {
                    kind = Kind::Error { from: self.at + 1, to: self.at + end };
                    self.at += line_bytes;
                }
                b'$' | b'=' | b'!' => match usize::try_from(count()?) {
                    Ok(length) if rest.len() < line_bytes + length + 2 => return Ok(None),
                    Ok(length) => self.at += line_bytes + length + 2,
                    Err(_) => {
                        kind = Kind::Nil;
                        self.at += line_bytes;
                    }
                },
                b'*' | b'~' | b'>' | b'%' => {
                    let pairs = if rest[0] == b'%' { 2 } else { 1 };
                    match u64::try_from(count()?) {
                        Ok(elements) if elements > ELEMENTS_MAX => return Err(NotResp),
                        Ok(elements) => self.outstanding += elements * pairs,
                        Err(_) => kind = Kind::Nil,
                    }
                    self.at += line_bytes;
                }
                _ => return Err(NotResp),
            }
            self.outstanding -= 1;
            // The first element tells what the answer is; an error anywhere in it wins.
            if self.kind.is_none() || matches!((self.kind, kind), (Some(Kind::Value), Kind::Error { .. })) {
                self.kind = Some(kind);
            }
        }
        let length = self.at;
        let kind = self.kind.unwrap_or(Kind::Value);
        *self = Scan::default();
        Ok(Some((length, kind)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_all(bytes: &[u8]) -> (usize, Kind) {
        Scan::default().scan(bytes).unwrap().expect("the answer is whole")
    }

    #[test]
    fn answers_of_every_type_end_where_they_should() {
        for answer in [
            "+OK\r\n",
            ":-12\r\n",
            "$5\r\nhello\r\n",
            "$0\r\n\r\n",
            "*0\r\n",
            "*2\r\n$1\r\na\r\n*2\r\n:1\r\n+x\r\n",
            "%1\r\n+a\r\n:1\r\n",
            "#t\r\n",
            ",1.5\r\n",
        ] {
            let followed = format!("{answer}+NEXT\r\n");
            assert_eq!(parse_all(followed.as_bytes()), (answer.len(), Kind::Value), "{answer:?}");
        }
        for nil in ["$-1\r\n", "*-1\r\n", "_\r\n"] {
            assert_eq!(parse_all(nil.as_bytes()), (nil.len(), Kind::Nil));
        }
    }

    #[test]
    fn an_error_inside_of_an_array_is_seen() {
        let answer = b"*3\r\n:1\r\n-ERR no\r\n:2\r\n";
        let (length, kind) = parse_all(answer);
        assert_eq!(length, answer.len());
        let Kind::Error { from, to } = kind else { panic!("{kind:?}") };
        assert_eq!(&answer[from..to], b"ERR no");
    }

    #[test]
    fn a_scan_resumes_at_any_split() {
        let answer = b"*3\r\n$11\r\nhello\r\nyou!\r\n:5\r\n*1\r\n-ERR x\r\n";
        for split in 0..answer.len() {
            let mut scan = Scan::default();
            assert_eq!(scan.scan(&answer[..split]), Ok(None), "split at {split}");
            assert_eq!(scan.scan(answer).unwrap().map(|(length, _)| length), Some(answer.len()));
        }
    }

    #[test]
    fn other_bytes_are_refused() {
        assert_eq!(Scan::default().scan(b"HTTP/1.1 400\r\n"), Err(NotResp));
        assert_eq!(Scan::default().scan(b"*99999999999\r\n"), Err(NotResp));
        assert_eq!(Scan::default().scan(b"$x\r\n"), Err(NotResp));
    }
}
