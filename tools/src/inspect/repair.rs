//! `walferry log repair`: gives a log whose node is stopped back what its disk lost, from nodes that run. What a node does by
//! itself at its start for the part that it replays, this does for the whole log, and from whomever it is told.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use walferry_applier::repair::Repairer;
use walferry_applier::repair::plan::Source;
use walferry_engine::lock::DirLock;
use walferry_engine::mend::Mender;
use walferry_engine::meta::Meta;
use walferry_engine::recover::recover;

use super::{Log, count};
use crate::failure::{Failure, say};
use walferry_tls::PeerSecret;

use walferry_node::config::{PeerList, Settings, TlsConfig};
use walferry_node::peer_secret::SECRET_FILE;
use walferry_node::tls::Tls;

/// Nodes that cannot be reached are waited for so long.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// Flags of `walferry log repair`.
#[derive(Debug, Args)]
pub struct RepairArgs {
    /// The data directory; its node must not run
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Ask the nodes with these peer addresses
    #[arg(long, value_name = "PEER_HOST:PORT,...")]
    from: PeerList,
    /// They speak TLS (--peer-tls): a certificate of their CA, PEM; the node's own will do
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "peer_tls_ca"])]
    tls_cert: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// The CA of peers' certificates, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    peer_tls_ca: Option<PathBuf>,
    /// The secret that they prove [default: DATA/peer.secret, if there is one]
    #[arg(long, value_name = "FILE")]
    peer_secret: Option<PathBuf>,
}

impl RepairArgs {
    /// Peers in the clear, unless a certificate was given, and without a proof, unless there is a secret.
    fn tls(&self, name: &str) -> Result<Tls, Failure> {
        let settings = Settings {
            peer_tls: Some(self.tls_cert.is_some()),
            tls_cert: self.tls_cert.clone(),
            tls_key: self.tls_key.clone(),
            peer_tls_ca: self.peer_tls_ca.clone(),
            ..Settings::default()
        };
        let in_data = self.data.join(SECRET_FILE);
        let file = self.peer_secret.clone().or_else(|| in_data.exists().then_some(in_data));
        let secret = file.map(|file| PeerSecret::load(name, &file).map(Arc::new)).transpose();
        Ok(Tls::open(&TlsConfig::of(&settings)?)?.with_secret(secret.map_err(Failure::failed)?))
    }
}

/// Repairs, and tells each part.
pub fn repair(args: &RepairArgs) -> Result<(), Failure> {
    let _lock = DirLock::take(&args.data).map_err(Failure::failed)?;
    let log = Log::open(&args.data)?;
    let meta = Meta::load(&args.data).map_err(Failure::failed)?.expect("the log was opened with it");
    let tls = args.tls(&meta.name)?;
    let filled = Mender::new(&args.data, meta.segment_bytes).fill_up();
    for (path, bytes) in filled.map_err(|error| Failure::failed(format_args!("{}: {error}", log.dir.display())))? {
        say(format_args!("{} had {bytes} bytes: zeros stand for what it lost", path.display()))?;
    }
    let source = |peer: &walferry_node::units::HostPort| Source { name: peer.to_string(), address: peer.to_string() };
    let repairer = Repairer {
        data: args.data.clone(),
        cluster_id: meta.cluster_id,
        name: meta.name.parse().map_err(Failure::failed)?,
        segment_bytes: meta.segment_bytes,
        history: log.history.clone(),
        sources: args.from.0.iter().map(source).collect(),
        links: tls.links(),
        wait_max: WAIT_MAX,
    };
    let known = log.known(&args.data)?;
    let look = || {
        let found = recover(&log.dir, log.segment_bytes, known, &log.history)?;
        count(&log, &found)?;
        Ok(found)
    };
    let (found, repaired) = repairer.repair_all(look, &mut |_| {}).map_err(Failure::failed)?;
    for part in &repaired {
        let (from, to, path, by) = (part.from, part.to, part.path.display(), &part.by);
        say(format_args!("repaired {from}..{to} of {path} from {by}"))?;
    }
    say(format_args!("{}: {} to {}, no damage", log.dir.display(), log.start, found.end))
}
