//! One handshake on a socket that does not block: `step` does what can be done and says what to wait for. Reads record by record
//! and not a byte further, so that what follows the handshake is left in the socket for whoever gets it.
//!
//! Between peers the accepting side says one byte more, once it has checked the other's certificate: the TLS 1.3 client has
//! finished before its certificate is looked at, and would otherwise learn of a refusal only as a broken connection.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};

use crate::error::HandshakeError;
use crate::proof::PROOF_MAGIC;

/// A handshake takes no longer than this.
pub(crate) const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(5);
/// Type, version and length in front of a record.
const RECORD_HEADER_BYTES: usize = 5;
/// The largest body of a record (RFC 8446, 5.2, and 2048 of TLS 1.2).
const RECORD_BODY_BYTES_MAX: usize = (16 << 10) + 2048;
/// Of what somebody said who does not speak TLS, so much is shown.
const SHOWN_BYTES_MAX: usize = 128;
/// How long a side that was refused has to read why.
const PARTING_TIME_MAX: Duration = Duration::from_secs(1);
/// "Your certificate is good": from the accepting peer.
const CONFIRMATION: u8 = 0x06;

/// What a handshake waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing: both sides know each other.
    Done,
    /// The socket.
    Wait(PollFlags),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Confirm {
    /// Not between clients and nodes, or done.
    No,
    /// It is this side's to say.
    Say,
    /// It is the other side's to say.
    Await,
}

/// A handshake under way.
pub(crate) struct Handshake {
    pub(crate) socket: TcpStream,
    pub(crate) deadline: Instant,
    tls: Connection,
    confirm: Confirm,
    /// The record that is coming, as far as it has come.
    record: Vec<u8>,
    /// A whole record came: it is TLS that is spoken.
    spoken: bool,
}

impl Handshake {
    /// The accepting side. Peers are those whose settings name a protocol.
    pub(crate) fn accept(socket: TcpStream, config: Arc<ServerConfig>) -> Result<Handshake, HandshakeError> {
        let confirm = if config.alpn_protocols.is_empty() { Confirm::No } else { Confirm::Say };
        Handshake::new(socket, ServerConnection::new(config)?.into(), confirm, HANDSHAKE_TIME_MAX)
    }

    /// The side that connected, to a peer called `host`.
    pub(crate) fn connect(
        socket: TcpStream,
        config: Arc<ClientConfig>,
        host: &str,
        time_max: Duration,
    ) -> Result<Handshake, HandshakeError> {
        let name = ServerName::try_from(host.to_owned()).map_err(|_| HandshakeError::Name(host.to_owned()))?;
        Handshake::new(socket, ClientConnection::new(config, name)?.into(), Confirm::Await, time_max)
    }

    fn new(
        socket: TcpStream,
        mut tls: Connection,
        confirm: Confirm,
        time_max: Duration,
    ) -> Result<Handshake, HandshakeError> {
        socket.set_nonblocking(true)?;
        // Who writes bounds what is written.
        tls.set_buffer_limit(None);
        let deadline = Instant::now() + time_max.min(HANDSHAKE_TIME_MAX);
        Ok(Handshake { socket, deadline, tls, confirm, record: Vec::new(), spoken: false })
    }

    /// Does what can be done now.
    pub(crate) fn step(&mut self) -> Result<Step, HandshakeError> {
        loop {
            if !self.flush()? {
                return Ok(Step::Wait(PollFlags::POLLOUT));
            }
            if !self.tls.is_handshaking() {
                match self.confirm {
                    Confirm::No => return Ok(Step::Done),
                    Confirm::Say => {
                        self.confirm = Confirm::No;
                        self.tls.writer().write_all(&[CONFIRMATION])?;
                        continue;
                    }
                    Confirm::Await => {
                        if self.is_confirmed()? {
                            self.confirm = Confirm::No;
                            continue;
                        }
                    }
                }
            }
            if !self.read_record()? {
                return Ok(Step::Wait(PollFlags::POLLIN));
            }
        }
    }

    /// Steps until it is done, on a thread that may wait. The other side has read why when it fails.
    pub(crate) fn run(mut self) -> Result<(TcpStream, Connection), HandshakeError> {
        loop {
            let outcome = match self.step() {
                Ok(Step::Done) => return Ok((self.socket, self.tls)),
                Ok(Step::Wait(what)) => wait(&self.socket, what, self.deadline),
                Err(error) => Err(error),
            };
            if let Err(error) = outcome {
                let mut parting = Parting::new(self.socket, &[]);
                while !parting.is_over() && wait(&parting.socket, PollFlags::POLLIN, parting.until).is_ok() {}
                return Err(error);
            }
        }
    }

    /// Socket and connection of a handshake that is done.
    pub(crate) fn into_parts(self) -> (TcpStream, Connection) {
        (self.socket, self.tls)
    }

