//! Commands about the connection itself: PING ECHO HELLO AUTH QUIT SELECT CLIENT. Error texts are redis-server's.

use crate::daemon::host::Host;
use crate::daemon::reply::Reply;
use crate::daemon::resp::Args;
use crate::daemon::session::Client;

use super::{CommandError, Outcome, integer, wrong_arity};

/// The version of redis-server whose commands and reply shapes these are; clients choose features by it.
pub const REDIS_VERSION: &str = "7.0.0";
/// A connection's name is at most this long.
const NAME_BYTES_MAX: usize = 256;

/// PING [text]
pub fn ping(_: &mut Client, args: &Args<'_>, _: &mut dyn Host, reply: &mut Reply) -> Outcome {
    match (args.len(), args.get(1)) {
        (1, _) => reply.simple("PONG"),
        (2, Some(text)) => reply.bulk(text),
        _ => reply.error(wrong_arity("ping")),
    }
    Outcome::DONE
}

/// ECHO text
pub fn echo(_: &mut Client, args: &Args<'_>, _: &mut dyn Host, reply: &mut Reply) -> Outcome {
    reply.bulk(&args[1]);
    Outcome::DONE
}

/// QUIT
pub fn quit(_: &mut Client, _: &Args<'_>, _: &mut dyn Host, reply: &mut Reply) -> Outcome {
    reply.ok();
    Outcome::Close
}

/// SELECT 0
pub fn select(_: &mut Client, args: &Args<'_>, _: &mut dyn Host, reply: &mut Reply) -> Outcome {
    match integer(&args[1]) {
        Some(0) => reply.ok(),
        Some(_) => reply.error("ERR DB index is out of range"),
        None => reply.error(CommandError::NotAnInteger),
    }
    Outcome::DONE
}

const WRONG_PASSWORD: &str = "WRONGPASS invalid username-password pair or user is disabled.";

/// True when user and password are right. Takes as long for a wrong password as for a right one.
fn is_right(client: &Client, user: &[u8], password: &[u8]) -> bool {
    let Some(expected) = client.password.as_deref().map(str::as_bytes) else {
        return user == b"default";
    };
    let differing = (0..password.len()).fold(0u8, |differing, at| {
        // An empty expected password cannot be configured; the index stays in bounds for any other.
        differing | (password[at] ^ expected.get(at % expected.len().max(1)).copied().unwrap_or(1))
    });
    user == b"default" && differing == 0 && password.len() == expected.len()
}

/// AUTH [user] password
pub fn auth(client: &mut Client, args: &Args<'_>, _: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let (user, password) = match args.len() {
        2 if client.password.is_none() => {
            reply.error(
                "ERR AUTH <password> called without any password configured for the default user. \
                 Are you sure your configuration is correct?",
            );
            return Outcome::DONE;
        }
        2 => (&b"default"[..], &args[1]),
        3 => (&args[1], &args[2]),
        _ => {
            reply.error(CommandError::Syntax);
            return Outcome::DONE;
        }
    };
    if is_right(client, user, password) {
        client.authenticated = true;
        reply.ok();
    } else {
        reply.error(WRONG_PASSWORD);
    }
    Outcome::DONE
}

