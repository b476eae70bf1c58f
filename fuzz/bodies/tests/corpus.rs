//! Every fuzz target over its corpus and a few thousand mutations of it, on any toolchain: no panic, and no more memory than the
//! target says. Past finds stay in the corpus under a name that tells what they were.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use walferry_fuzz_bodies::{TARGETS, Target};

/// Mutations of a target's corpus; the same ones each time, unless these variables say otherwise.
const MUTATIONS: u64 = 4_000;
const MUTATIONS_VARIABLE: &str = "WALFERRY_FUZZ_MUTATIONS";
const SEED: u64 = 0x57_41_4C_46_45_52_52_59;
const SEED_VARIABLE: &str = "WALFERRY_FUZZ_SEED";
/// Inputs grow to at most this size.
const INPUT_BYTES_MAX: usize = 8 << 10;
const CORPUS_FILES_MAX: usize = 50;
const CORPUS_FILE_BYTES_MAX: u64 = 2 << 10;

struct Random(u64);

impl Random {
    /// splitmix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

fn corpus(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus").join(name);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&dir)
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        .map(|entry| entry.expect("a readable folder").path())
        .collect();
    files.sort();
    files
        .into_iter()
        .map(|path| {
            let bytes = std::fs::read(&path).expect("a readable file");
            (path, bytes)
        })
        .collect()
}

/// One to four small changes: what libFuzzer does first, without its feedback.
fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    const TELLING: [u64; 8] = [0, 1, 0x7f, 0x80, 0xffff, 0x7fff_ffff, u32::MAX as u64, u64::MAX];
    for _ in 0..1 + random.below(4) {
        let at = random.below(input.len());
        match random.below(8) {
            0 if !input.is_empty() => input[at] ^= 1 << random.below(8),
            1 if !input.is_empty() => input[at] = random.next() as u8,
            2 => input.truncate(at),
            3 if !input.is_empty() => drop(input.remove(at)),
            4 => input.insert(at, random.next() as u8),
            5 => {
                let from = random.below(other.len());
                let part = &other[from..other.len().min(from + 1 + random.below(64))];
                input.splice(at..at, part.iter().copied());
            }
            6 => {
                let telling = TELLING[random.below(TELLING.len())].to_le_bytes();
                let part = &telling[..[1, 2, 4, 8][random.below(4)]];
                let to = input.len().min(at + part.len());
                input.splice(at..to, part.iter().copied());
            }
            _ => {
                let digits = (random.next() >> random.below(64)).to_string();
                input.splice(at..at, digits.bytes());
            }
        }
    }
    input.truncate(INPUT_BYTES_MAX);
}

fn check(target: &Target, input: &[u8], what: &dyn std::fmt::Display) {
    let shown = || input.escape_ascii().to_string();
    match catch_unwind(AssertUnwindSafe(|| target.most_allocated(input))) {
        Err(_) => panic!("{}: {what}: panicked on \"{}\"", target.name, shown()),
        Ok(most) => {
            let bytes_max = (target.bytes_max)(input.len());
            assert!(
                most <= bytes_max,
                "{}: {what}: {most} bytes allocated, {bytes_max} are the bound: \"{}\"",
                target.name,
                shown()
            );
        }
    }
}

fn chosen(variable: &str, otherwise: u64) -> u64 {
    let parsed = |text: String| text.parse().unwrap_or_else(|_| panic!("{variable}={text}: expected a number"));
    std::env::var(variable).map_or(otherwise, parsed)
}

fn run(name: &str) {
    let target = Target::named(name);
    // The first run allocates what is made once.
    (target.run)(&[0; 16]);
    let files = corpus(name);
    for (path, bytes) in &files {
        check(target, bytes, &path.display());
    }
    let mut random = Random(chosen(SEED_VARIABLE, SEED));
    for number in 0..chosen(MUTATIONS_VARIABLE, MUTATIONS) {
        let mut input = files[random.below(files.len())].1.clone();
        let other = &files[random.below(files.len())].1;
        mutate(&mut input, other, &mut random);
        check(target, &input, &format_args!("mutation {number}"));
    }
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            run(stringify!($name));
        })*

        #[test]
        fn every_target_is_tested_and_has_a_small_corpus() {
            assert_eq!(TARGETS.iter().map(|target| target.name).collect::<Vec<_>>(), [$(stringify!($name)),*]);
            for target in TARGETS {
                let files = corpus(target.name);
                assert!((1..=CORPUS_FILES_MAX).contains(&files.len()), "{}: {} files", target.name, files.len());
                for (path, bytes) in files {
                    assert!(bytes.len() as u64 <= CORPUS_FILE_BYTES_MAX, "{}: {} bytes", path.display(), bytes.len());
                }
            }
        }
    };
}

targets!(resp peer_message proof frame recover files record users config);
