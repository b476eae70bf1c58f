//! Commands about what a reader must see: SESSION and READ. The rules are `reading`'s.

use std::time::Duration;

use crate::session::client::Client;
use crate::session::host::Host;
use crate::session::reading::{self, Mode, Position, Token};
use crate::session::reply::Reply;
use crate::session::resp::Args;
use crate::units::Span;

use crate::session::command::error::{TIMEOUT_MS_MAX, timeout, wrong_arity};
use crate::session::command::spec::Outcome;

/// SESSION: the token of what this connection has written and read. SESSION token: no later read is older than that.
/// SESSION RESET: forgets.
pub fn session(client: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    match args.get(1) {
        _ if args.len() > 2 => reply.error(wrong_arity("session")),
        None => {
            client.tracked = true;
            reply.text(Token::new(host.cluster_id(), client.seen));
        }
        Some(word) if word.eq_ignore_ascii_case(b"RESET") => {
            client.seen = Position::default();
            client.firm = Position::default();
            reply.ok();
        }
        Some(text) => match std::str::from_utf8(text).unwrap_or_default().parse::<Token>() {
            Ok(token) => take(token, client, host, reply),
            Err(error) => reply.error(format_args!("ERR {error}")),
        },
    }
    Outcome::DONE
}

fn take(token: Token, client: &mut Client, host: &dyn Host, reply: &mut Reply) {
    let ours = Token::new(host.cluster_id(), Position::default());
    // A node that has not met its cluster yet holds nothing: it is behind any token.
    if host.cluster_id() != 0 && ours.cluster != token.cluster {
        reply.error(format_args!(
            "ERR the token is of cluster {:08x}, this node belongs to {:08x}: tokens hold within one cluster only",
            token.cluster, ours.cluster
        ));
        return;
    }
    let is_lost = |position| reading::lost(position, host.history()).is_some();
    if !client.tracked && is_lost(client.seen) {
        // Nobody asked to be told; whoever begins now begins with the token.
        (client.seen, client.firm) = (Position::default(), Position::default());
    }
    client.tracked = true;
    if is_lost(token.seen) && !is_lost(client.seen) {
        // It is not forgotten for having seen something later: reads tell that it was lost.
        (client.seen, client.firm) = (token.seen, token.seen);
    } else if !is_lost(client.seen) {
        client.firm = client.firm.max(token.seen);
        client.seen = client.seen.max(token.seen);
    }
    reply.ok();
}

/// READ [ANY | AT MOST age | COMMITTED | STRONG | TIMEOUT [ms]]
pub fn read(client: &mut Client, args: &Args<'_>, _: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let words: Vec<String> = args.from(1).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    let upper: Vec<String> = words.iter().map(|word| word.to_ascii_uppercase()).collect();
    let upper: Vec<&str> = upper.iter().map(String::as_str).collect();
    match upper[..] {
        [] => {
            reply.text(client.mode);
            return Outcome::DONE;
        }
        ["TIMEOUT"] => {
            reply.count(client.read_timeout.as_millis() as usize);
            return Outcome::DONE;
        }
        ["TIMEOUT", _] => {
            let Some(timeout) = timeout(&args[2], reply) else { return Outcome::DONE };
            client.read_timeout = timeout;
        }
        ["ANY"] => client.mode = Mode::Any,
        ["COMMITTED"] => client.mode = Mode::Committed,
        ["STRONG"] => client.mode = Mode::Strong,
        ["AT", "MOST", _] | ["AT", "MOST", _, _] => match words[2..].concat().parse::<Span>() {
            Ok(Span(age)) if age <= Duration::from_millis(TIMEOUT_MS_MAX as u64) => client.mode = Mode::AtMost(age),
            Ok(age) => {
                reply.error(format_args!("ERR READ AT MOST {age} is no bound: at most {TIMEOUT_MS_MAX}ms"));
                return Outcome::DONE;
            }
            Err(error) => {
                reply.error(format_args!("ERR READ AT MOST: {error}"));
                return Outcome::DONE;
            }
        },
        _ => {
            reply.error(
                "ERR READ takes nothing, ANY, AT MOST and a time such as 500ms, COMMITTED, STRONG, or TIMEOUT and ms",
            );
            return Outcome::DONE;
        }
    }
    reply.ok();
    Outcome::DONE
}
