//! The faults of a drill: their names, and what each needs. `inject` does them.

use std::time::Duration;

use clap::ValueEnum;

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Fault {
    /// SIGKILL to the leader, which is started again two seconds later
    Kill,
    /// SIGSTOP to the leader for ten seconds
    Stop,
    /// No fault: the leader hands over to a replica, as for an upgrade
    Switchover,
    /// The leader reaches no other member for ten seconds, and none reaches it
    IsolateLeader,
    /// The same for a replica
    IsolateReplica,
    /// What members send to the leader does not arrive for ten seconds
    CutLeaderInbound,
    /// What the leader sends to members does not arrive for ten seconds
    CutLeaderOutbound,
    /// The leader's disk stands still three quarters of ten seconds
    SlowLeader,
    /// The same for a replica's disk
    SlowReplica,
    /// SIGKILL to a replica, which is started again ten seconds later
    DeadReplica,
    /// The leader's disk is full for twenty seconds
    FullDisk,
    /// The leader's wall clock is an hour ahead for five seconds, then an hour behind for five
    ClockJump,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.to_possible_value().expect("no fault is hidden").get_name())
    }
}

impl Fault {
    /// Every fault.
    pub const ALL: [Fault; 12] = {
        use Fault::*;
        [
            Kill,
            Stop,
            Switchover,
            IsolateLeader,
            IsolateReplica,
            CutLeaderInbound,
            CutLeaderOutbound,
            SlowLeader,
            SlowReplica,
            DeadReplica,
            FullDisk,
            ClockJump,
        ]
    };

    /// It cuts ways between members.
    pub fn needs_network(self) -> bool {
        matches!(
            self,
            Fault::IsolateLeader | Fault::IsolateReplica | Fault::CutLeaderInbound | Fault::CutLeaderOutbound
        )
    }

    /// It concerns one member's disk.
    pub fn needs_disks(self) -> bool {
        matches!(self, Fault::SlowLeader | Fault::SlowReplica | Fault::FullDisk)
    }

    /// It concerns one member's wall clock.
    pub fn needs_clocks(self) -> bool {
        self == Fault::ClockJump
    }

    /// It is a replica's, and the leader should not feel it.
    pub fn is_replicas(self) -> bool {
        matches!(self, Fault::IsolateReplica | Fault::SlowReplica | Fault::DeadReplica)
    }

    /// For how long it lasts.
    pub fn lasts(self) -> Duration {
        match self {
            Fault::Kill | Fault::Switchover => Duration::from_secs(2),
            // Until what was prepared ahead is used up.
            Fault::FullDisk => Duration::from_secs(20),
            _ => Duration::from_secs(10),
        }
    }
}
