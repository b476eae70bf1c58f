//! Commands on streams: XADD XLEN XRANGE XREVRANGE XREAD.

use std::time::Duration;

use walferry_applier::record::Effect;
use walferry_applier::store::overlay::hash_of;

use crate::session::reply::{Reply, digits};
use crate::session::resp::Args;

use crate::session::command::error::{CommandError, Executed, integer, timeout, wrong_arity};
use crate::session::command::view::{Id, View, encode_fields, fields};
use crate::session::command::writer::Writer;

/// Streams of one XREAD at most.
pub const XREAD_STREAMS_MAX: usize = 1 << 10;
const ID_MIN: Id = (0, 0);
const ID_MAX: Id = (u64::MAX, u64::MAX);
/// Entries of one XRANGE or XREVRANGE at most.
pub const ENTRIES_MAX: usize = 128 << 10;
/// An XREAD ends with this many entries, or bytes of them: what is left comes with the next one.
const XREAD_ENTRIES_MAX: usize = 32 << 10;
const XREAD_BYTES_MAX: usize = 16 << 20;
/// What a stream that is waited for takes besides its key: in the request, and where the node finds who waits for it.
const STREAM_BYTES: usize = 256;
/// Options of redis-server's XADD that this server does not have.
const XADD_UNSUPPORTED: [&[u8]; 4] = [b"NOMKSTREAM", b"MAXLEN", b"MINID", b"LIMIT"];

fn invalid_id() -> CommandError {
    CommandError::text("ERR Invalid stream ID specified as stream command argument")
}

fn number(text: &[u8]) -> Option<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    digits.then(|| std::str::from_utf8(text).ok()?.parse().ok()).flatten()
}

/// `ms-seq`, or `ms` alone with `missing_seq`.
fn parse_id(text: &[u8], missing_seq: u64) -> Result<Id, CommandError> {
    let parsed = match text.iter().position(|&byte| byte == b'-') {
        Some(dash) => number(&text[..dash]).zip(number(&text[dash + 1..])),
        None => number(text).map(|ms| (ms, missing_seq)),
    };
    parsed.ok_or_else(invalid_id)
}

fn next_id(id: Id) -> Option<Id> {
    match id {
        (ms, seq) if seq < u64::MAX => Some((ms, seq + 1)),
        (ms, _) => ms.checked_add(1).map(|ms| (ms, 0)),
    }
}

fn previous_id(id: Id) -> Option<Id> {
    match id {
        (ms, seq) if seq > 0 => Some((ms, seq - 1)),
        (ms, _) => ms.checked_sub(1).map(|ms| (ms, u64::MAX)),
    }
}

/// The id text of an XADD: how much of it is ours to choose.
enum NewId {
    Auto,
    AutoSeq(u64),
    Given(Id),
}

fn parse_new_id(text: &[u8]) -> Result<NewId, CommandError> {
    if text == b"*" {
        return Ok(NewId::Auto);
    }
    if let Some(ms) = text.strip_suffix(b"-*") {
        return number(ms).map(NewId::AutoSeq).ok_or_else(invalid_id);
    }
    match parse_id(text, 0)? {
        ID_MIN => Err(CommandError::text("ERR The ID specified in XADD must be greater than 0-0")),
        id => Ok(NewId::Given(id)),
    }
}

fn choose_id(wanted: NewId, last: Id, now_ms: u64) -> Result<Id, CommandError> {
    if last == ID_MAX {
        return Err(CommandError::text("ERR The stream has exhausted the last possible ID, unable to add more items"));
    }
    let chosen = match wanted {
        NewId::Auto if now_ms > last.0 => Some((now_ms, 0)),
        NewId::Auto => next_id(last),
        NewId::AutoSeq(ms) if ms == last.0 => last.1.checked_add(1).map(|seq| (ms, seq)),
        NewId::AutoSeq(ms) => Some((ms, 0)),
        NewId::Given(id) => Some(id),
    };
    chosen.filter(|id| *id > last).ok_or_else(|| {
        CommandError::text("ERR The ID specified in XADD is equal or smaller than the target stream top item")
    })
}

