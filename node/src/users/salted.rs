//! Passwords as salted hashes that take long to compute: Argon2id in its usual text form,
//! `$argon2id$v=19$m=19456,t=2,p=1$SALT$HASH` (the PHC string format). A core: text in, text out.

use std::fmt;
use std::str::FromStr;

use argon2::{Algorithm, Argon2, Params, Version};
use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use rand::RngExt;

/// What one comparison may take: memory, passes over it, lanes.
const MEMORY_KIB_MAX: u32 = 64 << 10;
const PASSES_MAX: u32 = 10;
const LANES_MAX: u32 = 4;
const SALT_BYTES: std::ops::RangeInclusive<usize> = 8..=64;
const HASH_BYTES: std::ops::RangeInclusive<usize> = 16..=64;
/// Of a hash that is made here: 19 MiB, two passes, one lane, as OWASP advises (2025).
const MADE: (u32, u32, u32) = (Params::DEFAULT_M_COST, Params::DEFAULT_T_COST, Params::DEFAULT_P_COST);
const MADE_SALT_BYTES: usize = 16;
const MADE_HASH_BYTES: usize = 32;

const WRONG: &str = "a salted hash is $argon2id$v=19$m=...,t=...,p=...$SALT$HASH with at most 64 MiB (m=65536), t=10, p=4, as `walferry \
                     passwd` makes it";

/// A password's salted hash.
#[derive(Clone, PartialEq, Eq)]
pub struct SaltedHash {
    memory_kib: u32,
    passes: u32,
    lanes: u32,
    salt: Vec<u8>,
    hash: Vec<u8>,
}

impl fmt::Display for SaltedHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (salt, hash) = (STANDARD_NO_PAD.encode(&self.salt), STANDARD_NO_PAD.encode(&self.hash));
        write!(f, "$argon2id$v=19$m={},t={},p={}${salt}${hash}", self.memory_kib, self.passes, self.lanes)
    }
}

/// The value of `KEY=NUMBER`, which is not beyond `max`.
fn number(text: Option<&str>, key: &str, max: u32) -> Option<u32> {
    text?.strip_prefix(key)?.strip_prefix('=')?.parse().ok().filter(|number| (1..=max).contains(number))
}

fn parse(text: &str) -> Option<SaltedHash> {
    let mut parts = text.strip_prefix("$argon2id$v=19$")?.split('$');
    let (costs, salt, hash) = (parts.next()?, parts.next()?, parts.next()?);
    let mut costs = costs.split(',');
    let memory_kib = number(costs.next(), "m", MEMORY_KIB_MAX)?;
    let passes = number(costs.next(), "t", PASSES_MAX)?;
    let lanes = number(costs.next(), "p", LANES_MAX)?;
    let decoded = |text: &str| STANDARD_NO_PAD.decode(text).ok();
    let found = SaltedHash { memory_kib, passes, lanes, salt: decoded(salt)?, hash: decoded(hash)? };
    let whole = parts.next().is_none() && costs.next().is_none();
    let fits = SALT_BYTES.contains(&found.salt.len()) && HASH_BYTES.contains(&found.hash.len());
    (whole && fits && found.params().is_some()).then_some(found)
}

impl FromStr for SaltedHash {
    type Err = String;
    fn from_str(text: &str) -> Result<SaltedHash, String> {
        parse(text).ok_or_else(|| WRONG.to_owned())
    }
}

impl SaltedHash {
    /// Of a new password, with a salt of its own.
    pub fn of(password: &[u8]) -> SaltedHash {
        let (memory_kib, passes, lanes) = MADE;
        SaltedHash::with_costs(password, memory_kib, passes, lanes)
    }

    /// As `of`, at other costs than those that are advised.
    pub fn with_costs(password: &[u8], memory_kib: u32, passes: u32, lanes: u32) -> SaltedHash {
        let salt: [u8; MADE_SALT_BYTES] = rand::rng().random();
        let mut made = SaltedHash { memory_kib, passes, lanes, salt: salt.to_vec(), hash: vec![0; MADE_HASH_BYTES] };
        made.hash = made.compute(password).expect("these costs are allowed");
        made
    }

    /// Takes as long as this one, and no password is right.
    pub fn decoy(&self) -> SaltedHash {
        let hash: [u8; MADE_HASH_BYTES] = rand::rng().random();
        let salt: [u8; MADE_SALT_BYTES] = rand::rng().random();
        SaltedHash { salt: salt.to_vec(), hash: hash.to_vec(), ..self.clone() }
    }

    fn params(&self) -> Option<Params> {
        Params::new(self.memory_kib, self.passes, self.lanes, Some(self.hash.len())).ok()
    }

    fn compute(&self, password: &[u8]) -> Option<Vec<u8>> {
        let mut hash = vec![0; self.hash.len()];
        let argon = Argon2::new(Algorithm::Argon2id, Version::V0x13, self.params()?);
        argon.hash_password_into(password, &self.salt, &mut hash).ok().map(|()| hash)
    }

    /// Compares, for tens of milliseconds, without telling by its time how much is alike.
    pub fn is_right(&self, password: &[u8]) -> bool {
        let given = self.compute(password);
        given.is_some_and(|given| given.iter().zip(&self.hash).fold(0, |differing, (a, b)| differing | (a ^ b)) == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the `argon2` command of its reference implementation prints it: `echo -n password | argon2 somesalt -id -t 2 -m 16 -p 1`.
    const REFERENCE: &str = "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc";

    #[test]
    fn hash_of_the_reference_implementation_is_taken() {
        let hash: SaltedHash = REFERENCE.parse().expect("a salted hash");
        assert_eq!(hash.to_string(), REFERENCE);
        assert!(hash.is_right(b"password") && !hash.is_right(b"Password") && !hash.is_right(b""));
    }

    #[test]
    fn made_hash_has_a_salt_of_its_own_and_a_decoy_is_never_right() {
        let [one, other] = [(); 2].map(|()| SaltedHash::with_costs(b"secret", 8, 1, 1));
        assert_ne!(one.to_string(), other.to_string());
        for hash in [&one, &other] {
            let again: SaltedHash = hash.to_string().parse().expect("what is printed is read");
            assert!(again.is_right(b"secret") && !again.is_right(b"secre"));
            assert!(!hash.decoy().is_right(b"secret"));
        }
    }

    #[test]
    fn costs_beyond_the_bounds_and_other_texts_are_refused() {
        for text in [
            "$argon2id$v=19$m=65537,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
            "$argon2id$v=19$m=65536,t=11,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
            "$argon2id$v=19$m=65536,t=2,p=5$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
            "$argon2id$v=19$m=0,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
            "$argon2id$v=19$m=7,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
            "$argon2i$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
            "$argon2id$v=19$m=65536,t=2,p=1$c2E$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
            "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFh",
            "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc$x",
            "$2y$10$abcdefghijklmnopqrstuv",
        ] {
            assert!(text.parse::<SaltedHash>().is_err(), "{text}");
        }
    }
}
