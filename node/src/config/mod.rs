//! The configuration of a node, put together from flags, file and defaults, and checked.
//! A flag wins over the file, the file over the default. Called by the command line; the daemon gets the finished
//! `NodeConfig`. Knows no socket and opens no data directory.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use walferry_cluster::{CommitLevel, MemberName, SyncPolicy};
use walferry_engine::limits::{FRAME_BYTES_MAX, SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN, WRITE_DEPTH_MAX};
use walferry_engine::log::SyncMethod;

use crate::role::{Becoming, Role};
use crate::units::{ByteSize, HostPort, Span};

mod members;
mod settings;
mod tls;

pub use members::{MemberList, PeerList};
pub use settings::{Checked, ELECTION_TIMEOUT_DEFAULT, HEARTBEAT_INTERVAL_DEFAULT, Settings};
pub use tls::TlsConfig;

/// Heartbeats that must fit into `election_timeout`.
const HEARTBEATS_PER_ELECTION: u32 = 3;
/// The shortest `election_timeout`: a disk's flush and a scheduler's slice must fit.
const ELECTION_TIMEOUT_MIN: Duration = Duration::from_millis(80);

/// The smallest `clients_bytes_max`.
const CLIENTS_BYTES_MIN: usize = 64 << 20;

/// Segment sizes are whole multiples of this.
const SEGMENT_STEP_BYTES: u64 = 1 << 20;

/// What is wrong with a configuration, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {file}: {source}")]
    Read {
        /// The file as it was named.
        file: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not TOML, or a value has the wrong type or form.
    #[error("{file}: {text}")]
    Syntax {
        /// The file as it was named.
        file: String,
        /// What is wrong, with line and column.
        text: String,
    },
    /// The file has a key that no node knows.
    #[error("{file}, line {line}: unknown key `{key}`{hint}")]
    UnknownKey {
        /// The file as it was named.
        file: String,
        /// The line of the key.
        line: usize,
        /// The key.
        key: String,
        /// `; did you mean ...?`, or where the keys are listed.
        hint: String,
    },
    /// A value is out of its bounds or does not go with another.
    #[error("{key} = {value}: {reason}")]
    Value {
        /// The key, which is also the flag.
        key: &'static str,
        /// The value given.
        value: String,
        /// Why not, and what would do.
        reason: String,
    },
    /// A file of certificates or keys is missing or of no use.
    #[error(transparent)]
    Tls(#[from] walferry_tls::TlsError),
    /// The peer secret is of no use.
    #[error(transparent)]
    Secret(#[from] walferry_tls::SecretError),
    /// A key without a default was not given.
    #[error("{key} is not set: give --{key} or set `{key}` in walferry.toml")]
    Missing {
        /// The key, which is also the flag.
        key: &'static str,
    },
}

impl ConfigError {
    /// A value that is out of its bounds or does not go with another.
    pub(crate) fn value(key: &'static str, value: impl fmt::Display, reason: impl fmt::Display) -> ConfigError {
        ConfigError::Value { key, value: value.to_string(), reason: reason.to_string() }
    }
}

/// `on_sync_loss`: what becomes of commits at a remote level when the sync set is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnSyncLoss {
    /// Commits wait until the sync set is back (PostgreSQL's way).
    Block,
    /// Writes at a remote level are refused at once.
    Refuse,
    /// Commits are answered at this lower level meanwhile, loudly.
    Degrade(CommitLevel),
}

impl std::str::FromStr for OnSyncLoss {
    type Err = String;
    fn from_str(text: &str) -> Result<OnSyncLoss, String> {
        match text.split_once(':') {
            None if text.eq_ignore_ascii_case("block") => Ok(OnSyncLoss::Block),
            None if text.eq_ignore_ascii_case("refuse") => Ok(OnSyncLoss::Refuse),
            Some((how, level)) if how.eq_ignore_ascii_case("degrade") => {
                level.parse().map(OnSyncLoss::Degrade).map_err(|error| format!("{error}"))
            }
            _ => Err(format!("{text:?} is none of `block`, `refuse`, `degrade:LEVEL` (such as degrade:local)")),
        }
    }
}

impl fmt::Display for OnSyncLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OnSyncLoss::Block => f.write_str("block"),
            OnSyncLoss::Refuse => f.write_str("refuse"),
            OnSyncLoss::Degrade(level) => write!(f, "degrade:{level}"),
        }
    }
}

