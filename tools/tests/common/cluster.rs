//! Clusters of real processes on a loopback address of their own: nodes and witnesses, to be killed, stopped and asked; and a
//! load that follows their leader.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Client, Node, Reply, directory, log_bytes, lsn_bytes, peer_secret, until};

const WRITERS: usize = 4;

/// A loopback address that no other test of this machine uses at the moment: ports can then be the same everywhere.
fn own_host() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let process = std::process::id();
    format!("127.{}.{}.{}", 1 + process % 250, process / 250 % 250, 1 + NEXT.fetch_add(1, Ordering::Relaxed) % 250)
}

pub struct Cluster {
    pub root: tempfile::TempDir,
    pub host: String,
    pub names: Vec<&'static str>,
    pub members: String,
    pub flags: Vec<String>,
    pub witness_flags: Vec<String>,
    pub nodes: BTreeMap<&'static str, Node>,
    pub witnesses: BTreeMap<&'static str, Child>,
    /// Members whose peer address is another one than at first.
    moved: BTreeSet<&'static str>,
}

pub fn is_witness(name: &str) -> bool {
    name.starts_with('w')
}

impl Cluster {
    /// Starts these members (those whose name begins with `w` are witnesses) and waits until one leads.
    pub fn start(names: &[&'static str], flags: &[&str]) -> Cluster {
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        Cluster::start_with(names, |_, _| (flags, Vec::new()))
    }

    /// As `start`, with flags for nodes and for witnesses that depend on the directory and on the host that all of them share.
    pub fn start_with(
        names: &[&'static str],
        flags: impl FnOnce(&Path, &str) -> (Vec<String>, Vec<String>),
    ) -> Cluster {
        let (root, host) = (directory(), own_host());
        let (flags, witness_flags) = flags(root.path(), &host);
        let member = |(index, name): (usize, &&str)| format!("{name}={host}:{}", 7001 + index);
        let members = names.iter().enumerate().map(member).collect::<Vec<_>>().join(",");
        let mut cluster = Cluster {
            root,
            names: names.to_vec(),
            members,
            host,
            flags,
            witness_flags,
            nodes: BTreeMap::new(),
            witnesses: BTreeMap::new(),
            moved: BTreeSet::new(),
        };
        names.iter().for_each(|name| cluster.bring(name));
        cluster.leader();
        cluster
    }

    /// Starts a node that knows the members and is none of them yet.
    pub fn add(&mut self, name: &'static str) {
        self.names.push(name);
        self.members = format!("{},{name}={}", self.members, self.peer_address(name));
        self.bring(name);
    }

    /// A node that is gone for good.
    pub fn forget(&mut self, name: &str) {
        self.nodes.remove(name);
        self.witnesses.remove(name);
    }

    pub fn peer_address(&self, name: &str) -> String {
        let index = self.names.iter().position(|known| *known == name).expect("a member");
        let first = if self.moved.contains(name) { 7501 } else { 7001 };
        format!("{}:{}", self.host, first + index)
    }

    /// From its next start on its peers reach it at another port, which only later starts are told.
    pub fn move_peer(&mut self, name: &'static str) {
        let old = self.peer_address(name);
        self.moved.insert(name);
        self.members = self.members.replace(&old, &self.peer_address(name));
    }

    pub fn client_address(&self, name: &str) -> SocketAddr {
        let index = self.names.iter().position(|known| *known == name).expect("a member");
        format!("{}:{}", self.host, 6001 + index).parse().expect("an address")
    }

    /// Starts a member that holds data; one that ends instead gives its log.
    pub fn try_bring(&mut self, name: &'static str) -> Result<(), String> {
        let node = self.try_start(name)?;
        self.nodes.insert(name, node);
        Ok(())
    }

    fn try_start(&self, name: &'static str) -> Result<Node, String> {
        let listen = self.client_address(name).to_string();
        let peer = self.peer_address(name);
        let mut flags = vec!["--members", &self.members, "--listen", &listen, "--peer-listen", &peer];
        flags.extend(self.flags.iter().map(String::as_str));
        Node::try_start(self.root.path(), name, &flags)
    }

    /// Starts members at the same time, for those that wait for each other.
    pub fn bring_together(&mut self, names: &[&'static str]) {
        let this = &*self;
        let started = std::thread::scope(|scope| {
            let starting: Vec<_> = names.iter().map(|name| scope.spawn(move || this.try_start(name))).collect();
            starting.into_iter().map(|thread| thread.join().expect("it does not panic")).collect::<Vec<_>>()
        });
        for (name, node) in names.iter().zip(started) {
            self.nodes.insert(name, node.unwrap_or_else(|log| panic!("{name} did not start:\n{log}")));
        }
    }

    /// Starts a member, for the first time or again.
    pub fn bring(&mut self, name: &'static str) {
        if is_witness(name) {
            let data = self.root.path().join(name);
            let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
            command.args(["witness", "--name", name, "--members", &self.members, "--data"]).arg(data);
            let flags: Vec<&str> = self.witness_flags.iter().map(String::as_str).collect();
            command.args(peer_secret(self.root.path(), &flags));
            command.args(&self.witness_flags);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            self.witnesses.insert(name, command.spawn().expect("the binary starts"));
            return;
        }
        self.try_bring(name).unwrap_or_else(|log| panic!("{name} did not start:\n{log}"));
    }

    pub fn kill(&mut self, name: &str) {
        if let Some(mut witness) = self.witnesses.remove(name) {
            witness.kill().and_then(|()| witness.wait()).expect("a child can be killed");
        } else {
            self.nodes.remove(name).expect("it runs").kill_and_free();
        }
    }

    pub fn signal(&self, name: &str, signal: libc::c_int) {
        let pid = self.nodes[name].pid() as libc::pid_t;
        // SAFETY: signals a process that is our child and not yet waited for.
        unsafe { libc::kill(pid, signal) };
    }

    pub fn client(&self, name: &str) -> Client {
        self.nodes[name].client()
    }

    /// What a member tells of the cluster.
    pub fn describe(&self, name: &str) -> serde_json::Value {
        serde_json::from_str(self.client(name).command(&["DESCRIBE"]).text()).expect("JSON")
    }

    /// The member that leads and takes writes. Waits for it.
    pub fn leader(&self) -> &'static str {
        let mut found = None;
        until("somebody leads", || {
            found = self.names.iter().copied().find(|name| {
                let Some(node) = self.nodes.get(name) else { return false };
                let Ok(mut client) = Client::connect(node.listen) else { return false };
                let _ = client.try_command(&["COMMITTIMEOUT", "500"]);
                matches!(client.try_command(&["SET", "leads", name]), Ok(Reply::Simple(_)))
            });
            found.is_some()
        });
        found.expect("just found")
    }

    /// Some data member that does not lead.
    pub fn replica(&self) -> &'static str {
        let leader = self.leader();
        self.nodes.keys().copied().find(|name| *name != leader).expect("another member")
    }

    /// Waits until every running node has the leader's whole log, then compares their bytes.
    pub fn logs_are_identical(&self) {
        let leader = self.leader();
        let mut end = String::new();
        until("every log has the same end", || {
            let flushed = |name: &str| self.describe(name)["flushed"].as_str().expect("an LSN").to_owned();
            end = flushed(leader);
            self.nodes.keys().all(|name| flushed(name) == end)
        });
        let bytes = |name: &str| log_bytes(&self.nodes[name].data, 0, lsn_bytes(&end));
        for name in self.nodes.keys().filter(|name| **name != leader) {
            assert!(bytes(name) == bytes(leader), "{name} and {leader} differ before {end}");
        }
    }

    pub fn run(&self, words: &[&str]) -> Result<String, String> {
        let output = Command::new(env!("CARGO_BIN_EXE_walferry")).args(words).output().expect("the binary starts");
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    }

    pub fn url(&self, name: &str) -> String {
        format!("redis://{}", self.client_address(name))
    }

    pub fn log_of(&self, name: &str) -> String {
        std::fs::read_to_string(self.root.path().join(format!("{name}.log"))).unwrap_or_default()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for witness in self.witnesses.values_mut() {
            let _ = witness.kill();
            let _ = witness.wait();
        }
        if std::thread::panicking() {
            for name in self.names.clone() {
                eprintln!("--- {name}\n{}", self.log_of(name));
            }
        }
    }
}

/// Writers of unique keys that follow the leader, until they are dropped.
pub struct Load {
    pub stop: Arc<AtomicBool>,
    pub acknowledged: Arc<Mutex<Vec<String>>>,
    /// The longest time without any acknowledgement.
    pub pause_max: Arc<Mutex<Duration>>,
    pub writers: Vec<std::thread::JoinHandle<()>>,
}

impl Load {
    pub fn start(cluster: &Cluster, level: &'static str) -> Load {
        Load::start_at(cluster, &cluster.nodes.keys().copied().collect::<Vec<_>>(), level)
    }

