//! What every member says of the cluster while a drill runs, asked again and again: who leads since when, which changes the
//! in-sync set sees, and up to which moment the replicas held what a leader had acknowledged. From the last follows how much of
//! what was acknowledged without them a failover may lose. `Seen` is a core; the threads around it only ask.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use walferry_engine::lsn::Lsn;

use super::member::{Member, Split};
use crate::client::{Client, Url};

/// Between two questions to a member.
const ASK_INTERVAL: Duration = Duration::from_millis(15);
/// How long one question may take.
const ASK_TIME_MAX: Duration = Duration::from_millis(500);
/// Ends of a leader's log that wait for the replicas, at most; with more the older ones are forgotten, and the bound is wider.
const ENDS_MAX: usize = 4096;

/// One leadership.
#[derive(Clone, Debug)]
struct Leadership {
    leader: SocketAddr,
    first_seen: Instant,
    /// What it acknowledged before this moment, enough replicas hold.
    held: Option<Instant>,
    /// Where its log ended at which moment.
    ends: VecDeque<(Instant, Lsn)>,
}

/// Everything that was seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// By epoch.
    leaderships: BTreeMap<u64, Leadership>,
    /// When a member began to say that it has no leader, by member.
    leaderless: Vec<(Instant, SocketAddr)>,
    leaderless_now: BTreeSet<SocketAddr>,
    in_sync: Option<(u64, BTreeSet<String>)>,
    in_sync_changes: Vec<(Instant, usize)>,
}

impl Seen {
    /// A member that was asked at `asked` answered `told`; a leader is replaced by members among which at least the
    /// `holders`-th of its replicas, by what they hold, is.
    pub fn take(&mut self, address: SocketAddr, asked: Instant, told: &Value, holders: usize) {
        if told["role"] == "leaderless" {
            if self.leaderless_now.insert(address) {
                self.leaderless.push((asked, address));
            }
        } else {
            self.leaderless_now.remove(&address);
        }
        if told["role"] == "leader" {
            self.take_leader(address, asked, told, holders);
        }
        self.take_in_sync(asked, told);
    }

    fn take_leader(&mut self, leader: SocketAddr, asked: Instant, told: &Value, holders: usize) {
        let (Some(epoch), Some(end)) = (told["epoch"].as_u64(), lsn(&told["end"])) else { return };
        let new = || Leadership { leader, first_seen: asked, held: None, ends: VecDeque::new() };
        let leadership = self.leaderships.entry(epoch).or_insert_with(new);
        if leadership.ends.len() == ENDS_MAX {
            leadership.ends.pop_front();
        }
        leadership.ends.push_back((asked, end));
        let replicas = told["members"].as_array().into_iter().flatten();
        let mut flushed: Vec<Lsn> = replicas.filter_map(|member| lsn(&member["flushed"])).collect();
        flushed.sort_unstable_by(|a, b| b.cmp(a));
        let Some(reached) = holders.checked_sub(1).and_then(|index| flushed.get(index)) else { return };
        while let Some((at, _)) = leadership.ends.front().filter(|(_, end)| end <= reached) {
            leadership.held = Some(*at);
            leadership.ends.pop_front();
        }
    }

    fn take_in_sync(&mut self, asked: Instant, told: &Value) {
        let (Some(version), Some(names)) = (told["version"].as_u64(), told["in_sync"].as_array()) else { return };
        let names: BTreeSet<String> = names.iter().filter_map(|name| Some(name.as_str()?.to_owned())).collect();
        match &self.in_sync {
            Some((known, _)) if *known >= version => return,
            Some((_, before)) => {
                let changes = before.symmetric_difference(&names).count();
                if changes > 0 {
                    self.in_sync_changes.push((asked, changes));
                }
            }
            None => {}
        }
        self.in_sync = Some((version, names));
    }

    /// Members that left the in-sync set or joined it.
    pub fn in_sync_changes(&self, since: Instant) -> usize {
        self.in_sync_changes.iter().filter(|(at, _)| *at >= since).map(|(_, changes)| changes).sum()
    }

    /// Where the time went until another member led, at the resolution of the questions.
    pub fn split(&self, since: Instant, old: SocketAddr) -> Option<Split> {
        let later = self.leaderships.values().filter(|leadership| leadership.leader != old);
        let led = later.map(|leadership| leadership.first_seen).filter(|at| *at > since).min()?;
        let fenced = self.leaderless.iter().filter(|(at, who)| *at > since && *at <= led && *who != old);
        let fenced = fenced.map(|(at, _)| *at).min().unwrap_or(led);
        Some(Split { detection: fenced - since, election: led - fenced })
    }

