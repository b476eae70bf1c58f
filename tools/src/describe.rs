//! `walferry describe`: leader, replicas, in-sync set, epoch, policy and lag, a line each, as `kafka-topics --describe` tells
//! of a partition. Asks any node; for the lags it goes on to the leader.

use std::time::{Duration, Instant};

use clap::Args;
use serde_json::Value;
use walferry_node::units::Span;

use crate::client::{Client, Url};
use crate::failure::{Failure, say};

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry describe
  walferry describe --url redis://10.0.1.12:6400 --json
  walferry describe --wait 10s                       right after a start: until the cluster has a leader

Exit codes: 0 told; 1 no node answers; 2 wrong usage. It tells as well when nobody leads, and what is awaited.";

/// Flags of `walferry describe`.
#[derive(Debug, Args)]
pub struct DescribeArgs {
    /// Any node of the cluster
    #[arg(long, value_name = "URL", default_value = "redis://127.0.0.1:6400")]
    url: Url,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Try so long until the node answers, a leader is known and nothing is reported as blocked
    #[arg(long, value_name = "TIME")]
    wait: Option<Span>,
}

/// How often `--wait` asks again.
const ASK_INTERVAL: Duration = Duration::from_millis(100);

/// Runs `walferry describe`.
pub fn run(args: &DescribeArgs) -> Result<(), Failure> {
    let until = Instant::now() + args.wait.map_or(Duration::ZERO, |wait| wait.0);
    let told = loop {
        let told = ask(&args.url).map(|here| {
            let is_blocked = here["blocked_reason"].as_str().is_some_and(|reason| !reason.is_empty());
            let told = leaders_view(&args.url, here);
            let is_ready = !is_blocked && told["leader"].is_string();
            (told, is_ready)
        });
        let is_ready = matches!(&told, Ok((_, true)));
        if is_ready || Instant::now() >= until {
            break told?.0;
        }
        std::thread::sleep(ASK_INTERVAL);
    };
    if args.json {
        return say(serde_json::to_string_pretty(&told).map_err(Failure::failed)?);
    }
    for line in lines(&told) {
        say(line)?;
    }
    Ok(())
}

/// What the leader tells, which knows the lags; when it does not answer, what is known at `url`.
pub fn ask_leader(url: &Url) -> Result<Value, Failure> {
    Ok(leaders_view(url, ask(url)?))
}

/// What the leader that `here` names tells; `here` itself when it answers for the leader, or when that does not answer.
fn leaders_view(url: &Url, here: Value) -> Value {
    let elsewhere = here["leader_address"].as_str().filter(|_| here["role"] != "leader");
    let leader = elsewhere.and_then(|address| ask(&url.with_address(address).ok()?).ok());
    leader.unwrap_or(here)
}

fn ask(url: &Url) -> Result<Value, Failure> {
    let mut client = Client::connect(url).map_err(Failure::failed)?;
    let answer = client.call(&["DESCRIBE"]).map_err(Failure::failed)?;
    serde_json::from_str(&answer.text().unwrap_or_default()).map_err(Failure::failed)
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn lines(told: &Value) -> Vec<String> {
    let names = |value: &Value| match value.as_array() {
        Some(names) if names.is_empty() => "-".to_owned(),
        Some(names) => names.iter().map(text).collect::<Vec<_>>().join(", "),
        None => "-".to_owned(),
    };
    let follows = match (told["policy_follows_members"] == true, told["policy"] == "") {
        (true, true) => "none: there is no other data member",
        (true, false) => ", a majority of the data members",
        (false, _) => "",
    };
    let leader = match (told["leader"].as_str(), told["leader_address"].as_str()) {
        (leader, Some(address)) => format!("leader     {} at {address}", leader.unwrap_or("-")),
        (Some(leader), None) => format!("leader     {leader}, where clients reach it is not known"),
        (None, None) => "leader     -".to_owned(),
    };
    let mut lines = vec![
        format!("cluster    {}", text(&told["cluster_id"])),
        leader,
        format!("epoch      {}", text(&told["epoch"])),
        format!("policy     {}{}", text(&told["policy"]), follows),
        format!("in sync    {} (min_in_sync {})", names(&told["in_sync"]), text(&told["min_in_sync"])),
        format!("committed  {}", text(&told["committed"])),
    ];
    let leader = text(&told["leader"]);
    for member in told["members"].as_array().into_iter().flatten() {
        lines.push(member_line(member, text(&member["name"]) == leader));
    }
    for (key, words) in
        [("blocked_reason", "blocked    "), ("slow_disk", "disk       "), ("lost_commits", "lost       ")]
    {
        match &told[key] {
            Value::String(blocked_reason) if !blocked_reason.is_empty() => {
                lines.push(format!("{words}{blocked_reason}"))
            }
            Value::Number(lost) if lost.as_u64() != Some(0) => {
                lines.push(format!("{words}{lost} asynchronous commits, kept in the data directory's lost/"));
            }
            _ => {}
        }
    }
    lines
}

fn member_line(member: &Value, leads: bool) -> String {
    let name = text(&member["name"]);
    if leads {
        return format!("  {name:<10} leader");
    }
    if member["kind"] == "witness" {
        let leaving = if member["leaving"] == true { ", leaving" } else { "" };
        return format!("  {name:<10} witness{leaving}");
    }
    let standing = match (member["in_sync"].as_bool(), member["log_status"].as_str()) {
        _ if member["leaving"] == true => "leaving",
        (_, Some("lost")) => "rebuilding",
        (_, Some("joining")) => "joining",
        (Some(true), _) => "in sync",
        _ => "behind",
    };
    let (state, applied) = (text(&member["state"]), text(&member["applied"]));
    match (member["lag_bytes"].as_u64(), member["lag_us"].as_u64()) {
        (Some(bytes), Some(us)) => {
            let lag = Span(Duration::from_micros(us));
            format!("  {name:<10} {standing:<10} {state:<12} applied {applied}, lag {bytes} bytes, {lag}")
        }
        _ => format!("  {name:<10} {standing}"),
    }
}
