//! `power faults`: a node under load on a disk that fails in one way after another. What the node says has to name the file and the
//! LSN; it acknowledges nothing that the disk does not hold; and when the disk works again, everything acknowledged is there,
//! after a restart where the node had to stop, by itself where it had not. Where another member holds what the disk lost, nobody
//! has to do anything.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::bench::{Bench, BenchArgs};
use crate::disk::{Disk, Fault, Moment, Mood, cut};
use crate::error::Failure;
use crate::machine::{Kit, Machine, SCRIPT_TIME_MAX};
use crate::node::{self, Filesystem, FlushBy, MOUNT, Nodes};
use crate::promise::Promises;

/// Connections that write.
const WRITERS: usize = 4;
/// Values that are acknowledged before the disk fails; three members on one emulated processor are slow.
const BEFORE: u64 = 60;
const BEFORE_OF_MEMBERS: u64 = 12;
/// Values that are acknowledged after it works again, where the node goes on by itself.
const AFTER: u64 = 20;
/// They come within this time; the processor is emulated.
const PROGRESS_TIME_MAX: Duration = Duration::from_secs(300);
/// How long the disk fails.
const FAILS_FOR: Duration = Duration::from_secs(10);
/// Acknowledgements of what was durable before may still be on their way for so long after the disk stopped answering.
const ON_THE_WAY: Duration = Duration::from_secs(1);
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Where in the first segment the bad sector is: in a frame that was acknowledged long before.
const BAD_AT: u64 = 8192;
const SECTOR_BYTES: u64 = 512;
/// Values that fill a disk: more than the segments hold that a node has ready, in few keys.
const FILL: u64 = 1024;
const FILL_BYTES: u64 = 128 << 10;
/// What a full disk has left where the store is to go on: less than a segment.
const SPACE_MIB: u32 = 8;
/// A full disk refuses something, or ends the node, within this time.
const FULL_TIME_MAX: Duration = Duration::from_secs(240);

/// A way to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Way {
    /// Every write fails with EIO
    Write,
    /// One flush fails and loses what it should have flushed; the next one succeeds
    Flush,
    /// A bad sector in the log of a node that is alone: it does not start, and says where
    Read,
    /// A bad sector in the log of one of three members: it starts, and gets from another what it cannot read
    BadSector,
    /// The kernel makes the filesystem read-only
    ReadOnly,
    /// Less is left than a segment: writes are refused when those that were ready are full, and the node goes on
    Full,
    /// Not one block is left: writes are refused, or the store cannot go on either and the node ends
    FullToTheBlock,
    /// The disk answers nothing for ten seconds
    Stall,
}

impl Way {
    const ALL: [Way; 8] =
        [Way::Write, Way::Flush, Way::Read, Way::BadSector, Way::ReadOnly, Way::Full, Way::FullToTheBlock, Way::Stall];

    fn name(self) -> String {
        self.to_possible_value().expect("no way is hidden").get_name().to_owned()
    }

    fn nodes(self, flush_by: FlushBy) -> Nodes {
        match self {
            Way::BadSector => Nodes::three(flush_by),
            Way::Full | Way::FullToTheBlock => Nodes::one(flush_by).keeping_all(),
            _ => Nodes::one(flush_by),
        }
    }

