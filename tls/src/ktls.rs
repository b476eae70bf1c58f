//! Keys for the kernel: after this, `send`, `sendfile` and `recv` on the socket carry plain bytes, and records are made and read
//! on the way. Linux' "tls" upper layer protocol, TLS 1.3.

use std::io;
use std::net::TcpStream;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{TcpTlsRx, TcpTlsTx, TcpUlp, TlsCryptoInfo};
use rustls::{ConnectionTrafficSecrets, ProtocolVersion};

/// In the kernel's words: TLS 1.3.
const TLS_1_3_VERSION: u16 = 0x0304;
/// Of GCM's nonce, the first bytes are called salt.
const GCM_SALT_BYTES: usize = 4;

/// Whether what was negotiated is something that is handed over.
pub(crate) fn fits(tls: &rustls::Connection) -> bool {
    tls.protocol_version() == Some(ProtocolVersion::TLSv1_3) && !tls.wants_write()
}

/// Puts the kernel's TLS onto the socket; as long as it has no keys, nothing changes.
pub(crate) fn attach(socket: &TcpStream) -> io::Result<()> {
    Ok(setsockopt(socket, TcpUlp::default(), b"tls")?)
}

/// Gives the keys away. On an error the connection is of no use any more.
pub(crate) fn give_keys(socket: &TcpStream, tls: rustls::Connection) -> io::Result<()> {
    let secrets = tls.dangerous_extract_secrets().map_err(io::Error::other)?;
    let (sent, sending) = secrets.tx;
    let (received, receiving) = secrets.rx;
    setsockopt(socket, TcpTlsTx, &crypto_info(sent, &sending)?)?;
    Ok(setsockopt(socket, TcpTlsRx, &crypto_info(received, &receiving)?)?)
}

fn exactly<const N: usize>(bytes: &[u8]) -> io::Result<[u8; N]> {
    bytes.try_into().map_err(|_| io::Error::other("a key of a length that the kernel does not know"))
}

fn crypto_info(records: u64, secrets: &ConnectionTrafficSecrets) -> io::Result<TlsCryptoInfo> {
    let info = |cipher_type| libc::tls_crypto_info { version: TLS_1_3_VERSION, cipher_type };
    let rec_seq = records.to_be_bytes();
    Ok(match secrets {
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
            TlsCryptoInfo::Chacha20Poly1305(libc::tls12_crypto_info_chacha20_poly1305 {
                info: info(libc::TLS_CIPHER_CHACHA20_POLY1305),
                iv: exactly(iv.as_ref())?,
                key: exactly(key.as_ref())?,
                salt: [],
                rec_seq,
            })
        }
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => {
            let (salt, iv) = iv.as_ref().split_at(GCM_SALT_BYTES);
            TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
                info: info(libc::TLS_CIPHER_AES_GCM_128),
                iv: exactly(iv)?,
                key: exactly(key.as_ref())?,
                salt: exactly(salt)?,
                rec_seq,
            })
        }
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => {
            let (salt, iv) = iv.as_ref().split_at(GCM_SALT_BYTES);
            TlsCryptoInfo::Aes256Gcm(libc::tls12_crypto_info_aes_gcm_256 {
                info: info(libc::TLS_CIPHER_AES_GCM_256),
                iv: exactly(iv)?,
                key: exactly(key.as_ref())?,
                salt: exactly(salt)?,
                rec_seq,
            })
        }
        _ => return Err(io::Error::other("a cipher that the kernel does not know")),
    })
}
