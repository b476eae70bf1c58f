//! `walferry status`: a node's role, its replicas, and what its flushes cost. Reads INFO and REPLICATION over RESP;
//! knows nothing that a client could not ask for.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

pub mod waterfall;

use crate::client::{Client, ClientError, Reply, Url};
use crate::failure::{Failure, say};

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry status
  walferry status --url redis://10.0.1.12:6400 --watch
  walferry status --waterfall
  walferry status --waterfall --watch 10000 --hlog stages.hlog
  walferry status --json | jq '.replicas[] | {name, lag_bytes}'

Columns as in pg_stat_replication: sent, written, flushed and applied LSN of each replica; lag in bytes and in time is
what the replica has not applied, zero on an idle log. sync: `sync` or `quorum` replicas are waited for, `potential`
ones would step in, `async` ones never count.

Exit codes: 0 the node answered; 1 it cannot be reached, or it says what blocks it; 2 wrong usage.";

/// Between two looks of `--watch`.
const WATCH_MS_DEFAULT: u64 = 1_000;
/// Lines about the log are wrapped here.
const TEXT_COLUMNS: usize = 110;
/// Home, and clear to the end of the screen.
const CLEAR_SCREEN: &str = "\x1b[H\x1b[J";

/// Columns of the table: title, field of the row, true if it is a number.
const COLUMNS: [(&str, &str, bool); 10] = [
    ("name", "name", false),
    ("address", "address", false),
    ("state", "state", false),
    ("sent", "sent_lsn", true),
    ("written", "written_lsn", true),
    ("flushed", "flushed_lsn", true),
    ("applied", "applied_lsn", true),
    ("lag", "lag_bytes", true),
    ("lag time", "lag_us", true),
    ("sync", "sync_state", false),
];

/// Flags of `walferry status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The node
    #[arg(long, value_name = "URL", default_value = "redis://127.0.0.1:6400")]
    url: Url,
    /// Look again every so many milliseconds [default: 1000]
    #[arg(long, value_name = "MS", num_args = 0..=1, default_missing_value = "1000")]
    watch: Option<u64>,
    /// Show where commits spend their time, stage by stage, instead of the replicas
    #[arg(long)]
    waterfall: bool,
    /// With --waterfall --watch: write each interval's stages as an HdrHistogram interval log
    #[arg(long, value_name = "FILE", requires = "watch", requires = "waterfall")]
    hlog: Option<PathBuf>,
    /// Print everything as JSON; with --watch one object a line
    #[arg(long)]
    json: bool,
}

/// What a node told.
#[derive(Debug, Default)]
pub struct Status {
    /// INFO's sections: title, then keys and values.
    sections: Vec<(String, Vec<(String, String)>)>,
    /// REPLICATION's rows: fields and values.
    replicas: Vec<Vec<(String, Reply)>>,
}

/// Runs `walferry status`.
pub fn run(args: &StatusArgs) -> Result<(), Failure> {
    let mut client = Client::connect(&args.url).map_err(Failure::failed)?;
    if args.waterfall {
        return run_waterfall(args, client);
    }
    let Some(pause_ms) = args.watch else {
        let status = Status::read(&mut client).map_err(Failure::failed)?;
        if args.json {
            say(format_args!("{:#}", status.json()))?;
        } else {
            say(status.text(client.address()).trim_end())?;
        }
        return match status.field("blocked_reason") {
            Some(blocked_reason) if !blocked_reason.is_empty() => {
                Err(Failure::failed(format_args!("the node reports: {blocked_reason}")))
            }
            _ => Ok(()),
        };
    };
    let pause = Duration::from_millis(if pause_ms == 0 { WATCH_MS_DEFAULT } else { pause_ms });
    loop {
        // A node that restarts is worth watching: say that it is gone and try again.
        let looked = Status::read(&mut client);
        let text = match &looked {
            Ok(status) if args.json => format!("{}\n", status.json()),
            Ok(status) => status.text(client.address()),
            Err(error) => format!("{error}\n"),
        };
        let clear = if std::io::stdout().is_terminal() && !args.json { CLEAR_SCREEN } else { "" };
        let mut out = std::io::stdout().lock();
        write!(out, "{clear}{text}")?;
        out.flush()?;
        drop(out);
        std::thread::sleep(pause);
        if looked.is_err()
            && let Ok(again) = Client::connect(&args.url)
        {
            client = again;
        }
    }
}

