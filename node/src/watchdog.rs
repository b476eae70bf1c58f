//! How long the turns of the loop take, and which commands hold it up: while one is executed nobody else is served. A core: `reactor`
//! and the sessions measure, `node` keeps it, INFO and the metrics tell.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use walferry_engine::told::Rarely;

/// A command or a turn that takes so long is counted and logged.
pub const SLOW: Duration = Duration::from_millis(50);
/// Slow turns are logged once in so long, and counted in between.
const LOG_PAUSE: Duration = Duration::from_secs(10);

/// What was measured since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Turns {
    /// The longest turn.
    pub longest: Duration,
    /// Turns of `SLOW` and longer.
    pub slow: u64,
    /// How often each command took `SLOW` or longer; bounded by the table of commands.
    pub slow_commands: BTreeMap<&'static str, u64>,
    /// The command that took longest, of these.
    pub slowest: Option<(&'static str, Duration)>,
}

/// Where a turn's time went, for turns without a slow command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phases {
    /// Commands, as their bytes arrived.
    pub input: Duration,
    /// The log, the links, the store, and sessions that were woken.
    pub node: Duration,
    /// Handing replies to the sockets.
    pub output: Duration,
}

/// Keeps count of turns.
#[derive(Debug, Default)]
pub struct Watchdog {
    turns: Turns,
    /// The slowest command of this turn.
    in_turn: Option<(&'static str, Duration)>,
    told: Rarely,
}

impl Watchdog {
    /// What was measured.
    pub fn turns(&self) -> &Turns {
        &self.turns
    }

    /// A command took so long: `SLOW` or longer.
    pub fn command(&mut self, name: &'static str, took: Duration) {
        *self.turns.slow_commands.entry(name).or_default() += 1;
        let longer =
            |known: Option<(&'static str, Duration)>| known.filter(|known| known.1 >= took).or(Some((name, took)));
        self.turns.slowest = longer(self.turns.slowest);
        self.in_turn = longer(self.in_turn);
    }

    /// A turn is over; the line that is to be logged, if one is.
    pub fn turn(&mut self, phases: &Phases, now: Instant) -> Option<String> {
        let took = phases.input + phases.node + phases.output;
        let command = self.in_turn.take();
        self.turns.longest = self.turns.longest.max(took);
        if took < SLOW {
            return None;
        }
        self.turns.slow += 1;
        let more = self.told.tell(LOG_PAUSE, now)?;
        let why = match command {
            Some((name, took)) => format!("the command {} took {took:.1?}", name.to_uppercase()),
            None => format!(
                "{:.1?} for commands that arrived, {:.1?} for log, links and store, {:.1?} for replies",
                phases.input, phases.node, phases.output
            ),
        };
        Some(format!("no client was served for {took:.1?}: {why}; {more} such turns since the last such line"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_command_is_named_once_in_a_while() {
        let start = Instant::now();
        let mut watchdog = Watchdog::default();
        let phases = |ms| Phases { input: Duration::from_millis(ms), node: Duration::ZERO, output: Duration::ZERO };
        assert_eq!(watchdog.turn(&phases(49), start), None);
        watchdog.command("get", Duration::from_millis(60));
        watchdog.command("exists", Duration::from_millis(90));
        let line = watchdog.turn(&phases(160), start).expect("it is told at once");
        assert!(line.contains("160.0ms: the command EXISTS took 90.0ms; 0 such"), "{line}");
        assert_eq!(watchdog.turn(&phases(70), start + LOG_PAUSE / 2), None, "not again so soon");
        let line = watchdog.turn(&phases(70), start + LOG_PAUSE).expect("it is told again");
        assert!(line.contains("70.0ms for commands that arrived") && line.contains("; 1 such"), "{line}");
        let turns = watchdog.turns();
        assert_eq!((turns.longest, turns.slow), (Duration::from_millis(160), 3));
        assert_eq!(turns.slowest, Some(("exists", Duration::from_millis(90))));
        assert_eq!(
            turns.slow_commands.iter().map(|(name, count)| (*name, *count)).collect::<Vec<_>>(),
            [("exists", 1), ("get", 1)]
        );
    }
}
