//! The proof that both ends of a peer link hold the same secret, without sending it. A core: bytes in, bytes out; whoever drives
//! it reads exactly [`Proving::wanted`] bytes, so that what follows the proof is left in the socket. All integers little-endian.
//!
//! ```text
//! who dialled                          who accepted
//!   Knock                       ->
//!                               <-     Challenge, with the proof of who accepted
//!   proof of who dialled, 32    ->
//!                               <-     one byte: 0x06 admitted, 0x15 refused
//!
//! Knock       0  magic            4   "WFPA"
//!             4  version          1   1
//!             5  name length      1   1-63
//!             6  zeros            2
//!             8  key id           8   which of the secrets is meant: the first bytes of HMAC(secret, "walferry key id")
//!            16  nonce           32
//!            48  name                 of who dialled
//! Challenge   0  magic            4   "WFPA"
//!             4  version          1   1
//!             5  name length      1   1-63
//!             6  verdict          1   0x06, or nothing follows but zeros: 0x15, no such secret here; 0x16, the certificate of who
//!                                     dialled is for other names
//!             7  zero             1
//!             8  nonce           32
//!            40  proof           32
//!            72  name                 of who accepted
//! proof                               HMAC-SHA256(secret, "walferry peer 1", side, nonce dialled, nonce accepted,
//!                                                 length and name of who dialled, length and name of who accepted)
//!                                     side: 'a' accepted, 'd' dialled. A proof can neither be played back nor turned round.
//! ```
//!
//! Who accepted proves first: whoever connected to an unidentified peer tells it nothing but a name and a nonce. As SCRAM (RFC 5802) does, with a
//! random key in the place of a password, so that nothing has to be slow.

use ring::hmac;

use crate::error::ProofError;
use crate::secret::{KeyId, Secret, Secrets};

/// First bytes of a peer that proves itself; no message between peers begins so.
pub const PROOF_MAGIC: [u8; 4] = *b"WFPA";
const VERSION: u8 = 1;
/// A TLS client begins with these.
const TLS_FIRST_BYTES: [u8; 2] = [0x16, 3];
const NAME_BYTES_MAX: usize = 63;
const NONCE_BYTES: usize = 32;
const MAC_BYTES: usize = 32;
const KNOCK_BYTES: usize = 48;
const CHALLENGE_BYTES: usize = 72;
const ADMITTED: u8 = 0x06;
const REFUSED: u8 = 0x15;
const MISNAMED: u8 = 0x16;

type Nonce = [u8; NONCE_BYTES];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Dialled,
    Accepted,
}

/// What a proof is about.
#[derive(Clone, Debug)]
struct Terms {
    nonces: (Nonce, Nonce),
    names: (String, String),
}

impl Terms {
    fn bytes(&self, side: Side) -> Vec<u8> {
        let mut bytes = b"walferry peer 1".to_vec();
        bytes.push(if side == Side::Accepted { b'a' } else { b'd' });
        bytes.extend_from_slice(&self.nonces.0);
        bytes.extend_from_slice(&self.nonces.1);
        for name in [&self.names.0, &self.names.1] {
            bytes.push(u8::try_from(name.len()).expect("names are short"));
            bytes.extend_from_slice(name.as_bytes());
        }
        bytes
    }

    fn prove(&self, secret: &Secret, side: Side) -> [u8; MAC_BYTES] {
        hmac::sign(secret.key(), &self.bytes(side)).as_ref().try_into().expect("SHA-256 has 32 bytes")
    }

    /// In constant time.
    fn check(&self, secret: &Secret, side: Side, proof: &[u8]) -> Result<(), ProofError> {
        hmac::verify(secret.key(), &self.bytes(side), proof).map_err(|_| ProofError::Wrong)
    }
}

/// A name as it stands in a message.
fn name_of(bytes: &[u8]) -> Result<String, ProofError> {
    let fine = |byte: &u8| byte.is_ascii_graphic();
    if bytes.is_empty() || !bytes.iter().all(fine) {
        return Err(ProofError::Garbage);
    }
    String::from_utf8(bytes.to_vec()).map_err(|_| ProofError::Garbage)
}

