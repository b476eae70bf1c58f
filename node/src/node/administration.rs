//! What operators' commands do to the node: promotion, the cluster's membership, slots, users and connections.

use walferry_cluster::MemberName;
use walferry_engine::lsn::Epoch;
use walferry_shipper::status::SlotStatus;

use crate::clients::list::{Asked, ClientAsk, ClientReply};
use crate::cluster::{Command, Reply};
use crate::node::{Node, Role};
use crate::session::host::Administration;
use crate::session::id::SessionId;
use crate::users::login::Job;

impl Administration for Node {
    fn slots(&self) -> Result<Vec<SlotStatus>, String> {
        let Role::Leader(shipper) = &self.role else { return Err(self.no_slots()) };
        Ok(shipper.slots())
    }

    fn drop_slot(&mut self, name: &MemberName) -> Result<String, String> {
        match &mut self.role {
            Role::Leader(shipper) => shipper.drop_slot(name),
            _ => Err(self.no_slots()),
        }
    }

    fn reset_waterfall(&mut self) {
        self.waterfall.reset();
    }

    fn promote(&mut self) -> Result<Epoch, String> {
        self.promote_now()
    }

    fn command_cluster(&mut self, command: Command) -> Result<Reply, String> {
        let Some(membership) = &self.membership else {
            // Of a pair its slot is all that there is to remove.
            if let Command::Remove(name) = &command {
                return self.drop_slot(name).map(|done| Reply::new(Some(Ok(done)).into()));
            }
            return Err("this node is no member of a cluster: it was started without --members".to_owned());
        };
        Ok(membership.command(command))
    }

    fn reload_users(&mut self) -> Result<(), String> {
        self.read_users()
    }

    fn check_password(&mut self, job: Job) {
        self.clients.logins.check(job);
    }

    fn ask_clients(&mut self, session: SessionId, ask: ClientAsk) -> ClientReply {
        let reply = ClientReply::default();
        self.clients.asks.push(Asked { session, ask, reply: ClientReply::clone(&reply) });
        reply
    }
}

impl Node {
    fn no_slots(&self) -> String {
        let leader =
            self.leader_address().map_or("which is not known here".to_owned(), |address| format!("at {address}"));
        format!("this node does not lead, and the slots are the leader's: ask the leader, {leader}")
    }
}
