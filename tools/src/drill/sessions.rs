//! Sessions that write and read: each owns a register that only it writes, and reads every register from any member. Some carry
//! what they have seen from node to node, as a web tier does with a cookie; whether one of them ever saw a value older than one
//! that it had seen before is what a drill asks. Others carry nothing, and show how often that happens then. One more appends to
//! a stream with ids that the node makes of its wall clock, which must ascend whatever the clock does.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rand::RngExt;
use walferry_cluster::level::CommitLevel;

use super::load::{ANSWER_TIME_MAX, RETRY_PAUSE, connect, refused};
use crate::client::{Client, ClientError, Url};
use crate::load::route::{Refused, Route};

/// Sessions of each kind.
const SESSIONS: usize = 2;
/// Between two steps of a session.
const STEP_INTERVAL: Duration = Duration::from_millis(20);
/// One in so many steps writes.
const WRITE_ONE_IN: u32 = 4;
/// A read waits at most so long, in milliseconds, until its node has what the session has seen.
const READ_TIMEOUT_MS: &str = "300";

/// What sessions of one kind saw.
#[derive(Debug, Default)]
pub struct Counters {
    reads: AtomicU64,
    back: AtomicU64,
}

#[derive(Debug, Default)]
struct Shared {
    tokens: Counters,
    plain: Counters,
    disordered: AtomicU64,
    /// Sessions that had seen what a failover lost.
    anew: AtomicU64,
    /// The first read that went back, in words.
    first: Mutex<Option<String>>,
    stop: AtomicBool,
}

/// How much was seen until a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reads {
    /// Reads of sessions that carry what they saw.
    pub with_token: u64,
    /// Of these, how many went back.
    pub back_with_token: u64,
    /// Reads of the others.
    pub without_token: u64,
    /// Of these, how many went back.
    pub back_without_token: u64,
    /// Sessions that were told that a failover lost what they had seen.
    pub told_of_loss: u64,
    /// Stream ids that did not ascend.
    pub disordered: u64,
}

impl Reads {
    /// What was seen since `before`.
    pub fn since(self, before: Reads) -> Reads {
        Reads {
            with_token: self.with_token - before.with_token,
            back_with_token: self.back_with_token - before.back_with_token,
            without_token: self.without_token - before.without_token,
            back_without_token: self.back_without_token - before.back_without_token,
            told_of_loss: self.told_of_loss - before.told_of_loss,
            disordered: self.disordered - before.disordered,
        }
    }
}

/// The running sessions.
pub struct Sessions {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Sessions {
    /// Starts them. Keys begin with `run`.
    pub fn start(addresses: &[SocketAddr], route: &Arc<Route>, run: &str) -> Sessions {
        let shared = Arc::new(Shared::default());
        let mut threads = Vec::new();
        for number in 0..SESSIONS * 2 {
            let mut session = Session {
                shared: Arc::clone(&shared),
                route: Arc::clone(route),
                run: run.to_owned(),
                number,
                carries: number < SESSIONS,
                written: 0,
                seen: vec![0; SESSIONS * 2],
                token: None,
                nodes: addresses.iter().map(|address| Node { address: *address, client: None }).collect(),
                leader: None,
            };
            threads.push(std::thread::spawn(move || session.run()));
        }
        let (shared_too, route, run) = (Arc::clone(&shared), Arc::clone(route), run.to_owned());
        threads.push(std::thread::spawn(move || append(&shared_too, &route, &run)));
        Sessions { shared, threads }
    }

    /// What was seen until now.
    pub fn reads(&self) -> Reads {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Reads {
            with_token: load(&self.shared.tokens.reads),
            back_with_token: load(&self.shared.tokens.back),
            without_token: load(&self.shared.plain.reads),
            back_without_token: load(&self.shared.plain.back),
            told_of_loss: load(&self.shared.anew),
            disordered: load(&self.shared.disordered),
        }
    }

    /// The first read of a session with a token that went back, or the first stream id that did not ascend.
    pub fn first_wrong(&self) -> Option<String> {
        self.shared.first.lock().expect("nobody panics with it").clone()
    }
}

impl Drop for Sessions {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

struct Node {
    address: SocketAddr,
    client: Option<Client>,
}

/// What a step came to.
enum Step {
    /// It is done, or its node cannot do it at the moment.
    Done,
    /// A failover lost what this session has seen: it begins anew.
    Lost,
}

struct Session {
    shared: Arc<Shared>,
    route: Arc<Route>,
    run: String,
    number: usize,
    carries: bool,
    /// What it wrote last into its register, acknowledged or not.
    written: u64,
    /// The newest value of each register that it has seen, its own acknowledged writes included.
    seen: Vec<u64>,
    /// What it has written and read, as the nodes put it.
    token: Option<String>,
    nodes: Vec<Node>,
    leader: Option<(SocketAddr, Client)>,
}

impl Session {
    fn run(&mut self) {
        while !self.shared.stop.load(Ordering::Relaxed) {
            std::thread::sleep(STEP_INTERVAL);
            let step = if rand::rng().random_range(0..WRITE_ONE_IN) == 0 {
                self.write()
            } else {
                let (node, register) = (self.any(self.nodes.len()), self.any(self.seen.len()));
                self.read(node, register).unwrap_or_else(|_| {
                    self.nodes[node].client = None;
                    Step::Done
                })
            };
            if let Step::Lost = step {
                self.begin_anew();
            }
        }
    }

