//! What members ask each other beside the log: heartbeats, the questions of a failover, and the register's own messages.
//! Plain values and their bytes. A connection that starts with one of these carries nothing else; a question has a number, and
//! its answer, which may come after later ones, has the same.
//!
//! ```text
//! envelope    0  body length   4   <= CONTROL_BYTES_MAX, little-endian
//!             4  kind          1   9; the log's messages (`message`) have others
//!             5  zeros         3
//! body           JSON of a [`Packet`]
//! ```

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use walferry_engine::lsn::{Epoch, Lsn};

use crate::consensus::types::{Rpc, RpcReply};
use crate::failover::StepDown;
use crate::member::{ClusterId, MemberName};
use crate::message::ENVELOPE_BYTES;
use crate::policy::POLICY_TEXT_BYTES_MAX;
use crate::register::{Change, Kind, MEMBERS_MAX, MemberId, Outcome};

/// The kind in the envelope.
pub const CONTROL_KIND: u8 = 9;
/// A longer message is none.
pub const CONTROL_BYTES_MAX: usize = 1 << 20;
/// An address or a policy in a greeting has at most so many bytes.
const GREETING_TEXT_BYTES_MAX: usize = POLICY_TEXT_BYTES_MAX;

/// A message between members, with the number that its answer repeats.
#[derive(Debug, Serialize, Deserialize)]
pub struct Packet<T> {
    /// The question's number on its connection.
    pub number: u64,
    /// The question or the answer.
    pub body: T,
}

/// Who a member is; the first question on every connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// Its name.
    pub name: MemberName,
    /// Its incarnation.
    pub id: MemberId,
    /// What it is for.
    pub kind: Kind,
    /// The sender has a register: the cluster was formed.
    pub formed: bool,
    /// It is a member by that register, or votes about it.
    pub votes: bool,
    /// The cluster that its log belongs to, if it has one.
    pub cluster_id: Option<ClusterId>,
    /// The members that it was started with, as `name=address`, ascending: all must be started with the same.
    pub members: Vec<String>,
    /// Where clients reach it; empty for a witness.
    pub client_address: String,
    /// The sync policy that it was started with, for a cluster that is formed; a witness has none.
    pub policy: String,
    /// With which version of the register an earlier incarnation was removed, if that is why this one began.
    pub removed: Option<u64>,
}

impl Greeting {
    /// Where the node says that it is reached.
    pub fn own_peer(&self) -> Option<&str> {
        let mut members = self.members.iter().filter_map(|text| text.split_once('='));
        members.find(|(member, _)| *member == self.name.as_str()).map(|(_, peer)| peer)
    }

    /// Whether it is one of a node: of those that are no members some are kept, so they are bounded.
    pub fn check(&self) -> Result<(), String> {
        let too_many = self.members.len() > MEMBERS_MAX;
        let texts = self.members.iter().chain([&self.client_address, &self.policy]);
        if too_many || texts.map(String::len).any(|bytes| bytes > GREETING_TEXT_BYTES_MAX) {
            return Err(format!(
                "a greeting has at most {MEMBERS_MAX} members, and texts of {GREETING_TEXT_BYTES_MAX} bytes: {} says more",
                self.name
            ));
        }
        Ok(())
    }
}

/// What a member says to one that is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnidentifiedPeer {
    /// Who says so.
    pub member: Greeting,
    /// The member's cluster.
    pub cluster_id: ClusterId,
    /// The version of the register, as far as the member knows.
    pub version: u64,
    /// Who is a member by it, and at which peer address: a node may have been started before others joined.
    pub members: BTreeMap<MemberName, String>,
    /// With which version this incarnation of the node was removed, if it was.
    pub removed_at: Option<u64>,
    /// A member of this name is there, in another incarnation: the node begins anew.
    pub name_known: bool,
}

/// A leader's heartbeat, which renews its lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseHeartbeat {
    /// In which epoch it leads.
    pub epoch: Epoch,
    /// The leader.
    pub leader: MemberName,
    /// Which incarnation of it.
    pub id: MemberId,
    /// Where clients reach it.
    pub client_address: String,
    /// The end of its log.
    pub end: Lsn,
}

