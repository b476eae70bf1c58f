//! The node as its sessions see it: `Host`, and what INFO, ROLE and CONFIG tell. Decides nothing; every number comes from the
//! log, the store or the links.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use walferry_applier::pending::Pending;
use walferry_applier::store::{KeyCount, Store, StoreError};
use walferry_cluster::MemberName;
use walferry_cluster::level::CommitLevel;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::log::AppendError;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::mutants;
use walferry_engine::world;
use walferry_shipper::slots::SLOTS_MAX;
use walferry_shipper::status::{ReplicaStatus, SentBytes, SlotStatus};

use crate::clients::list::{Asked, ClientAsk, ClientReply};
use crate::cluster::{Command, Reply};
use crate::config::Redirect;
use crate::logging;
use crate::membership::Membership;
use crate::metrics::text::Snapshot;
use crate::metrics::waterfall::Stage as CommitStage;
use crate::metrics::waterfall_report;
use crate::node::base::receiving;
use crate::node::{Node, Role};
use crate::session::command::refusal_text;
use crate::session::host::{
    Evidence, Following, Host, InfoSection, NodeFacts, NodeRole, Refusal, ReplicaEvidence, ReplicationRow, SessionId,
    Stage, Wait,
};
use crate::session::reading::Strong;
use crate::users::login::Job;

impl Host for Node {
    fn now(&self) -> Instant {
        Node::now(self)
    }

    fn clock(&self) -> Instant {
        world::now()
    }

    fn turn_time(&self) -> Duration {
        world::now().saturating_duration_since(self.now())
    }

    fn report_slow(&mut self, command: &'static str, took: Duration) {
        self.watchdog.command(command, took);
    }

    fn wall_clock_us(&self) -> u64 {
        self.wall_us()
    }

    fn store(&self) -> &Store {
        &self.store
    }

    fn pending(&self) -> &Pending {
        &self.pending
    }

    fn count_keys(&mut self) -> Result<KeyCount, StoreError> {
        self.count_some_keys()
    }

    fn writable(&self, level: CommitLevel) -> Result<(), Refusal> {
        let shipper = match &self.role {
            Role::Leader(_) if self.refuses_for_silence() => return Err(Refusal::NoLeader(self.why_silent())),
            Role::Leader(shipper) => shipper,
            Role::Replica(_) => return Err(self.not_here()),
            Role::Leaderless(reason) => return Err(Refusal::NoLeader(self.why_leaderless(reason))),
            Role::SteppedDown(reason) => return Err(Refusal::Stopped(reason.clone())),
        };
        if let Some(reason) = self.log.stopped() {
            return Err(Refusal::Stopped(reason.to_owned()));
        }
        match self.refuses(shipper, level) {
            Some(reason) => Err(Refusal::NoReplicas(reason)),
            None => Ok(()),
        }
    }

    fn commit(&mut self, record: &[u8], level: CommitLevel) -> Result<Lsn, Refusal> {
        self.writable(level)?;
        if !self.has_room() {
            return Err(Refusal::Busy);
        }
        if let Some(text) = self.store.lacks_space() {
            return Err(Refusal::NoSpace(text));
        }
        let lsn = self.log.append(record).map_err(|error| match error {
            AppendError::Busy => Refusal::Busy,
            AppendError::NoSpace(text) => Refusal::NoSpace(text),
            AppendError::TooLarge { .. } => Refusal::TooLarge(error.to_string()),
            AppendError::Stopped(text) => Refusal::Stopped(text),
        })?;
        // It decodes what was encoded a moment ago; only the store's file can fail here, and then the next turn ends the node.
        if let Err(error) = self.pending.record(lsn, record, &self.store) {
            return Err(Refusal::Stopped(error.to_string()));
        }
        if self.waterfall.begin(lsn, level, world::now)
            && level > CommitLevel::Local
            && let Role::Leader(shipper) = &mut self.role
        {
            shipper.trace(lsn);
        }
        Ok(lsn)
    }

    fn log_end(&self) -> Lsn {
        self.log.end()
    }

    fn flushed(&self) -> Lsn {
        self.log.flushed()
    }

    fn applied(&self) -> Lsn {
        self.store.applied()
    }

    fn released(&self, level: CommitLevel) -> Lsn {
        self.released_at(level)
    }

    fn met(&self, level: CommitLevel, lsn: Lsn) -> CommitLevel {
        if !level.is_remote() || mutants::is_on("claim-what-was-asked") {
            return level;
        }
        level.met(lsn, |lower| self.met_at(lower))
    }

