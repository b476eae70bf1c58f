//! What a parked session answers once something may have come: the wait ends with a reply, goes on, or the command is executed again.

use crate::clients::list::ClientAnswer;
use crate::session::host::{Host, Stage, Wait};
use crate::session::outbox::Hold;
use crate::session::reading::{Verdict, lost};
use crate::session::reply::Reply;

use crate::session::client::Client;
use crate::session::command::connection;
use crate::session::parked::{Parked, What, wait_for};
use crate::users::login::{BUSY, Login, Outcome, State, WRONG_PASSWORD};

impl Parked {
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

impl Login {
    /// Writes the answer once there is one; false: it waits on. `over` says that a refusal need not wait any longer.
    pub fn poll(&mut self, client: &mut Client, over: bool, host: &mut dyn Host, reply: &mut Reply) -> bool {
        if let State::Asked(check, answer) = &self.state {
            let mut text = WRONG_PASSWORD;
            match answer.get() {
                None => return false,
                Some(Outcome::NotCompared) => text = BUSY,
                Some(Outcome::Right) => match client.verified(check) {
                    Some(user) => {
                        connection::logged_in(client, user, &self.next, host, reply);
                        return true;
                    }
                    None => client.failed(check.user.as_ref()),
                },
                Some(Outcome::Wrong) => client.failed(check.user.as_ref()),
            }
            self.state = State::Refused(text);
        }
        match &self.state {
            State::Refused(text) if over => {
                reply.error(text);
                true
            }
            _ => false,
        }
    }
}
