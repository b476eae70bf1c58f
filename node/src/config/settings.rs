//! The keys, each declared once: as a flag of `walferry start` and as a key of `walferry.toml`, with its default and its
//! help text. One `Settings` is what one source says. Called by `NodeConfig`, which puts the sources together.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::CommandFactory;
use serde::{Deserialize, Serialize};
use walferry_cluster::member::MEMBER_NAME_BYTES_MAX;
use walferry_cluster::{CommitLevel, SyncPolicy};
use walferry_engine::limits::{LOG_BUFFER_BYTES_DEFAULT, SEGMENT_BYTES_DEFAULT};
use walferry_engine::log::SyncMethod;
use walferry_tls::{Outsiders, check_private};

use super::{ConfigError, OnSyncLoss, PeerAuth, Redirect};
use crate::config::members::{MemberList, PeerList};
use crate::units::{ByteSize, HostPort, Span};

/// How often a leader sends a heartbeat unless configured.
pub const HEARTBEAT_INTERVAL_DEFAULT: Duration = Duration::from_millis(100);
/// A silent leader is replaced after this unless configured: three heartbeats may be lost.
pub const ELECTION_TIMEOUT_DEFAULT: Duration = Duration::from_millis(400);
/// A configuration file larger than this is not one.
const CONFIG_FILE_BYTES_MAX: u64 = 1 << 20;

/// Text that was checked to parse as `T` and is kept as it was written, for the file and the command line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[serde(bound = "T: std::str::FromStr + Clone, T::Err: fmt::Display")]
pub struct Checked<T> {
    text: String,
    /// What the text means.
    pub value: T,
}

impl<T: std::str::FromStr> std::str::FromStr for Checked<T>
where
    T::Err: fmt::Display,
{
    type Err = String;
    fn from_str(text: &str) -> Result<Checked<T>, String> {
        let value = text.parse::<T>().map_err(|error| error.to_string())?;
        Ok(Checked { text: text.to_owned(), value })
    }
}

impl<T: std::str::FromStr> TryFrom<String> for Checked<T>
where
    T::Err: fmt::Display,
{
    type Error = String;
    fn try_from(text: String) -> Result<Checked<T>, String> {
        text.parse()
    }
}

impl<T> From<Checked<T>> for String {
    fn from(checked: Checked<T>) -> String {
        checked.text
    }
}

