//! Commands about the connection itself: PING ECHO HELLO AUTH ACL QUIT RESET SELECT CLIENT. Error texts are redis-server's.

use std::rc::Rc;

use crate::clients::list::ClientAsk;
use crate::session::client::Client;
use crate::session::host::Host;
use crate::session::parked::Parked;
use crate::session::reply::Reply;
use crate::session::resp::Args;
use crate::users::login::{self, Answer, Job, Login, NO_PLACE, Next, State, WRONG_PASSWORD};
use crate::users::{Judged, User};

use crate::session::command::error::{CommandError, integer, wrong_arity};
use crate::session::command::spec::Outcome;

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

/// RESET: the connection is as it was at its start, but keeps its number and what COMMITINFO tells.
pub fn reset(client: &mut Client, _: &Args<'_>, _: &mut dyn Host, reply: &mut Reply) -> Outcome {
    client.reset();
    reply.resp3 = false;
    reply.simple("RESET");
    Outcome::DONE
}

/// SELECT 0. Any other closes the connection: a client that goes on would write into a database that it did not choose.
pub fn select(_: &mut Client, args: &Args<'_>, _: &mut dyn Host, reply: &mut Reply) -> Outcome {
    match integer(&args[1]) {
        Some(0) => {
            reply.ok();
            return Outcome::DONE;
        }
        Some(_) => reply.error("ERR DB index is out of range"),
        None => reply.error(CommandError::NotAnInteger),
    }
    Outcome::Close
}

