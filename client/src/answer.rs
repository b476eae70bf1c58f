//! What a node's error says of the way on: where the leader is, that another node may do better, or that it is the answer.
//! Knows the words of a node's errors, no socket. Used by `session` and by the tools' load.

use std::net::{SocketAddr, ToSocketAddrs};

/// What a refused write says of the way to the leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The leader is there, `HOST:PORT`.
    Moved(String),
    /// Nobody leads at the moment, or this node does not know who.
    Leaderless,
}

impl Refused {
    /// The leader's address, if it is told and stands for one.
    pub fn leader(&self) -> Option<SocketAddr> {
        match self {
            Refused::Moved(address) => address.to_socket_addrs().ok()?.next(),
            Refused::Leaderless => None,
        }
    }
}

/// What an error says of the way to the leader; `None` when it says nothing of it. An error that does was given instead of
/// executing the command.
pub fn refusal(error: &str) -> Option<Refused> {
    let last = || error.rsplit(' ').next().map(|last| last.trim_end_matches('.')).filter(|last| is_address(last));
    match code(error) {
        "MOVED" | "READONLY" => Some(last().map_or(Refused::Leaderless, |address| Refused::Moved(address.to_owned()))),
        "CLUSTERDOWN" | "STOPPED" => Some(Refused::Leaderless),
        _ => None,
    }
}

/// The first word of an error.
pub fn code(error: &str) -> &str {
    error.split(' ').next().unwrap_or_default()
}

/// True when a read that was answered with this may be answered better by another node, or later.
pub fn read_elsewhere(error: &str) -> bool {
    matches!(code(error), "BEHIND" | "STALE" | "UNCOMMITTED" | "UNCERTAIN" | "BUSY") || refusal(error).is_some()
}

fn is_address(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_tell_the_way() {
        let to = |text: &str| Some(Refused::Moved(text.to_owned()));
        let table = [
            ("MOVED 0 127.0.0.1:7410", to("127.0.0.1:7410")),
            ("MOVED 0 [::1]:7410", to("[::1]:7410")),
            ("READONLY You can't write against a read only replica. The leader is node-1:7410.", to("node-1:7410")),
            (
                "READONLY You can't write against a read only replica. The leader is not known.",
                Some(Refused::Leaderless),
            ),
            ("CLUSTERDOWN no leader: waiting for a", Some(Refused::Leaderless)),
            ("STOPPED the log is stopped", Some(Refused::Leaderless)),
            ("UNCERTAIN committed locally at 0/1000", None),
            ("ERR syntax error", None),
            ("", None),
        ];
        for (error, refused) in table {
            assert_eq!(refusal(error), refused, "{error}");
        }
        assert_eq!(to("127.0.0.1:7410").unwrap().leader(), "127.0.0.1:7410".parse().ok());
    }

    #[test]
    fn only_what_another_node_may_know_better_is_asked_elsewhere() {
        for error in
            ["BEHIND this node has applied 0/1", "STALE this node's state", "MOVED 0 a:1", "CLUSTERDOWN no leader"]
        {
            assert!(read_elsewhere(error), "{error}");
        }
        for error in ["WRONGTYPE Operation", "ERR unknown command", "LOST what this session has seen", "NOREPLICAS x"] {
            assert!(!read_elsewhere(error), "{error}");
        }
    }
}
