//! The cluster that a drill is held with: members that the drill started itself, or hosts that run already. Asks, waits for and
//! compares them; knows no fault.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::Value;
use walferry_engine::lsn::Lsn;

use super::fault::Fault;
use super::member::{Member, Site};
use crate::client::{Client, Url};
use crate::failure::Failure;
use crate::inspect::against::{Compared, compare};

/// How long one question to a node may take.
const ASK_TIME_MAX: Duration = Duration::from_millis(500);
/// A member that keeps up has what is committed within this time.
const CATCH_UP_TIME_MAX: Duration = Duration::from_secs(60);
/// Between two looks.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Somebody leads within this time whenever a drill needs a leader.
const LEADER_TIME_MAX: Duration = Duration::from_secs(30);

/// The cluster.
pub struct Cluster {
    /// Every member.
    pub members: Vec<Member>,
    /// Who runs them.
    pub site: Site,
}

impl Cluster {
    /// A member's name by number.
    pub fn name(number: usize) -> String {
        char::from(b'a' + number as u8).to_string()
    }

    /// Where clients of a member connect.
    pub fn address(&self, name: &str) -> SocketAddr {
        self.members.iter().find(|member| member.name == name).expect("a member").address
    }

    /// Where all members' clients connect.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.members.iter().map(|member| member.address).collect()
    }

    /// Every member but this one.
    pub fn others(&self, name: &str) -> Vec<String> {
        self.members.iter().map(|member| member.name.clone()).filter(|other| other != name).collect()
    }

    /// A connection to a member.
    pub fn client(&self, name: &str) -> Result<Client, Failure> {
        let url: Url = format!("redis://{}", self.address(name)).parse().map_err(Failure::Failed)?;
        Client::connect(&url).map_err(Failure::failed)
    }

    fn ask(&self, name: &str) -> Option<Value> {
        let url: Url = format!("redis://{}", self.address(name)).parse().ok()?;
        let mut client = Client::connect_within(&url, ASK_TIME_MAX).ok()?;
        serde_json::from_str(&client.call(&["DESCRIBE"]).ok()?.text()?).ok()
    }

    fn told(&self) -> Vec<Value> {
        self.members.iter().filter_map(|member| self.ask(&member.name)).collect()
    }

    /// The member that leads in the newest epoch. Waits for it.
    pub fn leader(&self) -> Result<String, Failure> {
        let deadline = Instant::now() + LEADER_TIME_MAX;
        loop {
            let told = self.told();
            let leading = told.iter().filter(|told| told["role"] == "leader");
            let newest = leading.max_by_key(|told| told["epoch"].as_u64());
            if let Some(name) = newest.and_then(|told| told["name"].as_str()) {
                return Ok(name.to_owned());
            }
            if Instant::now() > deadline {
                return Err(Failure::failed(format_args!(
                    "nobody leads after {LEADER_TIME_MAX:?}: {}",
                    what_they_say(&told)
                )));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// A connection to the leader.
    pub fn leader_client(&self) -> Result<Client, Failure> {
        self.client(&self.leader()?)
    }

    /// Waits until somebody leads and every other member keeps up.
    pub fn wait_until_complete(&self, time_max: Duration) -> Result<(), String> {
        let deadline = Instant::now() + time_max;
        loop {
            let told = self.told();
            // One that leads no more may not know it yet: then there are two, or not everybody is in the same epoch.
            let leaders = told.iter().filter(|told| told["role"] == "leader").count();
            let replicas = told.iter().filter(|told| told["role"] == "replica").count();
            let one_epoch = told.iter().all(|other| other["epoch"] == told[0]["epoch"]);
            let all = self.members.len() - 1;
            let in_sync = told.iter().any(|told| {
                told["role"] == "leader" && told["in_sync"].as_array().is_some_and(|members| members.len() == all)
            });
            if leaders == 1 && replicas == all && one_epoch && in_sync {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("the members do not keep up after {time_max:?}: {}", what_they_say(&told)));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// A drill that failed, with what the members say and the end of every node's log.
    pub fn explain(&self, fault: Fault, text: impl std::fmt::Display) -> Failure {
        let logs = match &self.site {
            Site::Own(own) => own.log_ends(),
            Site::Hosts(_) => "the members' logs tell more".to_owned(),
        };
        Failure::failed(format_args!("{fault}: {text}\n{}\n{logs}", what_they_say(&self.told())))
    }

    /// Compares the logs of all members with the leader's, up to what is committed. `None` where they cannot be read.
    pub fn compare_logs(&self) -> Result<Option<Compared>, Failure> {
        let Site::Own(own) = &self.site else { return Ok(None) };
        let leader = self.leader()?;
        let told = self.ask(&leader).ok_or_else(|| Failure::failed(format_args!("{leader} does not answer")))?;
        let committed: Lsn = told["committed"].as_str().and_then(|lsn| lsn.parse().ok()).unwrap_or(Lsn::ZERO);
        let mut compared = Compared { from: Lsn::ZERO, to: committed };
        for name in self.others(&leader) {
            self.wait_for_flushed(&name, committed)?;
            compared = compare(&own.dir.join(&leader), &own.dir.join(&name), Some(committed))?;
        }
        Ok(Some(compared))
    }

    fn wait_for_flushed(&self, name: &str, lsn: Lsn) -> Result<(), Failure> {
        let deadline = Instant::now() + CATCH_UP_TIME_MAX;
        loop {
            let told = self.ask(name).unwrap_or_default();
            let flushed = told["flushed"].as_str().and_then(|flushed| flushed.parse::<Lsn>().ok());
            if flushed.is_some_and(|flushed| flushed >= lsn) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Failure::failed(format_args!("{name} has not reached {lsn}: {told}")));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}

fn what_they_say(told: &[Value]) -> String {
    let say = |told: &Value| {
        let in_sync: Vec<&str> = told["in_sync"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        format!(
            "{} is {} in epoch {} at {}, in sync {}: {}",
            told["name"].as_str().unwrap_or("?"),
            told["role"].as_str().unwrap_or("?"),
            told["epoch"],
            told["flushed"].as_str().unwrap_or("?"),
            in_sync.join(" "),
            told["blocked_reason"].as_str().unwrap_or_default()
        )
    };
    told.iter().map(say).collect::<Vec<_>>().join("; ")
}
