//! What the ring brings for the log and for the links to other nodes, given to the role that the node has.

use std::os::fd::OwnedFd;
use std::time::Instant;

use walferry_cluster::member::{Caller, ClusterId};
use walferry_engine::ring::{Completion, Owner, Ring};
use walferry_engine::world;
use walferry_shipper::frame_server::LogSnapshot;

use crate::error::DaemonError;
use crate::node::{Node, Role};

impl Node {
    /// A write of the log ended.
    pub fn handle_log(&mut self, completion: &Completion) {
        if let Err(failure) = self.log.handle_completion(completion, self.clock.now) {
            self.failure = Some(failure.to_string());
        }
    }

    /// A write of the log or an operation on a link ended.
    pub fn handle_completion(&mut self, completion: &Completion, ring: &mut Ring) -> Result<(), DaemonError> {
        match completion.token.owner() {
            Owner::Log => self.handle_log(completion),
            Owner::Peer => self.handle_peer(completion, ring)?,
            owner => unreachable!("the node asks for nothing of {owner:?}"),
        }
        Ok(())
    }

    /// An operation on a link ended.
    pub(super) fn handle_peer(&mut self, completion: &Completion, ring: &mut Ring) -> Result<(), DaemonError> {
        let now = self.clock.now;
        if let Some(replica) = &mut self.retired {
            replica.handle_late_completion(completion);
        }
        self.forget_retired();
        match &mut self.role {
            Role::Leader(shipper) => shipper.handle_completion(completion, ring, &mut self.log, now),
            Role::Replica(replica) => {
                replica.handle_completion(completion, ring, &mut self.log, &mut self.store, &mut self.history, now)?
            }
            Role::Leaderless(_) | Role::SteppedDown(_) => {}
        }
        Ok(())
    }

    /// Drops the link of an earlier role once nothing of it is in flight; what it received only in part is nobody's.
    pub(crate) fn forget_retired(&mut self) {
        if self.retired.take_if(|replica| replica.is_quiet()).is_some() && self.log.leading().is_none() {
            self.log.receive_reset();
        }
    }

    /// A peer connected.
    pub fn accept_peer(&mut self, socket: OwnedFd, caller: Caller, ring: &mut Ring, now: Instant) {
        match &mut self.role {
            Role::Leader(shipper) => shipper.accept(socket, caller, ring, &mut self.log, now),
            Role::Replica(_) | Role::Leaderless(_) | Role::SteppedDown(_) => {
                if world::is_simulated() {
                    return walferry_shipper::refuse::not_leading(socket, &self.describe());
                }
                // A node without a valid name has no log that another node could fetch.
                let Ok(name) = self.member_name() else { return };
                let log = LogSnapshot::of(&self.log, ClusterId(self.known_cluster_id()), name, &self.history);
                let state = self.membership.as_ref().map(|membership| &membership.state);
                let members =
                    state.filter(|state| state.version > 0).map(|state| state.data_members().cloned().collect());
                self.frame_server.greet(socket, caller, self.describe(), log.for_members(members));
            }
        }
    }
}
