//! Commands about commits and their way to the replicas: WAIT and WAITAOF as redis-server has them, and walferry's own
//! COMMITLEVEL COMMITTIMEOUT COMMITINFO LSN WAITLSN REPLICATION SLOT PROMOTE JOIN REMOVE WATERFALL.

use walferry_cluster::MemberName;
use walferry_cluster::level::CommitLevel;
use walferry_cluster::member::reachable_at;
use walferry_engine::lsn::Lsn;
use walferry_shipper::status::SlotStatus;

use crate::cluster::Command;
use crate::session::client::Client;
use crate::session::command::error::{CommandError, integer, refusal_text, timeout, wrong_arity};
use crate::session::host::{Host, NodeRole, Refusal, ReplicationRow};
use crate::session::parked::Parked;
use crate::session::reading::{Position, lost};
use crate::session::reply::Reply;
use crate::session::resp::Args;
use crate::units::HostPort;

use crate::session::command::connection::unknown_subcommand;
use crate::session::command::spec::Outcome;

fn replicas_wanted(text: &[u8], reply: &mut Reply) -> Option<usize> {
    let wanted = integer(text).and_then(|number| usize::try_from(number).ok());
    if wanted.is_none() {
        reply.error(CommandError::NotAnInteger);
    }
    wanted
}

/// The session's last commit, which `command` waits for; replicas have none, and a failover may have taken it back.
fn waited_for(command: &str, client: &Client, host: &dyn Host, reply: &mut Reply) -> Option<Position> {
    if host.facts().role == NodeRole::Replica {
        reply.error(format_args!("ERR {command} cannot be used with replica instances."));
        return None;
    }
    match lost(client.last_commit, host.history()) {
        Some(error) => {
            reply.error(error);
            None
        }
        None => Some(client.last_commit),
    }
}

/// Polls once, and parks if there is nothing yet.
pub fn poll_or_park(parked: Parked, client: &mut Client, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    match parked.poll(client, host, reply) {
        Ok(hold) => hold.map_or(Outcome::DONE, Outcome::Done),
        Err(parked) => Outcome::Park(parked),
    }
}

/// WAIT numreplicas timeout
pub fn wait(client: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let Some(wanted) = replicas_wanted(&args[1], reply) else {
        return Outcome::DONE;
    };
    let Some(timeout) = timeout(&args[2], reply) else {
        return Outcome::DONE;
    };
    let Some(commit) = waited_for("WAIT", client, host, reply) else {
        return Outcome::DONE;
    };
    poll_or_park(Parked::for_replicas(commit, wanted, timeout, host), client, host, reply)
}

/// WAITAOF numlocal numreplicas timeout
pub fn waitaof(client: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let local = match integer(&args[1]) {
        Some(0) => false,
        Some(1) => true,
        _ => {
            reply.error("ERR value is out of range, must be between 0 and 1");
            return Outcome::DONE;
        }
    };
    let Some(wanted) = replicas_wanted(&args[2], reply) else {
        return Outcome::DONE;
    };
    let Some(timeout) = timeout(&args[3], reply) else {
        return Outcome::DONE;
    };
    let Some(commit) = waited_for("WAITAOF", client, host, reply) else {
        return Outcome::DONE;
    };
    poll_or_park(Parked::for_durable(commit, local, wanted, timeout, host), client, host, reply)
}

/// WAITLSN lsn timeout-ms
pub fn waitlsn(client: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let lsn = match String::from_utf8_lossy(&args[1]).parse::<Lsn>() {
        Ok(lsn) => lsn,
        Err(error) => {
            reply.error(format_args!("ERR {error}"));
            return Outcome::DONE;
        }
    };
    let Some(timeout) = timeout(&args[2], reply) else {
        return Outcome::DONE;
    };
    poll_or_park(Parked::for_applied(lsn, timeout, host), client, host, reply)
}

/// LSN
pub fn lsn(client: &mut Client, _: &Args<'_>, _: &mut dyn Host, reply: &mut Reply) -> Outcome {
    reply.text(client.last_commit.lsn);
    Outcome::DONE
}

/// COMMITLEVEL [level | DEFAULT]
pub fn commitlevel(client: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let level = match args.get(1) {
        None => {
            reply.text(client.level);
            return Outcome::DONE;
        }
        Some(_) if args.len() > 2 => {
            reply.error(wrong_arity("commitlevel"));
            return Outcome::DONE;
        }
        // For whoever shares a connection and wants what the node was configured to.
        Some(word) if word.eq_ignore_ascii_case(b"DEFAULT") => client.level_default(),
        Some(level) => match String::from_utf8_lossy(level).to_ascii_lowercase().parse::<CommitLevel>() {
            Ok(level) => level,
            Err(error) => {
                reply.error(format_args!("ERR {error}"));
                return Outcome::DONE;
            }
        },
    };
    // At once, and not with the first write: who asks for a level relies on it.
    match host.unconfirmable(level) {
        Some(reason) => reply.error(refusal_text(&Refusal::NoReplicas(reason))),
        None => {
            client.level = level;
            reply.ok();
        }
    }
    Outcome::DONE
}

