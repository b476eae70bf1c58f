//! What can be wrong with bytes from a peer. Made by the codec, shown by both link drivers, which close the
//! connection: after any of these the stream's framing is lost.

/// Why no message was read from a stream.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The stream failed, or ended before the message did.
    #[error(transparent)]
    Stream(#[from] std::io::Error),
    /// What came is none.
    #[error(transparent)]
    Message(#[from] MessageError),
}

/// Why bytes from a peer are not a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// No message of this number exists in this protocol version.
    #[error("the peer sent a message of unknown kind {0}")]
    Kind(u8),
    /// The envelope's reserved bytes are not zero: this is no walferry peer, or the stream lost its framing.
    #[error("the peer does not speak walferry's protocol")]
    Envelope,
    /// A TLS handshake, where plain messages are expected.
    #[error("the peer speaks TLS and this node does not: set peer_tls = true on both or on neither")]
    Tls,
    /// The proof of a peer secret, where plain messages are expected.
    #[error(
        "the peer proves a secret and this node does not: give both the same file (--peer-secret FILE), or say --peer-auth none on both"
    )]
    Proof,
    /// An error of a port for clients, in RESP.
    #[error("that is a port for clients, and not for peers: give the node's peer address instead, its --peer-listen")]
    Clients,
    /// The first message does not start with the protocol's magic.
    #[error("the peer's first message is not a walferry hello")]
    Magic,
    /// A length beyond its bound.
    #[error("the peer sent a {kind} of {bytes} bytes; at most {bytes_max} are allowed")]
    Length {
        /// The message.
        kind: &'static str,
        /// What its envelope says.
        bytes: usize,
        /// The bound.
        bytes_max: usize,
    },
    /// A body that ends before its fields do, or goes on after them.
    #[error("the peer sent a {0} whose body does not hold its fields")]
    Body(&'static str),
    /// A field with a value that it cannot have.
    #[error("the peer sent a {kind} with an impossible {field}")]
    Field {
        /// The message.
        kind: &'static str,
        /// The field.
        field: &'static str,
    },
}
