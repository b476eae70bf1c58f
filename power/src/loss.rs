//! `power loss`: one run of a node under load, from `mkfs` on; the power is cut at its end. Then the disk as it may have been at
//! many moments of the run, each mounted and recovered by the real binary in another guest: what was acknowledged before the
//! moment must be there, and so must what the first recovery showed when the power is cut again during it.
//!
//! ```text
//! course   (machine 1)  init, start, load, kill -9, start, ...   disk: every write and flush; promises: every acknowledgement
//! moments               a third right behind a flush, a third right behind an acknowledgement, the rest anywhere; every phase of
//!                       the course has its share
//! recovery (machine 2)  image -> mount, log verify, start, read everything ─┬─> promises
//!                                └ recorded as well, cut once more ─────────┘
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::bench::{Bench, BenchArgs, Found};
use crate::disk::{Cuts, Disk, Layer, Moment, Mood, Trace, cut};
use crate::error::{During, Failure};
use crate::machine::{Kit, Machine};
use crate::node::{self, Filesystem, FlushBy, MOUNT, Nodes};
use crate::promise::{Held, Promises};

/// Connections that write.
const WRITERS: usize = 8;
/// A course ends early when its writes fill so much memory.
const TRACE_BYTES_MAX: u64 = 1 << 30;
/// A course goes on until so many values were acknowledged, on a host that is busy otherwise, but only for so many times its seconds.
const ACKNOWLEDGED_MIN: u64 = 200;
const LONGER_MAX: u32 = 4;
/// Between two looks at a course.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// One in so many recoveries is cut as well.
const CUT_AGAIN_ONE_IN: u32 = 3;
/// Failed images that are kept.
const KEPT_MAX: usize = 4;

/// What is deliberately wrong, to see whether it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Broken {
    /// The node acknowledges at level `off`, before anything is flushed
    LevelOff,
    /// The clients tell of values that they have only sent
    Writer,
    /// The disk says that it has flushed, and has not
    Disk,
}

/// Flags of `power loss`.
#[derive(Debug, Args)]
pub struct LossArgs {
    /// Which filesystem [default: both]
    #[arg(long, value_enum)]
    filesystem: Option<Filesystem>,
    /// Three members of a cluster in the one machine, level remote_flush
    #[arg(long)]
    members: bool,
    /// How the log is flushed [default: a course of each way, which share the cuts]
    #[arg(long, value_enum)]
    flush_by: Option<FlushBy>,
    /// Moments at which the power is cut, for each filesystem
    #[arg(long, value_name = "N", default_value_t = 200)]
    cuts: usize,
    /// Seconds of load; the nodes are killed and started again in between
    #[arg(long, value_name = "N", default_value_t = 40)]
    seconds: u64,
    /// Chooses moments, order and what is lost [default: another one each time]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Something deliberately wrong: succeeds only when it is found
    #[arg(long, value_enum, value_name = "WHAT")]
    broken: Option<Broken>,
    #[command(flatten)]
    bench: BenchArgs,
}

impl LossArgs {
    fn level(&self) -> &'static str {
        match (self.broken, self.members) {
            (Some(Broken::LevelOff), _) => "off",
            (_, true) => "remote_flush",
            (_, false) => "local",
        }
    }
}

/// Runs `power loss`.
pub fn run(args: &LossArgs) -> Result<(), Failure> {
    let kit = Kit::prepare(&args.bench.kit, &[])?;
    let seed = args.seed.unwrap_or_else(|| rand::rng().random_range(0..u64::from(u32::MAX)));
    println!("--seed {seed}");
    let mut wrong = 0;
    for filesystem in args.filesystem.map_or_else(|| vec![Filesystem::Ext4, Filesystem::Xfs], |one| vec![one]) {
        let mut rng = StdRng::seed_from_u64(seed);
        let ways = args.flush_by.map_or_else(|| FlushBy::ALL.to_vec(), |one| vec![one]);
        for (number, flush_by) in ways.iter().enumerate() {
            // The first ways take what does not divide.
            let cuts = (args.cuts + ways.len() - 1 - number) / ways.len();
            let course = Course::run(args, &kit, filesystem, *flush_by, &mut rng)?;
            wrong += course.recover(args, &kit, cuts, &mut rng)?;
        }
    }
    match (wrong, args.broken) {
        (0, None) => Ok(()),
        (0, Some(_)) => Err(Failure::failed("what is deliberately wrong was not found: the checker does not see")),
        (_, None) => Err(Failure::failed(format_args!("{wrong} cuts broke a promise"))),
        (_, Some(_)) => {
            println!("found, as it should be");
            Ok(())
        }
    }
}

/// A part of the course, named by what the nodes did.
#[derive(Clone, Copy, Debug)]
struct Phase {
    name: &'static str,
    begins: Moment,
}