    /// True when enough replicas held what `leader` acknowledged at `at`.
    pub fn held(&self, leader: SocketAddr, at: Instant) -> bool {
        let mut lowest = None;
        for leadership in self.leaderships.values() {
            let covers = lowest.is_none_or(|lowest| at >= lowest);
            if leadership.leader == leader && covers && leadership.held.is_some_and(|held| at < held) {
                return true;
            }
            if leadership.leader != leader {
                // What the member acknowledged before another led is another matter than what it does when it leads again.
                lowest = Some(leadership.first_seen);
            }
        }
        false
    }
}

fn lsn(value: &Value) -> Option<Lsn> {
    value.as_str()?.parse().ok()
}

/// The running questions.
pub struct Watch {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Watch {
    /// Starts to ask.
    pub fn start(members: &[Member]) -> Watch {
        let (seen, stop) = (Arc::new(Mutex::new(Seen::default())), Arc::new(AtomicBool::new(false)));
        // A new leader is chosen among a majority, the old one apart.
        let holders = members.len() - (members.len() / 2 + 1);
        let ask = |member: &Member| {
            let (seen, stop, address) = (Arc::clone(&seen), Arc::clone(&stop), member.address);
            std::thread::spawn(move || ask(address, holders, &seen, &stop))
        };
        Watch { threads: members.iter().map(ask).collect(), seen: Arc::clone(&seen), stop }
    }

    /// What was seen.
    pub fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("nobody panics with it")
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

fn ask(address: SocketAddr, holders: usize, seen: &Mutex<Seen>, stop: &AtomicBool) {
    let Ok(url) = format!("redis://{address}").parse::<Url>() else { return };
    let mut connection: Option<Client> = None;
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(ASK_INTERVAL);
        if connection.is_none() {
            connection = Client::connect_within(&url, ASK_TIME_MAX).ok();
        }
        let Some(client) = &mut connection else { continue };
        let asked = Instant::now();
        let told = client.call(&["DESCRIBE"]).ok().and_then(|reply| serde_json::from_str(&reply.text()?).ok());
        match told {
            Some(told) => seen.lock().expect("nobody panics with it").take(address, asked, &told, holders),
            None => connection = None,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn leader(epoch: u64, end: &str, flushed: [&str; 2]) -> Value {
        let members = flushed.map(|flushed| json!({ "flushed": flushed }));
        json!({ "role": "leader", "epoch": epoch, "end": end, "members": members, "version": epoch, "in_sync": ["b"] })
    }

    #[test]
    fn what_a_replica_holds_survives_and_what_it_lacks_may_be_lost() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let [a, b] = ["10.0.0.1:1", "10.0.0.2:1"].map(|text| text.parse::<SocketAddr>().expect("an address"));
        let mut seen = Seen::default();
        seen.take(a, at(10), &leader(1, "0/100", ["0/0", "0/0"]), 1);
        assert!(!seen.held(a, at(5)), "nobody holds anything");
        seen.take(a, at(20), &leader(1, "0/200", ["0/100", "0/0"]), 1);
        assert!(seen.held(a, at(5)), "one replica holds what there was at 10 ms");
        assert!(!seen.held(a, at(15)) && !seen.held(b, at(5)));
        seen.take(b, at(50), &json!({ "role": "leaderless" }), 1);
        seen.take(b, at(60), &leader(2, "0/200", ["0/200", "0/0"]), 1);
        assert!(!seen.held(a, at(15)), "the second leadership proves nothing about what the first did");
        assert!(seen.held(b, at(59)));
        seen.take(a, at(90), &leader(3, "0/300", ["0/300", "0/0"]), 1);
        assert!(!seen.held(a, at(15)) && seen.held(a, at(70)), "its second leadership is another one");
        let split = seen.split(at(30), a).expect("b leads");
        assert_eq!((split.detection.as_millis(), split.election.as_millis()), (20, 10));
        assert!(seen.split(at(70), b).is_some());
    }

    #[test]
    fn majority_of_five_needs_two_of_four_replicas() {
        let start = Instant::now();
        let a: SocketAddr = "10.0.0.1:1".parse().expect("an address");
        let mut seen = Seen::default();
        seen.take(a, start, &leader(1, "0/100", ["0/100", "0/80"]), 2);
        assert!(!seen.held(a, start - Duration::from_millis(1)));
        seen.take(a, start, &leader(1, "0/100", ["0/100", "0/100"]), 2);
        assert!(seen.held(a, start - Duration::from_millis(1)));
    }

    #[test]
    fn changes_of_the_in_sync_set_are_counted_once() {
        let start = Instant::now();
        let a: SocketAddr = "10.0.0.1:1".parse().expect("an address");
        let told = |version: u64, names: &[&str]| json!({ "role": "replica", "version": version, "in_sync": names });
        let mut seen = Seen::default();
        for (version, names) in [(1, &["b", "c"][..]), (2, &["b"]), (2, &["b"]), (1, &["b", "c"]), (3, &["c"])] {
            seen.take(a, start, &told(version, names), 1);
        }
        assert_eq!(seen.in_sync_changes(start), 3, "c left; b left and c joined");
    }
}