/// `redirect`: how a member that does not lead answers a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redirect {
    /// `-MOVED 0 HOST:PORT`, which clients of redis-cluster follow.
    Moved,
    /// `-READONLY`, which clients of a plain redis-server know.
    ReadOnly,
}

impl std::str::FromStr for Redirect {
    type Err = String;
    fn from_str(text: &str) -> Result<Redirect, String> {
        match text.to_ascii_lowercase().as_str() {
            "moved" => Ok(Redirect::Moved),
            "readonly" => Ok(Redirect::ReadOnly),
            _ => Err(format!("{text:?} is none of `moved`, `readonly`")),
        }
    }
}

/// `peer_auth`: what a peer has to prove before it is listened to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerAuth {
    /// That it holds the secret of `peer_secret`, or has a certificate under `peer_tls`.
    Secret,
    /// Peers prove nothing.
    None,
}

impl std::str::FromStr for PeerAuth {
    type Err = String;
    fn from_str(text: &str) -> Result<PeerAuth, String> {
        match text.to_ascii_lowercase().as_str() {
            "secret" => Ok(PeerAuth::Secret),
            "none" => Ok(PeerAuth::None),
            _ => Err(format!("{text:?} is none of `secret`, `none`")),
        }
    }
}

/// Everything a node needs to know, checked.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The data directory.
    pub data: PathBuf,
    /// The node's name among its peers.
    pub name: String,
    /// Where clients connect.
    pub listen: HostPort,
    /// Where replicas connect.
    pub peer_listen: HostPort,
    /// The leader's peer address, if this node is a replica.
    pub follow: Option<HostPort>,
    /// The role to take in spite of what the data directory is: a flag of one start, and no key.
    pub becoming: Option<Becoming>,
    /// All members of its cluster, this node included; none for a node that knows no election.
    pub members: Option<MemberList>,
    /// Nodes to ask for what the log lost, beside the members and the leader.
    pub repair_from: PeerList,
    /// How a member that does not lead answers a write.
    pub redirect: Redirect,
    /// What of its links is TLS.
    pub tls: TlsConfig,
    /// What peers have to prove.
    pub peer_auth: PeerAuth,
    /// The file of the secret that peers share; none: that in the data directory.
    pub peer_secret: Option<PathBuf>,
    /// What clients must AUTH with.
    pub password: Option<String>,
    /// Who may connect, if that is not everybody.
    pub users_file: Option<PathBuf>,
    /// Connected clients at most.
    pub clients_max: usize,
    /// A client that finishes no command for so long is disconnected; none: never.
    pub client_idle_timeout: Option<Duration>,
    /// A client that has not logged in within this time is disconnected; none: never.
    pub authentication_timeout: Option<Duration>,
    /// A client that reads nothing of its replies for so long is disconnected; none: never.
    pub output_stalled_timeout: Option<Duration>,
    /// What all clients have half sent, queued and not read, at most.
    pub clients_bytes_max: usize,
    /// A tracing filter.
    pub log_filter: String,
    /// Where to write the chosen addresses once the node serves.
    pub ready_file: Option<PathBuf>,
    /// The node's default commit level.
    pub commit_level: CommitLevel,
    /// Which replicas a remote commit waits for; none where neither flags nor file name a policy: then that of the leader that this
    /// node followed until it was promoted, or nobody.
    pub sync: Option<SyncPolicy>,
    /// Below this size of the in-sync set remote levels refuse writes.
    pub min_in_sync: usize,
    /// After so long an unconfirmed commit answers UNCERTAIN; none waits on.
    pub commit_timeout: Option<Duration>,
    /// A read waits so long for a state that is good enough for it; zero: not at all.
    pub read_wait_timeout: Duration,
    /// What becomes of remote commits when the sync set is lost.
    pub on_sync_loss: OnSyncLoss,
    /// How long a frame waits for more commits.
    pub commit_delay: Duration,
    /// Size of a log file, for init.
    pub segment_bytes: u64,
    /// The same, where flags or file name one.
    pub segment_bytes_given: Option<u64>,
    /// Frames in flight to the disk; none takes what init measured.
    pub write_depth: Option<usize>,
    /// How a write is made durable; none takes what init measured.
    pub sync_method: Option<SyncMethod>,
    /// True does without O_DIRECT.
    pub buffered: bool,
    /// Memory for frames on their way.
    pub log_buffer_bytes: usize,
    /// Log kept behind the newest checkpoint, at least.
    pub keep_bytes_min: u64,
    /// Log that a slot may hold back, at most.
    pub slot_keep_bytes_max: u64,
    /// The log that is kept is read again after so long; none: only after a start.
    pub scrub_interval: Option<Duration>,
    /// A peer that is silent for so long is dead.
    pub peer_timeout: Duration,
    /// How often an idle link is proved alive.
    pub heartbeat_interval: Duration,
    /// A leader that is silent for so long is replaced.
    pub election_timeout: Duration,
    /// A replica that lags for longer leaves the in-sync set.
    pub replica_lag_time_max: Duration,
    /// Frames from this size on are sent without a copy.
    pub zero_copy_bytes_min: usize,
    /// Bytes a second of all snapshots together; 0 for no limit.
    pub snapshot_rate: u64,
    /// Whether commits are followed through their stages.
    pub waterfall: bool,
    /// Where Prometheus is answered, if anywhere.
    pub metrics_listen: Option<HostPort>,
    /// Changes that trigger a checkpoint.
    pub checkpoint_bytes: u64,
    /// Memory for pages of the store's file.
    pub store_cache_bytes: usize,
    /// Every key that has a value, as text, without the password: what CONFIG GET tells.
    pub entries: Vec<(String, String)>,
}

