//! The cluster thread's loop: hands what happened to the state machines of the `cluster` crate and does what they say. Its
//! duties, once a turn: 1. form the cluster, or wait to be taken in; 2. tell the node its role; 3. give signs of life while it
//! leads; 4. replace a silent leader while this member controls the register; 5. keep the in-sync set in the register, and let
//! members that joined count once they are in it; 6. let the register's voters follow the members.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, mpsc as std_mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::RngExt;
use tokio::sync::mpsc;
use walferry_cluster::MemberName;
use walferry_cluster::consensus::{Register, RegisterStore};
use walferry_cluster::control::{Answer, Ask, Beat};
use walferry_cluster::failover::{Aside, Effect, Failover, Outlook, Sealed};
use walferry_cluster::lease::Lease;
use walferry_cluster::register::{Change, ClusterState, Holding, Kind, MemberId, Part};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::waker::Waker;

use super::seat::{CHANGE_TIME_MAX, Event, Seat};
use super::{ClusterConfig, Command, Order, Reply, Report, Shared, changes, forming, wire};
use crate::daemon::DaemonError;

/// Of the heartbeat interval: how often questions of a failover are repeated, and how often members look for each other.
const GREET_INTERVAL: Duration = Duration::from_millis(100);
/// A leader whose ring thread has not turned for so long gives no sign of life any more.
const STUCK_TIME_MAX: Duration = Duration::from_secs(5);
/// A cluster that has no leader for longer says why.
const STANDSTILL_TIME_MAX: Duration = Duration::from_secs(1);
/// The nice level of the thread.
const THREAD_NICE: libc::c_int = -10;
/// A member that was removed while it controls the register waits so long before it begins anew: the others hear of it first.
const REMOVED_PAUSE: Duration = Duration::from_secs(1);
/// A change that failed is tried again after this.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// A node that is told the register and has not become a member by then is let go.
const ADMITTED_TIME_MAX: Duration = Duration::from_secs(60);
/// How long a change of the register's voters may take.
const SEATS_TIME_MAX: Duration = Duration::from_secs(10);
/// How long an operator's switchover may take.
const SWITCHOVER_TIME_MAX: Duration = Duration::from_secs(10);

/// The way to the node.
#[derive(Clone)]
pub(super) struct NodeEnd {
    pub(super) orders: std_mpsc::Sender<Order>,
    pub(super) waker: Waker,
    pub(super) shared: Arc<Shared>,
}

impl NodeEnd {
    pub(super) fn order(&self, order: Order) {
        // A node that has ended takes no orders; its process ends next.
        let _ = self.orders.send(order);
        self.waker.wake();
    }
}

/// Starts the thread; it ends when the node's reports do.
pub(super) fn spawn(
    config: ClusterConfig,
    store: RegisterStore,
    listener: std::net::TcpListener,
    node: Option<NodeEnd>,
    reports: mpsc::UnboundedReceiver<Report>,
) -> Result<JoinHandle<()>, DaemonError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(DaemonError::Signals)?;
    let run = move || {
        take_precedence();
        let outcome = runtime.block_on(run(config, store, listener, node.clone(), reports));
        if let Err(text) = outcome {
            tracing::error!("this node takes no part in its cluster any more: {text}");
            if let Some(node) = node {
                *node.shared.trouble.lock().expect("nobody panics with it") = text.clone();
                node.order(Order::Leaderless(text));
            }
        }
        runtime.shutdown_background();
    };
    std::thread::Builder::new().name("cluster".to_owned()).spawn(run).map_err(DaemonError::Signals)
}

/// Signs of life are tiny and late ones cost an election: where the system allows it (`LimitNICE=` of the unit), this thread runs
/// before whatever else keeps the processors busy.
fn take_precedence() {
    // SAFETY: a plain system call; 0 is the calling thread.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, THREAD_NICE) } != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, "signs of life have no precedence over other threads");
    }
}

