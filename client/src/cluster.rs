//! A cluster as its clients know it: a pool and what was learned of who leads and who follows. Shared by all sessions of a process.
//! Asks nodes `LEADER` and `REPLICATION`; what follows from the answers is decided in `topology`.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use crate::error::Error;
use crate::pool::{Connection, Pool, TcpPool};
use crate::reply::Reply;
use crate::topology::Topology;
use crate::url::Url;

/// A cluster of nodes; clones share what they know.
#[derive(Debug)]
pub struct Cluster<P: Pool = TcpPool> {
    shared: Arc<Shared<P>>,
}

#[derive(Debug)]
struct Shared<P> {
    pool: P,
    topology: Mutex<Topology>,
}

impl<P: Pool> Clone for Cluster<P> {
    fn clone(&self) -> Cluster<P> {
        Cluster { shared: Arc::clone(&self.shared) }
    }
}

impl Cluster {
    /// Finds a cluster by the URLs of some of its nodes. The credentials of the first one are used at every node.
    pub fn connect<S: AsRef<str>>(seeds: &[S]) -> Result<Cluster, Error> {
        let urls: Result<Vec<Url>, String> = seeds.iter().map(|seed| seed.as_ref().parse()).collect();
        let urls = urls.map_err(Error::NoCluster)?;
        let first = urls.first().ok_or_else(|| Error::NoCluster("no address was given".to_owned()))?;
        let addresses: Vec<String> = urls.iter().map(Url::address).collect();
        Cluster::with_pool(TcpPool::new(first), &addresses)
    }
}

/// What one node knows.
struct Told {
    leader: Option<String>,
    replicas: Vec<String>,
}

impl<P: Pool> Cluster<P> {
    /// As `connect`, over another pool; the seeds are addresses, `HOST:PORT`. At least one node has to answer, even if it knows of no
    /// leader.
    pub fn with_pool<S: AsRef<str>>(pool: P, seeds: &[S]) -> Result<Cluster<P>, Error> {
        let seeds = seeds.iter().map(|seed| seed.as_ref().to_owned()).collect();
        let shared = Shared { pool, topology: Mutex::new(Topology::new(seeds)) };
        let cluster = Cluster { shared: Arc::new(shared) };
        cluster.topology().begin_asking(Instant::now());
        match cluster.ask() {
            Ok(()) | Err(Asked { answered: true, .. }) => Ok(cluster),
            Err(asked) => Err(Error::NoCluster(asked.text)),
        }
    }

    /// Where clients write, as far as known.
    pub fn leader(&self) -> Option<String> {
        self.topology().leader().map(str::to_owned)
    }

    /// Every node that is known, the leader included.
    pub fn nodes(&self) -> Vec<String> {
        self.topology().addresses()
    }

    /// Asks the nodes who leads and who follows, unless somebody just did. An error tells what each of them said.
    pub fn refresh(&self) -> Result<(), Error> {
        if !self.topology().begin_asking(Instant::now()) {
            return Ok(());
        }
        self.ask().map_err(|asked| Error::Unavailable(asked.text))
    }

    /// Asks if it was long ago; what is known is good enough when nobody answers.
    pub(crate) fn refresh_if_old(&self) {
        let now = Instant::now();
        let ask = {
            let mut topology = self.topology();
            topology.is_old(now) && topology.begin_asking(now)
        };
        if ask {
            let _ = self.ask();
        }
    }

    pub(crate) fn topology(&self) -> MutexGuard<'_, Topology> {
        self.shared.topology.lock().expect("nobody panics with it")
    }

    /// Sends commands to one node. The outer error: there is no connection and nothing was sent; the inner one: it broke.
    pub(crate) fn send(
        &self,
        address: &str,
        commands: &[Vec<&[u8]>],
    ) -> Result<std::io::Result<Vec<Reply>>, std::io::Error> {
        let mut connection = self.shared.pool.get(address)?;
        let answers = connection.pipeline(commands);
        let complete = |answers: Vec<Reply>| {
            let right = answers.len() == commands.len();
            right.then_some(answers).ok_or_else(|| std::io::Error::other("not every command was answered"))
        };
        Ok(answers.and_then(complete))
    }

    fn ask(&self) -> Result<(), Asked> {
        let mut said = Asked { answered: false, text: String::new() };
        let addresses = self.topology().asking_order(Instant::now());
        for address in addresses {
            let Some(told) = self.ask_node(&address, &mut said) else { continue };
            said.answered = true;
            let Some(leader) = told.leader else {
                said.add(&address, "knows no leader");
                continue;
            };
            // Only the leader knows the replicas, and whether it leads.
            let replicas = if leader == address {
                Some(told.replicas)
            } else {
                let told = self.ask_node(&leader, &mut said);
                told.filter(|told| told.leader.as_ref() == Some(&leader)).map(|told| told.replicas)
            };
            match replicas {
                Some(replicas) => {
                    self.topology().handle_learned(&leader, &replicas, Instant::now());
                    return Ok(());
                }
                None => said.add(&address, &format!("calls {leader} the leader, which does not say so")),
            }
        }
        Err(said)
    }

    fn ask_node(&self, address: &str, said: &mut Asked) -> Option<Told> {
        let commands = [vec![b"LEADER".as_slice()], vec![b"REPLICATION".as_slice()]];
        let answers = self.send(address, &commands).and_then(|answers| answers);
        let answers = answers.map_err(|error| {
            self.topology().handle_failed(address, Instant::now());
            said.add(address, &error.to_string());
        });
        let answers = answers.ok()?;
        if let Reply::Error(text) = &answers[0] {
            said.add(address, text);
            return None;
        }
        let reachable = |told: String| reachable(&told, address);
        let rows = answers[1].items().iter().filter_map(|row| row.field("address")?.text());
        let replicas = rows.filter(|replica| !replica.is_empty()).map(reachable).collect();
        Some(Told { leader: answers[0].text().map(reachable), replicas })
    }
}

/// What nodes said instead of who leads.
struct Asked {
    /// One of them is there.
    answered: bool,
    text: String,
}

impl Asked {
    fn add(&mut self, address: &str, text: &str) {
        let separator = if self.text.is_empty() { "" } else { "; " };
        self.text = format!("{}{separator}{address}: {text}", self.text);
    }
}

/// A node that listens on every address tells none that could be connected to: it is where `asked` was asked.
fn reachable(told: &str, asked: &str) -> String {
    let (host, port) = told.rsplit_once(':').unwrap_or((told, ""));
    match (host, asked.rsplit_once(':')) {
        ("0.0.0.0" | "[::]", Some((asked_host, _))) => format!("{asked_host}:{port}"),
        _ => told.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_nobody_can_connect_to_is_replaced() {
        assert_eq!(reachable("10.0.0.1:6400", "node-1:6400"), "10.0.0.1:6400");
        assert_eq!(reachable("0.0.0.0:6410", "node-1:6400"), "node-1:6410");
        assert_eq!(reachable("[::]:6410", "[::1]:6400"), "[::1]:6410");
    }
}
