//! What a seed decides before anything happens: how many nodes, how fast their disks and network, who the clients are, and which
//! faults there will be.

use walferry_cluster::level::CommitLevel;

use crate::clients::{Answers, ClientKind, Tempo};
use crate::kernel::Disk;
use crate::limits::LATENCY_SEEDS;
use crate::network::Delays;
use crate::world::NodeNo;

/// What may go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Fault {
    Kill,
    KillLeader,
    /// The power of all nodes.
    KillAll,
    /// SIGSTOP.
    Pause,
    /// A node hears nobody and is heard by nobody.
    Isolate,
    /// Two nodes do not reach each other.
    Split,
    /// Only in one direction.
    OneWay,
    /// Connections between two nodes break.
    Reset,
    SlowDisk,
    StalledDisk,
    /// A write or a flush fails with EIO.
    BrokenDisk,
    /// No segment can be made.
    FullDisk,
    /// The leader hears nobody, and members that promise their vote to the next one die soon after.
    KillFenced,
    /// A member comes back with an empty disk: what it had, and what it promised, is gone. One at a time.
    LoseDisk,
    /// The operator wants another leader.
    Switchover,
    /// The operator does without a member, or takes a node in.
    ChangeMembers,
    /// A bit of what was durable flips while the node is down. It has to be noticed, and repaired from whoever holds it; where
    /// nobody does, the node stays down and says so, until the operator brings the bit back.
    Rot,
    /// For a while after a start a node's disk now and then brings other sectors of its log than it was asked for.
    Misread,
    /// A wall clock jumps by up to an hour.
    WallClock,
    /// A machine is suspended, with everything that runs on it; the monotonic clock stands still meanwhile.
    Suspend,
    /// The power goes while a node replaces one of its small files: in the middle of what it does.
    KillHalfway,
    /// One of a node's small files cannot be written.
    BrokenFile,
    /// The leader is cut off until another one leads, and is given the leadership back: its sessions live through both.
    ThereAndBack,
    /// A switchover: one member dies before it is asked for its promise, and who controls the register dies, for long, as soon as
    /// the leader has promised. The two that are left have to find a leader.
    KillController,
    /// What the nodes send each other of their logs comes much later, or not before the end of it, while heartbeats pass.
    SlowLinks,
    /// The leader is killed, and is back at once or soon, behind such connections.
    KillBehindSlowLinks,
    /// The operator wants another leader while some members have slow disks or connections: often one of those.
    SwitchoverWhileSlow,
}

impl Fault {
    /// It happens to a node with a log.
    pub fn is_of_a_log(self) -> bool {
        let disk = [Fault::SlowDisk, Fault::StalledDisk, Fault::BrokenDisk, Fault::FullDisk];
        let files = [Fault::Rot, Fault::Misread, Fault::KillHalfway, Fault::BrokenFile];
        disk.contains(&self) || files.contains(&self)
    }
}

/// Those that destroy most come more often.
const ALL: [Fault; 30] = [
    Fault::Kill,
    Fault::KillAll,
    Fault::KillAll,
    Fault::KillLeader,
    Fault::KillLeader,
    Fault::KillAll,
    Fault::Pause,
    Fault::Isolate,
    Fault::Split,
    Fault::OneWay,
    Fault::Reset,
    Fault::SlowDisk,
    Fault::StalledDisk,
    Fault::BrokenDisk,
    Fault::FullDisk,
    Fault::KillFenced,
    Fault::LoseDisk,
    Fault::Switchover,
    Fault::ChangeMembers,
    Fault::Rot,
    Fault::Misread,
    Fault::WallClock,
    Fault::Suspend,
    Fault::KillHalfway,
    Fault::BrokenFile,
    Fault::ThereAndBack,
    Fault::KillController,
    Fault::SlowLinks,
    Fault::KillBehindSlowLinks,
    Fault::SwitchoverWhileSlow,
];

/// What is asked of a run apart from its seed.
pub struct RunRequest<'a> {
    /// These faults and no others; none: those of the seed.
    pub faults: &'a [Fault],
    /// Runs differ in what not every cluster has.
    pub wide: bool,
    /// Changes the circumstances.
    pub tune: fn(&mut Plan),
}

impl<'a> From<&'a [Fault]> for RunRequest<'a> {
    fn from(faults: &'a [Fault]) -> RunRequest<'a> {
        RunRequest { faults, wide: true, tune: |_| () }
    }
}

/// What a leader does without the replicas that the policy asks for, unless a plan says otherwise.
const BLOCK: &str = "block";

/// How long faults happen, unless a plan says otherwise.
const FAULTS_US: u64 = 5_000_000;

