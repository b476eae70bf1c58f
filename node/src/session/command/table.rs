//! The table of commands: the one place that names them all. COMMAND tells what stands here.

use crate::session::command::error::wrong_arity;
use crate::session::command::spec::{ARGS_MAX, Control, ONE, Run, Spec};
use crate::session::command::{connection, keys, reading, replication, server, stream, string, transaction, xread};
use crate::session::resp::{Args, KEY_BYTES_MAX};

const NONE: (i32, i32, i32) = (0, 0, 0);
const ALL: (i32, i32, i32) = (1, -1, 1);
const READ: &[&str] = &["readonly", "fast"];
const READ_SLOW: &[&str] = &["readonly"];
const WRITE: &[&str] = &["write", "denyoom", "fast"];
const CONNECTION: &[&str] = &["noscript", "loading", "stale", "fast"];
const OPEN: &[&str] = &["noscript", "loading", "stale", "fast", "no_auth", "no_multi"];
const BLOCKING: &[&str] = &["blocking", "noscript", "no_multi"];
const BLOCKING_ADMIN: &[&str] = &["admin", "blocking", "noscript", "no_multi"];
const CONNECTION_RESET: &[&str] = &["noscript", "loading", "stale", "fast", "no_auth"];
const OWN: &[&str] = &["loading", "stale", "fast"];
const OWN_ALONE: &[&str] = &["loading", "stale", "fast", "no_multi"];
const OWN_SINCE: &str = "0.1.0";

type Keys = (i32, i32, i32);
type Flags = &'static [&'static str];

const fn string(name: &'static str, arity: i32, flags: Flags, keys: Keys, run: Run, summary: &'static str) -> Spec {
    Spec { name, arity, flags, keys, group: "string", since: "1.0.0", summary, run }
}

const fn generic(name: &'static str, arity: i32, flags: Flags, keys: Keys, run: Run, summary: &'static str) -> Spec {
    Spec { name, arity, flags, keys, group: "generic", since: "1.0.0", summary, run }
}

const fn stream(name: &'static str, arity: i32, flags: Flags, run: Run, summary: &'static str) -> Spec {
    Spec { name, arity, flags, keys: ONE, group: "stream", since: "5.0.0", summary, run }
}

const fn control(
    name: &'static str,
    arity: i32,
    flags: Flags,
    group: &'static str,
    run: Control,
    summary: &'static str,
) -> Spec {
    Spec { name, arity, flags, keys: NONE, group, since: "1.0.0", summary, run: Run::Control(run) }
}

const fn own(name: &'static str, arity: i32, flags: Flags, run: Control, summary: &'static str) -> Spec {
    Spec { name, arity, flags, keys: NONE, group: "walferry", since: OWN_SINCE, summary, run: Run::Control(run) }
}

