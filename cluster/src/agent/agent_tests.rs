//! Whole clusters of agents, with messages that arrive at once, nodes that obey at once, and an engine that holds the register as
//! openraft does: a change takes a majority of the voters, which are incarnations. Time jumps to whatever is due next.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use walferry_engine::lsn::{Epoch, Lsn};

use super::*;
use crate::control::{Answer, Ask, LeaseHeartbeat};
use crate::member::{ClusterId, MemberName, Proved};
use crate::register::{Change, ClusterState, Kind, MEMBERS_MAX, MemberId, Outcome};
use crate::testing::name;

const TIMEOUT: Duration = Duration::from_millis(400);
/// A cluster with a member of this name has a witness, whose name comes first, and a sync policy.
const WITNESS: &str = "arbiter";
/// A controller that is gone is replaced after this.
const ELECTION: Duration = Duration::from_millis(200);

struct Site {
    agent: Option<Agent>,
    kept: Kept,
    view: RegisterView,
    may_elect: bool,
    last_epoch: Epoch,
    flushed: Lsn,
    leads: Option<Epoch>,
    heartbeats: usize,
}

/// One cluster.
struct Net {
    now: Instant,
    sites: BTreeMap<MemberName, Site>,
    config: BTreeMap<MemberName, String>,
    state: ClusterState,
    voters: BTreeSet<MemberId>,
    told: BTreeSet<MemberId>,
    controller: Option<MemberName>,
    vacant_since: Option<Instant>,
    asked: BTreeMap<u64, (MemberName, AskId)>,
    replies: BTreeMap<u64, Result<String, String>>,
    last: u64,
    /// Fence requests to these get lost.
    deaf: BTreeSet<MemberName>,
    min_in_sync: usize,
    /// These answer as incarnations that are no members yet.
    anew: BTreeSet<MemberName>,
    /// Nobody opens a connection to these; they reach everybody.
    walled: BTreeSet<MemberName>,
    /// Stopped, with all that they know.
    paused: BTreeSet<MemberName>,
    /// No step of the voters is taken.
    voter_changes_fail: bool,
    /// What members ask of the controller gets lost.
    changes_lost: bool,
    /// Members that do not answer are there, and speak otherwise.
    misfits: bool,
}

fn peer(member: &MemberName) -> String {
    format!("{member}:6401")
}

impl Net {
    /// `formed` form the cluster; the `others` are there and no members.
    fn new(formed: &str, others: &str) -> Net {
        let config = formed.split_whitespace().map(|text| (name(text), peer(&name(text)))).collect();
        let mut net = Net {
            now: Instant::now(),
            sites: BTreeMap::new(),
            config,
            state: ClusterState::default(),
            voters: BTreeSet::new(),
            told: BTreeSet::new(),
            controller: None,
            vacant_since: None,
            asked: BTreeMap::new(),
            replies: BTreeMap::new(),
            last: 0,
            deaf: BTreeSet::new(),
            min_in_sync: 0,
            anew: BTreeSet::new(),
            walled: BTreeSet::new(),
            paused: BTreeSet::new(),
            voter_changes_fail: false,
            changes_lost: false,
            misfits: false,
        };
        for text in formed.split_whitespace().chain(others.split_whitespace()) {
            net.wipe(text);
            net.start(text);
        }
        assert!(net.run_until(20, |net| net.leader().is_some()), "formed and led");
        net
    }

    fn id(&mut self) -> MemberId {
        self.last += 1;
        MemberId(self.last)
    }

    fn wipe(&mut self, member: &str) {
        let kept = Kept { id: self.id(), promised: Epoch(0), removed: None };
        let site = Site {
            agent: None,
            kept,
            view: RegisterView::default(),
            may_elect: false,
            last_epoch: Epoch(0),
            flushed: Lsn::ZERO,
            leads: None,
            heartbeats: 0,
        };
        self.sites.insert(name(member), site);
    }

    fn start(&mut self, member: &str) {
        let member = name(member);
        let mut members = self.config.clone();
        members.insert(member.clone(), peer(&member));
        let now = self.now;
        let site = self.sites.get_mut(&member).expect("a site");
        let kind = if member.as_str() == WITNESS { Kind::Witness } else { Kind::Data };
        let policy = if kind == Kind::Data && members.contains_key(&name(WITNESS)) { "ALL" } else { "" };
        let config = AgentConfig {
            name: member.clone(),
            kind,
            members,
            client_address: format!("{member}:6379"),
            cluster_id: None,
            new_cluster_id: ClusterId(7),
            election_timeout: TIMEOUT,
            heartbeat_interval: TIMEOUT / 4,
            policy: policy.to_owned(),
            min_in_sync: self.min_in_sync,
            history_epoch: site.last_epoch,
        };
        site.leads = None;
        site.view.controls = false;
        site.agent = Some(Agent::new(config, site.kept.clone(), site.view.clone(), kind == Kind::Data, now));
    }

    fn kill(&mut self, member: &str) {
        let site = self.sites.get_mut(&name(member)).expect("a site");
        (site.agent, site.leads) = (None, None);
        self.controller.take_if(|controller| *controller == name(member));
    }