async fn run(
    config: ClusterConfig,
    store: RegisterStore,
    listener: std::net::TcpListener,
    node: Option<NodeEnd>,
    reports: mpsc::UnboundedReceiver<Report>,
) -> Result<(), String> {
    let election_timeout = config.election_timeout;
    let door = wire::Door::open(listener, &config.tls);
    let door = Arc::new(door.map_err(|error| format!("cannot listen to peers: {error}"))?);
    let (mut store, mut reports) = (store, reports);
    loop {
        let (sender, events) = mpsc::unbounded_channel();
        let seat = Arc::new(Seat::new(config.clone(), store.clone(), node.clone(), sender));
        let register = Register::open(store.clone(), election_timeout, seat.carrier()).await;
        seat.open(register.map_err(|error| error.to_string())?);
        let serving = tokio::spawn(wire::serve(Arc::clone(&door), Arc::clone(&seat)));
        let end = Driver::new(Arc::clone(&seat), events).run(&mut reports).await;
        serving.abort();
        let _ = seat.register().close().await;
        let End::Removed(version) = end else { return Ok(()) };
        tracing::warn!(
            "removed from the cluster at version {version}; `walferry join --name {}` takes it back",
            config.name
        );
        let anew = store.begin_anew(MemberId(rand::rng().random()), version).await;
        store = anew.map_err(|error| format!("it was removed and cannot begin anew: {error}"))?;
        if let Some(node) = &node {
            node.shared.lease.set(None);
            node.shared.trouble.lock().expect("nobody panics with it").clear();
            node.order(Order::BeginAnew);
        }
    }
}

/// Why a life of the driver is over.
enum End {
    /// The node ends.
    Closed,
    /// This life of the node was removed with this version of the register.
    Removed(u64),
}

struct Driver {
    seat: Arc<Seat>,
    events: mpsc::UnboundedReceiver<Event>,
    failover: Failover,
    /// The lease of the epoch in which this member leads.
    lease: Option<(Epoch, Lease)>,
    /// What the node was told last.
    told: Option<Part>,
    told_version: u64,
    /// Epochs up to this began in an earlier life of the process, which may have led in them.
    lived_through: Epoch,
    /// When the next beat, greeting or canvass is due.
    beat_at: Instant,
    greet_at: Instant,
    /// Members whose answer to a seal is awaited.
    sealing: BTreeMap<MemberName, Epoch>,
    wanted_in_sync: Option<(Epoch, BTreeSet<MemberName>)>,
    in_sync_changing: bool,
    /// A member is being taken back.
    taking_back: bool,
    /// The register's voters are being changed, or could not be and are left alone until then.
    seats_changing: bool,
    seats_at: Instant,
    /// The same of a member that has caught up.
    whole_changing: bool,
    whole_at: Instant,
    /// This life was removed, with which version, and when that was heard.
    removed: Option<(u64, Instant)>,
    /// Since when nobody leads, and whether that was said.
    standstill: Option<(Instant, bool)>,
    /// That the leader is silent was said.
    silence_said: bool,
}

impl Driver {
    fn new(seat: Arc<Seat>, events: mpsc::UnboundedReceiver<Event>) -> Driver {
        let config = &seat.config;
        let failover = Failover::new(config.name.clone(), config.election_timeout, config.heartbeat_interval);
        let now = Instant::now();
        Driver {
            lived_through: seat.state().epoch.max(seat.config.history_epoch),
            seat,
            events,
            failover,
            lease: None,
            told: None,
            told_version: 0,
            beat_at: now,
            greet_at: now,
            sealing: BTreeMap::new(),
            wanted_in_sync: None,
            in_sync_changing: false,
            taking_back: false,
            seats_changing: false,
            seats_at: now,
            whole_changing: false,
            whole_at: now,
            removed: None,
            standstill: None,
            silence_said: false,
        }
    }

    async fn run(mut self, reports: &mut mpsc::UnboundedReceiver<Report>) -> End {
        let mut state_watch = self.seat.register().watch();
        let mut metrics_watch = self.seat.register().metrics();
        loop {
            let now = Instant::now();
            let state = self.seat.state();
            if let Some(version) = self.is_over(&state, now) {
                return End::Removed(version);
            }
            self.look_around(&state, now);
            self.tell_node(&state);
            self.beat(&state, now);
            self.replace_leader(&state, now);
            self.keep_in_sync(&state, now);
            self.keep_seats(&state, now);
            let next = self.next_timeout(&state, Instant::now());
            tokio::select! {
                event = self.events.recv() => if let Some(event) = event { self.handle_event(event, &state) },
                report = reports.recv() => match report {
                    Some(report) => self.handle_report(report, &state),
                    None => return End::Closed,
                },
                _ = state_watch.changed() => {}
                _ = metrics_watch.changed() => {}
                () = tokio::time::sleep(next) => {}
            }
        }
    }

