//! What a seed decides before anything happens: how many nodes, how fast their disks and network, who the clients are, and which
//! faults there will be.

use walferry_cluster::level::CommitLevel;

use crate::clients::Kind;
use crate::kernel::Disk;
use crate::network::Delays;
use crate::runner::LATENCY_SEEDS;

/// What may go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Fault {
    Kill,
    KillLeader,
    /// The power of the whole room.
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
    /// The leader hears nobody, and members that promise their voice to the next one die soon after.
    KillSealed,
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
}

/// Those that destroy most come more often.
const ALL: [Fault; 22] = [
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
    Fault::KillSealed,
    Fault::LoseDisk,
    Fault::Switchover,
    Fault::ChangeMembers,
    Fault::Rot,
    Fault::Misread,
    Fault::WallClock,
];

/// True when the leader stays who it is. Only its slots know what replicas need: another leader may have recycled that, and
/// without base copies nobody could come back then.
fn keeps_the_leader(fault: &Fault) -> bool {
    matches!(fault, Fault::Split | Fault::Reset | Fault::SlowDisk | Fault::FullDisk | Fault::WallClock)
}

/// What is asked of a run apart from its seed.
pub struct Wanted<'a> {
    /// These faults and no others; none: those of the seed.
    pub faults: &'a [Fault],
    /// Changes the circumstances.
    pub tune: fn(&mut Plan),
}

impl<'a> From<&'a [Fault]> for Wanted<'a> {
    fn from(faults: &'a [Fault]) -> Wanted<'a> {
        Wanted { faults, tune: |_| () }
    }
}

/// The circumstances of a run.
pub struct Plan {
    pub nodes: usize,
    /// More that are no members at first.
    pub spares: usize,
    pub policy: &'static str,
    pub sync_method: &'static str,
    pub write_depth: usize,
    pub replica_lag_ms: u64,
    pub checkpoint_bytes: u64,
    pub zero_copy_bytes_min: usize,
    /// Log that is kept although nobody needs it.
    pub keep_bytes_min: u64,
    pub disk: Disk,
    pub delays: Delays,
    /// A change of the register takes up to so long.
    pub register_us: u64,
    pub clients: Vec<Kind>,
    /// Any of these, one after the other.
    pub faults: Vec<Fault>,
    /// From one to the next, microseconds.
    pub pause_us: (u64, u64),
}

impl Plan {
    /// One replica more than a commit waits for, and nothing that goes wrong by itself.
    pub fn make_calm(&mut self, seed: u64) {
        let any_two = (seed / LATENCY_SEEDS).is_multiple_of(2);
        (self.nodes, self.policy) = if any_two { (4, "ANY 2 (*)") } else { (3, "") };
        self.spares = 0;
        self.delays.lost_per_mille = 0;
    }

    /// What may go wrong, and what has to be there for it.
    pub fn set_faults(&mut self, faults: Vec<Fault>) {
        self.spares = usize::from(faults.contains(&Fault::ChangeMembers));
        self.keep_bytes_min = if faults.iter().all(keeps_the_leader) { 1 << 20 } else { 256 << 20 };
        self.faults = faults;
    }

    pub fn new(rng: &mut fastrand::Rng) -> Plan {
        let nodes = if rng.u8(0..4) == 0 { 5 } else { 3 };
        // A few kinds of faults at a time: some bugs need one of them again and again, undisturbed by others.
        let mut faults = ALL.to_vec();
        rng.shuffle(&mut faults);
        faults.truncate(rng.usize(1..=5));
        let policies: &[&str] = &["", "", "ANY 1 (*)", "ALL"];
        let mut clients = vec![Kind::Writer(CommitLevel::RemoteApply), Kind::Writer(CommitLevel::RemoteFlush)];
        clients.extend([Kind::Writer(CommitLevel::Local), Kind::Writer(CommitLevel::Off)]);
        clients.extend([Kind::Register; 3]);
        clients.extend([Kind::Reader(CommitLevel::Local), Kind::Reader(CommitLevel::RemoteFlush)]);
        let policy = policies[rng.usize(0..policies.len())];
        let mut plan = Plan {
            nodes,
            spares: 0,
            policy: if nodes == 5 && policy == "ANY 1 (*)" { "" } else { policy },
            sync_method: if rng.bool() { "dsync" } else { "fdatasync" },
            write_depth: [1, 2, 4, 8][rng.usize(0..4)],
            replica_lag_ms: [300, 1_000, 10_000][rng.usize(0..3)],
            // Not less: a leader that is cut off for a lease's time must not have to checkpoint what is not committed.
            checkpoint_bytes: [64 << 10, 256 << 10, 4 << 20][rng.usize(0..3)],
            zero_copy_bytes_min: if rng.bool() { 4 << 10 } else { 1 << 30 },
            keep_bytes_min: 0,
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
            faults: Vec::new(),
            pause_us: [(50_000, 400_000), (200_000, 900_000), (600_000, 2_000_000)][rng.usize(0..3)],
        };
        plan.set_faults(faults);
        plan
    }
}
