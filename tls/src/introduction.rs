//! One proof of the peer secret on a socket: `step` does what can be done and says what to wait for, and `run` waits for it. The
//! bytes and what they mean stand in [`crate::proof`].

use std::io::{self, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use ring::rand::{SecureRandom, SystemRandom};

use crate::error::{HandshakeError, ProofError};
use crate::handshake::{HANDSHAKE_TIME_MAX, Parting, Step, broken, read_up_to, wait};
use crate::proof::Proving;
use crate::secret::PeerSecret;
use crate::terminate::Protection;

/// Of what somebody says in place of a proof, so much is read.
const REFUSAL_BYTES_MAX: usize = 512;
/// Shorter text is no sentence.
const REFUSAL_BYTES_MIN: usize = 16;
/// It follows at once on what was sent.
const REFUSAL_TIME_MAX: Duration = Duration::from_millis(500);

/// What a connection has behind it when the proof begins.
#[derive(Debug, Default)]
pub(crate) struct Before {
    /// How it is protected.
    pub(crate) protection: Option<Protection>,
    /// The names of its certificate.
    pub(crate) names: Option<Vec<String>>,
}

/// A proof under way.
pub(crate) struct Introduction {
    pub(crate) socket: TcpStream,
    pub(crate) deadline: Instant,
    protection: Option<Protection>,
    proving: Proving,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
}

impl Introduction {
    /// At the side that accepted.
    pub(crate) fn accept(
        socket: TcpStream,
        before: Before,
        secret: &PeerSecret,
    ) -> Result<Introduction, HandshakeError> {
        let proving = Proving::accept(secret.own_name(), &secret.current(), nonce()?, before.names);
        Introduction::new(socket, before.protection, proving, HANDSHAKE_TIME_MAX)
    }

    /// At the side that dialled.
    pub(crate) fn dial(
        socket: TcpStream,
        before: Before,
        secret: &PeerSecret,
        time_max: Duration,
    ) -> Result<Introduction, HandshakeError> {
        let proving = Proving::dial(secret.own_name(), secret.current().own(), nonce()?, before.names);
        Introduction::new(socket, before.protection, proving, time_max)
    }

    fn new(
        socket: TcpStream,
        protection: Option<Protection>,
        proving: Proving,
        time_max: Duration,
    ) -> Result<Introduction, HandshakeError> {
        socket.set_nonblocking(true)?;
        let deadline = Instant::now() + time_max.min(HANDSHAKE_TIME_MAX);
        Ok(Introduction { socket, deadline, protection, proving, incoming: Vec::new(), outgoing: Vec::new() })
    }

    /// Does what can be done now.
    pub(crate) fn step(&mut self) -> Result<Step, HandshakeError> {
        loop {
            self.outgoing.extend(self.proving.take_output());
            if !self.send()? {
                return Ok(Step::Wait(PollFlags::POLLOUT));
            }
            let wanted = self.proving.wanted();
            if wanted == 0 {
                return Ok(Step::Done);
            }
            if !self.receive(wanted)? {
                return Ok(Step::Wait(PollFlags::POLLIN));
            }
            let message = std::mem::take(&mut self.incoming);
            if let Err(error) = self.proving.handle(&message) {
                // The other side gets the refusal; where it cannot, it sees a closed connection.
                self.outgoing.extend(self.proving.take_output());
                let _ = self.send();
                return Err(error.into());
            }
        }
    }

    /// Steps until it is done, on a thread that may wait.
    pub(crate) fn run(mut self) -> Result<(TcpStream, String), HandshakeError> {
        loop {
            let outcome = match self.step() {
                Ok(Step::Done) => return self.into_parts().map(|(socket, _, peer)| (socket, peer)),
                Ok(Step::Wait(what)) => wait(&self.socket, what, self.deadline),
                Err(error) => Err(error),
            };
            if let Err(mut error) = outcome {
                if let HandshakeError::Proof(ProofError::Unproved(said)) = &mut error {
                    *said = self.read_refusal();
                }
                drop(Parting::new(self.socket, &[]));
                return Err(error);
            }
        }
    }

    /// What the other side says in place of a proof: most of it is a message that nothing here can read, whose text is printable.
    fn read_refusal(&mut self) -> Option<String> {
        let until = (Instant::now() + REFUSAL_TIME_MAX).min(self.deadline);
        let mut said = std::mem::take(&mut self.incoming);
        while said.len() < REFUSAL_BYTES_MAX {
            match read_up_to(&mut self.socket, &mut said, REFUSAL_BYTES_MAX) {
                Ok(Some(0)) | Err(_) => break,
                Ok(Some(_)) => {}
                Ok(None) => {
                    if wait(&self.socket, PollFlags::POLLIN, until).is_err() {
                        break;
                    }
                }
            }
        }
        let printable = said.split(|byte| !(b' '..=b'~').contains(byte));
        let text = printable.max_by_key(|text| text.len()).filter(|text| text.len() >= REFUSAL_BYTES_MIN)?;
        Some(String::from_utf8_lossy(text).into_owned())
    }

    /// The socket, which blocks again, and who is at the other end, of an introduction that is done.
    pub(crate) fn into_parts(self) -> Result<(TcpStream, Option<Protection>, String), HandshakeError> {
        self.socket.set_nonblocking(false)?;
        let name = self.proving.peer().expect("both sides have proved themselves").to_owned();
        Ok((self.socket, self.protection, name))
    }

    /// False while the socket is full.
    fn send(&mut self) -> Result<bool, HandshakeError> {
        while !self.outgoing.is_empty() {
            match self.socket.write(&self.outgoing) {
                Ok(sent) => drop(self.outgoing.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(broken(error)),
            }
        }
        Ok(true)
    }

    /// True when all `wanted` bytes have come.
    fn receive(&mut self, wanted: usize) -> Result<bool, HandshakeError> {
        while self.incoming.len() < wanted {
            match read_up_to(&mut self.socket, &mut self.incoming, wanted)? {
                Some(0) => return Err(HandshakeError::ClosedUnproved),
                // Who speaks otherwise is not waited for.
                Some(_) => self.proving.glance(&self.incoming)?,
                None => return Ok(false),
            }
        }
        Ok(true)
    }
}

fn nonce() -> Result<[u8; 32], HandshakeError> {
    let mut nonce = [0; 32];
    SystemRandom::new().fill(&mut nonce).map_err(|_| io::Error::other("the system has no random bytes"))?;
    Ok(nonce)
}