/// COMMITTIMEOUT [milliseconds]; 0 waits without end.
pub fn committimeout(client: &mut Client, args: &Args<'_>, _: &mut dyn Host, reply: &mut Reply) -> Outcome {
    match args.get(1) {
        None => reply.count(client.commit_timeout.map_or(0, |timeout| timeout.as_millis() as usize)),
        Some(_) if args.len() > 2 => reply.error(wrong_arity("committimeout")),
        Some(text) => {
            if let Some(timeout) = timeout(text, reply) {
                client.commit_timeout = (!timeout.is_zero()).then_some(timeout);
                reply.ok();
            }
        }
    }
    Outcome::DONE
}

/// COMMITINFO
pub fn commitinfo(client: &mut Client, _: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let Some(acknowledged) = client.acknowledged else {
        reply.null();
        return Outcome::DONE;
    };
    // Where the commit was, another epoch may have written since: what replicas confirm there is no evidence of it.
    if let Some(error) = lost(acknowledged.position, host.history()) {
        reply.error(error);
        return Outcome::DONE;
    }
    let Position { epoch, lsn } = acknowledged.position;
    let evidence = host.evidence(lsn);
    reply.map(7);
    reply.bulk(b"epoch");
    reply.integer(i64::from(epoch.number()));
    reply.bulk(b"lsn");
    reply.text(lsn);
    reply.bulk(b"level");
    reply.text(acknowledged.level);
    reply.bulk(b"met");
    reply.text(acknowledged.met);
    reply.bulk(b"confirmed");
    reply.integer(i64::from(acknowledged.confirmed));
    reply.bulk(b"replicas");
    reply.map(evidence.replicas.len());
    for replica in &evidence.replicas {
        reply.text(&replica.name);
        reply.text(replica.level);
    }
    reply.bulk(b"stages_us");
    reply.map(evidence.stages_us.len() + 1);
    for (stage, us) in &evidence.stages_us {
        reply.text(stage);
        reply.integer(*us as i64);
    }
    reply.bulk(b"total");
    reply.integer(acknowledged.held_for.as_micros() as i64);
    Outcome::DONE
}

/// REPLICATION
pub fn replication(_: &mut Client, _: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let rows = host.replication();
    reply.array(rows.len());
    for row in &rows {
        write_row(row, reply);
    }
    Outcome::DONE
}

fn write_row(row: &ReplicationRow, reply: &mut Reply) {
    reply.map(11);
    let texts: [(&str, &dyn std::fmt::Display); 8] = [
        ("name", &row.name),
        ("address", &row.address),
        ("state", &row.state),
        ("sent_lsn", &row.sent),
        ("written_lsn", &row.written),
        ("flushed_lsn", &row.flushed),
        ("applied_lsn", &row.applied),
        ("sync_state", &row.sync_state),
    ];
    for (field, value) in texts {
        reply.text(field);
        reply.text(value);
    }
    for (field, value) in [("lag_bytes", row.lag_bytes), ("lag_us", row.lag_us), ("in_sync", u64::from(row.in_sync))] {
        reply.text(field);
        reply.integer(i64::try_from(value).unwrap_or(i64::MAX));
    }
}

/// SLOT LIST | SLOT DROP name
pub fn slot(_: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let subcommand = args[1].to_ascii_uppercase();
    match (&subcommand[..], args.len()) {
        (b"LIST", 2) => match host.slots() {
            Ok(slots) => {
                reply.array(slots.len());
                slots.iter().for_each(|slot| write_slot(slot, reply));
            }
            Err(error) => reply.error(format_args!("ERR {error}")),
        },
        (b"DROP", 3) => {
            let Some(name) = member_name(&args[2], reply) else { return Outcome::DONE };
            match host.drop_slot(&name) {
                Ok(done) => reply.bulk(done.as_bytes()),
                Err(error) => reply.error(format_args!("ERR {error}")),
            }
        }
        (b"LIST" | b"DROP", _) => {
            reply.error(wrong_arity(&format!("slot|{}", String::from_utf8_lossy(&subcommand).to_lowercase())));
        }
        _ => unknown_subcommand("SLOT", &args[1], reply),
    }
    Outcome::DONE
}

