//! Why certificates cannot be used, and why a handshake failed, in words that tell what to do.

use std::io;
use std::path::PathBuf;

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};

use crate::private_file::PrivateFileError;

/// Why files with certificates or keys are of no use.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or holds something else.
    #[error("{option} = {}: {text}", path.display())]
    File {
        /// The option that names the file.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        text: String,
    },
    /// The files do not go together.
    #[error("{options}: {text}")]
    Misfit {
        /// The options and files.
        options: String,
        /// What is wrong.
        text: String,
    },
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection broke.
    #[error("the connection failed during the handshake: {0}")]
    Io(#[from] io::Error),
    /// The other side hung up.
    #[error("it closed the connection during the TLS handshake: does it speak TLS on this port?")]
    Closed,
    /// The other side does not speak TLS.
    #[error("it does not speak TLS; it said {0:?}")]
    Plain(String),
    /// The other side does not speak TLS either, and proves the secret.
    #[error("it does not speak TLS: it proves the peer secret in the clear")]
    Knock,
    /// The handshake timed out.
    #[error("the handshake did not end in time")]
    Slow,
    /// TLS was spoken and did not work out.
    #[error("{}", explain(.0))]
    Tls(#[from] Error),
    /// The other side hung up before it had proved itself.
    #[error(
        "it closed the connection before it had proved that it holds the peer secret (--peer-secret): was it started with --peer-auth none?"
    )]
    ClosedUnproved,
    /// The peer secret was not proved.
    #[error(transparent)]
    Proof(#[from] ProofError),
    /// The name that was dialled is none that a certificate can be for.
    #[error("{0:?} is no host name and no address that a certificate could be for")]
    Name(String),
}

/// Why a file of secrets is of no use.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file of the peer secret cannot be read.
    #[error("cannot read peer_secret {}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others than its owner can read it.
    #[error("peer_secret {}: {open}", file.display())]
    Open {
        /// The file.
        file: PathBuf,
        /// Who can.
        open: PrivateFileError,
    },
    /// The file is not a peer secret.
    #[error("peer_secret {}: {reason}", file.display())]
    Text {
        /// The file.
        file: PathBuf,
        /// What is wrong; never the secret.
        reason: String,
    },
    /// The file cannot be created.
    #[error("cannot make {}: {source}", file.display())]
    Create {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Why a peer was not admitted, or does not admit this node.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// It speaks, and does not prove anything; what it says, as far as it is text.
    #[error("{}", .0.as_ref().map_or_else(
        || "it does not prove that it holds the peer secret: was it started with --peer-auth none?".to_owned(),
        |said| format!("it refuses this node: {said}"),
    ))]
    Unproved(Option<String>),
    /// It speaks TLS, and this side does not.
    #[error("the peer speaks TLS and this node does not: set peer_tls = true on both or on neither")]
    Tls,
    /// It names a secret that this node does not have.
    #[error("{0} holds another peer secret than this node: give both the same file")]
    UnknownSecret(String),
    /// The other side refuses the secret of this node.
    #[error("it does not take this node's peer secret: give both the same file (--peer-secret)")]
    Refused,
    /// The proof is not that of somebody who holds the secret.
    #[error("its proof is wrong: it does not hold the peer secret")]
    Wrong,
    /// A later build.
    #[error("it proves itself by version {0} of the protocol, which this build does not know")]
    Version(u8),
    /// It proves one name, and its certificate is for others.
    #[error(
        "it proves to be {name}, and its certificate is for {}: give it one with the DNS name {name}",
        if names.is_empty() { "no DNS name".to_owned() } else { names.join(", ") }
    )]
    Misnamed {
        /// What it proves.
        name: String,
        /// What its certificate says.
        names: Vec<String>,
    },
    /// The other side says so of this node.
    #[error(
        "this node's certificate is not for {0}, the name that it proves: give it one with the DNS name {0} (tls_cert)"
    )]
    OwnCertificate(String),
    /// The bytes are not a message of the handshake.
    #[error("what it says is no proof")]
    Garbage,
}

impl From<HandshakeError> for io::Error {
    fn from(error: HandshakeError) -> io::Error {
        match error {
            HandshakeError::Slow => io::Error::new(io::ErrorKind::TimedOut, error.to_string()),
            _ => io::Error::other(error.to_string()),
        }
    }
}

/// What went wrong, and at which end to look.
fn explain(error: &Error) -> String {
    match error {
        Error::AlertReceived(alert) => match alert {
            AlertDescription::UnknownCA => {
                "it refuses this side's certificate: it does not know its CA (UnknownCA)".to_owned()
            }
            AlertDescription::CertificateRequired => {
                "it asks for a certificate, and this side has shown none (CertificateRequired)".to_owned()
            }
            AlertDescription::NoApplicationProtocol => {
                "it does not expect such a connection on this port (NoApplicationProtocol): is it a port for peers, or for clients?"
                    .to_owned()
            }
            other => format!("it refuses this side: {other:?}"),
        },
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "its certificate is not signed by a CA that this side knows (UnknownIssuer)".to_owned()
        }
        Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => format!("its certificate is for other names than the one that was dialled: {error}"),
        Error::InvalidCertificate(_) => format!("its certificate is of no use: {error}"),
        Error::NoCertificatesPresented => "it shows no certificate, and has to".to_owned(),
        Error::NoApplicationProtocol => {
            "it does not say that it is a peer: is it a client on the port for peers?".to_owned()
        }
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => "it does not speak TLS on this port".to_owned(),
        other => format!("the TLS handshake failed: {other}"),
    }
}
