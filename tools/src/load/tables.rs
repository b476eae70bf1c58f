//! The tables of the built-in scripts: accounts, tellers and branches as counters, history as a stream.
//! `-i` fills them; `--check` verifies that what was added to each of them is the same, here and on every replica.

use std::fmt;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::script::{ACCOUNTS_PER_SCALE, TELLERS_PER_SCALE};
use crate::client::{Client, ClientError, Reply, Url, encode_command, info_field};

/// Where `-i` leaves the scale, as the last thing that it writes.
pub const SCALE_KEY: &str = "load:scale";
/// Keys set, read or deleted by one command.
const KEYS_PER_COMMAND: i64 = 1_000;
/// Commands sent ahead of their answers.
const COMMANDS_AHEAD: usize = 8;
/// History entries read by one command.
const ENTRIES_PER_COMMAND: &str = "10000";
/// How long a replica may take to apply what the leader has.
const REPLICA_MS_MAX: &str = "30000";
/// Deleting or answering may take so long.
const ANSWER_S_MAX: u64 = 60;

const TABLES: [(&str, i64); 3] = [("account", ACCOUNTS_PER_SCALE), ("teller", TELLERS_PER_SCALE), ("branch", 1)];

/// The scale of the tables on a node, if `-i` completed there.
pub fn scale(client: &mut Client) -> Result<Option<i64>, ClientError> {
    Ok(client.call(&["GET", SCALE_KEY])?.int())
}

/// Fills the tables with zeros and empties the history.
pub fn init(client: &mut Client, scale_wanted: i64) -> Result<Duration, ClientError> {
    let began = Instant::now();
    client.set_answer_time_max(Duration::from_secs(ANSWER_S_MAX))?;
    let scale_before = scale(client)?.unwrap_or(0);
    // Gone first: a run that finds no scale knows that the tables are not whole.
    client.call(&["DEL", SCALE_KEY, "history"])?;
    let rows = |scale: i64| TABLES.iter().map(|(_, rows)| rows * scale).sum::<i64>();
    let bar = ProgressBar::new(rows(scale_wanted.max(scale_before)) as u64);
    if let Ok(style) = ProgressStyle::with_template("{msg:>10} [{bar:40}] {percent:>3}% {pos}/{len} keys, {eta} left") {
        bar.set_style(style.progress_chars("=> "));
    }
    for (table, rows) in TABLES {
        bar.set_message(format!("{table}s"));
        let set = |out: &mut Vec<u8>, from: i64, to: i64| {
            let keys: Vec<String> = (from..=to).map(|id| format!("{table}:{id}")).collect();
            let mut arguments: Vec<&[u8]> = vec![b"MSET"];
            arguments.extend(keys.iter().flat_map(|key| [key.as_bytes(), b"0"]));
            encode_command(out, &arguments);
        };
        in_batches(client, "MSET", 1, rows * scale_wanted, set, |count, _| bar.inc(count as u64))?;
        let delete = |out: &mut Vec<u8>, from: i64, to: i64| keys_command(out, b"DEL", table, from, to);
        let first = rows * scale_wanted + 1;
        in_batches(client, "DEL", first, rows * scale_before, delete, |count, _| bar.inc(count as u64))?;
    }
    client.call(&["SET", SCALE_KEY, &scale_wanted.to_string()])?;
    bar.finish_and_clear();
    Ok(began.elapsed())
}

fn keys_command(out: &mut Vec<u8>, command: &[u8], table: &str, from: i64, to: i64) {
    let keys: Vec<String> = (from..=to).map(|id| format!("{table}:{id}")).collect();
    let mut arguments = vec![command];
    arguments.extend(keys.iter().map(|key| key.as_bytes()));
    encode_command(out, &arguments);
}

/// Sends commands for the ids `first..=last`, some ahead of their answers.
fn in_batches(
    client: &mut Client,
    command: &str,
    first: i64,
    last: i64,
    encode: impl Fn(&mut Vec<u8>, i64, i64),
    mut answered: impl FnMut(i64, Reply),
) -> Result<(), ClientError> {
    let mut ahead = std::collections::VecDeque::new();
    let mut from = first;
    while from <= last || !ahead.is_empty() {
        if from <= last && ahead.len() < COMMANDS_AHEAD {
            let to = last.min(from + KEYS_PER_COMMAND - 1);
            let mut request = Vec::new();
            encode(&mut request, from, to);
            client.send(&request, command)?;
            ahead.push_back(to - from + 1);
            from = to + 1;
            continue;
        }
        let count = ahead.pop_front().unwrap_or_default();
        answered(count, client.receive(command)?);
    }
    Ok(())
}

