//! The same kill on etcd: three members with their defaults, a put every few milliseconds through its HTTP gateway, SIGKILL to
//! the leader, and the time until puts succeed again. For comparison; needs `etcd` in PATH.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::outage::longest_gap;
use crate::failure::Failure;

const MEMBERS: usize = 3;
/// Between two puts.
const PUT_INTERVAL: Duration = Duration::from_millis(5);
/// A member that does not answer for so long is left for another.
const ANSWER_TIME_MAX: Duration = Duration::from_millis(400);
/// Before and after a kill the cluster runs undisturbed for so long.
const CALM: Duration = Duration::from_millis(1500);
/// It must have a leader within this time.
const LEADER_TIME_MAX: Duration = Duration::from_secs(60);

struct Member {
    client: SocketAddr,
    peer: SocketAddr,
    child: Option<Child>,
}

/// A running etcd cluster.
pub struct Cluster {
    dir: PathBuf,
    members: Vec<Member>,
    puts: u64,
}

impl Cluster {
    /// Starts three members and waits for a leader.
    pub fn start(dir: &Path) -> Result<Cluster, Failure> {
        let free = || {
            let listener = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
            listener.map_err(|error| Failure::failed(format_args!("no free port for etcd: {error}")))
        };
        let mut members = Vec::new();
        for _ in 0..MEMBERS {
            members.push(Member { client: free()?, peer: free()?, child: None });
        }
        let mut cluster = Cluster { dir: dir.join("etcd"), members, puts: 0 };
        for index in 0..MEMBERS {
            cluster.bring(index, "new")?;
        }
        cluster.leader()?;
        Ok(cluster)
    }

    fn bring(&mut self, index: usize, state: &str) -> Result<(), Failure> {
        let peers = self.members.iter().enumerate().map(|(index, member)| format!("m{index}=http://{}", member.peer));
        let peers = peers.collect::<Vec<_>>().join(",");
        let (client, peer) = (&self.members[index].client, &self.members[index].peer);
        let (client, peer) = (format!("http://{client}"), format!("http://{peer}"));
        let mut command = Command::new("etcd");
        command.args(["--name", &format!("m{index}"), "--initial-cluster", &peers, "--initial-cluster-state", state]);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer, "--logger", "zap"]);
        command.arg("--data-dir").arg(self.dir.join(format!("m{index}")));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn();
        let child =
            child.map_err(|error| Failure::failed(format_args!("--beside-etcd: cannot start etcd: {error}")))?;
        self.members[index].child = Some(child);
        Ok(())
    }

    fn leader(&self) -> Result<usize, Failure> {
        let deadline = Instant::now() + LEADER_TIME_MAX;
        while Instant::now() < deadline {
            for (index, member) in self.members.iter().enumerate().filter(|(_, member)| member.child.is_some()) {
                let Some(status) = post(member.client, "/v3/maintenance/status", &json!({})) else { continue };
                let leads = status["leader"].is_string() && status["leader"] == status["header"]["member_id"];
                if leads {
                    return Ok(index);
                }
            }
            std::thread::sleep(PUT_INTERVAL);
        }
        Err(Failure::failed("etcd has no leader"))
    }

    /// Kills the leader under a load of puts; the longest time without one that succeeded.
    pub fn kill_leader(&mut self) -> Result<Duration, Failure> {
        let leader = self.leader()?;
        let (mut successes, mut at) = (Vec::new(), leader);
        let start = Instant::now();
        let mut killed = None;
        loop {
            self.puts += 1;
            let key = STANDARD.encode(format!("k{}", self.puts));
            if post(self.members[at].client, "/v3/kv/put", &json!({ "key": key, "value": key })).is_some() {
                successes.push(Instant::now());
            } else {
                at = (at + 1) % MEMBERS;
            }
            let now = Instant::now();
            if killed.is_none() && now > start + CALM {
                killed = Some(now);
                if let Some(mut child) = self.members[leader].child.take() {
                    let _ = child.kill();
                    let _ = child.wait();
                }
            }
            let back = killed.is_some_and(|killed| successes.last().is_some_and(|last| *last > killed + CALM));
            if back || killed.is_some_and(|killed| now > killed + LEADER_TIME_MAX) {
                break;
            }
            std::thread::sleep(PUT_INTERVAL);
        }
        let outage = longest_gap(&successes, killed.unwrap_or(start), Instant::now());
        self.bring(leader, "existing")?;
        std::thread::sleep(CALM);
        Ok(outage)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in self.members.iter_mut().filter_map(|member| member.child.as_mut()) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// One request; `None` unless it succeeded in time.
fn post(address: SocketAddr, path: &str, body: &Value) -> Option<Value> {
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_TIME_MAX).ok()?;
    stream.set_read_timeout(Some(ANSWER_TIME_MAX)).ok()?;
    stream.set_nodelay(true).ok()?;
    let body = body.to_string();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.starts_with("HTTP/1.1 200").then(|| serde_json::from_str(body).ok())?
}
