//! `walferry load`: load on a node with pgbench's habits, and what came of it.
//!
//! ```text
//! mod (flags, threads, intervals) ── driver (one event loop a thread) ── connection (socket) ── session (core) ── script, expr
//!      └─ report (text, json, hlog)        └─ schedule (core)                                      └─ reply, stats
//! target: walferry, Redis or PostgreSQL; postgres: its driver, in the place of driver, connection and session
//! tables: -i and --check
//! ```

mod connection;
mod driver;
mod expr;
mod options;
mod postgres;
mod reply;
mod report;
pub mod route;
mod run;
mod schedule;
mod script;
mod session;
mod stats;
mod tables;
mod target;

use std::time::Duration;

use crate::client::{Client, Url};
use crate::failure::Failure;

pub use options::{EXAMPLES, LoadArgs, ScriptSource};
pub use report::Summary;
pub use run::{Options, execute};
pub use target::Target;

/// Runs `walferry load`.
pub fn run(args: LoadArgs) -> Result<(), Failure> {
    let options = args.options()?;
    if args.init {
        let took = initialise(&options)?;
        let (scale, seconds) = (options.scale.unwrap_or(1), took.as_secs_f64());
        crate::failure::say(format_args!("tables of scale {scale} filled in {seconds:.2} s"))?;
        return Ok(());
    }
    let wants_load = args.transactions != Some(0);
    let summary = if wants_load { Some(execute(&options)?) } else { None };
    let checked = match &options.url {
        Target::Redis(url) if args.check => Some(check(url, &args.check_url)?),
        _ => None,
    };
    if args.json {
        let json = serde_json::json!({ "load": summary, "check": checked });
        crate::failure::say(format_args!("{json:#}"))?;
    } else {
        if let Some(summary) = &summary {
            crate::failure::say(summary.text(args.per_command).trim_end())?;
        }
        for node in checked.iter().flatten() {
            let verdict = if node.agrees { "agree" } else { "DISAGREE" };
            crate::failure::say(format_args!("check {}: sums {verdict}: {}", node.address, node.sums))?;
        }
    }
    if let Some(node) = checked.iter().flatten().find(|node| !node.agrees) {
        return Err(Failure::failed(format_args!("--check: the sums of {} disagree", node.address)));
    }
    match summary {
        Some(summary) if summary.transactions == 0 && !summary.interrupted => {
            let why = summary.failures.first().map_or("no answer came", |failure| failure.example.as_str());
            Err(Failure::failed(format_args!("no transaction succeeded: {why}")))
        }
        _ => Ok(()),
    }
}

/// Fills the tables of the built-in scripts.
pub fn initialise(options: &Options) -> Result<Duration, Failure> {
    let url = match &options.url {
        Target::Redis(url) => url,
        Target::Postgres(config) => return postgres::init(config, options.scale.unwrap_or(1)),
    };
    let (mut client, _) = run::connect(&run::leader_url(url), options.level.as_deref())?;
    tables::init(&mut client, options.scale.unwrap_or(1)).map_err(Failure::failed)
}

/// Compares the sums of the leader and of its replicas; without `named` those that the leader lists.
pub fn check(url: &Url, named: &[Url]) -> Result<Vec<tables::CheckedNode>, Failure> {
    let (mut leader, _) = run::connect(&run::leader_url(url), None)?;
    let replicas = if named.is_empty() { listed_replicas(&mut leader, url)? } else { named.to_vec() };
    tables::check(&mut leader, url, &replicas).map_err(Failure::failed)
}

/// The replicas in the leader's REPLICATION rows; a node that does not know the command has none.
fn listed_replicas(leader: &mut Client, url: &Url) -> Result<Vec<Url>, Failure> {
    let Ok(rows) = leader.call(&["REPLICATION"]) else {
        return Ok(Vec::new());
    };
    let address = |row: &crate::client::Reply| row.field("address").and_then(crate::client::Reply::text);
    let named = rows.items().iter().filter_map(address);
    named.map(|address| url.with_address(&address).map_err(Failure::failed)).collect()
}