    /// False while the socket is full.
    fn flush(&mut self) -> Result<bool, HandshakeError> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.socket) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(broken(error)),
            }
        }
        Ok(true)
    }

    fn is_confirmed(&mut self) -> Result<bool, HandshakeError> {
        let mut byte = [0];
        match self.tls.reader().read(&mut byte) {
            Ok(0) => Err(HandshakeError::Closed),
            Ok(_) if byte[0] == CONFIRMATION => Ok(true),
            Ok(_) => Err(HandshakeError::Plain("something else than that it takes this side's certificate".to_owned())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(broken(error)),
        }
    }

    /// Takes the next record if all of it is there.
    fn read_record(&mut self) -> Result<bool, HandshakeError> {
        loop {
            let wanted = self.record_bytes()?;
            if self.record.len() == wanted {
                break;
            }
            match read_up_to(&mut self.socket, &mut self.record, wanted)? {
                Some(0) => return Err(HandshakeError::Closed),
                Some(_) => {}
                None => return Ok(false),
            }
        }
        self.spoken = true;
        let record = std::mem::take(&mut self.record);
        let mut rest = record.as_slice();
        while !rest.is_empty() {
            self.tls.read_tls(&mut rest)?;
            if let Err(error) = self.tls.process_new_packets() {
                // The alert that tells the other side why.
                let _ = self.flush();
                return Err(error.into());
            }
        }
        Ok(true)
    }

    /// How long the record is that is coming, as far as that is known.
    fn record_bytes(&mut self) -> Result<usize, HandshakeError> {
        if let Some(&kind) = self.record.first() {
            let is_record = (0x14..=0x17).contains(&kind) && self.record.get(1).is_none_or(|&major| major == 3);
            if !is_record {
                return Err(self.plain());
            }
        }
        if self.record.len() < RECORD_HEADER_BYTES {
            return Ok(RECORD_HEADER_BYTES);
        }
        let body = usize::from(u16::from_be_bytes([self.record[3], self.record[4]]));
        if body > RECORD_BODY_BYTES_MAX {
            return Err(self.plain());
        }
        Ok(RECORD_HEADER_BYTES + body)
    }

    fn plain(&mut self) -> HandshakeError {
        if self.spoken {
            return rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType).into();
        }
        let mut more = [0; SHOWN_BYTES_MAX];
        let bytes = self.socket.read(&mut more).unwrap_or(0);
        self.record.extend_from_slice(&more[..bytes]);
        if self.record.starts_with(&PROOF_MAGIC) {
            return HandshakeError::Knock;
        }
        let shown = &self.record[..self.record.len().min(SHOWN_BYTES_MAX)];
        HandshakeError::Plain(shown.escape_ascii().to_string())
    }
}

/// Reads until `bytes` has `wanted` of them, at most: how many came, 0 at the end; `None` while there is nothing.
pub(crate) fn read_up_to(
    socket: &mut TcpStream,
    bytes: &mut Vec<u8>,
    wanted: usize,
) -> Result<Option<usize>, HandshakeError> {
    loop {
        let had = bytes.len();
        bytes.resize(wanted, 0);
        let outcome = socket.read(&mut bytes[had..]);
        bytes.truncate(had + outcome.as_ref().copied().unwrap_or(0));
        match outcome {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome.map(Some).map_err(broken),
        }
    }
}

pub(crate) fn broken(error: io::Error) -> HandshakeError {
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => HandshakeError::Closed,
        _ => error.into(),
    }
}

pub(crate) fn wait(socket: &TcpStream, what: PollFlags, until: Instant) -> Result<(), HandshakeError> {
    let left = until.saturating_duration_since(Instant::now());
    // Rounded up, or the last millisecond would be spent spinning.
    let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(socket.as_fd(), what)], timeout) {
        Ok(0) => Err(HandshakeError::Slow),
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(error) => Err(io::Error::from(error).into()),
    }
}

/// A connection that was refused: kept until the other side has read why, since closing a socket that holds unread bytes
/// cuts off what was sent.
pub(crate) struct Parting {
    pub(crate) socket: TcpStream,
    pub(crate) until: Instant,
    ended: bool,
}

impl Parting {
    /// Says `last` and that nothing follows it.
    pub(crate) fn new(mut socket: TcpStream, last: &[u8]) -> Parting {
        // It fits into the buffer of a socket on which next to nothing was said; whoever is gone needs no answer.
        let _ = socket.write(last);
        let _ = socket.shutdown(Shutdown::Write);
        Parting { socket, until: Instant::now() + PARTING_TIME_MAX, ended: false }
    }

    /// Takes what was said meanwhile; true when the other side has hung up or its time is over.
    pub(crate) fn is_over(&mut self) -> bool {
        let mut discarded = [0; 4096];
        match self.socket.read(&mut discarded) {
            Ok(0) => self.ended = true,
            Ok(_) => {}
            Err(error) => self.ended |= error.kind() != io::ErrorKind::WouldBlock,
        }
        self.ended || Instant::now() >= self.until
    }
}
