//! A member's seat: what it knows and has promised, and its answers to the others. Shared by the driver, which acts, and the
//! connections, which only ask. Holds no decision about a failover.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use walferry_cluster::MemberName;
use walferry_cluster::consensus::{Carrier, Register, RegisterStore, Rpc, RpcReply};
use walferry_cluster::control::{Answer, Ask, Beat, Greeting, Strangeness};
use walferry_cluster::failover::Aside;
use walferry_cluster::lease::Voter;
use walferry_cluster::register::{ClusterState, MemberId};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_tls::PeerTls;

use super::changes::{self, ADMIT_TIME_MAX};
use super::driver::NodeEnd;
use super::wire::{Answering, Peer};
use super::{ClusterConfig, Order, Reach};

/// A change of the register that takes longer has failed or is on its way; both are seen in the register.
pub(super) const CHANGE_TIME_MAX: Duration = Duration::from_secs(5);

/// What the connections tell the driver.
pub(super) enum Event {
    /// Something that the driver looks at by itself has moved.
    Look,
    /// A node that is no member, or another life of one, is there.
    Stranger(Greeting),
    /// This life was removed with this version of the register.
    Removed(u64),
    /// The leader of this epoch consents to being replaced.
    Aside(Epoch, Aside),
    /// An operator accepts losses.
    AllowUnclean,
    /// A member answered a canvass.
    Canvassed(MemberName, bool),
    /// A member is sealed, or was not reached.
    Sealed(MemberName, Option<walferry_cluster::failover::Sealed>),
    /// A member answered a beat that was sent then.
    BeatAnswered { member: MemberName, sent_at: Instant, epoch: Epoch, granted: bool, promised: Epoch },
    /// A proposal came back.
    Proposed,
    /// A change of the in-sync set came back.
    InSyncChanged,
    /// A member was taken back, or not.
    TakenBack,
    /// The register's voters follow the members, or could not.
    SeatsChanged(bool),
    /// A member that joined counts now, or not yet.
    WholeChanged(bool),
}

/// What is known of the others.
pub(super) struct Known {
    pub(super) voter: Voter,
    pub(super) greetings: BTreeMap<MemberName, Greeting>,
    /// When each other member answered last.
    pub(super) heard: BTreeMap<MemberName, Instant>,
    /// The leader's end of log as last heard.
    pub(super) leader_end: Lsn,
    /// Where its clients are.
    pub(super) leader_address: String,
    /// What a failover here waits for; empty when none is under way or another member controls.
    pub(super) standstill: String,
    /// What a member said to this node, which is none.
    pub(super) strangeness: Option<Strangeness>,
    /// The change of the membership that is under way here.
    pub(super) changing: String,
    /// Lives that are told the register although they are no members yet, where, and since when.
    pub(super) admitted: BTreeMap<MemberId, (String, Instant)>,
}

impl Known {
    /// Where a node that greeted said that it is reached.
    pub(super) fn own_peer(&self, name: &MemberName) -> Option<String> {
        let members = self.greetings.get(name)?.members.iter();
        let own = members.filter_map(|text| text.split_once('=')).find(|(member, _)| *member == name.as_str());
        Some(own?.1.to_owned())
    }
}

pub(super) struct Seat {
    pub(super) config: ClusterConfig,
    pub(super) store: RegisterStore,
    pub(super) me: MemberId,
    register: OnceLock<Register>,
    known: Mutex<Known>,
    pub(super) peers: Peers,
    /// Held by the one change of the membership that is under way.
    pub(super) changing: Arc<tokio::sync::Mutex<()>>,
    events: mpsc::UnboundedSender<Event>,
    pub(super) node: Option<NodeEnd>,
}

/// Ways to other members, by their address.
#[derive(Clone)]
pub(super) struct Peers {
    known: Arc<Mutex<HashMap<String, Arc<Peer>>>>,
    tls: Option<Arc<PeerTls>>,
}

impl Peers {
    fn new(tls: Option<Arc<PeerTls>>) -> Peers {
        Peers { known: Arc::default(), tls }
    }

