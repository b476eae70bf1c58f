//! The network's turns: what arrives at which node, who accepts connections, and when the network is looked at next.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use super::event::Event;
use super::{Cluster, WAKE_US_MIN};
use crate::world::NodeNo;

impl Cluster {
    pub(super) fn schedule_network(&mut self) {
        self.schedule_network_at(self.now_us + 1);
    }

    pub(super) fn schedule_network_at(&mut self, at_us: u64) {
        if self.network_at.is_none_or(|at| at > at_us || at < self.now_us) {
            self.network_at = Some(at_us);
            self.at(at_us, Event::Network);
        }
    }

    pub(super) fn turn_network(&mut self) {
        if self.network_at != Some(self.now_us) {
            return;
        }
        self.network_at = None;
        let moved: BTreeSet<NodeNo> = self.network.borrow_mut().turn(self.now_us).into_iter().collect();
        // A node that shuts a socket down ends what waits for it there.
        let arrived = self.network.borrow_mut().look_at_arrivals();
        for node in 0..self.nodes.len() {
            // A stopped process accepts nothing; what its kernel was asked for goes on.
            let accepted: Vec<(OwnedFd, std::net::SocketAddr)> = match self.is_paused(node) {
                true => Vec::new(),
                false => self.network.borrow_mut().accepted(node, self.now_us),
            };
            let Some(process) = &mut self.nodes[node].process else { continue };
            let woken = !accepted.is_empty();
            for (socket, address) in accepted {
                process.control.connection(socket, address);
            }
            if arrived || moved.contains(&node) {
                process.kernel.progress_sockets(self.network.borrow_mut().arrived());
            }
            if woken || process.kernel.has_news() {
                self.schedule_turn(node, self.now_us + WAKE_US_MIN);
            }
        }
        let next_us = self.network.borrow().next_us(self.now_us, |node| !self.is_paused(node));
        if let Some(at) = next_us {
            self.network_at = Some(at);
            self.last_event += 1;
            self.events.insert((at, self.last_event), Event::Network);
        }
    }
}
