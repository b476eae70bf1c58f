//! Commands on keys of any kind: DEL EXISTS SCAN DBSIZE.

use std::collections::HashSet;

use walferry_applier::record::Effect;

use crate::session::client::Client;
use crate::session::host::Host;
use crate::session::parked::Parked;
use crate::session::reading::Mode;
use crate::session::reply::Reply;
use crate::session::resp::Args;

use crate::session::command::error::{CommandError, Executed, integer};
use crate::session::command::glob::Glob;
use crate::session::command::replication::poll_or_park;
use crate::session::command::spec::Outcome;
use crate::session::command::view::{Kind, View};
use crate::session::command::writer::Writer;

/// SCAN looks at this many keys when no COUNT is given.
const SCAN_COUNT_DEFAULT: usize = 10;
/// SCAN looks at no more keys than this, whatever COUNT says.
const SCAN_COUNT_MAX: usize = 4096;

/// DEL key...
pub fn del(writer: &mut Writer<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    // Looked up before anything is emitted: a key given twice is deleted once.
    let mut deleted = HashSet::new();
    for key in args.from(1) {
        if !deleted.contains(key) && writer.view().kind(key)?.is_some() {
            deleted.insert(key);
        }
    }
    reply.count(deleted.len());
    for key in args.from(1) {
        if deleted.remove(key) {
            writer.emit(Effect::Delete { key });
        }
    }
    Ok(())
}

/// EXISTS key...
pub fn exists(view: &View<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    let mut count = 0;
    for key in args.from(1) {
        count += i64::from(view.kind(key)?.is_some());
    }
    reply.integer(count);
    Ok(())
}

/// DBSIZE in a transaction, where nothing waits.
pub fn dbsize_now(view: &View<'_>, _: &Args<'_>, reply: &mut Reply) -> Executed {
    let stored = view.stored_keys()?;
    match view.net_keys()?.filter(|_| stored.is_exact) {
        Some(net) => reply.count(usize::try_from(stored.keys.saturating_add_signed(net)).unwrap_or(usize::MAX)),
        None => {
            return Err(CommandError::text("ERR the keys that changed are not counted yet: ask DBSIZE before MULTI"));
        }
    }
    Ok(())
}

/// DBSIZE: waits until the keys are counted, in steps, so that nobody else has to.
pub fn dbsize(client: &mut Client, _: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let newest = if client.mode == Mode::Strong { host.log_end() } else { client.seen.lsn };
    poll_or_park(Parked::for_count(newest, host), client, host, reply)
}

struct ScanOptions<'a> {
    pattern: Option<Glob>,
    kind: Option<&'a [u8]>,
    count: usize,
}

fn scan_options<'a>(args: &Args<'a>) -> Result<ScanOptions<'a>, CommandError> {
    let mut options = ScanOptions { pattern: None, kind: None, count: SCAN_COUNT_DEFAULT };
    let mut rest = args.from(2);
    while let Some(option) = rest.next() {
        let value = rest.next();
        match (&option.to_ascii_uppercase()[..], value) {
            (b"MATCH", Some(pattern)) => options.pattern = Some(Glob::new(pattern)?),
            (b"TYPE", Some(kind)) => options.kind = Some(kind),
            (b"COUNT", Some(count)) => match integer(count).ok_or(CommandError::NotAnInteger)? {
                count @ 1.. => options.count = usize::try_from(count).unwrap_or(usize::MAX).min(SCAN_COUNT_MAX),
                _ => return Err(CommandError::Syntax),
            },
            _ => return Err(CommandError::Syntax),
        }
    }
    Ok(options)
}

/// SCAN cursor [MATCH pattern] [COUNT count] [TYPE type]
pub fn scan(view: &View<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    let cursor = std::str::from_utf8(&args[1]).ok().and_then(|text| text.parse::<u64>().ok());
    let cursor = cursor.ok_or_else(|| CommandError::text("ERR invalid cursor"))?;
    let options = scan_options(args)?;
    let (next, mut keys) = view.scan(cursor, options.count)?;
    if let Some(pattern) = options.pattern {
        keys.retain(|key| pattern.matches(key));
    }
    if let Some(wanted) = options.kind {
        let mut kept = Vec::new();
        for key in keys {
            let name = match view.kind(&key)? {
                Some(Kind::String) => &b"string"[..],
                Some(Kind::Stream) => b"stream",
                None => continue,
            };
            if name.eq_ignore_ascii_case(wanted) {
                kept.push(key);
            }
        }
        keys = kept;
    }
    reply.array(2);
    reply.text(next);
    reply.array(keys.len());
    for key in &keys {
        reply.bulk(key);
    }
    Ok(())
}