/// Every command; looked through in this order, so the most frequent stand first.
pub static COMMANDS: &[Spec] = &[
    string("set", -3, WRITE, ONE, Run::Write(string::set), "Sets the string value of a key"),
    string("get", 2, READ, ONE, Run::Read(string::get), "Returns the string value of a key"),
    string("incr", 2, WRITE, ONE, Run::Write(string::incr), "Increments the integer value of a key by one"),
    string("incrby", 3, WRITE, ONE, Run::Write(string::incrby), "Increments the integer value of a key by a number"),
    string("mset", -3, WRITE, (1, -1, 2), Run::Write(string::mset), "Sets the string values of keys, all or none"),
    string("mget", -2, READ, ALL, Run::Read(string::mget), "Returns the string values of keys"),
    stream("xadd", -5, WRITE, Run::Write(stream::xadd), "Appends an entry to a stream"),
    Spec {
        name: "exec",
        arity: 1,
        flags: &["noscript", "loading", "stale", "skip_slowlog"],
        keys: NONE,
        group: "transactions",
        since: "1.2.0",
        summary: "Executes the commands of a transaction as one record",
        run: Run::Exec,
    },
    control("multi", 1, CONNECTION, "transactions", transaction::multi, "Starts a transaction"),
    own("waterfall", -1, OWN, replication::waterfall, "Tells where commits spend their time, as JSON"),
    string("append", 3, WRITE, ONE, Run::Write(string::append), "Appends to the string value of a key"),
    string("decr", 2, WRITE, ONE, Run::Write(string::decr), "Decrements the integer value of a key by one"),
    string("decrby", 3, WRITE, ONE, Run::Write(string::decrby), "Decrements the integer value of a key by a number"),
    string(
        "getdel",
        2,
        WRITE,
        ONE,
        Run::Write(string::getdel),
        "Returns the string value of a key and deletes the key",
    ),
    string("setnx", 3, WRITE, ONE, Run::Write(string::setnx), "Sets the string value of a key that does not exist"),
    string("strlen", 2, READ, ONE, Run::Read(string::strlen), "Returns the length of a string value"),
    generic("del", -2, &["write"], ALL, Run::Write(keys::del), "Deletes keys"),
    generic("exists", -2, READ, ALL, Run::Read(keys::exists), "Counts how many of the keys exist"),
    generic("scan", -2, READ_SLOW, NONE, Run::Read(keys::scan), "Iterates over the keys"),
    stream("xlen", 2, READ, Run::Read(stream::xlen), "Returns the number of entries of a stream"),
    stream("xrange", -4, READ_SLOW, Run::Read(stream::xrange), "Returns the entries of a stream between two ids"),
    stream("xrevrange", -4, READ_SLOW, Run::Read(stream::xrevrange), "Returns entries of a stream, the newest first"),
    Spec {
        name: "xread",
        arity: -4,
        flags: &["readonly", "blocking", "movablekeys"],
        keys: NONE,
        group: "stream",
        since: "5.0.0",
        summary: "Returns the entries of streams after given ids, or awaits them",
        run: Run::Await(stream::xread_now, xread::xread),
    },
    control("discard", 1, CONNECTION, "transactions", transaction::discard, "Forgets the transaction"),
    control(
        "watch",
        -2,
        CONNECTION,
        "transactions",
        transaction::watch,
        "Makes EXEC depend on keys staying as they are",
    ),
    control("unwatch", 1, CONNECTION, "transactions", transaction::unwatch, "Forgets the watched keys"),
    control("ping", -1, CONNECTION, "connection", connection::ping, "Answers PONG"),
    control("echo", 2, CONNECTION, "connection", connection::echo, "Returns its argument"),
    control("hello", -1, OPEN, "connection", connection::hello, "Chooses the protocol and authenticates"),
    control("auth", -2, OPEN, "connection", connection::auth, "Authenticates the connection"),
    control("acl", -2, CONNECTION, "server", connection::acl, "Tells of the users, and reads their file again"),
    control("quit", -1, CONNECTION_RESET, "connection", connection::quit, "Closes the connection"),
    control(
        "reset",
        1,
        CONNECTION_RESET,
        "connection",
        connection::reset,
        "Makes the connection as it was at its start",
    ),
    control("select", 2, CONNECTION, "connection", connection::select, "Selects database 0, the only one"),
    control("client", -2, CONNECTION, "connection", connection::client, "Names and identifies the connection"),
    control("command", -1, CONNECTION, "server", server::command, "Tells of the commands"),
    control(
        "config",
        -2,
        &["admin", "noscript", "loading", "stale"],
        "server",
        server::config,
        "Tells the configuration",
    ),
    control("info", -1, CONNECTION, "server", server::info, "Tells of the node"),
    control("role", 1, CONNECTION, "server", server::role, "Tells the node's part in replication"),
    Spec {
        name: "dbsize",
        arity: 1,
        flags: READ,
        keys: NONE,
        group: "server",
        since: "1.0.0",
        summary: "Returns the number of keys",
        run: Run::Await(keys::dbsize_now, keys::dbsize),
    },
    control("time", 1, CONNECTION, "server", server::time, "Returns the node's clock"),
    control("wait", 3, BLOCKING, "generic", replication::wait, "Awaits replicas that have applied the last commit"),
    control("waitaof", 4, BLOCKING, "generic", replication::waitaof, "Awaits the last commit being durable"),
    own("commitlevel", -1, OWN, replication::commitlevel, "Tells or sets the session's commit level"),
    own("committimeout", -1, OWN, replication::committimeout, "Tells or sets the session's commit timeout, ms"),
    own("commitinfo", 1, OWN, replication::commitinfo, "Tells the evidence behind the last acknowledgement"),
    own("lsn", 1, OWN, replication::lsn, "Returns the LSN of the session's last commit"),
    own(
        "session",
        -1,
        OWN_ALONE,
        reading::session,
        "Tells or takes the token of what the session has written and read",
    ),
    own("read", -1, OWN_ALONE, reading::read, "Tells or sets how good the state has to be that the session reads"),
    own("waitlsn", 3, BLOCKING, replication::waitlsn, "Awaits an LSN being applied here"),
    own("replication", 1, OWN, replication::replication, "Tells of the replicas, as pg_stat_replication"),
    own("slot", -2, OWN_ALONE, replication::slot, "Tells of the slots that hold log for replicas, or drops one"),
    own("leader", 1, OWN, replication::leader, "Tells where clients write"),
    own(
        "describe",
        1,
        OWN,
        replication::describe,
        "Tells leader, replicas, in-sync set, epoch, policy and lag as JSON",
    ),
    own("join", -2, BLOCKING_ADMIN, replication::join, "Makes a node a member of the cluster"),
    own("remove", 2, BLOCKING_ADMIN, replication::remove, "Does without a member of the cluster"),
    own(
        "switchover",
        -1,
        &["admin", "no_multi"],
        replication::switchover,
        "Makes another member the leader, without loss",
    ),
    own("promote", -1, &["admin", "no_multi"], replication::promote, "Makes this replica the leader"),
];

/// The command that `args` call, if it is known and has as many arguments as it takes.
pub fn find(args: &Args<'_>) -> Result<&'static Spec, String> {
    let name = &args[0];
    let Some(spec) = lookup(name) else {
        let shown = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(128)]).into_owned();
        let mut beginning = String::new();
        for arg in args.from(1) {
            if beginning.len() >= 128 {
                break;
            }
            beginning.push_str(&format!("'{}' ", shown(arg)));
        }
        return Err(format!("ERR unknown command '{}', with args beginning with: {beginning}", shown(name)));
    };
    let enough = match spec.arity {
        exact @ 0.. => args.len() == exact as usize,
        at_least => args.len() >= at_least.unsigned_abs() as usize,
    };
    if !enough {
        return Err(wrong_arity(spec.name));
    }
    if args.len() > ARGS_MAX && args.len() > spec.args_max() {
        let most = spec.args_max() - 1;
        return Err(format!("ERR too many arguments for '{}' command: it takes at most {most}", spec.name));
    }
    if spec.has_long_argument(args) {
        return Err(format!("ERR too large: an argument of '{}' has at most {KEY_BYTES_MAX} bytes", spec.name));
    }
    Ok(spec)
}

/// The command of this name in any case.
pub fn lookup(name: &[u8]) -> Option<&'static Spec> {
    COMMANDS.iter().find(|spec| spec.name.as_bytes().eq_ignore_ascii_case(name))
}
