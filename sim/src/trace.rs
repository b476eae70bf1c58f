//! What happened in a run: a hash of all of it, so that two runs of one seed can be compared, and the last of it for people.

use std::collections::VecDeque;
use std::fmt::Debug;

use xxhash_rust::xxh3::Xxh3;

/// Lines that are kept for a failure.
const LINES_MAX: usize = 400;

pub struct Trace {
    hasher: Xxh3,
    /// Print everything at once.
    pub verbose: bool,
    lines: VecDeque<String>,
    pub failovers: u64,
}

impl Trace {
    pub fn new(verbose: bool) -> Trace {
        Trace { hasher: Xxh3::new(), verbose, lines: VecDeque::new(), failovers: 0 }
    }

    pub fn event(&mut self, at_us: u64, event: &impl Debug) {
        self.hasher.update(&at_us.to_le_bytes());
        if self.verbose {
            eprintln!("{at_us:>10} {event:?}");
        }
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
    }

    /// Something that people want to see.
    pub fn note(&mut self, at_us: u64, text: &str) {
        self.hasher.update(text.as_bytes());
        let line = format!("{at_us:>10} us  {text}");
        if self.verbose {
            eprintln!("{line}");
        }
        if self.lines.len() == LINES_MAX {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    pub fn hash(&self) -> u64 {
        self.hasher.digest()
    }

    pub fn lines(&self) -> impl Iterator<Item = &String> {
        self.lines.iter()
    }
}
