//! Patterns of redis-server's kind: `*`, `?`, `[a-c]`, `[^a]`, `\` before a character meant as itself. Used by SCAN and CONFIG GET.
//!
//! A pattern of n elements is a machine of n + 1 states, one bit each, that all move with each byte of the text: the time is bounded
//! by the length of the text, whatever the pattern.

use std::ops::RangeInclusive;

use crate::session::command::error::CommandError;

/// A pattern is at most this long.
pub const PATTERN_BYTES_MAX: usize = 1 << 10;

const STATE_WORDS_MAX: usize = PATTERN_BYTES_MAX / u64::BITS as usize + 1;
const BYTES: usize = 256;

/// A pattern that texts are compared with.
pub struct Glob {
    /// Words of states that a pattern of its length may have.
    words: usize,
    /// For each byte, the states that it lets go on to the next one.
    moves: Vec<u64>,
    /// States in which any byte may be skipped: those before a star.
    stars: [u64; STATE_WORDS_MAX],
    /// The state in which all of the pattern has matched.
    last: usize,
}

fn bit(state: usize) -> (usize, u64) {
    (state / u64::BITS as usize, 1 << (state % u64::BITS as usize))
}

impl Glob {
    /// Reads a pattern.
    pub fn new(pattern: &[u8]) -> Result<Glob, CommandError> {
        if pattern.len() > PATTERN_BYTES_MAX {
            return Err(CommandError::text(format!("ERR a pattern has at most {PATTERN_BYTES_MAX} bytes")));
        }
        // An element has at least one byte.
        let words = bit(pattern.len()).0 + 1;
        let mut glob = Glob { words, moves: vec![0; words * BYTES], stars: [0; STATE_WORDS_MAX], last: 0 };
        let mut rest = pattern;
        while let Some((&first, after)) = rest.split_first() {
            rest = match (first, after) {
                (b'*', _) => {
                    let (word, mask) = bit(glob.last);
                    glob.stars[word] |= mask;
                    after
                }
                (b'?', _) => {
                    glob.element(0..=u8::MAX, |_| true);
                    after
                }
                (b'\\', [escaped, after @ ..]) => {
                    glob.element(*escaped..=*escaped, |_| true);
                    after
                }
                (b'[', _) => {
                    let negated = after.first() == Some(&b'^');
                    let (class, after) = class(&after[usize::from(negated)..]);
                    glob.element(0..=u8::MAX, |byte| class[usize::from(byte)] != negated);
                    after
                }
                (literal, _) => {
                    glob.element(literal..=literal, |_| true);
                    after
                }
            };
        }
        Ok(glob)
    }

    fn element(&mut self, of: RangeInclusive<u8>, matches: impl Fn(u8) -> bool) {
        let (word, mask) = bit(self.last);
        for byte in of {
            if matches(byte) {
                self.moves[usize::from(byte) * self.words + word] |= mask;
            }
        }
        self.last += 1;
    }

    /// Whether all of `text` matches.
    pub fn matches(&self, text: &[u8]) -> bool {
        let mut states = [0; STATE_WORDS_MAX];
        states[0] = 1;
        let (word, mask) = bit(self.last);
        let states = &mut states[..=word];
        for &byte in text {
            let moves = &self.moves[usize::from(byte) * self.words..][..=word];
            let (mut carry, mut alive) = (0, 0);
            for ((state, moves), stars) in states.iter_mut().zip(moves).zip(&self.stars) {
                let moving = *state & moves;
                *state = moving << 1 | carry | *state & stars;
                carry = moving >> (u64::BITS - 1);
                alive |= *state;
            }
            if alive == 0 {
                return false;
            }
        }
        states[word] & mask != 0
    }
}

/// The bytes of a class, and what follows its bracket. An open class ends with the pattern.
fn class(mut rest: &[u8]) -> ([bool; BYTES], &[u8]) {
    let mut class = [false; BYTES];
    loop {
        rest = match rest {
            [] => return (class, rest),
            [b']', after @ ..] => return (class, after),
            [b'\\', escaped, after @ ..] => {
                class[usize::from(*escaped)] = true;
                after
            }
            [low, b'-', high, after @ ..] => {
                class[usize::from(*low.min(high))..=usize::from(*low.max(high))].fill(true);
                after
            }
            [literal, after @ ..] => {
                class[usize::from(*literal)] = true;
                after
            }
        };
    }
}