impl NodeConfig {
    /// The node that these flags and this file describe.
    pub fn new(flags: Settings, file: Settings) -> Result<NodeConfig, ConfigError> {
        let given = flags.or(file);
        let segment_bytes_given = given.segment_bytes.map(|size| size.0);
        let sync = given.sync.as_ref().map(|checked| checked.value.clone());
        let all = given.complete();
        let given = "Settings::defaults() names it";
        let mut table = all.to_table();
        table.remove("password");
        let text = |value: toml::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let tls = TlsConfig::of(&all)?;
        let config = NodeConfig {
            entries: table.into_iter().map(|(key, value)| (key, text(value))).collect(),
            data: all.data.ok_or(ConfigError::Missing { key: "data" })?,
            name: all.name.expect(given),
            listen: all.listen.expect(given),
            peer_listen: all.peer_listen.expect(given),
            follow: all.follow,
            becoming: None,
            members: all.members.map(|checked| checked.value),
            repair_from: all.repair_from.map(|checked| checked.value).unwrap_or_default(),
            redirect: all.redirect.expect(given).value,
            tls,
            peer_auth: all.peer_auth.expect(given).value,
            peer_secret: all.peer_secret,
            password: all.password,
            users_file: all.users_file,
            clients_max: all.clients_max.expect(given),
            client_idle_timeout: all.client_idle_timeout.map(|span| span.0).filter(|time| !time.is_zero()),
            authentication_timeout: all.authentication_timeout.map(|span| span.0).filter(|time| !time.is_zero()),
            output_stalled_timeout: all.output_stalled_timeout.map(|span| span.0).filter(|time| !time.is_zero()),
            clients_bytes_max: all.clients_bytes_max.expect(given).0 as usize,
            log_filter: all.log_filter.expect(given),
            ready_file: all.ready_file,
            commit_level: all.commit_level.expect(given).value,
            sync,
            min_in_sync: all.min_in_sync.expect(given),
            read_wait_timeout: all.read_wait_timeout.expect(given).0,
            commit_timeout: all.commit_timeout.map(|span| span.0).filter(|time| !time.is_zero()),
            on_sync_loss: all.on_sync_loss.expect(given).value,
            commit_delay: all.commit_delay.expect(given).0,
            segment_bytes: all.segment_bytes.expect(given).0,
            segment_bytes_given,
            write_depth: all.write_depth,
            sync_method: all.sync_method.map(|checked| checked.value),
            buffered: all.buffered.expect(given),
            log_buffer_bytes: all.log_buffer_bytes.expect(given).0 as usize,
            keep_bytes_min: all.keep_bytes_min.expect(given).0,
            slot_keep_bytes_max: all.slot_keep_bytes_max.expect(given).0,
            scrub_interval: all.scrub_interval.map(|span| span.0).filter(|time| !time.is_zero()),
            peer_timeout: all.peer_timeout.expect(given).0,
            heartbeat_interval: all.heartbeat_interval.expect(given).0,
            election_timeout: all.election_timeout.expect(given).0,
            replica_lag_time_max: all.replica_lag_time_max.expect(given).0,
            zero_copy_bytes_min: all.zero_copy_bytes_min.expect(given).0 as usize,
            snapshot_rate: all.snapshot_rate.expect(given).0,
            waterfall: all.waterfall.expect(given),
            metrics_listen: all.metrics_listen,
            checkpoint_bytes: all.checkpoint_bytes.expect(given).0,
            store_cache_bytes: all.store_cache_bytes.expect(given).0 as usize,
        };
        config.check()?;
        Ok(config)
    }

