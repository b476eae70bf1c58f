//! Clients' sessions: what they send, what comes back, and when.

use walferry_engine::lsn::Epoch;

use super::{Broken, Checked, Cluster, Event, SECOND_US, WAKE_US_MIN};
use crate::clients::{AfterReply, Wants};
use crate::control::name_of;
use crate::world::NodeNo;

impl Cluster {
    pub(super) fn client_turn(&mut self, client: usize, turn: u64) {
        if self.clients[client].turn != turn {
            return;
        }
        if self.clients[client].is_waiting() {
            // It has waited long enough.
            return self.leave(client, true);
        }
        if self.calm && self.clients[client].number != 0 && self.now_us > self.plan.faults_us + SECOND_US {
            return;
        }
        let wants = self.clients[client].next(self.now_us, &mut self.told);
        match wants {
            Wants::Connect(node, bytes) => {
                self.last_session += 1;
                let session = self.last_session;
                self.world.be(node);
                match &mut self.nodes[node].process {
                    Some(process) => process.member.connect(session),
                    None => return self.leave(client, true),
                }
                self.clients[client].session = Some((node, session));
                self.send_input(client, node, session, bytes);
            }
            Wants::Send(bytes) => {
                let (node, session) = self.clients[client].session.expect("it sends on its session");
                self.send_input(client, node, session, bytes);
            }
        }
    }

    fn send_input(&mut self, client: usize, node: NodeNo, session: u64, bytes: Vec<u8>) {
        let delay = self.network.borrow_mut().delay_us();
        let incarnation = self.nodes[node].incarnation;
        self.after(delay, Event::Input(node, incarnation, session, bytes));
        let turn = self.clients[client].turn;
        let patience = self.clients[client].patience();
        self.after(patience.as_micros() as u64, Event::Client(client, turn));
    }

    pub(super) fn input(&mut self, node: NodeNo, incarnation: u64, session: u64, bytes: &[u8]) {
        if self.nodes[node].incarnation != incarnation {
            return;
        }
        if self.is_paused(node) {
            return self.at(self.nodes[node].paused_until, Event::Input(node, incarnation, session, bytes.to_vec()));
        }
        self.world.be(node);
        if let Some(process) = &mut self.nodes[node].process {
            process.member.input(session, bytes);
        }
        self.schedule_turn(node, self.now_us + WAKE_US_MIN);
    }

    pub(super) fn send_reply(&mut self, node: NodeNo, session: u64, epoch: Epoch, bytes: Vec<u8>) {
        let Some(client) = self.clients.iter().position(|client| client.session == Some((node, session))) else {
            self.world.be(node);
            if let Some(process) = &mut self.nodes[node].process {
                process.member.disconnect(session);
            }
            return;
        };
        self.trace.bytes(&bytes);
        let delay = self.network.borrow_mut().delay_us();
        self.after(delay, Event::Reply(client, session, node, epoch, bytes));
    }

    pub(super) fn session_closed(&mut self, node: NodeNo, session: u64) {
        if let Some(client) = self.clients.iter().position(|client| client.session == Some((node, session))) {
            self.after(100, Event::Closed(client, session));
        }
    }

    pub(super) fn closed(&mut self, client: usize, session: u64) {
        if self.clients[client].session.is_some_and(|(_, own)| own == session) {
            self.leave(client, true);
        }
    }

    fn leave(&mut self, client: usize, failed: bool) {
        if let Some((node, session)) = self.clients[client].session {
            self.world.be(node);
            if let Some(process) = &mut self.nodes[node].process {
                process.member.disconnect(session);
            }
        }
        self.clients[client].lose();
        let (turn, pause) = (self.clients[client].turn, self.clients[client].pause_us(failed));
        self.after(pause, Event::Client(client, turn));
    }

    pub(super) fn reply(&mut self, client: usize, session: u64, node: NodeNo, epoch: Epoch, bytes: &[u8]) -> Checked {
        if self.clients[client].session != Some((node, session)) {
            return Ok(());
        }
        let before = self.told.acknowledged.len();
        let outcome = self.clients[client].receive(bytes, self.now_us, epoch, &mut self.told);
        if let Some(ack) = self.told.acknowledged.get(before) {
            // A write whose evidence was asked for later is of the epoch in which it was answered.
            let (level, epoch) = (ack.level, ack.epoch);
            let speaker = *self.spoke.entry(epoch).or_insert(node);
            if speaker != node {
                return Err(Broken(format!(
                    "{} and {} both acknowledged in epoch {epoch} ({level})",
                    name_of(speaker),
                    name_of(node)
                )));
            }
        }
        if let Some(text) = self.told.broken.first() {
            return Err(Broken(text.clone()));
        }
        let turn = self.clients[client].turn;
        match outcome {
            None => {}
            Some(AfterReply::Ask(bytes)) => self.send_input(client, node, session, bytes),
            Some(AfterReply::Leave) => self.leave(client, false),
            Some(AfterReply::Next) => {
                self.clients[client].turn += 1;
                let pause = self.clients[client].pause_us(false);
                self.after(pause, Event::Client(client, turn + 1));
            }
            Some(AfterReply::Pause) => {
                self.clients[client].turn += 1;
                let pause = self.clients[client].pause_us(true);
                self.after(pause, Event::Client(client, turn + 1));
            }
        }
        Ok(())
    }
}