    pub(super) fn at(&self, address: &str) -> Arc<Peer> {
        let mut peers = self.known.lock().expect("nobody panics with it");
        Arc::clone(peers.entry(address.to_owned()).or_insert_with(|| Arc::new(Peer::new(address, self.tls.clone()))))
    }
}

impl Carrier for Peers {
    fn carry(
        &self,
        to: MemberId,
        peer: &str,
        rpc: Rpc,
        timeout: Duration,
    ) -> std::pin::Pin<Box<dyn Future<Output = io::Result<RpcReply>> + Send>> {
        let peer = self.at(peer);
        Box::pin(async move {
            match peer.ask(&Ask::Consensus(to, Box::new(rpc)), timeout).await? {
                Answer::Consensus(reply) => Ok(*reply),
                Answer::Refused(text) => Err(io::Error::other(text)),
                _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is not to what was asked")),
            }
        })
    }
}

impl Seat {
    pub(super) fn new(
        config: ClusterConfig,
        store: RegisterStore,
        node: Option<NodeEnd>,
        events: mpsc::UnboundedSender<Event>,
    ) -> Seat {
        let voter = Voter::new(store.promised(), config.election_timeout, Instant::now());
        let known = Known {
            voter,
            greetings: BTreeMap::new(),
            heard: BTreeMap::new(),
            leader_end: Lsn::ZERO,
            leader_address: String::new(),
            standstill: String::new(),
            strangeness: None,
            changing: String::new(),
            admitted: BTreeMap::new(),
        };
        let me = store.identity().id;
        Seat {
            peers: Peers::new(config.tls.peer()),
            config,
            store,
            me,
            register: OnceLock::new(),
            known: Mutex::new(known),
            changing: Arc::default(),
            events,
            node,
        }
    }

    pub(super) fn carrier(&self) -> Arc<dyn Carrier> {
        Arc::new(self.peers.clone())
    }

    pub(super) fn open(&self, register: Register) {
        assert!(self.register.set(register).is_ok(), "the register is opened once");
    }

    pub(super) fn register(&self) -> &Register {
        self.register.get().expect("the register is open before anybody is answered")
    }

    pub(super) fn state(&self) -> ClusterState {
        self.register().state()
    }

