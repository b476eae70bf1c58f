//! Whether a session may execute a command now: its user's rights, and whether the node's state is what the command asks for.

use crate::session::command::error::refusal_text;
use crate::session::command::spec::{Run, Spec};
use crate::session::host::{Host, Refusal};
use crate::session::outbox::Hold;
use crate::session::parked::Parked;
use crate::session::reading::Verdict;
use crate::session::resp::{Args, KEY_BYTES_MAX};

use super::Session;
use super::reading;

/// What a command asks of the node's state.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Asks {
    /// The command reads no keys.
    Nothing,
    /// The command reads keys.
    Read,
    /// EXEC of a transaction that only reads.
    ReadAll,
    /// It writes: what the session has seen must be in the log still.
    Lineage,
}

/// Whether of one command.
pub(super) enum Executed {
    Done,
    /// Not executed: it must be tried again.
    Again,
}

impl Session {
    /// What a command asks of the node's state.
    pub(super) fn asks(&self, spec: &Spec) -> Asks {
        match spec.run {
            Run::Read(_) | Run::Await(..) => Asks::Read,
            Run::Write(_) => Asks::Lineage,
            // What is watched is relied on, as what was read.
            Run::Control(_) if spec.name == "watch" => Asks::Lineage,
            Run::Control(_) => Asks::Nothing,
            Run::Exec => match &self.client.transaction {
                Some(transaction) if transaction.writes() => Asks::Lineage,
                Some(transaction) if transaction.reads() => Asks::ReadAll,
                _ => Asks::Nothing,
            },
        }
    }

    /// Whether the state is what the command asks for; `None` when it is. A command that waits is tried again.
    pub(super) fn guard(&mut self, asks: Asks, host: &mut dyn Host) -> Option<Executed> {
        let verdict = match asks {
            Asks::Nothing => return None,
            Asks::Read | Asks::ReadAll => self.client.judge(host),
            Asks::Lineage if !self.client.tracked => return None,
            // It executes on the leader's newest state, which is new enough if it is the same log at all.
            Asks::Lineage => reading::lost(self.client.seen, host.history()).map_or(Verdict::Ready, Verdict::Refuse),
        };
        let error = match verdict {
            Verdict::Ready => {
                self.reads_until = None;
                return None;
            }
            Verdict::Refuse(error) => error,
            Verdict::Wait(missing) => {
                let timeout = self.client.read_timeout;
                let until = *self.reads_until.get_or_insert_with(|| host.now() + timeout);
                // A transaction that was executed is gone.
                let again = asks == Asks::Read || self.client.transaction.is_some();
                if host.now() < until && again {
                    self.outbox.reply.undo();
                    let parked = Parked::for_reading(missing, self.client.seen.lsn, until);
                    host.park(self.client.id, parked.wait());
                    self.parked = Some(parked);
                    return Some(Executed::Again);
                }
                self.client.waited(missing, host)
            }
        };
        self.reads_until = None;
        if asks != Asks::Read && self.client.transaction.take().is_some() {
            self.client.watched.clear();
        }
        self.outbox.reply.undo();
        self.outbox.reply.error(error);
        self.push(Hold::Nothing, host);
        Some(Executed::Done)
    }

    /// Whether the session may execute (or queue) the command at all.
    pub(super) fn admit(&self, spec: &Spec, args: &Args<'_>, host: &dyn Host) -> Result<(), String> {
        match &self.client.user {
            _ if spec.before_auth() => {}
            None => return Err("NOAUTH Authentication required.".to_owned()),
            Some(user) if user.grant < spec.needs(args) => {
                let (user, command) = (&user.name, spec.name);
                return Err(format!("NOPERM User {user} has no permissions to run the '{command}' command"));
            }
            Some(_) => {}
        }
        if self.client.transaction.is_some() && spec.outside_transactions() {
            return Err(format!("ERR {} is not allowed in a transaction", String::from_utf8_lossy(&args[0])));
        }
        if let Run::Write(_) = spec.run {
            if spec.has_long_key(args) {
                return Err(format!("ERR too large: a key has at most {KEY_BYTES_MAX} bytes"));
            }
            match host.writable(self.client.level) {
                Ok(()) | Err(Refusal::Busy) => {}
                Err(refusal) => return Err(refusal_text(&refusal)),
            }
        }
        Ok(())
    }
}