    fn silent(&self) -> Option<String> {
        (matches!(self.role, Role::Leader(_)) && !self.may_speak()).then(|| self.why_silent())
    }

    fn unconfirmable(&self, level: CommitLevel) -> Option<String> {
        let Role::Leader(shipper) = &self.role else { return None };
        self.nobody_confirms(shipper, level)
    }

    fn settled(&self) -> Lsn {
        self.settled_at()
    }

    fn history(&self) -> &EpochHistory {
        &self.history
    }

    fn cluster_id(&self) -> u128 {
        self.known_cluster_id()
    }

    fn staleness(&self, now: Instant) -> Option<Duration> {
        self.staleness_at(now)
    }

    fn strong(&self, now: Instant) -> Strong {
        if let Err(refusal) = self.writable(CommitLevel::Off) {
            return Strong::Refused(refusal_text(&refusal));
        }
        if !self.may_speak_at(now) {
            return Strong::Refused(format!("CLUSTERDOWN {}", self.why_silent()));
        }
        if self.has_replayed() { Strong::Held } else { Strong::Replaying }
    }

    fn replicas_at(&self, stage: Stage, lsn: Lsn) -> usize {
        let Role::Leader(shipper) = &self.role else { return 0 };
        let level = match stage {
            Stage::Flushed => CommitLevel::RemoteFlush,
            Stage::Applied => CommitLevel::RemoteApply,
        };
        // As redis-server: a replica that is not connected does not count, whatever it confirmed once.
        shipper.count_at(level, lsn)
    }

    fn hold(&mut self, session: SessionId, level: CommitLevel, lsn: Lsn) {
        self.queue.hold(session, level, lsn);
    }

    fn hold_settled(&mut self, session: SessionId, lsn: Lsn) {
        self.queue.hold_settled(session, lsn);
    }

    fn park(&mut self, session: SessionId, wait: Wait) {
        if let Wait::Streams(_) = wait {
            self.store.watch_streams();
        }
        self.parking.park(session, wait);
    }

    fn unpark(&mut self, session: SessionId) {
        self.parking.unpark(session);
    }

    fn replication(&self) -> Vec<ReplicationRow> {
        let Role::Leader(shipper) = &self.role else { return Vec::new() };
        shipper.replicas().into_iter().map(replication_row).collect()
    }

    fn slots(&self) -> Result<Vec<SlotStatus>, String> {
        let Role::Leader(shipper) = &self.role else { return Err(self.no_slots()) };
        Ok(shipper.slots())
    }

    fn drop_slot(&mut self, name: &MemberName) -> Result<String, String> {
        match &mut self.role {
            Role::Leader(shipper) => shipper.drop_slot(name),
            _ => Err(self.no_slots()),
        }
    }

    fn evidence(&self, lsn: Lsn) -> Evidence {
        let replicas = match &self.role {
            Role::Leader(shipper) => shipper.evidence(lsn),
            Role::Replica(_) | Role::Leaderless(_) | Role::SteppedDown(_) => Vec::new(),
        };
        let write = self.log.last_write();
        let micros = |duration: std::time::Duration| duration.as_micros() as u64;
        Evidence {
            replicas: replicas
                .into_iter()
                .map(|(name, level)| ReplicaEvidence { name: name.to_string(), level })
                .collect(),
            stages_us: vec![("queue", micros(write.queue)), ("device", micros(write.device))],
        }
    }

    fn facts(&self) -> NodeFacts {
        NodeFacts {
            name: self.config.name.clone(),
            cluster_id: format!("{:032x}", self.known_cluster_id()),
            epoch: self.history.last_epoch(),
            role: self.node_role(),
            following: self.following(),
            port: self.client_address.port(),
            uptime_s: (world::now() - self.started).as_secs(),
            clients: self.clients,
            commands: self.commands,
            turns: self.watchdog.turns().clone(),
            lost_lines: logging::lost_lines(),
            repairs: self.repaired,
            end: self.log.end(),
            written: self.log.written(),
            flushed: self.log.flushed(),
            applied: self.store.applied(),
            committed: self.committed(),
            staleness: self.staleness_at(world::now()),
            commit_level: self.config.commit_level.to_string(),
            sync_policy: self.policy_text(),
            trouble: self.trouble(),
        }
    }

    fn info_sections(&self) -> Vec<InfoSection> {
        vec![
            ("Ledger", self.ledger_lines()),
            ("Waterfall", self.waterfall_lines()),
            ("Log", self.log_lines()),
            ("Shipping", self.shipping_lines()),
            ("TLS", self.tls.lines()),
        ]
    }

