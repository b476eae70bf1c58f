//! A session that waits for something: space in the log, a state new enough to be read, replicas, an LSN, or entries of streams. Used by `session`, which asks
//! again with `poll` whenever the node says that something may have changed.

use std::time::{Duration, Instant};

use walferry_engine::lsn::Lsn;

use crate::clients::list::ClientReply;
use crate::session::command::stream::ReadRequest;
use crate::session::host::{COUNT_TIME_MAX, Host, Wait};
use crate::session::reading::{Missing, Position};
use crate::users::login::Login;

/// What is waited for, and until when.
#[derive(Debug)]
pub struct Parked {
    pub(super) what: What,
    pub(super) deadline: Option<Instant>,
    /// XREAD: the state was not good enough to be read; it waits for that first.
    pub(super) unready: Option<Wait>,
}

#[derive(Debug)]
pub(super) enum What {
    LogSpace,
    Readable(Wait),
    Applied(Lsn),
    Replicas { commit: Position, wanted: usize },
    Durable { commit: Position, local: bool, wanted: usize },
    Streams(ReadRequest),
    Count(Lsn),
    Cluster(crate::cluster::Reply),
    Clients(ClientReply),
    Login(Box<Login>),
}

/// The moment `timeout` from now; zero is never.
fn deadline(timeout: Duration, host: &dyn Host) -> Option<Instant> {
    (!timeout.is_zero()).then(|| host.now() + timeout)
}

pub(super) fn wait_for(missing: Missing, floor: Lsn) -> Wait {
    match missing {
        Missing::Floor => Wait::Floor(floor),
        Missing::Fresh | Missing::Replay => Wait::Fresh,
    }
}

impl Parked {
    fn new(what: What, deadline: Option<Instant>) -> Parked {
        Parked { what, deadline, unready: None }
    }

    /// Until the log takes records again, or `deadline`: then the command is executed again.
    pub fn for_log_space(deadline: Option<Instant>) -> Parked {
        Parked::new(What::LogSpace, deadline)
    }

    /// Until the state is good enough for a read with this floor, or `deadline`: then the command is executed again.
    pub fn for_reading(missing: Missing, floor: Lsn, deadline: Instant) -> Parked {
        let wait = wait_for(missing, floor);
        Parked::new(What::Readable(wait), Some(deadline))
    }

    /// WAITLSN.
    pub fn for_applied(lsn: Lsn, timeout: Duration, host: &dyn Host) -> Parked {
        Parked::new(What::Applied(lsn), deadline(timeout, host))
    }

    /// WAIT: `wanted` replicas that have applied `commit`.
    pub fn for_replicas(commit: Position, wanted: usize, timeout: Duration, host: &dyn Host) -> Parked {
        Parked::new(What::Replicas { commit, wanted }, deadline(timeout, host))
    }

    /// WAITAOF: durable here if `local`, and on `wanted` replicas.
    pub fn for_durable(commit: Position, local: bool, wanted: usize, timeout: Duration, host: &dyn Host) -> Parked {
        Parked::new(What::Durable { commit, local, wanted }, deadline(timeout, host))
    }

    /// XREAD BLOCK.
    pub fn for_streams(request: ReadRequest, timeout: Duration, host: &dyn Host) -> Parked {
        Parked::new(What::Streams(request), deadline(timeout, host))
    }

    /// DBSIZE: until `newest` is applied and the keys are counted.
    pub fn for_count(newest: Lsn, host: &dyn Host) -> Parked {
        Parked::new(What::Count(newest), deadline(COUNT_TIME_MAX, host))
    }

    /// SWITCHOVER and its like: the cluster answers within a bounded time.
    pub fn for_cluster(answer: crate::cluster::Reply) -> Parked {
        Parked::new(What::Cluster(answer), None)
    }

    /// CLIENT LIST and KILL: answered within a turn.
    pub fn for_clients(answer: ClientReply) -> Parked {
        Parked::new(What::Clients(answer), None)
    }

    /// AUTH and HELLO: until the password is compared, and a wrong one is not answered before `refused_at`.
    pub fn for_login(login: Login, refused_at: Instant) -> Parked {
        Parked::new(What::Login(Box::new(login)), Some(refused_at))
    }

    /// The memory that it takes.
    pub fn kept_bytes(&self) -> usize {
        match &self.what {
            What::Streams(request) => request.kept_bytes(),
            _ => 0,
        }
    }

    /// XREAD BLOCK.
    pub fn is_for_streams(&self) -> bool {
        matches!(self.what, What::Streams(_))
    }

    /// When the wait ends at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// What the node is asked to watch.
    pub fn wait(&self) -> Wait {
        match &self.what {
            What::LogSpace => Wait::LogSpace,
            What::Readable(wait) => wait.clone(),
            What::Applied(lsn) => Wait::Applied(*lsn),
            What::Replicas { .. } | What::Durable { .. } => Wait::Acknowledged,
            What::Streams(request) => {
                self.unready.clone().unwrap_or_else(|| Wait::Streams(request.awaited().collect()))
            }
            What::Count(_) => Wait::Counted,
            What::Cluster(_) => Wait::Cluster,
            What::Clients(_) => Wait::Clients,
            What::Login(_) => Wait::Login,
        }
    }
}