    fn site(&self, member: &MemberName) -> &Site {
        &self.sites[member]
    }

    fn is_up(&self, member: &MemberName) -> bool {
        self.sites.get(member).is_some_and(|site| site.agent.is_some()) && !self.paused.contains(member)
    }

    /// Voters that are there: only the incarnation that votes.
    fn voting(&self, voters: &BTreeSet<MemberId>) -> usize {
        self.sites.iter().filter(|(name, site)| self.is_up(name) && voters.contains(&site.kept.id)).count()
    }

    fn has_majority(&self, voters: &BTreeSet<MemberId>) -> bool {
        self.voting(voters) * 2 > voters.len()
    }

    fn leader(&self) -> Option<MemberName> {
        let leads = |(_, site): &(&MemberName, &Site)| site.leads == Some(self.state.epoch) && site.agent.is_some();
        let found = self.sites.iter().find(leads)?;
        let holds = found.1.agent.as_ref().is_some_and(|agent| agent.holds_lease(self.now));
        (self.state.leader.as_ref() == Some(found.0) && holds).then(|| found.0.clone())
    }

    fn with(&mut self, member: &MemberName, act: impl FnOnce(&mut Agent, Instant)) {
        let now = self.now;
        if !self.is_up(member) {
            return;
        }
        if let Some(agent) = self.sites.get_mut(member).and_then(|site| site.agent.as_mut()) {
            act(agent, now);
        }
    }

    fn tell_register(&mut self) {
        let controller = self.controller.clone();
        let controller_id = controller.as_ref().map(|member| self.site(member).kept.id);
        let names: Vec<MemberName> = self.sites.keys().cloned().collect();
        for member in names {
            let walled = self.walled.contains(&member) && controller.as_ref() != Some(&member);
            if walled || !self.is_up(&member) || !self.told.contains(&self.site(&member).kept.id) {
                continue;
            }
            let view = RegisterView {
                state: self.state.clone(),
                formed: true,
                controller: controller_id,
                controls: controller.as_ref() == Some(&member),
                voters: self.voters.clone(),
                told: self.told.clone(),
                joint: false,
            };
            self.sites.get_mut(&member).expect("a site").view = view.clone();
            self.with(&member, |agent, now| agent.handle_register(view, now));
        }
    }

    fn elect(&mut self) {
        let voters = self.voters.clone();
        let able = |net: &Net, member: &MemberName| {
            net.is_up(member) && net.voters.contains(&net.site(member).kept.id) && net.has_majority(&voters)
        };
        if self.controller.as_ref().is_some_and(|member| able(self, member) && self.site(member).may_elect) {
            self.vacant_since = None;
            return;
        }
        if self.controller.take().is_some() {
            self.tell_register();
        }
        let since = *self.vacant_since.get_or_insert(self.now);
        if self.now < since + ELECTION {
            return;
        }
        let names: Vec<MemberName> = self.sites.keys().cloned().collect();
        self.controller = names.into_iter().find(|member| self.site(member).may_elect && able(self, member));
        if self.controller.is_some() {
            self.tell_register();
        }
    }

    /// Carries out everything until nobody has anything to say, then lets time pass.
    fn step(&mut self) {
        self.elect();
        let names: Vec<MemberName> = self.sites.keys().filter(|name| !self.paused.contains(*name)).cloned().collect();
        let mut busy = true;
        while std::mem::take(&mut busy) {
            for member in &names {
                while let Some(output) = self.sites.get_mut(member).and_then(|site| site.agent.as_mut()?.poll_output())
                {
                    busy = true;
                    self.carry_out(member, output);
                }
            }
        }
        for member in &names {
            self.report_in_sync(member);
        }
        let due = self.sites.values().filter_map(|site| Some(site.agent.as_ref()?.poll_timeout(self.now))).min();
        self.now =
            due.unwrap_or(self.now).clamp(self.now + Duration::from_millis(1), self.now + Duration::from_millis(50));
        for member in &names {
            self.with(member, |agent, now| agent.handle_timeout(now));
        }
    }

    fn report_in_sync(&mut self, member: &MemberName) {
        let Some(epoch) = self.site(member).leads else { return };
        let others = self.sites.iter().filter(|(other, site)| *other != member && site.agent.is_some());
        let in_sync = others.filter(|(other, site)| self.state.knows(other, site.kept.id) && site.last_epoch == epoch);
        let in_sync = in_sync.map(|(other, site)| (other.clone(), site.kept.id)).collect();
        self.with(member, |agent, now| agent.handle_report(Report::InSync(epoch, 1, in_sync), now));
    }

