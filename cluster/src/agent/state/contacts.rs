//! Which members were heard, and what they said of themselves. Changed by `agent/contacts.rs`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::told::Told;

use crate::control::{Greeting, UnidentifiedPeer};
use crate::member::MemberName;
use crate::register::{MEMBERS_MAX, MemberId};

/// A cluster that has no leader for longer says why.
pub(in crate::agent) const BLOCKED_TIME_MAX: Duration = Duration::from_secs(1);
/// Greetings of so many nodes that are no members are kept.
pub(in crate::agent) const UNIDENTIFIED_MAX: usize = MEMBERS_MAX;
/// What is remembered of other nodes is bounded by so many.
pub(in crate::agent) const GREETINGS_MAX: usize = 4 * MEMBERS_MAX;

/// What is known of the others.
#[derive(Debug)]
pub(in crate::agent) struct Contacts {
    pub(in crate::agent) greet_at: Instant,
    pub(in crate::agent) greetings: BTreeMap<MemberName, Greeting>,
    /// When each other member answered last.
    pub(in crate::agent) heard: BTreeMap<MemberName, Instant>,
    /// When each incarnation asked something here last, over a connection that it opened.
    pub(in crate::agent) reached_by: BTreeMap<MemberId, Instant>,
    /// Since when no majority of the members has.
    pub(in crate::agent) unreached_since: Option<Instant>,
    /// The leader's end of log, and where its clients are, as last heard.
    pub(in crate::agent) leader_end: Lsn,
    pub(in crate::agent) leader_address: (Epoch, String),
    /// What a member said to this node, which is none.
    pub(in crate::agent) unidentified_peer: Option<UnidentifiedPeer>,
    /// Why nobody leads; empty when nothing is wrong.
    pub(in crate::agent) blocked: String,
    /// What the driver was told of that.
    pub(in crate::agent) blocked_told: String,
    /// Since when, and whether it was logged.
    pub(in crate::agent) blocked_since: Option<(Instant, bool)>,
    /// Members that are there and that this one cannot speak with, and why.
    pub(in crate::agent) misfits: BTreeMap<MemberName, String>,
    /// What the log has told of why the cluster cannot be formed.
    pub(in crate::agent) complaints: Told,
    /// A member that lost its disk is being taken back, or was until then.
    pub(in crate::agent) taking_back: bool,
    pub(in crate::agent) take_back_at: Instant,
    /// A leader's heartbeat was granted since the start.
    pub(in crate::agent) is_led: bool,
}

impl Contacts {
    pub(in crate::agent) fn new(now: Instant) -> Contacts {
        Contacts {
            greet_at: now,
            greetings: BTreeMap::new(),
            heard: BTreeMap::new(),
            reached_by: BTreeMap::new(),
            unreached_since: None,
            leader_end: Lsn::ZERO,
            leader_address: Default::default(),
            unidentified_peer: None,
            blocked: String::new(),
            blocked_told: String::new(),
            blocked_since: None,
            misfits: BTreeMap::new(),
            complaints: Told::default(),
            taking_back: false,
            take_back_at: now,
            is_led: false,
        }
    }

    pub(in crate::agent) fn greet_at(&self) -> Instant {
        self.greet_at
    }

    pub(in crate::agent) fn heard(&mut self, name: &MemberName, now: Instant) {
        self.heard.insert(name.clone(), now);
        self.misfits.remove(name);
    }

    /// A member is there, and the two do not speak the same.
    pub(in crate::agent) fn misfit(&mut self, name: &MemberName, why: String) {
        if self.misfits.len() < GREETINGS_MAX || self.misfits.contains_key(name) {
            self.misfits.insert(name.clone(), why);
        }
    }

    /// Of those that are awaited, who is there and why this member cannot speak with it; nothing when that is the case with none.
    pub(in crate::agent) fn misfits_among(&self, awaited: &[&MemberName]) -> Option<String> {
        let said = awaited.iter().filter_map(|name| Some((name, self.misfits.get(*name)?)));
        let said: Vec<String> = said.map(|(name, why)| format!("{name} is there, but {why}")).collect();
        (!said.is_empty()).then(|| said.join("; "))
    }

