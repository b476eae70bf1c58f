//! Who is known of a cluster, and whom to ask next: the leader, the replicas, how far each was seen to be, and who did not answer
//! lately. A core: takes what happened and the time, opens nothing. Driven by `cluster`.

use std::time::{Duration, Instant};

/// A node that did not answer is asked last for so long.
const AVOID_TIME: Duration = Duration::from_secs(1);
/// What is known is asked for anew after so long, so that replicas that join later are found.
const AGE_MAX: Duration = Duration::from_secs(30);
/// Questions of who leads are at least so far apart, whoever asks.
const ASK_INTERVAL_MIN: Duration = Duration::from_millis(20);

#[derive(Clone, Debug)]
struct Node {
    address: String,
    /// Every read there has shown at least this, an LSN; a hint, since a node that lost its leader may go back.
    seen: u64,
    avoid_until: Option<Instant>,
}

impl Node {
    fn new(address: &str) -> Node {
        Node { address: address.to_owned(), seen: 0, avoid_until: None }
    }

    fn is_avoided(&self, now: Instant) -> bool {
        self.avoid_until.is_some_and(|until| now < until)
    }
}

/// What is known of a cluster.
#[derive(Debug)]
pub struct Topology {
    leader: Option<String>,
    /// The leader and the replicas; before anything was learned, the seeds.
    nodes: Vec<Node>,
    seeds: Vec<String>,
    /// The replicas take turns.
    turn: usize,
    asked_at: Option<Instant>,
    learned_at: Option<Instant>,
}

impl Topology {
    /// Only addresses to begin with are known.
    pub fn new(seeds: Vec<String>) -> Topology {
        let nodes = seeds.iter().map(|seed| Node::new(seed)).collect();
        Topology { leader: None, nodes, seeds, turn: 0, asked_at: None, learned_at: None }
    }

    /// Where clients write, as far as known.
    pub fn leader(&self) -> Option<&str> {
        self.leader.as_deref()
    }

