//! What a data directory is: a stand-alone leader's, a replica's, a member's or a witness's. Its command line may be wrong (a flag
//! forgotten, a unit file from before a promotion), and a node that believes it then leads with an old log or follows a node whose
//! newest commits it has itself. So the role stands in the directory, as PostgreSQL's `standby.signal` does, and a start that
//! contradicts it is refused. Used by the starts of nodes and witnesses, and by `promote`; knows nothing of logs.
//!
//! ```text
//! stored \ start   leader     --follow                              --members   witness
//! nothing          taken      taken                                 taken       taken
//! leader           goes on    taken: an old leader comes back (*)   taken       refused
//! replica          refused    goes on, with any leader              taken       refused
//! member           refused    refused                               goes on     refused
//! witness          refused    refused                               refused     goes on
//!
//! (*) refused for a node that was promoted from being a replica of that same leader: its flags are those of before
//! ```
//!
//! `--become ROLE` takes the role in spite of what is stored, except that a witness and a node with a log never become each other.
//! The file is `DIR/role`, kept twice as the other small files are; it is durable before the role is taken.

use std::io;
use std::path::{Path, PathBuf};

use rand::RngExt;
use walferry_cluster::consensus::REGISTER_FILES;
use walferry_engine::meta::{Meta, MetaError};
use walferry_engine::prepare::sync_dir;
use walferry_engine::small_file::{self, Found};

/// The file in the data directory.
pub const ROLE_FILE: &str = "role";
const ROLE_VERSION: u32 = 1;

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// It leads, and no register says so. If it was promoted: the leader that it followed until then.
    Leader {
        /// The peer address of that leader.
        promoted_from: Option<String>,
    },
    /// A replica of a leader.
    Replica {
        /// The peer address of its leader.
        leader: String,
    },
    /// The members of its cluster say what it is.
    Member,
    /// A member without a log.
    Witness,
}

/// What `--become` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Becoming {
    /// A stand-alone leader.
    Leader,
    /// A replica; with --follow.
    Replica,
    /// A member; with --members.
    Member,
}

/// Why a role is not taken.
#[derive(Debug, thiserror::Error)]
pub enum RoleError {
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
    /// The file and its copy are damaged, or say what this build does not know.
    #[error(
        "{} is damaged, and so is its copy beside it: it says whether this node leads, follows or is a member. Say it again with \
         --become leader, --become replica or --become member, or restore one of the two from a copy of the directory",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// The start contradicts what is stored.
    #[error("--data {}: {reason}", dir.display())]
    Contradiction {
        /// The data directory.
        dir: PathBuf,
        /// What it is, what was asked, and the ways out.
        reason: String,
    },
    /// Its description cannot be read or written.
    #[error(transparent)]
    Meta(#[from] MetaError),
    /// `--become` does not fit the other flags.
    #[error("--become {0}: {1}")]
    Flags(&'static str, &'static str),
}

impl RoleError {
    /// True when the command line is to blame: another start with it ends the same way.
    pub fn is_usage(&self) -> bool {
        matches!(self, RoleError::Contradiction { .. } | RoleError::Flags(..))
    }
}

impl Role {
    fn path(dir: &Path) -> PathBuf {
        dir.join(ROLE_FILE)
    }

    /// What is stored; `None` for a directory that has taken no role yet.
    pub fn load(dir: &Path) -> Result<Option<Role>, RoleError> {
        let path = Role::path(dir);
        let text = match small_file::load(&path) {
            Ok(Found::Text(text)) => text,
            // A directory that lost the file is still what its register says.
            Ok(Found::Nothing) => return Ok(dir.join(REGISTER_FILES[0]).exists().then(|| Role::with_register(dir))),
            Ok(Found::Damaged) => return Err(RoleError::Damaged { path }),
            Err(source) => return Err(RoleError::Io { what: "read", path, source }),
        };
        let role = Role::parse(&text).ok_or(RoleError::Damaged { path })?;
        Ok(Some(role))
    }

    /// A witness has a register and no log.
    fn with_register(dir: &Path) -> Role {
        if matches!(Meta::load(dir), Ok(None)) { Role::Witness } else { Role::Member }
    }