/// What was added to each table of one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Sums {
    /// Over all accounts.
    pub accounts: i128,
    /// Over all tellers.
    pub tellers: i128,
    /// Over all branches.
    pub branches: i128,
    /// Over the deltas in the history.
    pub history: i128,
    /// Over those history entries that name a teller, as tpcb-like writes them.
    pub history_of_tellers: i128,
    /// Entries of the history.
    pub entries: u64,
}

impl Sums {
    /// True if every transaction is in all of its tables or in none.
    pub fn agree(&self) -> bool {
        let whole = self.tellers == self.branches && self.tellers == self.history_of_tellers;
        whole && self.accounts == self.history
    }
}

impl fmt::Display for Sums {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Sums { accounts, tellers, branches, history, entries, .. } = self;
        write!(f, "accounts {accounts}, tellers {tellers}, branches {branches}, history {history} in {entries} entries")
    }
}

/// Reads all tables of a node.
pub fn sums(client: &mut Client, scale: i64) -> Result<Sums, ClientError> {
    let mut totals = [0i128; TABLES.len()];
    for ((table, rows), total) in TABLES.iter().zip(&mut totals) {
        let read = |out: &mut Vec<u8>, from: i64, to: i64| keys_command(out, b"MGET", table, from, to);
        in_batches(client, "MGET", 1, rows * scale, read, |_, reply| {
            *total += reply.items().iter().filter_map(Reply::int).map(i128::from).sum::<i128>();
        })?;
    }
    let mut sums = Sums { accounts: totals[0], tellers: totals[1], branches: totals[2], ..Sums::default() };
    let mut from = "-".to_owned();
    loop {
        let page = client.call(&["XRANGE", "history", &from, "+", "COUNT", ENTRIES_PER_COMMAND])?;
        for entry in page.items() {
            let [id, fields] = entry.items() else {
                continue;
            };
            let delta = fields.field("delta").and_then(Reply::int).map_or(0, i128::from);
            sums.entries += 1;
            sums.history += delta;
            sums.history_of_tellers += if fields.field("tid").is_some() { delta } else { 0 };
            from = format!("({}", id.text().unwrap_or_default());
        }
        if page.items().is_empty() {
            return Ok(sums);
        }
    }
}

/// What `--check` found on one node.
#[derive(Clone, Debug, serde::Serialize)]
pub struct CheckedNode {
    /// The node's address.
    pub address: String,
    /// Its sums.
    pub sums: Sums,
    /// True if they agree with each other and with the leader's.
    pub agrees: bool,
}

/// Compares the sums of the leader with each other, and with those of every replica once it has applied as much.
/// No client may write while this runs.
pub fn check(leader: &mut Client, url: &Url, replicas: &[Url]) -> Result<Vec<CheckedNode>, String> {
    let text = |error: ClientError| error.to_string();
    leader.set_answer_time_max(Duration::from_secs(ANSWER_S_MAX)).map_err(text)?;
    let scale = scale(leader).map_err(text)?;
    let scale = scale.ok_or_else(|| format!("{url} has no tables; fill them with `walferry load -i --url {url}`"))?;
    // Reads see what is durable; the last commits of a run at level `off` may not be yet.
    let info = leader.call(&["INFO"]).map_err(text)?.text().unwrap_or_default();
    let end = info_field(&info, "end_lsn");
    wait_until_applied(leader, end)?;
    let expected = sums(leader, scale).map_err(text)?;
    let mut nodes = vec![CheckedNode { address: url.address(), sums: expected, agrees: expected.agree() }];
    for replica in replicas {
        let unreachable =
            |error| format!("replica {replica}: {error}; name the address for its clients with --check-url");
        let mut client = Client::connect(replica).map_err(unreachable)?;
        client.set_answer_time_max(Duration::from_secs(ANSWER_S_MAX)).map_err(text)?;
        wait_until_applied(&mut client, end)?;
        let found = sums(&mut client, scale).map_err(text)?;
        nodes.push(CheckedNode { address: replica.address(), sums: found, agrees: found.agree() && found == expected });
    }
    Ok(nodes)
}

/// Waits until a node's readers see everything up to `end`; a server that tells no LSNs has nothing to wait for.
fn wait_until_applied(client: &mut Client, end: Option<&str>) -> Result<(), String> {
    let Some(end) = end else { return Ok(()) };
    client.call(&["WAITLSN", end, REPLICA_MS_MAX]).map(|_| ()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_agree_only_without_half_a_transaction() {
        let tpcb = Sums { accounts: 7, tellers: 5, branches: 5, history: 7, history_of_tellers: 5, entries: 2 };
        assert!(tpcb.agree(), "5 by tpcb-like and 2 by simple-update");
        assert!(Sums::default().agree());
        assert!(!Sums { accounts: 6, ..tpcb }.agree());
        assert!(!Sums { branches: 4, ..tpcb }.agree());
        assert!(!Sums { history_of_tellers: 4, ..tpcb }.agree());
    }
}
