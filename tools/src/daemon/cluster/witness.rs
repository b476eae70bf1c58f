//! `walferry witness`: a member that votes and has no log, so that two hosts with data and a small third are a full cluster.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use nix::sys::signal::Signal;
use rand::RngExt;
use walferry_cluster::agent::AgentConfig;
use walferry_cluster::consensus::{REGISTER_FILE, RegisterStore};
use walferry_cluster::register::{ClusterState, Kind, MemberId};
use walferry_cluster::{ClusterId, MemberName};
use walferry_engine::held::HeldFile;
use walferry_engine::lock::DirLock;
use walferry_engine::lsn::Epoch;
use walferry_engine::small_file;
use walferry_engine::world;

use super::{ClusterConfig, driver};
use crate::cli::Failure;
use crate::config::{Checked, ConfigError, MemberList, PeerAuth, Settings, TlsConfig, check_timeouts, resolve};
use crate::daemon::DaemonError;
use crate::daemon::notify::Notifier;
use crate::daemon::peer_secret::SecretSettings;
use crate::daemon::signals::Signals;
use crate::daemon::tls::Tls;
use crate::init::{close_to_others, make_directory};
use crate::logging;
use crate::role::{self, ROLE_FILE, Role};
use crate::units::{HostPort, Span};

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry witness --data /var/lib/walferry/w --name w --peer-secret /etc/walferry/peer.secret \\
      --members a=10.0.0.1:6401,b=10.0.0.2:6401,w=10.0.0.3:6401
  walferry witness --config /etc/walferry/w.toml --data /var/lib/walferry/w

It listens at its own address of --members. SIGTERM or SIGINT stops it; exit code 0.";

/// What a witness is started with; flags win over the file.
#[derive(Debug, Args)]
pub struct WitnessArgs {
    /// Read the configuration from this walferry.toml; what only a node with a log needs is left aside
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The directory for its vote and promises: a few kilobytes
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Its name among the members
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Every member, as given to every other: NAME=PEER_HOST:PORT, ...
    #[arg(long, value_name = "LIST")]
    members: Option<Checked<MemberList>>,
    /// Where members connect [default: its address in --members]
    #[arg(long, value_name = "HOST:PORT")]
    peer_listen: Option<HostPort>,
    /// A leader that is silent for so long is replaced; the same on every member [default: 400ms]
    #[arg(long, value_name = "TIME")]
    election_timeout: Option<Span>,
    /// How often a leader gives a sign of life; the same on every member [default: 100ms]
    #[arg(long, value_name = "TIME")]
    heartbeat_interval: Option<Span>,
    /// Members speak TLS and each shows its certificate; the same on every member
    #[arg(long)]
    peer_tls: bool,
    /// Its certificate, PEM
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// The certificate's key, PEM
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// The CA of members' certificates, PEM
    #[arg(long, value_name = "FILE")]
    peer_tls_ca: Option<PathBuf>,
    /// The secret that the members share and prove to each other [default: DATA/peer.secret]
    #[arg(long, value_name = "FILE")]
    peer_secret: Option<PathBuf>,
    /// What members have to prove: secret (or their certificate, with --peer-tls), or none [default: secret]
    #[arg(long, value_name = "WHAT")]
    peer_auth: Option<Checked<PeerAuth>>,
    /// What is logged: error, warn, info, debug, trace, or per module as RUST_LOG [default: info]
    #[arg(long, value_name = "FILTER")]
    log_filter: Option<String>,
}

impl WitnessArgs {
    /// Flags, file and defaults put together.
    fn settings(self) -> Result<Settings, Failure> {
        let file = self.config.as_deref().map_or(Ok(Settings::default()), Settings::from_file)?;
        let flags = Settings {
            data: self.data,
            name: self.name,
            members: self.members,
            peer_listen: self.peer_listen,
            election_timeout: self.election_timeout,
            heartbeat_interval: self.heartbeat_interval,
            peer_tls: self.peer_tls.then_some(true),
            tls_cert: self.tls_cert,
            tls_key: self.tls_key,
            peer_tls_ca: self.peer_tls_ca,
            peer_secret: self.peer_secret,
            peer_auth: self.peer_auth,
            log_filter: self.log_filter,
            ..Settings::default()
        };
        Ok(flags.or(file).complete())
    }
}

/// The value of a key that has no default.
fn given<T>(key: &'static str, value: Option<T>) -> Result<T, Failure> {
    Ok(value.ok_or(ConfigError::Missing { key })?)
}