/// `--waterfall`: once, or again and again.
fn run_waterfall(args: &StatusArgs, mut client: Client) -> Result<(), Failure> {
    let mut log = args.hlog.as_deref().map(waterfall::StageLog::create).transpose().map_err(Failure::failed)?;
    loop {
        let looked = waterfall::read(&mut client, log.is_some() || args.json);
        let report = match (&looked, args.watch) {
            (Ok(report), _) => report,
            (Err(error), None) => return Err(Failure::failed(error)),
            (Err(error), Some(_)) => &serde_json::json!({ "error": error.to_string() }),
        };
        if let Some(log) = &mut log {
            log.write(report).map_err(Failure::failed)?;
        }
        let text = match (&looked, args.json) {
            (_, true) if args.watch.is_some() => format!("{report}\n"),
            (_, true) => format!("{report:#}\n"),
            (Ok(report), false) => waterfall::text(report),
            (Err(error), false) => format!("{error}\n"),
        };
        let clear =
            if args.watch.is_some() && std::io::stdout().is_terminal() && !args.json { CLEAR_SCREEN } else { "" };
        let mut out = std::io::stdout().lock();
        write!(out, "{clear}{text}")?;
        out.flush()?;
        drop(out);
        let Some(pause_ms) = args.watch else { return Ok(()) };
        std::thread::sleep(Duration::from_millis(if pause_ms == 0 { WATCH_MS_DEFAULT } else { pause_ms }));
        if looked.is_err()
            && let Ok(again) = Client::connect(&args.url)
        {
            client = again;
        }
    }
}

impl Status {
    /// Asks a node for INFO and REPLICATION.
    pub fn read(client: &mut Client) -> Result<Status, ClientError> {
        let info = client.call(&["INFO"])?.text().unwrap_or_default();
        let rows = match client.call(&["REPLICATION"]) {
            Ok(rows) => rows,
            // Another server that speaks RESP: INFO is all there is.
            Err(ClientError::Refused { .. }) => Reply::Array(Vec::new()),
            Err(error) => return Err(error),
        };
        Ok(Status { sections: parse_info(&info), replicas: rows.items().iter().map(row_fields).collect() })
    }