    /// What the data directory is to be.
    pub fn role(&self) -> Role {
        match (&self.members, &self.follow) {
            (Some(_), _) => Role::Member,
            (None, Some(leader)) => Role::Replica { leader: leader.to_string() },
            (None, None) => Role::Leader { promoted_from: None },
        }
    }

    /// Bounds, and values that must go together.
    fn check(&self) -> Result<(), ConfigError> {
        let size = |bytes: u64| ByteSize(bytes).to_string();
        let refuse = |key, value: String, reason: String| Err(ConfigError::Value { key, value, reason });
        if let Err(error) = self.name.parse::<MemberName>() {
            return refuse("name", format!("{:?}", self.name), error.to_string());
        }
        let segment_fits = (SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&self.segment_bytes);
        if !segment_fits || !self.segment_bytes.is_multiple_of(SEGMENT_STEP_BYTES) {
            let (min, max) = (size(SEGMENT_BYTES_MIN), size(SEGMENT_BYTES_MAX));
            let reason = format!("choose a whole number of MiB from {min} to {max}");
            return refuse("segment_bytes", size(self.segment_bytes), reason);
        }
        if let Some(depth) = self.write_depth.filter(|depth| !(1..=WRITE_DEPTH_MAX).contains(depth)) {
            return refuse("write_depth", depth.to_string(), format!("choose 1 to {WRITE_DEPTH_MAX}"));
        }
        // The frame that is being written and the one that fills meanwhile; no frame is larger than a segment.
        let buffer_min = 2 * self.segment_bytes.min(FRAME_BYTES_MAX as u64);
        if (self.log_buffer_bytes as u64) < buffer_min {
            let reason = format!("two of the largest frames must fit: at least {}", size(buffer_min));
            return refuse("log_buffer_bytes", size(self.log_buffer_bytes as u64), reason);
        }
        if self.heartbeat_interval.is_zero() || self.heartbeat_interval * 2 > self.peer_timeout {
            let reason = format!("two heartbeats must fit into peer_timeout = {}", Span(self.peer_timeout));
            return refuse("heartbeat_interval", Span(self.heartbeat_interval).to_string(), reason);
        }
        if let Some(members) = &self.members {
            let named = self.name.parse().is_ok_and(|name| members.peer(&name).is_some());
            if !named {
                let reason = format!("it does not name this node, {}: give --name as it stands there", self.name);
                return refuse("members", members.to_string(), reason);
            }
            if let Some(leader) = &self.follow {
                let reason = "a member of a cluster follows whoever is chosen: give --members or --follow".to_owned();
                return refuse("follow", leader.to_string(), reason);
            }
            check_timeouts(self.election_timeout, self.heartbeat_interval)?;
        }
        if let (Some(policy), Ok(own)) = (&self.sync, self.name.parse())
            && let Err(error) = policy.check_leader(&own)
        {
            return refuse("sync", policy.to_string(), error.to_string());
        }
        if let (Some(file), Some(_)) = (&self.users_file, &self.password) {
            let reason = "it says who may connect: leave out `password`".to_owned();
            return refuse("users_file", file.display().to_string(), reason);
        }
        if self.clients_max == 0 {
            return refuse("clients_max", "0".to_owned(), "nobody could connect; choose 1 or more".to_owned());
        }
        if self.clients_bytes_max < CLIENTS_BYTES_MIN {
            let reason =
                format!("one large command and its reply must fit: at least {}", size(CLIENTS_BYTES_MIN as u64));
            return refuse("clients_bytes_max", size(self.clients_bytes_max as u64), reason);
        }
        if let OnSyncLoss::Degrade(level) = self.on_sync_loss
            && level > CommitLevel::Local
        {
            let reason = "without its replicas a node can hold `local` or `off` only".to_owned();
            return refuse("on_sync_loss", self.on_sync_loss.to_string(), reason);
        }
        Ok(())
    }
}