/// What comes next.
#[derive(Debug)]
enum State {
    /// At the dialler: the head of the challenge.
    Challenge {
        own_nonce: Nonce,
        secret: Secret,
    },
    /// ... and the name behind it.
    ChallengeName {
        own_nonce: Nonce,
        secret: Secret,
        head: [u8; CHALLENGE_BYTES],
    },
    /// ... and the verdict.
    Verdict {
        peer: String,
    },
    /// At who accepted: the head of the knock.
    Knock {
        own_nonce: Nonce,
        secrets: Secrets,
    },
    /// ... and the name behind it.
    KnockName {
        own_nonce: Nonce,
        secrets: Secrets,
        head: [u8; KNOCK_BYTES],
    },
    /// ... and the proof.
    Proof {
        terms: Terms,
        secret: Secret,
    },
    Over {
        peer: String,
    },
}

/// One side of a proof under way.
#[derive(Debug)]
pub struct Proving {
    own_name: String,
    /// The names of the other side's certificate, if it has shown one.
    certified: Option<Vec<String>>,
    state: State,
    output: Vec<u8>,
}

impl Proving {
    /// At the side that dialled. `own_nonce` is random; `own_name` has 1 to 63 bytes; `certified` are the names of the other side's
    /// certificate, of which it has to prove one.
    pub fn dial(own_name: &str, secret: &Secret, own_nonce: [u8; 32], certified: Option<Vec<String>>) -> Proving {
        let mut knock = PROOF_MAGIC.to_vec();
        knock.extend_from_slice(&[VERSION, name_length(own_name), 0, 0]);
        knock.extend_from_slice(&secret.id());
        knock.extend_from_slice(&own_nonce);
        knock.extend_from_slice(own_name.as_bytes());
        let state = State::Challenge { own_nonce, secret: secret.clone() };
        Proving { own_name: own_name.to_owned(), certified, state, output: knock }
    }

    /// At the side that accepted.
    pub fn accept(own_name: &str, secrets: &Secrets, own_nonce: [u8; 32], certified: Option<Vec<String>>) -> Proving {
        let state = State::Knock { own_nonce, secrets: secrets.clone() };
        Proving { own_name: own_name.to_owned(), certified, state, output: Vec::new() }
    }

    /// So many bytes of the other side come next, exactly; 0 once the proof is over.
    pub fn wanted(&self) -> usize {
        match &self.state {
            State::Challenge { .. } => CHALLENGE_BYTES,
            State::ChallengeName { head, .. } => head[5].into(),
            State::Knock { .. } => KNOCK_BYTES,
            State::KnockName { head, .. } => head[5].into(),
            State::Proof { .. } => MAC_BYTES,
            State::Verdict { .. } => 1,
            State::Over { .. } => 0,
        }
    }

    /// Whether the beginning of what is wanted, as far as it has come, is that of a proof.
    pub fn glance(&self, bytes: &[u8]) -> Result<(), ProofError> {
        let begins = matches!(self.state, State::Knock { .. } | State::Challenge { .. });
        let length = bytes.len().min(PROOF_MAGIC.len());
        if !begins || bytes[..length] == PROOF_MAGIC[..length] {
            return Ok(());
        }
        let is_tls = bytes.starts_with(&TLS_FIRST_BYTES[..bytes.len().min(TLS_FIRST_BYTES.len())]);
        Err(if is_tls { ProofError::Tls } else { ProofError::Unproved(None) })
    }

