//! What a member knows of the others: who greeted, who answers, what the leader said. How a cluster is formed: its register is
//! made once, by the first member by name, when every member was heard and none of them has one. How a member that lost its disk
//! is taken back.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use walferry_engine::mutants;

use crate::control::{Answer, Ask, Greeting, UnidentifiedPeer};
use crate::member::{ClusterId, MemberName};
use crate::register::{Change, ClusterState, Kind, LogStatus, MEMBERS_MAX, Member, MemberId, VOTERS_MAX};

use crate::agent::Agent;
use crate::agent::types::{CHANGE_TIME_MAX, FORMING_TEXT, Output, Over, ProposalFor, Purpose};

/// How often members look for each other.
const GREET_INTERVAL: Duration = Duration::from_millis(100);
/// A member that no majority asked anything for so many election timeouts, twice, is not reached: it controls and leads no more.
const UNREACHED_TIMEOUTS: u32 = 2;

impl Agent {
    /// Looks for the other members: to form a cluster, to be taken in, and to know whether a majority is in reach.
    pub(super) fn look_around(&mut self, now: Instant) {
        if now < self.contacts.greet_at {
            return;
        }
        self.contacts.greet_at = now + GREET_INTERVAL;
        let member = self.is_member();
        // A member that hears no leader asks as well whether it is one still; one that has just started before it helps to choose one:
        // those that were removed while they were down may be a majority of the register that they know.
        let greets = !member || self.voter.grant_left(now).is_zero() || !self.contacts.is_led;
        let timeout = self.election_timeout;
        for (name, peer) in self.around(member) {
            if name == self.config.name {
                continue;
            }
            if greets {
                let greeting = Ask::Greet(self.greeting());
                self.ask(&name, &peer, greeting, timeout, Purpose::Greet, now);
            }
            if member {
                self.ask(&name, &peer, Ask::PreVote(self.kept.id), timeout, Purpose::Look, now);
            }
        }
        self.outputs.push_back(Output::MayElect(self.may_elect(now)));
        let state = &self.view.state;
        if state.version == 0 {
            self.form(now);
        } else if !self.view.formed && member && state.members.len() == 1 {
            // An operator made this member a cluster of its own: its register begins with it as the only voter.
            self.outputs.push_back(Output::Form(state.told()));
        }
    }

    /// Whom to look for. A node that is no member may know them from before others joined: members tell it who there is, for only
    /// the one that controls the register takes it back.
    fn around(&self, member: bool) -> Vec<(MemberName, String)> {
        let mut around = self.members();
        if let Some(said) = self.contacts.unidentified_peer.as_ref().filter(|_| !member) {
            let known: BTreeSet<MemberName> = around.iter().map(|(name, _)| name.clone()).collect();
            let others = said.members.iter().filter(|(name, _)| !known.contains(*name)).take(MEMBERS_MAX);
            around.extend(others.map(|(name, peer)| (name.clone(), peer.clone())));
        }
        around
    }

    /// Notices whether the others can open connections to this member. It may reach all of them nevertheless: its port is another
    /// one than the register has, or something between them lets connections through in one direction only.
    pub(super) fn watch_reach(&mut self, now: Instant) {
        let state = &self.view.state;
        // Incarnations come and go; those that are no members must not fill the map.
        self.contacts.reached_by.retain(|id, _| state.members.values().any(|member| member.id == *id));
        let reached = !self.is_member() || self.unreached_by(now).len() <= state.members.len() - state.majority();
        let since = self.contacts.unreached_since.filter(|_| !reached);
        self.contacts.unreached_since = since.or((!reached).then_some(now));
    }

    /// Members that have not asked this one anything lately.
    fn unreached_by(&self, now: Instant) -> Vec<&MemberName> {
        let lately = self.election_timeout * UNREACHED_TIMEOUTS;
        let others = self.view.state.members.iter().filter(|(_, member)| member.id != self.kept.id);
        others.filter(|(_, other)| !self.contacts.is_reached_by(other.id, lately, now)).map(|(name, _)| name).collect()
    }

    /// True when no majority of the members can open a connection to this one, and has not for a while. It must not control the
    /// register, whose controller everybody asks, and not lead: replicas connect to their leader.
    pub(super) fn is_unreached(&self, now: Instant) -> bool {
        let since = self.contacts.unreached_since;
        since.is_some_and(|since| now.saturating_duration_since(since) >= self.election_timeout * UNREACHED_TIMEOUTS)
    }

    /// What such a member says.
    pub(super) fn unreached_text(&self, now: Instant) -> String {
        let (name, state) = (&self.config.name, &self.view.state);
        let silent: Vec<&str> = self.unreached_by(now).into_iter().map(MemberName::as_str).collect();
        let peer = state.members.get(name).map_or("", |member| member.peer.as_str());
        let what = if self.leads_by_register() { format!("{name} may not lead on: ") } else { String::new() };
        format!(
            "{what}{} cannot connect to {name} at {peer}, its peer address in the register, though {name} may reach them: look for a \
             firewall and at --peer-listen; if its address has changed, `walferry remove --name {name}` and `walferry join --name \
             {name}` give it the new one",
            silent.join(", ")
        )
    }

