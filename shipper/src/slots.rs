//! Replication slots: for each named replica the position before which it needs no log. A slot holds back recycling
//! until it would hold more than `slot_keep_bytes_max`; then it is lost, which means that it holds nothing any more. Its
//! replica may still make it while the log is there, and then the slot holds again. A lost slot gives its place to a replica with
//! a new name when there are SLOTS_MAX. `Slots` is the core; `SlotFile` is its thin driver, a thread that writes the file, so that
//! the ring thread never waits for an fsync. Used by the shipper.
//!
//! The file is lazy, and never later than recycling: what [`Slots::hold`] gives away is what is durable in the file,
//! not what the replica has confirmed since.
//!
//! ```text
//! DIR/slots    walferry slots 1
//!              NAME RESTART-LSN active|lost
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use walferry_cluster::member::MemberName;
use walferry_engine::lsn::Lsn;
use walferry_engine::small_file::{self, Found};
use walferry_engine::waker::Waker;
use walferry_engine::world::{self, Inbox, Pace, Task};

/// Slots of a node; a replica with a new name beyond it is refused, unless one of them is lost.
pub const SLOTS_MAX: usize = 256;
/// The file in the data directory.
pub const SLOTS_FILE: &str = "slots";
/// The first pause after the file could not be written; it doubles up to SAVE_PAUSE_MAX.
const SAVE_PAUSE_MIN: Duration = Duration::from_secs(1);
const SAVE_PAUSE_MAX: Duration = Duration::from_secs(30);
/// A slot that moved by this much is written to the file.
const PERSIST_BYTES: u64 = 64 << 20;
const HEADING: &str = "walferry slots 1";

/// One slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    /// The replica needs nothing before this; `durable <= restart`.
    restart: Lsn,
    /// What the file says of `restart`, once it says anything. Until then the position that the slot was made at.
    durable: Lsn,
    /// It holds nothing back any more.
    lost: bool,
    /// The file does not know what is `lost` or that there is a slot.
    unsaved: bool,
}

/// The slots of a leader.
#[derive(Clone, Debug, Default)]
pub struct Slots {
    slots: BTreeMap<MemberName, Slot>,
    /// The contents that are being written, and the positions in them.
    saving: Option<Vec<(MemberName, Lsn, bool)>>,
    /// The file names a slot that was dropped.
    dropped: bool,
    /// The file could not be written: it is tried again then, and the pause after that.
    rest: Option<(Instant, Duration)>,
}

/// The slots' file is not what this build wrote.
#[derive(Debug, thiserror::Error)]
pub enum SlotsError {
    /// It cannot be read or written.
    #[error("cannot access {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line that is no slot.
    #[error("{}, line {line}: expected NAME RESTART-LSN active|lost", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
}

impl Slots {
    /// The position of a slot; `None` for an unknown name.
    pub fn restart(&self, name: &MemberName) -> Option<Lsn> {
        self.slots.get(name).map(|slot| slot.restart)
    }

    /// True for a slot that was given up.
    pub fn is_lost(&self, name: &MemberName) -> bool {
        self.slots.get(name).is_some_and(|slot| slot.lost)
    }

    /// Every slot's name and position.
    pub fn iter(&self) -> impl Iterator<Item = (&MemberName, Lsn)> {
        self.slots.iter().map(|(name, slot)| (name, slot.restart))
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.slots.len()
    }

    /// Whether the slot called `name` is there or can be made, once what this tells is dropped: a lost slot, the one that was lost
    /// first, of a replica that the leader does not feed (`is_fed`). False when each of them holds log.
    pub fn place_for(&self, name: &MemberName, is_fed: impl Fn(&MemberName) -> bool) -> (bool, Option<MemberName>) {
        if self.slots.contains_key(name) || self.slots.len() < SLOTS_MAX {
            return (true, None);
        }
        let idle = self.slots.iter().filter(|(name, slot)| slot.lost && !is_fed(name));
        let first = idle.min_by_key(|(_, slot)| slot.restart).map(|(name, _)| name.clone());
        (first.is_some(), first)
    }

    /// A replica is about to receive a snapshot: its slot is made and holds nothing yet, as a lost one. Nothing changes for one that
    /// has a slot. False when there are too many.
    pub fn reserve(&mut self, name: &MemberName) -> bool {
        if !self.slots.contains_key(name) && self.slots.len() == SLOTS_MAX {
            return false;
        }
        let reserved = Slot { restart: Lsn::ZERO, durable: Lsn::ZERO, lost: true, unsaved: false };
        self.slots.entry(name.clone()).or_insert(reserved);
        true
    }