/// Whether a leader can send enough heartbeats within the time after which it is replaced.
pub fn check_timeouts(election_timeout: Duration, heartbeat_interval: Duration) -> Result<(), ConfigError> {
    let refuse = |key, value, reason| Err(ConfigError::Value { key, value: Span(value).to_string(), reason });
    if election_timeout < ELECTION_TIMEOUT_MIN {
        return refuse("election_timeout", election_timeout, format!("at least {}", Span(ELECTION_TIMEOUT_MIN)));
    }
    if heartbeat_interval.is_zero() || heartbeat_interval * HEARTBEATS_PER_ELECTION > election_timeout {
        let timeout = Span(election_timeout);
        let reason = format!("{HEARTBEATS_PER_ELECTION} heartbeats must fit into election_timeout = {timeout}");
        return refuse("heartbeat_interval", heartbeat_interval, reason);
    }
    Ok(())
}

/// `walferry config show`: every key with its effective value, and where the value comes from.
pub fn show(flags: &Settings, file: &Settings, file_name: Option<&Path>) -> String {
    let (from_flags, from_file) = (flags.to_table(), file.to_table());
    let mut effective = flags.clone().or(file.clone()).or(Settings::defaults()).to_table();
    let mut out = String::new();
    for key in Settings::keys() {
        let source = match (from_flags.contains_key(&key), from_file.contains_key(&key), file_name) {
            (true, ..) => "flag".to_owned(),
            (_, true, Some(name)) => name.display().to_string(),
            _ => "default".to_owned(),
        };
        let line = match effective.remove(&key) {
            Some(_) if key == "password" => "# password is set; not shown".to_owned(),
            Some(value) => format!("{key} = {value}"),
            None => format!("# {key} is not set"),
        };
        out.push_str(&if line.starts_with('#') { format!("{line}\n") } else { format!("{line:<44} # {source}\n") });
    }
    out
}

/// The address of `host_port`, or an error that names the key.
pub fn resolve(key: &'static str, host_port: &HostPort) -> Result<SocketAddr, ConfigError> {
    host_port.resolve().map_err(|error| ConfigError::Value {
        key,
        value: host_port.to_string(),
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests;