/// AUTH [user] password
pub fn auth(client: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let (user, password) = match args.len() {
        2 if client.needs_no_password() => {
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
    log_in(client, (user, password), Next::Auth, host, reply)
}

/// Answers a login, or parks until it has an answer.
fn log_in(
    client: &mut Client,
    (name, password): (&[u8], &[u8]),
    next: Next,
    host: &mut dyn Host,
    reply: &mut Reply,
) -> Outcome {
    // Before it is counted: the first wrong one has the shortest delay.
    let refused_at = host.now() + login::delay(client.failures);
    let state = match client.authenticate(name, password) {
        Judged::Right(user) => {
            logged_in(client, user, &next, host, reply);
            return if client.is_turned_away() { Outcome::Close } else { Outcome::DONE };
        }
        Judged::Wrong => State::Refused(WRONG_PASSWORD),
        Judged::Check(check) => {
            let answer = Answer::default();
            let (hashes, password) = (check.hashes.clone(), password.to_vec());
            let (session, from) = (client.id, client.comes_from);
            host.check_password(Job { session, from, password, hashes, answer: Answer::clone(&answer) });
            State::Asked(check, answer)
        }
    };
    Outcome::Park(Parked::for_login(Login { state, next }, refused_at))
}

/// The password was right: what the command answers.
pub fn logged_in(client: &mut Client, user: Rc<User>, next: &Next, host: &mut dyn Host, reply: &mut Reply) {
    client.log_in(user);
    if client.is_turned_away() {
        reply.error(NO_PLACE);
        return;
    }
    match next {
        Next::Auth => reply.ok(),
        Next::Hello { resp3, name } => chosen(client, *resp3, name.as_deref(), host, reply),
    }
}

/// ACL WHOAMI | LIST | USERS | LOAD
pub fn acl(client: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let subcommand = args[1].to_ascii_uppercase();
    match (&subcommand[..], args.len()) {
        (b"WHOAMI", 2) => reply.text(client.user.as_ref().map_or("", |user| &user.name)),
        (b"LIST" | b"USERS", 2) => {
            let lines = client.user_lines();
            reply.array(lines.len());
            for line in &lines {
                let name = line.split(' ').nth(1).unwrap_or_default();
                reply.text(if subcommand == b"LIST" { line } else { name });
            }
        }
        (b"LOAD", 2) => match host.reload_users() {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(format_args!("ERR {error}")),
        },
        (b"WHOAMI" | b"LIST" | b"USERS" | b"LOAD", _) => {
            reply.error(wrong_arity(&format!("acl|{}", String::from_utf8_lossy(&subcommand))));
        }
        _ => unknown_subcommand("ACL", &args[1], reply),
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
    let (mut name, mut given) = (None, None);
    let mut at = 2;
    while let Some(option) = args.get(at) {
        if option.eq_ignore_ascii_case(b"AUTH") && args.len() > at + 2 {
            given = Some((&args[at + 1], &args[at + 2]));
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
    if let Some(given) = given {
        let name = name.map(<[u8]>::to_vec);
        return log_in(client, given, Next::Hello { resp3, name }, host, reply);
    }
    if client.user.is_none() {
        reply.error(
            "NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH <user> <pass> \
             option can be used to authenticate the client and select the RESP protocol version at the same time",
        );
        return Outcome::DONE;
    }
    chosen(client, resp3, name, host, reply);
    Outcome::DONE
}

/// The rest of HELLO, once it is known who asks.
fn chosen(client: &mut Client, resp3: bool, name: Option<&[u8]>, host: &mut dyn Host, reply: &mut Reply) {
    if let Some(name) = name
        && !set_name(client, name, reply)
    {
        return;
    }
    reply.resp3 = resp3;
    greet(client, host, reply);
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

/// CLIENT SETNAME name | GETNAME | SETINFO attribute value | ID | INFO | LIST [ID id...] | KILL filter...
pub fn client(client: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
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
        (b"INFO", 2) => return ask(client, ClientAsk::List(vec![client.id.0]), host),
        (b"LIST" | b"KILL", _) => match clients_asked(&subcommand, args) {
            Ok(asked) => return ask(client, asked, host),
            Err(error) => reply.error(error),
        },
        (b"ID" | b"INFO" | b"GETNAME" | b"SETNAME" | b"SETINFO", _) => {
            let subcommand = String::from_utf8_lossy(&subcommand);
            reply.error(wrong_arity(&format!("client|{subcommand}")));
        }
        _ => unknown_subcommand("CLIENT", &args[1], reply),
    }
    Outcome::DONE
}

fn ask(client: &Client, ask: ClientAsk, host: &mut dyn Host) -> Outcome {
    Outcome::Park(Parked::for_clients(host.ask_clients(client.id, ask)))
}

/// What CLIENT LIST and CLIENT KILL ask for; filters that this node does not have are errors.
fn clients_asked(subcommand: &[u8], args: &Args<'_>) -> Result<ClientAsk, CommandError> {
    let is = |at: usize, word: &[u8]| args.get(at).is_some_and(|arg| arg.eq_ignore_ascii_case(word));
    let number = |text: &[u8]| integer(text).and_then(|id| u64::try_from(id).ok());
    let number = |text: &[u8]| number(text).ok_or_else(|| CommandError::text("ERR Invalid client ID"));
    let address = |text: &[u8]| {
        let parsed = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
        parsed.ok_or_else(|| CommandError::text("ERR No such client: an address is IP:PORT"))
    };
    if subcommand == b"LIST" {
        return match args.len() {
            2 => Ok(ClientAsk::List(Vec::new())),
            4.. if is(2, b"ID") => {
                let mut ids = args.from(3).map(number).collect::<Result<Vec<_>, _>>()?;
                ids.sort_unstable();
                Ok(ClientAsk::List(ids))
            }
            _ => Err(CommandError::unsupported(&args[2], "CLIENT LIST")),
        };
    }
    if let (3, Some(from)) = (args.len(), args.get(2)) {
        return address(from).map(ClientAsk::KillAddress);
    }
    if args.len() < 4 || !args.len().is_multiple_of(2) {
        return Err(CommandError::Syntax);
    }
    let (mut id, mut from, mut user, mut skip_me) = (None, None, None, true);
    for at in (2..args.len()).step_by(2) {
        let value = &args[at + 1];
        if is(at, b"ID") {
            id = Some(number(value)?);
        } else if is(at, b"ADDR") {
            from = Some(address(value)?);
        } else if is(at, b"USER") {
            user = Some(value.to_vec());
        } else if is(at, b"SKIPME") {
            skip_me = !is(at + 1, b"no");
        } else {
            return Err(CommandError::unsupported(&args[at], "CLIENT KILL"));
        }
    }
    Ok(ClientAsk::Kill { id, address: from, user, skip_me })
}

fn is_library_attribute(attribute: &[u8]) -> bool {
    attribute.eq_ignore_ascii_case(b"LIB-NAME") || attribute.eq_ignore_ascii_case(b"LIB-VER")
}

/// As redis-server words it, but naming what there is no help for.
pub fn unknown_subcommand(command: &str, subcommand: &[u8], reply: &mut Reply) {
    let subcommand = String::from_utf8_lossy(&subcommand[..subcommand.len().min(128)]);
    reply.error(format_args!("ERR unknown subcommand '{subcommand}'. {command} {subcommand} is not supported."));
}