    /// The version with which this life of the node was removed, once nothing keeps it any more.
    fn is_over(&mut self, state: &ClusterState, now: Instant) -> Option<u64> {
        if let (None, Some(version)) = (self.removed, state.removed_at(self.seat.me)) {
            self.removed = Some((version, now));
        }
        let (version, since) = self.removed?;
        let controls = self.seat.register().controller() == Some(self.seat.me);
        (!controls || now.saturating_duration_since(since) >= REMOVED_PAUSE).then_some(version)
    }

    fn next_timeout(&self, state: &ClusterState, now: Instant) -> Duration {
        let until = |at: Instant| at.saturating_duration_since(now);
        let mut next = until(self.greet_at);
        if self.lease.is_some() {
            next = next.min(until(self.beat_at));
        }
        if self.seat.register().controls() && state.version > 0 {
            let grant_left = self.seat.known().voter.grant_left(now);
            next = next.min(self.failover.next_timeout(grant_left, now));
        }
        // A timer that is due already is one that its duty could not serve yet: the loop must not spin on it.
        next.max(Duration::from_millis(1))
    }

    /// Looks for the other members: to form a cluster, to be taken in, and to know whether a majority is in reach.
    fn look_around(&mut self, state: &ClusterState, now: Instant) {
        if now < self.greet_at {
            return;
        }
        self.greet_at = now + GREET_INTERVAL;
        let (seat, member) = (Arc::clone(&self.seat), self.seat.is_member(state));
        // A member that hears no leader asks as well whether it is one still.
        let greets = !member || seat.known().voter.grant_left(now).is_zero();
        for (name, peer) in seat.members().into_iter().filter(|(name, _)| *name != seat.config.name) {
            let seat = Arc::clone(&seat);
            tokio::spawn(async move {
                if greets {
                    let greet = Ask::Greet(seat.greeting().await);
                    if let Ok(answer) = seat.ask(&name, &peer, greet, seat.config.election_timeout).await {
                        seat.handle_greeted(name.clone(), answer);
                    }
                }
                if member
                    && let Ok(Answer::Canvass { standstill, .. }) =
                        seat.ask(&name, &peer, Ask::Canvass, seat.config.election_timeout).await
                    && !standstill.is_empty()
                {
                    seat.known().standstill = standstill;
                }
            });
        }
        let may_elect = state.version == 0 || member && self.in_reach(state, now) >= state.majority();
        self.seat.register().may_elect(may_elect);
        if state.version == 0 {
            forming::form(&self.seat);
        }
    }

    /// Members that answered lately, this one included.
    fn in_reach(&self, state: &ClusterState, now: Instant) -> usize {
        let lately = self.seat.config.election_timeout * 2;
        let answers = |(name, at): &(&MemberName, &Instant)| {
            state.members.contains_key(*name) && now.saturating_duration_since(**at) < lately
        };
        1 + self.seat.known().heard.iter().filter(answers).count()
    }

    /// What a member says that reaches too few others.
    fn alone(&self, state: &ClusterState, now: Instant) -> String {
        let lately = self.seat.config.election_timeout * 2;
        let known = self.seat.known();
        let silent = |name: &&MemberName| {
            let heard = known.heard.get(*name).is_some_and(|at| now.saturating_duration_since(*at) < lately);
            **name != self.seat.config.name && !heard
        };
        let silent: Vec<&str> = state.members.keys().filter(silent).map(MemberName::as_str).collect();
        let leader = state.leader.as_ref().map_or("nobody", MemberName::as_str);
        format!(
            "the leader, {leader}, is silent, and without a majority of {} members nobody replaces it: waiting for {}",
            state.majority(),
            silent.join(", ")
        )
    }