    pub(super) fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().expect("nobody panics with it")
    }

    pub(super) fn event(&self, event: Event) {
        // The driver ends with the thread.
        let _ = self.events.send(event);
    }

    pub(super) fn order(&self, order: Order) {
        if let Some(node) = &self.node {
            node.order(order);
        }
    }

    /// True when this life of this node is a member.
    pub(super) fn is_member(&self, state: &ClusterState) -> bool {
        state.knows(&self.config.name, self.me)
    }

    /// Every member's name and peer address: as the register has them, before that as they were given.
    pub(super) fn members(&self) -> Vec<(MemberName, String)> {
        let state = self.state();
        if state.version == 0 {
            return self.config.members.iter().map(|(name, peer)| (name.clone(), peer.to_string())).collect();
        }
        state.members.into_iter().map(|(name, member)| (name, member.peer)).collect()
    }

    /// Asks a member, this one without a socket.
    pub(super) async fn ask(
        self: &Arc<Seat>,
        name: &MemberName,
        peer: &str,
        ask: Ask,
        timeout: Duration,
    ) -> io::Result<Answer> {
        if *name == self.config.name {
            return Ok(Arc::clone(self).answer(ask).await);
        }
        let answer = self.peers.at(peer).ask(&ask, timeout).await;
        if answer.is_ok() {
            self.known().heard.insert(name.clone(), Instant::now());
        }
        answer
    }

    /// Asks whoever controls the register.
    pub(super) async fn ask_controller(self: &Arc<Seat>, ask: Ask, timeout: Duration) -> io::Result<Answer> {
        let state = self.state();
        let controller = self.register().controller();
        let found = controller.and_then(|id| state.members.iter().find(|(_, member)| member.id == id));
        let Some((name, member)) = found else {
            return Err(io::Error::other("nobody controls the register at the moment"));
        };
        self.ask(name, &member.peer, ask, timeout).await
    }

    pub(super) async fn greeting(&self) -> Greeting {
        let state = self.state();
        Greeting {
            name: self.config.name.clone(),
            id: self.me,
            kind: self.config.kind,
            formed: self.register().is_formed().await,
            cluster_id: if state.version > 0 { Some(state.cluster_id) } else { self.config.cluster_id },
            members: self.config.members.texts(),
            client_address: self.config.client_address.clone(),
        }
    }

    async fn answer_greeting(&self, theirs: Greeting) -> Answer {
        let state = self.state();
        if state.version == 0 && !theirs.formed && theirs.members != self.config.members.texts() {
            let text = format!(
                "{} was started with --members {}, {} with --members {}: to form a cluster give every node the same",
                theirs.name,
                theirs.members.join(","),
                self.config.name,
                self.config.members
            );
            tracing::error!("{text}");
            return Answer::Refused(text);
        }
        let ours = self.greeting().await;
        let answer = match state.version > 0 && !state.knows(&theirs.name, theirs.id) {
            true => Answer::Stranger(Strangeness {
                member: ours,
                cluster_id: state.cluster_id,
                version: state.version,
                removed_at: state.removed_at(theirs.id),
                name_known: state.members.contains_key(&theirs.name),
            }),
            false => Answer::Greeting(ours),
        };
        if matches!(&answer, Answer::Stranger(said) if said.name_known) && self.register().controls() {
            self.event(Event::Stranger(theirs.clone()));
        }
        self.known().greetings.insert(theirs.name.clone(), theirs);
        answer
    }

    /// What a member answered to a greeting.
    pub(super) fn handle_greeted(&self, name: MemberName, answer: Answer) {
        match answer {
            Answer::Greeting(theirs) => drop(self.known().greetings.insert(name, theirs)),
            Answer::Stranger(said) => {
                let state = self.state();
                // Only the register of its own cluster can say that a life is over.
                let removed_at = said.removed_at.filter(|_| state.version > 0 && said.cluster_id == state.cluster_id);
                if let Some(version) = removed_at {
                    self.event(Event::Removed(version));
                }
                let mut known = self.known();
                known.greetings.insert(name, said.member.clone());
                // Any member can be asked: the first one that answered is named.
                let news = |old: &Strangeness| (old.cluster_id, old.name_known) != (said.cluster_id, said.name_known);
                if known.strangeness.as_ref().is_none_or(news) {
                    known.strangeness = Some(said);
                }
            }
            _ => return,
        }
        self.event(Event::Look);
    }

    fn answer_beat(&self, beat: Beat) -> Answer {
        let epoch = self.state().epoch;
        let mut known = self.known();
        // What the register says binds as well: a member may have promised nothing in this life yet.
        let granted = beat.epoch >= epoch && known.voter.handle_beat(beat.epoch, Instant::now());
        let promised = known.voter.promised();
        if granted {
            known.leader_end = beat.end;
            known.standstill.clear();
            if known.leader_address != beat.client_address {
                known.leader_address.clone_from(&beat.client_address);
                self.order(Order::LeaderAddress(beat.client_address));
            }
        }
        Answer::Beat { granted, promised }
    }

    /// Persists the promise, then stops everything that it forbids, then says how far the log is.
    async fn answer_seal(&self, epoch: Epoch) -> Answer {
        let current = self.state().epoch;
        if epoch <= current {
            return Answer::Refused(format!(
                "{}: epoch {current} has begun already, {epoch} is over",
                self.config.name
            ));
        }
        if let Err(error) = self.store.promise(epoch).await {
            return Answer::Refused(format!("{} cannot promise: {error}", self.config.name));
        }
        self.known().voter.promise(epoch);
        let reach = match &self.node {
            None => Reach::default(),
            Some(node) => {
                node.shared.lease.set(None);
                let (sender, reach) = oneshot::channel();
                node.order(Order::Seal(epoch, sender));
                match reach.await {
                    Ok(reach) => reach,
                    Err(_) => return Answer::Refused(format!("the log of {} is stopped", self.config.name)),
                }
            }
        };
        let known = self.known();
        let grant_left_us = known.voter.grant_left(Instant::now()).as_micros() as u64;
        let promised = known.voter.promised();
        let id = self.me;
        Answer::Sealed { id, promised, last_epoch: reach.last_epoch, flushed: reach.flushed, grant_left_us }
    }

    async fn answer_change(&self, change: walferry_cluster::register::Change) -> Answer {
        match self.register().change(change, CHANGE_TIME_MAX).await {
            Ok(outcome) => Answer::Change(outcome),
            Err(error) => Answer::Refused(error.to_string()),
        }
    }

    /// To the controller: a node that is about to join gets the register.
    async fn answer_admit(&self, id: MemberId, peer: String) -> Answer {
        self.known().admitted.insert(id, (peer.clone(), Instant::now()));
        if self.register().tells(id) {
            return Answer::Done;
        }
        match self.register().admit(id, peer, ADMIT_TIME_MAX).await {
            Ok(()) => Answer::Done,
            Err(error) => Answer::Refused(error.to_string()),
        }
    }

    async fn answer_drain(&self, epoch: Epoch, to: MemberName) -> Answer {
        let leads = self.state().leader.as_ref() == Some(&self.config.name) && self.state().epoch == epoch;
        let Some(node) = self.node.as_ref().filter(|_| leads) else {
            return Answer::Refused(format!("{} does not lead in epoch {epoch}", self.config.name));
        };
        let (sender, drained) = oneshot::channel();
        node.order(Order::Drain(to, sender));
        match drained.await {
            Ok(Ok(())) => Answer::Done,
            Ok(Err(text)) => Answer::Refused(text),
            Err(_) => Answer::Refused(format!("{} stopped", self.config.name)),
        }
    }

    fn controls(&self, event: Event) -> Answer {
        if !self.register().controls() {
            return Answer::Refused(format!("{} does not control the register", self.config.name));
        }
        self.event(event);
        Answer::Done
    }
}

