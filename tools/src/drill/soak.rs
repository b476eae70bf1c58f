//! What must not grow in a long drill: each node's memory and file descriptors, and segments that nothing needs. Takes a sample
//! of every process before each fault; judges them at the end. A process that was started again counts anew, after the warm-up.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use walferry_engine::lsn::Lsn;
use walferry_engine::retain::Needs;
use walferry_engine::segment::list_segments;

use super::cluster::Cluster;
use super::member::Site;
use super::own::{CLIENT_PORT, KEEP_BYTES_MIN, Own, SEGMENT_BYTES};
use super::table::Table;
use crate::client::info_field;
use crate::failure::Failure;
use crate::inspect;

/// A process's caches fill in its first time: until then it says nothing about leaks.
const WARM_AGE: Duration = Duration::from_secs(90);
/// The first so many samples in a hundred say nothing either: buffers go round once, the store's cache fills.
const WARM_UP_PERCENT: usize = 20;
/// Samples that can be judged: a third each at the beginning and at the end.
const SAMPLES_MIN: usize = 6;
/// The same for one process by itself: a third of fewer would be too few for one that stood out.
const SAMPLES_OF_PROCESS_MIN: usize = 12;
/// The state of a listening socket in `net/tcp`.
const TCP_LISTEN: &str = "0A";
/// The median of the last third may be above that of the first one by so much, for allocators are not exact.
const RSS_GROWTH_PERCENT_MAX: f64 = 10.0;
/// The same for descriptors beside those of clients: a leader has more links than a replica.
const DESCRIPTORS_GROWTH_MAX: f64 = 4.0;
/// The same for clients' connections, all nodes together: the drill has as many clients all the time, and lets go of those that fail.
const CLIENTS_GROWTH_MAX: f64 = 8.0;
/// Segments that are needed no more and still there: what was released since the last checkpoint, and a slot's last save.
const LEFT_BEHIND_MAX: usize = 2;

/// Limits of a soak's nodes, so small that they are reached while it warms up.
pub const FLAGS: [&str; 6] =
    ["--checkpoint-bytes", "4MiB", "--store-cache-bytes", "16MiB", "--log-buffer-bytes", "64MiB"];

/// One process at one moment.
#[derive(Clone, Debug)]
struct Sample {
    at: Duration,
    name: String,
    age: Duration,
    rss_bytes: u64,
    /// Of these its own: without the binary, and the log buffer, which has its size from the start and is mapped twice.
    private_bytes: u64,
    /// All of them, and how many are clients' connections: those come and go with the leader.
    descriptors: usize,
    clients: usize,
    /// Files in its log, and how many of them nothing needs.
    segments: usize,
    left_behind: usize,
}

/// A soak while it runs.
#[derive(Debug)]
pub struct Soak {
    started: Instant,
    every: Duration,
    ends: Duration,
    samples: Vec<Sample>,
    /// What each node's log says at the end: that it is clean, or what is wrong with it.
    verified: Vec<(String, Result<String, String>)>,
}

impl Soak {
    /// Begins now.
    pub fn new(lasts: Duration, every: Duration) -> Soak {
        Soak { started: Instant::now(), every, ends: lasts, samples: Vec::new(), verified: Vec::new() }
    }

    /// Faults that fit.
    pub fn rounds(lasts: Duration, every: Duration) -> usize {
        (lasts.as_secs_f64() / every.as_secs_f64()) as usize
    }

    /// Waits for the turn of a fault and takes a sample of every node.
    pub fn wait_and_sample(&mut self, round: usize, cluster: &Cluster) -> Result<String, Failure> {
        let turn = (self.every * round as u32).min(self.ends);
        std::thread::sleep(turn.saturating_sub(self.started.elapsed()));
        let Site::Own(own) = &cluster.site else { return Ok(String::new()) };
        let first = self.samples.len();
        for member in &cluster.members {
            let sample = self.sample(own, cluster, &member.name)?;
            self.samples.push(sample);
        }
        Ok(line(&self.samples[first..]))
    }