    fn level(self) -> &'static str {
        if self == Way::BadSector { "remote_flush" } else { "local" }
    }

    fn before(self) -> u64 {
        if self == Way::BadSector { BEFORE_OF_MEMBERS } else { BEFORE }
    }

    /// The node that meets the fault.
    fn victim(self) -> &'static str {
        if self == Way::BadSector { "c" } else { "a" }
    }

    /// Once the disk works the node takes writes again: without a restart, or after one where it had to end.
    fn serves_again(self) -> bool {
        matches!(self, Way::Read | Way::BadSector | Way::Full | Way::FullToTheBlock | Way::Stall)
    }

    fn fills(self) -> bool {
        matches!(self, Way::Full | Way::FullToTheBlock)
    }

    /// The node cannot go on, or not start, and has to say where it stopped.
    fn ends_the_node(self) -> bool {
        matches!(self, Way::Write | Way::Flush | Way::Read | Way::ReadOnly)
    }

    /// Lets the disk fail. What the node does wrong then.
    fn begin(self, disk: &Disk, machine: &mut Machine, nodes: Nodes) -> Result<Vec<String>, Failure> {
        let fault = Fault::default();
        match self {
            Way::Write => disk.set_fault(Fault { writes: true, ..fault }),
            Way::Flush => disk.set_fault(Fault { flushes: 1, ..fault }),
            Way::Stall => disk.set_fault(Fault { stalled: true, ..fault }),
            Way::ReadOnly => drop(machine.run("echo u >/proc/sysrq-trigger")?),
            Way::Read | Way::BadSector => return self.start_with_a_bad_sector(disk, machine, nodes),
            Way::Full | Way::FullToTheBlock => return self.fill_up(machine, nodes),
        }
        Ok(Vec::new())
    }

    fn start_with_a_bad_sector(self, disk: &Disk, machine: &mut Machine, nodes: Nodes) -> Result<Vec<String>, Failure> {
        let name = self.victim();
        let place = machine.run(&format!(
            "{}\nsync; power place --file {MOUNT}/{name}/log/{:016X}.wal --offset {BAD_AT}",
            nodes.kill(name),
            0
        ))?;
        let place: u64 = place.trim().parse().map_err(|_| Failure::failed(format_args!("no place: {place}")))?;
        disk.set_fault(Fault { bad: Some((place, place + SECTOR_BYTES)), ..Fault::default() });
        let start = format!("echo 3 >/proc/sys/vm/drop_caches\n{}\n{}", nodes.spawn(name), nodes.wait(name));
        let serves = machine.ask(&start, SCRIPT_TIME_MAX)?.0 == 0;
        let mut wrong = Vec::new();
        if self == Way::Read {
            if serves {
                wrong.push("it serves, although it cannot read its log".to_owned());
            }
            return Ok(wrong);
        }
        let log = machine.run(&format!("cat /mnt/{name}.log"))?;
        if !serves {
            wrong.push("it does not start, although two others hold what it cannot read".to_owned());
        } else if !log.lines().any(|line| line.contains("repaired ") && line.contains(MOUNT)) {
            wrong.push(format!("it starts, and says nothing of a repair:\n{log}"));
        }
        if disk.state().fault.bad.is_some() {
            wrong.push("nothing was written over the bad sector".to_owned());
        }
        let (code, said) = machine.ask(&nodes.verify(1), SCRIPT_TIME_MAX)?;
        if code != 0 {
            wrong.push(format!("after the repair: {}", said.trim()));
        }
        Ok(wrong)
    }

    /// Fills the disk, then writes more than the segments hold that the node made before.
    fn fill_up(self, machine: &mut Machine, nodes: Nodes) -> Result<Vec<String>, Failure> {
        let last = match self {
            Way::FullToTheBlock => format!("dd if=/dev/zero of={MOUNT}/ballast bs=4096 2>/dev/null"),
            _ => format!("n=0; while [ $n -lt {SPACE_MIB} ]; do rm {MOUNT}/ballast.$n; n=$((n+1)); done"),
        };
        machine.run(&format!(
            "n=0; while fallocate -l 1048576 {MOUNT}/ballast.$n 2>/dev/null; do n=$((n+1)); done; {last}; sync; power fill \
             --address {} --level local --count {FILL} --bytes {FILL_BYTES} >/mnt/fill.log 2>&1 &",
            nodes.address("a")
        ))?;
        let deadline = Instant::now() + FULL_TIME_MAX;
        loop {
            let said = machine.run("cat /mnt/fill.log; grep -m 1 NOSPACE /mnt/write.log || true")?;
            let refused = said.lines().find(|line| line.contains("NOSPACE"));
            let ended = !runs(machine, "a")?;
            let in_time = Instant::now() < deadline;
            let wrong = match (self, refused.is_some(), ended) {
                (Way::Full, _, true) => vec!["the node ended, although there was space for its store".to_owned()],
                (Way::FullToTheBlock, _, true) | (Way::Full, true, false) => Vec::new(),
                _ if in_time => {
                    std::thread::sleep(POLL_INTERVAL * 10);
                    continue;
                }
                // The store happened to need no block of its own.
                (Way::FullToTheBlock, true, false) => Vec::new(),
                _ => vec![format!("nothing came of a full disk within {FULL_TIME_MAX:?}: {}", said.trim())],
            };
            refused.iter().for_each(|line| println!("  {}", line.trim()));
            return Ok(wrong);
        }
    }

    /// The disk works again, and a node that has ended is started, as a service manager does.
    fn end(self, disk: &Disk, machine: &mut Machine, nodes: Nodes) -> Result<(), Failure> {
        disk.set_fault(Fault::default());
        if self.fills() {
            // In the journal at once, or the disk would be full again after the cut.
            machine.run(&format!("rm -f {MOUNT}/ballast*; sync"))?;
        }
        if self.serves_again() && !runs(machine, self.victim())? {
            println!("  the node has ended; it is started again");
            let name = self.victim();
            machine.run(&format!(
                "{}\n{} || {{ tail -n 5 /mnt/{name}.log; exit 1; }}",
                nodes.spawn(name),
                nodes.wait(name)
            ))?;
        }
        Ok(())
    }
}

fn runs(machine: &mut Machine, name: &str) -> Result<bool, Failure> {
    Ok(machine.ask(&format!("kill -0 $(cat /mnt/{name}.pid) 2>/dev/null"), SCRIPT_TIME_MAX)?.0 == 0)
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
    let (nodes, device, name) = (way.nodes(args.flush_by), args.bench.bus.device(), args.filesystem.name());
    machine.run(&format!("mount -t {name} {device} {MOUNT}\n{}", nodes.start_all(1)))?;
    machine.run(&format!(
        "power write --addresses {} --writers {WRITERS} --level {} >/mnt/write.log 2>&1 &",
        nodes.addresses(),
        way.level()
    ))?;
    if !load.reaches(way.before()) {
        let said = machine.run(nodes.last_words())?;
        return Err(Failure::failed(format_args!("too little is acknowledged while the disk works:\n{said}")));
    }
    wrong.extend(way.begin(&disk, &mut machine, nodes)?);
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
    let victim = way.victim();
    let said = machine.run(&format!("grep -E ' (ERROR|WARN) |^walferry: ' /mnt/{victim}.log | tail -n 4"))?;
    said.lines().for_each(|line| println!("  {line}"));
    println!("  the process {}", if runs(&mut machine, victim)? { "runs" } else { "has ended" });
    way.end(&disk, &mut machine, nodes)?;
    if way.serves_again() {
        let wanted = load.acknowledged() + AFTER;
        match load.reaches(wanted) {
            true => println!("  goes on"),
            false => wrong.push(format!("does not go on within {PROGRESS_TIME_MAX:?} of the disk's return")),
        }
    }
    if way.fills() && !said.contains("space") {
        wrong.push("no line of its log says that there is no space".to_owned());
    }
    // XFS goes on writing when it is remounted by force; what it acknowledges is held to its flushes below, as everywhere.
    let unharmed = way == Way::ReadOnly && during > on_the_way;
    if way.ends_the_node() && !unharmed && !said.lines().any(names_file_and_lsn) {
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
