//! What the fuzz targets do with bytes that may come from anybody: each module's `run` takes any bytes and panics when a promise is
//! broken. `fuzz_targets/` calls them under libFuzzer, `tests/corpus.rs` over the corpus on any toolchain.
//!
//! | target | reads | promises |
//! |---|---|---|
//! | `resp` | requests of clients | the same commands however they are cut; bounds; what is understood survives being written again |
//! | `peer_message` | messages of peers, both sides of the handshake, questions of members | round trip; bounds |
//! | `proof` | both sides of the proof of the peer secret | nobody gets through without the secret; bounds |
//! | `frame` | a frame | nothing with a wrong checksum, place or tiling, by a second implementation |
//! | `recover` | a log, damaged in places | no end but the end of the valid chain, by a second implementation |
//! | `files` | the small files of a data directory | what is loaded is within its bounds |
//! | `record` | a record | round trip |
//! | `users` | the users' file | ACL LIST says the same; errors tell no password |
//! | `config` | walferry.toml | a configuration that is taken is within its bounds |
//!
//! All of them: no panic, and no more memory than `bytes_max` says.

use std::sync::Once;

use walferry_engine::limits::FRAME_BYTES_MAX;

pub mod config;
pub mod files;
pub mod frame;
mod memory;
pub mod peer_message;
pub mod proof;
pub mod record;
pub mod recover;
pub mod resp;
pub mod users;

/// A target.
#[derive(Clone, Copy)]
pub struct Target {
    /// The folder of its corpus.
    pub name: &'static str,
    /// What it does.
    pub run: fn(&[u8]),
    /// What it may allocate at once for an input of this length; what the reader keeps and what the check needs, together.
    pub bytes_max: fn(usize) -> usize,
}

impl Target {
    /// The target with this name.
    pub fn named(name: &str) -> &'static Target {
        TARGETS.iter().find(|target| target.name == name).expect("a target")
    }

    /// Runs it; what it had allocated at most.
    pub fn most_allocated(&self, input: &[u8]) -> usize {
        memory::most_during(|| (self.run)(input))
    }
}

/// Runs a target as libFuzzer does: an input that takes more memory than is promised is a find as well.
pub fn fuzz(name: &str, input: &[u8]) {
    /// The first run allocates what is made once.
    static WARM: Once = Once::new();
    let target = Target::named(name);
    WARM.call_once(|| (target.run)(&[0; 16]));
    let (most, bytes_max) = (target.most_allocated(input), (target.bytes_max)(input.len()));
    assert!(most <= bytes_max, "{most} bytes allocated, {bytes_max} are the bound");
}

/// Every target.
pub const TARGETS: &[Target] = &[
    Target { name: "resp", run: resp::run, bytes_max: |input| 64 * input + (64 << 10) },
    // A replica reserves space for the frame that its leader announces.
    Target {
        name: "peer_message",
        run: peer_message::run,
        bytes_max: |input| 256 * input + (1 << 20) + FRAME_BYTES_MAX,
    },
    Target { name: "proof", run: proof::run, bytes_max: |_| 4 << 10 },
    Target { name: "frame", run: frame::run, bytes_max: |input| 4 * input + (16 << 10) },
    Target { name: "recover", run: recover::run, bytes_max: |input| 4 * input + (1 << 20) },
    Target { name: "files", run: files::run, bytes_max: |input| 64 * input + (64 << 10) },
    Target { name: "record", run: record::run, bytes_max: |input| 4 * input + (4 << 10) },
    Target { name: "users", run: users::run, bytes_max: |input| 64 * input + (64 << 10) },
    Target { name: "config", run: config::run, bytes_max: |input| 256 * input + (1 << 20) },
];

/// Numbers and pieces off the front of an input; zeros once it is used up.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn byte(&mut self) -> u8 {
        let Some((&byte, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        byte
    }

    pub(crate) fn number<const BYTES: usize>(&mut self) -> u64 {
        (0..BYTES).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }

    pub(crate) fn piece(&mut self, bytes: usize) -> &'a [u8] {
        let (piece, rest) = self.0.split_at(bytes.min(self.0.len()));
        self.0 = rest;
        piece
    }
}
