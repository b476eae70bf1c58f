//! One log on one disk: append or receive, group commit through io_uring, recovery, retention. Knows nothing of
//! networks, commands or stores.
//!
//! ```text
//!  records ──> log.rs ──seal──> frame.rs ──┐            ┌──────────────> shipper (hot frames, by pin)
//!            (a leader)                    ├─> buffer.rs ┤
//!  bytes ───> log.rs ──verify──────────────┘            └─submit─> ring/ ──> segment files (log/*.wal)
//!            (a replica)                        commit.rs   │                   ^ zeroed ahead, recycled: prepare.rs
//!                                    written, flushed <─────┘                   │ which may go: retain.rs
//!  store <── next_flushed ── flushed ──> flush_accounting.rs, watermark.rs                     │
//!                                                                               │
//!  at a start:  lock.rs ─> recover.rs (end of the log, torn tail or rot) ─> segment.rs (plain reads)
//!  damage:      repair.rs (what fits a gap) ─> mend.rs (kept aside, written over)
//!  reading:     reader.rs (replay, `log dump`, `log verify`) ──────────────────> segment.rs
//! ```
//!
//! Cores, without I/O and clock: `frame`, `commit`, `recover`, `retain`, `epoch` (all but load and save). Drivers: `log`,
//! `ring`, `prepare`, `segment`, `reader`, `mend`. Small durable files of a data directory: `meta`, `epoch`, `watermark`, `origin`, `lock`;
//! `small_file` keeps the first two and `origin` twice. `durable` tells which flushes can be believed, `held` whether the open files are still those of the directory. `file_size` is the limit of a file's size; `probe` measures a disk; `atomic_create` makes files that other libraries write;
//! `told` keeps logs from saying the same again and again; `waker` lets other threads end the ring thread's wait; `world` is the clock and the threads; `panics` says what becomes of
//! a panic; `limits` has every bound.

pub mod atomic_create;
pub mod buffer;
pub mod commit;
pub mod durable;
pub mod epoch;
pub mod error;
pub mod file_size;
pub mod flush_accounting;
pub mod frame;
pub mod held;
pub mod limits;
pub mod lock;
pub mod log;
pub mod lsn;
pub mod mend;
pub mod meta;
pub mod mutants;
pub mod origin;
pub mod panics;
pub mod prepare;
pub mod probe;
pub mod reader;
pub mod recover;
pub mod repair;
pub mod retain;
pub mod ring;
pub mod segment;
pub mod small_file;
pub mod told;
pub mod waker;
pub mod watermark;
pub mod world;

pub use epoch::EpochHistory;
pub use frame::Frame;
pub use log::{Log, LogConfig, LogError, SyncMethod};
pub use lsn::{Epoch, Lsn, SegmentNo};
pub use reader::LogReader;
pub use recover::Recovery;
pub use ring::Ring;
pub use waker::{WakeSource, Waker};