    /// The value of an INFO field.
    pub fn field(&self, key: &str) -> Option<&str> {
        let all = self.sections.iter().flat_map(|(_, lines)| lines);
        all.into_iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// How many replicas are in this state.
    pub fn replicas_in_state(&self, state: &str) -> usize {
        let in_state = |row: &&Vec<(String, Reply)>| {
            row.iter().any(|(key, value)| key == "state" && value.text().as_deref() == Some(state))
        };
        self.replicas.iter().filter(in_state).count()
    }

    fn json(&self) -> serde_json::Value {
        let value = |text: &str| text.parse::<i64>().map_or_else(|_| text.into(), serde_json::Value::from);
        let section = |(title, lines): &(String, Vec<(String, String)>)| {
            let lines = lines.iter().map(|(key, text)| (key.clone(), value(text))).collect();
            (title.to_lowercase(), serde_json::Value::Object(lines))
        };
        let replica = |row: &Vec<(String, Reply)>| {
            let fields = row.iter().map(|(key, reply)| {
                let value = match reply {
                    Reply::Int(number) => serde_json::Value::from(*number),
                    other => other.text().map_or(serde_json::Value::Null, serde_json::Value::from),
                };
                (key.clone(), value)
            });
            serde_json::Value::Object(fields.collect())
        };
        let info: serde_json::Map<_, _> = self.sections.iter().map(section).collect();
        serde_json::json!({ "info": info, "replicas": self.replicas.iter().map(replica).collect::<Vec<_>>() })
    }

    fn text(&self, address: &str) -> String {
        let mut out = String::new();
        // Writing into a String cannot fail.
        let _ = self.write_text(&mut out, address);
        out
    }

    fn write_text(&self, out: &mut String, address: &str) -> std::fmt::Result {
        let field = |key| self.field(key).unwrap_or("-");
        let name = self.field("name").unwrap_or(address);
        let (role, since) = (self.role(), human_seconds(field("uptime_in_seconds")));
        writeln!(out, "{name} at {address}: {role}, epoch {}, up {since}", field("epoch"))?;
        if let Some(blocked_reason) = self.field("blocked_reason").filter(|blocked_reason| !blocked_reason.is_empty()) {
            writeln!(out, "BLOCKED          {blocked_reason}")?;
        }
        if let Some(slow) = self.field("flush_slow").filter(|slow| !slow.is_empty()) {
            writeln!(out, "SLOW DISK       {slow}")?;
        }
        let policy = self.field("sync_policy").filter(|policy| !policy.is_empty()).unwrap_or("none");
        writeln!(out, "commit level    {}, sync policy {policy}", field("commit_level"))?;
        writeln!(
            out,
            "log             end {}, written {}, flushed {}, applied {}, committed {}",
            field("end_lsn"),
            field("written_lsn"),
            field("flushed_lsn"),
            field("applied_lsn"),
            field("committed_lsn"),
        )?;
        if role != "leader" {
            let (lag, time) = (human_bytes(field("lag_bytes")), human_us(field("lag_us")));
            let behind = match field("lag_bytes") {
                "-1" => format!("not known: nothing was heard of a leader for {time}"),
                _ => format!("{lag}, {time}"),
            };
            writeln!(out, "behind          {behind}; link {}", field("master_link_status"))?;
        }
        self.write_flush(out)?;
        if self.replicas.is_empty() {
            if role == "leader" {
                writeln!(out, "\nno replica is known")?;
            }
            return Ok(());
        }
        writeln!(out)?;
        self.write_table(out)
    }

    fn role(&self) -> &str {
        match (self.field("node_role"), self.field("role")) {
            (Some(role), _) => role,
            (None, Some("master" | "leader")) => "leader",
            (None, Some(_)) => "replica",
            (None, None) => "unknown role",
        }
    }

    /// The sections about log, disk and wire as the node tells them, without the titles that their keys repeat.
    fn write_flush(&self, out: &mut String) -> std::fmt::Result {
        const KNOWN: [&str; 5] = ["server", "clients", "stats", "replication", "keyspace"];
        for (title, lines) in &self.sections {
            let title = title.to_lowercase();
            if KNOWN.contains(&title.as_str()) || lines.is_empty() {
                continue;
            }
            let lines: Vec<_> = lines.iter().filter(|(key, _)| key != "flush_slow").collect();
            let plain = |key: &str| key.strip_prefix(&format!("{title}_")).unwrap_or(key).replace('_', " ");
            let mut text = format!("{title:<16}");
            for (index, (key, value)) in lines.iter().enumerate() {
                let field = format!("{} {value}{}", plain(key), if index + 1 < lines.len() { ", " } else { "" });
                if text.len() + field.trim_end().len() > TEXT_COLUMNS {
                    writeln!(out, "{}", text.trim_end())?;
                    text = " ".repeat(16);
                }
                text.push_str(&field);
            }
            writeln!(out, "{}", text.trim_end())?;
        }
        Ok(())
    }

    fn write_table(&self, out: &mut String) -> std::fmt::Result {
        let cell = |row: &[(String, Reply)], key: &str| {
            let text = row.iter().find(|(name, _)| name == key).and_then(|(_, value)| value.text());
            let text = text.unwrap_or_else(|| "-".to_owned());
            match key {
                "lag_bytes" => human_bytes(&text),
                "lag_us" => human_us(&text),
                _ => text,
            }
        };
        let mut rows = vec![COLUMNS.map(|(title, ..)| title.to_owned())];
        rows.extend(self.replicas.iter().map(|row| COLUMNS.map(|(_, key, _)| cell(row, key))));
        let widths: Vec<usize> = (0..COLUMNS.len())
            .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
            .collect();
        for (number, row) in rows.iter().enumerate() {
            let cells = row.iter().zip(&widths).zip(COLUMNS).map(|((text, width), (.., right))| {
                if right { format!("{text:>width$}") } else { format!("{text:<width$}") }
            });
            writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
            if number == 0 {
                let line = widths.iter().map(|width| "-".repeat(*width));
                writeln!(out, "{}", line.collect::<Vec<_>>().join("  "))?;
            }
        }
        Ok(())
    }
}

fn parse_info(info: &str) -> Vec<(String, Vec<(String, String)>)> {
    let mut sections: Vec<(String, Vec<(String, String)>)> = Vec::new();
    for line in info.lines().map(str::trim).filter(|line| !line.is_empty()) {
        match (line.strip_prefix('#'), line.split_once(':'), sections.last_mut()) {
            (Some(title), ..) => sections.push((title.trim().to_owned(), Vec::new())),
            (None, Some((key, value)), Some((_, lines))) => lines.push((key.to_owned(), value.to_owned())),
            _ => {}
        }
    }
    sections
}

fn row_fields(row: &Reply) -> Vec<(String, Reply)> {
    let pairs = row.items().chunks_exact(2);
    pairs.filter_map(|pair| Some((pair[0].text()?, pair[1].clone()))).collect()
}

/// Bytes as people read them; anything else as it is.
fn human_bytes(text: &str) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let Ok(bytes) = text.parse::<u64>() else {
        return text.to_owned();
    };
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Microseconds as people read them; anything else as it is.
fn human_us(text: &str) -> String {
    match text.parse::<u64>() {
        Ok(us @ 0..1_000) => format!("{us} us"),
        Ok(us @ 1_000..1_000_000) => format!("{:.1} ms", us as f64 / 1e3),
        Ok(us) => format!("{:.1} s", us as f64 / 1e6),
        Err(_) => text.to_owned(),
    }
}

/// Seconds as people read them; anything else as it is.
fn human_seconds(text: &str) -> String {
    match text.parse::<u64>() {
        Ok(s @ 0..60) => format!("{s} s"),
        Ok(s @ 60..3_600) => format!("{} min", s / 60),
        Ok(s @ 3_600..86_400) => format!("{} h {} min", s / 3_600, s % 3_600 / 60),
        Ok(s) => format!("{} d {} h", s / 86_400, s % 86_400 / 3_600),
        Err(_) => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        let info = "# Server\r\nname:a\r\nuptime_in_seconds:75\r\n\r\n# Replication\r\nrole:master\r\nepoch:3\r\n\
                    end_lsn:0/5000\r\ncommit_level:remote_flush\r\nsync_policy:ANY 1 (b, c)\r\nblocked_reason:\r\n\r\n\
                    # Flush\r\nflush_count:12\r\nflush_device_us_p50:230\r\n";
        let text = |t: &str| Reply::Text(t.into());
        let row = Reply::Array(vec![
            text("name"),
            text("b"),
            text("state"),
            text("streaming"),
            text("sent_lsn"),
            text("0/5000"),
            text("lag_bytes"),
            Reply::Int(2_097_152),
            text("lag_us"),
            Reply::Int(1_500),
            text("sync_state"),
            text("quorum"),
        ]);
        Status { sections: parse_info(info), replicas: vec![row_fields(&row)] }
    }

    #[test]
    fn the_table_tells_role_policy_flush_and_replicas() {
        let text = status().text("127.0.0.1:6400");
        assert!(text.starts_with("a at 127.0.0.1:6400: leader, epoch 3, up 1 min\n"), "{text}");
        assert!(text.contains("commit level    remote_flush, sync policy ANY 1 (b, c)\n"));
        assert!(text.contains("flush           count 12, device us p50 230\n"), "{text}");
        assert!(!text.contains("BLOCKED") && !text.contains("SLOW DISK"));
        let mut slow = status();
        let (_, flush) = slow.sections.iter_mut().find(|(title, _)| title == "Flush").expect("a section");
        flush.push(("flush_slow".to_owned(), "the disk is slow: so much".to_owned()));
        let told = slow.text("127.0.0.1:6400");
        assert!(told.contains("SLOW DISK       the disk is slow: so much\n"), "{told}");
        assert!(told.contains("flush           count 12, device us p50 230\n"), "its figures stay as they are: {told}");
        let row = text.lines().last().unwrap();
        for cell in ["b", "streaming", "0/5000", "2.0 MiB", "1.5 ms", "quorum"] {
            assert!(row.contains(cell), "{cell} is missing in {row:?}");
        }
        assert_eq!(status().replicas_in_state("streaming"), 1);
    }

    #[test]
    fn silent_leader_is_told_in_place_of_a_lag() {
        let info = "# Replication\r\nrole:slave\r\nnode_role:leaderless\r\nmaster_link_status:down\r\nlag_bytes:-1\r\nlag_us:12000000\r\n";
        let text = Status { sections: parse_info(info), replicas: vec![] }.text("127.0.0.1:6400");
        assert!(text.starts_with("127.0.0.1:6400 at 127.0.0.1:6400: leaderless, epoch -"), "{text}");
        let behind = "behind          not known: nothing was heard of a leader for 12.0 s; link down\n";
        assert!(text.contains(behind), "{text}");
    }

    #[test]
    fn json_keeps_numbers_numbers() {
        let json = status().json();
        assert_eq!(json["info"]["server"]["uptime_in_seconds"], 75);
        assert_eq!(json["replicas"][0]["lag_bytes"], 2_097_152);
        assert_eq!(json["replicas"][0]["sync_state"], "quorum");
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!((human_bytes("0"), human_bytes("4096")), ("0 B".to_owned(), "4.0 KiB".to_owned()));
        assert_eq!((human_us("999"), human_us("2300000")), ("999 us".to_owned(), "2.3 s".to_owned()));
        assert_eq!((human_seconds("59"), human_seconds("90061")), ("59 s".to_owned(), "1 d 1 h".to_owned()));
        assert_eq!(human_bytes("-"), "-");
    }
}
