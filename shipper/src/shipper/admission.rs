//! Who may connect, and as which replica: a place among the links and the slots, one node for each name, logs that fit together.

use std::os::fd::OwnedFd;
use std::time::Instant;

use walferry_cluster::member::{Caller, MemberName, reachable};
use walferry_cluster::message::{Hello, Message, PROTOCOL_VERSION, Refuse, RefuseCode, Welcome};
use walferry_cluster::register::MemberId;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::log::Log;
use walferry_engine::mutants;
use walferry_engine::ring::Ring;

use super::Shipper;
use super::{HELD_HEARTBEATS, LINKS_MAX, NAME_HELD_TIME, UNIDENTIFIED_MAX};
use crate::chain;
use crate::handshake::{Leader, judge};
use crate::link::{Link, LinkError, LinkNo, Phase};
use crate::progress::Progress;
use crate::refuse::turn_away;
use crate::replica::Replica;
use crate::slots::SLOTS_MAX;

impl Shipper {
    /// A replica connected.
    pub fn accept(&mut self, socket: OwnedFd, caller: Caller, ring: &mut Ring, log: &mut Log, now: Instant) {
        let address = caller.address;
        let unidentified = || self.links.values().filter(|link| link.is_unidentified());
        if unidentified().count() >= UNIDENTIFIED_MAX
            && let Some(oldest) = unidentified().min_by_key(|link| link.since).map(|link| link.number)
        {
            self.end_link(oldest, &LinkError::Crowded, ring, log, now);
        }
        // Those that are closed only wait for the ring to be done with them.
        if self.links.values().filter(|link| !matches!(link.phase, Phase::Closed)).count() >= LINKS_MAX {
            let text = format!("the leader has {LINKS_MAX} peer connections, which is the limit");
            if let Some(repeated) = self.links_told.tell(&text, now) {
                tracing::warn!(%address, repeated, "a replica is refused: {text}");
            }
            return turn_away(&socket, &Refuse { code: RefuseCode::Full, text });
        }
        let number = LinkNo::next();
        match Link::new(number, socket, caller, ring, now) {
            Ok(link) => drop(self.links.insert(number, link)),
            Err(error) => {
                if let Some(repeated) = self.links_told.tell(&error.to_string(), now) {
                    tracing::warn!(%address, repeated, "cannot set up a peer connection: {error}");
                }
            }
        }
    }

    pub(super) fn answer_hellos(&mut self, ring: &mut Ring, log: &mut Log, history: &EpochHistory, now: Instant) {
        let waiting = |link: &Link| matches!(link.phase, Phase::Probe(Some(_)));
        let numbers: Vec<LinkNo> = self.links.values().filter(|link| waiting(link)).map(|link| link.number).collect();
        for number in numbers {
            self.with_link(number, |shipper, link| {
                if let Phase::Probe(Some(hello)) = std::mem::replace(&mut link.phase, Phase::Probe(None))
                    && let Err(refuse) = shipper.welcome(link, &hello, ring, log, history, now)
                {
                    if refuse.code == RefuseCode::NewerEpoch {
                        shipper.superseded = hello.history.last().map(|(epoch, _)| *epoch).max(shipper.superseded);
                    }
                    shipper.end(link, &LinkError::Refused(refuse), ring, log, now);
                }
            });
        }
    }

    /// What replicas are compared with.
    pub(super) fn as_leader<'a>(&'a self, log: &Log, history: &'a EpochHistory) -> Leader<'a> {
        Leader {
            cluster_id: self.config.cluster_id,
            name: &self.config.name,
            segment_bytes: self.config.segment_bytes,
            history,
            log_start: log.start().max(self.feeds_from),
            sealed: log.sealed(),
        }
    }

    /// Another node with this name is connected and alive: the one that says hello now is refused, or they would take turns for ever.
    /// The same node that was started again, or came back from a network that was cut, connects from where it was: it takes the place
    /// of its old connection at once. One that moved does so once its old connection was silent for `NAME_HELD_TIME`.
    pub(super) fn check_name(&self, hello: &Hello, link: &Link, now: Instant) -> Result<(), Refuse> {
        let first = self.replicas.get(&hello.name).and_then(|replica| Some((replica, self.links.get(&replica.link?)?)));
        let Some((replica, old)) = first else { return Ok(()) };
        let held = NAME_HELD_TIME.max(self.config.heartbeat_interval * HELD_HEARTBEATS).min(self.config.peer_timeout);
        let clients = reachable(&hello.client_address, link.caller.address).unwrap_or_default();
        let moved = old.caller.address.ip() != link.caller.address.ip() || replica.address != clients;
        let is_silent = now.saturating_duration_since(old.heard) > held;
        if !moved || is_silent {
            return Ok(());
        }
        // Without the port that the other one connects from, which is new each time: what is the same is logged once.
        let text = format!(
            "two nodes are called {}: one at {} serves clients at {} and is connected; this one at {} serves clients at {clients}. \
             Start one of them with another --name, or stop it",
            hello.name,
            old.caller.address.ip(),
            replica.address,
            link.caller.address.ip(),
        );
        Err(Refuse { code: RefuseCode::Replaced, text })
    }