    fn carry_out(&mut self, member: &MemberName, output: Output) {
        match output {
            Output::Ask { id, to, ask, .. } => {
                if matches!(*ask, Ask::LeaseHeartbeat(_)) {
                    self.sites.get_mut(member).expect("a site").heartbeats += 1;
                }
                let lost = self.changes_lost && matches!(*ask, Ask::Change(_));
                let lost = lost
                    || !self.is_up(&to)
                    || self.walled.contains(&to)
                    || self.deaf.contains(&to) && matches!(*ask, Ask::Fence(..));
                if lost && self.misfits {
                    let why = "it speaks TLS".to_owned();
                    return self.with(member, |agent, now| agent.handle_misfit(id, why, now));
                }
                if lost {
                    return self.with(member, |agent, now| agent.handle_answer(id, Err("no answer".to_owned()), now));
                }
                if self.anew.contains(&to) {
                    let answer = Answer::Refused(format!("{to} is not a member yet"));
                    return self.with(member, |agent, now| agent.handle_answer(id, Ok(answer), now));
                }
                self.last += 1;
                let request = self.last;
                self.asked.insert(request, (member.clone(), id));
                self.with(&to, |agent, now| agent.handle_ask(request, Some(&Proved::of([member.as_str()])), *ask, now));
            }
            Output::Answer(request, answer) => {
                if let Some((asker, id)) = self.asked.remove(&request) {
                    self.with(&asker, |agent, now| agent.handle_answer(id, Ok(*answer), now));
                }
            }
            Output::Promise(epoch) => {
                self.sites.get_mut(member).expect("a site").kept.promised = epoch;
                self.with(member, |agent, now| agent.handle_promised(epoch, Ok(()), now));
            }
            Output::Propose(id, change) => {
                let able = self.controller.as_ref() == Some(member) && self.has_majority(&self.voters);
                let outcome = if able { Ok(self.state.apply(*change)) } else { Err("no majority".to_owned()) };
                if outcome == Ok(Outcome::Taken) {
                    self.tell_register();
                }
                self.with(member, |agent, now| agent.handle_proposed(id, outcome, now));
            }
            Output::Form(voters) => {
                if self.voters.is_empty()
                    || self.site(member).view.state.members.len() == 1 && !self.site(member).view.formed
                {
                    self.voters = voters.keys().copied().collect();
                    self.told = self.voters.clone();
                    self.state = self.site(member).view.state.clone();
                }
            }
            Output::ChangeVoters(step) => {
                let outcome = self.change_voters(member, step);
                self.with(member, |agent, now| agent.handle_voters_changed(outcome, now));
            }
            Output::MayElect(may) => self.sites.get_mut(member).expect("a site").may_elect = may,
            Output::Order(order) => self.obey(member, order),
            Output::Lease(_) | Output::Blocked(_) => {}
            Output::Reply(command, outcome) => drop(self.replies.insert(command, outcome)),
            Output::Over(over) => self.begin_anew(member, over),
        }
    }

    fn change_voters(&mut self, member: &MemberName, step: VoterStep) -> Result<(), String> {
        if self.controller.as_ref() != Some(member) || !self.has_majority(&self.voters) || self.voter_changes_fail {
            return Err("no majority".to_owned());
        }
        match step {
            VoterStep::Admit(id, _) => drop(self.told.insert(id)),
            VoterStep::Voters(voters) if !self.has_majority(&voters) => return Err("no majority of the new".to_owned()),
            VoterStep::Voters(voters) => self.voters = voters,
            VoterStep::Forget(ids) => self.told.retain(|id| !ids.contains(id)),
        }
        self.tell_register();
        Ok(())
    }

    fn obey(&mut self, member: &MemberName, order: Order) {
        let site = self.sites.get_mut(member).expect("a site");
        let report = match order {
            Order::Lead(epoch) => {
                (site.leads, site.last_epoch) = (Some(epoch), epoch);
                site.flushed = Lsn(site.flushed.0 + 10);
                return;
            }
            Order::Follow { epoch, .. } => {
                site.leads = None;
                let leader = self.state.leader.clone().filter(|leader| self.is_up(leader));
                if let Some(end) = leader.map(|leader| self.site(&leader).flushed) {
                    let site = self.sites.get_mut(member).expect("a site");
                    (site.last_epoch, site.flushed) = (epoch, end);
                }
                return;
            }
            Order::Leaderless(_) => return site.leads = None,
            Order::Fence(epoch) => {
                site.leads = None;
                Report::Fenced(epoch, Some(LogEnd { last_epoch: site.last_epoch, flushed: site.flushed }))
            }
            Order::Drain(id, _) => Report::Drained(id, Ok(())),
            Order::Joint(id, _) => Report::Proved(id, Ok(())),
            Order::JointEnds(_) | Order::InSyncRecorded(_) | Order::State(_) | Order::LeaderAddress(..) => return,
        };
        self.with(member, |agent, now| agent.handle_report(report, now));
    }

    fn begin_anew(&mut self, member: &MemberName, over: Over) {
        let id = self.id();
        let site = self.sites.get_mut(member).expect("a site");
        site.view = RegisterView::default();
        site.kept = match over {
            Over::Removed(version) => Kept { id, promised: Epoch(0), removed: Some(version) },
            Over::Anew => Kept { id, promised: Epoch(0), removed: site.kept.removed },
            Over::Forced(mut state) => {
                state.begin_alone(member, id);
                site.view.state = *state;
                Kept { id, promised: site.kept.promised, removed: None }
            }
        };
        self.start(member.as_str());
    }

