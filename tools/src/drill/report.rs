//! What a drill found, as a table for people, as Markdown and as JSON, its targets and its verdict.

use std::time::Duration;

use serde_json::{Value, json};
use walferry_cluster::level::CommitLevel;

use super::cluster::Cluster;
use super::fault::Fault;
use super::load::{Loss, Losses, commit_last, missing};
use super::member::Split;
use super::outage::quantile;
use super::sessions::Reads;
use super::soak::Soak;
use super::table::Table;
use crate::failure::Failure;
use crate::inspect::against::Compared;
use walferry_node::units::Span;

/// A leader must not feel a dead or slow replica more than by this factor of its p99.
const REPLICA_P99_RATIO_MAX: f64 = 1.3;
/// A planned handover takes at most so long.
const SWITCHOVER_MAX: Duration = Duration::from_millis(100);
/// From this distance on other targets hold.
const DISTANT: Duration = Duration::from_millis(10);
/// Keys that are named when they are lost.
const NAMED_MAX: usize = 5;

/// One fault.
pub struct Round {
    /// What was done.
    pub fault: Fault,
    /// For how long.
    pub lasted: Duration,
    /// To whom.
    pub victim: String,
    /// Who led before.
    pub leader: String,
    /// Who leads after.
    pub new_leader: String,
    /// The longest time without an acknowledgement at remote_flush.
    pub outage: Duration,
    /// Where it went, if another member leads.
    pub split: Option<Split>,
    /// Replicas that left the in-sync set or joined it.
    pub in_sync_changes: usize,
    /// What became of the commits since the last round that was looked at; empty when the next fault followed at once.
    pub losses: Losses,
    /// What the logs have in common, byte by byte.
    pub compared: Option<Compared>,
    /// The leader's p99 at remote_flush before and during the fault, if it is a replica's.
    pub p99: Option<(Duration, Duration)>,
    /// What sessions saw.
    pub reads: Reads,
    /// What else is to be said.
    pub note: Option<String>,
}

/// As the table prints it.
pub fn ms(duration: Duration) -> String {
    format!("{:.0} ms", duration.as_secs_f64() * 1e3)
}

impl Round {
    fn recovery(&self, split: Split) -> Duration {
        self.outage.saturating_sub(split.detection + split.election)
    }

    fn p99_ratio(&self) -> Option<f64> {
        self.p99.map(|(before, during)| during.as_secs_f64() / before.as_secs_f64())
    }

    /// The round as one line of text.
    pub fn line(&self) -> String {
        let split = self.split.map_or(String::new(), |split| {
            let (detection, election, rest) = (ms(split.detection), ms(split.election), ms(self.recovery(split)));
            format!(" (detection {detection}, election {election}, recovery {rest})")
        });
        let moved = match self.leader == self.new_leader {
            // Nobody looked who leads when the next fault followed at once.
            true if self.losses.is_empty() => format!("{} led", self.leader),
            true => format!("{} leads on", self.leader),
            false => format!("{} -> {}", self.leader, self.new_leader),
        };
        let mut parts =
            vec![format!("{:<15} {:<3} {moved:<10} no writes for {}{split}", self.fault, self.victim, ms(self.outage))];
        if !self.losses.is_empty() {
            parts.push(format!("lost {}", self.losses.iter().map(said).collect::<Vec<_>>().join(", ")));
        }
        if let Some((before, during)) = self.p99 {
            parts.push(format!(
                "p99 {:.1} ms, before {:.1} ms",
                1e3 * during.as_secs_f64(),
                1e3 * before.as_secs_f64()
            ));
        }
        parts.push(format!("in-sync changes {}", self.in_sync_changes));
        let Reads { with_token, back_with_token, without_token, back_without_token, told_of_loss, disordered } =
            self.reads;
        parts.push(format!(
            "reads back {back_with_token}/{with_token}, without token {back_without_token}/{without_token}"
        ));
        if told_of_loss > 0 {
            parts.push(format!("sessions told of a loss {told_of_loss}"));
        }
        if disordered > 0 {
            parts.push(format!("stream ids out of order {disordered}"));
        }
        if let Some(compared) = self.compared {
            parts.push(format!("logs the same to {}", compared.to));
        } else if self.losses.is_empty() {
            parts.push(format!("after {} the next at once", ms(self.lasted)));
        }
        parts.extend(self.note.clone());
        parts.join("; ")
    }
}