    /// Tells the node what it is, when that has changed.
    fn tell_node(&mut self, state: &ClusterState) {
        if state.version != self.told_version {
            self.told_version = state.version;
            self.keep_lease(state);
            self.seat.order(Order::State(Box::new(state.clone())));
        }
        let part = if self.seat.is_member(state) {
            state.part_of(&self.seat.config.name, self.lived_through)
        } else {
            Part::Wait(forming::waiting_for(&self.seat, state))
        };
        if self.told.as_ref() == Some(&part) {
            return;
        }
        if let Part::Lead(epoch) | Part::Follow(epoch) = part {
            // The first sign of life of a leader is that it was chosen.
            self.seat.known().voter.handle_beat(epoch, Instant::now());
        }
        match &part {
            Part::Lead(epoch) => {
                tracing::info!(%epoch, "chosen to lead");
                let lease = Lease::new(self.seat.config.election_timeout);
                self.lease = Some((*epoch, lease));
                self.beat_at = Instant::now();
                self.seat.order(Order::Lead(*epoch));
            }
            Part::Follow(epoch) => {
                self.drop_lease();
                if let (Some(leader), Some(peer)) = (&state.leader, state.leader_peer()) {
                    tracing::info!(%leader, %epoch, "following");
                    self.seat.order(Order::Follow { peer: peer.to_owned(), epoch: *epoch });
                }
            }
            Part::Wait(text) => {
                if !self.seat.is_member(state) {
                    tracing::info!("{text}");
                }
                self.drop_lease();
                self.seat.order(Order::Leaderless(text.clone()));
            }
        }
        self.told = Some(part);
    }

    /// The members may have changed: the lease rests on those that the register has now.
    fn keep_lease(&mut self, state: &ClusterState) {
        if let (Some((_, lease)), Some(node)) = (&mut self.lease, &self.seat.node) {
            lease.keep(|name| state.members.contains_key(name));
            node.shared.lease.set(lease.until(state.majority()));
            // A new member may be needed for it at once.
            self.beat_at = Instant::now();
        }
    }

    fn drop_lease(&mut self) {
        self.lease = None;
        if let Some(node) = &self.seat.node {
            node.shared.lease.set(None);
        }
    }

    /// Signs of life to every member, this one included: it is a voter like the others.
    fn beat(&mut self, state: &ClusterState, now: Instant) {
        let (Some((epoch, _)), Some(node)) = (&self.lease, &self.seat.node) else { return };
        if now < self.beat_at || node.shared.is_stuck(STUCK_TIME_MAX) {
            return;
        }
        self.beat_at = now + self.seat.config.heartbeat_interval;
        let beat = Beat {
            epoch: *epoch,
            leader: self.seat.config.name.clone(),
            client_address: self.seat.config.client_address.clone(),
            end: Lsn(node.shared.end.load(std::sync::atomic::Ordering::Relaxed)),
        };
        for (member, facts) in &state.members {
            let (seat, member, peer, beat) = (Arc::clone(&self.seat), member.clone(), facts.peer.clone(), beat.clone());
            tokio::spawn(async move {
                let (sent_at, epoch) = (Instant::now(), beat.epoch);
                let timeout = seat.config.election_timeout;
                if let Ok(Answer::Beat { granted, promised }) = seat.ask(&member, &peer, Ask::Beat(beat), timeout).await
                {
                    seat.event(Event::BeatAnswered { member, sent_at, epoch, granted, promised });
                }
            });
        }
    }

    fn handle_beat_answer(&mut self, event: Event, state: &ClusterState) {
        let Event::BeatAnswered { member, sent_at, epoch, granted, promised } = event else { return };
        let own_promise = self.seat.known().voter.promised();
        let Some((_, lease)) = self.lease.as_mut().filter(|(leading, _)| *leading == epoch) else { return };
        if own_promise > epoch || !state.members.contains_key(&member) {
            return;
        }
        if granted {
            lease.handle_grant(&member, sent_at);
            let until = lease.until(state.majority());
            if let Some(node) = &self.seat.node {
                node.shared.lease.set(until);
                node.waker.wake();
            }
        } else if promised > epoch {
            // A failover began and nobody finished it: that member follows us only in a later epoch.
            let (seat, aside) = (Arc::clone(&self.seat), Aside::For(self.seat.config.name.clone()));
            tokio::spawn(async move {
                let _ = seat.ask_controller(Ask::Aside(epoch, aside), seat.config.election_timeout).await;
            });
        }
    }