    /// Takes the bytes that were [`wanted`](Self::wanted). After an error the rest of [`output`](Self::take_output) is sent, and
    /// the connection closed.
    pub fn handle(&mut self, bytes: &[u8]) -> Result<(), ProofError> {
        debug_assert_eq!(bytes.len(), self.wanted());
        let state = std::mem::replace(&mut self.state, State::Over { peer: String::new() });
        self.state = match state {
            State::Knock { own_nonce, secrets } => {
                let head: [u8; KNOCK_BYTES] = bytes.try_into().map_err(|_| ProofError::Garbage)?;
                check_head(&head, &head[6..8])?;
                State::KnockName { own_nonce, secrets, head }
            }
            State::KnockName { own_nonce, secrets, head } => {
                let id: KeyId = head[8..16].try_into().expect("8 bytes");
                let nonce: Nonce = head[16..].try_into().expect("32 bytes");
                let peer = name_of(bytes)?;
                let Some(secret) = secrets.find(id) else {
                    self.challenge(REFUSED, &own_nonce, &[0; MAC_BYTES]);
                    return Err(ProofError::UnknownSecret(peer));
                };
                if let Err(error) = self.check_name(&peer) {
                    self.challenge(MISNAMED, &own_nonce, &[0; MAC_BYTES]);
                    return Err(error);
                }
                let terms = Terms { nonces: (nonce, own_nonce), names: (peer, self.own_name.clone()) };
                self.challenge(ADMITTED, &own_nonce, &terms.prove(secret, Side::Accepted));
                State::Proof { terms, secret: secret.clone() }
            }
            State::Proof { terms, secret } => match terms.check(&secret, Side::Dialled, bytes) {
                Ok(()) => {
                    self.output.push(ADMITTED);
                    State::Over { peer: terms.names.0 }
                }
                Err(error) => {
                    self.output.push(REFUSED);
                    return Err(error);
                }
            },
            State::Challenge { own_nonce, secret } => {
                let head: [u8; CHALLENGE_BYTES] = bytes.try_into().map_err(|_| ProofError::Garbage)?;
                check_head(&head, &head[7..8])?;
                match head[6] {
                    ADMITTED => {}
                    MISNAMED => return Err(ProofError::OwnCertificate(self.own_name.clone())),
                    _ => return Err(ProofError::Refused),
                }
                State::ChallengeName { own_nonce, secret, head }
            }
            State::ChallengeName { own_nonce, secret, head } => {
                let nonce: Nonce = head[8..40].try_into().expect("32 bytes");
                let names = (self.own_name.clone(), name_of(bytes)?);
                let terms = Terms { nonces: (own_nonce, nonce), names };
                terms.check(&secret, Side::Accepted, &head[40..])?;
                self.check_name(&terms.names.1)?;
                self.output.extend_from_slice(&terms.prove(&secret, Side::Dialled));
                State::Verdict { peer: terms.names.1 }
            }
            State::Verdict { peer } if bytes == [ADMITTED] => State::Over { peer },
            State::Verdict { .. } => return Err(ProofError::Refused),
            State::Over { peer } => State::Over { peer },
        };
        Ok(())
    }

    fn check_name(&self, name: &str) -> Result<(), ProofError> {
        match &self.certified {
            Some(names) if !names.iter().any(|certified| certified == name) => {
                Err(ProofError::Misnamed { name: name.to_owned(), names: names.clone() })
            }
            _ => Ok(()),
        }
    }

    fn challenge(&mut self, verdict: u8, nonce: &Nonce, proof: &[u8; MAC_BYTES]) {
        self.output.extend_from_slice(&PROOF_MAGIC);
        self.output.extend_from_slice(&[VERSION, name_length(&self.own_name), verdict, 0]);
        self.output.extend_from_slice(nonce);
        self.output.extend_from_slice(proof);
        self.output.extend_from_slice(self.own_name.as_bytes());
    }

    /// What is to be sent.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Who is at the other end, once both have proved themselves.
    pub fn peer(&self) -> Option<&str> {
        match &self.state {
            State::Over { peer } if !peer.is_empty() => Some(peer),
            _ => None,
        }
    }
}

fn name_length(name: &str) -> u8 {
    assert!((1..=NAME_BYTES_MAX).contains(&name.len()), "a name has 1 to {NAME_BYTES_MAX} bytes");
    name.len() as u8
}

