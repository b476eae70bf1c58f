//! Commands on string values.

use walferry_applier::record::Effect;

use crate::session::reply::{Reply, decimal};
use crate::session::resp::{Args, VALUE_BYTES_MAX};

use crate::session::command::error::{CommandError, Executed, integer, wrong_arity};
use crate::session::command::view::View;
use crate::session::command::writer::Writer;

/// A number in decimal is at most this long: `i64::MIN`.
const INTEGER_BYTES_MAX: usize = 20;

/// GET key
pub fn get(view: &View<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    reply.bulk_or_null(view.string(&args[1])?.as_deref());
    Ok(())
}

/// MGET key...
pub fn mget(view: &View<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    reply.array(args.len() - 1);
    for key in args.from(1) {
        match view.string(key) {
            Ok(value) => reply.bulk_or_null(value.as_deref()),
            Err(CommandError::WrongType) => reply.null(),
            Err(error) => return Err(error),
        }
        if reply.is_over() {
            break;
        }
    }
    Ok(())
}

/// STRLEN key
pub fn strlen(view: &View<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    reply.count(view.length(&args[1])?.unwrap_or(0));
    Ok(())
}

#[derive(Default)]
struct SetOptions {
    only_new: bool,
    only_existing: bool,
    get: bool,
}

fn set_options(args: &Args<'_>) -> Result<SetOptions, CommandError> {
    let mut options = SetOptions::default();
    for option in args.from(3) {
        match &option.to_ascii_uppercase()[..] {
            b"NX" if !options.only_existing => options.only_new = true,
            b"XX" if !options.only_new => options.only_existing = true,
            b"GET" => options.get = true,
            b"EX" | b"PX" | b"EXAT" | b"PXAT" | b"KEEPTTL" => {
                return Err(CommandError::unsupported(option, "SET"));
            }
            _ => return Err(CommandError::Syntax),
        }
    }
    Ok(options)
}

/// SET key value [NX | XX] [GET]
pub fn set(writer: &mut Writer<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    let (key, value) = (&args[1], &args[2]);
    if args.len() == 3 {
        writer.emit(Effect::Put { key, value });
        reply.ok();
        return Ok(());
    }
    let options = set_options(args)?;
    let previous = if options.get { Some(writer.view().string(key)?) } else { None };
    let exists = match &previous {
        Some(value) => value.is_some(),
        None => (options.only_new || options.only_existing) && writer.view().kind(key)?.is_some(),
    };
    let set = !(options.only_new && exists || options.only_existing && !exists);
    match previous {
        Some(value) => reply.bulk_or_null(value.as_deref()),
        None if set => reply.ok(),
        None => reply.null(),
    }
    if set {
        writer.emit(Effect::Put { key, value });
    }
    Ok(())
}

/// SETNX key value
pub fn setnx(writer: &mut Writer<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    let exists = writer.view().kind(&args[1])?.is_some();
    if !exists {
        writer.emit(Effect::Put { key: &args[1], value: &args[2] });
    }
    reply.integer(i64::from(!exists));
    Ok(())
}

/// MSET key value [key value...]
pub fn mset(writer: &mut Writer<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    if args.len().is_multiple_of(2) {
        return Err(CommandError::text(wrong_arity("mset")));
    }
    let mut rest = args.from(1);
    while let (Some(key), Some(value)) = (rest.next(), rest.next()) {
        writer.emit(Effect::Put { key, value });
    }
    reply.ok();
    Ok(())
}

/// GETDEL key
pub fn getdel(writer: &mut Writer<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    let value = writer.view().string(&args[1])?;
    reply.bulk_or_null(value.as_deref());
    if value.is_some() {
        writer.emit(Effect::Delete { key: &args[1] });
    }
    Ok(())
}

/// APPEND key value
pub fn append(writer: &mut Writer<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    let length = writer.view().length(&args[1])?;
    let after = length.unwrap_or(0) + args[2].len();
    if after > VALUE_BYTES_MAX {
        return Err(CommandError::text(format!("ERR too large: a value has at most {VALUE_BYTES_MAX} bytes")));
    }
    match length {
        Some(_) if args[2].is_empty() => {}
        Some(length) => writer.append(&args[1], &args[2], length),
        None => writer.emit(Effect::Put { key: &args[1], value: &args[2] }),
    }
    reply.count(after);
    Ok(())
}

/// INCR key
pub fn incr(writer: &mut Writer<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    add(writer, &args[1], 1, reply)
}

/// DECR key
pub fn decr(writer: &mut Writer<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    add(writer, &args[1], -1, reply)
}

/// INCRBY key increment
pub fn incrby(writer: &mut Writer<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    add(writer, &args[1], integer(&args[2]).ok_or(CommandError::NotAnInteger)?, reply)
}

/// DECRBY key decrement
pub fn decrby(writer: &mut Writer<'_>, args: &Args<'_>, reply: &mut Reply) -> Executed {
    let decrement = integer(&args[2]).ok_or(CommandError::NotAnInteger)?;
    let delta = decrement.checked_neg().ok_or_else(|| CommandError::text("ERR decrement would overflow"))?;
    add(writer, &args[1], delta, reply)
}

fn add(writer: &mut Writer<'_>, key: &[u8], delta: i64, reply: &mut Reply) -> Executed {
    let view = writer.view();
    if view.length(key)?.is_some_and(|length| length > INTEGER_BYTES_MAX) {
        // Nothing is copied to find that out.
        return Err(CommandError::NotAnInteger);
    }
    let value = match view.string(key)? {
        Some(text) => integer(&text).ok_or(CommandError::NotAnInteger)?,
        None => 0,
    };
    let sum =
        value.checked_add(delta).ok_or_else(|| CommandError::text("ERR increment or decrement would overflow"))?;
    writer.emit(Effect::Put { key, value: decimal(sum, &mut [0; 20]) });
    reply.integer(sum);
    Ok(())
}