    fn config(&self) -> Vec<(String, String)> {
        self.config.entries.clone()
    }

    fn unconfirmed_by(&self, _: Lsn, _: CommitLevel) -> String {
        self.policy_text()
    }

    fn waterfall(&self, histograms: bool) -> String {
        let ledger = self.log.ledger().snapshot();
        waterfall_report::report(&self.config.name, &self.waterfall, &ledger, histograms).to_string()
    }

    fn reset_waterfall(&mut self) {
        self.waterfall.reset();
    }

    fn promote(&mut self) -> Result<Epoch, String> {
        self.promote_now()
    }

    fn leader(&self) -> Option<String> {
        self.leader_address()
    }

    fn command_cluster(&mut self, command: Command) -> Result<Reply, String> {
        let Some(membership) = &self.membership else {
            // Of a pair its slot is all that there is to remove.
            if let Command::Remove(name) = &command {
                return self.drop_slot(name).map(|done| Reply::new(Some(Ok(done)).into()));
            }
            return Err("this node is no member of a cluster: it was started without --members".to_owned());
        };
        Ok(membership.command(command))
    }

    fn reload_users(&mut self) -> Result<(), String> {
        self.read_users()
    }

    fn check_password(&mut self, job: Job) {
        self.logins.check(job);
    }

    fn ask_clients(&mut self, session: SessionId, ask: ClientAsk) -> ClientReply {
        let reply = ClientReply::default();
        self.client_asks.push(Asked { session, ask, reply: ClientReply::clone(&reply) });
        reply
    }

    fn describe_cluster(&self, reached_at: Option<IpAddr>) -> String {
        self.description(reached_at).to_string()
    }
}

/// A disk whose flushes take longer is called slow: every commit but those at `off` feels it.
const DISK_SLOW: Duration = Duration::from_millis(50);
/// What is known of a leader's log holds for so long after it was heard: it sends heartbeats far more often.
const HEARD_VALID: Duration = Duration::from_secs(1);

fn replication_row(replica: ReplicaStatus) -> ReplicationRow {
    ReplicationRow {
        name: replica.name.to_string(),
        address: replica.address,
        state: replica.state.to_string(),
        sent: replica.sent,
        written: replica.written,
        flushed: replica.flushed,
        applied: replica.applied,
        lag_bytes: replica.apply_lag.bytes,
        lag_us: replica.apply_lag.time.as_micros() as u64,
        sync_state: replica.sync_state.to_string(),
        in_sync: replica.in_sync,
    }
}

fn line(key: &str, value: impl std::fmt::Display) -> (String, String) {
    (key.to_owned(), value.to_string())
}

impl Node {
    /// What the metrics tell.
    pub fn snapshot(&self) -> Snapshot {
        let ledger = self.log.ledger().snapshot();
        Snapshot {
            facts: Host::facts(self),
            replicas: self.replication(),
            accounting: waterfall_report::report(&self.config.name, &self.waterfall, &ledger, false),
        }
    }

    /// The sync policy: the cluster's, or that of this leader, or what a replica's own options name.
    fn policy_text(&self) -> String {
        match (&self.membership, &self.role) {
            (Some(membership), _) => membership.state.sync_policy().to_string(),
            (None, Role::Leader(shipper)) => shipper.policy().to_string(),
            (None, _) => self.config.sync.as_ref().map(ToString::to_string).unwrap_or_default(),
        }
    }

    /// Where clients find the leader; `None` until that was told. Where peers find it is of no use to them.
    pub(super) fn leader_address(&self) -> Option<String> {
        if let Role::Leader(_) = &self.role {
            return self.may_speak().then(|| self.public_address());
        }
        let Role::Replica(follower) = &self.role else { return None };
        let heard = self.membership.as_ref().and_then(Membership::leader_address);
        let told = heard.unwrap_or_else(|| follower.client_address());
        (!told.is_empty()).then(|| told.to_owned())
    }

    /// A write came to a replica.
    fn not_here(&self) -> Refusal {
        let awaited = self.membership.as_ref().map(|membership| membership.trouble()).unwrap_or_default();
        if !awaited.is_empty() {
            return Refusal::NoLeader(awaited);
        }
        match (&self.membership, self.leader_address()) {
            (Some(_), Some(leader)) if self.config.redirect == Redirect::Moved => Refusal::Moved { leader },
            (_, leader) => Refusal::ReadOnly { leader },
        }
    }

