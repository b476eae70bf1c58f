//! Connections by address. `Pool` and `Connection` are what a session needs of any pool; `TcpPool` is the one that is used when
//! there is no other. Knows no command.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::reply::Reply;
use crate::tcp::{ANSWER_TIME_MAX_DEFAULT, CONNECT_TIME_MAX_DEFAULT, Client, encode_command};
use crate::url::Url;

/// Connections to one node, unless the pool is told otherwise.
const CONNECTIONS_MAX_DEFAULT: usize = 32;

/// A pool of RESP connections, by the address of the node.
///
/// Sessions share its connections and leave a node's `SESSION`, `READ` and `COMMITLEVEL` as they need them, so that a pool should
/// be for sessions alone.
pub trait Pool: Send + Sync {
    /// A connection that nobody else uses until it is dropped.
    type Connection: Connection;
    /// A connection to the node at `address`, `HOST:PORT`, authenticated if need be. An error means that nothing was sent; of kind
    /// `TimedOut`, that all connections are in use, and says nothing of the node.
    fn get(&self, address: &str) -> io::Result<Self::Connection>;
}

/// A connection to one node.
pub trait Connection {
    /// Sends these commands at once; their answers in order, an error answer as [`Reply::Error`]. An `Err` is a connection that
    /// broke or took too long; an answer that comes late must not be taken for that of a later command.
    fn pipeline(&mut self, commands: &[Vec<&[u8]>]) -> io::Result<Vec<Reply>>;
}

/// Blocking connections, so many at most to each node.
#[derive(Clone)]
pub struct TcpPool {
    shared: Arc<Shared>,
}

impl fmt::Debug for TcpPool {
    /// Without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpPool").field("connections_max", &self.shared.connections_max).finish_non_exhaustive()
    }
}

struct Shared {
    nodes: Mutex<HashMap<String, Node>>,
    /// A connection came back.
    returned: Condvar,
    credentials: Url,
    connections_max: usize,
    connect_time_max: Duration,
    answer_time_max: Duration,
}

#[derive(Default)]
struct Node {
    idle: Vec<Client>,
    /// Those that are in use and those that are idle.
    open: usize,
}

impl TcpPool {
    /// A pool whose connections use the credentials of `url`.
    pub fn new(url: &Url) -> TcpPool {
        TcpPool::with_bounds(url, CONNECTIONS_MAX_DEFAULT, CONNECT_TIME_MAX_DEFAULT, ANSWER_TIME_MAX_DEFAULT)
    }

    /// As `new`: so many connections to each node at most, so long to get one, and so long for an answer. A node may hold an answer
    /// back while it waits for replicas, or for what a session has seen; the last bound has to be longer.
    pub fn with_bounds(url: &Url, connections_max: usize, connect_time: Duration, answer_time: Duration) -> TcpPool {
        let shared = Shared {
            nodes: Mutex::default(),
            returned: Condvar::new(),
            credentials: url.clone(),
            connections_max: connections_max.max(1),
            connect_time_max: connect_time,
            answer_time_max: answer_time,
        };
        TcpPool { shared: Arc::new(shared) }
    }
}

impl Shared {
    fn nodes(&self) -> MutexGuard<'_, HashMap<String, Node>> {
        self.nodes.lock().expect("nobody panics with it")
    }

    /// An idle connection, or none and the right to open one.
    fn take(&self, address: &str) -> io::Result<Option<Client>> {
        let deadline = Instant::now() + self.connect_time_max;
        let mut nodes = self.nodes();
        loop {
            let node = nodes.entry(address.to_owned()).or_default();
            if let Some(client) = node.idle.pop() {
                return Ok(Some(client));
            }
            if node.open < self.connections_max {
                node.open += 1;
                return Ok(None);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let text = format!("all {} connections to {address} are in use", self.connections_max);
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            nodes = self.returned.wait_timeout(nodes, left).expect("nobody panics with it").0;
        }
    }

    /// A connection comes back, or is gone.
    fn put(&self, address: &str, client: Option<Client>) {
        let mut nodes = self.nodes();
        if let Some(node) = nodes.get_mut(address) {
            match client {
                Some(client) => node.idle.push(client),
                None => node.open -= 1,
            }
        }
        // Those who wait may wait for different nodes.
        self.returned.notify_all();
    }
}

impl Pool for TcpPool {
    type Connection = PooledClient;

    fn get(&self, address: &str) -> io::Result<PooledClient> {
        // A node that went away and came back has closed what lies idle here, which is noticed before anything is sent.
        while let Some(client) = self.shared.take(address)? {
            if client.is_idle() {
                return Ok(PooledClient {
                    shared: Arc::clone(&self.shared),
                    address: address.to_owned(),
                    client: Some(client),
                });
            }
            self.shared.put(address, None);
        }
        let mut connection =
            PooledClient { shared: Arc::clone(&self.shared), address: address.to_owned(), client: None };
        let url = self.shared.credentials.with_address(address).map_err(io::Error::other)?;
        let (connect, answer) = (self.shared.connect_time_max, self.shared.answer_time_max);
        connection.client = Some(Client::open(&url, connect, answer).map_err(io::Error::other)?);
        Ok(connection)
    }
}

/// A connection of a `TcpPool`; goes back when it is dropped, unless it broke.
pub struct PooledClient {
    shared: Arc<Shared>,
    address: String,
    /// None while it opens, and after it broke.
    client: Option<Client>,
}

impl Connection for PooledClient {
    fn pipeline(&mut self, commands: &[Vec<&[u8]>]) -> io::Result<Vec<Reply>> {
        let mut client = self.client.take().ok_or_else(|| io::Error::other("the connection broke before"))?;
        let mut request = Vec::new();
        commands.iter().for_each(|command| encode_command(&mut request, command));
        let name =
            |command: &Vec<&[u8]>| String::from_utf8_lossy(command.first().copied().unwrap_or_default()).into_owned();
        client.send(&request, &commands.last().map(name).unwrap_or_default()).map_err(io::Error::other)?;
        let answers: Result<Vec<Reply>, _> =
            commands.iter().map(|command| client.receive_any(&name(command))).collect();
        let answers = answers.map_err(io::Error::other)?;
        // Only now: a connection on which answers are still to come is of no use to anybody.
        self.client = Some(client);
        Ok(answers)
    }
}

impl Drop for PooledClient {
    fn drop(&mut self) {
        self.shared.put(&self.address, self.client.take());
    }
}