    fn sample(&self, own: &Own, cluster: &Cluster, name: &str) -> Result<Sample, Failure> {
        let (process, age) = own.process(name)?;
        let info = cluster.client(name)?.call(&["INFO"]).map_err(Failure::failed)?.text().unwrap_or_default();
        let lsn = |key: &str| info_field(&info, key).and_then(|text| text.parse::<Lsn>().ok());
        let missing = || Failure::failed(format_args!("{name}: INFO tells no flushed_lsn or no store_checkpoint_lsn"));
        let flushed = lsn("flushed_lsn").ok_or_else(missing)?;
        let node = lsn("store_checkpoint_lsn").ok_or_else(missing)?;
        // After INFO: what has gone meanwhile is not missed.
        let log = own.dir.join(name).join("log");
        let files = list_segments(&log).map_err(|error| Failure::failed(format_args!("{}: {error}", log.display())))?;
        let needs = Needs { node, taken: flushed, flushed, keep_bytes_min: KEEP_BYTES_MIN };
        let oldest = needs.oldest_segment(SEGMENT_BYTES);
        let proc = Path::new("/proc").join(process.to_string());
        let status = std::fs::read_to_string(proc.join("status"))?;
        let memory = |key: &str| {
            bytes_of(&status, key).ok_or_else(|| Failure::failed(format_args!("{name}: no {key} in its status")))
        };
        let (descriptors, clients) = descriptors(&proc)?;
        Ok(Sample {
            at: self.started.elapsed(),
            name: name.to_owned(),
            age,
            rss_bytes: memory("VmRSS:")?,
            private_bytes: memory("RssAnon:")?,
            descriptors,
            clients,
            segments: files.len(),
            left_behind: files.iter().filter(|number| **number < oldest).count(),
        })
    }

    /// Verifies the log of every node; they have ended. What is wrong is part of the verdict, so that all else is told as well.
    pub fn verify(&mut self, own: &Own) {
        let verify = |name: &String| {
            let found = inspect::verified_clean(&own.dir.join(name));
            (name.clone(), found.map_err(|failure| failure.to_string()))
        };
        self.verified = own.names().iter().map(verify).collect();
    }

    /// What processes had after the warm-up, in order; of one node or of all.
    fn judged(&self, name: Option<&str>, of: impl Fn(&Sample) -> f64) -> Vec<f64> {
        let warm = self.warm();
        let is_warm = |sample: &&Sample| sample.at >= warm && sample.age >= WARM_AGE;
        let wanted = |sample: &&Sample| name.is_none_or(|name| sample.name == name);
        self.samples.iter().filter(is_warm).filter(wanted).map(of).collect()
    }