    fn no_slots(&self) -> String {
        let leader =
            self.leader_address().map_or("which is not known here".to_owned(), |address| format!("at {address}"));
        format!("this node does not lead, and the slots are the leader's: ask the leader, {leader}")
    }

    fn why_leaderless(&self, reason: &str) -> String {
        let awaited = self.membership.as_ref().map(|membership| membership.trouble()).unwrap_or_default();
        if awaited.is_empty() { reason.to_owned() } else { awaited }
    }

    pub(super) fn node_role(&self) -> NodeRole {
        match &self.role {
            Role::Leader(_) if self.may_speak() => NodeRole::Leader,
            Role::Leader(_) => NodeRole::LeaderWithoutLease,
            Role::Replica(_) => NodeRole::Replica,
            Role::Leaderless(_) => NodeRole::Leaderless,
            Role::SteppedDown(_) => NodeRole::SteppedDown,
        }
    }

    fn following(&self) -> Option<Following> {
        if self.node_role() == NodeRole::Leader {
            return None;
        }
        let address = self.leader_address().unwrap_or_default();
        let (host, port) = address.rsplit_once(':').unwrap_or(("", "0"));
        // A leader that had nothing to do did not look at its lease.
        let lease = self.membership.as_ref().and_then(Membership::lease_until).map(|until| until.min(self.now()));
        let silence = self.now().saturating_duration_since(self.heard.at.max(lease).unwrap_or(self.started));
        let mut following = Following {
            host: host.to_owned(),
            port: port.parse().unwrap_or(0),
            silence,
            lag: silence,
            ..Following::default()
        };
        let Role::Replica(follower) = &self.role else { return Some(following) };
        let status = follower.status(&self.log);
        (following.connected, following.streaming) = (status.connected, status.streaming);
        let lag_bytes = status.leader_end.since(self.store.applied());
        let waiting = if lag_bytes == 0 { 0 } else { self.wall_us().saturating_sub(self.store.applied_at_us()) };
        let waiting = Duration::from_micros(waiting);
        if status.connected && silence < HEARD_VALID.max(self.config.heartbeat_interval * 2) {
            (following.lag_bytes, following.lag) = (Some(lag_bytes), waiting);
        } else {
            following.lag = silence.max(waiting);
        }
        Some(following)
    }

    /// What an operator has to know at once; empty when all is well.
    pub(super) fn trouble(&self) -> String {
        let mut troubles = Vec::new();
        match &self.role {
            Role::SteppedDown(reason) => troubles.push(format!("stepped down: {reason}")),
            Role::Replica(follower) => {
                let status = follower.status(&self.log);
                troubles.extend(self.membership.as_ref().map(|seat| seat.trouble()).filter(|text| !text.is_empty()));
                if let Some(copy) = &status.base_copy {
                    troubles.push(receiving(copy, &status.leader));
                } else if !status.last_error.is_empty() {
                    troubles.push(format!("not following {} (its peer address): {}", status.leader, status.last_error));
                }
            }
            Role::Leaderless(reason) => troubles.push(self.why_leaderless(reason)),
            Role::Leader(_) if !self.may_speak() => {
                troubles.push(format!("no lease: {}", self.why_silent()));
            }
            Role::Leader(_) => {
                troubles.extend(self.membership.as_ref().map(|seat| seat.trouble()).filter(|text| !text.is_empty()));
            }
        }
        if let Some(loss) = &self.sync_loss {
            let meanwhile = match loss.degraded {
                Some(level) => format!("DEGRADED to {level}"),
                None => "remote commits wait".to_owned(),
            };
            troubles.push(format!("the sync set is lost ({meanwhile}): {}", loss.text));
        }
        troubles.extend(self.log.space_error().map(str::to_owned));
        troubles.extend(self.store.lacks_space());
        // A node that stepped down says so with the reason.
        if !matches!(self.role, Role::SteppedDown(_)) {
            troubles.extend(self.log.stopped().map(str::to_owned));
        }
        troubles.join("; ")
    }

    /// What there is to say of a disk that holds up commits; empty when it does not. No election comes of it: signs of life do not
    /// wait for the disk.
    pub(super) fn disk_words(&self) -> String {
        let (writes, p99) = self.log.ledger().recent_p99();
        if p99 < DISK_SLOW {
            return String::new();
        }
        format!(
            "the disk is slow: of its last {writes} flushes 99 of 100 took up to {p99:.0?}, and commits wait for each"
        )
    }

