//! `walferry witness`: a member that votes and has no log, so that two hosts with data and a small third are a full cluster.

use std::collections::BTreeMap;
use std::time::Duration;

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
use crate::config::{ConfigError, Settings, TlsConfig, check_timeouts, resolve};
use crate::data_dir::{close_to_others, make_directory};
use crate::error::DaemonError;
use crate::logging;
use crate::notify::Notifier;
use crate::peer_secret::SecretSettings;
use crate::role::{self, ROLE_FILE, Role};
use crate::signals::Signals;
use crate::tls::Tls;

/// The value of a key that has no default.
fn given<T>(key: &'static str, value: Option<T>) -> Result<T, ConfigError> {
    value.ok_or(ConfigError::Missing { key })
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
pub fn run(settings: Settings) -> Result<(), DaemonError> {
    let tls_config = TlsConfig::for_witness(&settings)?;
    let data = given("data", settings.data)?;
    let members = given("members", settings.members)?.value;
    let name = given("name", settings.name)?;
    let name: MemberName = name.parse().map_err(|error| ConfigError::value("name", &name, error))?;
    if members.peer(&name).is_none() {
        return Err(ConfigError::value("members", members, format_args!("does not name this node, {name}")).into());
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
    role::check(&data, &Role::Witness, None)?;
    secret.check(resolve("peer_listen", &listen)?)?;
    make_directory(&data)?;
    if let Some(line) = close_to_others(&data)? {
        tracing::warn!("{line}");
    }
    let lock = DirLock::take(&data)?;
    let role_file = data.join(ROLE_FILE);
    small_file::mend(&role_file).map_err(DaemonError::file("mend", &role_file))?;
    role::take(&data, &Role::Witness, None)?;
    let tls = tls.with_secret(secret.open()?);
    let peers = members.peers();
    let store = RegisterStore::open(&data, MemberId(rand::rng().random()), Some(&peers))?;
    let address = resolve("peer_listen", &listen)?;
    let listener = std::net::TcpListener::bind(address).map_err(|source| DaemonError::Listen {
        key: "peer_listen",
        address,
        source,
    })?;
    let agent = agent(name.clone(), peers, ClusterId(rand::rng().random()), (election_timeout, heartbeat_interval));
    let config = ClusterConfig { agent, tls: tls.clone() };
    let mut signals = Signals::block(0).map_err(DaemonError::Descriptors)?;
    // A vote or a promise in a file that nobody finds again is none.
    let register_file = data.join(REGISTER_FILE);
    let register = HeldFile::at(&register_file).map_err(DaemonError::file("open", &register_file))?;
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
        if let Some(signal) = signals.wait(Duration::from_secs(1)).map_err(DaemonError::Descriptors)? {
            if signal == Signal::SIGHUP {
                tls.reload();
                continue;
            }
            tracing::info!(%signal, "asked to end");
            break;
        }
        if let Some(text) = held.iter().find_map(HeldFile::gone) {
            return Err(DaemonError::FileGone(text));
        }
        if thread.is_finished() {
            return Err(DaemonError::WitnessEnded);
        }
    }
    notifier.stopping();
    drop(reports);
    let _ = thread.join();
    tls.close();
    Ok(())
}