    /// There is a slot for this replica, or a place for one; a lost slot that nobody needs is dropped for it.
    pub(super) fn make_place(&mut self, name: &MemberName) -> Result<(), Refuse> {
        let is_fed = |name: &MemberName| {
            self.replicas.get(name).is_some_and(|replica| replica.link.is_some())
                || self.snapshots.progress(name).is_some()
        };
        let (fits, lost) = self.slots.place_for(name, is_fed);
        if let Some(lost) = lost {
            tracing::info!(slot = %lost, replica = %name, "a lost slot is dropped: its place is needed for another replica");
            self.forget_replica(&lost);
        }
        if fits {
            return Ok(());
        }
        let text = format!(
            "there is no slot for {name}: the leader has {SLOTS_MAX}, which is the limit, and each holds log for its replica. \
             `walferry slot list` on the leader tells them; `walferry slot drop NAME` drops one whose replica does not come back"
        );
        Err(Refuse { code: RefuseCode::Full, text })
    }

    /// Compares logs with a replica and begins to stream.
    pub(super) fn welcome(
        &mut self,
        link: &mut Link,
        hello: &Hello,
        ring: &mut Ring,
        log: &mut Log,
        history: &EpochHistory,
        now: Instant,
    ) -> Result<(), Refuse> {
        match self.members.as_ref().map(|members| members.get(&hello.name)) {
            Some(None) => return Err(no_member(&hello.name)),
            Some(Some(id)) if *id != hello.member && !mutants::is_on("complete-without-proof") => {
                return Err(other_incarnation(&hello.name, *id, hello.member));
            }
            _ => {}
        }
        self.check_name(hello, link, now)?;
        let start = judge(hello, &self.as_leader(log, history))?;
        chain::check(log, hello, start)?;
        self.make_place(&hello.name)?;
        let attached = self.slots.attach(&hello.name, start);
        debug_assert!(attached, "{} has a place", hello.name);
        let replica = self.replicas.entry(hello.name.clone());
        let replica =
            replica.or_insert_with(|| Replica::new(hello.name.clone(), hello.member, Progress::default(), now));
        (replica.member, replica.id) = (true, hello.member);
        if let Some(number) = replica.link {
            let text = format!("another connection of {} took this one's place", hello.name);
            let refuse = Refuse { code: RefuseCode::Replaced, text };
            self.end_link(number, &LinkError::Refused(refuse), ring, log, now);
        }
        let replica = self.replicas.get_mut(&hello.name).expect("just entered");
        replica.progress.restart(start);
        replica.link = Some(link.number);
        replica.address = reachable(&hello.client_address, link.caller.address).unwrap_or_default();
        replica.caught_up = false;
        replica.last_error.clear();
        self.moved = true;
        let welcome = Welcome {
            protocol: PROTOCOL_VERSION,
            cluster_id: self.config.cluster_id,
            name: self.config.name.clone(),
            start,
            segment_bytes: self.config.segment_bytes,
            client_address: self.config.client_address.clone(),
            heartbeat_ms: u32::try_from(self.config.heartbeat_interval.as_millis()).unwrap_or(u32::MAX),
            history: history.entries().to_vec(),
            policy: self.rule.policy().clone(),
        };
        link.phase = Phase::Streaming(hello.name.clone());
        link.outgoing.begin(&Message::Welcome(welcome), start, self.common.heartbeat_interval, now);
        tracing::info!(replica = %hello.name, address = %link.caller.address, %start, end = %log.sealed(), "replica connected");
        if start < hello.flushed {
            tracing::warn!(replica = %hello.name, theirs = %hello.flushed, fork = %start, "the replica truncates to the fork");
        }
        Ok(())
    }
}

pub(super) fn other_incarnation(name: &MemberName, known: MemberId, theirs: MemberId) -> Refuse {
    let text =
        format!("the leader knows {name} as {known}, this one is {theirs}: it begins anew, and is taken back soon");
    Refuse { code: RefuseCode::NotMember, text }
}

pub(super) fn no_member(name: &MemberName) -> Refuse {
    let text = format!("{name} is no member of the leader's cluster: `walferry join` makes it one");
    Refuse { code: RefuseCode::NotMember, text }
}