    /// A replica streams from `start`, which is still in the log. Makes its slot; false when there are too many. A lost
    /// slot stays lost until `revive`.
    pub fn attach(&mut self, name: &MemberName, start: Lsn) -> bool {
        if !self.slots.contains_key(name) && self.slots.len() == SLOTS_MAX {
            return false;
        }
        let fresh = Slot { restart: start, durable: start, lost: false, unsaved: true };
        let slot = self.slots.entry(name.clone()).or_insert(fresh);
        if slot.lost {
            slot.restart = start;
        } else if start < slot.restart {
            // Behind what it had confirmed: a fork took that back. The file catches up before anything is recycled.
            *slot = fresh;
        }
        true
    }

    /// The replica is no member any more, or does not come back: nothing is held back for it. The file follows.
    pub fn forget(&mut self, name: &MemberName) {
        self.dropped |= self.slots.remove(name).is_some();
    }

    /// A snapshot as of `snapshot` is on its way to the replica, which will need the log from there on. False when there are too many
    /// slots.
    pub fn hold_from(&mut self, name: &MemberName, snapshot: Lsn) -> bool {
        if !self.slots.contains_key(name) && self.slots.len() == SLOTS_MAX {
            return false;
        }
        let fresh = Slot { restart: snapshot, durable: snapshot, lost: false, unsaved: true };
        let slot = self.slots.entry(name.clone()).or_insert(fresh);
        if slot.lost || slot.restart > snapshot {
            *slot = fresh;
        }
        true
    }

    /// The replica has flushed up to `flushed`.
    pub fn advance(&mut self, name: &MemberName, flushed: Lsn) {
        if let Some(slot) = self.slots.get_mut(name) {
            slot.restart = slot.restart.max(flushed);
        }
    }

    /// The connected replica of a lost slot is fed from log that is still there, which ends at `end`: once it is well
    /// within the bound, the slot holds again. True when that is now.
    pub fn revive(&mut self, name: &MemberName, end: Lsn, keep_bytes_max: u64) -> bool {
        let Some(slot) = self.slots.get_mut(name).filter(|slot| slot.lost) else { return false };
        let near = end.since(slot.restart) <= keep_bytes_max / 2;
        if near {
            *slot = Slot { restart: slot.restart, durable: slot.restart, lost: false, unsaved: true };
        }
        near
    }

    /// Gives up slots that hold back more than `keep_bytes_max` of a log that ends at `end`; their names.
    pub fn give_up(&mut self, end: Lsn, keep_bytes_max: u64) -> Vec<MemberName> {
        let mut given_up = Vec::new();
        for (name, slot) in self.slots.iter_mut().filter(|(_, slot)| !slot.lost) {
            if end.since(slot.restart) > keep_bytes_max {
                (slot.lost, slot.unsaved) = (true, true);
                given_up.push(name.clone());
            }
        }
        given_up
    }

    /// Nothing from here on may be recycled; `Lsn::MAX` when no slot holds anything.
    pub fn hold(&self) -> Lsn {
        let holds_log = self.slots.values().filter(|slot| !slot.lost || slot.unsaved);
        holds_log.map(|slot| slot.durable).min().unwrap_or(Lsn::MAX)
    }

    /// What to write to the file now, if it is time (`all`: if anything differs, for the last time). `saved` follows.
    pub fn poll_save(&mut self, all: bool, now: Instant) -> Option<String> {
        if self.rest.is_some_and(|(until, _)| now < until) && !all {
            return None;
        }
        let enough = if all { 1 } else { PERSIST_BYTES };
        let due = |slot: &Slot| slot.unsaved || slot.restart.since(slot.durable) >= enough;
        if self.saving.is_some() || !self.dropped && !self.slots.values().any(due) {
            return None;
        }
        self.dropped = false;
        let contents = |(name, slot): (&MemberName, &Slot)| (name.clone(), slot.restart, slot.lost);
        self.saving = Some(self.slots.iter().map(contents).collect());
        Some(self.encode())
    }

    /// True from `poll_save` to `saved`.
    pub fn is_saving(&self) -> bool {
        self.saving.is_some()
    }

