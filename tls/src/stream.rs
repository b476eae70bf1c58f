//! A client's connection as a stream of plain bytes. It blocks when its socket does; on one that does not, a write that was
//! taken may still be on its way, and the next call of either kind sends it on.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};

use crate::error::HandshakeError;

/// A client's TLS connection.
pub struct ClientStream {
    tls: ClientConnection,
    socket: TcpStream,
}

impl ClientStream {
    /// Over a socket that is connected, or about to be, to `host`, whose certificate has to be for that name. Nothing is said
    /// yet.
    pub fn new(config: Arc<ClientConfig>, host: &str, socket: TcpStream) -> Result<ClientStream, HandshakeError> {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned()).map_err(|_| HandshakeError::Name(host.to_owned()))?;
        let tls = ClientConnection::new(config, name).map_err(HandshakeError::from)?;
        Ok(ClientStream { tls, socket })
    }

    /// The socket, for its options; not for its bytes.
    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Does the handshake, on a socket that blocks.
    pub fn shake_hands(&mut self) -> io::Result<()> {
        while self.tls.is_handshaking() {
            self.send_on()?;
            if self.tls.is_handshaking() && !self.receive()? {
                return Err(HandshakeError::Closed.into());
            }
        }
        self.send_on()
    }

    fn send_on(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.socket)?;
        }
        Ok(())
    }

    /// Takes what has arrived; false at its end.
    fn receive(&mut self) -> io::Result<bool> {
        let bytes = self.tls.read_tls(&mut self.socket)?;
        if let Err(error) = self.tls.process_new_packets() {
            // The alert that tells the other side why.
            let _ = self.send_on();
            return Err(HandshakeError::from(error).into());
        }
        Ok(bytes > 0)
    }
}

impl Read for ClientStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.tls.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Without a word that it ends; what runs above this knows where a message ends.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                outcome => return outcome,
            }
            match self.send_on() {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
            self.receive()?;
        }
    }
}

impl Write for ClientStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.tls.writer().write(bytes)?;
        match self.send_on() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && taken > 0 => Ok(taken),
            Err(error) => Err(error),
            // Its buffer was full; now there is space.
            Ok(()) if taken == 0 && !bytes.is_empty() => Err(io::ErrorKind::Interrupted.into()),
            Ok(()) => Ok(taken),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send_on()
    }
}
