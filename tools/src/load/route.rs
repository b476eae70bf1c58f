//! Where the leader is: the address that a run's connections go to, and the others to try when it is gone. Shared by all
//! threads of a run, so that what one connection learns all of them know. Knows no socket; the words of a node's refusals are
//! known to the client crate.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Mutex;

use crate::client::Client;

/// The addresses of a cluster's nodes.
#[derive(Debug)]
pub struct Route {
    nodes: Mutex<Nodes>,
}

#[derive(Debug)]
struct Nodes {
    current: SocketAddr,
    /// Every address that was ever heard of, the current one included.
    known: Vec<SocketAddr>,
}

fn resolve(address: &str) -> Option<SocketAddr> {
    address.to_socket_addrs().ok()?.next()
}

/// What a refusal says of the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The leader is there.
    Moved(SocketAddr),
    /// Nobody leads at the moment, or this node does not know who.
    Leaderless,
}

/// What an error says of the way to the leader; `None` when it says nothing of it.
pub fn refusal(error: &str) -> Option<Refused> {
    let refused = walferry_client::refusal(error)?;
    Some(refused.leader().map_or(Refused::Leaderless, Refused::Moved))
}

impl Route {
    /// A route that starts at `first`.
    pub fn new(first: SocketAddr) -> Route {
        Route { nodes: Mutex::new(Nodes { current: first, known: vec![first] }) }
    }

    /// Asks a node of a cluster for its leader and the others, so that the run goes on when this one is gone.
    pub fn learn(&self, client: &mut Client) {
        if let Ok(answer) = client.call(&["LEADER"])
            && let Some(leader) = answer.text().as_deref().and_then(resolve)
        {
            // Only known: reads may well be meant for the node that was named.
            self.add(leader);
        }
        for row in client.call(&["REPLICATION"]).ok().iter().flat_map(|rows| rows.items().to_vec()) {
            if let Some(address) = row.field("address").and_then(|address| resolve(&address.text()?)) {
                self.add(address);
            }
        }
    }

    /// Where to connect.
    pub fn current(&self) -> SocketAddr {
        self.nodes.lock().expect("nobody panics with it").current
    }

    /// True when there is somewhere else to go.
    pub fn has_others(&self) -> bool {
        self.nodes.lock().expect("nobody panics with it").known.len() > 1
    }

    /// A node that may lead.
    pub fn add(&self, address: SocketAddr) {
        let mut nodes = self.nodes.lock().expect("nobody panics with it");
        if !nodes.known.contains(&address) {
            nodes.known.push(address);
        }
    }

    /// The leader is there.
    pub fn moved(&self, leader: SocketAddr) {
        self.add(leader);
        self.nodes.lock().expect("nobody panics with it").current = leader;
    }

    /// `address` does not lead or does not answer: the next one is tried, unless somebody found a better one meanwhile.
    pub fn leave(&self, address: SocketAddr) {
        let mut nodes = self.nodes.lock().expect("nobody panics with it");
        if nodes.current == address {
            let index = nodes.known.iter().position(|known| *known == address).unwrap_or(0);
            nodes.current = nodes.known[(index + 1) % nodes.known.len()];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_tell_the_way() {
        let here = "127.0.0.1:7410".parse().expect("an address");
        assert_eq!(refusal("MOVED 0 127.0.0.1:7410"), Some(Refused::Moved(here)));
        assert_eq!(refusal("CLUSTERDOWN no leader: waiting for a"), Some(Refused::Leaderless));
        assert_eq!(refusal("ERR syntax error"), None);
    }

    #[test]
    fn only_the_first_to_fail_moves_the_route_on() {
        let [a, b] = ["127.0.0.1:1", "127.0.0.1:2"].map(|text| text.parse().expect("an address"));
        let route = Route::new(a);
        route.leave(a);
        assert_eq!(route.current(), a, "there is nowhere else");
        route.moved(b);
        route.leave(a);
        assert_eq!(route.current(), b);
        route.leave(b);
        assert_eq!((route.current(), route.has_others()), (a, true));
    }
}
