//! The request parser: every cut, every bound, and noise.

use crate::session::reply::{Reply, decimal};
use crate::session::resp::{
    COMMAND_ARGS_MAX, COMMAND_BYTES_MAX, LINE_BYTES_MAX, Parser, Progress, ProtocolError, SKIP_BYTES_MAX,
    VALUE_BYTES_MAX,
};

/// What a parser makes of a stream of bytes: each command's arguments, or `None` for one beyond the bounds.
type Commands = Vec<Option<Vec<Vec<u8>>>>;

/// Feeds `pieces` as a session does and returns the commands, and how the stream ended.
fn feed<'a>(pieces: impl IntoIterator<Item = &'a [u8]>, parser: &mut Parser) -> (Commands, Result<(), ProtocolError>) {
    let (mut kept, mut commands) = (Vec::new(), Vec::new());
    for piece in pieces {
        kept.extend_from_slice(piece);
        let mut at = 0;
        while at < kept.len() {
            match parser.parse(&kept[at..]) {
                Ok(Progress::More { forget }) => {
                    at += forget;
                    break;
                }
                Ok(Progress::Command { bytes }) => {
                    commands.push(Some(parser.args(&kept[at..]).from(0).map(<[u8]>::to_vec).collect()));
                    at += bytes;
                    parser.next();
                }
                Ok(Progress::TooLarge { bytes }) => {
                    commands.push(None);
                    at += bytes;
                    parser.next();
                }
                Err(error) => return (commands, Err(error)),
            }
        }
        kept.drain(..at);
    }
    (commands, Ok(()))
}

fn parse(bytes: &[u8]) -> (Commands, Result<(), ProtocolError>) {
    feed([bytes], &mut Parser::default())
}

fn words(words: &[&str]) -> Option<Vec<Vec<u8>>> {
    Some(words.iter().map(|word| word.as_bytes().to_vec()).collect())
}

#[test]
fn requests_parse_the_same_cut_at_every_byte() {
    let stream: &[u8] = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$6\r\na\r\nb\r\n\r\n*0\r\n\r\nPING\r\n*-1\r\nset a \"x\\r\\n \\x41\" 'it\\'s'\n*1\r\n$0\r\n\r\n";
    let expected = vec![
        words(&["SET", "k", "a\r\nb\r\n"]),
        words(&[]),
        words(&[]),
        words(&["PING"]),
        words(&[]),
        words(&["set", "a", "x\r\n A", "it's"]),
        words(&[""]),
    ];
    assert_eq!(parse(stream), (expected.clone(), Ok(())));
    for first in 0..=stream.len() {
        for second in first..=stream.len() {
            let pieces = [&stream[..first], &stream[first..second], &stream[second..]];
            assert_eq!(feed(pieces, &mut Parser::default()), (expected.clone(), Ok(())), "cut at {first} and {second}");
        }
    }
    assert_eq!(feed(stream.chunks(1), &mut Parser::default()), (expected, Ok(())));
}

#[test]
fn what_is_not_the_protocol_is_told_in_redis_servers_words() {
    let long_line = vec![b'x'; LINE_BYTES_MAX];
    let too_many = format!("*{}\r\n", COMMAND_ARGS_MAX + 1);
    let too_long = format!("*1\r\n${}\r\n", SKIP_BYTES_MAX + 1);
    let table: [(&[u8], &str); 16] = [
        (b"*x\r\n", "invalid multibulk length"),
        (b"*\r\n", "invalid multibulk length"),
        (b"*1x\r\n", "invalid multibulk length"),
        (b"*1\rx", "invalid multibulk length"),
        (b"*99999999999999999999\r\n", "invalid multibulk length"),
        (too_many.as_bytes(), "invalid multibulk length"),
        (b"*1\r\nGET\r\n", "expected '$', got 'G'"),
        (b"*1\r\n\r\n", "expected '$', got '\\r'"),
        (b"*1\r\n$-1\r\n", "invalid bulk length"),
        (b"*1\r\n$\r\n", "invalid bulk length"),
        (b"*1\r\n$a\r\n", "invalid bulk length"),
        (too_long.as_bytes(), "invalid bulk length"),
        (b"*1\r\n$1\r\nab\r\n", "expected CRLF after a bulk string"),
        (b"get \"a\r\n", "unbalanced quotes in request"),
        (b"get \"a\"b\r\n", "unbalanced quotes in request"),
        (&long_line, "too big inline request"),
    ];
    for (bytes, error) in table {
        let (commands, end) = parse(bytes);
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]);
        assert_eq!((commands.len(), end.map_err(|error| error.to_string())), (0, Err(error.to_owned())), "{shown:?}");
    }
}

