//! The events of a run. Queued and handled by `cluster.rs`; each handler stands in the file of what it concerns.

use walferry_cluster::agent::{RegisterView, VoterStep};
use walferry_cluster::control::{Answer, Ask};
use walferry_cluster::register::{MemberId, Outcome};
use walferry_engine::lsn::Epoch;
use walferry_engine::world::simulated::TaskNo;

use crate::control::Proposal;
use crate::kernel::DiskOpNo;
use crate::world::NodeNo;

/// Something that happens.
#[derive(Debug)]
pub(super) enum Event {
    Turn(NodeNo),
    Task(NodeNo, TaskNo),
    Disk(NodeNo, u64, DiskOpNo),
    Network,
    Control(NodeNo, u64),
    /// The node has reported something to its agent.
    Reports(NodeNo, u64),
    Packet {
        from: NodeNo,
        to: NodeNo,
        request: u64,
        body: Body,
    },
    AskTimeout(u64),
    Controller,
    Promised {
        node: NodeNo,
        incarnation: u64,
        id: MemberId,
        epoch: Epoch,
    },
    Propose {
        node: NodeNo,
        incarnation: u64,
        id: MemberId,
        proposal: Proposal,
    },
    Proposed {
        node: NodeNo,
        incarnation: u64,
        id: MemberId,
        number: u64,
        outcome: Result<Outcome, String>,
    },
    ChangeVoters {
        node: NodeNo,
        incarnation: u64,
        id: MemberId,
        step: VoterStep,
    },
    VotersChanged {
        node: NodeNo,
        incarnation: u64,
        id: MemberId,
        outcome: Result<(), String>,
    },
    Learn {
        node: NodeNo,
        id: MemberId,
        view: Box<RegisterView>,
    },
    Client(usize, u64),
    Input(NodeNo, u64, u64, Vec<u8>),
    Reply(usize, u64, NodeNo, Epoch, Vec<u8>),
    Closed(usize, u64),
    Fault,
    /// These go down, as soon as this one has something in flight that can be torn.
    Crash {
        nodes: Vec<NodeNo>,
        watched: NodeNo,
        looks_left: u32,
    },
    /// A leader was cut off until members had promised their vote to the next one. Its links work again.
    LeaderBack,
    /// The process of this node is killed and started again soon.
    Fall(NodeNo),
    /// The node that controls the register is killed for a long time.
    Ambush(NodeNo),
    /// The operator gives this node the leadership back.
    GiveBack(NodeNo),
    Replica,
    Start(NodeNo),
    /// A stopped node goes on; its machine was suspended for so long.
    Resume(NodeNo, u64),
    /// These directions are cut no longer.
    Heal(Vec<(NodeNo, NodeNo)>),
    /// Connections in these directions are slow no longer, or were held back for long enough.
    Quicken(Vec<(NodeNo, NodeNo)>),
    Release(Vec<(NodeNo, NodeNo)>),
    /// The operator tells the first that the second is to lead.
    Switchover(NodeNo, NodeNo),
    ReadWell,
    Mend(NodeNo),
}

#[derive(Debug)]
pub(super) enum Body {
    Ask(Box<Ask>),
    Answer(Box<Answer>),
}