    fn any(&self, of: usize) -> usize {
        rand::rng().random_range(0..of)
    }

    /// Another user, as it were: nothing seen, and connections that know of nothing.
    fn begin_anew(&mut self) {
        self.shared.anew.fetch_add(1, Ordering::Relaxed);
        self.seen.fill(0);
        self.token = None;
        self.leader = None;
        self.nodes.iter_mut().for_each(|node| node.client = None);
    }

    fn write(&mut self) -> Step {
        if self.leader.is_none() {
            self.leader = connect(&self.route, CommitLevel::RemoteFlush);
        }
        let Some((address, client)) = &mut self.leader else { return Step::Done };
        self.written += 1;
        let (key, value) = (format!("{}:register:{}", self.run, self.number), self.written.to_string());
        let written = hand_over(client, self.token.as_deref().filter(|_| self.carries))
            .and_then(|()| client.call(&["SET", &key, &value]))
            .and_then(|_| client.call(&["SESSION"]));
        match written {
            Ok(token) => {
                self.seen[self.number] = self.written;
                self.token = token.text();
                Step::Done
            }
            Err(error) if is_lost(&error) => Step::Lost,
            Err(error) => {
                match refused(&error) {
                    Some(Refused::Moved(leader)) => self.route.moved(leader),
                    _ => self.route.leave(*address),
                }
                self.leader = None;
                Step::Done
            }
        }
    }

    fn read(&mut self, node: usize, register: usize) -> Result<Step, ClientError> {
        let Node { address, client } = &mut self.nodes[node];
        if client.is_none() {
            let url: Url = format!("redis://{address}").parse().expect("an address");
            let mut opened = Client::connect_within(&url, ANSWER_TIME_MAX)?;
            opened.call(&["READ", "TIMEOUT", READ_TIMEOUT_MS])?;
            if self.carries {
                // From its first read on the connection knows what it saw.
                opened.call(&["SESSION"])?;
            }
            *client = Some(opened);
        }
        let client = client.as_mut().expect("just opened");
        let key = format!("{}:register:{register}", self.run);
        let read = hand_over(client, self.token.as_deref().filter(|_| self.carries))
            .and_then(|()| client.call(&["GET", &key]));
        let value = match read {
            Err(error) if is_lost(&error) => return Ok(Step::Lost),
            // A node that does not get there in time is no place for this session to read.
            Err(ClientError::Refused { .. }) => return Ok(Step::Done),
            answer => answer?.int().and_then(|value| u64::try_from(value).ok()).unwrap_or(0),
        };
        let counters = if self.carries { &self.shared.tokens } else { &self.shared.plain };
        counters.reads.fetch_add(1, Ordering::Relaxed);
        if value < self.seen[register] {
            counters.back.fetch_add(1, Ordering::Relaxed);
            if self.carries {
                let token = self.token.as_deref().unwrap_or("no token");
                let text = format!("{key} was {} and then {value} on {address}, with {token}", self.seen[register]);
                self.shared.first.lock().expect("nobody panics with it").get_or_insert(text);
            }
        }
        self.seen[register] = value;
        if self.carries {
            self.token = client.call(&["SESSION"])?.text();
        }
        Ok(Step::Done)
    }
}

/// The connection goes on where the session is.
fn hand_over(client: &mut Client, token: Option<&str>) -> Result<(), ClientError> {
    match token {
        Some(token) => client.call(&["SESSION", token]).map(drop),
        None => Ok(()),
    }
}

fn is_lost(error: &ClientError) -> bool {
    matches!(error, ClientError::Refused { text, .. } if text.starts_with("LOST"))
}

/// Appends to a stream and looks whether the ids ascend.
fn append(shared: &Shared, route: &Route, run: &str) {
    let key = format!("{run}:stream");
    let (mut last, mut leader) = ((0, 0), None);
    while !shared.stop.load(Ordering::Relaxed) {
        std::thread::sleep(STEP_INTERVAL);
        if leader.is_none() {
            leader = connect(route, CommitLevel::RemoteFlush);
            if leader.is_none() {
                std::thread::sleep(RETRY_PAUSE);
            }
        }
        let Some((address, client)) = &mut leader else { continue };
        match client.call(&["XADD", &key, "*", "v", "1"]) {
            Ok(reply) => {
                let id = reply.text().unwrap_or_default();
                let parsed = id.split_once('-').and_then(|(ms, n)| Some((ms.parse().ok()?, n.parse().ok()?)));
                let next: (u64, u64) = parsed.unwrap_or((0, 0));
                if next <= last {
                    shared.disordered.fetch_add(1, Ordering::Relaxed);
                    let text = format!("{key}: after {}-{} came {id}", last.0, last.1);
                    shared.first.lock().expect("nobody panics with it").get_or_insert(text);
                }
                last = next.max(last);
            }
            Err(error) => {
                match refused(&error) {
                    Some(Refused::Moved(moved)) => route.moved(moved),
                    _ => route.leave(*address),
                }
                leader = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_fault_did_is_what_came_since() {
        let before = Reads { with_token: 3, without_token: 5, back_without_token: 1, ..Reads::default() };
        let now = Reads { with_token: 10, without_token: 9, back_without_token: 3, ..Reads::default() };
        let since = now.since(before);
        assert_eq!((since.with_token, since.without_token, since.back_without_token), (7, 4, 2));
        assert_eq!((since.back_with_token, since.disordered), (0, 0));
    }
}
