//! Commit levels: how far a commit must have come before its client is answered. Every layer above uses them; they
//! know neither replicas nor sessions.

use std::fmt;
use std::str::FromStr;

use walferry_engine::lsn::Lsn;

/// How far a commit must have come. Ordered: a later level includes the earlier ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CommitLevel {
    /// Answered at once; a crash of the leader may lose it.
    Off,
    /// Durable on the leader.
    #[default]
    Local,
    /// And handed to the disk by the replicas that the sync policy names: survives a crash of the leader.
    RemoteWrite,
    /// And durable there (PostgreSQL's `on`).
    RemoteFlush,
    /// And visible to readers there.
    RemoteApply,
}

impl CommitLevel {
    /// Every level, weakest first.
    pub const ALL: [CommitLevel; 5] = [
        CommitLevel::Off,
        CommitLevel::Local,
        CommitLevel::RemoteWrite,
        CommitLevel::RemoteFlush,
        CommitLevel::RemoteApply,
    ];

    /// The name, as configured and printed.
    pub const fn name(self) -> &'static str {
        match self {
            CommitLevel::Off => "off",
            CommitLevel::Local => "local",
            CommitLevel::RemoteWrite => "remote_write",
            CommitLevel::RemoteFlush => "remote_flush",
            CommitLevel::RemoteApply => "remote_apply",
        }
    }

    /// The highest level up to this one that holds for a commit which ends at `lsn`, where each holds up to what `reached` says.
    pub fn met(self, lsn: Lsn, reached: impl Fn(CommitLevel) -> Lsn) -> CommitLevel {
        let mut lower = CommitLevel::ALL.into_iter().rev().filter(|lower| *lower <= self);
        lower.find(|lower| reached(*lower) >= lsn).unwrap_or(CommitLevel::Off)
    }

    /// True when replicas have to confirm the commit.
    pub const fn is_remote(self) -> bool {
        matches!(self, CommitLevel::RemoteWrite | CommitLevel::RemoteFlush | CommitLevel::RemoteApply)
    }
}

impl fmt::Display for CommitLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What was given is not a commit level.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a commit level: expected off, local, remote_write, remote_flush (or on) or remote_apply")]
pub struct LevelSyntax(String);

impl FromStr for CommitLevel {
    type Err = LevelSyntax;

    fn from_str(text: &str) -> Result<CommitLevel, LevelSyntax> {
        let wanted = text.trim().to_ascii_lowercase();
        if wanted == "on" {
            return Ok(CommitLevel::RemoteFlush);
        }
        let level = CommitLevel::ALL.into_iter().find(|level| level.name() == wanted);
        level.ok_or_else(|| LevelSyntax(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_print_parse_and_compare() {
        for pair in CommitLevel::ALL.windows(2) {
            assert!(pair[0] < pair[1]);
        }
        for level in CommitLevel::ALL {
            assert_eq!(level.to_string().parse(), Ok(level));
            assert_eq!(level.is_remote(), level > CommitLevel::Local);
        }
        assert_eq!("ON".parse(), Ok(CommitLevel::RemoteFlush));
        for wrong in ["", "remote", "always", "remote-flush"] {
            assert!(wrong.parse::<CommitLevel>().is_err(), "{wrong:?}");
        }
    }
}