fn write_slot(slot: &SlotStatus, reply: &mut Reply) {
    reply.map(5);
    let state = if slot.lost { "lost" } else { "active" };
    let texts: [(&str, &dyn std::fmt::Display); 3] =
        [("name", &slot.name), ("state", &state), ("restart_lsn", &slot.restart)];
    for (field, value) in texts {
        reply.text(field);
        reply.text(value);
    }
    for (field, value) in [("held_bytes", slot.held_bytes), ("connected", u64::from(slot.connected))] {
        reply.text(field);
        reply.integer(i64::try_from(value).unwrap_or(i64::MAX));
    }
}

/// LEADER: where clients write, `HOST:PORT`; nil while nobody leads.
pub fn leader(client: &mut Client, _: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    match host.leader() {
        Some(address) => reply.bulk(reachable_at(&address, client.reached_at).as_bytes()),
        None => reply.null(),
    }
    Outcome::DONE
}

/// DESCRIBE
pub fn describe(client: &mut Client, _: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    reply.bulk(host.describe_cluster(client.reached_at).as_bytes());
    Outcome::DONE
}

fn ask_cluster(command: Command, client: &mut Client, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    match host.command_cluster(command) {
        Ok(answer) => poll_or_park(Parked::for_cluster(answer), client, host, reply),
        Err(error) => {
            reply.error(format_args!("ERR {error}"));
            Outcome::DONE
        }
    }
}

/// SWITCHOVER [TO name]
pub fn switchover(client: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let to = match args.len() {
        1 => None,
        3 if args[1].eq_ignore_ascii_case(b"to") => match String::from_utf8_lossy(&args[2]).parse() {
            Ok(name) => Some(name),
            Err(error) => {
                reply.error(format_args!("ERR {error}"));
                return Outcome::DONE;
            }
        },
        _ => {
            reply.error("ERR SWITCHOVER takes nothing, or TO and the name of a replica");
            return Outcome::DONE;
        }
    };
    ask_cluster(Command::Switchover(to), client, host, reply)
}

fn member_name(text: &[u8], reply: &mut Reply) -> Option<MemberName> {
    let name = String::from_utf8_lossy(text).parse();
    name.map_err(|error| reply.error(format_args!("ERR {error}"))).ok()
}

/// JOIN name [PEER host:port]
pub fn join(client: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let Some(name) = member_name(&args[1], reply) else { return Outcome::DONE };
    let peer = match args.len() {
        2 => None,
        4 if args[2].eq_ignore_ascii_case(b"peer") => match String::from_utf8_lossy(&args[3]).parse::<HostPort>() {
            Ok(peer) => Some(peer.to_string()),
            Err(error) => {
                reply.error(format_args!("ERR {error}"));
                return Outcome::DONE;
            }
        },
        _ => {
            reply.error("ERR JOIN takes a name, and maybe PEER and its peer address");
            return Outcome::DONE;
        }
    };
    ask_cluster(Command::Join(name, peer), client, host, reply)
}

/// REMOVE name
pub fn remove(client: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    let Some(name) = member_name(&args[1], reply) else { return Outcome::DONE };
    ask_cluster(Command::Remove(name), client, host, reply)
}

/// PROMOTE: the new epoch. PROMOTE UNCLEAN: a leader for a cluster that waits for one, whatever is lost. PROMOTE
/// FORCE-NEW-CLUSTER: this member goes on as a cluster of its own, because the others are gone for good.
pub fn promote(client: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    if args.len() == 2 && args[1].eq_ignore_ascii_case(b"unclean") {
        return ask_cluster(Command::AllowUnclean, client, host, reply);
    }
    if args.len() == 2 && args[1].eq_ignore_ascii_case(b"force-new-cluster") {
        return ask_cluster(Command::ForceNewCluster, client, host, reply);
    }
    if args.len() > 1 {
        reply.error("ERR PROMOTE takes nothing, UNCLEAN or FORCE-NEW-CLUSTER");
        return Outcome::DONE;
    }
    match host.promote() {
        Ok(epoch) => reply.integer(i64::from(epoch.number())),
        Err(error) => reply.error(format_args!("ERR {error}")),
    }
    Outcome::DONE
}

/// WATERFALL [HISTOGRAMS | RESET]
pub fn waterfall(_: &mut Client, args: &Args<'_>, host: &mut dyn Host, reply: &mut Reply) -> Outcome {
    match args.get(1).map(|word| word.to_ascii_uppercase()).as_deref() {
        _ if args.len() > 2 => reply.error(CommandError::Syntax),
        None => reply.bulk(host.waterfall(false).as_bytes()),
        Some(b"HISTOGRAMS") => reply.bulk(host.waterfall(true).as_bytes()),
        Some(b"RESET") => {
            host.reset_waterfall();
            reply.ok();
        }
        Some(_) => reply.error("ERR WATERFALL takes nothing, HISTOGRAMS or RESET"),
    }
    Outcome::DONE
}