    /// The controller's part.
    fn replace_leader(&mut self, state: &ClusterState, now: Instant) {
        if state.version == 0 {
            return;
        }
        let controls = self.seat.register().controls() && self.seat.is_member(state);
        let (grant_left, promised) = {
            let known = self.seat.known();
            (known.voter.grant_left(now), known.voter.promised())
        };
        self.silence_said &= grant_left.is_zero();
        let effects = self.failover.poll(&Outlook { state, controls, grant_left, promised, now });
        for effect in effects {
            match effect {
                Effect::Canvass => self.canvass(state),
                Effect::Seal(epoch) => self.seal(state, epoch),
                Effect::Propose(change) => self.propose(change),
            }
        }
        if controls {
            let standstill = self.failover.standstill(state).map(|standstill| standstill.to_string());
            self.seat.known().standstill = standstill.unwrap_or_default();
        } else if grant_left.is_zero() && self.in_reach(state, now) < state.majority() {
            self.seat.known().standstill = self.alone(state, now);
        }
        if let Some(node) = &self.seat.node {
            let standstill = self.seat.known().standstill.clone();
            *node.shared.trouble.lock().expect("nobody panics with it") = standstill;
        }
        self.say_standstill(now);
    }

    /// A failover is over in a moment; one that is not is said once.
    fn say_standstill(&mut self, now: Instant) {
        let text = self.seat.known().standstill.clone();
        let (since, said) = match self.standstill {
            _ if text.is_empty() => return self.standstill = None,
            None => (now, false),
            Some(known) => known,
        };
        let due = !said && now.saturating_duration_since(since) >= STANDSTILL_TIME_MAX;
        if due {
            tracing::warn!("{text}");
        }
        self.standstill = Some((since, said || due));
    }

    fn canvass(&mut self, state: &ClusterState) {
        if !std::mem::replace(&mut self.silence_said, true) {
            let leader = state.leader.as_ref().map_or("nobody", MemberName::as_str);
            tracing::info!(leader, "the leader is silent, asking the others");
        }
        for (member, facts) in &state.members {
            let (seat, member, peer) = (Arc::clone(&self.seat), member.clone(), facts.peer.clone());
            tokio::spawn(async move {
                let answer = seat.ask(&member, &peer, Ask::Canvass, seat.config.election_timeout).await;
                if let Ok(Answer::Canvass { silent, .. }) = answer {
                    seat.event(Event::Canvassed(member, silent));
                }
            });
        }
    }

    fn seal(&mut self, state: &ClusterState, epoch: Epoch) {
        for (member, facts) in &state.members {
            if self.sealing.get(member) == Some(&epoch) {
                continue;
            }
            self.sealing.insert(member.clone(), epoch);
            let (seat, member, peer) = (Arc::clone(&self.seat), member.clone(), facts.peer.clone());
            tokio::spawn(async move {
                let timeout = seat.config.election_timeout * 4;
                let answer = seat.ask(&member, &peer, Ask::Seal(epoch), timeout).await;
                let sealed = match answer {
                    Ok(Answer::Sealed { id, promised, last_epoch, flushed, grant_left_us }) => {
                        let granted_until = Instant::now() + Duration::from_micros(grant_left_us);
                        tracing::info!(%member, %epoch, %last_epoch, %flushed, "sealed");
                        Some(Sealed { id, promised, last_epoch, flushed, granted_until })
                    }
                    Ok(Answer::Refused(text)) => {
                        tracing::warn!(%member, "not sealed: {text}");
                        None
                    }
                    _ => None,
                };
                seat.event(Event::Sealed(member, sealed));
            });
        }
    }

