//! TLS for the links of a node. It ends before the drivers: whoever accepts or connects here is given a stream socket on which
//! plain bytes go in and out, so that the ring, `sendfile` and every protocol stay as they are. Knows certificates and sockets,
//! no message and no command.
//!
//! ```text
//! gate (accepts)  ─┐                        ┌─ ktls: the socket itself, the kernel has the keys
//!                  ├─ handshake ─ terminate ┤
//! PeerTls (dials) ─┘      │                 └─ relay: one end of a socket pair, a thread has the keys
//!                     identity ── files         certificates, read again when they change
//! ```

mod error;
mod files;
mod gate;
mod handshake;
mod identity;
mod ktls;
mod peer;
mod private_file;
mod quota;
mod relay;
mod stream;
mod terminate;

pub use error::{HandshakeError, TlsError};
pub use files::{NamedFile, client_config};
pub use gate::{Accepted, Gate, GateConfig};
pub use identity::{Identity, Purpose, Reloaded};
pub use peer::{PeerTls, Secured};
pub use private_file::{Outsiders, PrivateFileError, check_private, open_private};
pub use quota::Quota;
pub use rustls;
pub use stream::ClientStream;
pub use terminate::{Counts, Protection, Terminator};
