//! What a log has told already: a line that says the same again is counted and not logged, so that what fails and is tried again
//! fills no disk. Used wherever something is retried ([`Told`]), or where others decide how often a line is due ([`Rarely`]). Reads
//! no clock.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A line that still holds is logged again after this, so that a log that was rotated tells it too.
pub const TELL_AGAIN_INTERVAL: Duration = Duration::from_secs(60);
/// Different lines within that time; further ones are not logged. Peers choose a part of some.
const LINES_MAX: usize = 16;

#[derive(Debug)]
struct Line {
    text: String,
    since: Instant,
    repeated: u64,
}

/// The lines of one place in the code.
#[derive(Debug, Default)]
pub struct Told {
    lines: VecDeque<Line>,
}

impl Told {
    /// `Some` when `text` is to be logged now: how often it was not since it was logged last.
    pub fn tell(&mut self, text: &str, now: Instant) -> Option<u64> {
        let is_old = |line: &Line| now.saturating_duration_since(line.since) >= TELL_AGAIN_INTERVAL;
        let repeated = match self.lines.iter().position(|line| line.text == text) {
            Some(index) if !is_old(&self.lines[index]) => {
                self.lines[index].repeated += 1;
                return None;
            }
            Some(index) => self.lines.remove(index).map_or(0, |line| line.repeated),
            None => 0,
        };
        self.lines.retain(|line| !is_old(line));
        if self.lines.len() >= LINES_MAX {
            return None;
        }
        self.lines.push_back(Line { text: text.to_owned(), since: now, repeated: 0 });
        Some(repeated)
    }

    /// What was told holds no longer; true when there was anything.
    pub fn is_over(&mut self) -> bool {
        !std::mem::take(&mut self.lines).is_empty()
    }
}

/// Lines of one kind, whatever they say, of which one is logged in a while and the others are counted.
#[derive(Debug, Default)]
pub struct Rarely {
    logged: Option<Instant>,
    unlogged: u64,
}

impl Rarely {
    /// `Some` when a line is to be logged now, `pause` after the one before at the earliest: how many were not in between.
    pub fn tell(&mut self, pause: Duration, now: Instant) -> Option<u64> {
        if self.logged.is_some_and(|then| now.saturating_duration_since(then) < pause) {
            self.unlogged += 1;
            return None;
        }
        self.logged = Some(now);
        Some(std::mem::take(&mut self.unlogged))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_between_two_pauses_are_counted() {
        let (begun, pause) = (Instant::now(), Duration::from_secs(10));
        let mut rarely = Rarely::default();
        assert_eq!(rarely.tell(pause, begun), Some(0));
        assert_eq!((0..7).filter_map(|second| rarely.tell(pause, begun + Duration::from_secs(second))).count(), 0);
        assert_eq!(rarely.tell(pause, begun + pause), Some(7));
        assert_eq!(rarely.tell(pause, begun + pause * 2), Some(0));
    }

    #[test]
    fn line_is_logged_on_change_and_again_after_a_while() {
        let begun = Instant::now();
        let mut told = Told::default();
        assert_eq!(told.tell("no space", begun), Some(0));
        for _ in 0..1000 {
            assert_eq!(told.tell("no space", begun + TELL_AGAIN_INTERVAL / 2), None);
        }
        assert_eq!(told.tell("read-only", begun), Some(0), "it says something else");
        assert_eq!(told.tell("no space", begun + TELL_AGAIN_INTERVAL), Some(1000));
        assert!(told.is_over() && !told.is_over());
        assert_eq!(told.tell("no space", begun + TELL_AGAIN_INTERVAL), Some(0));
    }

    #[test]
    fn lines_with_text_of_peers_are_bounded() {
        let begun = Instant::now();
        let mut told = Told::default();
        let logged = (0..10_000).filter(|number| told.tell(&format!("name {number}"), begun).is_some()).count();
        assert_eq!((logged, told.lines.len()), (LINES_MAX, LINES_MAX));
        assert!(told.tell("name 10000", begun + TELL_AGAIN_INTERVAL).is_some());
    }
}
