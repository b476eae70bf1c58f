//! What of a node's links is TLS, and with which files. Checked here for what goes together; the files are read by the daemon.

use std::path::PathBuf;

use super::{ConfigError, Settings};
use crate::units::HostPort;

/// What of a node's links is TLS.
#[derive(Clone, Debug, Default)]
pub struct TlsConfig {
    /// Where clients connect over TLS.
    pub listen: Option<HostPort>,
    /// The node's certificate, with those between it and its CA.
    pub certificate: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
    /// The CAs of clients that have to show a certificate, and of peers unless `peer_ca` names others.
    pub ca: Option<PathBuf>,
    /// Clients have to show a certificate.
    pub client_auth: bool,
    /// Links between peers are TLS, both ways.
    pub peers: bool,
    /// The CAs of peers.
    pub peer_ca: Option<PathBuf>,
    /// The kernel is asked to encrypt.
    pub kernel: bool,
}

impl TlsConfig {
    /// What these settings say, if it goes together.
    pub fn of(settings: &Settings) -> Result<TlsConfig, ConfigError> {
        let tls = TlsConfig {
            listen: settings.tls_listen.clone(),
            certificate: settings.tls_cert.clone(),
            key: settings.tls_key.clone(),
            ca: settings.tls_ca.clone(),
            client_auth: settings.tls_client_auth.unwrap_or(false),
            peers: settings.peer_tls.unwrap_or(false),
            peer_ca: settings.peer_tls_ca.clone().or(settings.tls_ca.clone()),
            kernel: settings.tls_kernel.unwrap_or(true),
        };
        tls.check()?;
        Ok(tls)
    }

    /// Of these settings what a witness needs: it has no clients.
    pub fn for_witness(settings: &Settings) -> Result<TlsConfig, ConfigError> {
        let peers_only = Settings { tls_listen: None, tls_client_auth: None, ..settings.clone() };
        if peers_only.peer_tls == Some(true) { TlsConfig::of(&peers_only) } else { Ok(TlsConfig::default()) }
    }

    fn check(&self) -> Result<(), ConfigError> {
        let refuse =
            |key, value: String, reason: &str| Err(ConfigError::Value { key, value, reason: reason.to_owned() });
        let text = |path: &PathBuf| path.display().to_string();
        let has_pair = self.certificate.is_some() && self.key.is_some();
        match (&self.certificate, &self.key) {
            (Some(path), None) => return refuse("tls_cert", text(path), "tls_key has to name the certificate's key"),
            (None, Some(path)) => return refuse("tls_key", text(path), "tls_cert has to name the key's certificate"),
            (Some(path), Some(_)) if self.listen.is_none() && !self.peers => {
                return refuse("tls_cert", text(path), "nothing uses it: give tls_listen, peer_tls or both as well");
            }
            _ => {}
        }
        if let Some(listen) = self.listen.as_ref().filter(|_| !has_pair) {
            return refuse("tls_listen", listen.to_string(), "it needs tls_cert and tls_key");
        }
        if self.client_auth && (self.listen.is_none() || self.ca.is_none()) {
            let reason = "it needs tls_listen, and tls_ca with the CAs of the clients' certificates";
            return refuse("tls_client_auth", "true".to_owned(), reason);
        }
        if self.peers && (!has_pair || self.peer_ca.is_none()) {
            let reason =
                "it needs tls_cert and tls_key, and peer_tls_ca (or tls_ca) with the CA of all peers' certificates";
            return refuse("peer_tls", "true".to_owned(), reason);
        }
        Ok(())
    }
}