/// Declares the keys once: `Settings` (all optional, for one source of values) and how two sources combine.
macro_rules! settings {
    ($($(#[$meta:meta])* $key:ident: $type:ty,)*) => {
        /// The values that one source gives: the flags, the file or the defaults.
        #[derive(Clone, Debug, Default, clap::Args, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Settings {
            $($(#[$meta])* #[serde(skip_serializing_if = "Option::is_none")] pub $key: Option<$type>,)*
        }

        impl Settings {
            /// These values, and those of `weaker` where these say nothing.
            pub fn or(self, weaker: Settings) -> Settings {
                Settings { $($key: self.$key.or(weaker.$key),)* }
            }
        }
    };
}

settings! {
    /// The data directory; initialised at the first start
    #[arg(long, value_name = "DIR", help_heading = "Node")]
    data: PathBuf,
    /// The node's name among its peers: 1 to 63 of a-z, 0-9, _ and - [default: the host's name]
    #[arg(long, value_name = "NAME", help_heading = "Node")]
    name: String,
    /// Where clients connect; port 0 lets the kernel choose [default: 127.0.0.1:6400]
    #[arg(long, value_name = "HOST:PORT", help_heading = "Node")]
    listen: HostPort,
    /// Where replicas connect; port 0 lets the kernel choose [default: 127.0.0.1:6401]
    #[arg(long, value_name = "HOST:PORT", help_heading = "Node")]
    peer_listen: HostPort,
    /// Be a replica of the leader with this peer address
    #[arg(long, value_name = "PEER_HOST:PORT", help_heading = "Node")]
    follow: HostPort,
    /// Be a member of a cluster that replaces its leader by itself: NAME=PEER_HOST:PORT,... of every member, the same on each
    #[arg(long, value_name = "LIST", help_heading = "Node")]
    members: Checked<MemberList>,
    /// Ask these nodes as well for what this one's log lost: PEER_HOST:PORT,... beside the members and the leader
    #[arg(long, value_name = "LIST", help_heading = "Node")]
    repair_from: Checked<PeerList>,
    /// How a member that does not lead answers a write: moved (-MOVED 0 HOST:PORT) or readonly (-READONLY) [default: moved]
    #[arg(long, value_name = "HOW", help_heading = "Node")]
    redirect: Checked<Redirect>,
    /// Clients must AUTH with this password; only in the file, other users of the host see flags
    #[arg(long, value_name = "TEXT", help_heading = "Node", hide = true)]
    password: String,
    /// Who may connect as a client: `user NAME on >password ~* +@all` a line; credential:NAME reads systemd's credential
    #[arg(long, value_name = "FILE", help_heading = "Node")]
    users_file: PathBuf,
    /// Connected clients at most; further ones are turned away with an error [default: 10000]
    #[arg(long, value_name = "N", help_heading = "Node")]
    clients_max: usize,
    /// Disconnect a client that finishes no command for so long, a blocked one excepted; 0 never does [default: 0]
    #[arg(long, value_name = "TIME", help_heading = "Node")]
    client_idle_timeout: Span,
    /// Disconnect a client that has not logged in within this time; 0 never does [default: 10s]
    #[arg(long, value_name = "TIME", help_heading = "Node")]
    authentication_timeout: Span,
    /// Disconnect a client that reads nothing of its replies for so long; 0 never does [default: 60s]
    #[arg(long, value_name = "TIME", help_heading = "Node")]
    output_stalled_timeout: Span,
    /// Memory for what all clients have half sent, queued and not read; beyond it the largest are disconnected [default: 1GiB]
    #[arg(long, value_name = "SIZE", help_heading = "Node")]
    clients_bytes_max: ByteSize,
    /// What is logged: error, warn, info, debug, trace, or per module as RUST_LOG [default: info]
    #[arg(long, value_name = "FILTER", help_heading = "Node")]
    log_filter: String,
    /// Once the node serves, write `listen=` and `peer_listen=` with the real addresses to this file
    #[arg(long, value_name = "FILE", help_heading = "Node")]
    ready_file: PathBuf,

    /// Where clients connect over TLS, beside --listen; needs --tls-cert and --tls-key; off unless given
    #[arg(long, value_name = "HOST:PORT", help_heading = "TLS")]
    tls_listen: HostPort,
    /// This node's certificate, PEM, and after it those between it and its CA; read again when it changes or on SIGHUP
    #[arg(long, value_name = "FILE", help_heading = "TLS")]
    tls_cert: PathBuf,
    /// The certificate's key, PEM, without a passphrase
    #[arg(long, value_name = "FILE", help_heading = "TLS")]
    tls_key: PathBuf,
    /// The CAs of clients' certificates, PEM, and of peers' unless --peer-tls-ca names others
    #[arg(long, value_name = "FILE", help_heading = "TLS")]
    tls_ca: PathBuf,
    /// At --tls-listen clients have to show a certificate of --tls-ca
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "TLS")]
    tls_client_auth: bool,
    /// Peers speak TLS and each shows its certificate; the same on every node [default: false]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "TLS")]
    peer_tls: bool,
    /// The CA of peers' certificates, PEM: whoever has one of its certificates can be a peer [default: that of --tls-ca]
    #[arg(long, value_name = "FILE", help_heading = "TLS")]
    peer_tls_ca: PathBuf,
    /// The secret that the peers of a cluster share and prove to each other, a file that only its owner may read: `walferry secret
    /// FILE` makes it [default: DATA/peer.secret, which the first node makes]
    #[arg(long, value_name = "FILE", help_heading = "Peers")]
    peer_secret: PathBuf,
    /// What peers have to prove: secret (or their certificate, with --peer-tls), or none [default: secret]
    #[arg(long, value_name = "WHAT", help_heading = "Peers")]
    peer_auth: Checked<PeerAuth>,
    /// Let the kernel encrypt where it can (kTLS), so that sendfile stays zero-copy [default: true]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "TLS")]
    tls_kernel: bool,

    /// What a commit waits for: off, local, remote_write, remote_flush (or on), remote_apply [default: local]
    #[arg(long, value_name = "LEVEL", help_heading = "Commits")]
    commit_level: Checked<CommitLevel>,
    /// Which replicas a remote commit waits for: 'FIRST k (a, b)', 'ANY k (a, b)', 'ALL', '*' [default: none, and remote levels are
    /// refused; with --members a majority; after `walferry promote` what the leader before had]
    #[arg(long, value_name = "POLICY", help_heading = "Commits")]
    sync: Checked<SyncPolicy>,
    /// Refuse remote levels while fewer replicas are in sync [default: 0]
    #[arg(long, value_name = "N", help_heading = "Commits")]
    min_in_sync: usize,
    /// Answer UNCERTAIN to a commit that is unconfirmed for so long; 0 waits on [default: 0]
    #[arg(long, value_name = "TIME", help_heading = "Commits")]
    commit_timeout: Span,
    /// A read waits so long for the state that its session asks for (SESSION, READ); 0 does not wait [default: 1s]
    #[arg(long, value_name = "TIME", help_heading = "Commits")]
    read_wait_timeout: Span,
    /// When the sync set is lost: block, refuse, or degrade:LEVEL [default: block]
    #[arg(long, value_name = "HOW", help_heading = "Commits")]
    on_sync_loss: Checked<OnSyncLoss>,
    /// Wait so long for more commits before a frame is sealed [default: 0]
    #[arg(long, value_name = "TIME", help_heading = "Commits")]
    commit_delay: Span,

    /// Size of a log file, 16MiB to 1GiB; fixed at init, and another one is refused later [default: 64MiB]
    #[arg(long, value_name = "SIZE", help_heading = "Log")]
    segment_bytes: ByteSize,
    /// Frames in flight to the disk at once [default: measured at init]
    #[arg(long, value_name = "N", help_heading = "Log")]
    write_depth: usize,
    /// How a write is made durable, dsync or fdatasync [default: measured at init]
    #[arg(long, value_name = "METHOD", help_heading = "Log")]
    sync_method: Checked<SyncMethod>,
    /// Write through the page cache, for a filesystem without O_DIRECT
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Log")]
    buffered: bool,
    /// Memory for frames on their way to disk and replicas [default: 96MiB]
    #[arg(long, value_name = "SIZE", help_heading = "Log")]
    log_buffer_bytes: ByteSize,
    /// Keep at least so much log behind the newest checkpoint, unless the disk is full [default: 256MiB]
    #[arg(long, value_name = "SIZE", help_heading = "Log")]
    keep_bytes_min: ByteSize,
    /// Log that a slot may hold back before it is marked lost [default: 8GiB]
    #[arg(long, value_name = "SIZE", help_heading = "Log")]
    slot_keep_bytes_max: ByteSize,
    /// Read the log that is kept again after so long, so that damage is found while other nodes can mend it; 0: only after a start [default: 24h]
    #[arg(long, value_name = "TIME", help_heading = "Log")]
    scrub_interval: Span,

    /// A peer that is silent for so long is dead [default: 5s]
    #[arg(long, value_name = "TIME", help_heading = "Replication")]
    peer_timeout: Span,
    /// How often an idle link is proved alive, and a leader gives its members a heartbeat [default: 100ms]
    #[arg(long, value_name = "TIME", help_heading = "Replication")]
    heartbeat_interval: Span,
    /// With --members: a leader that is silent for so long is replaced; the same on every member [default: 400ms]
    #[arg(long, value_name = "TIME", help_heading = "Replication")]
    election_timeout: Span,
    /// A replica that lags for longer leaves the in-sync set [default: 10s]
    #[arg(long, value_name = "TIME", help_heading = "Replication")]
    replica_lag_time_max: Span,
    /// Send frames from this size on without a copy [default: 64KiB]
    #[arg(long, value_name = "SIZE", help_heading = "Replication")]
    zero_copy_bytes_min: ByteSize,

    /// Snapshots for replicas whose log is gone take no more than so many bytes a second together, unless the log behind them
    /// grows beyond half of slot_keep_bytes_max; 0 for no limit [default: 8MiB]
    #[arg(long, value_name = "SIZE", help_heading = "Replication")]
    snapshot_rate: ByteSize,

    /// Account where commits spend their time [default: true]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Accounting")]
    waterfall: bool,
    /// Answer Prometheus here, at /metrics; off unless given
    #[arg(long, value_name = "HOST:PORT", help_heading = "Accounting")]
    metrics_listen: HostPort,

    /// Write a checkpoint after so many bytes of changes, after eight times as much log (or half of slot_keep_bytes_max), after five
    /// minutes, and when the disk is full [default: 64MiB]
    #[arg(long, value_name = "SIZE", help_heading = "Store")]
    checkpoint_bytes: ByteSize,
    /// Memory for pages of the store's file [default: 128MiB]
    #[arg(long, value_name = "SIZE", help_heading = "Store")]
    store_cache_bytes: ByteSize,
}

impl Settings {
    /// The defaults of every key that has one.
    pub fn defaults() -> Settings {
        fn checked<T: std::str::FromStr<Err: fmt::Display>>(text: &str) -> Option<Checked<T>> {
            Some(text.parse().expect("a default parses"))
        }
        Settings {
            name: Some(host_name()),
            listen: Some("127.0.0.1:6400".parse().expect("a default parses")),
            peer_listen: Some("127.0.0.1:6401".parse().expect("a default parses")),
            redirect: checked("moved"),
            clients_max: Some(10_000),
            client_idle_timeout: Some(Span(Duration::ZERO)),
            authentication_timeout: Some(Span(Duration::from_secs(10))),
            output_stalled_timeout: Some(Span(Duration::from_secs(60))),
            clients_bytes_max: Some(ByteSize(1 << 30)),
            log_filter: Some("info".to_owned()),
            tls_client_auth: Some(false),
            peer_tls: Some(false),
            tls_kernel: Some(true),
            peer_auth: checked("secret"),
            commit_level: checked("local"),
            sync: checked(""),
            min_in_sync: Some(0),
            commit_timeout: Some(Span(Duration::ZERO)),
            read_wait_timeout: Some(Span(Duration::from_secs(1))),
            on_sync_loss: checked("block"),
            commit_delay: Some(Span(Duration::ZERO)),
            segment_bytes: Some(ByteSize(SEGMENT_BYTES_DEFAULT)),
            buffered: Some(false),
            log_buffer_bytes: Some(ByteSize(LOG_BUFFER_BYTES_DEFAULT as u64)),
            keep_bytes_min: Some(ByteSize(256 << 20)),
            slot_keep_bytes_max: Some(ByteSize(8 << 30)),
            scrub_interval: Some(Span(Duration::from_secs(24 * 3600))),
            peer_timeout: Some(Span(Duration::from_secs(5))),
            heartbeat_interval: Some(Span(HEARTBEAT_INTERVAL_DEFAULT)),
            election_timeout: Some(Span(ELECTION_TIMEOUT_DEFAULT)),
            replica_lag_time_max: Some(Span(Duration::from_secs(10))),
            zero_copy_bytes_min: Some(ByteSize(64 << 10)),
            snapshot_rate: Some(ByteSize(8 << 20)),
            waterfall: Some(true),
            checkpoint_bytes: Some(ByteSize(64 << 20)),
            store_cache_bytes: Some(ByteSize(128 << 20)),
            ..Settings::default()
        }
    }

    /// These values, and the defaults where they say nothing. A member listens where the others look for it.
    pub fn complete(self) -> Settings {
        let peer_listen = self.own_peer();
        self.or(Settings { peer_listen, ..Settings::default() }).or(Settings::defaults())
    }

    fn own_peer(&self) -> Option<HostPort> {
        let name = self.name.as_ref()?.parse().ok()?;
        self.members.as_ref()?.value.peer(&name).cloned()
    }

    /// Every key, in the order of the help text.
    pub fn keys() -> Vec<String> {
        #[derive(clap::Parser)]
        struct OnlySettings {
            #[command(flatten)]
            _settings: Settings,
        }
        OnlySettings::command().get_arguments().map(|arg| arg.get_id().to_string()).collect()
    }

    /// Reads a `walferry.toml`.
    pub fn from_file(path: &Path) -> Result<Settings, ConfigError> {
        let file = path.display().to_string();
        let read = || {
            let opened = File::open(path)?;
            let mut text = String::new();
            (&opened).take(CONFIG_FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
            if text.len() as u64 > CONFIG_FILE_BYTES_MAX {
                return Err(io::Error::other(format!(
                    "{CONFIG_FILE_BYTES_MAX} bytes are the most for a configuration"
                )));
            }
            Ok((opened, text))
        };
        let (opened, text) = read().map_err(|source| ConfigError::Read { file: file.clone(), source })?;
        let settings = Settings::from_toml(&text, &file)?;
        match check_private(&opened, Outsiders::Others) {
            Err(error) if settings.password.is_some() => Err(ConfigError::Value {
                key: "password",
                value: "(not shown)".to_owned(),
                reason: format!("it stands in {file}, and {error}; or name a users_file"),
            }),
            _ => Ok(settings),
        }
    }

    /// Reads the text of a `walferry.toml`; `file` is for messages.
    pub fn from_toml(text: &str, file: &str) -> Result<Settings, ConfigError> {
        let syntax = |error: toml::de::Error| ConfigError::Syntax { file: file.to_owned(), text: error.to_string() };
        let table = text.parse::<toml::Table>().map_err(syntax)?;
        let keys = Settings::keys();
        if let Some(key) = table.keys().find(|key| !keys.contains(key)) {
            let line = text.lines().position(|line| line.trim_start_matches([' ', '\t', '[', '"']).starts_with(key));
            let hint = match closest(key, &keys) {
                Some(known) => format!("; did you mean `{known}`?"),
                None => "; `walferry config show` lists every key".to_owned(),
            };
            let line = line.map_or(1, |index| index + 1);
            return Err(ConfigError::UnknownKey { file: file.to_owned(), line, key: key.clone(), hint });
        }
        toml::from_str(text).map_err(syntax)
    }

    /// The values as a table of TOML values, absent keys left out.
    pub fn to_table(&self) -> toml::Table {
        toml::Table::try_from(self).expect("every setting is a TOML value")
    }
}

/// The known key that `key` most likely was meant to be.
fn closest<'a>(key: &str, keys: &'a [String]) -> Option<&'a str> {
    let plain = key.to_lowercase().replace('-', "_");
    keys.iter()
        .map(|known| (strsim::jaro_winkler(&plain, known), known.as_str()))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
}

/// The host's name made fit to be a node's name.
fn host_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let label = host.trim().split('.').next().unwrap_or_default().to_lowercase();
    let fit = |c: char| {
        if c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' { c } else { '_' }
    };
    let name: String = label.chars().map(fit).take(MEMBER_NAME_BYTES_MAX).collect();
    if name.is_empty() { "walferry".to_owned() } else { name }
}
