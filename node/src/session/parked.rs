//! A session that waits for something: space in the log, a state new enough to be read, replicas, an LSN, or entries of streams. Used by `session`, which asks
//! again with `poll` whenever the node says that something may have changed.

use std::time::{Duration, Instant};

use walferry_engine::lsn::Lsn;

use crate::clients::list::{ClientAnswer, ClientReply};
use crate::session::Client;
use crate::session::command::stream::ReadRequest;
use crate::session::host::{COUNT_TIME_MAX, Host, Stage, Wait};
use crate::session::outbox::Hold;
use crate::session::reading::{Missing, Position, Verdict, lost};
use crate::session::reply::Reply;
use crate::users::login::Login;

/// What is waited for, and until when.
#[derive(Debug)]
pub struct Parked {
    what: What,
    deadline: Option<Instant>,
    /// XREAD: the state was not good enough to be read; it waits for that first.
    unready: Option<Wait>,
}

#[derive(Debug)]
enum What {
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

fn wait_for(missing: Missing, floor: Lsn) -> Wait {
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

    /// The reply, once there is one: `Ok(Some(hold))`; `Ok(None)` when the session only goes on; `Err(self)`: wait on.
    pub fn poll(mut self, client: &mut Client, host: &mut dyn Host, reply: &mut Reply) -> Result<Option<Hold>, Parked> {
        let over = self.deadline.is_some_and(|deadline| host.now() >= deadline);
        // A failover may take the commit back while it is waited for: what replicas have at its LSN then is another one.
        if let What::Replicas { commit, .. } | What::Durable { commit, .. } = &self.what
            && let Some(error) = lost(*commit, host.history())
        {
            reply.error(error);
            return Ok(Some(Hold::Nothing));
        }
        if let What::Login(login) = &mut self.what {
            let answered = login.poll(client, over, host, reply);
            return if answered { Ok(Some(Hold::Nothing)) } else { Err(self) };
        }
        match &self.what {
            What::LogSpace | What::Readable(_) => return Ok(None),
            What::Applied(lsn) if host.applied() >= *lsn => reply.ok(),
            What::Applied(lsn) if over => {
                let applied = host.applied();
                reply.error(format_args!("TIMEOUT {lsn} is not applied here in time: applied is {applied}"));
            }
            What::Replicas { commit, wanted } => {
                let replicas = host.replicas_at(Stage::Applied, commit.lsn);
                if replicas < *wanted && !over {
                    return Err(self);
                }
                reply.count(replicas);
            }
            What::Durable { commit, local, wanted } => {
                let here = host.flushed() >= commit.lsn;
                let replicas = host.replicas_at(Stage::Flushed, commit.lsn);
                if (replicas < *wanted || (*local && !here)) && !over {
                    return Err(self);
                }
                reply.array(2);
                reply.integer(i64::from(here));
                reply.count(replicas);
            }
            What::Streams(request) => {
                self.unready = None;
                match client.judge(host) {
                    Verdict::Ready => {}
                    Verdict::Refuse(error) => {
                        reply.error(error);
                        return Ok(Some(Hold::Nothing));
                    }
                    // Entries of a state that is not good enough are none.
                    Verdict::Wait(_) if over => {
                        reply.null_array();
                        return Ok(Some(Hold::Nothing));
                    }
                    Verdict::Wait(missing) => {
                        self.unready = Some(wait_for(missing, client.seen.lsn));
                        return Err(self);
                    }
                }
                let (view, hold) = client.read(host);
                match request.read(&view, reply) {
                    // Judged again once it was read: the process may have been stopped in between.
                    Ok(true) if client.judge(host) != Verdict::Ready => {
                        reply.undo();
                        self.unready = Some(Wait::Fresh);
                        return Err(self);
                    }
                    Ok(true) => return Ok(Some(hold)),
                    Ok(false) => {}
                    Err(error) => {
                        reply.error(error);
                        return Ok(Some(hold));
                    }
                }
                if over {
                    reply.null_array();
                    return Ok(Some(Hold::Nothing));
                }
                return Err(self);
            }
            What::Count(newest) => {
                let count = host.count_keys();
                let hold = client.read(host).1;
                let keys = match count {
                    Ok(count) if (count.is_exact && host.applied() >= *newest) || over => count.keys,
                    Ok(_) => return Err(self),
                    Err(error) => {
                        reply.error(format_args!("ERR {error}"));
                        return Ok(Some(Hold::Nothing));
                    }
                };
                match client.judge(host) {
                    Verdict::Ready => reply.count(usize::try_from(keys).unwrap_or(usize::MAX)),
                    Verdict::Refuse(error) => reply.error(error),
                    Verdict::Wait(missing) if over => reply.error(client.waited(missing, host)),
                    Verdict::Wait(_) => return Err(self),
                }
                return Ok(Some(hold));
            }
            What::Cluster(answer) => {
                let answer = answer.lock().expect("nobody panics with it").take();
                match answer {
                    Some(Ok(text)) => reply.text(text),
                    Some(Err(text)) => reply.error(format_args!("ERR {text}")),
                    None => return Err(self),
                }
            }
            What::Clients(answer) => {
                let answer = answer.borrow_mut().take();
                match answer {
                    Some(ClientAnswer::Text(text)) => reply.verbatim(&text),
                    Some(ClientAnswer::Killed(count)) => reply.count(count),
                    Some(ClientAnswer::KilledAddress(true)) => reply.ok(),
                    Some(ClientAnswer::KilledAddress(false)) => reply.error("ERR No such client"),
                    None => return Err(self),
                }
            }
            What::Applied(_) | What::Login(_) => return Err(self),
        }
        Ok(Some(Hold::Nothing))
    }
}