    fn run_until(&mut self, seconds: u64, done: impl Fn(&Net) -> bool) -> bool {
        let end = self.now + Duration::from_secs(seconds);
        while self.now < end {
            if done(self) {
                return true;
            }
            self.step();
        }
        done(self)
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step();
        }
    }

    /// An operator's command at a member, and its outcome.
    fn command(&mut self, at: &str, command: Command) -> Result<String, String> {
        self.last += 1;
        let id = self.last;
        self.with(&name(at), |agent, now| agent.handle_command(id, command, now));
        assert!(self.run_until(70, |net| net.replies.contains_key(&id)), "a command is answered");
        self.replies.remove(&id).expect("just seen")
    }

    fn join(&mut self, member: &str) -> Result<String, String> {
        let at = self.leader().expect("a leader").to_string();
        self.command(&at, Command::Join(name(member), Some(peer(&name(member)))))
    }

    fn remove(&mut self, member: &str) -> Result<String, String> {
        let at = self.leader().expect("a leader").to_string();
        self.command(&at, Command::Remove(name(member)))
    }

    /// What people are told at this member of what is wrong.
    fn blocked(&self, member: &MemberName) -> &str {
        self.site(member).agent.as_ref().map_or("", |agent| agent.contacts.blocked())
    }

    fn members(&self) -> String {
        self.state.members.keys().map(MemberName::as_str).collect::<Vec<_>>().join(" ")
    }

    /// It leads again after all members were started again at once, and its register can change.
    fn survives_a_restart(&mut self, history: &str) {
        let members: Vec<String> = self.state.members.keys().map(ToString::to_string).collect();
        for member in &members {
            self.kill(member);
            self.start(member);
        }
        let epoch = self.state.epoch;
        let led = self.run_until(20, |net| net.state.epoch > epoch && net.leader().is_some());
        assert!(led, "{history}: nobody leads after a restart of {members:?}; voters {:?}", self.voters);
        let voters_agree = self.run_until(20, |net| net.voting(&net.voters) == net.voters.len());
        assert!(voters_agree, "{history}: a vote was thrown away: {:?}", self.voters);
    }
}

#[test]
fn members_form_a_cluster_and_one_leads() {
    for members in ["a", "a b", "a b c", "a b c d e"] {
        let mut net = Net::new(members, "");
        assert_eq!(net.members(), members);
        net.survives_a_restart(members);
    }
}

/// Every sequence of three joins, removals and restarts from one, two and three members, and what is left can go on.
#[test]
fn cluster_a_witness_forms_has_the_data_members_policy() {
    let net = Net::new("arbiter b c", "");
    assert_eq!(net.state.members[&name(WITNESS)].kind, Kind::Witness);
    assert_eq!(net.state.policy, "ALL");
}

#[test]
fn every_short_sequence_of_changes_leaves_a_cluster_that_leads() {
    for formed in ["a", "a b", "a b c"] {
        let others = ["a", "b", "c", "d"].into_iter().filter(|member| !formed.contains(member));
        let others = others.collect::<Vec<_>>().join(" ");
        for sequence in 0..8_usize.pow(3) {
            let mut net = Net::new(formed, &others);
            let mut history = format!("formed {formed}");
            for step in 0..3 {
                let choice = sequence / 8_usize.pow(step) % 8;
                change(&mut net, choice, &mut history);
            }
            net.survives_a_restart(&history);
        }
    }
}

/// Long random sequences among five nodes.
#[test]
fn long_sequences_of_changes_leave_a_cluster_that_leads() {
    for seed in 1..40_u64 {
        let mut net = Net::new("a b c", "d e");
        let mut history = format!("seed {seed}");
        let mut random = seed;
        for _ in 0..12 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            change(&mut net, (random >> 33) as usize % 10, &mut history);
        }
        net.survives_a_restart(&history);
    }
}

/// Joins the node, or removes it if it is a member and another leads; the odd choices restart a member before.
fn change(net: &mut Net, choice: usize, history: &mut String) {
    let member = ["a", "b", "c", "d", "e"][choice / 2];
    if !net.sites.contains_key(&name(member)) {
        return;
    }
    if choice % 2 == 1 {
        net.kill(member);
        net.start(member);
        history.push_str(&format!(", restart {member}"));
    }
    let led = net.run_until(20, |net| net.leader().is_some() && net.state.leaving.is_empty());
    assert!(led, "{history}: nobody leads; members {}, voters {:?}", net.members(), net.voters);
    let leader = net.leader().expect("just seen");
    let outcome = if !net.state.members.contains_key(&name(member)) {
        history.push_str(&format!(", join {member}"));
        net.join(member)
    } else if leader != name(member) {
        history.push_str(&format!(", remove {member}"));
        net.remove(member)
    } else {
        return;
    };
    assert!(outcome.is_ok(), "{history}: {outcome:?}");
    net.run(Duration::from_secs(1));
}

