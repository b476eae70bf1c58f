//! Why certificates cannot be used, and why a handshake failed, in words that tell what to do.

use std::io;
use std::path::PathBuf;

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};

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
    #[error("the connection failed during the TLS handshake: {0}")]
    Io(#[from] io::Error),
    /// The other side hung up.
    #[error("it closed the connection during the TLS handshake: does it speak TLS on this port?")]
    Closed,
    /// The other side does not speak TLS.
    #[error("it does not speak TLS; it said {0:?}")]
    Plain(String),
    /// It took too long.
    #[error("the TLS handshake did not end in time")]
    Slow,
    /// TLS was spoken and did not work out.
    #[error("{}", explain(.0))]
    Tls(#[from] Error),
    /// The name that was dialled is none that a certificate can be for.
    #[error("{0:?} is no host name and no address that a certificate could be for")]
    Name(String),
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