    /// Every node that is known.
    pub fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.address.clone()).collect()
    }

    fn node(&mut self, address: &str) -> &mut Node {
        if let Some(index) = self.nodes.iter().position(|node| node.address == address) {
            return &mut self.nodes[index];
        }
        self.nodes.push(Node::new(address));
        self.nodes.last_mut().expect("it was just added")
    }

    /// The leader is there, a node said.
    pub fn handle_moved(&mut self, leader: &str) {
        self.node(leader);
        self.leader = Some(leader.to_owned());
    }

    /// This node does not lead, and knows nobody who does.
    pub fn handle_leaderless(&mut self, address: &str) {
        self.leader.take_if(|leader| leader == address);
    }

    /// This node cannot be reached, or does not answer.
    pub fn handle_failed(&mut self, address: &str, now: Instant) {
        self.handle_leaderless(address);
        self.node(address).avoid_until = Some(now + AVOID_TIME);
    }

    /// A read at this node showed everything up to `lsn`.
    pub fn handle_seen(&mut self, address: &str, lsn: u64) {
        let node = self.node(address);
        (node.seen, node.avoid_until) = (node.seen.max(lsn), None);
    }

    /// The leader told of its replicas.
    pub fn handle_learned(&mut self, leader: &str, replicas: &[String], now: Instant) {
        let known = std::mem::take(&mut self.nodes);
        let keep = |address: &str| {
            let node = known.iter().find(|node| node.address == address).cloned();
            node.unwrap_or_else(|| Node::new(address))
        };
        self.nodes = replicas.iter().filter(|address| *address != leader).map(|address| keep(address)).collect();
        // The leader answered a moment ago, so it is not avoided.
        self.nodes.push(Node { avoid_until: None, ..keep(leader) });
        self.leader = Some(leader.to_owned());
        self.learned_at = Some(now);
    }

    /// True when it is time to ask; then the caller asks, and nobody else for a while.
    pub fn begin_asking(&mut self, now: Instant) -> bool {
        let may = self.asked_at.is_none_or(|asked| now.saturating_duration_since(asked) >= ASK_INTERVAL_MIN);
        if may {
            self.asked_at = Some(now);
        }
        may
    }

    /// True when what is known is old.
    pub fn is_old(&self, now: Instant) -> bool {
        let old = |at: Instant| now.saturating_duration_since(at) >= AGE_MAX;
        self.learned_at.is_none_or(old) && self.asked_at.is_none_or(old)
    }

    /// Whom to ask who leads: the leader that is known, every other node, the seeds; those that do not answer last.
    pub fn asking_order(&self, now: Instant) -> Vec<String> {
        let mut nodes: Vec<&Node> = self.nodes.iter().collect();
        nodes.sort_by_key(|node| (node.is_avoided(now), self.leader() != Some(&node.address)));
        let mut addresses: Vec<String> = nodes.into_iter().map(|node| node.address.clone()).collect();
        let others: Vec<String> = self.seeds.iter().filter(|seed| !addresses.contains(seed)).cloned().collect();
        addresses.extend(others);
        addresses
    }

    /// Whom to ask for a read that has to show everything up to `floor`: the replicas that were seen there, in turn; the others,
    /// the foremost first; the leader; at last whoever did not answer lately.
    pub fn reading_order(&mut self, floor: u64, now: Instant) -> Vec<String> {
        self.turn = self.turn.wrapping_add(1);
        let count = self.nodes.len().max(1);
        let leads = |node: &Node| self.leader.as_deref() == Some(&node.address);
        let mut order: Vec<(usize, &Node)> = self.nodes.iter().enumerate().collect();
        order.sort_by_key(|(index, node)| {
            let is_past = node.seen >= floor;
            // Those that are past it are as good as each other.
            let behind_by = if is_past { 0 } else { u64::MAX - node.seen };
            (node.is_avoided(now), leads(node), !is_past, behind_by, (index + self.turn) % count)
        });
        order.into_iter().map(|(_, node)| node.address.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(now: Instant) -> Topology {
        let mut topology = Topology::new(vec!["seed:1".to_owned()]);
        topology.handle_learned("a:1", &["b:1".to_owned(), "c:1".to_owned()], now);
        topology
    }

    #[test]
    fn replicas_take_turns_and_the_leader_comes_last() {
        let now = Instant::now();
        let mut topology = cluster(now);
        let mut first = Vec::new();
        for _ in 0..30 {
            let order = topology.reading_order(0, now);
            assert_eq!(order[2], "a:1", "the leader only when no replica would do");
            first.push(order[0].clone());
        }
        for replica in ["b:1", "c:1"] {
            assert!((10..=20).contains(&first.iter().filter(|address| *address == replica).count()), "{first:?}");
        }
    }

    #[test]
    fn a_replica_that_was_seen_past_the_floor_is_asked_first() {
        let now = Instant::now();
        let mut topology = cluster(now);
        topology.handle_seen("c:1", 500);
        for _ in 0..4 {
            assert_eq!(topology.reading_order(500, now), ["c:1", "b:1", "a:1"]);
        }
        topology.handle_seen("b:1", 700);
        topology.handle_seen("b:1", 600);
        assert_eq!(topology.reading_order(700, now), ["b:1", "c:1", "a:1"], "it does not go back");
        assert_eq!(topology.reading_order(900, now), ["b:1", "c:1", "a:1"], "the foremost first");
    }

    #[test]
    fn who_does_not_answer_is_asked_last_for_a_while() {
        let now = Instant::now();
        let mut topology = cluster(now);
        topology.handle_failed("b:1", now);
        assert_eq!(topology.reading_order(0, now), ["c:1", "a:1", "b:1"]);
        assert_eq!(topology.asking_order(now), ["a:1", "c:1", "b:1", "seed:1"]);
        assert_eq!(topology.reading_order(0, now + AVOID_TIME)[2], "a:1");
        topology.handle_failed("a:1", now);
        assert_eq!(topology.leader(), None);
        assert_eq!(topology.reading_order(0, now).len(), 3, "nobody is forgotten");
        topology.handle_moved("d:1");
        assert_eq!((topology.leader(), topology.addresses().len()), (Some("d:1"), 4));
        topology.handle_learned("d:1", &["b:1".to_owned()], now);
        assert_eq!(topology.addresses(), ["b:1", "d:1"], "what the leader does not tell of is gone");
    }

    #[test]
    fn it_is_asked_for_anew_when_it_is_old_and_never_too_often() {
        let now = Instant::now();
        let mut topology = Topology::new(vec!["seed:1".to_owned()]);
        assert!(topology.is_old(now) && topology.begin_asking(now));
        assert!(!topology.is_old(now) && !topology.begin_asking(now), "somebody asks already");
        topology.handle_learned("a:1", &[], now);
        assert!(!topology.is_old(now + AGE_MAX / 2) && topology.is_old(now + AGE_MAX));
        assert!(topology.begin_asking(now + ASK_INTERVAL_MIN));
    }
}
