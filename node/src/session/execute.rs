//! Executes one command of a session: queues it in a transaction, reads, writes, or parks it.

use crate::session::command::error::{answer, refusal_text};
use crate::session::command::spec::{Outcome, Run, Spec};
use crate::session::command::table::find;
use crate::session::command::transaction::{self};
use crate::session::command::view::View;
use crate::session::command::writer::Writer;
use crate::session::host::{Host, Refusal, Wait};
use crate::session::outbox::Hold;
use crate::session::parked::Parked;
use crate::session::resp::{Args, COMMAND_BYTES_MAX};

use super::KEPT_CAPACITY_BYTES_MAX;
use super::Session;
use super::guard::{Asks, Executed};

impl Session {
    pub(super) fn execute(&mut self, args: &Args<'_>, host: &mut dyn Host) -> Executed {
        if args.is_empty() {
            return Executed::Done;
        }
        self.outbox.reply.begin();
        let spec = match find(args).and_then(|spec| self.admit(spec, args, host).map(|()| spec)) {
            Ok(spec) => spec,
            Err(error) => {
                if let Some(transaction) = &mut self.client.transaction {
                    transaction.abort();
                }
                self.outbox.reply.error(error);
                self.push(Hold::Nothing, host);
                return Executed::Done;
            }
        };
        self.commands += 1;
        self.last_command = spec.name;
        self.light = if spec.is_light(args) { self.light + 1 } else { 0 };
        if let Some(transaction) = &mut self.client.transaction
            && !spec.ends_queueing(args)
        {
            match transaction.queue(spec, args) {
                Ok(()) => self.outbox.reply.simple("QUEUED"),
                Err(error) => self.outbox.reply.error(error),
            }
            self.push(Hold::Nothing, host);
            return Executed::Done;
        }
        let asks = if self.client.is_guarded() { self.asks(spec) } else { Asks::Nothing };
        if let Some(step) = self.guard(asks, host) {
            return step;
        }
        match self.run(spec, args, host) {
            Ok(hold) => {
                self.writes_until = None;
                // What was good enough before it was read may not have been when it was read: the process may have been
                // stopped in between.
                if hold.is_some()
                    && self.client.mode.is_timed()
                    && let Some(step) = self.guard(asks, host)
                {
                    return step;
                }
                if let Some(hold) = hold {
                    self.push(hold, host);
                }
                Executed::Done
            }
            Err(Refusal::Busy) => {
                self.outbox.reply.undo();
                let now = host.now();
                let until = self.client.commit_timeout.map(|timeout| *self.writes_until.get_or_insert(now + timeout));
                let over = until.is_some_and(|until| until <= now);
                if over && let Some(reason) = host.silent() {
                    self.writes_until = None;
                    if self.client.transaction.take().is_some() {
                        self.client.watched.clear();
                    }
                    self.outbox.reply.error(refusal_text(&Refusal::NoLeader(reason)));
                    self.push(Hold::Nothing, host);
                    return Executed::Done;
                }
                self.parked = Some(Parked::for_log_space(until.filter(|_| !over)));
                host.park(self.client.id, Wait::LogSpace);
                Executed::Again
            }
            Err(refusal) => {
                self.writes_until = None;
                self.outbox.reply.undo();
                self.outbox.reply.error(refusal_text(&refusal));
                self.push(Hold::Nothing, host);
                Executed::Done
            }
        }
    }

    /// Executes one command; `None` when it parked and its reply comes later.
    pub(super) fn run(&mut self, spec: &Spec, args: &Args<'_>, host: &mut dyn Host) -> Result<Option<Hold>, Refusal> {
        let reply = &mut self.outbox.reply;
        match spec.run {
            Run::Read(read) => {
                let (view, hold) = self.client.read(host);
                let executed = read(&view, args, reply);
                answer(executed, 0, reply);
                Ok(Some(hold))
            }
            Run::Write(write) => {
                self.record.clear();
                let now_ms = host.wall_clock_us() / 1000;
                let mut writer = Writer::new(View::pending(host), &mut self.record, now_ms);
                let executed = write(&mut writer, args, reply);
                answer(executed, 0, reply);
                if self.record.is_empty() {
                    return Ok(Some(self.client.observe(host)));
                }
                let committed = self.client.commit(&self.record, host).map(Some);
                if self.record.capacity() > KEPT_CAPACITY_BYTES_MAX {
                    self.record = Vec::new();
                }
                committed
            }
            Run::Exec => {
                // A transaction's record may be large, and is rare enough to be made anew.
                transaction::exec(&mut self.client, &mut Vec::new(), reply, host).map(Some)
            }
            Run::Control(control) | Run::Await(_, control) => {
                self.client.acknowledged = self.outbox.acknowledged;
                match control(&mut self.client, args, host, reply) {
                    Outcome::Done(hold) => Ok(Some(hold)),
                    Outcome::Close => {
                        self.closing = true;
                        Ok(Some(Hold::Nothing))
                    }
                    Outcome::Park(parked) => {
                        reply.undo();
                        host.park(self.client.id, parked.wait());
                        self.parked = Some(parked);
                        Ok(None)
                    }
                }
            }
        }
    }

    pub(super) fn refuse_large(&mut self, host: &mut dyn Host) {
        self.outbox.reply.begin();
        let bounds = (crate::session::resp::VALUE_BYTES_MAX, COMMAND_BYTES_MAX);
        self.outbox.reply.error(format_args!(
            "ERR too large: a key or value has at most {} bytes, a command at most {} bytes",
            bounds.0, bounds.1
        ));
        if let Some(transaction) = &mut self.client.transaction {
            transaction.abort();
        }
        self.push(Hold::Nothing, host);
    }
}
