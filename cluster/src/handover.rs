//! The sync policy of a static pair travels with its leadership: a replica keeps the policy that its leader told it, and goes by
//! that when it is promoted, unless its own start options name another. Written by the applier when a leader welcomes the
//! replica, before anything of the stream is taken; read by the node when it is to lead. The members of a cluster do not use it:
//! their register has the policy.
//!
//! ```text
//! DIR/policy   walferry sync policy 1
//!              LEADER POLICY        the leader's name, and its policy as `--sync` takes it; nothing for none
//! ```

use std::io;
use std::path::{Path, PathBuf};

use walferry_engine::small_file::{self, Found};

use crate::member::MemberName;
use crate::policy::SyncPolicy;

/// The file in the data directory.
pub const POLICY_FILE: &str = "policy";
const HEADING: &str = "walferry sync policy 1";

/// What the leader that a replica follows, or followed until it was promoted, has for a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handover {
    /// The leader.
    pub leader: MemberName,
    /// Its policy.
    pub policy: SyncPolicy,
}

/// Why the policy of a leader cannot be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The file cannot be read or written.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file and its copy are damaged.
    #[error(
        "{} is damaged, and so is its copy beside it: it has the sync policy of the leader that this node followed. Start the node \
         with --sync POLICY to name one",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
    },
}

impl Handover {
    /// What a data directory has; `None` where no leader ever told a policy.
    pub fn load(dir: &Path) -> Result<Option<Handover>, HandoverError> {
        let path = dir.join(POLICY_FILE);
        let parsed = match small_file::load(&path) {
            Ok(Found::Text(text)) => Handover::parse(&text),
            Ok(Found::Nothing) => return Ok(None),
            Ok(Found::Damaged) => None,
            Err(source) => return Err(HandoverError::Io { what: "read", path, source }),
        };
        parsed.map(Some).ok_or(HandoverError::Damaged { path })
    }

    fn parse(text: &str) -> Option<Handover> {
        let line = text.strip_prefix(HEADING)?.strip_prefix('\n')?.strip_suffix('\n')?;
        let (leader, policy) = line.split_once(' ')?;
        Some(Handover { leader: leader.parse().ok()?, policy: policy.parse().ok()? })
    }

    /// Makes it durable, unless the directory has the same already. A damaged file is replaced.
    pub fn save(&self, dir: &Path) -> Result<(), HandoverError> {
        if Handover::load(dir).is_ok_and(|kept| kept.as_ref() == Some(self)) {
            return Ok(());
        }
        let path = dir.join(POLICY_FILE);
        let text = format!("{HEADING}\n{} {}\n", self.leader, self.policy);
        small_file::save(&path, &text).map_err(|source| HandoverError::Io { what: "write", path, source })
    }

    /// The policy for `own`, which led after that leader.
    pub fn policy_of(&self, own: &MemberName) -> SyncPolicy {
        self.policy.after_promotion(own, &self.leader)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handover_is_kept_and_damage_is_told() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Handover::load(dir.path()).unwrap(), None);
        for policy in ["ANY 1 (b, c)", "", "ALL"] {
            let told = Handover { leader: "a".parse().unwrap(), policy: policy.parse().unwrap() };
            told.save(dir.path()).unwrap();
            assert_eq!(Handover::load(dir.path()).unwrap(), Some(told));
        }
        let path = dir.path().join(POLICY_FILE);
        for file in [path.clone(), small_file::copy_of(&path)] {
            std::fs::write(file, "a ALL\n").unwrap();
        }
        let error = Handover::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("--sync POLICY"), "{error}");
        let told = Handover { leader: "a".parse().unwrap(), policy: "ANY 1 (b)".parse().unwrap() };
        told.save(dir.path()).unwrap();
        assert_eq!(told.policy_of(&"b".parse().unwrap()).to_string(), "ANY 1 (a)");
        assert_eq!(Handover::load(dir.path()).unwrap(), Some(told), "the next leader's word replaces it");
    }
}