fn check_head(head: &[u8], zeros: &[u8]) -> Result<(), ProofError> {
    if head[..4] != PROOF_MAGIC {
        return Err(ProofError::Unproved(None));
    }
    if head[4] != VERSION {
        return Err(ProofError::Version(head[4]));
    }
    if head[5] == 0 || usize::from(head[5]) > NAME_BYTES_MAX || zeros.iter().any(|byte| *byte != 0) {
        return Err(ProofError::Garbage);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets(texts: &[&str]) -> Secrets {
        Secrets::parse(&texts.join("\n")).expect("secrets")
    }

    const ONE: &str = "0123456789abcdef0123456789abcdef";
    const TWO: &str = "fedcba9876543210fedcba9876543210";

    /// Carries bytes between both until nothing moves; `change` may spoil what is on the wire.
    fn run(
        dialler: &mut Proving,
        acceptor: &mut Proving,
        mut change: impl FnMut(usize, &mut Vec<u8>),
    ) -> (Result<(), ProofError>, Result<(), ProofError>) {
        let (mut to_acceptor, mut to_dialler) = (Vec::new(), Vec::new());
        let mut outcome = (Ok(()), Ok(()));
        for turn in 0.. {
            let mut sent = dialler.take_output();
            change(turn * 2, &mut sent);
            to_acceptor.extend(sent);
            while outcome.1.is_ok() && acceptor.wanted() > 0 && to_acceptor.len() >= acceptor.wanted() {
                let bytes: Vec<u8> = to_acceptor.drain(..acceptor.wanted()).collect();
                outcome.1 = acceptor.handle(&bytes);
            }
            let mut sent = acceptor.take_output();
            change(turn * 2 + 1, &mut sent);
            let moved = !sent.is_empty();
            to_dialler.extend(sent);
            while outcome.0.is_ok() && dialler.wanted() > 0 && to_dialler.len() >= dialler.wanted() {
                let bytes: Vec<u8> = to_dialler.drain(..dialler.wanted()).collect();
                outcome.0 = dialler.handle(&bytes);
            }
            if !moved && dialler.output.is_empty() {
                break;
            }
        }
        outcome
    }

    #[test]
    fn both_ends_learn_who_the_other_is() {
        let (old, both) = (secrets(&[ONE]), secrets(&[TWO, ONE]));
        let mut dialler = Proving::dial("b", old.own(), [1; 32], None);
        let mut acceptor = Proving::accept("a", &both, [2; 32], None);
        let outcome = run(&mut dialler, &mut acceptor, |_, _| ());
        assert!(outcome.0.is_ok() && outcome.1.is_ok(), "{outcome:?}");
        assert_eq!((dialler.peer(), acceptor.peer()), (Some("a"), Some("b")));
    }

    #[test]
    fn another_secret_is_refused_at_both_ends() {
        let mut dialler = Proving::dial("b", secrets(&[ONE]).own(), [1; 32], None);
        let mut acceptor = Proving::accept("a", &secrets(&[TWO]), [2; 32], None);
        let outcome = run(&mut dialler, &mut acceptor, |_, _| ());
        assert!(matches!(outcome.0, Err(ProofError::Refused)), "{outcome:?}");
        assert!(matches!(&outcome.1, Err(ProofError::UnknownSecret(name)) if name == "b"), "{outcome:?}");
        assert_eq!((dialler.peer(), acceptor.peer()), (None, None));
    }

    #[test]
    fn no_changed_byte_is_admitted() {
        let lengths = [49, 73, 32];
        for (message, length) in lengths.into_iter().enumerate() {
            for at in 0..length {
                for bit in [1, 0x80] {
                    let own = secrets(&[ONE]);
                    let mut dialler = Proving::dial("b", own.own(), [1; 32], None);
                    let mut acceptor = Proving::accept("a", &own, [2; 32], None);
                    let change = |number: usize, bytes: &mut Vec<u8>| {
                        if number == message && at < bytes.len() {
                            bytes[at] ^= bit;
                        }
                    };
                    let _ = run(&mut dialler, &mut acceptor, change);
                    assert!(acceptor.peer().is_none(), "message {message}, byte {at}, bit {bit}");
                }
            }
        }
    }

    #[test]
    fn proof_played_back_or_turned_round_is_refused() {
        let own = secrets(&[ONE]);
        let mut kept = Vec::new();
        let mut dialler = Proving::dial("b", own.own(), [1; 32], None);
        let mut acceptor = Proving::accept("a", &own, [2; 32], None);
        let _ = run(&mut dialler, &mut acceptor, |number, bytes| {
            if number % 2 == 0 {
                kept.push(bytes.clone());
            }
        });
        // The same bytes against another nonce.
        let mut again = Proving::accept("a", &own, [3; 32], None);
        again.handle(&kept[0][..KNOCK_BYTES]).expect("a knock");
        again.handle(&kept[0][KNOCK_BYTES..]).expect("its name");
        assert!(matches!(again.handle(&kept[1]), Err(ProofError::Wrong)));
        // What the acceptor proved, given back to it.
        let mut turned = Proving::accept("a", &own, [2; 32], None);
        turned.handle(&kept[0][..KNOCK_BYTES]).expect("a knock");
        turned.handle(&kept[0][KNOCK_BYTES..]).expect("its name");
        let challenge = turned.take_output();
        assert!(matches!(turned.handle(&challenge[40..72]), Err(ProofError::Wrong)));
    }

    #[test]
    fn what_is_no_knock_is_told_from_an_attempt() {
        let mut acceptor = Proving::accept("a", &secrets(&[ONE]), [2; 32], None);
        let hello = [[60, 0, 0, 0, 1, 0, 0, 0].as_slice(), &[0; 40]].concat();
        assert!(matches!(acceptor.handle(&hello), Err(ProofError::Unproved(_))));
    }
}