    fn propose(&self, change: Change) {
        let seat = Arc::clone(&self.seat);
        tokio::spawn(async move {
            let (epoch, leader) = (change.state.epoch, change.state.leader.clone());
            match seat.register().change(change, CHANGE_TIME_MAX).await {
                Ok(outcome) => {
                    tracing::info!(%epoch, leader = ?leader.as_ref().map(MemberName::as_str), ?outcome, "a new leader")
                }
                Err(error) => tracing::warn!(%epoch, "a new leader could not be agreed on: {error}"),
            }
            seat.event(Event::Proposed);
        });
    }

    fn handle_event(&mut self, event: Event, state: &ClusterState) {
        match event {
            Event::Look => {}
            Event::Stranger(greeting) => {
                let anew = !state.knows(&greeting.name, greeting.id);
                if anew && !self.taking_back && self.seat.register().controls() {
                    self.taking_back = forming::take_back(&self.seat, greeting, state);
                }
            }
            Event::Aside(epoch, aside) => self.failover.handle_aside(state, epoch, aside),
            Event::AllowUnclean => self.failover.allow_unclean(state.epoch),
            Event::Canvassed(member, silent) => self.failover.handle_canvass(&member, silent),
            Event::Sealed(member, sealed) => {
                self.sealing.remove(&member);
                if let Some(sealed) = sealed {
                    self.failover.handle_sealed(state, &member, sealed);
                }
            }
            Event::BeatAnswered { .. } => self.handle_beat_answer(event, state),
            Event::Proposed => self.failover.handle_proposed(),
            Event::InSyncChanged => self.in_sync_changing = false,
            Event::TakenBack => self.taking_back = false,
            Event::Removed(version) => self.removed = self.removed.or(Some((version, Instant::now()))),
            Event::SeatsChanged(done) => {
                self.seats_changing = false;
                self.seats_at = Instant::now() + if done { Duration::ZERO } else { RETRY_PAUSE };
            }
            Event::WholeChanged(done) => {
                self.whole_changing = false;
                self.whole_at = Instant::now() + if done { Duration::ZERO } else { RETRY_PAUSE };
            }
        }
    }

    fn handle_report(&mut self, report: Report, state: &ClusterState) {
        match report {
            Report::InSync(epoch, members) => self.wanted_in_sync = Some((epoch, members)),
            Report::Unfit(epoch) => {
                // Signs of life end: whoever controls then may find this node unfit without being told.
                self.drop_lease();
                let seat = Arc::clone(&self.seat);
                tokio::spawn(async move {
                    let _ = seat.ask_controller(Ask::Aside(epoch, Aside::Unfit), seat.config.election_timeout).await;
                });
            }
            Report::Command(command, reply) => self.handle_command(command, reply, state.clone()),
        }
    }

    /// Puts what the leader sees into the register, which releases what waits for it.
    fn keep_in_sync(&mut self, state: &ClusterState, now: Instant) {
        let leads = state.leader.as_ref() == Some(&self.seat.config.name);
        let Some((epoch, wanted)) = self.wanted_in_sync.clone().filter(|_| leads) else { return };
        if epoch != state.epoch {
            return;
        }
        let joins =
            |name: &&MemberName| state.members.get(*name).is_some_and(|member| member.holding == Holding::Joining);
        if let Some(name) = wanted.iter().find(joins) {
            self.let_count(name, state.members[name].id, now);
        }
        if self.in_sync_changing {
            return;
        }
        let Some(next) = state.with_in_sync(&wanted) else { return };
        self.in_sync_changing = true;
        let seat = Arc::clone(&self.seat);
        tokio::spawn(async move {
            let change = Ask::Change(Box::new(Change { state: next }));
            if let Err(error) = seat.ask_controller(change, CHANGE_TIME_MAX).await {
                tracing::debug!("the in-sync set could not be changed: {error}");
                tokio::time::sleep(seat.config.heartbeat_interval).await;
            }
            seat.event(Event::InSyncChanged);
        });
    }

