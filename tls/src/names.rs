//! Whom a certificate is for, as names of nodes: its DNS names, and of those with a domain the first label too, since nodes are
//! often called as their hosts. `db1.example.com` is one for `db1`.

use rustls::Connection;
use webpki::EndEntityCert;

/// A connection of a peer: its settings name a protocol.
pub(crate) fn is_peer(tls: &Connection) -> bool {
    tls.alpn_protocol().is_some()
}

/// The names of the certificate at the other end, which was checked; none where none was shown.
pub(crate) fn peer_names(tls: &Connection) -> Vec<String> {
    let shown = tls.peer_certificates().and_then(<[_]>::first);
    let Some(certificate) = shown.and_then(|shown| EndEntityCert::try_from(shown).ok()) else { return Vec::new() };
    let mut names = Vec::new();
    for name in certificate.valid_dns_names() {
        let name = name.to_ascii_lowercase();
        let first = name.split('.').next().unwrap_or_default().to_owned();
        for name in [name, first] {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    names
}