fn told(outcome: Result<String, String>) -> Answer {
    outcome.map_or_else(Answer::Refused, Answer::Told)
}

impl Answering for Seat {
    async fn answer(self: Arc<Seat>, ask: Ask) -> Answer {
        let for_members = !matches!(ask, Ask::Greet(_) | Ask::Consensus(..));
        let state = self.state();
        if for_members && !self.is_member(&state) {
            return Answer::Refused(format!("{} is not a member yet", self.config.name));
        }
        match ask {
            Ask::Greet(theirs) => self.answer_greeting(theirs).await,
            Ask::Beat(beat) => self.answer_beat(beat),
            Ask::Canvass => {
                let known = self.known();
                let silent = state.leader.is_none() || known.voter.grant_left(Instant::now()).is_zero();
                Answer::Canvass { silent, standstill: known.standstill.clone() }
            }
            Ask::Seal(epoch) => self.answer_seal(epoch).await,
            Ask::Change(change) => self.answer_change(*change).await,
            Ask::Aside(epoch, aside) => self.controls(Event::Aside(epoch, aside)),
            Ask::AllowUnclean => self.controls(Event::AllowUnclean),
            Ask::Drain(epoch, to) => self.answer_drain(epoch, to).await,
            Ask::Consensus(to, _) if to != self.me => {
                Answer::Refused(format!("{} has begun anew as {}: {to} is gone", self.config.name, self.me))
            }
            Ask::Consensus(_, rpc) => match self.register().answer(*rpc).await {
                Ok(reply) => Answer::Consensus(Box::new(reply)),
                Err(error) => Answer::Refused(error.to_string()),
            },
            Ask::Join(name, peer) => told(changes::join(self, name, peer).await),
            Ask::Remove(name) => told(changes::remove(self, name).await),
            Ask::Admit(id, peer) => self.answer_admit(id, peer).await,
        }
    }

    fn log_connection(&self, socket: OwnedFd, address: SocketAddr) {
        self.order(Order::Connection(socket, address));
    }
}