/// HELLO [protocol [AUTH user password] [SETNAME name]]
pub fn hello(client: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let resp3 = match args.get(1).map(integer) {
        None => reply.resp3,
        Some(Some(2)) => false,
        Some(Some(3)) => true,
        Some(Some(_)) => {
            reply.error("NOPROTO unsupported protocol version");
            return Outcome::DONE;
        }
        Some(None) => {
            reply.error("ERR Protocol version is not an integer or out of range");
            return Outcome::DONE;
        }
    };
    let mut name = None;
    let mut at = 2;
    while let Some(option) = args.get(at) {
        if option.eq_ignore_ascii_case(b"AUTH") && args.len() > at + 2 {
            if !is_right(client, &args[at + 1], &args[at + 2]) {
                reply.error(WRONG_PASSWORD);
                return Outcome::DONE;
            }
            client.authenticated = true;
            at += 3;
        } else if option.eq_ignore_ascii_case(b"SETNAME") && args.len() > at + 1 {
            name = args.get(at + 1);
            at += 2;
        } else {
            let option = String::from_utf8_lossy(option);
            reply.error(format_args!("ERR Syntax error in HELLO option '{option}'"));
            return Outcome::DONE;
        }
    }
    if !client.authenticated {
        reply.error(
            "NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH <user> <pass> \
             option can be used to authenticate the client and select the RESP protocol version at the same time",
        );
        return Outcome::DONE;
    }
    if let Some(name) = name
        && !set_name(client, name, reply)
    {
        return Outcome::DONE;
    }
    reply.resp3 = resp3;
    greet(client, host, reply);
    Outcome::DONE
}

fn greet(client: &Client, host: &mut dyn Host, reply: &mut Reply) {
    reply.map(7);
    reply.bulk(b"server");
    reply.bulk(b"redis");
    reply.bulk(b"version");
    reply.bulk(REDIS_VERSION.as_bytes());
    reply.bulk(b"proto");
    reply.integer(if reply.resp3 { 3 } else { 2 });
    reply.bulk(b"id");
    reply.integer(client.id.0 as i64);
    reply.bulk(b"mode");
    reply.bulk(b"standalone");
    reply.bulk(b"role");
    reply.bulk(if host.facts().following.is_some() { b"replica" } else { b"master" });
    reply.bulk(b"modules");
    reply.array(0);
}

/// Sets the connection's name; on a bad one writes the error and returns false.
fn set_name(client: &mut Client, name: &[u8], reply: &mut Reply) -> bool {
    if !name.iter().all(|byte| (b'!'..=b'~').contains(byte)) {
        reply.error("ERR Client names cannot contain spaces, newlines or special characters.");
        return false;
    }
    if name.len() > NAME_BYTES_MAX {
        reply.error(format_args!("ERR a client name has at most {NAME_BYTES_MAX} bytes"));
        return false;
    }
    client.name = name.to_vec();
    true
}

/// CLIENT SETNAME name | GETNAME | SETINFO attribute value | ID
pub fn client(client: &mut Client, args: &Args<'_>, _: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let subcommand = args[1].to_ascii_uppercase();
    match (&subcommand[..], args.len()) {
        (b"ID", 2) => reply.integer(client.id.0 as i64),
        (b"GETNAME", 2) if client.name.is_empty() => reply.null(),
        (b"GETNAME", 2) => reply.bulk(&client.name),
        (b"SETNAME", 3) => {
            if set_name(client, &args[2], reply) {
                reply.ok();
            }
        }
        // What library the client is: taken, as redis-server does, and of no use to this node.
        (b"SETINFO", 4) if is_library_attribute(&args[2]) => reply.ok(),
        (b"SETINFO", 4) => {
            let attribute = String::from_utf8_lossy(&args[2]);
            reply.error(format_args!("ERR Unrecognized option '{attribute}'"));
        }
        (b"ID" | b"GETNAME" | b"SETNAME" | b"SETINFO", _) => {
            let subcommand = String::from_utf8_lossy(&subcommand);
            reply.error(wrong_arity(&format!("client|{subcommand}")));
        }
        _ => unknown_subcommand("CLIENT", &args[1], reply),
    }
    Outcome::DONE
}

fn is_library_attribute(attribute: &[u8]) -> bool {
    attribute.eq_ignore_ascii_case(b"LIB-NAME") || attribute.eq_ignore_ascii_case(b"LIB-VER")
}

/// As redis-server words it, but naming what there is no help for.
pub fn unknown_subcommand(command: &str, subcommand: &[u8], reply: &mut Reply) {
    let subcommand = String::from_utf8_lossy(&subcommand[..subcommand.len().min(128)]);
    reply.error(format_args!("ERR unknown subcommand '{subcommand}'. {command} {subcommand} is not supported."));
}
