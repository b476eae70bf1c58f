//! MULTI EXEC DISCARD WATCH UNWATCH. A transaction is executed in one go against one view and becomes one record: all of it is
//! in the log, or nothing. As with redis-server, a command that fails when it is executed does not undo the others.

use walferry_engine::mutants;

use crate::session::client::Client;
use crate::session::command::spec::{Outcome, Run, Transaction, WATCHED_KEYS_MAX, Watched};
use crate::session::host::{Host, Refusal};
use crate::session::outbox::Hold;
use crate::session::reading::{Fate, Position, fate};
use crate::session::reply::Reply;
use crate::session::resp::Args;

use crate::session::command::error::{CommandError, answer, refusal_text};
use crate::session::command::view::{Overlay, View};
use crate::session::command::writer::Writer;

/// The values that the appends of one transaction go on from are together no longer than this: every node writes all of them anew with
/// its next checkpoint, and a replica cannot refuse what the leader has logged.
pub const APPENDED_TO_BYTES_MAX: usize = 128 << 20;
/// MULTI
pub fn multi(client: &mut Client, _: &Args<'_>, _: &mut dyn Host, reply: &mut Reply) -> Outcome {
    if client.transaction.is_some() {
        reply.error("ERR MULTI calls can not be nested");
    } else {
        client.transaction = Some(Transaction::default());
        reply.ok();
    }
    Outcome::DONE
}

/// DISCARD
pub fn discard(client: &mut Client, _: &Args<'_>, _: &mut dyn Host, reply: &mut Reply) -> Outcome {
    if client.transaction.take().is_some() {
        client.watched.clear();
        reply.ok();
    } else {
        reply.error("ERR DISCARD without MULTI");
    }
    Outcome::DONE
}

/// WATCH key...
pub fn watch(client: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    if client.transaction.is_some() {
        reply.error("ERR WATCH inside MULTI is not allowed");
        return Outcome::DONE;
    }
    // What is watched is the newest state, durable or not: the session's reads must not be older, or it would decide by a
    // value that EXEC cannot tell from the newest. The reply tells nothing, so it is not held.
    let _ = client.observe(host);
    let newest = if host.pending().is_empty() { host.applied() } else { host.log_end() };
    let since = Position::at(newest, host.history());
    for key in args.from(1) {
        if client.watched.contains_key(key) {
            continue;
        }
        if client.watched.len() >= WATCHED_KEYS_MAX {
            reply.error(format_args!("ERR a session watches at most {WATCHED_KEYS_MAX} keys"));
            return Outcome::DONE;
        }
        client.watched.insert(key.to_vec(), since);
    }
    reply.ok();
    Outcome::DONE
}

/// UNWATCH
pub fn unwatch(client: &mut Client, _: &Args<'_>, _: &mut dyn Host, reply: &mut Reply) -> Outcome {
    client.watched.clear();
    reply.ok();
    Outcome::DONE
}

/// Whether no commit behind the states in which the keys were watched changed one. A failover may have taken such a state back:
/// then LSNs up to it were used again. A key that was absent then and is absent now may have been there in between.
fn is_unchanged(watched: &Watched, host: &dyn Host) -> Result<bool, CommandError> {
    let view = View::pending(host);
    for (key, since) in watched {
        let kept = fate(*since, host.history()) == Fate::Kept || mutants::is_on("watch-by-lsn");
        if !kept || view.version(key)? > since.lsn {
            return Ok(false);
        }
    }
    Ok(true)
}

/// EXEC. On `Refusal::Busy` the transaction is as it was, to be tried again.
pub fn exec(
    client: &mut Client,
    record: &mut Vec<u8>,
    reply: &mut Reply,
    host: &mut dyn Host,
) -> Result<Hold, Refusal> {
    let Some(transaction) = client.transaction.take() else {
        reply.error("ERR EXEC without MULTI");
        return Ok(Hold::Nothing);
    };
    let watched = std::mem::take(&mut client.watched);
    if transaction.aborted {
        reply.error("EXECABORT Transaction discarded because of previous errors.");
        return Ok(Hold::Nothing);
    }
    match is_unchanged(&watched, host) {
        Ok(true) => {}
        Ok(false) => {
            reply.null_array();
            return Ok(client.observe(host));
        }
        Err(error) => {
            reply.error(format_args!("EXECABORT Transaction discarded because of: {error}"));
            return Ok(Hold::Nothing);
        }
    }
    match execute(client, &transaction, record, reply, host) {
        Ok(hold) => Ok(hold),
        Err(Refusal::Busy) => {
            (client.transaction, client.watched) = (Some(transaction), watched);
            Err(Refusal::Busy)
        }
        Err(refusal) => {
            reply.undo();
            reply.error(format_args!("EXECABORT Transaction discarded because of: {}", refusal_text(&refusal)));
            Ok(Hold::Nothing)
        }
    }
}

fn execute(
    client: &mut Client,
    transaction: &Transaction,
    record: &mut Vec<u8>,
    reply: &mut Reply,
    host: &mut dyn Host,
) -> Result<Hold, Refusal> {
    let writes = transaction.writes();
    if writes {
        host.writable(client.level)?;
    }
    let (newest, hold) = match writes {
        true => (true, Hold::Nothing),
        false => {
            let (view, hold) = client.read(host);
            (view.is_newest(), hold)
        }
    };
    if transaction.commands.iter().any(|queued| queued.spec.name == "dbsize") {
        // As far as one step goes: DBSIZE says so when that is not enough.
        let _ = host.count_keys();
    }
    let mut overlay = Overlay::default();
    let mut appended_to = 0;
    reply.array(transaction.commands.len());
    for queued in &transaction.commands {
        let args = Args::new(&transaction.bytes, &transaction.ranges[queued.args.clone()]);
        let from = reply.written();
        let base = if newest { View::pending(host) } else { View::durable(host) };
        match queued.spec.run {
            Run::Read(read) | Run::Await(read, _) => answer(read(&base.with(&overlay), &args, reply), from, reply),
            Run::Write(write) => {
                let now_ms = host.wall_clock_us() / 1000;
                let mut writer = Writer::in_transaction(base, record, &mut overlay, now_ms);
                let executed = write(&mut writer, &args, reply);
                answer(executed, from, reply);
                appended_to += writer.appended_to();
            }
            Run::Control(control) => {
                if let Outcome::Park(_) = control(client, &args, host, reply) {
                    reply.undo_to(from);
                    reply.error(format_args!("ERR {} cannot wait in a transaction", queued.spec.name.to_uppercase()));
                }
            }
            Run::Exec => unreachable!("EXEC is never queued"),
        }
        if appended_to > APPENDED_TO_BYTES_MAX {
            return Err(Refusal::TooLarge(format!(
                "its APPENDs go on from values of more than {} MiB together, which every node would have to write anew: append to \
                 fewer large values in one transaction",
                APPENDED_TO_BYTES_MAX >> 20
            )));
        }
        if reply.is_over() {
            return Err(Refusal::TooLarge("the replies of the transaction are too large".to_owned()));
        }
    }
    if !record.is_empty() {
        return client.commit(record, host);
    }
    Ok(if writes { client.observe(host) } else { hold })
}
