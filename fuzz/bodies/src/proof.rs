//! The proof of the peer secret: what the first bytes of anybody are, before anything is known of them. With fixed nonces there is
//! one exchange that a holder of the secret has; whoever sends anything else does not get through.

use walferry_tls::{Proving, Secrets};

const SECRET: &str = "0123456789abcdef0123456789abcdef";
const OTHER_SECRET: &str = "fedcba9876543210fedcba9876543210";
const NONCES: ([u8; 32], [u8; 32]) = ([1; 32], [2; 32]);
/// Either side says no more than head, name and proof.
const SAID_BYTES_MAX: usize = 256;

fn sides() -> (Proving, Proving) {
    let secrets = |texts: &[&str]| Secrets::parse(&texts.join("\n")).expect("secrets");
    let dialler = Proving::dial("b", secrets(&[SECRET]).own(), NONCES.0, None);
    let acceptor = Proving::accept("a", &secrets(&[OTHER_SECRET, SECRET]), NONCES.1, None);
    (dialler, acceptor)
}

/// What both sides say when both are what they should be: first who dialled.
fn honest() -> (Vec<u8>, Vec<u8>) {
    let (mut dialler, mut acceptor) = sides();
    let (mut dialled, mut accepted) = (dialler.take_output(), Vec::new());
    let (mut taken_by_acceptor, mut taken_by_dialler) = (0, 0);
    while acceptor.wanted() > 0 || dialler.wanted() > 0 {
        taken_by_acceptor += feed(&mut acceptor, &dialled[taken_by_acceptor..]).0;
        accepted.extend(acceptor.take_output());
        taken_by_dialler += feed(&mut dialler, &accepted[taken_by_dialler..]).0;
        dialled.extend(dialler.take_output());
    }
    (dialled, accepted)
}

/// Gives a side what it wants, while there is so much and it has no objection: what it took, and whether it has none.
fn feed(side: &mut Proving, bytes: &[u8]) -> (usize, bool) {
    let mut taken = 0;
    while side.wanted() > 0 {
        let rest = &bytes[taken..];
        let wanted = rest.len().min(side.wanted());
        if side.glance(&rest[..wanted]).is_err() {
            return (taken, false);
        }
        let Some(message) = rest.get(..side.wanted()) else { return (taken, true) };
        taken += message.len();
        if side.handle(message).is_err() {
            return (taken, false);
        }
    }
    (taken, true)
}

/// Any bytes, at either side.
pub fn run(data: &[u8]) {
    let (dialler, acceptor) = sides();
    let (dialled, accepted) = honest();
    for (mut side, honest) in [(dialler, accepted), (acceptor, dialled)] {
        let (taken, content) = feed(&mut side, data);
        assert!(taken <= SAID_BYTES_MAX && side.take_output().len() <= SAID_BYTES_MAX);
        assert!(content || side.peer().is_none(), "who was refused has no name");
        assert!(side.peer().is_none() || data.starts_with(&honest), "somebody got through without the secret");
        assert!(side.peer().is_some() || !data.starts_with(&honest), "who holds the secret gets through");
    }
}
