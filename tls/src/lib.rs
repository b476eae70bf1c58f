//! What a connection of a node begins with: TLS, and between peers the proof of the secret that they share. It ends before the
//! drivers: whoever accepts or connects here is given a stream socket on which plain bytes go in and out, so that the ring,
//! `sendfile` and every protocol stay as they are. Knows certificates, secrets and sockets, no message and no command.
//!
//! ```text
//! gate (accepts)    ─┐                       ┌─ ktls: the socket itself, the kernel has the keys ────────────┐
//!                    ├─ handshake ─ terminate┤                                                             ├─ introduction ─>
//! PeerLinks (dials) ─┘      │                └─ relay: one end of a socket pair, a thread has the keys ───┘       │
//!                       identity ── files        certificates, read again when they change               proof ── secret
//! ```

mod error;
mod files;
mod gate;
mod handshake;
mod identity;
mod introduction;
mod ktls;
mod names;
mod peer;
mod private_file;
mod proof;
mod quota;
mod relay;
mod secret;
mod stream;
mod terminate;

pub use error::{HandshakeError, ProofError, SecretError, TlsError};
pub use files::{NamedFile, client_config};
pub use gate::{Accepted, Answers, Gate, GateConfig, GateTls};
pub use identity::{Identity, Purpose, Reloaded};
pub use peer::{PeerLinks, Secured};
pub use private_file::{Outsiders, PrivateFileError, check_private, open_private};
pub use proof::{PROOF_MAGIC, Proving};
pub use quota::Quota;
pub use rustls;
pub use secret::{PeerSecret, Secrets};
pub use stream::ClientStream;
pub use terminate::{Counts, Protection, Terminator};
