//! What a leader knows of one replica across its connections. Plain state; the shipper moves it.

use std::time::{Duration, Instant};

use walferry_cluster::member::MemberName;
use walferry_cluster::message::Ack;
use walferry_cluster::register::MemberId;
use walferry_engine::mutants;

use crate::commit_rule::Standing;
use crate::link::LinkNo;
use crate::progress::{AckError, Progress};
use crate::status::{Durations, SentBytes};

/// One replica.
#[derive(Debug)]
pub(crate) struct Replica {
    pub(crate) name: MemberName,
    /// The incarnation that `progress` is of; 0 outside of a cluster.
    pub(crate) id: MemberId,
    pub(crate) progress: Progress,
    pub(crate) link: Option<LinkNo>,
    pub(crate) address: String,
    /// On this connection it has once reached the end of the log. From then on commits may wait for it, even when it
    /// falls back to the segment files for a while: what it confirms counts all the same.
    pub(crate) caught_up: bool,
    pub(crate) in_sync: bool,
    /// Commits may wait for it; false for a replica that is no member of the leader's cluster.
    pub(crate) member: bool,
    /// Since when it has had no connection.
    pub(crate) silent_since: Instant,
    pub(crate) round_trip: Option<Duration>,
    pub(crate) durations: Durations,
    /// Of earlier connections.
    pub(crate) sent_bytes: SentBytes,
    pub(crate) last_error: String,
}

impl Replica {
    pub(crate) fn new(name: MemberName, id: MemberId, progress: Progress, now: Instant) -> Replica {
        Replica {
            name,
            id,
            progress,
            link: None,
            address: String::new(),
            caught_up: false,
            in_sync: false,
            member: true,
            silent_since: now,
            round_trip: None,
            durations: Durations::default(),
            sent_bytes: SentBytes::default(),
            last_error: String::new(),
        }
    }

    /// As the commit rule sees it.
    pub(crate) fn standing(&self) -> Standing<'_> {
        let streaming = self.link.is_some() && self.caught_up && self.member;
        Standing { name: &self.name, streaming, in_sync: self.in_sync, progress: &self.progress }
    }

    /// For how long it has had no connection.
    pub(crate) fn silence(&self, now: Instant) -> Duration {
        let silence = now.saturating_duration_since(self.silent_since);
        if self.link.is_some() { Duration::ZERO } else { silence }
    }

    /// Takes an acknowledgement that arrived at `clock_us` of the heartbeats' clock. True when a position moved.
    pub(crate) fn acknowledge(&mut self, ack: &Ack, clock_us: u64) -> Result<bool, AckError> {
        let mut ack = *ack;
        if mutants::is_on("count-what-is-received") {
            ack.flushed = ack.written;
        }
        let moved = self.progress.acknowledge(&ack)?;
        let us = |us: u32| Duration::from_micros(u64::from(us));
        self.durations = Durations { write: us(ack.write_us), flush: us(ack.flush_us), apply: us(ack.apply_us) };
        if ack.echo_us != 0 {
            let away_us = clock_us.saturating_sub(ack.echo_us);
            let held_us = u64::from(ack.echo_held_us);
            self.round_trip = Some(Duration::from_micros(away_us.saturating_sub(held_us)));
        }
        Ok(moved)
    }
}