/// The circumstances of a run.
pub struct Plan {
    pub nodes: usize,
    /// More that are no members at first.
    pub spares: usize,
    /// Members that vote and have no log, numbered behind those that have one.
    pub witnesses: usize,
    pub policy: &'static str,
    pub min_in_sync: usize,
    pub on_sync_loss: &'static str,
    pub sync_method: &'static str,
    pub write_depth: usize,
    pub replica_lag_ms: u64,
    pub checkpoint_bytes: u64,
    /// A checkpoint is written within this.
    pub checkpoint_us: u64,
    pub zero_copy_bytes_min: usize,
    /// Log that is kept although nobody needs it.
    pub keep_bytes_min: u64,
    /// And that is kept at most for a replica that needs it.
    pub slot_keep_bytes_max: u64,
    /// Snapshots are sent no faster: the slower takes longer than `replica_lag_ms`. 0 for no limit.
    pub snapshot_rate: u64,
    pub disk: Disk,
    pub delays: Delays,
    /// A change of the register takes up to so long.
    pub register_us: u64,
    pub clients: Vec<ClientKind>,
    pub tempo: Tempo,
    /// Any of these, one after the other.
    pub faults: Vec<Fault>,
    /// From one to the next, microseconds.
    pub pause_us: (u64, u64),
    /// Faults happen for so long, then everything heals.
    pub faults_us: u64,
}

impl Plan {
    pub fn machines(&self) -> usize {
        self.nodes + self.spares + self.witnesses
    }

    /// The nodes with a log, without witnesses.
    pub fn data_nodes(&self) -> std::ops::Range<NodeNo> {
        0..self.nodes + self.spares
    }

    pub fn is_witness(&self, node: NodeNo) -> bool {
        !self.data_nodes().contains(&node)
    }

    /// One replica more than a commit waits for, and nothing that goes wrong by itself.
    pub fn make_calm(&mut self, seed: u64) {
        let any_two = (seed / LATENCY_SEEDS).is_multiple_of(2);
        (self.nodes, self.policy) = if any_two { (4, "ANY 2 (*)") } else { (3, "") };
        (self.spares, self.witnesses, self.min_in_sync, self.on_sync_loss) = (0, 0, 0, BLOCK);
        self.delays.lost_per_mille = 0;
        (self.checkpoint_bytes, self.checkpoint_us) = (self.checkpoint_bytes.max(64 << 10), 1_000);
    }

    /// What may go wrong, and what has to be there for it.
    pub fn set_faults(&mut self, faults: Vec<Fault>) {
        self.spares = usize::from(faults.contains(&Fault::ChangeMembers));
        self.faults = faults;
    }

    pub fn new(rng: &mut fastrand::Rng) -> Plan {
        let nodes = if rng.u8(0..4) == 0 { 5 } else { 3 };
        // A few kinds of faults at a time: some bugs need one of them again and again, undisturbed by others.
        let mut faults = ALL.to_vec();
        rng.shuffle(&mut faults);
        faults.truncate(rng.usize(1..=5));
        let policies: &[&str] = &["", "", "ANY 1 (*)", "ALL"];
        let mut clients =
            vec![ClientKind::Writer(CommitLevel::RemoteApply), ClientKind::Writer(CommitLevel::RemoteFlush)];
        clients.extend([ClientKind::Writer(CommitLevel::Local), ClientKind::Writer(CommitLevel::Off)]);
        clients.extend([
            ClientKind::Register,
            ClientKind::Register,
            ClientKind::Grower,
            ClientKind::Grower,
            ClientKind::Watcher,
        ]);
        clients.extend([ClientKind::Recent, ClientKind::Committed, ClientKind::Writer(CommitLevel::RemoteWrite)]);
        clients.extend([ClientKind::Reader(CommitLevel::Local), ClientKind::Reader(CommitLevel::RemoteFlush)]);
        let policy = policies[rng.usize(0..policies.len())];
        let mut plan = Plan {
            nodes,
            spares: 0,
            witnesses: 0,
            min_in_sync: 0,
            policy: if nodes == 5 && policy == "ANY 1 (*)" { "" } else { policy },
            on_sync_loss: BLOCK,
            sync_method: if rng.bool() { "dsync" } else { "fdatasync" },
            write_depth: [1, 2, 4, 8][rng.usize(0..4)],
            replica_lag_ms: [300, 1_000, 10_000][rng.usize(0..3)],
            // With the smallest the memory of a leader that is cut off is full before its lease is over: its checkpoints go beyond
            // what is committed.
            checkpoint_bytes: [8 << 10, 64 << 10, 256 << 10, 4 << 20][rng.usize(0..4)],
            checkpoint_us: [1_000, 30_000, 300_000][rng.usize(0..3)],
            zero_copy_bytes_min: if rng.bool() { 4 << 10 } else { 1 << 30 },
            keep_bytes_min: [256 << 10, 1 << 20, 256 << 20][rng.usize(0..3)],
            slot_keep_bytes_max: 8 << 30,
            snapshot_rate: [0, 2 << 20, 512 << 10][rng.usize(0..3)],
            disk: Disk {
                write_us: [60, 200, 2_000][rng.usize(0..3)],
                spread_us: [20, 300, 8_000][rng.usize(0..3)],
                slowness: 1,
                stalled_until: 0,
                broken: false,
                sector_bytes: if rng.bool() { 512 } else { 4096 },
            },
            delays: Delays {
                min_us: [20, 100, 2_000][rng.usize(0..3)],
                spread_us: [30, 1_000, 10_000][rng.usize(0..3)],
                lost_per_mille: [0, 2, 20][rng.usize(0..3)],
                again_us: 200_000,
            },
            register_us: [1_000, 20_000, 150_000][rng.usize(0..3)],
            clients,
            tempo: Tempo { think_us: 20_000, watch_us: 300_000 },
            faults: Vec::new(),
            pause_us: [(50_000, 400_000), (200_000, 900_000), (600_000, 2_000_000)][rng.usize(0..3)],
            faults_us: FAULTS_US,
        };
        if plan.policy == "ALL" {
            plan.min_in_sync = rng.usize(0..=2);
        }
        plan.set_faults(faults);
        plan
    }