    /// What `poll_save` gave is durable, or could not be written: then it is given again after a pause, and meanwhile nothing is
    /// released.
    pub fn saved(&mut self, success: bool, now: Instant) {
        let pause = self.rest.map_or(SAVE_PAUSE_MIN, |(_, pause)| (pause * 2).min(SAVE_PAUSE_MAX));
        self.rest = (!success).then_some((now + pause, pause));
        self.dropped |= !success;
        for (name, restart, lost) in self.saving.take().into_iter().flatten().filter(|_| success) {
            // One that was forgotten meanwhile is of no interest any more.
            let Some(slot) = self.slots.get_mut(&name) else { continue };
            // A slot that went back meanwhile was made anew.
            if slot.restart >= restart {
                slot.durable = restart;
                slot.unsaved &= slot.lost != lost;
            }
        }
    }

    fn encode(&self) -> String {
        let mut text = format!("{HEADING}\n");
        for (name, slot) in &self.slots {
            let state = if slot.lost { "lost" } else { "active" };
            writeln!(text, "{name} {} {state}", slot.restart).expect("writing to memory");
        }
        text
    }

    fn decode(text: &str) -> Result<Slots, usize> {
        let mut lines = text.lines().zip(1..);
        if lines.next().map(|(line, _)| line) != Some(HEADING) {
            return Err(1);
        }
        let mut slots = Slots::default();
        for (line, number) in lines {
            let [name, restart, state] = line.split(' ').collect::<Vec<_>>()[..] else {
                return Err(number);
            };
            let name: MemberName = name.parse().map_err(|_| number)?;
            let restart = restart.parse().map_err(|_| number)?;
            let lost = match state {
                "active" => false,
                "lost" => true,
                _ => return Err(number),
            };
            let slot = Slot { restart, durable: restart, lost, unsaved: false };
            if slots.slots.len() == SLOTS_MAX || slots.slots.insert(name, slot).is_some() {
                return Err(number);
            }
        }
        Ok(slots)
    }

    /// The slots of a data directory; none when it has no file.
    pub fn load(dir: &Path) -> Result<Slots, SlotsError> {
        let path = dir.join(SLOTS_FILE);
        let found = small_file::load(&path).map_err(|source| SlotsError::Io { path: path.clone(), source })?;
        match found {
            Found::Text(text) => Slots::decode(&text).map_err(|line| SlotsError::Line { path, line }),
            Found::Nothing => Ok(Slots::default()),
            Found::Damaged => {
                // Slots promise no commit to anybody: their replicas make them anew when they connect.
                tracing::warn!(
                    file = %path.display(),
                    "the slots' file and its copy are damaged: it begins empty, and a replica that is away now may need a snapshot"
                );
                Ok(Slots::default())
            }
        }
    }
}

/// The thread that writes the slots' file.
pub struct SlotFile {
    contents: Option<mpsc::SyncSender<String>>,
    results: mpsc::Receiver<io::Result<()>>,
    task: Option<Task>,
}

impl SlotFile {
    /// Starts the thread; it wakes the ring thread when a write is done.
    pub fn new(dir: &Path, waker: Waker) -> io::Result<SlotFile> {
        let path = dir.join(SLOTS_FILE);
        let (contents, incoming) = mpsc::sync_channel::<String>(1);
        let (outgoing, results) = mpsc::sync_channel(1);
        let write = move || {
            let text = match world::take(&incoming) {
                Inbox::Item(text) => text,
                Inbox::Empty => return Pace::Asleep,
                Inbox::Closed => return Pace::Over,
            };
            if outgoing.send(small_file::save(&path, &text)).is_err() {
                return Pace::Over;
            }
            waker.wake();
            Pace::Again
        };
        let task = world::spawn("slots", Box::new(write))?;
        Ok(SlotFile { contents: Some(contents), results, task: Some(task) })
    }

    /// Begins to write; one at a time, as `Slots::poll_save` gives them.
    pub fn write(&self, text: String) {
        let sender = self.contents.as_ref().expect("there until dropped");
        sender.send(text).expect("the thread lives as long as its channel");
        self.task.iter().for_each(Task::wake);
    }

    /// The outcome of the last write, once it is known.
    pub fn poll(&self) -> Option<io::Result<()>> {
        self.results.try_recv().ok()
    }

    /// Waits for the outcome of the write under way.
    pub fn wait(&self) -> io::Result<()> {
        let task = self.task.as_ref().expect("there until dropped");
        task.receive(&self.results).unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
    }
}