/// A run whose power was cut.
struct Course {
    filesystem: Filesystem,
    nodes: Nodes,
    disk: Disk,
    trace: Trace,
    promises: Promises,
    phases: Vec<Phase>,
    end: Moment,
}

impl Course {
    fn run(
        args: &LossArgs,
        kit: &Kit,
        filesystem: Filesystem,
        flush_by: FlushBy,
        rng: &mut StdRng,
    ) -> Result<Course, Failure> {
        let disk = Disk::new(filesystem.make(&kit.dir)?, rng.random());
        let promises = Arc::new(Mutex::new(Promises::default()));
        let mut machine = Machine::boot(kit, &disk, filesystem, args.bench.bus, &promises)?;
        let (name, booted_in) = (filesystem.name(), machine.booted_in);
        let mut phases = Vec::new();
        let mut enter = |name| phases.push(Phase { name, begins: disk.state().stamp() });
        disk.state().record();
        let nodes = if args.members { Nodes::three(flush_by) } else { Nodes::one(flush_by) };
        println!("{name}: booted in {:.1} s, {flush_by:?}", booted_in.as_secs_f64());
        enter("init");
        machine.run(&format!("mount -t {name} {} {MOUNT}\n{}", args.bench.bus.device(), nodes.init()))?;
        enter("first start");
        machine.run(&nodes.start_all(1))?;
        enter("load");
        let early = if args.broken == Some(Broken::Writer) { " --early" } else { "" };
        machine.run(&format!(
            "power write --addresses {} --writers {WRITERS} --level {}{early} >/mnt/write.log 2>&1 &",
            nodes.addresses(),
            args.level()
        ))?;
        let ends = Instant::now() + Duration::from_secs(args.seconds);
        let acknowledged = || {
            let now = disk.state().stamp();
            promises.lock().expect("the promises' lock").total(now)
        };
        let gives_up = ends + Duration::from_secs(args.seconds) * LONGER_MAX;
        let goes_on = || Instant::now() < ends || acknowledged() < ACKNOWLEDGED_MIN && Instant::now() < gives_up;
        while goes_on() && disk.state().recorded_so_far().1 < TRACE_BYTES_MAX {
            // A fifth to a half of the course under load, then a restart.
            let part = Duration::from_secs(args.seconds).mul_f64(rng.random_range(0.2..0.5));
            let until = Instant::now() + part;
            while Instant::now() < until && goes_on() && disk.state().recorded_so_far().1 < TRACE_BYTES_MAX {
                std::thread::sleep(LOOK_INTERVAL);
            }
            if goes_on() {
                enter("restart");
                machine.run(&nodes.kill_all())?;
                machine.run(&nodes.start_all(1))?;
                enter("load");
            }
        }
        let last_words = machine.run(nodes.last_words())?;
        let own_flushes = machine.run(&args.bench.bus.flushes())?;
        machine.cut()?;
        let mut state = disk.state();
        let (trace, end) = (state.recorded(), state.stamp());
        drop(state);
        let promises = promises.lock().expect("the promises' lock").clone();
        println!(
            "{name}: {} writes ({} forced, {} MiB that are not zeros), {} flushes, {} acknowledged values, {} restarts",
            trace.writes.len(),
            trace.writes.iter().filter(|write| write.forced).count(),
            trace.bytes >> 20,
            trace.flushes.len(),
            promises.total(end),
            phases.iter().filter(|phase| phase.name == "restart").count()
        );
        println!("{name}: the guest's kernel: {}", own_flushes.trim());
        if promises.total(end) == 0 {
            return Err(Failure::failed(format_args!("no value was acknowledged: nothing to test\n{last_words}")));
        }
        Ok(Course { filesystem, nodes, disk, trace, promises, phases, end })
    }

