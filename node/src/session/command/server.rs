//! Commands about the node: INFO ROLE CONFIG COMMAND TIME, in redis-server's shapes.

use std::fmt::Write;

use crate::session::client::Client;
use crate::session::host::{Following, Host, InfoSection, NodeFacts, ReplicationRow};
use crate::session::reply::Reply;
use crate::session::resp::Args;
use crate::watchdog::Turns;

use crate::session::command::connection::{REDIS_VERSION, unknown_subcommand};
use crate::session::command::error::wrong_arity;
use crate::session::command::glob::Glob;
use crate::session::command::spec::{Outcome, Spec};
use crate::session::command::table::{COMMANDS, lookup};

/// What INFO tells in place of a number that is not known, as redis-server does.
const UNKNOWN: i64 = -1;

/// TIME
pub fn time(_: &mut Client, _: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let now_us = host.wall_clock_us();
    reply.array(2);
    reply.text(now_us / 1_000_000);
    reply.text(now_us % 1_000_000);
    Outcome::DONE
}

/// CONFIG GET pattern...
pub fn config(_: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    if !args[1].eq_ignore_ascii_case(b"GET") {
        unknown_subcommand("CONFIG", &args[1], reply);
        return Outcome::DONE;
    }
    if args.len() < 3 {
        reply.error(wrong_arity("config|get"));
        return Outcome::DONE;
    }
    // What redis-server's tools ask for before they start: no snapshots, and every write goes to the log.
    let mut all: Vec<(String, String)> =
        [("save", ""), ("appendonly", "yes"), ("appendfsync", "always"), ("databases", "1"), ("maxmemory", "0")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
    all.extend(host.config());
    let patterns: Result<Vec<Glob>, _> = args.from(2).map(|pattern| Glob::new(&pattern.to_ascii_lowercase())).collect();
    match patterns {
        Ok(patterns) => all.retain(|(key, _)| patterns.iter().any(|pattern| pattern.matches(key.as_bytes()))),
        Err(error) => {
            reply.error(error);
            return Outcome::DONE;
        }
    }
    reply.map(all.len());
    for (key, value) in &all {
        reply.bulk(key.as_bytes());
        reply.bulk(value.as_bytes());
    }
    Outcome::DONE
}

/// ROLE: redis-server's elements, then the node's LSNs.
pub fn role(_: &mut Client, _: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let facts = host.facts();
    match &facts.following {
        None => {
            let rows = connected(host);
            reply.array(4);
            reply.bulk(b"master");
            reply.integer(facts.flushed.0 as i64);
            reply.array(rows.len());
            for row in &rows {
                let (ip, port) = split_address(&row.address);
                reply.array(3);
                reply.text(ip);
                reply.text(port);
                reply.text(row.applied.0);
            }
        }
        Some(leader) => {
            reply.array(6);
            reply.bulk(b"slave");
            reply.text(&leader.host);
            reply.integer(i64::from(leader.port));
            reply.text(match (leader.connected, leader.streaming) {
                (true, true) => "connected",
                (true, false) => "sync",
                (false, _) => "connect",
            });
            reply.integer(facts.applied.0 as i64);
        }
    }
    let lsns = lsns(&facts);
    reply.map(lsns.len());
    for (name, lsn) in lsns {
        reply.text(name);
        reply.text(lsn);
    }
    Outcome::DONE
}

fn lsns(facts: &NodeFacts) -> [(&'static str, walferry_engine::lsn::Lsn); 4] {
    [
        ("written_lsn", facts.written),
        ("flushed_lsn", facts.flushed),
        ("applied_lsn", facts.applied),
        ("committed_lsn", facts.committed),
    ]
}

fn split_address(address: &str) -> (&str, &str) {
    address.rsplit_once(':').unwrap_or((address, "0"))
}

/// INFO [section...]
pub fn info(_: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let everything =
        |section: &[u8]| [&b"all"[..], b"default", b"everything"].iter().any(|word| section.eq_ignore_ascii_case(word));
    let whole = args.len() == 1 || args.from(1).any(everything);
    let wanted = |title: &str| whole || args.from(1).any(|wanted| wanted.eq_ignore_ascii_case(title.as_bytes()));
    let mut text = String::new();
    let mut sections = sections(host);
    if wanted("Keyspace") {
        sections.push(("Keyspace", keyspace(host)));
    }
    for (title, lines) in sections {
        if !wanted(title) {
            continue;
        }
        let separator = if text.is_empty() { "" } else { "\r\n" };
        let _ = write!(text, "{separator}# {title}\r\n");
        for (key, value) in lines {
            let _ = write!(text, "{key}:{value}\r\n");
        }
    }
    reply.verbatim(&text);
    Outcome::DONE
}

fn sections(host: &dyn Host) -> Vec<InfoSection> {
    let facts = host.facts();
    let line = |key: &str, value: &dyn std::fmt::Display| (key.to_owned(), value.to_string());
    let mut sections = vec![
        (
            "Server",
            vec![
                line("redis_version", &REDIS_VERSION),
                line("walferry_version", &env!("CARGO_PKG_VERSION")),
                line("redis_mode", &"standalone"),
                line("name", &facts.name),
                line("cluster_id", &facts.cluster_id),
                line("process_id", &std::process::id()),
                line("tcp_port", &facts.port),
                line("uptime_in_seconds", &facts.uptime_s),
                line("server_time_usec", &host.wall_clock_us()),
            ],
        ),
        (
            "Clients",
            vec![
                line("connected_clients", &facts.clients.connected),
                line("maxclients", &facts.clients.connected_max),
                line("blocked_clients", &facts.clients.waiting),
                line("unauthenticated_clients", &facts.clients.unknown_now),
                line("clients_buffered_bytes", &facts.clients.buffered_bytes),
            ],
        ),
        (
            "Stats",
            vec![
                line("total_connections_received", &facts.clients.accepted),
                line("total_commands_processed", &facts.commands),
                line("rejected_connections", &facts.clients.rejected),
                line("evicted_clients", &facts.clients.evicted),
                line("idle_disconnections", &facts.clients.idle),
                line("output_stalled_disconnections", &facts.clients.stalled),
                line("half_closed_disconnections", &facts.clients.half_closed),
                line("killed_clients", &facts.clients.killed),
                line("http_disconnections", &facts.clients.http),
                line("client_query_buffer_limit_disconnections", &facts.clients.unread),
                line("acl_access_denied_auth", &facts.clients.failed_logins),
                line("authentication_timeout_disconnections", &facts.clients.unknown),
                line("unauthenticated_displaced", &facts.clients.displaced),
                line("longest_turn_us", &facts.turns.longest.as_micros()),
                line("slow_turns", &facts.turns.slow),
                line("slow_commands", &facts.turns.slow_commands.values().sum::<u64>()),
                line("slowest_command", &slowest(&facts.turns)),
                line("log_lines_lost", &facts.lost_lines),
            ],
        ),
        ("Replication", replication(host, &facts)),
    ];
    sections.extend(host.info_sections());
    sections
}

/// The command that held up the others longest.
fn slowest(turns: &Turns) -> String {
    turns.slowest.map(|(name, took)| format!("name={name},us={}", took.as_micros())).unwrap_or_default()
}

/// INFO never waits: while changed keys are being counted the number is an estimate, and the next INFO has it.
fn keyspace(host: &mut dyn Host) -> Vec<(String, String)> {
    // INFO answers even when the store cannot be read: the rest of it says why.
    let keys = host.count_keys().map_or(0, |count| count.keys);
    if keys == 0 { vec![] } else { vec![("db0".to_owned(), format!("keys={keys},expires=0,avg_ttl=0"))] }
}

/// The replicas that have a connection: what clients of redis-server expect. REPLICATION and DESCRIBE show the others too.
fn connected(host: &dyn Host) -> Vec<ReplicationRow> {
    host.replication().into_iter().filter(|row| !row.address.is_empty()).collect()
}

fn replication(host: &dyn Host, facts: &NodeFacts) -> Vec<(String, String)> {
    let line = |key: &str, value: &dyn std::fmt::Display| (key.to_owned(), value.to_string());
    let rows = connected(host);
    let mut lines = match &facts.following {
        None => vec![line("role", &"master")],
        Some(leader) => following(leader, facts),
    };
    lines.push(line("node_role", &facts.role));
    lines.push(line("connected_slaves", &rows.len()));
    for (index, row) in rows.iter().enumerate() {
        let (ip, port) = split_address(&row.address);
        let state = match row.state.as_str() {
            "streaming" => "online",
            "catchup" => "send_bulk",
            _ => "wait_bgsave",
        };
        let redis =
            format!("ip={ip},port={port},state={state},offset={},lag={}", row.applied.0, row.lag_us / 1_000_000);
        let ours = format!(
            "name={},sent_lsn={},written_lsn={},flushed_lsn={},applied_lsn={},lag_bytes={},lag_us={},sync_state={}",
            row.name, row.sent, row.written, row.flushed, row.applied, row.lag_bytes, row.lag_us, row.sync_state
        );
        lines.push(line(&format!("slave{index}"), &format_args!("{redis},{ours}")));
    }
    lines.extend(facts.staleness.map(|staleness| line("staleness_ms", &staleness.as_millis())));
    let replid = facts.cluster_id.replace('-', "");
    lines.extend([
        line("master_replid", &format_args!("{replid:0<40}")),
        line("master_repl_offset", &facts.flushed.0),
        line("epoch", &facts.epoch.number()),
        line("epoch_id", &facts.epoch),
        line("end_lsn", &facts.end),
    ]);
    lines.extend(lsns(facts).map(|(name, lsn)| line(name, &lsn)));
    lines.extend([
        line("commit_level", &facts.commit_level),
        line("sync_policy", &facts.sync_policy),
        line("blocked_reason", &facts.blocked_reason),
    ]);
    lines
}

fn following(leader: &Following, facts: &NodeFacts) -> Vec<(String, String)> {
    let line = |key: &str, value: &dyn std::fmt::Display| (key.to_owned(), value.to_string());
    let mut lines = vec![
        line("role", &"slave"),
        line("master_host", &leader.host),
        line("master_port", &leader.port),
        line("master_link_status", &if leader.connected { "up" } else { "down" }),
        line("master_last_io_seconds_ago", &leader.silence.as_secs()),
        line("master_sync_in_progress", &u8::from(leader.connected && !leader.streaming)),
        line("slave_read_repl_offset", &facts.written.0),
        line("slave_repl_offset", &facts.applied.0),
        line("slave_read_only", &1),
        line("leader_silence_ms", &leader.silence.as_millis()),
        match leader.lag_bytes {
            Some(bytes) => line("lag_bytes", &bytes),
            None => line("lag_bytes", &UNKNOWN),
        },
        line("lag_us", &leader.lag.as_micros()),
    ];
    if !leader.connected {
        lines.push(line("master_link_down_since_seconds", &leader.silence.as_secs()));
    }
    lines
}

/// COMMAND | COMMAND COUNT | LIST | INFO [name...] | DOCS [name...]
pub fn command(_: &mut Client, args: &Args<'_>, _: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let Some(subcommand) = args.get(1) else {
        describe_all(reply);
        return Outcome::DONE;
    };
    let subcommand_upper = subcommand.to_ascii_uppercase();
    match (&subcommand_upper[..], args.len()) {
        (b"COUNT", 2) => reply.count(COMMANDS.len()),
        (b"LIST", 2) => {
            reply.array(COMMANDS.len());
            for spec in COMMANDS {
                reply.bulk(spec.name.as_bytes());
            }
        }
        (b"COUNT" | b"LIST", _) => {
            reply.error(wrong_arity(&format!("command|{}", String::from_utf8_lossy(subcommand))));
        }
        (b"INFO", 2) => describe_all(reply),
        (b"INFO", _) => {
            reply.array(args.len() - 2);
            for name in args.from(2) {
                match lookup(name) {
                    Some(spec) => describe(spec, reply),
                    None => reply.null(),
                }
            }
        }
        (b"DOCS", 2) => document(&COMMANDS.iter().collect::<Vec<_>>(), reply),
        (b"DOCS", _) => document(&args.from(2).filter_map(lookup).collect::<Vec<_>>(), reply),
        _ => unknown_subcommand("COMMAND", subcommand, reply),
    }
    Outcome::DONE
}

fn describe_all(reply: &mut Reply) {
    reply.array(COMMANDS.len());
    for spec in COMMANDS {
        describe(spec, reply);
    }
}

fn describe(spec: &Spec, reply: &mut Reply) {
    reply.array(10);
    reply.bulk(spec.name.as_bytes());
    reply.integer(i64::from(spec.arity));
    reply.set(spec.flags.len());
    for flag in spec.flags {
        reply.simple(flag);
    }
    for key in [spec.keys.0, spec.keys.1, spec.keys.2] {
        reply.integer(i64::from(key));
    }
    // No ACL categories, tips, key specifications or subcommands.
    for _ in 0..4 {
        reply.set(0);
    }
}

fn document(specs: &[&Spec], reply: &mut Reply) {
    reply.map(specs.len());
    for spec in specs {
        reply.bulk(spec.name.as_bytes());
        reply.map(3);
        for (field, value) in [("summary", spec.summary), ("since", spec.since), ("group", spec.group)] {
            reply.bulk(field.as_bytes());
            reply.bulk(value.as_bytes());
        }
    }
}
