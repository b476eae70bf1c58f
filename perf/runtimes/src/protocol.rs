//! The one command, `SET key value`, as an array of bulk strings of the Redis protocol, and its one reply.

/// The reply to every request.
pub const REPLY: &[u8] = b"+OK\r\n";
/// The longest request that is accepted.
pub const REQUEST_BYTES_MAX: usize = 8 << 10;
const COMMAND: &[u8] = b"*3\r\n$3\r\nSET\r\n";

/// The input is not a `SET`, or it is longer than [`REQUEST_BYTES_MAX`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("expected SET key value of at most {REQUEST_BYTES_MAX} bytes")]
pub struct Malformed;

/// Length of the request that `input` begins with; `None` while its end has not been received.
pub fn request_bytes(input: &[u8]) -> Result<Option<usize>, Malformed> {
    let compared = COMMAND.len().min(input.len());
    if input[..compared] != COMMAND[..compared] {
        return Err(Malformed);
    }
    if compared < COMMAND.len() {
        return Ok(None);
    }
    let mut end = compared;
    for _argument in ["key", "value"] {
        match bulk_bytes(&input[end..])? {
            Some(bytes) => end += bytes,
            None => return Ok(None),
        }
    }
    if end > REQUEST_BYTES_MAX { Err(Malformed) } else { Ok(Some(end)) }
}

/// Length of the bulk string that `input` begins with, its header and end of line included.
fn bulk_bytes(input: &[u8]) -> Result<Option<usize>, Malformed> {
    const DIGITS_MAX: usize = 5;
    let mut value = 0;
    for (at, byte) in input.iter().enumerate() {
        match byte {
            b'$' if at == 0 => {}
            b'0'..=b'9' if (1..=DIGITS_MAX).contains(&at) => value = value * 10 + usize::from(byte - b'0'),
            b'\r' if at > 1 => {
                let end = at + 2 + value + 2;
                if value > REQUEST_BYTES_MAX {
                    return Err(Malformed);
                }
                if input.len() < end {
                    return Ok(None);
                }
                let ends = input[at + 1] == b'\n' && &input[end - 2..end] == b"\r\n";
                return if ends { Ok(Some(end)) } else { Err(Malformed) };
            }
            _ => return Err(Malformed),
        }
    }
    Ok(None)
}

/// A request with this key and value.
pub fn request(key: &str, value: &[u8]) -> Vec<u8> {
    let mut request = COMMAND.to_vec();
    for argument in [key.as_bytes(), value] {
        request.extend_from_slice(format!("${}\r\n", argument.len()).as_bytes());
        request.extend_from_slice(argument);
        request.extend_from_slice(b"\r\n");
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_cut_anywhere_is_incomplete() {
        let whole = request("key", b"some value");
        for cut in 0..whole.len() {
            assert_eq!(request_bytes(&whole[..cut]), Ok(None), "cut at {cut}");
        }
        assert_eq!(request_bytes(&[&whole[..], b"*3"].concat()), Ok(Some(whole.len())));
    }

    #[test]
    fn other_input_is_malformed() {
        let too_long = request("key", &[b'x'; REQUEST_BYTES_MAX]);
        for input in [
            &b"GET"[..],
            b"*3\r\n$3\r\nSET\r\n$x",
            b"*3\r\n$3\r\nSET\r\n$\r\n",
            b"*3\r\n$3\r\nSET\r\n$999999",
            &too_long,
        ] {
            assert_eq!(
                request_bytes(input),
                Err(Malformed),
                "{:?}",
                String::from_utf8_lossy(&input[..20.min(input.len())])
            );
        }
    }
}
