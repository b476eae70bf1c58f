//! Which secret a node proves to its peers: the one that `peer_secret` names, or else that in its data directory, which the first
//! node makes. A start that could talk to nobody is refused before anything is made.
//!
//! | `peer_auth` | `peer_secret` | what is proved |
//! |---|---|---|
//! | `none` | - | nothing; refused where others than this host reach the node, unless peers speak TLS |
//! | `secret` | a file | that secret, behind TLS too |
//! | `secret` | - | under `peer_tls` the certificate; else `DIR/peer.secret`, made by a node that begins alone |

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use walferry_engine::epoch::EPOCHS_FILE;
use walferry_tls::{PeerSecret, Secrets};

use crate::config::{ConfigError, NodeConfig, PeerAuth, TlsConfig};
use crate::error::DaemonError;

/// The secret of a cluster that began with this node.
pub const SECRET_FILE: &str = "peer.secret";

/// A secret that another node is just making is waited for so long: nodes are started one after the other in one breath.
const SECRET_WAIT_MAX: Duration = Duration::from_secs(5);
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

fn wait_for(file: &Path) {
    let until = Instant::now() + SECRET_WAIT_MAX;
    let is_missing = || file.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound);
    if is_missing() {
        tracing::info!(file = %file.display(), "waiting up to {SECRET_WAIT_MAX:?} for the peer secret");
    }
    while is_missing() && Instant::now() < until {
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// What of a node's settings decides about its secret.
#[derive(Clone, Debug)]
pub struct SecretSettings<'a> {
    /// The node's name.
    pub name: &'a str,
    /// Its data directory.
    pub data: &'a Path,
    /// What peers have to prove.
    pub auth: PeerAuth,
    /// The file that was named.
    pub file: Option<&'a Path>,
    /// What of its links is TLS.
    pub tls: &'a TlsConfig,
    /// Other nodes are named that it has to talk to: the key, and its value.
    pub needs: Option<(&'static str, String)>,
}

impl<'a> SecretSettings<'a> {
    /// Of a node with a log.
    pub fn of(config: &'a NodeConfig) -> SecretSettings<'a> {
        let has_others = config.members.as_ref().is_some_and(|members| members.names().count() > 1);
        let members = config.members.as_ref().filter(|_| has_others).map(|members| ("members", members.to_string()));
        let needs = config.follow.as_ref().map(|leader| ("follow", leader.to_string())).or(members);
        SecretSettings {
            name: &config.name,
            data: &config.data,
            auth: config.peer_auth,
            file: config.peer_secret.as_deref(),
            tls: &config.tls,
            needs,
        }
    }

    fn in_data(&self) -> std::path::PathBuf {
        self.data.join(SECRET_FILE)
    }

    /// Whether there is something to prove, or something that says that nothing has to be.
    pub fn check(&self, peer_listen: SocketAddr) -> Result<(), ConfigError> {
        let refuse = |key, value: String, reason: String| Err(ConfigError::Value { key, value, reason });
        if let (PeerAuth::Secret, Some(file)) = (self.auth, self.file) {
            wait_for(file);
            Secrets::load(file)?;
        }
        match (self.auth, self.file, &self.needs) {
            (PeerAuth::None, Some(file), _) => {
                let reason = "nobody proves it with peer_auth = none: leave one out".to_owned();
                refuse("peer_secret", file.display().to_string(), reason)
            }
            (PeerAuth::None, None, _) if !peer_listen.ip().is_loopback() && !self.tls.peers => {
                let reason = format!(
                    "whoever reaches peer_listen = {peer_listen} could be a replica, read the log and end the leader: give peer_secret \
                     or peer_tls, or listen on 127.0.0.1"
                );
                refuse("peer_auth", "none".to_owned(), reason)
            }
            (PeerAuth::Secret, None, Some((key, value))) if !self.tls.peers && !self.in_data().exists() => {
                let reason = format!(
                    "peers prove to each other that they hold the same secret: name its file with --peer-secret FILE (`walferry secret \
                     FILE` makes one; that of a node which began alone is {SECRET_FILE} in its data directory), or say --peer-auth \
                     none on all of them"
                );
                refuse(key, value.clone(), reason)
            }
            _ => Ok(()),
        }
    }

    /// What is proved, if anything. A node that begins alone makes its secret, in the data directory, which is there.
    pub fn open(&self) -> Result<Option<Arc<PeerSecret>>, DaemonError> {
        let in_data = self.in_data();
        let file = match self.file {
            _ if self.auth == PeerAuth::None => return Ok(None),
            Some(file) => file,
            None if self.tls.peers => return Ok(None),
            None => in_data.as_path(),
        };
        if self.file.is_none() && !file.exists() {
            Secrets::create(file)?;
            let file = file.display();
            if self.data.join(EPOCHS_FILE).exists() {
                tracing::warn!(%file, "there was no peer secret any more, a new one is made: nodes that hold the old one are refused");
            } else {
                tracing::info!(%file, "a secret for peers is made: other nodes of this cluster need it (--peer-secret)");
            }
        }
        Ok(Some(Arc::new(PeerSecret::load(self.name, file)?)))
    }
}