#[test]
fn removed_member_stops_voting_before_it_is_removed() {
    let mut net = Net::new("a b", "");
    let leader = net.leader().expect("a leader").to_string();
    let other = if leader == "a" { "b" } else { "a" };
    net.remove(other).expect("removed");
    assert_eq!(net.members(), leader);
    let id = net.site(&name(&leader)).kept.id;
    assert_eq!(net.voters, [id].into(), "nobody's vote is needed who began anew");
    net.join(other).expect("taken back");
    net.survives_a_restart("two, one, two");
}

#[test]
fn dead_voter_of_two_cannot_be_removed() {
    let mut net = Net::new("a b", "");
    let leader = net.leader().expect("a leader").to_string();
    let other = if leader == "a" { "b" } else { "a" };
    net.kill(other);
    let refused = net.remove(other).expect_err("half of two is no majority");
    assert!(refused.contains("--force-new-cluster"), "{refused}");
    net.start(other);
    assert!(net.run_until(20, |net| net.leader().is_some()), "nothing was changed");
}

#[test]
fn removal_does_not_rest_on_a_voter_that_lost_its_disk() {
    let mut net = Net::new("a b c", "");
    let leader = net.leader().expect("a leader").to_string();
    let others: Vec<&str> = ["a", "b", "c"].into_iter().filter(|member| *member != leader).collect();
    // It is reached, and the vote that the register counts on is gone with its disk.
    net.anew.insert(name(others[1]));
    let refused = net.remove(others[0]).expect_err("no majority of the voters would be left");
    assert!(refused.contains(&format!("waiting for {}", others[1])), "{refused}");
    assert!(net.state.leaving.is_empty(), "nothing has begun");
    net.anew.clear();
    assert!(net.run_until(20, |net| net.leader().is_some()), "it is there again");
    net.remove(others[0]).expect("its vote counts");
}

#[test]
fn removal_below_min_in_sync_is_refused_until_another_joins() {
    let mut net = Net::new("a b c", "d");
    net.min_in_sync = 2;
    for member in ["a", "b", "c", "d"] {
        net.kill(member);
        net.start(member);
    }
    assert!(net.run_until(20, |net| net.leader().is_some()), "led again");
    let leader = net.leader().expect("a leader").to_string();
    let other = if leader == "a" { "b" } else { "a" };
    let refused = net.remove(other).expect_err("one replica would be left");
    assert!(refused.contains("min_in_sync asks for 2") && refused.contains("walferry join"), "{refused}");
    assert_eq!(net.members(), "a b c", "nothing was changed");
    net.join("d").expect("taken in");
    net.remove(other).expect("two replicas are left");
}

/// It was started with those who formed the cluster, and only the one that controls the register takes it back.
#[test]
fn member_that_lost_its_disk_finds_who_joined_later() {
    let mut net = Net::new("a b c", "d");
    net.join("d").expect("taken in");
    let leader = net.leader().expect("a leader").to_string();
    let lost = ["a", "b", "c"].into_iter().find(|member| *member != leader).expect("three");
    net.controller = Some(name("d"));
    net.tell_register();
    let before = net.state.members[&name(lost)].id;
    net.kill(lost);
    net.wipe(lost);
    net.start(lost);
    assert!(net.run_until(20, |net| net.state.members[&name(lost)].id != before), "d takes it back");
}

/// A majority of two is two: the leader has no lease until the member that it took in grants it one.
#[test]
fn join_waits_for_a_node_that_was_just_started() {
    let mut net = Net::new("a b", "c");
    let ask = |net: &mut Net, id: u64, command: Command| {
        net.with(&name("a"), |agent, now| agent.handle_command(id, command, now));
        net.step();
    };
    ask(&mut net, 90, Command::Join(name("d"), None));
    ask(&mut net, 91, Command::Join(name("e"), None));
    net.run(Duration::from_secs(2));
    assert!(!net.replies.contains_key(&90), "it waits for d");
    ask(&mut net, 92, Command::Join(name("b"), None));
    assert!(net.run_until(1, |net| net.replies.contains_key(&92)), "what cannot be is said at once");
    net.join("c").expect("another change does not wait for it");
    net.wipe("d");
    net.start("d");
    assert!(net.run_until(5, |net| net.replies.contains_key(&90)), "it was heard");
    net.replies[&90].as_ref().expect("taken in");
    assert!(net.run_until(10, |net| net.replies.contains_key(&91)), "the wait is bounded");
    let refused = net.replies[&91].as_ref().expect_err("e was never started");
    assert!(refused.contains("e is not known to the leader"), "{refused}");
    assert_eq!(net.members(), "a b c d");
}

#[test]
fn removed_member_does_not_complain_of_newcomers() {
    let mut net = Net::new("a b c", "");
    net.remove("b").expect("removed");
    net.run(Duration::from_secs(2));
    for newcomer in ["d", "e"] {
        net.wipe(newcomer);
        net.start(newcomer);
    }
    net.run(Duration::from_secs(3));
    for waiting in ["b", "d", "e"] {
        assert!(!net.blocked(&name(waiting)).contains("--members"), "{waiting}: {}", net.blocked(&name(waiting)));
    }
}