/// A question.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Who are you?
    Greet(Greeting),
    /// A leader asks for its lease to be renewed?
    LeaseHeartbeat(LeaseHeartbeat),
    /// Do you hear the leader? This incarnation asks.
    PreVote(MemberId),
    /// Refuse leaders of epochs before this one, durably; this incarnation asks.
    Fence(Epoch, MemberId),
    /// Change the register (to the controller).
    Change(Box<Change>),
    /// Replace the leader of this epoch, which consents (to the controller).
    StepDown(Epoch, StepDown),
    /// Take no writes until this member has everything (to the leader of this epoch).
    Drain(Epoch, MemberName),
    /// Lose confirmed commits rather than wait (to the controller).
    AllowUnclean,
    /// Take this node in, which is reached there, or where it said (to the leader).
    Join(MemberName, Option<String>),
    /// Remove this member (to the leader).
    Remove(MemberName),
    /// Tell this incarnation of a node the register, before it becomes a member (to the controller).
    Admit(MemberId, String),
    /// Forget a register in which you have no part, to be taken in as a new incarnation (to a node that is no member).
    BeginAnew(MemberId),
    /// A message of the engine that holds the register, to this incarnation of the member and no other.
    Consensus(MemberId, Box<Rpc>),
}

impl Ask {
    /// The incarnation that asks as a member, where the question says so.
    pub fn asker(&self) -> Option<MemberId> {
        match self {
            Ask::LeaseHeartbeat(heartbeat) => Some(heartbeat.id),
            Ask::PreVote(id) | Ask::Fence(_, id) => Some(*id),
            _ => None,
        }
    }
}

/// An answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To a greeting.
    Greeting(Greeting),
    /// To one that is no member: to its greeting, and to whatever an incarnation asks that was removed.
    Unidentified(UnidentifiedPeer),
    /// To a heartbeat.
    LeaseHeartbeat {
        /// The lease is granted.
        granted: bool,
        /// What this member has promised.
        promised: Epoch,
    },
    /// To a pre-vote.
    PreVote {
        /// The leader was not heard for the election timeout.
        silent: bool,
        /// From the controller: what a failover under way waits for; else empty.
        blocked_reason: String,
    },
    /// The member is fenced.
    Fenced {
        /// Its incarnation.
        id: MemberId,
        /// For at least this epoch.
        promised: Epoch,
        /// Epoch of its last frame.
        last_epoch: Epoch,
        /// Its durable end.
        flushed: Lsn,
        /// For how long its last grant to the old leader still lasts, microseconds.
        grant_left_us: u64,
    },
    /// To a change.
    Change(Outcome),
    /// It will be done, or was.
    Done,
    /// It was done; what there is to say.
    Told(String),
    /// To a message of the register's engine.
    Consensus(Box<RpcReply>),
    /// It cannot be answered; why.
    Refused(String),
}

/// The bytes of a message.
pub fn encode<T: Serialize>(packet: &Packet<T>) -> Vec<u8> {
    let mut bytes = vec![0; ENVELOPE_BYTES];
    serde_json::to_writer(&mut bytes, packet).expect("these values are JSON");
    let body = (bytes.len() - ENVELOPE_BYTES) as u32;
    bytes[..4].copy_from_slice(&body.to_le_bytes());
    bytes[4] = CONTROL_KIND;
    bytes
}

/// The length of the body that an envelope announces; `None` when it is not a control message's.
pub fn body_bytes(envelope: &[u8; ENVELOPE_BYTES]) -> Option<usize> {
    let bytes = u32::from_le_bytes(envelope[..4].try_into().expect("4 bytes")) as usize;
    (envelope[4] == CONTROL_KIND && envelope[5..] == [0; 3] && bytes <= CONTROL_BYTES_MAX).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_encoded_is_announced_and_anything_else_is_not() {
        let bytes = encode(&Packet { number: 7, body: Ask::Fence(Epoch(3), MemberId(5)) });
        let envelope: &[u8; ENVELOPE_BYTES] = bytes.first_chunk().expect("an envelope");
        assert_eq!(body_bytes(envelope), Some(bytes.len() - ENVELOPE_BYTES));
        let packet: Packet<Ask> = serde_json::from_slice(&bytes[ENVELOPE_BYTES..]).expect("its own bytes");
        assert!(matches!(packet, Packet { number: 7, body: Ask::Fence(Epoch(3), MemberId(5)) }));
        for wrong in [[0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 9, 1, 0, 0], [0, 0, 0, 1, 9, 0, 0, 0]] {
            assert_eq!(body_bytes(&wrong), None, "{wrong:?}");
        }
    }
}