    fn parse(text: &str) -> Option<Role> {
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "));
        if value("role_version")?.parse() != Ok(ROLE_VERSION) {
            return None;
        }
        match value("role")? {
            "leader" => Some(Role::Leader { promoted_from: value("promoted_from").map(str::to_owned) }),
            "replica" => Some(Role::Replica { leader: value("leader")?.to_owned() }),
            "member" => Some(Role::Member),
            "witness" => Some(Role::Witness),
            _ => None,
        }
    }

    /// Makes it durable.
    pub fn save(&self, dir: &Path) -> Result<(), RoleError> {
        let more = match self {
            Role::Leader { promoted_from: Some(leader) } => format!("promoted_from = {leader}\n"),
            Role::Replica { leader } => format!("leader = {leader}\n"),
            Role::Leader { promoted_from: None } | Role::Member | Role::Witness => String::new(),
        };
        let text = format!("role_version = {ROLE_VERSION}\nrole = {}\n{more}", self.word());
        let path = Role::path(dir);
        small_file::save(&path, &text).map_err(|source| RoleError::Io { what: "write", path, source })
    }

    fn word(&self) -> &'static str {
        match self {
            Role::Leader { .. } => "leader",
            Role::Replica { .. } => "replica",
            Role::Member => "member",
            Role::Witness => "witness",
        }
    }

    /// What the directory is, as a refusal names it.
    fn describe(&self, dir: &Path) -> String {
        match self {
            Role::Leader { promoted_from: None } => "it is a stand-alone leader's".to_owned(),
            Role::Leader { promoted_from: Some(leader) } => {
                format!("it is a leader's, which was promoted from being a replica of {leader}")
            }
            Role::Replica { leader } => format!("it is a replica's, of the leader at {leader}"),
            Role::Member => match Meta::load(dir) {
                Ok(Some(meta)) if meta.cluster_id != 0 => {
                    format!("it is a member's, of cluster {:032x}", meta.cluster_id)
                }
                _ => "it is a member's".to_owned(),
            },
            Role::Witness => "it is a witness's, which has no log".to_owned(),
        }
    }
}

/// Why a start as `wanted` is refused, with the ways out; `None` when it is not.
fn contradiction(stored: &Role, wanted: &Role) -> Option<String> {
    const LOSES_OLDER: &str = "commits that its leader confirmed and this node has not are then lost here, and if that leader still \
                               takes writes there are two";
    match (stored, wanted) {
        (Role::Leader { promoted_from: Some(old) }, Role::Replica { leader }) if old == leader => Some(format!(
            "--follow {leader} is its flag from before the promotion. Leave out --follow to go on leading, or give --become replica \
             to follow {leader}: what was committed here since the promotion and is not there is then cut off, and kept in \
             DIR/lost/"
        )),
        (Role::Leader { .. }, Role::Leader { .. } | Role::Replica { .. } | Role::Member) => None,
        (Role::Replica { .. }, Role::Replica { .. } | Role::Member) => None,
        (Role::Member, Role::Member) | (Role::Witness, Role::Witness) => None,
        (Role::Replica { leader }, Role::Leader { .. }) => Some(format!(
            "without --follow it would lead. Give --follow {leader} (or another leader's address) to go on as a replica; to lead, \
             start it as a replica and `walferry promote` it, or give --become leader: {LOSES_OLDER}"
        )),
        (Role::Member, Role::Leader { .. }) => Some(format!(
            "without --members it would lead alone, whatever the other members confirm. Give --members as before to go on as a \
             member, or --become leader to leave the cluster for good: {LOSES_OLDER}, and it gets a cluster id of its own"
        )),
        (Role::Member, Role::Replica { leader }) => Some(format!(
            "with --follow it would leave its cluster. Give --members as before to go on as a member, or --become replica to follow \
             {leader} instead: its vote and promises are then forgotten, and the members count one less until they `walferry \
             remove` it"
        )),
        (Role::Witness, _) => Some(
            "start it with `walferry witness`, or name another directory: a node with a log begins in an empty one".to_owned(),
        ),
        (_, Role::Witness) => Some(
            "start it with `walferry start`, or name another directory: a witness begins in an empty one, and never takes the place \
             of a log"
                .to_owned(),
        ),
    }
}

