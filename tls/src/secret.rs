//! The secret that the nodes of a cluster share, from its file. A line is a secret; the first is the one that this node proves when
//! it dials, any of them is taken when it is dialled, so that a secret is replaced without a pause: add the new one at the end of
//! the file on every node, then put it first on every node, then take the old one out.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};

use crate::error::SecretError;
use crate::identity::{LOOK_INTERVAL, Stamp};
use crate::private_file::{Outsiders, PrivateFileError, open_private};

/// A shorter secret could be guessed.
pub const SECRET_CHARACTERS_MIN: usize = 32;
/// Secrets in a file, at most.
const SECRETS_MAX: usize = 8;
/// A larger file does not hold secrets only.
const FILE_BYTES_MAX: u64 = 4 << 10;
/// Random bytes of a secret that is made here.
const MADE_BYTES: usize = 32;
const KEY_ID_TEXT: &[u8] = b"walferry key id";

/// Tells one secret from another, and nothing about it.
pub(crate) type KeyId = [u8; 8];

/// A secret.
#[derive(Clone)]
pub struct Secret {
    key: hmac::Key,
    id: KeyId,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    fn new(text: &str) -> Secret {
        let key = hmac::Key::new(hmac::HMAC_SHA256, text.as_bytes());
        let id = hmac::sign(&key, KEY_ID_TEXT).as_ref()[..8].try_into().expect("8 bytes");
        Secret { key, id }
    }

    pub(crate) fn key(&self) -> &hmac::Key {
        &self.key
    }

    pub(crate) fn id(&self) -> KeyId {
        self.id
    }
}

/// The secrets of one file: at least one.
#[derive(Clone, Debug)]
pub struct Secrets(Vec<Secret>);

impl Secrets {
    /// Reads `file`, which nobody but its owner may read.
    pub fn load(file: &Path) -> Result<Secrets, SecretError> {
        let unreadable = |source| SecretError::Read { file: file.to_owned(), source };
        let opened = open_private(file, Outsiders::GroupAndOthers).map_err(|error| match error {
            PrivateFileError::Io(source) => unreadable(source),
            open => SecretError::Open { file: file.to_owned(), open },
        })?;
        let mut text = String::new();
        opened.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(unreadable)?;
        Secrets::parse(&text).map_err(|reason| SecretError::Text { file: file.to_owned(), reason })
    }

    /// Makes a file with a new secret, which must not exist yet.
    pub fn create(file: &Path) -> Result<(), SecretError> {
        let failed = |source| SecretError::Create { file: file.to_owned(), source };
        let mut bytes = [0; MADE_BYTES];
        SystemRandom::new().fill(&mut bytes).map_err(|_| failed(io::Error::other("no random bytes")))?;
        let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        // Whole when it appears: another node may wait for it.
        let mut partial = file.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let _ = std::fs::remove_file(&partial);
        let written = File::options().write(true).create_new(true).mode(0o600).open(&partial).and_then(|mut made| {
            made.write_all(format!("{text}\n").as_bytes())?;
            made.sync_all()
        });
        let made = written.and_then(|()| std::fs::hard_link(&partial, file));
        let _ = std::fs::remove_file(&partial);
        let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        made.and_then(|()| File::open(dir)?.sync_all()).map_err(failed)
    }

    /// Those of a file with this text, or what is wrong with it.
    pub fn parse(text: &str) -> Result<Secrets, String> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let lines: Vec<&str> = lines.collect();
        if lines.is_empty() {
            return Err("it holds no secret".to_owned());
        }
        if lines.len() > SECRETS_MAX {
            return Err(format!("it holds {} secrets, {SECRETS_MAX} are the most", lines.len()));
        }
        if let Some(short) = lines.iter().position(|line| line.len() < SECRET_CHARACTERS_MIN) {
            return Err(format!(
                "secret {} has {} characters and needs {SECRET_CHARACTERS_MIN} at least: `walferry secret FILE` makes one",
                short + 1,
                lines[short].len()
            ));
        }
        Ok(Secrets(lines.into_iter().map(Secret::new).collect()))
    }

    /// The one to prove.
    pub fn own(&self) -> &Secret {
        &self.0[0]
    }

    pub(crate) fn find(&self, id: KeyId) -> Option<&Secret> {
        self.0.iter().find(|secret| secret.id == id)
    }
}

/// A node's part in proofs: its name, and its secrets as the file has them now. A bad new file keeps the old secrets.
#[derive(Debug)]
pub struct PeerSecret {
    own_name: String,
    file: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    secrets: Secrets,
    /// What the file was like when it was read last, usable or not.
    stamp: Option<Stamp>,
    looked: Instant,
}

impl PeerSecret {
    /// Of the node called `own_name`, 1 to 63 bytes.
    pub fn load(own_name: &str, file: &Path) -> Result<PeerSecret, SecretError> {
        // Before it is read: a change in between is found at the next look.
        let stamp = Stamp::of(file);
        let state = State { secrets: Secrets::load(file)?, stamp, looked: Instant::now() };
        Ok(PeerSecret { own_name: own_name.to_owned(), file: file.to_owned(), state: Mutex::new(state) })
    }

    pub(crate) fn own_name(&self) -> &str {
        &self.own_name
    }

    /// The secrets for a proof that begins now; the file is looked at once a second at most.
    pub(crate) fn current(&self) -> Secrets {
        let mut state = self.state.lock().expect("nobody panics with it");
        if state.looked.elapsed() >= LOOK_INTERVAL {
            self.look(&mut state, false);
        }
        state.secrets.clone()
    }

    /// Reads the file again, at an operator's word.
    pub fn reload(&self) {
        self.look(&mut self.state.lock().expect("nobody panics with it"), true);
    }

    fn look(&self, state: &mut State, asked: bool) {
        state.looked = Instant::now();
        let now = Stamp::of(&self.file);
        if now == state.stamp && !asked {
            return;
        }
        state.stamp = now;
        match Secrets::load(&self.file) {
            Ok(secrets) => {
                state.secrets = secrets;
                tracing::info!(file = %self.file.display(), "the peer secret was read again; new connections use it");
            }
            Err(error) => tracing::warn!("the new peer secret is of no use, the old one stays: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn made_file_is_read_and_is_the_owners_alone() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("peer.secret");
        Secrets::create(&file).expect("made");
        let secrets = Secrets::load(&file).expect("read");
        assert!(secrets.find(secrets.own().id()).is_some());
        assert!(Secrets::create(&file).is_err(), "no secret is written over");
        let other = directory.path().join("other");
        Secrets::create(&other).expect("made");
        let other = Secrets::load(&other).expect("read");
        assert!(other.find(secrets.own().id()).is_none(), "each is another");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).expect("changed");
        let error = Secrets::load(&file).expect_err("the group may read it").to_string();
        assert!(error.contains("0640") && error.contains("chmod 600"), "{error}");
    }

    #[test]
    fn short_and_missing_secrets_are_refused() {
        assert!(Secrets::parse("# only a comment\n\n").expect_err("none").contains("no secret"));
        assert!(Secrets::parse("hunter2").expect_err("short").contains("walferry secret"));
    }
}