    /// A member that joined keeps up: from now on its confirmations count.
    fn let_count(&mut self, name: &MemberName, id: MemberId, now: Instant) {
        if self.whole_changing || now < self.whole_at {
            return;
        }
        self.whole_changing = true;
        let (seat, name) = (Arc::clone(&self.seat), name.clone());
        tokio::spawn(async move {
            let outcome = changes::make_whole(&seat, &name, id).await;
            if let Err(text) = &outcome {
                tracing::warn!(member = %name, "it has caught up but does not count yet: {text}");
            }
            seat.event(Event::WholeChanged(outcome.is_ok()));
        });
    }

    /// The controller's part: the register's voters follow the members.
    fn keep_seats(&mut self, state: &ClusterState, now: Instant) {
        let register = self.seat.register();
        let idle = state.version > 0 && !self.seats_changing && !self.taking_back && now >= self.seats_at;
        if !idle || !register.controls() || !self.seat.is_member(state) {
            return;
        }
        let mut members: BTreeMap<MemberId, String> =
            state.members.values().map(|member| (member.id, member.peer.clone())).collect();
        {
            let admitted = &mut self.seat.known().admitted;
            admitted.retain(|id, (_, since)| {
                now.saturating_duration_since(*since) < ADMITTED_TIME_MAX && !members.contains_key(id)
            });
            members.extend(admitted.iter().map(|(id, (peer, _))| (*id, peer.clone())));
        }
        let voters = state.voters(&register.voters());
        if register.is_seated(&members, &voters) {
            return;
        }
        self.seats_changing = true;
        let seat = Arc::clone(&self.seat);
        tokio::spawn(async move {
            let outcome = seat.register().seat_members(&members, &voters, SEATS_TIME_MAX).await;
            if let Err(error) = &outcome {
                tracing::debug!("the register's voters cannot follow the members yet: {error}");
            }
            seat.event(Event::SeatsChanged(outcome.is_ok()));
        });
    }

    fn handle_command(&self, command: Command, reply: Reply, state: ClusterState) {
        let seat = Arc::clone(&self.seat);
        tokio::spawn(async move {
            let outcome = match command {
                Command::Switchover(to) => switchover(&seat, to, &state).await,
                Command::AllowUnclean => allow_unclean(&seat, &state).await,
                Command::Join(name, peer) => ask_leader(&seat, &state, Ask::Join(name, peer)).await,
                Command::Remove(name) => ask_leader(&seat, &state, Ask::Remove(name)).await,
            };
            *reply.lock().expect("nobody panics with it") = Some(outcome);
            if let Some(node) = &seat.node {
                node.waker.wake();
            }
        });
    }
}

/// Who takes over when nobody is named: not the member that controls the register, if there is another, so that a later death of
/// the leader takes nobody along who has to replace it.
fn handover_to(state: &ClusterState, controller: Option<MemberId>) -> Option<MemberName> {
    let controls = |name: &&MemberName| state.members.get(*name).map(|member| member.id) == controller;
    state.in_sync.iter().min_by_key(controls).cloned()
}

/// Brings a command to the leader, and its answer back.
async fn ask_leader(seat: &Arc<Seat>, state: &ClusterState, ask: Ask) -> Result<String, String> {
    if !seat.is_member(state) {
        return Err(forming::waiting_for(seat, state));
    }
    let Some((leader, peer)) = state.leader.clone().zip(state.leader_peer()) else {
        return Err("nobody leads at the moment: members change only under a leader".to_owned());
    };
    match seat.ask(&leader, peer, ask, changes::COMMAND_TIME_MAX).await {
        Ok(Answer::Told(text)) => Ok(text),
        Ok(Answer::Refused(text)) => Err(text),
        Ok(_) => Err(format!("the leader {leader}: not an answer")),
        Err(error) => {
            let standstill = seat.known().standstill.clone();
            let awaited = if standstill.is_empty() { String::new() } else { format!("; {standstill}") };
            Err(format!("the leader {leader}: {error}{awaited}"))
        }
    }
}

