//! One node of the cluster that is drilled: where it is reached, and whose process it is.

use std::net::SocketAddr;
use std::time::Duration;

use super::hosts::Hooks;
use super::own::Own;

/// One member.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Where its clients connect.
    pub address: SocketAddr,
}

/// Where the time of an outage went.
#[derive(Clone, Copy, Debug)]
pub struct Split {
    /// Until the members agreed that the leader is gone.
    pub detection: Duration,
    /// Until the next one led.
    pub election: Duration,
}

/// Who runs the members.
pub enum Site {
    /// This drill.
    Own(Own),
    /// Somebody else; commands do what is done to them.
    Hosts(Hooks),
}