    fn phase(&self, at: Moment) -> &'static str {
        self.phases.iter().rev().find(|phase| phase.begins <= at).map_or("?", |phase| phase.name)
    }

    /// Moments in order: every phase has its share, a third follows a flush, a third an acknowledgement.
    fn moments(&self, count: usize, rng: &mut StdRng) -> Vec<Moment> {
        let mut moments: Vec<Moment> = (0..count)
            .map(|number| {
                let phase = number % self.phases.len();
                let begins = self.phases[phase].begins;
                let ends = self.phases.get(phase + 1).map_or(self.end, |next| next.begins);
                let any = Moment(rng.random_range(begins.0..ends.0));
                let behind = match rng.random_range(0..3) {
                    0 => self.trace.flushes.iter().map(|flush| flush.answered).find(|answered| *answered >= any),
                    1 => self.promises.next_after(any),
                    _ => None,
                };
                behind.map_or(any, |event| Moment(event.0 + rng.random_range(0..3)))
            })
            .collect();
        moments.sort();
        moments
    }

    /// Recovers from cuts; how many broke a promise.
    fn recover(mut self, args: &LossArgs, kit: &Kit, cuts: usize, rng: &mut StdRng) -> Result<usize, Failure> {
        let name = self.filesystem.name();
        let moments = self.moments(cuts, rng);
        let mut trace = std::mem::take(&mut self.trace);
        if args.broken == Some(Broken::Disk) {
            trace.flushes.clear();
        }
        let mut cuts = Cuts::new(trace);
        let started = Instant::now();
        self.disk.state().image.reset();
        let mut bench = Bench::new(kit, &args.bench, &self.disk, self.filesystem, self.nodes, WRITERS)?;
        let mut tally = Tally::default();
        for (number, at) in moments.iter().enumerate() {
            let mood = Mood::any(rng);
            cuts.next(&mut self.disk.state().image, *at, mood, rng);
            let layer = self.disk.state().image.layer();
            self.disk.state().record();
            let found = bench.look()?;
            let recovery = self.disk.state().recorded();
            let mut what = Look { number, again: false, at: *at, mood, phase: self.phase(*at) };
            let held = self.judge(&found, &what, &layer, kit, &mut tally)?;
            if rng.random_range(0..CUT_AGAIN_ONE_IN) == 0 && found.ended > found.began {
                let again_at = Moment(rng.random_range(found.began.0..found.ended.0));
                what = Look { again: true, mood: Mood::any(rng), ..what };
                let mut state = self.disk.state();
                state.image.set_layer(layer);
                cut(&mut state.image, &recovery, again_at, what.mood, rng);
                let layer = state.image.layer();
                drop(state);
                let second = bench.look()?;
                let held_again = self.judge(&second, &what, &layer, kit, &mut tally)?;
                if again_at >= found.read_at {
                    tally.wrong += usize::from(took_back(&what, &held, &held_again));
                }
            }
        }
        let minutes = started.elapsed().as_secs_f64() / 60.0;
        tally.print(name, minutes);
        Ok(tally.wrong)
    }

    /// What a recovered node holds; tells and counts what is wrong with it.
    fn judge(
        &self,
        found: &Found,
        what: &Look,
        layer: &Layer,
        kit: &Kit,
        tally: &mut Tally,
    ) -> Result<Vec<Held>, Failure> {
        let (mut held, mut complaints) = (Vec::new(), Vec::new());
        match &found.outcome {
            Ok(text) => {
                held = node::held(text, WRITERS)?;
                complaints.extend(self.promises.broken(what.at, &held).iter().map(ToString::to_string));
            }
            Err(complaint) => complaints.push(complaint.clone()),
        }
        tally.count(what);
        if complaints.is_empty() {
            return Ok(held);
        }
        tally.wrong += 1;
        println!("{}: {what}: {}", self.filesystem.name(), complaints.join("; "));
        if tally.wrong <= KEPT_MAX {
            let name = format!("{}-{}{}", self.filesystem.name(), what.number, if what.again { "-again" } else { "" });
            let path = node::failed_image(&kit.dir, &name);
            let mut state = self.disk.state();
            state.image.set_layer(layer.clone());
            state.image.save(&path).during(format_args!("write {}", path.display()))?;
            drop(state);
            println!("  the disk is kept in {}", path.display());
        }
        Ok(held)
    }
}

/// What a recovery showed its readers must survive a cut after they read it.
fn took_back(what: &Look, shown: &[Held], held: &[Held]) -> bool {
    let newest = |held: &Held| held.values().copied().max().unwrap_or(0);
    let mut back = shown.iter().zip(held).enumerate().filter(|(_, (shown, held))| newest(held) < newest(shown));
    let Some((writer, (shown, held))) = back.next() else { return false };
    println!("{what}: writer {writer}: readers saw {}, later the node holds only {}", newest(shown), newest(held));
    true
}

/// Which cut it is.
#[derive(Clone, Copy, Debug)]
struct Look {
    number: usize,
    /// During the recovery from the one of this number.
    again: bool,
    at: Moment,
    mood: Mood,
    phase: &'static str,
}

impl std::fmt::Display for Look {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let again = if self.again { ", and again during its recovery" } else { "" };
        write!(f, "cut {} at {} in {}{again} ({:?})", self.number, self.at.0, self.phase, self.mood)
    }
}

#[derive(Debug, Default)]
struct Tally {
    wrong: usize,
    cuts: BTreeMap<&'static str, usize>,
}

impl Tally {
    fn count(&mut self, what: &Look) {
        *self.cuts.entry(if what.again { "recovery" } else { what.phase }).or_default() += 1;
    }

    fn print(&self, name: &str, minutes: f64) {
        let all: usize = self.cuts.values().sum();
        let phases: Vec<String> = self.cuts.iter().map(|(phase, count)| format!("{count} in {phase}")).collect();
        let rate = all as f64 / minutes;
        println!("{name}: {all} cuts ({}), {} broke a promise; {rate:.0} cuts a minute", phases.join(", "), self.wrong);
    }
}