/// Another leader: the old one takes no writes until the new one has everything, then it steps aside.
async fn switchover(seat: &Arc<Seat>, to: Option<MemberName>, state: &ClusterState) -> Result<String, String> {
    let leader = state.leader.clone().ok_or("nobody leads: there is nothing to switch over from")?;
    let peer = state.leader_peer().unwrap_or_default().to_owned();
    let to = match to {
        Some(to) => to,
        None => handover_to(state, seat.register().controller()).ok_or("no replica is in sync: name one with TO")?,
    };
    match state.members.get(&to) {
        None => return Err(format!("{to} is not a member")),
        Some(member) if member.kind == Kind::Witness => {
            return Err(format!("{to} is a witness: it has no log to lead with"));
        }
        Some(_) if to == leader => return Err(format!("{to} leads already")),
        Some(_) => {}
    }
    let begun = Instant::now();
    let refused = |answer: std::io::Result<Answer>, what: &str| match answer {
        Ok(Answer::Done) => Ok(()),
        Ok(Answer::Refused(text)) => Err(text),
        Ok(_) => Err(format!("{what}: not an answer")),
        Err(error) => Err(format!("{what}: {error}")),
    };
    let drained = seat.ask(&leader, &peer, Ask::Drain(state.epoch, to.clone()), SWITCHOVER_TIME_MAX).await;
    refused(drained, &format!("the leader {leader}"))?;
    let aside = Ask::Aside(state.epoch, Aside::For(to.clone()));
    refused(seat.ask_controller(aside, seat.config.election_timeout).await, "the controller")?;
    let mut watch = seat.register().watch();
    let moved = watch.wait_for(|now| now.epoch > state.epoch);
    let now = match tokio::time::timeout(SWITCHOVER_TIME_MAX, moved).await {
        Ok(Ok(now)) => now.clone(),
        _ => {
            return Err(format!(
                "no new leader within {SWITCHOVER_TIME_MAX:?}; `walferry describe` tells what is awaited"
            ));
        }
    };
    let new = now.leader.as_ref().map_or("nobody", MemberName::as_str);
    let text = format!("{new} leads in epoch {} ({:?})", now.epoch, begun.elapsed());
    if now.leader.as_ref() == Some(&to) {
        Ok(text)
    } else {
        Err(format!("{text}: {to} was not heard in time, or its log did not reach as far"))
    }
}

/// A leader at the price of confirmed commits.
async fn allow_unclean(seat: &Arc<Seat>, state: &ClusterState) -> Result<String, String> {
    let known = seat.known().leader_end;
    match seat.ask_controller(Ask::AllowUnclean, seat.config.election_timeout).await {
        Ok(Answer::Done) => {}
        Ok(Answer::Refused(text)) => return Err(text),
        Ok(_) => return Err("the controller: not an answer".to_owned()),
        Err(error) => return Err(format!("the controller: {error}")),
    }
    let mut watch = seat.register().watch();
    let moved = watch.wait_for(|now| now.epoch > state.epoch);
    let now = match tokio::time::timeout(SWITCHOVER_TIME_MAX, moved).await {
        Ok(Ok(now)) => now.clone(),
        _ => return Err("no failover was under way, or no majority of the voters answers".to_owned()),
    };
    let new = now.leader.as_ref().map_or("nobody", MemberName::as_str);
    Ok(format!(
        "{new} leads in epoch {}; the old leader was last heard at {known}: what lies between may be lost",
        now.epoch
    ))
}

#[cfg(test)]
mod tests {
    use walferry_cluster::register::Member;

    use super::*;

    #[test]
    fn a_handover_avoids_the_member_that_controls_the_register() {
        let name = |text: &str| text.parse::<MemberName>().expect("a name");
        let member =
            |id| Member { id: MemberId(id), peer: "h:1".to_owned(), kind: Kind::Data, holding: Holding::Whole };
        let mut state = ClusterState::default();
        for (id, text) in [(1, "a"), (2, "b"), (3, "c")] {
            state.members.insert(name(text), member(id));
        }
        assert_eq!(handover_to(&state, None), None, "nobody is in sync");
        state.in_sync = [name("b"), name("c")].into();
        assert_eq!(handover_to(&state, Some(MemberId(2))), Some(name("c")));
        assert_eq!(handover_to(&state, Some(MemberId(1))), Some(name("b")));
        state.in_sync = [name("b")].into();
        assert_eq!(handover_to(&state, Some(MemberId(2))), Some(name("b")), "there is no other");
    }
}