/// Lost of acknowledged, and the bound where one is due.
fn said(loss: &Loss) -> String {
    let Loss { level, acknowledged, lost, bound } = loss;
    match level.is_remote() {
        true => format!("{level} {}/{acknowledged}", lost.len()),
        false => format!("{level} {}/{acknowledged} (bound {bound})", lost.len()),
    }
}

/// How the drill was held.
pub struct Setting {
    /// Members.
    pub nodes: usize,
    /// Between them.
    pub rtt: Option<Span>,
    /// The sync policy as given.
    pub sync: String,
    /// A leader that is silent for so long is replaced; `None` on hosts of others.
    pub election_timeout: Option<Span>,
    /// How often a leader sends a heartbeat.
    pub heartbeat_interval: Option<Span>,
    /// The timeouts are those of the tuned profile.
    pub tuned: bool,
    /// Writes a second at each level.
    pub rate: u32,
    /// Of a random drill.
    pub seed: Option<u64>,
}

impl Setting {
    fn text(&self) -> String {
        let mut parts = vec![format!("{} nodes", self.nodes)];
        parts.extend(self.rtt.map(|rtt| format!("{rtt} between them")));
        parts.push(match self.sync.as_str() {
            "" => "sync policy: a majority".to_owned(),
            policy => format!("sync policy {policy}"),
        });
        parts.extend(self.election_timeout.map(|time| format!("election_timeout {time}")));
        parts.extend(self.heartbeat_interval.map(|time| format!("heartbeat_interval {time}")));
        parts.push(format!("{} writes a second at each level", self.rate));
        parts.extend(self.seed.map(|seed| format!("seed {seed}")));
        parts.join(", ")
    }
}

/// Everything that a drill found.
pub struct Report {
    setting: Setting,
    /// In order.
    pub rounds: Vec<Round>,
    /// Outages of etcd.
    pub etcd: Vec<Duration>,
    total: Vec<(CommitLevel, usize, usize)>,
    first_wrong: Option<String>,
}

/// A target and what was measured.
struct Target {
    what: String,
    measured: String,
    met: bool,
}

impl Report {
    /// An empty one.
    pub fn new(setting: Setting) -> Report {
        Report { setting, rounds: Vec::new(), etcd: Vec::new(), total: Vec::new(), first_wrong: None }
    }

    /// Looks once more for everything that was acknowledged, at the end.
    pub fn finish(
        &mut self,
        keys: Vec<(CommitLevel, Vec<String>)>,
        first_wrong: Option<String>,
        cluster: &Cluster,
    ) -> Result<(), Failure> {
        let mut client = cluster.leader_client()?;
        commit_last(&mut client)?;
        for (level, keys) in keys {
            self.total.push((level, keys.len(), missing(&mut client, &keys)?.len()));
        }
        self.first_wrong = first_wrong;
        Ok(())
    }

    fn faults(&self) -> impl Iterator<Item = Fault> {
        let done = |fault: &Fault| self.rounds.iter().any(|round| round.fault == *fault);
        Fault::ALL.into_iter().filter(done)
    }

    fn of(&self, fault: Fault) -> impl Iterator<Item = &Round> {
        self.rounds.iter().filter(move |round| round.fault == fault)
    }

    fn outage(&self, fault: Fault, share: f64) -> Option<Duration> {
        quantile(&mut self.of(fault).map(|round| round.outage).collect::<Vec<_>>(), share)
    }

    fn median(&self, fault: Fault, of: impl Fn(&Round, Split) -> Duration) -> String {
        let mut values: Vec<Duration> = self.of(fault).filter_map(|round| Some(of(round, round.split?))).collect();
        cell(quantile(&mut values, 0.5))
    }

    fn p99_ratio(&self, fault: Fault) -> Option<f64> {
        let mut ratios: Vec<f64> = self.of(fault).filter_map(Round::p99_ratio).collect();
        ratios.sort_by(f64::total_cmp);
        ratios.get(ratios.len() / 2).copied()
    }

    /// Lost at a level after a fault, and the bound.
    fn lost(&self, fault: Fault, level: CommitLevel) -> String {
        let losses = self.of(fault).flat_map(|round| &round.losses).filter(|loss| loss.level == level);
        let (lost, bound) = losses.fold((0, 0), |(lost, bound), loss| (lost + loss.lost.len(), bound + loss.bound));
        if level.is_remote() { lost.to_string() } else { format!("{lost} of {bound}") }
    }