    /// The same of each process by itself, with its name: one that grows is not to hide behind others that were started again.
    fn processes(&self) -> Vec<(&str, Vec<&Sample>)> {
        let mut names: Vec<&str> = self.samples.iter().map(|sample| sample.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        let warm = self.warm();
        let mut processes = Vec::new();
        for name in names {
            let of_node: Vec<&Sample> = self.samples.iter().filter(|sample| sample.name == name).collect();
            for process in of_node.chunk_by(|one, next| one.age <= next.age) {
                let is_warm = process.iter().filter(|sample| sample.at >= warm && sample.age >= WARM_AGE);
                processes.push((name, is_warm.copied().collect()));
            }
        }
        processes
    }

    /// At each moment after the warm-up, how many connections of clients all nodes had.
    fn clients_together(&self) -> Vec<f64> {
        let warm = self.warm();
        // The samples of one moment are taken one after another, the nodes in the same order each time.
        let first = self.samples.first().map(|sample| sample.name.clone());
        let moments = self.samples.chunk_by(|_, next| Some(&next.name) != first.as_ref());
        let is_warm = moments.filter(|moment| moment[0].at >= warm);
        is_warm.map(|moment| moment.iter().map(|sample| sample.clients as f64).sum()).collect()
    }

    /// When the warm-up ends.
    fn warm(&self) -> Duration {
        let [Some(first), Some(last)] = [self.samples.first(), self.samples.last()] else { return Duration::ZERO };
        first.at + (last.at - first.at) * WARM_UP_PERCENT as u32 / 100
    }

    /// What was found, in sentences; an error when something grew.
    pub fn verdict(&self) -> (Vec<String>, Option<String>) {
        let (mut said, mut wrong) = (Vec::new(), Vec::new());
        let mut judge = |what: &str, values: Vec<f64>, bound: &str, max: &dyn Fn(f64) -> f64| match thirds(&values)
            .filter(|_| values.len() >= SAMPLES_MIN)
        {
            None => said.push(format!("{what}: too few samples of warm processes to judge")),
            Some([first, middle, last]) => {
                let flat = last <= max(first);
                let word = if flat { "flat" } else { "GROWS" };
                said.push(format!(
                    "{what}, median: {first:.1} in the first third, {middle:.1} in the second, \
                     {last:.1} in the last, at most {bound} allowed: {word}"
                ));
                if !flat {
                    wrong.push(format!("{what} grew from {first:.1} to {last:.1}"));
                }
            }
        };
        let memory_max = |first| first * (1.0 + RSS_GROWTH_PERCENT_MAX / 100.0);
        let memory_bound = format!("{RSS_GROWTH_PERCENT_MAX} % more");
        let own_max = |first| first + DESCRIPTORS_GROWTH_MAX;
        let own_bound = format!("{DESCRIPTORS_GROWTH_MAX} more");
        judge("private memory, MiB", self.judged(None, private), &memory_bound, &memory_max);
        judge("file descriptors beside clients'", self.judged(None, own_descriptors), &own_bound, &own_max);
        for (name, samples) in
            self.processes().into_iter().filter(|(_, samples)| samples.len() >= SAMPLES_OF_PROCESS_MIN)
        {
            let minute = samples[0].at.as_secs_f64() / 60.0;
            let of = |figure: Figure| samples.iter().map(|sample| figure(sample)).collect();
            judge(
                &format!("{name} from minute {minute:.0}: private memory, MiB"),
                of(private),
                &memory_bound,
                &memory_max,
            );
            let what = format!("{name} from minute {minute:.0}: file descriptors beside clients'");
            judge(&what, of(own_descriptors), &own_bound, &own_max);
        }
        let bound = format!("{CLIENTS_GROWTH_MAX} more");
        let clients = self.clients_together();
        judge("clients' connections, all nodes together", clients, &bound, &|first| first + CLIENTS_GROWTH_MAX);
        let most = self.samples.iter().max_by_key(|sample| sample.left_behind);
        let left = most.map_or(0, |sample| sample.left_behind);
        said.push(format!("segments that nothing needs: {left} at most at once"));
        if let Some(sample) = most.filter(|_| left > LEFT_BEHIND_MAX) {
            wrong.push(format!("{}: {left} of {} segments are needed by nothing", sample.name, sample.segments));
        }
        for (name, found) in &self.verified {
            match found {
                Ok(text) => said.push(format!("{name}: {text}")),
                Err(text) => wrong.push(format!("{name}: {text}")),
            }
        }
        (said, (!wrong.is_empty()).then(|| wrong.join("; ")))
    }

    /// Of each node, what its warm processes had at the start, in the middle and at the end: medians of the thirds.
    pub fn summary(&self) -> Table {
        let mut table = Table::new(&["node", "what", "start", "middle", "end", "most", "samples"]);
        let mut names: Vec<&str> = self.samples.iter().map(|sample| sample.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        let what: [(&str, Figure); 5] = [
            ("RSS MiB", mebibytes),
            ("private MiB", private),
            ("descriptors", |sample| sample.descriptors as f64),
            ("beside clients'", own_descriptors),
            ("segments", |sample| sample.segments as f64),
        ];
        for name in names {
            for (what, of) in what {
                let values = self.judged(Some(name), of);
                let number = |value: f64| format!("{value:.1}");
                let mut row = vec![name.to_owned(), what.to_owned()];
                row.extend(
                    thirds(&values).map_or(["-".to_owned(), "-".to_owned(), "-".to_owned()], |all| all.map(number)),
                );
                row.push(values.iter().copied().reduce(f64::max).map_or("-".to_owned(), number));
                row.push(values.len().to_string());
                table.row(row);
            }
        }
        table
    }

    /// Every sample.
    pub fn table(&self) -> Table {
        let mut table = Table::new(&[
            "minute",
            "node",
            "age",
            "RSS MiB",
            "private",
            "descriptors",
            "of clients",
            "segments",
            "not needed",
        ]);
        for sample in &self.samples {
            table.row(vec![
                format!("{:.1}", sample.at.as_secs_f64() / 60.0),
                sample.name.clone(),
                format!("{} s", sample.age.as_secs()),
                format!("{:.1}", mebibytes(sample)),
                format!("{:.1}", private(sample)),
                sample.descriptors.to_string(),
                sample.clients.to_string(),
                sample.segments.to_string(),
                sample.left_behind.to_string(),
            ]);
        }
        table
    }

    /// Every sample, for programs.
    pub fn json(&self) -> Value {
        let sample = |sample: &Sample| {
            json!({
                "at_s": sample.at.as_secs_f64(),
                "node": sample.name,
                "age_s": sample.age.as_secs_f64(),
                "rss_bytes": sample.rss_bytes,
                "private_bytes": sample.private_bytes,
                "descriptors": sample.descriptors,
                "clients": sample.clients,
                "segments": sample.segments,
                "segments_not_needed": sample.left_behind,
            })
        };
        let (said, wrong) = self.verdict();
        json!({ "samples": self.samples.iter().map(sample).collect::<Vec<_>>(), "said": said, "wrong": wrong })
    }
}

/// One number of a sample.
type Figure = fn(&Sample) -> f64;

fn mebibytes(sample: &Sample) -> f64 {
    sample.rss_bytes as f64 / f64::from(1 << 20)
}

fn private(sample: &Sample) -> f64 {
    sample.private_bytes as f64 / f64::from(1 << 20)
}

fn own_descriptors(sample: &Sample) -> f64 {
    sample.descriptors.saturating_sub(sample.clients) as f64
}

/// The medians of the first, the second and the last third; `None` of less than three.
fn thirds(values: &[f64]) -> Option<[f64; 3]> {
    let third = values.len() / 3;
    let rest = values.len() - third;
    (third > 0).then(|| [&values[..third], &values[third..rest], &values[rest..]].map(median))
}

fn line(samples: &[Sample]) -> String {
    let one = |sample: &Sample| {
        let Sample { name, descriptors, clients, segments, left_behind, .. } = sample;
        format!(
            "{name} {:.0} MiB ({:.0} private), {descriptors} fds ({clients} of clients), {segments} segments ({left_behind} not needed)",
            mebibytes(sample),
            private(sample)
        )
    };
    samples.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// A process's descriptors, and how many of them are clients' connections. The kernel tells both in one moment: INFO would count the
/// clients a tenth of a second before, and after a pause those that gave up meanwhile are as many as the others.
fn descriptors(proc: &Path) -> std::io::Result<(usize, usize)> {
    let sockets = || std::fs::read_to_string(proc.join("net/tcp")).map(|table| client_sockets(&table));
    let mut of_clients = sockets()?;
    let mut links = Vec::new();
    for entry in std::fs::read_dir(proc.join("fd"))? {
        // One that is closed by now is none.
        links.extend(std::fs::read_link(entry?.path()));
    }
    of_clients.append(&mut sockets()?);
    let clients = links.iter().filter(|link| of_clients.contains(&*link.to_string_lossy())).count();
    Ok((links.len(), clients))
}

/// The connections on the port for clients in a process's `net/tcp`, as links of its descriptors name them.
fn client_sockets(table: &str) -> BTreeSet<String> {
    let port = format!(":{CLIENT_PORT:04X}");
    let socket = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (local, state, inode) = (words.get(1)?, words.get(3)?, words.get(9)?);
        (local.ends_with(&port) && *state != TCP_LISTEN).then(|| format!("socket:[{inode}]"))
    };
    table.lines().filter_map(socket).collect()
}

/// A size in a process's `status`.
fn bytes_of(status: &str, key: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kilobytes| kilobytes << 10)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soak(samples: impl IntoIterator<Item = (u64, u64, u64)>) -> Soak {
        let mut soak = Soak::new(Duration::from_secs(1800), Duration::from_secs(60));
        soak.samples.extend(samples.into_iter().map(|(minute, age_s, mebibytes)| Sample {
            at: Duration::from_secs(minute * 60),
            name: "a".to_owned(),
            age: Duration::from_secs(age_s),
            rss_bytes: mebibytes << 20,
            private_bytes: mebibytes << 20,
            descriptors: 40,
            clients: 10,
            segments: 6,
            left_behind: 1,
        }));
        soak
    }

    #[test]
    fn memory_that_grows_after_the_warm_up_is_found() {
        assert_eq!(soak((0..30).map(|minute| (minute, 100 + minute, 100))).verdict().1, None);
        assert_eq!(soak((0..30).map(|minute| (minute, 100, 100.min(20 + minute * 20)))).verdict().1, None, "warms up");
        let wrong = soak((0..30).map(|minute| (minute, 100, 100 + minute))).verdict().1;
        assert!(wrong.is_some_and(|text| text.contains("memory") && !text.contains("descriptors")));
    }

    #[test]
    fn growing_process_is_found_beside_a_restarted_one() {
        let mut soak = soak((0..60).map(|number| (number / 2, 100 + number / 2 * 60, 100)));
        for (number, sample) in soak.samples.iter_mut().enumerate() {
            let minute = number as u64 / 2;
            if number % 2 == 0 {
                sample.private_bytes = (100 + minute) << 20;
            } else {
                sample.name = "b".to_owned();
                sample.private_bytes = if minute < 20 { 120 << 20 } else { 60 << 20 };
                sample.age = Duration::from_secs(if minute < 20 { 100 + minute * 60 } else { (minute - 20) * 60 });
            }
        }
        assert_eq!(soak.processes().iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["a", "b", "b"]);
        let wrong = soak.verdict().1.expect("a grows by a quarter");
        assert!(wrong.starts_with("a from minute 6: private memory"), "{wrong}");
    }

    #[test]
    fn young_processes_and_a_few_samples_prove_nothing() {
        let young = |minute| (minute, if minute % 2 == 0 { 10 } else { 120 }, if minute % 2 == 0 { 5 } else { 100 });
        assert_eq!(thirds(&soak((0..30).map(young)).judged(None, mebibytes)), Some([100.0; 3]));
        let (said, wrong) = soak((0..5).map(|minute| (minute, 100, 100 << minute))).verdict();
        assert!(wrong.is_none() && said[0].contains("too few"), "{said:?}");
    }

    #[test]
    fn connections_of_clients_count_for_all_nodes_together() {
        let mut soak = soak((0..30).flat_map(|minute| [(minute, 100, 100); 2]));
        for (number, sample) in soak.samples.iter_mut().enumerate() {
            sample.name = ["a", "b"][number % 2].to_owned();
            // The leader moves; its clients move with it.
            let leads = (number / 2 % 2 == 0) == (sample.name == "a");
            (sample.clients, sample.descriptors) = if leads { (30, 60) } else { (2, 32) };
        }
        assert_eq!((soak.verdict().1, thirds(&soak.clients_together())), (None, Some([32.0; 3])));
        soak.samples.iter_mut().for_each(|sample| sample.clients += sample.at.as_secs() as usize / 60);
        let wrong = soak.verdict().1;
        assert!(wrong.is_some_and(|text| text.contains("clients' connections")));
    }

    #[test]
    fn client_count_includes_connections_that_hung_up() {
        let table = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0200C6C6:1900 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 101 1 0 100 0 0 10 0
   1: 0200C6C6:1900 0100C6C6:9C40 01 00000000:00000000 00:00000000 00000000     0        0 102 1 0 20 4 0 10 -1
   2: 0200C6C6:1900 0100C6C6:9C41 08 00000000:00000000 00:00000000 00000000     0        0 103 1 0 20 4 0 10 -1
   3: 0200C6C6:1901 0300C6C6:1900 01 00000000:00000000 00:00000000 00000000     0        0 104 1 0 20 4 0 10 -1
";
        assert_eq!(client_sockets(table).into_iter().collect::<Vec<_>>(), ["socket:[102]", "socket:[103]"]);
    }

    #[test]
    fn each_node_shows_its_start_middle_and_end() {
        let text = soak((0..30).map(|minute| (minute, 100, 100 + minute))).summary().text();
        let rss = text.lines().find(|line| line.contains("RSS")).expect("a row");
        let cells: Vec<&str> = rss.split_whitespace().collect();
        assert_eq!(cells, ["a", "RSS", "MiB", "110.0", "118.0", "126.0", "129.0", "24"], "{text}");
        assert!(text.lines().any(|line| line.contains("beside clients'") && line.contains("30.0")), "{text}");
    }

    #[test]
    fn descriptors_that_are_nobodys_connections_may_not_pile_up() {
        let mut soak = soak((0..30).map(|minute| (minute, 100, 100)));
        for sample in &mut soak.samples {
            sample.descriptors += sample.at.as_secs() as usize / 60 / 3;
        }
        let wrong = soak.verdict().1;
        assert!(wrong.is_some_and(|text| text.contains("file descriptors beside") && !text.contains("memory")));
    }

    #[test]
    fn unclean_log_fails_the_soak() {
        let mut soak = soak((0..30).map(|minute| (minute, 100, 100)));
        soak.verified.push(("a".to_owned(), Ok("no damage".to_owned())));
        assert_eq!(soak.verdict().1, None);
        let nowhere = inspect::verified_clean(Path::new("/nonexistent")).map_err(|failure| failure.to_string());
        soak.verified.push(("b".to_owned(), nowhere));
        let (said, wrong) = soak.verdict();
        assert!(wrong.is_some_and(|text| text.starts_with("b: ")) && said.contains(&"a: no damage".to_owned()));
    }

    #[test]
    fn segments_that_nothing_needs_are_named() {
        let mut soak = soak([(1, 100, 100)]);
        soak.samples[0].left_behind = 3;
        assert!(soak.verdict().1.is_some_and(|text| text.contains("3 of 6 segments")));
    }
}