impl Drop for SlotFile {
    fn drop(&mut self) {
        self.contents = None;
        if let Some(task) = self.task.take() {
            // The thread may wait to hand over a result that nobody takes any more.
            let _ = self.results.try_recv();
            task.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> MemberName {
        text.parse().expect("a name")
    }

    fn save(slots: &mut Slots, all: bool) -> String {
        let text = slots.poll_save(all, Instant::now()).expect("something to save");
        slots.saved(true, Instant::now());
        text
    }

    #[test]
    fn nothing_is_released_before_the_file_says_so() {
        let (mut slots, now) = (Slots::default(), Instant::now());
        assert_eq!(slots.hold(), Lsn::MAX);
        assert!(slots.attach(&name("a"), Lsn(100)));
        assert_eq!(slots.hold(), Lsn(100));
        save(&mut slots, false);
        slots.advance(&name("a"), Lsn(100 + PERSIST_BYTES - 1));
        assert_eq!((slots.poll_save(false, now), slots.hold()), (None, Lsn(100)));
        slots.advance(&name("a"), Lsn(100 + PERSIST_BYTES));
        assert!(slots.poll_save(false, now).is_some());
        // Moved on while the write was under way: only what was written counts.
        slots.advance(&name("a"), Lsn(900 + PERSIST_BYTES));
        assert_eq!((slots.poll_save(true, now), slots.hold()), (None, Lsn(100)));
        slots.saved(false, now);
        assert_eq!(slots.hold(), Lsn(100), "the write failed");
        // A disk that is full is not asked again at once, and ever less often.
        let mut at = now;
        for pause in [1, 2, 4, 8, 16, 30, 30].map(Duration::from_secs) {
            assert_eq!(slots.poll_save(false, at + pause - Duration::from_millis(1)), None, "after {pause:?}");
            at += pause;
            assert!(slots.poll_save(false, at).is_some(), "after {pause:?}");
            slots.saved(false, at);
        }
        assert!(slots.poll_save(true, at).is_some(), "at the end it is tried at once");
        slots.saved(true, at);
        assert_eq!(slots.hold(), Lsn(900 + PERSIST_BYTES));
        assert_eq!(slots.poll_save(true, now), None);
    }

    #[test]
    fn a_slot_that_holds_too_much_is_lost_once_and_can_be_revived() {
        let mut slots = Slots::default();
        slots.attach(&name("a"), Lsn(0));
        slots.attach(&name("b"), Lsn(500));
        save(&mut slots, false);
        assert!(slots.give_up(Lsn(1000), 1000).is_empty());
        assert_eq!(slots.give_up(Lsn(1001), 1000), [name("a")]);
        assert!(slots.give_up(Lsn(1001), 1000).is_empty());
        assert!(slots.is_lost(&name("a")) && !slots.is_lost(&name("b")));
        assert_eq!(slots.hold(), Lsn(0), "the file still promises it");
        let text = save(&mut slots, false);
        assert_eq!(slots.hold(), Lsn(500));
        assert!(Slots::decode(&text).expect("own text").is_lost(&name("a")));
        slots.attach(&name("a"), Lsn(300));
        assert!(!slots.revive(&name("a"), Lsn(1300), 1000) && slots.is_lost(&name("a")), "still too far behind");
        assert_eq!(slots.hold(), Lsn(500), "it is fed, and holds nothing");
        slots.advance(&name("a"), Lsn(800));
        assert!(slots.revive(&name("a"), Lsn(1300), 1000) && !slots.is_lost(&name("a")));
        assert!(!slots.revive(&name("a"), Lsn(1300), 1000), "once");
        slots.advance(&name("b"), Lsn(900));
        save(&mut slots, true);
        assert_eq!(slots.hold(), Lsn(800), "it holds again");
    }

    #[test]
    fn lost_slot_gives_its_place_to_a_new_replica() {
        let mut slots = Slots::default();
        (0..SLOTS_MAX).for_each(|number| assert!(slots.attach(&name(&format!("r{number}")), Lsn(number as u64 * 100))));
        let (new, nobody) = (name("new"), |_: &MemberName| false);
        assert_eq!(slots.place_for(&new, nobody), (false, None), "each of them holds log");
        assert_eq!(slots.place_for(&name("r7"), nobody), (true, None), "it has a slot");
        assert!(!slots.attach(&new, Lsn(0)) && !slots.reserve(&new));
        let end = Lsn(SLOTS_MAX as u64 * 100);
        assert_eq!(slots.give_up(end, end.0 - 150).len(), 2, "those of r0 and r1");
        assert_eq!(slots.place_for(&new, nobody), (true, Some(name("r0"))), "the one that was lost first");
        assert_eq!(slots.place_for(&new, |fed| *fed == name("r0")), (true, Some(name("r1"))), "r0 is still fed");
        assert_eq!(slots.place_for(&new, |_| true), (false, None));
        save(&mut slots, true);
        slots.forget(&name("r0"));
        assert!(slots.reserve(&new) && slots.is_lost(&new), "it is to get a snapshot, and holds nothing yet");
        assert_eq!((slots.hold(), slots.count()), (Lsn(200), SLOTS_MAX));
        assert!(slots.hold_from(&new, Lsn(100)) && !slots.is_lost(&new));
        assert_eq!(slots.hold(), Lsn(100));
    }

    #[test]
    fn file_follows_a_slot_that_was_dropped() {
        let (mut slots, now) = (Slots::default(), Instant::now());
        slots.attach(&name("a"), Lsn(100));
        save(&mut slots, false);
        slots.forget(&name("b"));
        assert_eq!(slots.poll_save(false, now), None, "there was none");
        slots.forget(&name("a"));
        assert_eq!(slots.hold(), Lsn::MAX);
        assert_eq!(slots.poll_save(false, now), Some(format!("{HEADING}\n")));
        slots.saved(false, now);
        assert!(slots.poll_save(true, now).is_some(), "it failed, and is written again");
        slots.saved(true, now);
        assert_eq!(slots.poll_save(true, now), None);
    }

    #[test]
    fn a_fork_takes_a_slot_back() {
        let mut slots = Slots::default();
        slots.attach(&name("a"), Lsn(500));
        save(&mut slots, false);
        slots.attach(&name("a"), Lsn(400));
        assert_eq!((slots.restart(&name("a")), slots.hold()), (Some(Lsn(400)), Lsn(400)));
        // Attached ahead of it: the slot moves only with what the replica confirms.
        slots.attach(&name("a"), Lsn(450));
        assert_eq!(slots.restart(&name("a")), Some(Lsn(400)));
    }

    #[test]
    fn the_file_round_trips_and_damage_is_named() {
        let mut slots = Slots::default();
        slots.attach(&name("a-1"), Lsn(0x1_0000_1000));
        slots.attach(&name("b"), Lsn(0));
        slots.give_up(Lsn(0x1_0000_1000), 5);
        let text = save(&mut slots, false);
        assert_eq!(text, "walferry slots 1\na-1 1/1000 active\nb 0/0 lost\n");
        let again = Slots::decode(&text).expect("own text");
        assert_eq!(again.slots, slots.slots);
        let heading = format!("{HEADING}\n");
        for (rest, line) in [("a 0/0", 2), ("a 0/0 gone", 2), ("A 0/0 lost", 2), ("a 0/0 lost\na 0/0 lost", 3)] {
            assert_eq!(Slots::decode(&format!("{heading}{rest}")).err(), Some(line), "{rest}");
        }
        assert_eq!(Slots::decode("").err(), Some(1));
    }

    #[test]
    fn a_slot_holds_the_log_behind_a_snapshot() {
        let mut slots = Slots::default();
        slots.attach(&name("a"), Lsn(100));
        assert_eq!(slots.give_up(Lsn(1000), 500), [name("a")]);
        assert!(slots.hold_from(&name("a"), Lsn(900)) && slots.hold_from(&name("b"), Lsn(950)));
        assert_eq!(
            (slots.is_lost(&name("a")), slots.restart(&name("a")), slots.hold()),
            (false, Some(Lsn(900)), Lsn(900))
        );
        // Again and again while the copy is on its way; what the replica confirmed meanwhile stays.
        slots.advance(&name("a"), Lsn(960));
        save(&mut slots, true);
        assert!(slots.hold_from(&name("a"), Lsn(960)) && slots.hold_from(&name("b"), Lsn(960)));
        assert_eq!(slots.hold(), Lsn(950));
        // A fork takes a replica back behind what it had confirmed.
        assert!(slots.hold_from(&name("a"), Lsn(940)));
        assert_eq!(slots.hold(), Lsn(940));
    }
}