#[test]
fn complaints_that_alternate_are_logged_once_in_a_while() {
    let (mut contacts, begun) = (Contacts::new(Instant::now()), Instant::now());
    let logged = (0..1000u32).filter(|number| {
        let text = if number % 2 == 0 { "d was started with others" } else { "e was started with others" };
        contacts.complain(text, begun + Duration::from_millis(100) * (number / 2))
    });
    assert_eq!(logged.count(), 2);
}

#[test]
fn join_right_after_a_join_waits_for_the_lease() {
    let mut net = Net::new("a", "b c arbiter");
    for member in ["b", "c", WITNESS] {
        net.join(member).expect("taken in");
        assert_eq!(net.leader(), Some(name("a")), "it has its lease when the join of {member} is told");
    }
    // The lease is lost and comes back while the next change waits.
    net.remove(WITNESS).expect("removed");
    net.walled = ["b", "c"].map(name).into();
    assert!(net.run_until(2, |net| net.leader().is_none()), "the lease ends");
    net.with(&name("a"), |agent, now| {
        assert!(!agent.holds_lease(now));
        agent.handle_command(99, Command::Join(name(WITNESS), Some(peer(&name(WITNESS)))), now);
    });
    net.step();
    assert!(!net.replies.contains_key(&99), "it waits");
    net.walled.clear();
    assert!(net.run_until(20, |net| net.replies.contains_key(&99)), "answered");
    net.replies[&99].as_ref().expect("taken in");
}

#[test]
fn member_that_cannot_be_spoken_with_is_not_called_gone() {
    let mut net = Net::new("a b c", "");
    net.paused = ["b", "c"].map(name).into();
    assert!(net.run_until(20, |net| net.blocked(&name("a")).contains("--force-new-cluster")), "nobody answers");
    net.misfits = true;
    assert!(net.run_until(20, |net| net.blocked(&name("a")).contains("b is there, but it speaks TLS")), "told");
    assert!(!net.blocked(&name("a")).contains("--force-new-cluster"), "{}", net.blocked(&name("a")));
    net.misfits = false;
    net.paused.clear();
    assert!(net.run_until(30, |net| net.leader().is_some() && net.blocked(&name("a")).is_empty()), "led again");
}

#[test]
fn interrupted_removal_is_told_as_begun_and_goes_on() {
    let mut net = Net::new("a b c", "");
    let leader = net.leader().expect("a leader").to_string();
    let gone = ["a", "b", "c"].into_iter().find(|member| *member != leader).expect("three");
    net.voter_changes_fail = true;
    let told = net.remove(gone).expect_err("its vote does not end");
    for says in [&format!("{gone} is marked as leaving"), "goes on with it", "`walferry describe`", "in time"] {
        assert!(told.contains(says), "{says} in {told}");
    }
    assert_eq!(net.state.leaving, [name(gone)].into());
    // Whoever leads: here it is another one.
    net.kill(&leader);
    net.voter_changes_fail = false;
    net.start(&leader);
    assert!(net.run_until(30, |net| !net.state.members.contains_key(&name(gone))), "it goes on");
    net.survives_a_restart("an interrupted removal");
}

/// Its connections reach everybody, and nobody's reaches it: a firewall, or a port that is not the one that the register has.
#[test]
fn controller_that_nobody_reaches_gives_control_up() {
    let mut net = Net::new("a b c d e", "");
    let leader = net.leader().expect("a leader");
    let unreached = net.sites.keys().find(|member| **member != leader).expect("five").clone();
    net.controller = Some(unreached.clone());
    net.tell_register();
    net.walled.insert(unreached.clone());
    let dead = net.sites.keys().find(|member| **member != leader && **member != unreached).expect("five").clone();
    assert!(net.run_until(5, |net| net.state.in_sync.contains(&dead)), "in sync");
    net.kill(dead.as_str());
    assert!(net.run_until(10, |net| !net.state.in_sync.contains(&dead)), "another controls: {:?}", net.controller);
    assert_ne!(net.controller, Some(unreached.clone()));
    let blocked = net.blocked(&unreached).to_owned();
    assert!(blocked.contains(&format!("cannot connect to {unreached} at {}", peer(&unreached))), "{blocked}");
    net.remove(unreached.as_str()).expect("it can be removed");
    net.walled.clear();
    net.start(dead.as_str());
    net.survives_a_restart("a controller that nobody reached");
}

#[test]
fn leader_that_nobody_reaches_is_replaced_and_says_why() {
    let mut net = Net::new("a b c", "");
    let old = net.leader().expect("a leader");
    net.walled.insert(old.clone());
    let replaced = net.run_until(10, |net| net.leader().is_some_and(|leader| leader != old));
    assert!(replaced, "replicas could not connect to it");
    let blocked = net.blocked(&old).to_owned();
    assert!(blocked.contains("may not lead on") && blocked.contains("firewall"), "{blocked}");
    net.walled.clear();
    let (epoch, new) = (net.state.epoch, net.leader());
    net.run(Duration::from_secs(2));
    assert_eq!((net.state.epoch, net.leader()), (epoch, new), "it is back and disturbs nobody");
    assert_eq!(net.blocked(&old), "");
}