#[test]
fn a_client_that_has_not_authenticated_gets_little_memory() {
    let strict = || {
        let mut parser = Parser::default();
        parser.unauthenticated = true;
        parser
    };
    assert_eq!(feed([&b"*11\r\n"[..]], &mut strict()).1, Err(ProtocolError::UnauthenticatedCount));
    assert_eq!(feed([&b"*1\r\n$16385\r\n"[..]], &mut strict()).1, Err(ProtocolError::UnauthenticatedLength));
}

#[test]
fn largest_value_parses_and_larger_command_is_skipped() {
    let set = |length: usize| {
        let mut bytes = format!("*3\r\n$3\r\nSET\r\n$1\r\nk\r\n${length}\r\n").into_bytes();
        bytes.resize(bytes.len() + length, b'v');
        bytes.extend_from_slice(b"\r\n");
        bytes
    };
    let mut stream = set(VALUE_BYTES_MAX);
    stream.extend(set(VALUE_BYTES_MAX + 1));
    stream.extend_from_slice(b"PING\r\n");
    // Too large only as a whole, and the excess is not its last argument.
    let half = COMMAND_BYTES_MAX / 2;
    stream.extend_from_slice(format!("*4\r\n$4\r\nMSET\r\n${half}\r\n").as_bytes());
    stream.resize(stream.len() + half, b'v');
    stream.extend_from_slice(format!("\r\n${half}\r\n").as_bytes());
    stream.resize(stream.len() + half, b'v');
    stream.extend_from_slice(b"\r\n$1\r\nz\r\nPING\r\n");
    let (commands, end) = feed(stream.chunks(16 << 10), &mut Parser::default());
    assert_eq!(end, Ok(()));
    assert_eq!(commands.len(), 5);
    assert_eq!(commands[0].as_ref().map(|args| args[2].len()), Some(VALUE_BYTES_MAX));
    assert_eq!(commands[1], None);
    assert_eq!(commands[2], words(&["PING"]));
    assert_eq!(commands[3], None);
    assert_eq!(commands[4], words(&["PING"]));
}

#[test]
fn a_command_beyond_every_bound_is_a_protocol_error() {
    let length = VALUE_BYTES_MAX + 1;
    let mut parser = Parser::default();
    let (_, end) = feed([format!("*99\r\n${length}\r\n").as_bytes()], &mut parser);
    assert_eq!(end, Ok(()));
    let body = vec![0; length];
    let mut ends = (0..99).map(|_| feed([&body[..], format!("\r\n${length}\r\n").as_bytes()], &mut parser).1);
    assert!(ends.any(|end| end == Err(ProtocolError::Length)), "it must not be read past without end");
}

#[test]
fn noise_never_panics() {
    // A plain xorshift: the same noise each time, near enough to the protocol to get into every state.
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let alphabet: &[&[u8]] =
        &[b"*", b"$", b"\r\n", b"1", b"3", b"-", b"SET", b"\"", b"'", b"\\x", b" ", b"\n", b"\0", b"\xff", b"0"];
    for _ in 0..20_000 {
        let length = random() % 24;
        let bytes: Vec<u8> = (0..length).flat_map(|_| alphabet[random() as usize % alphabet.len()].to_vec()).collect();
        let whole = parse(&bytes);
        let cut = feed(bytes.chunks(1 + random() as usize % 3), &mut Parser::default());
        assert_eq!(whole, cut, "{bytes:?}");
    }
}

#[test]
fn numbers_are_written_as_decimals() {
    for number in [0, 7, 9, 10, -1, -9, 42, 1234567890, i64::MAX, i64::MIN] {
        assert_eq!(decimal(number, &mut [0; 20]), number.to_string().as_bytes());
        let mut reply = Reply::default();
        reply.integer(number);
        assert_eq!(&reply.bytes()[..], format!(":{number}\r\n").as_bytes());
    }
}