    fn ledger_lines(&self) -> Vec<(String, String)> {
        let ledger = self.log.ledger().snapshot();
        let mut lines = vec![
            line("ledger_flushes", ledger.flushes),
            line("ledger_records", ledger.records),
            line("ledger_bytes", ledger.bytes),
            line("ledger_padding_bytes", ledger.padding_bytes),
            line("ledger_padding_share", format_args!("{:.3}", ledger.padding_share())),
            line("ledger_saved_flushes", ledger.saved_flushes()),
            line("ledger_records_per_flush", format_args!("{:.2}", ledger.records_per_flush.mean)),
            line("ledger_records_per_flush_p99", ledger.records_per_flush.p99),
            line("ledger_bytes_per_flush_p50", ledger.bytes_per_flush.p50),
            line("ledger_queue_us_p50", ledger.queue_us.p50),
            line("ledger_queue_us_p99", ledger.queue_us.p99),
            line("ledger_device_us_p50", ledger.device_us.p50),
            line("ledger_device_us_p99", ledger.device_us.p99),
            line("ledger_device_us_max", ledger.device_us.max),
            line("ledger_device_us_per_commit", format_args!("{:.1}", ledger.device_us_per_commit())),
        ];
        let slow = self.disk_words();
        if !slow.is_empty() {
            lines.push(line("ledger_slow", slow));
        }
        lines
    }

    /// The mean of each stage of each level: `WATERFALL` tells the distributions.
    fn waterfall_lines(&self) -> Vec<(String, String)> {
        let mut lines = vec![line("waterfall_sampled_one_in", self.waterfall.one_in())];
        for (level, stages) in self.waterfall.levels().filter(|(_, stages)| stages.samples > 0) {
            let of = |stage: &CommitStage| {
                let mean = stages.stages[*stage as usize].mean();
                (mean > 0.0).then(|| format!("{}={mean:.0}", stage.name()))
            };
            let means: Vec<String> = CommitStage::ALL.iter().filter_map(of).collect();
            let total = stages.total.mean();
            lines.push(line(&format!("waterfall_{level}_us"), format_args!("total={total:.0},{}", means.join(","))));
        }
        lines
    }

    fn log_lines(&self) -> Vec<(String, String)> {
        let log = self.log.config();
        vec![
            line("log_start_lsn", self.log.start()),
            line("log_hot_start_lsn", self.log.hot_start()),
            line("log_segment_bytes", log.segment_bytes),
            line("log_write_depth", log.write_depth),
            line("log_sync_method", log.sync_method),
            line("log_buffered", log.buffered),
            line("store_checkpoint_lsn", self.store.durable_applied()),
            line("store_checkpoints", self.store.checkpoints()),
            line("store_overlay_bytes", self.store.overlay_bytes()),
            line("log_repaired_ranges", self.repaired.ranges),
            line("log_repaired_bytes", self.repaired.bytes),
            line("stores_made_anew", self.repaired.stores),
            line("base_copies_taken", self.base_copies.taken),
            line("base_copy_received_bytes", self.base_copies.taken_bytes),
            line("base_copy_kept_bytes", self.base_copies.kept_bytes),
        ]
    }

    fn shipping_lines(&self) -> Vec<(String, String)> {
        let Role::Leader(shipper) = &self.role else { return Vec::new() };
        let replicas = shipper.replicas();
        let sent = replicas.iter().fold(SentBytes::default(), |sum, replica| sum.plus(replica.sent_bytes));
        let mut lines = vec![
            line("shipped_zc_bytes", sent.zero_copy),
            line("shipped_copy_bytes", sent.copy),
            line("shipped_sendfile_bytes", sent.sendfile),
        ];
        let slots = shipper.slots();
        lines.push(line("slots", slots.len()));
        lines.push(line("slots_max", SLOTS_MAX));
        lines.push(line("slots_lost", slots.iter().filter(|slot| slot.lost).count()));
        for replica in replicas {
            let name = &replica.name;
            lines.push(line(&format!("replica_{name}_transport"), replica.transport));
            let micros = |duration: std::time::Duration| duration.as_micros();
            lines.push(line(
                &format!("replica_{name}_us"),
                format_args!(
                    "write={},flush={},apply={},round_trip={}",
                    micros(replica.durations.write),
                    micros(replica.durations.flush),
                    micros(replica.durations.apply),
                    replica.round_trip.map_or(0, micros)
                ),
            ));
        }
        lines
    }
}