    pub(in crate::agent) fn is_in_reach(&self, name: &MemberName, lately: Duration, now: Instant) -> bool {
        self.heard.get(name).is_some_and(|at| now.saturating_duration_since(*at) < lately)
    }

    pub(in crate::agent) fn reached_by(&mut self, id: MemberId, now: Instant) {
        self.reached_by.insert(id, now);
        if self.reached_by.len() > GREETINGS_MAX
            && let Some(oldest) = self.reached_by.iter().min_by_key(|(_, at)| **at).map(|(id, _)| *id)
        {
            self.reached_by.remove(&oldest);
        }
    }

    pub(in crate::agent) fn is_reached_by(&self, id: MemberId, lately: Duration, now: Instant) -> bool {
        self.reached_by.get(&id).is_some_and(|at| now.saturating_duration_since(*at) < lately)
    }

    /// A node greeted. Of those that are neither members nor to be members the last few are kept: one of them may be taken in.
    pub(in crate::agent) fn greeted(&mut self, theirs: Greeting, is_known: impl Fn(&MemberName) -> bool) {
        let name = theirs.name.clone();
        self.greetings.insert(name.clone(), theirs);
        let unidentified = || self.greetings.keys().filter(|other| !is_known(other));
        if unidentified().count() > UNIDENTIFIED_MAX
            && let Some(other) = unidentified().find(|other| **other != name).cloned()
        {
            self.greetings.remove(&other);
        }
    }

    /// Where a node that greeted said that it is reached.
    pub(in crate::agent) fn own_peer(&self, name: &MemberName) -> Option<String> {
        self.greetings.get(name)?.own_peer().map(str::to_owned)
    }

    pub(in crate::agent) fn leader_end(&self) -> Lsn {
        self.leader_end
    }

    /// The leader of `epoch` was heard; true when it is another, or its clients are somewhere else than before.
    pub(in crate::agent) fn hear_leader(&mut self, epoch: Epoch, end: Lsn, client_address: &str) -> bool {
        self.leader_end = end;
        let moved = self.leader_address.0 != epoch || self.leader_address.1 != client_address;
        if moved {
            self.leader_address = (epoch, client_address.to_owned());
        }
        moved
    }

    pub(in crate::agent) fn blocked(&self) -> &str {
        &self.blocked
    }

    pub(in crate::agent) fn set_blocked(&mut self, text: String) {
        self.blocked = text;
    }

    /// Logs once in a while what keeps the cluster from being formed, and keeps it for whoever asks; true when it was logged.
    pub(in crate::agent) fn complain(&mut self, text: &str, now: Instant) -> bool {
        text.clone_into(&mut self.blocked);
        let logged = self.complaints.tell(text, now).is_some();
        if logged {
            tracing::error!("{text}");
        }
        logged
    }

    /// Members of a cluster that is there have answered: this node forms none.
    pub(in crate::agent) fn knows_a_cluster(&self) -> bool {
        self.unidentified_peer.is_some()
    }

    /// What the driver is to tell people, when it has changed. A failover is over in a moment; one that is not is logged once.
    pub(in crate::agent) fn tell_blocked(&mut self, now: Instant) -> Option<String> {
        if self.blocked.is_empty() {
            self.blocked_since = None;
        } else {
            let (since, logged) = self.blocked_since.unwrap_or((now, false));
            let due = !logged && now.saturating_duration_since(since) >= BLOCKED_TIME_MAX;
            if due {
                tracing::warn!("{}", self.blocked);
            }
            self.blocked_since = Some((since, logged || due));
        }
        (self.blocked != self.blocked_told).then(|| {
            self.blocked_told.clone_from(&self.blocked);
            self.blocked.clone()
        })
    }

    pub(in crate::agent) fn end_taking_back(&mut self, again_at: Instant) {
        (self.taking_back, self.take_back_at) = (false, again_at);
    }

    pub(in crate::agent) fn is_taking_back(&self) -> bool {
        self.taking_back
    }
}