    fn table(&self) -> Table {
        let mut table = Table::new(&[
            "fault",
            "rounds",
            "median",
            "p99",
            "max",
            "detection",
            "election",
            "recovery",
            "lost remote_flush",
            "remote_apply",
            "local of bound",
            "off of bound",
            "in-sync changes",
            "reads back",
            "leader's p99",
        ]);
        for fault in self.faults() {
            let reads = |of: fn(&Reads) -> u64| self.of(fault).map(|round| of(&round.reads)).sum::<u64>();
            let changes: usize = self.of(fault).map(|round| round.in_sync_changes).sum();
            table.row(vec![
                fault.to_string(),
                self.of(fault).count().to_string(),
                cell(self.outage(fault, 0.5)),
                cell(self.outage(fault, 0.99)),
                cell(self.outage(fault, 1.0)),
                self.median(fault, |_, split| split.detection),
                self.median(fault, |_, split| split.election),
                self.median(fault, Round::recovery),
                self.lost(fault, CommitLevel::RemoteFlush),
                self.lost(fault, CommitLevel::RemoteApply),
                self.lost(fault, CommitLevel::Local),
                self.lost(fault, CommitLevel::Off),
                changes.to_string(),
                format!("{} of {}", reads(|reads| reads.back_with_token), reads(|reads| reads.with_token)),
                self.p99_ratio(fault).map_or("-".to_owned(), |ratio| format!("x {ratio:.2}")),
            ]);
        }
        if !self.etcd.is_empty() {
            let outage = |share| cell(quantile(&mut self.etcd.clone(), share));
            let mut row = vec!["kill, etcd".to_owned(), self.etcd.len().to_string()];
            row.extend([outage(0.5), outage(0.99), outage(1.0)]);
            row.resize(15, "-".to_owned());
            table.row(row);
        }
        table
    }

    fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        let mut outage = |fault: Fault, share: f64, name: &str, max: Duration| {
            if let Some(measured) = self.outage(fault, share) {
                let what = format!("{fault}: {name} without writes at most {}", ms(max));
                targets.push(Target { what, measured: ms(measured), met: measured <= max });
            }
        };
        if self.setting.rtt.is_some_and(|rtt| rtt.0 >= DISTANT) {
            outage(Fault::Kill, 0.99, "p99", Duration::from_secs(2));
        } else {
            outage(Fault::Kill, 0.99, "p99", Duration::from_secs(1));
            outage(Fault::Kill, 0.5, "median", Duration::from_millis(if self.setting.tuned { 250 } else { 600 }));
            outage(Fault::Switchover, 0.5, "median", SWITCHOVER_MAX);
        }
        for fault in self.faults().filter(|fault| matches!(fault, Fault::SlowReplica | Fault::DeadReplica)) {
            if let Some(ratio) = self.p99_ratio(fault) {
                let what = format!("{fault}: the leader's p99 at most {REPLICA_P99_RATIO_MAX} x of normal");
                targets.push(Target { what, measured: format!("{ratio:.2} x"), met: ratio <= REPLICA_P99_RATIO_MAX });
            }
        }
        targets
    }

    fn sums(&self) -> String {
        let said =
            |(level, acknowledged, lost): &(CommitLevel, usize, usize)| format!("{level} {lost} of {acknowledged}");
        let lost = self.total.iter().map(said).collect::<Vec<_>>().join(", ");
        let sum = |of: fn(&Reads) -> u64| self.rounds.iter().map(|round| of(&round.reads)).sum::<u64>();
        let compared = self.rounds.iter().filter(|round| round.compared.is_some()).count();
        let logs = match compared {
            0 => "the logs were not compared: they are on other hosts, `walferry log verify --against` does it there"
                .to_owned(),
            _ => format!("the logs of all nodes were the same bytes up to the commit LSN, {compared} times"),
        };
        format!(
            "acknowledged and lost in all: {lost}\nreads that went back: {} of {} with a token, {} of {} without one; stream ids out of order: {}\n{logs}",
            sum(|reads| reads.back_with_token),
            sum(|reads| reads.with_token),
            sum(|reads| reads.back_without_token),
            sum(|reads| reads.without_token),
            sum(|reads| reads.disordered),
        )
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = format!("\n{}\n\n{}\n\n{}", self.setting.text(), self.table().text(), self.sums());
        for Target { what, measured, met } in self.targets() {
            text.push_str(&format!("\n{what}: {measured}, {}", if met { "met" } else { "missed" }));
        }
        text
    }

    /// For a file of results.
    pub fn markdown(&self) -> String {
        let mut text = format!("\n{}.\n\n{}\n\n", self.setting.text(), self.table().markdown());
        for line in self.sums().lines() {
            text.push_str(&format!("- {line}\n"));
        }
        let targets = self.targets();
        if !targets.is_empty() {
            let mut table = Table::new(&["target", "measured", ""]);
            for Target { what, measured, met } in targets {
                table.row(vec![what, measured, if met { "met" } else { "missed" }.to_owned()]);
            }
            text.push_str(&format!("\n{}\n", table.markdown()));
        }
        text
    }

    /// For programs.
    pub fn json(&self, soak: Option<&Soak>) -> Value {
        let loss = |loss: &Loss| {
            let value = json!({ "acknowledged": loss.acknowledged, "lost": loss.lost.len(), "bound": loss.bound });
            (loss.level.to_string(), value)
        };
        let round = |round: &Round| {
            json!({
                "fault": round.fault.to_string(),
                "lasted_ms": round.lasted.as_millis(),
                "victim": round.victim,
                "leader": round.leader,
                "new_leader": round.new_leader,
                "outage_ms": round.outage.as_secs_f64() * 1e3,
                "detection_ms": round.split.map(|split| split.detection.as_secs_f64() * 1e3),
                "election_ms": round.split.map(|split| split.election.as_secs_f64() * 1e3),
                "in_sync_changes": round.in_sync_changes,
                "lost": round.losses.iter().map(loss).collect::<serde_json::Map<_, _>>(),
                "p99_ratio": round.p99_ratio(),
                "reads": round.reads.with_token,
                "reads_back": round.reads.back_with_token,
                "reads_without_token": round.reads.without_token,
                "reads_back_without_token": round.reads.back_without_token,
                "sessions_told_of_loss": round.reads.told_of_loss,
                "stream_ids_out_of_order": round.reads.disordered,
                "logs_same_to": round.compared.map(|compared| compared.to.to_string()),
                "note": round.note,
            })
        };
        let total = |(level, acknowledged, lost): &(CommitLevel, usize, usize)| {
            (level.to_string(), json!({ "acknowledged": acknowledged, "lost": lost }))
        };
        json!({
            "nodes": self.setting.nodes,
            "rtt": self.setting.rtt.map(|rtt| rtt.to_string()),
            "sync": self.setting.sync,
            "election_timeout": self.setting.election_timeout.map(|time| time.to_string()),
            "heartbeat_interval": self.setting.heartbeat_interval.map(|time| time.to_string()),
            "seed": self.setting.seed,
            "rounds": self.rounds.iter().map(round).collect::<Vec<_>>(),
            "etcd_outage_ms": self.etcd.iter().map(|outage| outage.as_secs_f64() * 1e3).collect::<Vec<_>>(),
            "soak": soak.map(Soak::json),
            "total": self.total.iter().map(total).collect::<serde_json::Map<_, _>>(),
        })
    }

    /// An error when something is not as it was promised. Targets are not promises: they are measured.
    pub fn verdict(&self) -> Result<(), Failure> {
        let remote =
            self.total.iter().filter(|(level, _, _)| level.is_remote()).map(|(_, _, lost)| lost).sum::<usize>();
        let losses = || self.rounds.iter().flat_map(|round| round.losses.iter().map(move |loss| (round, loss)));
        if let Some((round, loss)) = losses().find(|(_, loss)| loss.level.is_remote() && !loss.lost.is_empty()) {
            let named = loss.lost.iter().take(NAMED_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
            return Err(Failure::failed(format_args!(
                "{}: {} commits that replicas had confirmed at {} are lost: {named}",
                round.fault,
                loss.lost.len(),
                loss.level
            )));
        }
        if remote > 0 {
            return Err(Failure::failed(format_args!("{remote} commits that replicas had confirmed are lost")));
        }
        if let Some((round, loss)) = losses().find(|(_, loss)| !loss.level.is_remote() && loss.lost.len() > loss.bound)
        {
            return Err(Failure::failed(format_args!(
                "{}: {} commits at {} are lost, and the replicas lacked {} at most",
                round.fault,
                loss.lost.len(),
                loss.level,
                loss.bound
            )));
        }
        match &self.first_wrong {
            Some(text) => Err(Failure::failed(format_args!("a session saw time go back: {text}"))),
            None => Ok(()),
        }
    }
}

fn cell(value: Option<Duration>) -> String {
    value.map_or("-".to_owned(), ms)
}
