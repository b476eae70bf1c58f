//! Who a node is in TLS: the settings made of its files, and new ones when the files change. A bad new file keeps the old
//! settings. Asked at each handshake; looks at the files at most once a second.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::{ClientConfig, ServerConfig};

use crate::error::TlsError;
use crate::files::{NamedFile, Pair, for_clients, for_peers};

/// The files are looked at this often at most.
pub(crate) const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What TLS is for, and whose certificates are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A listener for clients.
    Clients {
        /// The CAs that a client's certificate must come from; without, clients need none.
        ca: Option<NamedFile>,
    },
    /// Links between peers, where each side shows its certificate.
    Peers {
        /// The CAs that a peer's certificate must come from.
        ca: NamedFile,
    },
}

/// Settings that belong together.
#[derive(Clone)]
pub(crate) struct Current {
    pub(crate) server: Arc<ServerConfig>,
    /// Peers only.
    pub(crate) client: Option<Arc<ClientConfig>>,
}

/// What tells one state of a file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    inode: u64,
    bytes: u64,
    /// Of content or mode: a key that others could read is read again when it was closed to them.
    changed: (i64, i64),
}

impl Stamp {
    /// Of a file that is there.
    pub(crate) fn of(file: &Path) -> Option<Stamp> {
        let meta = std::fs::metadata(file).ok()?;
        Some(Stamp { inode: meta.ino(), bytes: meta.len(), changed: (meta.ctime(), meta.ctime_nsec()) })
    }
}

struct State {
    current: Current,
    /// What the files were like when they were read last, usable or not.
    stamps: Vec<Option<Stamp>>,
    looked: Instant,
}

/// What a look at the files brought.
#[derive(Debug)]
pub enum Reloaded {
    /// They are as they were.
    Unchanged,
    /// Handshakes from now on use the new ones.
    New,
    /// The new ones are of no use; the old ones stay.
    Kept(TlsError),
}

/// A node's certificate and key, and whom it believes.
pub struct Identity {
    pair: Pair,
    purpose: Purpose,
    state: Mutex<State>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("pair", &self.pair).field("purpose", &self.purpose).finish()
    }
}

impl Identity {
    /// Reads the files; they have to be there and to fit.
    pub fn load(certificate: NamedFile, key: NamedFile, purpose: Purpose) -> Result<Identity, TlsError> {
        let pair = Pair { certificate, key };
        // Before they are read: a change in between is found at the next look.
        let stamps = stamps(&pair, &purpose);
        let current = read(&pair, &purpose)?;
        Ok(Identity { pair, purpose, state: Mutex::new(State { current, stamps, looked: Instant::now() }) })
    }

    /// The settings for a handshake that begins now.
    pub(crate) fn current(&self) -> Current {
        let mut state = self.state.lock().expect("nobody panics with it");
        if state.looked.elapsed() >= LOOK_INTERVAL {
            self.look(&mut state, false);
        }
        state.current.clone()
    }

    /// Reads the files again, at an operator's word.
    pub fn reload(&self) -> Reloaded {
        self.look(&mut self.state.lock().expect("nobody panics with it"), true)
    }

    fn look(&self, state: &mut State, asked: bool) -> Reloaded {
        state.looked = Instant::now();
        let now = stamps(&self.pair, &self.purpose);
        if now == state.stamps && !asked {
            return Reloaded::Unchanged;
        }
        state.stamps = now;
        let certificate = self.pair.certificate.path.display();
        match read(&self.pair, &self.purpose) {
            Ok(current) => {
                state.current = current;
                tracing::info!(%certificate, "certificates were read again; new connections use them");
                Reloaded::New
            }
            Err(error) => {
                tracing::warn!("the new certificates are of no use, the old ones stay: {error}");
                Reloaded::Kept(error)
            }
        }
    }
}

fn read(pair: &Pair, purpose: &Purpose) -> Result<Current, TlsError> {
    match purpose {
        Purpose::Clients { ca } => {
            let server = for_clients(pair, ca.as_ref())?;
            Ok(Current { server: Arc::new(server), client: None })
        }
        Purpose::Peers { ca } => {
            let (server, client) = for_peers(pair, ca)?;
            Ok(Current { server: Arc::new(server), client: Some(Arc::new(client)) })
        }
    }
}

fn stamps(pair: &Pair, purpose: &Purpose) -> Vec<Option<Stamp>> {
    let ca = match purpose {
        Purpose::Clients { ca } => ca.as_ref(),
        Purpose::Peers { ca } => Some(ca),
    };
    let files = [Some(&pair.certificate), Some(&pair.key), ca];
    files.into_iter().flatten().map(|file| Stamp::of(&file.path)).collect()
}
