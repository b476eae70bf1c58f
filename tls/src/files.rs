//! Certificates, keys and CAs from their files, and the settings of TLS made of them. Reads; watches nothing.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig, SupportedCipherSuite};

use crate::error::TlsError;
use crate::private_file::{Outsiders, open_private};

/// What peers say in their handshake that they are; a client that comes to their port, or the other way round, is told so.
const PEER_PROTOCOL: &[u8] = b"walferry-peer/1";

/// A file and the option that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedFile {
    /// The option, for messages.
    pub option: &'static str,
    /// The file.
    pub path: PathBuf,
}

impl NamedFile {
    /// A file and its option.
    pub fn new(option: &'static str, path: &Path) -> NamedFile {
        NamedFile { option, path: path.to_owned() }
    }

    fn wrong(&self, text: impl std::fmt::Display) -> TlsError {
        TlsError::File { option: self.option, path: self.path.clone(), text: text.to_string() }
    }

    fn read(&self) -> Result<Vec<u8>, TlsError> {
        std::fs::read(&self.path).map_err(|error| self.wrong(error))
    }

    pub(crate) fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&self.read()?).collect();
        let all = all.map_err(|error| self.wrong(format_args!("it is not PEM: {error:?}")))?;
        if all.is_empty() { Err(self.wrong("it holds no certificate (PEM)")) } else { Ok(all) }
    }

    pub(crate) fn key(&self) -> Result<PrivateKeyDer<'static>, TlsError> {
        let mut file = open_private(&self.path, Outsiders::Others).map_err(|error| self.wrong(error))?;
        let mut pem = Vec::new();
        file.read_to_end(&mut pem).map_err(|error| self.wrong(error))?;
        PrivateKeyDer::from_pem_slice(&pem)
            .map_err(|error| self.wrong(format_args!("it holds no private key (PEM, without a passphrase): {error:?}")))
    }

    pub(crate) fn roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates()? {
            roots.add(certificate).map_err(|error| self.wrong(format_args!("a certificate is of no use: {error}")))?;
        }
        Ok(Arc::new(roots))
    }
}

/// A certificate chain and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) certificate: NamedFile,
    pub(crate) key: NamedFile,
}

impl Pair {
    fn misfit(&self, error: impl std::fmt::Display) -> TlsError {
        let (certificate, key) = (&self.certificate, &self.key);
        TlsError::Misfit {
            options: format!(
                "{} = {}, {} = {}",
                certificate.option,
                certificate.path.display(),
                key.option,
                key.path.display()
            ),
            text: error.to_string(),
        }
    }
}

/// ChaCha20-Poly1305 before AES-GCM: a link lives for months, and under AES-GCM its keys must be changed after 2^24 records
/// (RFC 8446, 5.5), which is half an hour of commits; a kernel that has the keys does not change them.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    let is_chacha = |suite: &SupportedCipherSuite| format!("{:?}", suite.suite()).contains("CHACHA20");
    provider.cipher_suites.sort_by_key(|suite| !is_chacha(suite));
    Arc::new(provider)
}

fn unusable(error: &rustls::Error) -> String {
    format!("the certificate or its key is of no use: {error}")
}

/// The settings of a listener for clients; with `clients`, each has to show a certificate of one of these CAs.
pub(crate) fn for_clients(pair: &Pair, clients: Option<&NamedFile>) -> Result<ServerConfig, TlsError> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("the provider has the default versions");
    let builder = match clients {
        Some(ca) => builder.with_client_cert_verifier(client_verifier(ca)?),
        None => builder.with_no_client_auth(),
    };
    let config = builder.with_single_cert(pair.certificate.certificates()?, pair.key.key()?);
    Ok(with_session_rules(config.map_err(|error| pair.misfit(unusable(&error)))?))
}

/// Both sides of a link between peers.
pub(crate) fn for_peers(pair: &Pair, ca: &NamedFile) -> Result<(ServerConfig, ClientConfig), TlsError> {
    let (chain, key) = (pair.certificate.certificates()?, pair.key.key()?);
    let server = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3")
        .with_client_cert_verifier(client_verifier(ca)?)
        .with_single_cert(chain.clone(), key.clone_key())
        .map_err(|error| pair.misfit(unusable(&error)))?;
    let mut server = with_session_rules(server);
    server.alpn_protocols = vec![PEER_PROTOCOL.to_vec()];
    let mut client = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3")
        .with_webpki_verifier(server_verifier(ca)?)
        .with_client_auth_cert(chain, key)
        .map_err(|error| pair.misfit(unusable(&error)))?;
    client.alpn_protocols = vec![PEER_PROTOCOL.to_vec()];
    client.enable_secret_extraction = true;
    client.resumption = rustls::client::Resumption::disabled();
    Ok((server, client))
}

/// The settings of a program that connects to nodes as a client: whose word it takes, and what it shows if it is asked.
pub fn client_config(ca: &NamedFile, own: Option<(NamedFile, NamedFile)>) -> Result<Arc<ClientConfig>, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("the provider has the default versions")
        .with_webpki_verifier(server_verifier(ca)?);
    let config = match own {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let pair = Pair { certificate, key };
            builder
                .with_client_auth_cert(pair.certificate.certificates()?, pair.key.key()?)
                .map_err(|error| pair.misfit(unusable(&error)))?
        }
    };
    Ok(Arc::new(config))
}

/// No tickets and no sessions: after the handshake nothing but data and its end is on the wire, which a kernel can read alone.
fn with_session_rules(mut config: ServerConfig) -> ServerConfig {
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.enable_secret_extraction = true;
    config.ignore_client_order = true;
    config
}

fn client_verifier(ca: &NamedFile) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(ca.roots()?, provider()).build();
    verifier.map_err(|error| ca.wrong(error))
}

fn server_verifier(ca: &NamedFile) -> Result<Arc<rustls::client::WebPkiServerVerifier>, TlsError> {
    let verifier = rustls::client::WebPkiServerVerifier::builder_with_provider(ca.roots()?, provider()).build();
    verifier.map_err(|error| ca.wrong(error))
}
