//! `power faults`: a node under load on a disk that fails in one way after another. What the node says has to name the file and the
//! LSN; it acknowledges nothing that the disk does not hold; and when the disk works again, everything acknowledged is there,
//! after a restart where the node had to stop, by itself where it had not.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::bench::{Bench, BenchArgs};
use crate::disk::{Disk, Fault, Moment, Mood, cut};
use crate::error::Failure;
use crate::machine::{Kit, Machine};
use crate::node::{self, Filesystem, FlushBy, MOUNT, Nodes};
use crate::promise::Promises;

/// Connections that write.
const WRITERS: usize = 4;
/// Values that are acknowledged before the disk fails.
const BEFORE: u64 = 60;
/// Values that are acknowledged after it works again, where the node goes on by itself.
const AFTER: u64 = 20;
/// They come within this time; the processor is emulated.
const PROGRESS_TIME_MAX: Duration = Duration::from_secs(120);
/// How long the disk fails.
const FAILS_FOR: Duration = Duration::from_secs(10);
/// Acknowledgements of what was durable before may still be on their way for so long after the disk stopped answering.
const ON_THE_WAY: Duration = Duration::from_secs(1);
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A way to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Way {
    /// Every write fails with EIO
    Write,
    /// One flush fails and loses what it should have flushed; the next one succeeds
    Flush,
    /// Reads fail: a running node needs none, a start does
    Read,
    /// The kernel makes the filesystem read-only
    ReadOnly,
    /// No space is left
    Full,
    /// The disk answers nothing for ten seconds
    Stall,
}

impl Way {
    const ALL: [Way; 6] = [Way::Write, Way::Flush, Way::Read, Way::ReadOnly, Way::Full, Way::Stall];

    fn name(self) -> String {
        self.to_possible_value().expect("no way is hidden").get_name().to_owned()
    }

    /// The node takes writes again without a restart once the disk works.
    fn heals_by_itself(self) -> bool {
        matches!(self, Way::Read | Way::Full | Way::Stall)
    }

    /// The node cannot go on, and has to say where it stopped.
    fn ends_the_log(self) -> bool {
        matches!(self, Way::Write | Way::Flush | Way::ReadOnly)
    }

    fn begin(self, disk: &Disk, machine: &mut Machine) -> Result<(), Failure> {
        match self {
            Way::Write => disk.set_fault(Fault { writes: true, ..Fault::default() }),
            Way::Flush => disk.set_fault(Fault { flushes: 1, ..Fault::default() }),
            Way::Read => {
                disk.set_fault(Fault { reads: true, ..Fault::default() });
                // A start has to read from the disk what the kernel remembers: it must fail, and say where.
                let said = machine.run(&format!(
                    "echo 3 >/proc/sys/vm/drop_caches; walferry log verify --data {MOUNT}/a 2>&1 && exit 1; true"
                ))?;
                println!("  `walferry log verify` says: {}", said.trim());
            }
            Way::ReadOnly => drop(machine.run("echo u >/proc/sysrq-trigger")?),
            Way::Full => drop(machine.run(&format!(
                "n=0; while fallocate -l 1048576 {MOUNT}/ballast.$n 2>/dev/null; do n=$((n+1)); done; true"
            ))?),
            Way::Stall => disk.set_fault(Fault { stalled: true, ..Fault::default() }),
        }
        Ok(())
    }

    fn end(self, disk: &Disk, machine: &mut Machine) -> Result<(), Failure> {
        disk.set_fault(Fault::default());
        if self == Way::Full {
            // In the journal at once, or the disk would be full again after the cut.
            machine.run(&format!("rm -f {MOUNT}/ballast.*; sync"))?;
        }
        Ok(())
    }
}

/// Flags of `power faults`.
#[derive(Debug, Args)]
pub struct FaultsArgs {
    /// Which filesystem
    #[arg(long, value_enum, default_value = "ext4")]
    filesystem: Filesystem,
    /// Which ways to fail [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    ways: Vec<Way>,
    /// How the log is flushed
    #[arg(long, value_enum, default_value = "fdatasync")]
    flush_by: FlushBy,
    #[command(flatten)]
    bench: BenchArgs,
}

/// Runs `power faults`.
pub fn run(args: &FaultsArgs) -> Result<(), Failure> {
    let kit = Kit::prepare(&args.bench.kit, &[])?;
    let mut wrong = 0;
    for way in if args.ways.is_empty() { Way::ALL.to_vec() } else { args.ways.clone() } {
        println!("{}, {}:", args.filesystem.name(), way.name());
        let complaints = play(args, &kit, way)?;
        complaints.iter().for_each(|complaint| println!("  WRONG: {complaint}"));
        wrong += usize::from(!complaints.is_empty());
    }
    if wrong == 0 {
        Ok(())
    } else {
        Err(Failure::failed(format_args!("{wrong} ways to fail were not survived as promised")))
    }
}