    /// As `start`, with clients that know these nodes only.
    pub fn start_at(cluster: &Cluster, nodes: &[&str], level: &'static str) -> Load {
        let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let last = Arc::new(Mutex::new(Instant::now()));
        let pause_max = Arc::new(Mutex::new(Duration::ZERO));
        let addresses: Vec<SocketAddr> = nodes.iter().map(|name| cluster.client_address(name)).collect();
        let write = |writer: usize| {
            let (stop, acknowledged) = (Arc::clone(&stop), Arc::clone(&acknowledged));
            let (last, pause_max, addresses) = (Arc::clone(&last), Arc::clone(&pause_max), addresses.clone());
            std::thread::spawn(move || {
                let (mut at, mut number) = (writer % addresses.len(), 0_u64);
                while !stop.load(Ordering::Relaxed) {
                    at = (at + 1) % addresses.len();
                    let Ok(mut client) = Client::connect(addresses[at]) else { continue };
                    // A node that is stopped answers nothing; the next connection goes to another.
                    client.give_up_after(Duration::from_millis(500));
                    // A reply that comes too late would be taken for the next command's: this connection is given up.
                    let Ok(Reply::Simple(_)) = client.try_command(&["COMMITLEVEL", level]) else { continue };
                    loop {
                        number += 1;
                        let key = format!("{writer}:{number}");
                        let Ok(Reply::Simple(_)) = client.try_command(&["SET", &key, &key]) else { break };
                        let mut last = last.lock().unwrap();
                        let mut pause_max = pause_max.lock().unwrap();
                        *pause_max = pause_max.max(last.elapsed());
                        *last = Instant::now();
                        acknowledged.lock().unwrap().push(key);
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                    }
                }
            })
        };
        let writers = (0..WRITERS).map(write).collect();
        Load { stop, acknowledged, pause_max, writers }
    }

    pub fn count(&self) -> usize {
        self.acknowledged.lock().unwrap().len()
    }

    /// Waits for so many acknowledgements from now on.
    pub fn wait_for(&self, more: usize) {
        let from = self.count();
        until("the load goes on", || self.count() >= from + more);
    }

    /// Ends the load; what was acknowledged, and the longest pause.
    pub fn finish(self) -> (Vec<String>, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            writer.join().expect("a writer does not panic");
        }
        let pause = *self.pause_max.lock().unwrap();
        (std::mem::take(&mut self.acknowledged.lock().unwrap()), pause)
    }
}

pub fn missing(client: &mut Client, keys: &[String]) -> Vec<String> {
    let mut lost = Vec::new();
    for chunk in keys.chunks(500) {
        let words: Vec<&str> = ["MGET"].into_iter().chain(chunk.iter().map(String::as_str)).collect();
        let Reply::Array(values) = client.command(&words) else { panic!("MGET answers with an array") };
        lost.extend(chunk.iter().zip(values).filter(|(_, value)| *value == Reply::Nil).map(|(key, _)| key.clone()));
    }
    lost
}