/// XADD key id field value [field value...]
pub fn xadd(writer: &mut Writer<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    if XADD_UNSUPPORTED.iter().any(|option| args[2].eq_ignore_ascii_case(option)) {
        return Err(CommandError::unsupported(&args[2], "XADD"));
    }
    if args.len().is_multiple_of(2) {
        return Err(CommandError::text(wrong_arity("xadd")));
    }
    let wanted = parse_new_id(&args[2])?;
    let key = &args[1];
    let last = writer.view().stream(key)?.map_or(ID_MIN, |stream| stream.last_id);
    let id = choose_id(wanted, last, writer.now_ms())?;
    let encoded = encode_fields(args.from(3));
    writer.emit(Effect::StreamAdd { key, id, fields: &encoded });
    write_id(id, reply);
    Ok(())
}

/// XLEN key
pub fn xlen(view: &View<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    reply.integer(view.stream(&args[1])?.map_or(0, |stream| stream.entries as i64));
    Ok(())
}

fn write_id(id: Id, reply: &mut Reply) {
    let (mut ms, mut seq) = ([0; 20], [0; 20]);
    let (ms, seq) = (digits(id.0, &mut ms), digits(id.1, &mut seq));
    let mut text = [0; 41];
    text[..ms.len()].copy_from_slice(ms);
    text[ms.len()] = b'-';
    let length = ms.len() + 1 + seq.len();
    text[ms.len() + 1..length].copy_from_slice(seq);
    reply.bulk(&text[..length]);
}

/// What of a stream is wanted.
#[derive(Clone, Copy)]
struct Part {
    span: (Id, Id),
    reverse: bool,
    pub(super) limit: usize,
    /// Bytes with which it ends, complete or not.
    bytes_max: usize,
}

/// Entries as an array; how many, and with none nothing is written.
fn write_entries(view: &View<'_>, key: &[u8], part: Part, reply: &mut Reply) -> Result<usize, CommandError> {
    let mut count = 0;
    let mut entries = reply.scratch();
    view.range(key, part.span, part.reverse, part.limit, &mut |id, encoded| {
        count += 1;
        entries.array(2);
        write_id(id, &mut entries);
        entries.array(fields(encoded).count());
        for field in fields(encoded) {
            entries.bulk(field);
        }
        !entries.is_over() && entries.buffered() < part.bytes_max
    })?;
    if count > 0 {
        reply.array(count);
        reply.append(entries);
    }
    Ok(count)
}

/// XRANGE key start end [COUNT count]
pub fn xrange(view: &View<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    range(view, args, (&args[2], &args[3]), false, reply)
}

/// XREVRANGE key end start [COUNT count]
pub fn xrevrange(view: &View<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    range(view, args, (&args[3], &args[2]), true, reply)
}

/// One end of an interval: `-`, `+`, an id, or `(id` for one that is not part of it.
fn bound(text: &[u8], is_start: bool) -> Result<Id, CommandError> {
    let missing_seq = if is_start { 0 } else { u64::MAX };
    match text {
        b"-" => Ok(ID_MIN),
        b"+" => Ok(ID_MAX),
        [b'(', id @ ..] => {
            let id = parse_id(id, missing_seq)?;
            let (next, end) = if is_start { (next_id(id), "start") } else { (previous_id(id), "end") };
            next.ok_or_else(|| CommandError::text(format!("ERR invalid {end} ID for the interval")))
        }
        id => parse_id(id, missing_seq),
    }
}

fn range(view: &View<'_>, args: &Args<'_>, (start, end): (&[u8], &[u8]), reverse: bool, reply: &mut Reply) -> Executed {
    let (from, to) = (bound(start, true)?, bound(end, false)?);
    let limit = match (args.get(4), args.get(5), args.len()) {
        (None, _, _) => usize::MAX,
        (Some(option), Some(count), 6) if option.eq_ignore_ascii_case(b"COUNT") => {
            usize::try_from(integer(count).ok_or(CommandError::NotAnInteger)?).unwrap_or(0)
        }
        _ => return Err(CommandError::Syntax),
    };
    if view.stream(&args[1])?.is_none() {
        reply.array(0);
        return Ok(());
    }
    if limit == 0 {
        reply.null_array();
        return Ok(());
    }
    let bounded = limit.min(ENTRIES_MAX + 1);
    let part = Part { span: (from, to), reverse, limit: bounded, bytes_max: usize::MAX };
    let count = if from > to { 0 } else { write_entries(view, &args[1], part, reply)? };
    if count > ENTRIES_MAX {
        return Err(CommandError::text(format!(
            "ERR the reply would have more than {ENTRIES_MAX} entries: ask for less (COUNT)"
        )));
    }
    if count == 0 {
        reply.array(0);
    }
    Ok(())
}

/// What an XREAD asks for, its `$` already resolved.
#[derive(Debug)]
pub struct ReadRequest {
    pub(super) streams: Vec<(Vec<u8>, Id)>,
    pub(super) limit: usize,
    pub(super) block: Option<Duration>,
}

