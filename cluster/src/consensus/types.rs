//! What the register is for openraft: its types, the messages of its members, and why it fails.

use std::io::Cursor;
use std::path::Path;
use std::time::Duration;

use openraft::BasicNode;
use openraft::error::RaftError;
use serde::{Deserialize, Serialize};

use super::guard::WRITES_FILE;
use crate::member::Impersonation;
use crate::register::{Change, MemberId, Outcome};

openraft::declare_raft_types!(
    /// The types with which openraft holds the register.
    pub Types:
        D = Change,
        R = Outcome,
        NodeId = u64,
        Node = BasicNode,
);

/// A message of openraft.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rpc {
    /// Changes, or a heartbeat.
    Append(openraft::raft::AppendEntriesRequest<Types>),
    /// May I control?
    Vote(openraft::raft::VoteRequest<u64>),
    /// A piece of the whole state.
    Snapshot(openraft::raft::InstallSnapshotRequest<Types>),
}

/// The answer to one.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RpcReply {
    /// To `Append`.
    Append(Result<openraft::raft::AppendEntriesResponse<u64>, RaftError<u64>>),
    /// To `Vote`.
    Vote(Result<openraft::raft::VoteResponse<u64>, RaftError<u64>>),
    /// To `Snapshot`.
    Snapshot(
        Result<openraft::raft::InstallSnapshotResponse<u64>, RaftError<u64, openraft::error::InstallSnapshotError>>,
    ),
}

/// Why the register cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// Its database does not open or is damaged.
    #[error("the register's file {path}: {text}")]
    Store {
        /// The file.
        path: String,
        /// What is wrong.
        text: String,
    },
    /// Its database is damaged, and with it what this member promised.
    #[error(
        "{path} is damaged: {text}. What this member promised and voted cannot be known any more, so it takes no part. Remove this \
         file and cluster.writes beside it and start the node again: it then joins anew, as a member that lost its disk, and its \
         confirmations count once it has caught up"
    )]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong.
        text: String,
    },
    /// The directory is a copy, and nobody who is configured could tell what became of its member since.
    #[error(
        "{dir} is a copy of a member's directory: what that member promised and confirmed after the copy was made is not in it. If it \
         is the newest there is, start it with --become member. If other members are alive, name all of them with --members, and it \
         joins anew"
    )]
    Copied {
        /// The data directory.
        dir: String,
    },
    /// The engine stopped, or refuses.
    #[error("the register: {0}")]
    Engine(String),
    /// Another member controls, or nobody does.
    #[error("this member does not control the register")]
    NotController(Option<MemberId>),
    /// An incarnation that is no longer a member wants to control.
    #[error("{id} was removed with version {version} of the register")]
    Removed {
        /// Which.
        id: MemberId,
        /// Since when.
        version: u64,
    },
    /// A member speaks for another.
    #[error(transparent)]
    Impersonation(#[from] Impersonation),
    /// A part of the register's state beyond its bound.
    #[error("the register's state is at most {REGISTER_BYTES_MAX} bytes, a message has {bytes} for offset {offset}")]
    Large {
        /// Where it is to go.
        offset: u64,
        /// How much it is.
        bytes: usize,
    },
    /// No majority took the change in time. It may be taken yet.
    #[error("no majority of the voters took the change within {0:?}")]
    Timeout(Duration),
}

/// The one of them that holds the promises; open as long as the member takes part.
pub const REGISTER_FILE: &str = "cluster.redb";

/// The file of the register in a data directory.
pub fn register_path(dir: &Path) -> std::path::PathBuf {
    dir.join(REGISTER_FILES[0])
}

/// The register's state is text of a few members: no larger one is taken.
pub(super) const REGISTER_BYTES_MAX: u64 = 1 << 20;

/// What a member's identity, vote and promises stand in, in its data directory: the register's database, and the number of its
/// writes.
pub const REGISTER_FILES: [&str; 2] = [REGISTER_FILE, WRITES_FILE];
