//! Why a session has no answer, in the words that a program decides by.

/// Why a write or a read has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No node that could do it was found in time. A write was not done.
    #[error("no node did it within the time that was given: {0}")]
    Unavailable(String),
    /// The write was sent, and whether it was done is not known: read before it is sent again.
    #[error("it is not known whether {address} did the write: {reason}")]
    Uncertain {
        /// The node that it was sent to.
        address: String,
        /// What happened instead of an answer.
        reason: String,
    },
    /// A failover lost what the session has seen. `Session::reset` goes on from what there is. A write was not done.
    #[error("{0}")]
    Lost(String),
    /// The node answered with an error of its own, its code first. A write was not done.
    #[error("{address} answered: {text}")]
    Refused {
        /// The node's address.
        address: String,
        /// The error.
        text: String,
    },
    /// This is not a session's token, or it is one of another cluster.
    #[error("the session's token is of no use here: {0}")]
    Token(String),
    /// The addresses to begin with are wrong, or nobody answers there.
    #[error("no cluster found: {0}")]
    NoCluster(String),
}