/// What a node under load has acknowledged.
struct Load {
    disk: Disk,
    promises: Arc<Mutex<Promises>>,
}

impl Load {
    fn now(&self) -> Moment {
        self.disk.state().stamp()
    }

    fn acknowledged(&self) -> u64 {
        let now = self.now();
        self.promises.lock().expect("the promises' lock").total(now)
    }

    /// True when so many were acknowledged in time.
    fn reaches(&self, count: u64) -> bool {
        let deadline = Instant::now() + PROGRESS_TIME_MAX;
        while self.acknowledged() < count {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        true
    }
}

fn play(args: &FaultsArgs, kit: &Kit, way: Way) -> Result<Vec<String>, Failure> {
    let mut wrong = Vec::new();
    let disk = Disk::new(args.filesystem.make(&kit.dir)?, way as u64);
    let load = Load { disk: disk.clone(), promises: Arc::default() };
    let mut machine = Machine::boot(kit, &disk, args.filesystem, args.bench.bus, &load.promises)?;
    disk.state().record();
    let (nodes, device, name) = (Nodes::one(args.flush_by), args.bench.bus.device(), args.filesystem.name());
    machine.run(&format!("mount -t {name} {device} {MOUNT}\n{}", nodes.start_all(1)))?;
    machine.run(&format!(
        "power write --addresses {} --writers {WRITERS} --level local >/mnt/write.log 2>&1 &",
        nodes.addresses()
    ))?;
    if !load.reaches(BEFORE) {
        return Err(Failure::failed("nothing is acknowledged while the disk works"));
    }
    way.begin(&disk, &mut machine)?;
    let before = load.acknowledged();
    std::thread::sleep(ON_THE_WAY);
    let on_the_way = load.acknowledged();
    std::thread::sleep(FAILS_FOR - ON_THE_WAY);
    let during = load.acknowledged();
    println!(
        "  acknowledged: {before} before, {} within {ON_THE_WAY:?}, {} later",
        on_the_way - before,
        during - on_the_way
    );
    if way == Way::Stall && during > on_the_way {
        wrong.push(format!("{} values were acknowledged by a disk that answered nothing", during - on_the_way));
    }
    way.end(&disk, &mut machine)?;
    if way.heals_by_itself() {
        let wanted = load.acknowledged() + AFTER;
        match load.reaches(wanted) {
            true => println!("  goes on by itself"),
            false => wrong.push(format!("does not go on within {PROGRESS_TIME_MAX:?} of the disk's return")),
        }
    }
    let said = machine.run("grep -E ' (ERROR|WARN) |^walferry: ' /mnt/a.log | tail -n 4; kill -0 $(cat /mnt/a.pid) 2>/dev/null && echo the process runs || echo the process has ended")?;
    said.lines().for_each(|line| println!("  {line}"));
    if way.ends_the_log() && !said.lines().any(names_file_and_lsn) {
        wrong.push("no line of its log names the file and the LSN".to_owned());
    }
    machine.cut()?;
    let trace = disk.state().recorded();
    println!("  the disk did {} writes and {} flushes", trace.writes.len(), trace.flushes.len());
    let mut bench = Bench::new(kit, &args.bench, &disk, args.filesystem, nodes, WRITERS)?;
    let end = load.now();
    // The cache goes with the power: an acknowledgement that no flush stands behind is a broken promise.
    let mut state = disk.state();
    state.image.reset();
    cut(&mut state.image, &trace, end, Mood::Lose, &mut StdRng::seed_from_u64(way as u64));
    drop(state);
    match bench.look()?.outcome {
        Err(complaint) => wrong.push(complaint),
        Ok(text) => {
            let held = node::held(&text, WRITERS)?;
            let promises = load.promises.lock().expect("the promises' lock");
            let broken = promises.broken(end, &held);
            println!("  after a restart: {} acknowledged, {} broken promises", promises.total(end), broken.len());
            wrong.extend(broken.iter().map(ToString::to_string));
        }
    }
    Ok(wrong)
}

/// Says where: a path in the data directory, and a position such as `0/5000`.
fn names_file_and_lsn(line: &str) -> bool {
    let is_lsn = |word: &str| {
        let word = word.trim_matches(|c: char| !c.is_ascii_hexdigit());
        word.split_once('/').is_some_and(|(high, low)| {
            [high, low].iter().all(|part| !part.is_empty() && part.chars().all(|c| c.is_ascii_hexdigit()))
        })
    };
    line.contains(MOUNT) && line.split_whitespace().any(is_lsn)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_to_name_file_and_lsn() {
        assert!(names_file_and_lsn("ERROR cannot write /mnt/data/a/log/0.wal at LSN 0/5000: I/O error"));
        assert!(names_file_and_lsn("ERROR /mnt/data/a/log/0.wal (1/A0F000)"));
        assert!(!names_file_and_lsn("ERROR cannot write /mnt/data/a/log/0.wal: I/O error"));
        assert!(!names_file_and_lsn("ERROR stopped at 0/5000"));
    }
}