/// What a witness's agent goes by: it has no log, no clients and no say in who confirms commits.
pub fn agent(
    name: MemberName,
    members: BTreeMap<MemberName, String>,
    new_cluster_id: ClusterId,
    (election_timeout, heartbeat_interval): (Duration, Duration),
) -> AgentConfig {
    AgentConfig {
        name,
        kind: Kind::Witness,
        members,
        client_address: String::new(),
        cluster_id: None,
        new_cluster_id,
        election_timeout,
        heartbeat_interval,
        policy: String::new(),
        min_in_sync: 0,
        history_epoch: Epoch(0),
    }
}

/// What a witness is, by the register as it knows it.
fn status_of(name: &MemberName, state: &ClusterState) -> String {
    match &state.leader {
        Some(leader) => format!("witness {name}: {leader} leads in epoch {}", state.epoch),
        None => format!("witness {name}: it knows no leader"),
    }
}

/// Runs a witness until a signal ends it.
pub fn run(args: WitnessArgs) -> Result<(), Failure> {
    let settings = args.settings()?;
    logging::start(settings.log_filter.as_deref().unwrap_or_default())?;
    let tls_config = TlsConfig::for_witness(&settings)?;
    let data = given("data", settings.data)?;
    let members = given("members", settings.members)?.value;
    let name = given("name", settings.name)?;
    let name: MemberName = name.parse().map_err(|error| Failure::Usage(format!("name: {error}")))?;
    if members.peer(&name).is_none() {
        return Err(Failure::Usage(format!("members = {members} does not name this node, {name}")));
    }
    let election_timeout = given("election_timeout", settings.election_timeout)?.0;
    let heartbeat_interval = given("heartbeat_interval", settings.heartbeat_interval)?.0;
    check_timeouts(election_timeout, heartbeat_interval)?;
    let listen = given("peer_listen", settings.peer_listen)?;
    let secret = SecretSettings {
        name: name.as_str(),
        data: &data,
        auth: given("peer_auth", settings.peer_auth)?.value,
        file: settings.peer_secret.as_deref(),
        tls: &tls_config,
        needs: (members.names().count() > 1).then(|| ("members", members.to_string())),
    };
    let tls = Tls::open(&tls_config)?;
    role::check(&data, &Role::Witness, None).map_err(DaemonError::from)?;
    secret.check(resolve("peer_listen", &listen)?)?;
    make_directory(&data)?;
    if let Some(line) = close_to_others(&data)? {
        tracing::warn!("{line}");
    }
    let lock = DirLock::take(&data).map_err(Failure::failed)?;
    small_file::mend(&data.join(ROLE_FILE)).map_err(Failure::failed)?;
    role::take(&data, &Role::Witness, None).map_err(DaemonError::from)?;
    let tls = tls.with_secret(secret.open()?);
    let peers = members.peers();
    let store = RegisterStore::open(&data, MemberId(rand::rng().random()), Some(&peers)).map_err(Failure::failed)?;
    let listener = listen.resolve().and_then(std::net::TcpListener::bind);
    let listener = listener
        .map_err(|error| Failure::failed(format_args!("cannot listen on {listen} (--peer-listen): {error}")))?;
    let agent = agent(name.clone(), peers, ClusterId(rand::rng().random()), (election_timeout, heartbeat_interval));
    let config = ClusterConfig { agent, tls: tls.clone() };
    let mut signals = Signals::block(0).map_err(Failure::failed)?;
    // A vote or a promise in a file that nobody finds again is none.
    let register = HeldFile::at(&data.join(REGISTER_FILE)).map_err(Failure::failed)?;
    let held: Vec<HeldFile> = lock.held().iter().cloned().chain([register]).collect();
    let (reports, inbox) = tokio::sync::mpsc::unbounded_channel();
    let thread = driver::spawn(config, store.clone(), listener, None, inbox)?;
    tracing::info!(listen = %listen, "witness {name} serves");
    let status_line = || status_of(&name, &store.state());
    let notifier = Notifier::new();
    logging::finish();
    notifier.ready(&status_line());
    loop {
        notifier.status(world::now(), status_line);
        if let Some(signal) = signals.wait(Duration::from_secs(1)).map_err(Failure::failed)? {
            if signal == Signal::SIGHUP {
                tls.reload();
                continue;
            }
            tracing::info!(%signal, "asked to end");
            break;
        }
        if let Some(text) = held.iter().find_map(HeldFile::gone) {
            return Err(Failure::failed(format_args!("this process ends: {text}")));
        }
        if thread.is_finished() {
            return Err(Failure::failed("the witness cannot take part any more; its log tells why"));
        }
    }
    notifier.stopping();
    drop(reports);
    let _ = thread.join();
    tls.close();
    Ok(())
}
