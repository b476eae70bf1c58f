//! Requests of clients: the first byte tells whether the client has authenticated and in which pieces the rest arrives.

use walferry_node::session::resp::{
    COMMAND_ARGS_MAX, COMMAND_BYTES_MAX, Parser, Progress, ProtocolError, UNAUTHENTICATED_ARG_BYTES_MAX,
    VALUE_BYTES_MAX,
};

/// What was understood.
#[derive(Debug, PartialEq, Eq)]
enum Understood {
    Command(Vec<Vec<u8>>),
    TooLarge,
    Wrong(ProtocolError),
}

/// Feeds `bytes` as a session does, in pieces of this size.
fn parse(bytes: &[u8], piece_bytes: usize, unauthenticated: bool) -> Vec<Understood> {
    let mut parser = Parser::default();
    parser.unauthenticated = unauthenticated;
    let (mut kept, mut all) = (Vec::new(), Vec::new());
    for piece in bytes.chunks(piece_bytes) {
        kept.extend_from_slice(piece);
        let mut at = 0;
        while at < kept.len() {
            match parser.parse(&kept[at..]) {
                Ok(Progress::More { forget }) => {
                    at += forget;
                    break;
                }
                Ok(Progress::Command { bytes: length }) => {
                    assert!(length > 0 && at + length <= kept.len(), "a command ends within what arrived");
                    // A command that has to wait is parsed once more, without anything new.
                    assert_eq!(parser.parse(&kept[at..]), Ok(Progress::Command { bytes: length }));
                    let args = parser.args(&kept[at..]);
                    assert!(args.len() <= COMMAND_ARGS_MAX && length <= COMMAND_BYTES_MAX);
                    let args: Vec<Vec<u8>> = args.from(0).map(<[u8]>::to_vec).collect();
                    assert!(args.iter().all(|arg| arg.len() <= VALUE_BYTES_MAX));
                    let inline = kept[at] != b'*';
                    if unauthenticated && !inline {
                        assert!(args.iter().all(|arg| arg.len() <= UNAUTHENTICATED_ARG_BYTES_MAX));
                    }
                    all.push(Understood::Command(args));
                    at += length;
                    parser.next();
                }
                Ok(Progress::TooLarge { bytes: length }) => {
                    assert!(at + length <= kept.len());
                    all.push(Understood::TooLarge);
                    at += length;
                    parser.next();
                }
                Err(error) => {
                    all.push(Understood::Wrong(error));
                    return all;
                }
            }
        }
        kept.drain(..at);
    }
    all
}

/// Any bytes.
pub fn run(data: &[u8]) {
    let Some((&how, bytes)) = data.split_first() else { return };
    let unauthenticated = how & 1 != 0;
    let piece_bytes = 1 + usize::from(how >> 1);
    let whole = parse(bytes, bytes.len().max(1), unauthenticated);
    assert_eq!(parse(bytes, piece_bytes, unauthenticated), whole, "in pieces of {piece_bytes}");
    let commands = whole.iter().filter_map(|understood| match understood {
        Understood::Command(args) => Some(args),
        _ => None,
    });
    let mut again = Vec::new();
    let mut expected = Vec::new();
    for args in commands {
        again.extend_from_slice(format!("*{}\r\n", args.len()).as_bytes());
        for arg in args {
            again.extend_from_slice(format!("${}\r\n", arg.len()).as_bytes());
            again.extend_from_slice(arg);
            again.extend_from_slice(b"\r\n");
        }
        expected.push(Understood::Command(args.clone()));
    }
    assert_eq!(parse(&again, again.len().max(1), false), expected, "what was understood survives being written again");
}