    /// What some clusters have beside: a witness, a policy of the operator's own, leaders that degrade, little log for replicas that
    /// are behind.
    pub fn widen(&mut self, rng: &mut fastrand::Rng) {
        match rng.u8(0..8) {
            0 | 1 => self.take_a_witness(2),
            2 => self.take_a_witness(4),
            _ => {}
        }
        if rng.u8(0..4) == 0 {
            self.policy = self.chosen_policy(rng);
        }
        if rng.u8(0..8) == 0 {
            self.degrade();
        }
        if rng.u8(0..8) == 0 {
            // A snapshot that is sent slowly is never whole where more log is written meanwhile than is kept: the leader says so.
            (self.slot_keep_bytes_max, self.snapshot_rate) = (1 << 20, 0);
        }
    }

    pub fn answers(&self) -> Answers {
        match (self.on_sync_loss, self.policy) {
            (BLOCK, "ALL") if self.min_in_sync == 0 => Answers::OrWithNobodyInSync,
            (BLOCK, _) => Answers::AtTheLevel,
            _ => Answers::Degraded,
        }
    }

    /// So many members with data, and a witness.
    pub fn take_a_witness(&mut self, nodes: usize) {
        (self.nodes, self.witnesses) = (nodes, 1);
        self.min_in_sync = self.min_in_sync.min(nodes - 1);
        if nodes > 3 && self.policy == "ANY 1 (*)" {
            self.policy = "";
        }
    }

    /// A policy of the operator's own that whoever leads can meet with the other data members, also when one that it may name is removed.
    fn chosen_policy(&self, rng: &mut fastrand::Rng) -> &'static str {
        let any_name: &[&str] = match self.nodes {
            2 => &["FIRST 1 (*)", "FIRST 1 (b, *)"],
            3 => &["FIRST 1 (*)", "FIRST 1 (b, *)", "FIRST 2 (*)"],
            _ => &["FIRST 2 (*)", "FIRST 2 (b, d, *)", "ANY 2 (*)"],
        };
        let named: &[&str] = match self.nodes {
            2 => &["FIRST 1 (a, b)", "ANY 1 (a, b)"],
            3 => &["FIRST 1 (a, b)", "ANY 1 (b, c)", "FIRST 2 (c, a, b)"],
            _ => &["FIRST 2 (a, b, c)", "ANY 2 (b, c, d)", "FIRST 1 (a, b)"],
        };
        let some = if self.faults.contains(&Fault::ChangeMembers) || rng.bool() { any_name } else { named };
        some[rng.usize(0..some.len())]
    }

    /// Without the replicas that the policy asks for commits are answered all the same, and clients are told at which level they are
    /// held. Those whose values have to last whatever the level stay away.
    pub fn degrade(&mut self) {
        self.on_sync_loss = "degrade:local";
        self.clients.retain(|kind| matches!(kind, ClientKind::Writer(_) | ClientKind::Reader(_)));
    }
}