/// No change is under way for ever: what became of it is found out once somebody answers.
#[test]
fn removal_without_an_answer_is_resolved() {
    let mut net = Net::new("a b c", "d");
    let leader = net.leader().expect("a leader").to_string();
    let others = ["a", "b", "c"].into_iter().filter(|member| *member != leader).collect::<Vec<_>>();
    net.controller = Some(name(others[0]));
    net.tell_register();
    net.run(Duration::from_secs(1));
    net.changes_lost = true;
    let told = net.remove(others[1]).expect_err("no answer");
    assert!(told.contains("not known yet"), "{told}");
    let refused = net.join("d").expect_err("the one before is not over");
    for says in [&format!("{} is being removed", others[1]), "it is not known", "walferry switchover"] {
        assert!(refused.contains(says), "{says} in {refused}");
    }
    net.changes_lost = false;
    net.run(Duration::from_secs(2));
    net.join("d").expect("it is over");
    assert_eq!(net.members(), "a b c d", "it was not taken");
    net.remove(others[1]).expect("it can be asked for again");
    net.survives_a_restart("a removal without an answer");
}

#[test]
fn interrupted_join_goes_on_under_the_next_leader() {
    let mut net = Net::new("a b c", "d");
    // The node was told the register, and nothing else happened: the leader died.
    let id = net.site(&name("d")).kept.id;
    net.told.insert(id);
    net.tell_register();
    net.told.remove(&id);
    let leader = net.leader().expect("a leader").to_string();
    net.kill(&leader);
    let epoch = net.state.epoch;
    assert!(net.run_until(20, |net| net.state.epoch > epoch && net.leader().is_some()));
    net.join("d").expect("it is empty, and knows this cluster only");
    assert!(net.site(&name("d")).kept.id != id, "it began anew");
    net.start(&leader);
    net.survives_a_restart("an interrupted join");
}

#[test]
fn node_with_a_part_in_another_cluster_is_not_taken_in() {
    let mut net = Net::new("a b c", "");
    // No two incarnations have one id.
    let mut other = Net::new("y z", "");
    other.last = 1 << 32;
    other.wipe("x");
    other.start("x");
    other.join("x").expect("a member there");
    let site = other.sites.remove(&name("x")).expect("a site");
    net.sites.insert(name("x"), Site { agent: None, ..site });
    net.start("x");
    let refused = net.join("x").expect_err("it votes elsewhere");
    assert!(refused.contains("empty data directory"), "{refused}");
    assert!(net.sites[&name("x")].view.state.version > 0, "it forgot nothing");
}

#[test]
fn fenced_leader_sends_no_heartbeats_and_is_replaced() {
    let mut net = Net::new("a b c", "");
    let leader = net.leader().expect("a leader");
    // A controller fenced the leader and died of it: the others never heard.
    let epoch = net.state.epoch.next();
    net.with(&leader, |agent, now| agent.handle_ask(0, None, Ask::Fence(epoch, MemberId(1 << 40)), now));
    net.step();
    let heartbeats = net.site(&leader).heartbeats;
    assert!(net.run_until(10, |net| net.state.epoch >= epoch && net.leader().is_some()), "a majority is well");
    let others = net.site(&leader).heartbeats - heartbeats;
    let leads_again = net.leader() == Some(leader);
    assert!(leads_again || others == 0, "{others} heartbeats of a fenced leader");
}

/// It hears its own heartbeats, and nobody else does.
#[test]
fn leader_without_a_majority_can_be_forced_while_it_runs() {
    let mut net = Net::new("a b c", "");
    let leader = net.leader().expect("a leader");
    for other in ["a", "b", "c"].into_iter().filter(|other| *other != leader.as_str()) {
        net.kill(other);
    }
    net.run(Duration::from_secs(2));
    assert_eq!(net.leader(), None, "its lease is over");
    let site = &net.sites[&leader];
    let blocked = site.agent.as_ref().expect("up").contacts.blocked().to_owned();
    assert!(
        blocked.contains(&format!("{leader} may not lead on")) && blocked.contains("--force-new-cluster"),
        "{blocked}"
    );
    net.command(leader.as_str(), Command::ForceNewCluster).expect("the operator's word");
    assert!(net.run_until(20, |net| net.leader() == Some(leader.clone())), "it leads alone");
}

#[test]
fn survivor_forms_a_cluster_of_one_and_refuses_the_others() {
    let mut net = Net::new("a b c", "");
    let alive = net.command("a", Command::ForceNewCluster).expect_err("all are well");
    assert!(alive.contains("leader"), "{alive}");
    let epoch = net.state.epoch;
    net.kill("b");
    net.kill("c");
    net.run(Duration::from_secs(2));
    assert_eq!(net.leader(), None, "one of three");
    let told = net.command("a", Command::ForceNewCluster).expect("the operator's word");
    assert!(told.contains("b, c"), "{told}");
    assert!(net.run_until(20, |net| net.leader() == Some(name("a"))), "it leads alone");
    assert!(net.state.epoch > epoch);
    // Both at once: of the register that they know they are a majority.
    net.start("b");
    net.start("c");
    net.run(Duration::from_secs(2));
    for back in ["b", "c"] {
        assert!(net.site(&name(back)).kept.removed.is_some(), "{back} was told that it is a member no more");
    }
    assert_eq!(net.leader(), Some(name("a")));
    net.join("b").expect("it may join anew");
    net.survives_a_restart("a cluster of one that grew");
}

