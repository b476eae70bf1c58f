//! `walferry witness`: the flags of a witness, and its start.

use std::path::PathBuf;

use clap::Args;
use walferry_node::cluster::witness;
use walferry_node::config::{Checked, MemberList, PeerAuth, Settings};
use walferry_node::logging;
use walferry_node::units::{HostPort, Span};

use crate::failure::Failure;

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
    /// Read the configuration from this walferry.toml; what only a node with a log needs is ignored
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
    /// How often a leader sends a heartbeat; the same on every member [default: 100ms]
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

/// Runs a witness until a signal ends it.
pub fn run(args: WitnessArgs) -> Result<(), Failure> {
    let settings = args.settings()?;
    logging::start(settings.log_filter.as_deref().unwrap_or_default())?;
    Ok(witness::run(settings)?)
}
