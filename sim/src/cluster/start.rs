//! How a run begins: machines, clocks, network and clients are made from the seed, and the first events are queued.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use walferry_cluster::ClusterId;
use walferry_cluster::register::{ClusterState, MemberId};
use walferry_engine::world::simulated::{World, enter};

use super::event::Event;
use super::machine::Node;
use super::outcome::Variation;
use super::{Cluster, ELECTION_TIMEOUT, HEARTBEAT_INTERVAL, SECOND_US, register};
use crate::clients::{Client, Told};
use crate::control::{Setting, name_of};
use crate::events::Events;
use crate::faults::{Plan, RunRequest};
use crate::model::Model;
use crate::network::{Network, peer_address};
use crate::trace::Trace;
use crate::world::{Clock, DRIFT_PPM_MAX, SimWorld};

impl Cluster {
    /// A run of this seed.
    pub fn new(seed: u64, variation: Variation, wanted: &RunRequest<'_>, trace: Trace) -> Cluster {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut plan = Plan::new(&mut rng);
        if !wanted.faults.is_empty() {
            plan.set_faults(wanted.faults.to_vec());
        }
        if wanted.wide {
            plan.widen(&mut fastrand::Rng::with_seed(!seed));
        }
        (wanted.tune)(&mut plan);
        if variation != Variation::Faults {
            plan.make_calm(seed);
        }
        let network = Rc::new(RefCell::new(Network::new(plan.machines(), plan.delays, rng.u64(..))));
        let clock = |rng: &mut fastrand::Rng| Clock {
            drift_ppm: rng.i64(-DRIFT_PPM_MAX..=DRIFT_PPM_MAX),
            wall_offset_us: rng.i64(-(SECOND_US as i64)..=SECOND_US as i64),
            suspended_us: 0,
        };
        let clocks = (0..plan.machines()).map(|_| clock(&mut rng)).collect();
        let world = Rc::new(SimWorld::new(rng.u64(..), clocks, Rc::clone(&network)));
        enter(Some(world.clone() as Rc<dyn World>));
        let root = tempfile::Builder::new().prefix("sim").tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        let root = root.expect("a directory for the nodes' files");
        std::env::set_current_dir(root.path()).expect("a directory just made");
        let mut members = BTreeMap::new();
        let mut nodes = Vec::new();
        for node in 0..plan.machines() {
            let id = MemberId(rng.u64(1..));
            if node < plan.nodes || plan.is_witness(node) {
                members.insert(name_of(node), peer_address(node));
            }
            nodes.push(Node::new(node, id, plan.disk));
        }
        let cluster_id = ClusterId(u128::from(rng.u64(1..)));
        let setting = Setting {
            members,
            cluster_id,
            policy: plan.policy.to_owned(),
            min_in_sync: plan.min_in_sync,
            election_timeout: ELECTION_TIMEOUT,
            heartbeat_interval: HEARTBEAT_INTERVAL,
        };
        let clients = plan.clients.iter().enumerate().map(|(number, kind)| {
            let nodes = plan.data_nodes().len();
            Client::new(number, *kind, nodes, plan.tempo, plan.answers(), rng.u64(..))
        });
        let clients = clients.collect();
        let mut cluster = Cluster {
            world,
            network,
            events: Events::default(),
            last_event: 0,
            now_us: 0,
            nodes,
            clients,
            told: Told::default(),
            setting,
            register: ClusterState::default(),
            engine: register::Engine::default(),
            controller: None,
            controller_lost_us: None,
            asks: BTreeMap::new(),
            last_ask: 0,
            last_session: 0,
            network_at: None,
            leaders: Vec::new(),
            confirmed: BTreeMap::new(),
            spoke: BTreeMap::new(),
            plan,
            rng,
            variation,
            calm: false,
            faults: 0,
            restarts: 0,
            snapshots: 0,
            kills_fenced_until: 0,
            cut_off: Vec::new(),
            ambush: None,
            leaderless_us: None,
            led: BTreeMap::new(),
            led_in: BTreeSet::new(),
            model: Model::default(),
            trace,
            _root: root,
        };
        cluster.begin();
        cluster
    }

    fn begin(&mut self) {
        for node in 0..self.nodes.len() {
            self.at(node as u64 * 1_000, Event::Start(node));
        }
        self.at(5_000, Event::Controller);
        for client in 0..self.clients.len() {
            self.at(50_000 + client as u64 * 3_000, Event::Client(client, 0));
        }
        if self.variation == Variation::Faults {
            self.at(1_200_000, Event::Fault);
        } else if self.variation != Variation::Calm {
            self.at(1_000_000, Event::Replica);
        }
    }
}