    /// Whether this member may control the register, or try to. One that reaches no majority of the voters must not: it would come
    /// back with a vote that topples a controller that everybody else hears (Raft's PreVote).
    fn may_elect(&self, now: Instant) -> bool {
        let state = &self.view.state;
        if state.version == 0 {
            return true;
        }
        if self.view.voters.is_empty() {
            // Alone, it is about to form the register of its own cluster.
            return self.is_member() && state.members.len() == 1;
        }
        let votes = |member: &Member| self.view.voters.contains(&member.id);
        let voters = state.members.iter().filter(|(_, member)| votes(member)).map(|(name, _)| name);
        self.is_member() && !self.is_unreached(now) && self.in_reach(voters, now) > self.view.voters.len() / 2
    }

    pub(super) fn take_look(&mut self, answer: Result<Answer, String>) {
        if let Ok(Answer::PreVote { blocked_reason, .. }) = answer
            && !blocked_reason.is_empty()
        {
            self.contacts.set_blocked(blocked_reason);
        }
    }

    /// What a member answered to a greeting.
    pub(super) fn take_greeted(&mut self, name: MemberName, answer: Result<Answer, String>, now: Instant) {
        match answer {
            Ok(Answer::Greeting(theirs)) => drop(self.contacts.greetings.insert(name, theirs)),
            Ok(Answer::Unidentified(said)) => {
                let state = &self.view.state;
                // Only the register of its own cluster can say that an incarnation is over.
                let removed_at = said.removed_at.filter(|_| state.version > 0 && said.cluster_id == state.cluster_id);
                if let Some(version) = removed_at {
                    self.removed = self.removed.or(Some((version, now)));
                }
                self.contacts.greetings.insert(name, said.member.clone());
                // Any member can be asked: the first one that answered is named, until one knows more.
                let news = |old: &UnidentifiedPeer| {
                    (old.cluster_id, old.name_known) != (said.cluster_id, said.name_known) || old.version < said.version
                };
                if self.contacts.unidentified_peer.as_ref().is_none_or(news) {
                    self.contacts.unidentified_peer = Some(said);
                }
            }
            _ => {}
        }
    }

    /// What a node that is no member waits for.
    pub(super) fn waiting_for(&self) -> String {
        let (name, state, contacts) = (&self.config.name, &self.view.state, &self.contacts);
        let unidentified_peer = contacts.unidentified_peer.as_ref();
        if state.members.contains_key(name) || unidentified_peer.is_some_and(|said| said.name_known) {
            let own = self.config.members.get(name);
            if let Some(there) =
                unidentified_peer.and_then(|said| said.members.get(name)).filter(|there| Some(*there) != own)
            {
                return format!(
                    "the cluster has a member {name} already, at {there}: give this node a name of its own. If it is that member at a new \
                     address, `walferry remove --name {name}` and `walferry join --name {name}`"
                );
            }
            return "this node begins anew: the cluster takes it back as soon as a majority answers. If none will, `walferry promote \
                    --force-new-cluster` on a member that has its disk still makes that one a cluster, which takes this node in with \
                    `walferry join`"
                .to_owned();
        }
        if state.version > 0 {
            return format!("this node is no member yet: `walferry join --name {name}` takes it in");
        }
        if let Some(version) = self.kept.removed {
            return format!(
                "removed from the cluster at version {version}; `walferry join --name {name}` takes it back"
            );
        }
        if let Some(said) = unidentified_peer {
            let at = &said.member.client_address;
            let url = if at.is_empty() { String::new() } else { format!(" --url redis://{at}") };
            return format!(
                "this node is no member of cluster {}: `walferry join --name {name}{url}` takes it in",
                said.cluster_id
            );
        }
        let unheard = |other: &&MemberName| *other != name && !contacts.greetings.contains_key(*other);
        let missing: Vec<&MemberName> = self.config.members.keys().filter(unheard).collect();
        if !missing.is_empty() {
            let names = missing.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
            let advice = "every member has to be there once; start the nodes that are to form it with --members that names no others";
            let advice = contacts.misfits_among(&missing).unwrap_or_else(|| advice.to_owned());
            return format!("waiting for {names} to form the cluster: {advice}");
        }
        if contacts.blocked.is_empty() { FORMING_TEXT.to_owned() } else { contacts.blocked.clone() }
    }

    /// Forms the cluster if this member is the one to do it and everybody is there.
    fn form(&mut self, now: Instant) {
        let (own, greetings) = (&self.config.name, &self.contacts.greetings);
        let all = self.config.members.keys().all(|name| name == own || greetings.contains_key(name));
        let first = self.config.members.keys().next() == Some(own);
        // One that was removed waits to be taken in, and forms no other cluster.
        if !all || self.kept.removed.is_some() {
            return;
        }
        let others = || self.config.members.keys().filter(|name| *name != own).filter_map(|name| greetings.get(name));
        if first && !self.view.formed && !others().any(|greeting| greeting.formed) {
            let id_of =
                |name: &MemberName| greetings.get(name).filter(|_| name != own).map_or(self.kept.id, |it| it.id);
            let voters = self.config.members.iter().take(VOTERS_MAX);
            let voters = voters.map(|(name, peer)| (id_of(name), peer.clone())).collect();
            tracing::info!(members = %self.config.member_texts().join(","), "forming the cluster");
            self.outputs.push_back(Output::Form(voters));
        } else if self.view.controls {
            self.propose_first(now);
        }
    }