/// The others were not gone, and go on where they stood still: they hear that they were removed before they do any harm.
#[test]
fn forced_cluster_is_not_fenced_by_those_that_were_only_paused() {
    for first in ["a", "b"] {
        let mut net = Net::new("a b c", "");
        let old = net.sites.iter().map(|(member, site)| (member.clone(), site.kept.id)).collect::<BTreeMap<_, _>>();
        net.paused = [name("a"), name("b")].into();
        net.run(Duration::from_secs(2));
        net.command("c", Command::ForceNewCluster).expect("the operator's word");
        assert!(net.run_until(20, |net| net.leader() == Some(name("c"))), "it leads alone");
        let (epoch, promised) = (net.state.epoch, net.site(&name("c")).kept.promised);
        // Whatever they ask for before they have heard.
        let heartbeat = LeaseHeartbeat {
            epoch: epoch.skip(1 << 20),
            leader: name("a"),
            id: old[&name("a")],
            client_address: "a:6379".to_owned(),
            end: Lsn::ZERO,
        };
        for ask in
            [Ask::Fence(epoch.next(), old[&name("b")]), Ask::LeaseHeartbeat(heartbeat), Ask::PreVote(old[&name("a")])]
        {
            net.with(&name("c"), |agent, now| agent.handle_ask(0, None, ask, now));
            net.step();
        }
        assert_eq!(net.site(&name("c")).kept.promised, promised, "it promised them nothing");
        net.paused.remove(&name(first));
        net.run(Duration::from_millis(50));
        net.paused.clear();
        for back in ["a", "b"] {
            let told = net.run_until(2, |net| net.site(&name(back)).kept.removed.is_some());
            assert!(told, "{back} was told that it is a member no more");
        }
        assert_eq!((net.leader(), net.state.epoch), (Some(name("c")), epoch), "it was not disturbed");
        net.join("a").expect("it may join anew");
        net.survives_a_restart("a cluster of one that grew");
    }
}

#[test]
fn agreed_election_timeout_overrides_the_configuration() {
    let mut net = Net::new("a b c", "");
    assert_eq!(net.state.election_timeout(), Some(TIMEOUT));
    let site = &net.sites[&name("b")];
    let mut config = site.agent.as_ref().expect("up").config.clone();
    config.election_timeout = TIMEOUT / 4;
    let agent = Agent::new(config, site.kept.clone(), site.view.clone(), true, net.now);
    assert_eq!(agent.voter.grant_left(net.now), TIMEOUT, "an earlier grant may last as long as all agreed on");
    net.sites.get_mut(&name("b")).expect("a site").agent = Some(agent);
    net.run(Duration::from_secs(2));
    assert!(net.leader().is_some());
}

#[test]
fn members_are_bounded() {
    let mut net = Net::new("a", "");
    for number in 1..=MEMBERS_MAX {
        let member = format!("m{number}");
        net.wipe(&member);
        net.start(&member);
        let outcome = net.join(&member);
        assert_eq!(outcome.is_ok(), number < MEMBERS_MAX, "{outcome:?}");
    }
}

#[test]
fn unidentified_peer_with_the_secret_changes_nothing() {
    let mut net = Net::new("a b c", "");
    let leader = net.leader().expect("a leader");
    let replica = net.sites.keys().find(|member| **member != leader).cloned().expect("a replica");
    let (state, promised) = (net.state.clone(), net.site(&replica).kept.promised);
    let id = |net: &Net, member: &MemberName| net.site(member).kept.id;
    let far = state.epoch.skip(7);
    let mut taken = state.clone();
    taken.version += 1;
    taken.epoch = far;
    taken.leader = Some(name("x"));
    let change = Change { state: taken };
    let heartbeat = LeaseHeartbeat {
        epoch: far,
        leader: replica.clone(),
        id: id(&net, &replica),
        client_address: "x:6379".to_owned(),
        end: Lsn::ZERO,
    };
    let (of_leader, nobodys) = (id(&net, &leader), MemberId(1 << 40));
    for ask in [
        Ask::Fence(far, nobodys),
        Ask::Fence(far, of_leader),
        Ask::Change(Box::new(change)),
        Ask::LeaseHeartbeat(heartbeat),
        Ask::PreVote(of_leader),
        Ask::AllowUnclean,
        Ask::Remove(replica.clone()),
        Ask::Join(name("x"), Some("x:6401".to_owned())),
        Ask::Drain(state.epoch, replica.clone()),
    ] {
        for asked in [&leader, &replica] {
            net.with(asked, |agent, now| agent.handle_ask(0, Some(&Proved::of(["x"])), ask.clone(), now));
            net.step();
        }
    }
    net.run(TIMEOUT * 4);
    assert_eq!((net.leader(), &net.state), (Some(leader), &state), "nothing moved");
    assert_eq!(net.site(&replica).kept.promised, promised, "nothing was promised");
}