impl ReadRequest {
    /// Reads the arguments; `None` when the reply says what is wrong with them.
    pub fn parse(view: &View<'_>, args: &Args<'_>, reply: &mut Reply) -> Result<Option<ReadRequest>, CommandError> {
        let mut request = ReadRequest { streams: Vec::new(), limit: usize::MAX, block: None };
        let mut at = 1;
        loop {
            let option = args.get(at).ok_or(CommandError::Syntax)?;
            match (&option.to_ascii_uppercase()[..], args.get(at + 1)) {
                (b"STREAMS", Some(_)) => break,
                (b"COUNT", Some(count)) => {
                    let count = integer(count).ok_or(CommandError::NotAnInteger)?;
                    request.limit = if count <= 0 { usize::MAX } else { count as usize };
                }
                (b"BLOCK", Some(text)) => match timeout(text, reply) {
                    Some(timeout) => request.block = Some(timeout),
                    None => return Ok(None),
                },
                (b"GROUP" | b"NOACK", _) => return Err(CommandError::unsupported(option, "XREAD")),
                _ => return Err(CommandError::Syntax),
            }
            at += 2;
        }
        let first = at + 1;
        let count = args.len() - first;
        if !count.is_multiple_of(2) {
            return Err(CommandError::text(
                "ERR Unbalanced XREAD list of streams: for each stream key an ID or '$' must be specified.",
            ));
        }
        if count / 2 > XREAD_STREAMS_MAX {
            return Err(CommandError::text(format!("ERR XREAD takes at most {XREAD_STREAMS_MAX} streams")));
        }
        for index in first..first + count / 2 {
            let (key, id) = (&args[index], &args[index + count / 2]);
            let stream = view.stream(key)?;
            let after = match id {
                b"$" => stream.map_or(ID_MIN, |stream| stream.last_id),
                b">" => {
                    return Err(CommandError::text(
                        "ERR The > ID can be specified only when calling XREADGROUP using the GROUP <group> <consumer> option.",
                    ));
                }
                id => parse_id(id, 0)?,
            };
            request.streams.push((key.to_vec(), after));
        }
        Ok(Some(request))
    }

    /// What is waited for: the hash of each stream's key, and the id that a new entry is behind.
    pub fn awaited(&self) -> impl Iterator<Item = (u64, Id)> {
        self.streams.iter().map(|(key, after)| (hash_of(key), *after))
    }

    /// The memory that it takes while it is waited for.
    pub fn kept_bytes(&self) -> usize {
        self.streams.iter().map(|(key, _)| key.len() + STREAM_BYTES).sum()
    }

    /// Writes what there is; false (and nothing written) when there is nothing.
    pub fn read(&self, view: &View<'_>, reply: &mut Reply) -> Result<bool, CommandError> {
        let (mut count, mut entries_left) = (0, XREAD_ENTRIES_MAX);
        let mut streams = reply.scratch();
        for (key, after) in &self.streams {
            let bytes_left = XREAD_BYTES_MAX.saturating_sub(streams.buffered());
            if entries_left == 0 || bytes_left == 0 {
                break;
            }
            let Some(from) = next_id(*after) else {
                continue;
            };
            // Cheaper than to look for entries, and what most of many streams answer.
            match view.stream(key) {
                Ok(Some(stream)) if stream.last_id > *after => {}
                Ok(_) | Err(CommandError::WrongType) => continue,
                Err(error) => return Err(error),
            }
            let limit = self.limit.min(entries_left);
            let part = Part { span: (from, ID_MAX), reverse: false, limit, bytes_max: bytes_left };
            let mut entries = streams.scratch();
            let written = write_entries(view, key, part, &mut entries)?;
            if written > 0 {
                entries_left -= written;
                count += 1;
                if !reply.resp3 {
                    streams.array(2);
                }
                streams.bulk(key);
                streams.append(entries);
            }
        }
        if count > 0 {
            if reply.resp3 {
                reply.map(count)
            } else {
                reply.array(count)
            }
            reply.append(streams);
        }
        Ok(count > 0)
    }
}

/// XREAD [COUNT count] [BLOCK ms] STREAMS key... id...: in a transaction, where nothing waits.
pub fn xread_now(view: &View<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    if let Some(request) = ReadRequest::parse(view, args, reply)?
        && !request.read(view, reply)?
    {
        reply.null_array();
    }
    Ok(())
}