    /// The register exists and is empty: its first value.
    fn propose_first(&mut self, now: Instant) {
        if self.proposals.values().any(|purpose| matches!(purpose, ProposalFor::First)) {
            return;
        }
        let own = self.greeting();
        let greeting = |name: &MemberName| match *name == self.config.name {
            true => Some(&own),
            false => self.contacts.greetings.get(name),
        };
        let mut ids: Vec<ClusterId> =
            self.config.members.keys().filter_map(|name| greeting(name)?.cluster_id).collect();
        ids.dedup();
        if let [one, .., other] = ids[..]
            && one != other
        {
            let text = format!(
                "the members' logs belong to different clusters, {one} and {other}: remove the data directories of one"
            );
            self.contacts.complain(&text, now);
            return;
        }
        let cluster_id = ids.first().copied().unwrap_or(self.config.new_cluster_id);
        let member = |(name, peer): (&MemberName, &String)| {
            let greeting = greeting(name)?;
            let (peer, log_status) = (peer.clone(), LogStatus::Complete);
            Some((name.clone(), Member { id: greeting.id, peer, kind: greeting.kind, log_status }))
        };
        let members: BTreeMap<MemberName, Member> = self.config.members.iter().filter_map(member).collect();
        // Whoever controls the register may be a witness, which knows of no policy: that of the first member with data holds.
        let mut with_data = self.config.members.keys().filter_map(greeting).filter(|them| them.kind == Kind::Data);
        let policy =
            with_data.next().filter(|_| !mutants::is_on("forget-the-policy")).map_or(&own.policy, |them| &them.policy);
        match ClusterState::formed(cluster_id, members, policy) {
            Ok(mut state) => {
                state.set_election_timeout(self.config.election_timeout);
                self.propose(Change { state }, ProposalFor::First);
            }
            Err(error) => drop(self.contacts.complain(&format!("sync: {error}"), now)),
        }
    }

    /// A node with a member's name and another id greets the controller: the member lost its disk, with its vote and promises,
    /// or somebody gave two nodes one name. The node that is reached at the member's address is asked.
    pub(super) fn take_back(&mut self, greeting: Greeting, now: Instant) {
        // A newer register than this one removed it: that one may take it in, and this member is about to hear of it.
        let removed_later = greeting.removed.is_some_and(|version| version > self.view.state.version);
        if self.contacts.taking_back || now < self.contacts.take_back_at || removed_later {
            return;
        }
        let Some(member) = self.view.state.members.get(&greeting.name) else { return };
        self.contacts.taking_back = true;
        let (name, peer) = (greeting.name.clone(), member.peer.clone());
        let ask = Ask::Greet(self.greeting());
        self.ask(&name, &peer, ask, CHANGE_TIME_MAX, Purpose::TakeBack(greeting), now);
    }

    pub(super) fn take_back_verified(&mut self, greeting: Greeting, answer: Result<Answer, String>, now: Instant) {
        let there: Option<MemberId> = match answer {
            Ok(Answer::Greeting(there)) => Some(there.id),
            Ok(Answer::Unidentified(said)) => Some(said.member.id),
            _ => None,
        };
        let name = &greeting.name;
        let state = &self.view.state;
        let Some(member) = state.members.get(name).filter(|member| member.id != greeting.id && self.view.controls)
        else {
            return self.contacts.end_taking_back(now);
        };
        if there == Some(greeting.id) {
            tracing::warn!(member = %name, old = %member.id, new = %greeting.id, "a member lost its disk and begins anew");
            let next = state.with_new_incarnation(name, greeting.id);
            return self.propose(Change { state: next }, ProposalFor::TakeBack);
        }
        if there.is_some() {
            let said = greeting.own_peer().unwrap_or("an address that it does not tell");
            let text = format!(
                "a second node with the name {name}, at {said}, is refused: the member {name} is there, at {}. Give every node a name of \
                 its own",
                member.peer
            );
            if self.told.tell(&text, now).is_some() {
                tracing::warn!("{text}");
            }
        }
        self.contacts.end_taking_back(now + self.election_timeout);
    }

    /// An operator makes this member a cluster of its own.
    pub(super) fn force_new_cluster(&mut self, now: Instant) -> Result<String, String> {
        let state = self.forced_state(now)?;
        let known = match self.leads_by_register() {
            true => "this member led".to_owned(),
            false => format!("the leader was last heard at {}", self.contacts.leader_end),
        };
        let text = format!("{}: {known}", self.view.state.forced_text(&self.config.name, &state));
        tracing::warn!("{text}");
        self.end(Over::Forced(Box::new(state)));
        Ok(text)
    }
}
