//! What stands on a disk: a base, and over it what was written since. A crash image is the base, moved on to the cut's last
//! flush, and over it a random part of the rest. Core but for `save`; randomness comes in as a generator with a seed.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rand::RngExt;
use rand::rngs::StdRng;

use super::trace::{Content, Moment, SECTOR_BYTES, Standing, Trace, Write};

/// The layer over the base is kept in pieces of this size.
const PIECE_BYTES: usize = 4096;
/// A file of it is written in pieces of this size.
const SAVED_BYTES: usize = 64 << 10;

/// What was written over a base.
pub type Layer = HashMap<u64, Box<[u8; PIECE_BYTES]>>;

/// A disk's content.
#[derive(Debug)]
pub struct Image {
    base: Vec<u8>,
    layer: Layer,
}

impl Image {
    /// A disk with this content.
    pub fn new(base: Vec<u8>) -> Image {
        assert!(base.len().is_multiple_of(PIECE_BYTES), "a disk of {} bytes", base.len());
        Image { base, layer: Layer::new() }
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.base.len() as u64
    }

    /// True when a request lies on the disk.
    pub fn holds(&self, offset: u64, length: usize) -> bool {
        offset.checked_add(length as u64).is_some_and(|end| end <= self.bytes())
    }

    /// Reads; the range must lie on the disk.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        for (piece, within, part) in pieces(offset, into.len()) {
            let into = &mut into[part.clone()];
            match self.layer.get(&piece) {
                Some(bytes) => into.copy_from_slice(&bytes[within..within + into.len()]),
                None => {
                    let at = piece as usize * PIECE_BYTES + within;
                    into.copy_from_slice(&self.base[at..at + into.len()]);
                }
            }
        }
    }

    /// Writes over the base; the range must lie on the disk.
    pub fn write(&mut self, offset: u64, content: &Content) {
        self.write_part(offset, content, 0..content.len());
    }

    fn write_part(&mut self, offset: u64, content: &Content, part: std::ops::Range<usize>) {
        for (piece, within, range) in pieces(offset + part.start as u64, part.len()) {
            let base = &self.base[piece as usize * PIECE_BYTES..][..PIECE_BYTES];
            let bytes = self.layer.entry(piece).or_insert_with(|| Box::new(base.try_into().expect("a whole piece")));
            content.copy(part.start + range.start, &mut bytes[within..within + range.len()]);
        }
    }

    /// Writes it to a file; zeros are holes.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let file = File::create(path)?;
        file.set_len(self.bytes())?;
        let mut bytes = vec![0; SAVED_BYTES];
        for at in (0..self.bytes()).step_by(SAVED_BYTES) {
            let length = SAVED_BYTES.min((self.bytes() - at) as usize);
            self.read(at, &mut bytes[..length]);
            if bytes[..length].iter().any(|byte| *byte != 0) {
                file.write_all_at(&bytes[..length], at)?;
            }
        }
        Ok(())
    }

    /// Forgets what was written over the base.
    pub fn reset(&mut self) {
        self.layer.clear();
    }

    /// What was written over the base.
    pub fn layer(&self) -> Layer {
        self.layer.clone()
    }

    /// Replaces what was written over the base.
    pub fn set_layer(&mut self, layer: Layer) {
        self.layer = layer;
    }

    /// Makes a write part of the base.
    fn make_durable(&mut self, write: &Write) {
        let at = write.offset as usize;
        write.content.copy(0, &mut self.base[at..at + write.content.len()]);
    }
}

/// The pieces that a range touches: the piece, where in it the range begins, and which part of the range that is.
fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let (piece, within) = (at / PIECE_BYTES as u64, at as usize % PIECE_BYTES);
        let part = done..length.min(done + PIECE_BYTES - within);
        done = part.end;
        (!part.is_empty()).then_some((piece, within, part))
    })
}

/// What becomes of each write that nothing had flushed, at random.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mood {
    /// None reached the disk.
    Lose,
    /// All did.
    Keep,
    /// Each did with this probability, and one in [`TORN_ONE_IN`] of them only in parts.
    Some(f64),
}

/// Of the writes that nothing had flushed, one in so many is torn.
const TORN_ONE_IN: u32 = 4;

impl Mood {
    /// One at random.
    pub fn any(rng: &mut StdRng) -> Mood {
        match rng.random_range(0..8) {
            0 => Mood::Lose,
            1 => Mood::Keep,
            2 => Mood::Some(0.9),
            3 => Mood::Some(0.1),
            _ => Mood::Some(0.5),
        }
    }
}

/// Writes what a cut at `at` leaves over the image's present content.
pub fn cut(image: &mut Image, trace: &Trace, at: Moment, mood: Mood, rng: &mut StdRng) {
    for (write, standing) in trace.at(at) {
        match standing {
            Standing::Durable => image.write(write.offset, &write.content),
            Standing::Uncertain => draw(image, write, mood, rng),
        }
    }
}

fn draw(image: &mut Image, write: &Write, mood: Mood, rng: &mut StdRng) {
    let keep = match mood {
        Mood::Lose => 0.0,
        Mood::Keep => 1.0,
        Mood::Some(keep) => keep,
    };
    if matches!(mood, Mood::Some(_)) && rng.random_range(0..TORN_ONE_IN) == 0 {
        let length = write.content.len();
        for from in (0..length).step_by(SECTOR_BYTES) {
            if rng.random_bool(0.5) {
                image.write_part(write.offset, &write.content, from..length.min(from + SECTOR_BYTES));
            }
        }
    } else if rng.random_bool(keep) {
        image.write(write.offset, &write.content);
    }
}