/// Whether a start as `wanted` fits what the directory is. Changes nothing.
pub fn check(dir: &Path, wanted: &Role, becoming: Option<Becoming>) -> Result<(), RoleError> {
    let asked = match (becoming, wanted) {
        (None, _) => false,
        (Some(Becoming::Leader), Role::Leader { .. })
        | (Some(Becoming::Replica), Role::Replica { .. })
        | (Some(Becoming::Member), Role::Member) => true,
        (Some(Becoming::Leader), _) => {
            return Err(RoleError::Flags(
                "leader",
                "leave out --follow and --members, with which it would not lead alone",
            ));
        }
        (Some(Becoming::Replica), _) => return Err(RoleError::Flags("replica", "give --follow, and no --members")),
        (Some(Becoming::Member), _) => return Err(RoleError::Flags("member", "give --members, and no --follow")),
    };
    let stored = match Role::load(dir) {
        Err(RoleError::Damaged { .. }) if asked => return Ok(()),
        stored => stored?,
    };
    let Some(stored) = stored.filter(|stored| !asked || *stored == Role::Witness) else { return Ok(()) };
    match contradiction(&stored, wanted) {
        None => Ok(()),
        Some(ways) => {
            let reason = format!("{}; {ways}", stored.describe(dir));
            Err(RoleError::Contradiction { dir: dir.to_owned(), reason })
        }
    }
}