/// Crash images of one trace, at moments that only grow: what is flushed moves into the base once.
#[derive(Debug)]
pub struct Cuts {
    /// Answered writes in the order of their answers, not yet in the base.
    ahead: std::collections::VecDeque<Write>,
    /// The rest: never answered.
    unanswered: Vec<Write>,
    flushes: Vec<super::trace::Flush>,
    at: Moment,
}

impl Cuts {
    /// Of a whole trace.
    pub fn new(trace: Trace) -> Cuts {
        let (mut answered, unanswered): (Vec<_>, Vec<_>) =
            trace.writes.into_iter().partition(|write| write.answered.is_some());
        answered.sort_by_key(|write| write.answered);
        Cuts { ahead: answered.into(), unanswered, flushes: trace.flushes, at: Moment(0) }
    }

    /// Makes `image`, on which all earlier cuts of this trace were made, the one of a cut at `at`.
    pub fn next(&mut self, image: &mut Image, at: Moment, mood: Mood, rng: &mut StdRng) {
        assert!(self.at <= at, "cuts go forward: {:?} after {:?}", at, self.at);
        self.at = at;
        image.reset();
        let flushed = Trace { flushes: self.flushes.clone(), ..Trace::default() }.flushed(at);
        while self.ahead.front().is_some_and(|write| write.answered.is_some_and(|answered| answered < flushed)) {
            image.make_durable(&self.ahead.pop_front().expect("there is one"));
        }
        let here = self.ahead.iter().chain(&self.unanswered).filter(|write| write.arrived <= at).cloned();
        let rest = Trace { writes: here.collect(), flushes: self.flushes.clone(), bytes: 0 };
        cut(image, &rest, at, mood, rng);
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::super::trace::Flush;
    use super::*;

    fn written(image: &Image) -> Vec<u8> {
        let mut all = vec![0; image.bytes() as usize];
        image.read(0, &mut all);
        all
    }

    /// Writes of one sector, `value` at sector `sector`: even moments arrive, odd ones answer; a flush after every third.
    fn trace(rng: &mut StdRng) -> Trace {
        let mut trace = Trace::default();
        for step in 0..60_u64 {
            let (arrived, answered) = (Moment(step * 4 + 1), Moment(step * 4 + 2));
            let content = Content::Bytes(vec![step as u8 + 1; SECTOR_BYTES]);
            let number =
                trace.write(rng.random_range(0..16) * SECTOR_BYTES as u64, content, step.is_multiple_of(7), arrived);
            trace.writes[number].answered = Some(answered);
            if step.is_multiple_of(3) {
                trace.flushes.push(Flush { arrived: Moment(step * 4 + 3), answered: Moment(step * 4 + 4) });
            }
        }
        trace
    }

    #[test]
    fn cuts_that_go_forward_are_the_cuts_made_from_the_beginning() {
        for seed in 0..20 {
            let mut rng = StdRng::seed_from_u64(seed);
            let trace = trace(&mut rng);
            let (mut cuts, mut image) = (Cuts::new(trace.clone()), Image::new(vec![0; 4 * PIECE_BYTES]));
            for at in (0..240).step_by(5).map(Moment) {
                let mood = Mood::any(&mut rng);
                let mut again = Image::new(vec![0; 4 * PIECE_BYTES]);
                cuts.next(&mut image, at, mood, &mut StdRng::seed_from_u64(at.0));
                // The generator meets fewer writes here: what is certain is the same, and so is all or nothing.
                if !matches!(mood, Mood::Some(_)) {
                    cut(&mut again, &trace, at, mood, &mut StdRng::seed_from_u64(at.0));
                    assert_eq!(written(&image), written(&again), "seed {seed}, {at:?}, {mood:?}");
                }
            }
        }
    }

    #[test]
    fn sector_after_a_power_cut_holds_its_flushed_write_or_later() {
        for seed in 0..40 {
            let mut rng = StdRng::seed_from_u64(seed);
            let trace = trace(&mut rng);
            let at = Moment(rng.random_range(0..240));
            let mut image = Image::new(vec![0; 4 * PIECE_BYTES]);
            cut(&mut image, &trace, at, Mood::any(&mut rng), &mut rng);
            let bytes = written(&image);
            for sector in 0..16 {
                let value = bytes[sector * SECTOR_BYTES];
                let here = |(write, _): &&(&Write, Standing)| write.offset as usize == sector * SECTOR_BYTES;
                let all = trace.at(at);
                let durable = all.iter().filter(here).rev().find(|(_, standing)| *standing == Standing::Durable);
                let oldest = durable.map_or(0, |(write, _)| (write.arrived.0 / 4 + 1) as u8);
                assert!(value >= oldest, "seed {seed}: sector {sector} holds {value}, {oldest} was flushed");
            }
        }
    }

    #[test]
    fn ranges_across_pieces_read_back() {
        let mut image = Image::new(vec![7; 2 * PIECE_BYTES]);
        let offset = PIECE_BYTES as u64 - 3;
        image.write(offset, &Content::Bytes(vec![1, 2, 3, 4, 5]));
        let mut read = [0; 7];
        image.read(offset - 1, &mut read);
        assert_eq!(read, [7, 1, 2, 3, 4, 5, 7]);
        assert!(image.holds(2 * PIECE_BYTES as u64 - 1, 1) && !image.holds(2 * PIECE_BYTES as u64, 1));
        image.reset();
        image.read(offset, &mut read);
        assert_eq!(read, [7; 7]);
    }
}