/// Takes the role, durably, after `check`. The caller holds the directory's lock.
pub fn take(dir: &Path, wanted: &Role, becoming: Option<Becoming>) -> Result<(), RoleError> {
    check(dir, wanted, becoming)?;
    let stored = match Role::load(dir) {
        Err(RoleError::Damaged { .. }) => None,
        stored => stored?,
    };
    let unchanged = match (&stored, wanted) {
        // What it was promoted from stays known: the flags of before may come back at any start.
        (Some(Role::Leader { .. }), Role::Leader { .. }) => true,
        (stored, wanted) => stored.as_ref() == Some(wanted),
    };
    let stays_member = *wanted == Role::Member || *wanted == Role::Witness;
    let left_cluster = !stays_member && REGISTER_FILES.iter().any(|name| dir.join(name).exists());
    if !unchanged {
        tracing::info!(data = %dir.display(), "the data directory is a {}'s from now on", wanted.word());
        wanted.save(dir)?;
    }
    if let (Role::Leader { .. }, Some(mut meta)) = (wanted, Meta::load(dir)?)
        && (meta.cluster_id == 0 || left_cluster)
    {
        // A replica that never met a leader has no cluster; one that leaves its cluster must not be taken for a part of it.
        meta.cluster_id = rand::rng().random();
        meta.save(dir)?;
    }
    if left_cluster {
        // Its identity, vote and promises: with them it could come back as the member that it was, with another log. The role is
        // durable already, so that a crash in between ends here again.
        for name in REGISTER_FILES {
            let path = dir.join(name);
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(RoleError::Io { what: "remove", path, source });
                }
                _ => {}
            }
        }
        sync_dir(dir).map_err(|source| RoleError::Io { what: "flush", path: dir.to_owned(), source })?;
        tracing::warn!(data = %dir.display(), "it has left its cluster: its vote and promises are forgotten");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leader() -> Role {
        Role::Leader { promoted_from: None }
    }

    fn replica(leader: &str) -> Role {
        Role::Replica { leader: leader.to_owned() }
    }

    fn promoted(from: &str) -> Role {
        Role::Leader { promoted_from: Some(from.to_owned()) }
    }

    #[test]
    fn role_of_a_directory_decides_which_starts_are_taken() {
        // What is stored, what is wanted, what the refusal says.
        let cases: [(Role, Role, &[&str]); 17] = [
            (leader(), leader(), &[]),
            (leader(), replica("h:1"), &[]),
            (leader(), Role::Member, &[]),
            (leader(), Role::Witness, &["stand-alone leader", "walferry start"]),
            (promoted("h:1"), leader(), &[]),
            (promoted("h:1"), replica("h:2"), &[]),
            (promoted("h:1"), replica("h:1"), &["promoted", "Leave out --follow", "--become replica", "DIR/lost/"]),
            (replica("h:1"), replica("h:2"), &[]),
            (replica("h:1"), Role::Member, &[]),
            (replica("h:1"), leader(), &["--follow h:1", "--become leader", "lost"]),
            (Role::Member, Role::Member, &[]),
            (Role::Member, leader(), &["--members", "--become leader", "lost"]),
            (Role::Member, replica("h:1"), &["--members", "--become replica"]),
            (Role::Member, Role::Witness, &["walferry start"]),
            (Role::Witness, Role::Witness, &[]),
            (Role::Witness, leader(), &["walferry witness"]),
            (Role::Witness, Role::Member, &["walferry witness"]),
        ];
        for (stored, wanted, says) in cases {
            let dir = tempfile::tempdir().unwrap();
            stored.save(dir.path()).unwrap();
            assert_eq!(Role::load(dir.path()).unwrap(), Some(stored.clone()));
            let outcome = take(dir.path(), &wanted, None);
            match (&outcome, says) {
                (Ok(_), []) => {
                    let kept = matches!((&stored, &wanted), (Role::Leader { .. }, Role::Leader { .. }));
                    let expected = if kept { stored } else { wanted };
                    assert_eq!(Role::load(dir.path()).unwrap(), Some(expected));
                }
                (Err(error), [_, ..]) => {
                    let text = error.to_string();
                    assert!(says.iter().all(|word| text.contains(word)), "{stored:?} {wanted:?}: {text}");
                    assert_eq!(Role::load(dir.path()).unwrap(), Some(stored), "nothing changes");
                }
                _ => panic!("{stored:?} {wanted:?}: {outcome:?}"),
            }
        }
    }

    #[test]
    fn become_takes_the_role_and_forgets_the_register() {
        let dir = tempfile::tempdir().unwrap();
        let register = |name: &str| dir.path().join(name);
        Role::Member.save(dir.path()).unwrap();
        for name in REGISTER_FILES {
            std::fs::write(register(name), "x").unwrap();
        }
        let wrong = take(dir.path(), &leader(), Some(Becoming::Replica)).unwrap_err().to_string();
        assert!(wrong.contains("give --follow"), "{wrong}");
        assert!(REGISTER_FILES.iter().all(|name| register(name).exists()));
        take(dir.path(), &leader(), Some(Becoming::Leader)).unwrap();
        assert_eq!(Role::load(dir.path()).unwrap(), Some(leader()));
        assert!(REGISTER_FILES.iter().all(|name| !register(name).exists()));
        // A crash before the register was removed: the next start goes on with it.
        std::fs::write(register(REGISTER_FILES[0]), "x").unwrap();
        take(dir.path(), &leader(), None).unwrap();
        assert!(!register(REGISTER_FILES[0]).exists());
        // A witness has nothing to lead with.
        Role::Witness.save(dir.path()).unwrap();
        assert!(take(dir.path(), &leader(), Some(Becoming::Leader)).is_err());
    }

    #[test]
    fn damaged_role_is_refused_until_it_is_named() {
        let dir = tempfile::tempdir().unwrap();
        leader().save(dir.path()).unwrap();
        let path = dir.path().join(ROLE_FILE);
        for file in [path.clone(), small_file::copy_of(&path)] {
            std::fs::write(file, "role = member\n").unwrap();
        }
        let refused = take(dir.path(), &leader(), None).unwrap_err().to_string();
        assert!(refused.contains("--become leader"), "{refused}");
        take(dir.path(), &leader(), Some(Becoming::Leader)).unwrap();
        assert_eq!(Role::load(dir.path()).unwrap(), Some(leader()));
        // Without the file the register tells.
        small_file::remove(&path).unwrap();
        assert_eq!(Role::load(dir.path()).unwrap(), None);
        std::fs::write(dir.path().join(REGISTER_FILES[0]), "x").unwrap();
        assert_eq!(Role::load(dir.path()).unwrap(), Some(Role::Witness));
    }
}
