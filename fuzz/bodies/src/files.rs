//! The small files of a data directory, whatever they hold: they are loaded, or the node says which one is damaged. The first byte
//! chooses the file.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use walferry_applier::snapshot::incoming::{Incoming, READY_FILE, STATE_FILE};
use walferry_applier::snapshot::install;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::limits::{SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN, WRITE_DEPTH_MAX};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::meta::Meta;
use walferry_engine::origin::Origin;
use walferry_engine::small_file;
use walferry_engine::watermark::{KnownWatermark, Watermark};
use walferry_shipper::slots::{SLOTS_MAX, Slots};

/// A directory of this process, in memory where there is such a place.
fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let dir = parent.join(format!("walferry-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("snapshot")).expect("a directory for the files");
        dir
    })
}

fn with_file<T>(name: &str, bytes: &[u8], load: impl FnOnce(&Path) -> T) -> T {
    let path = directory().join(name);
    std::fs::write(&path, bytes).expect("the file is written");
    let loaded = load(directory());
    let _ = std::fs::remove_file(&path);
    loaded
}

/// As `with_file`, with the checksum that the file has to end with: what is behind it is to be reached.
fn with_sealed<T>(name: &str, bytes: &[u8], load: impl FnOnce(&Path) -> T) -> T {
    with_file(name, small_file::seal(&String::from_utf8_lossy(bytes)).as_bytes(), load)
}

/// Any bytes.
pub fn run(data: &[u8]) {
    let Some((&which, bytes)) = data.split_first() else { return };
    match which % 7 {
        0 => {
            if let Ok(Some(meta)) = with_sealed("meta", bytes, Meta::load) {
                assert!((SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&meta.segment_bytes));
                assert!((1..=WRITE_DEPTH_MAX).contains(&meta.write_depth));
            }
        }
        1 => {
            if let Ok(history) = with_sealed("epochs", bytes, EpochHistory::load) {
                assert!(history.entries().is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1));
                for lsn in [Lsn::ZERO, Lsn(4096), Lsn::MAX] {
                    let _ = (history.epoch_at(lsn), history.epoch_of_end(lsn));
                }
                let _ = (history.end_of(Epoch(1)), history.last_start());
                assert!(history.fork_with(&history, Lsn::MAX) <= Lsn::MAX);
            }
        }
        2 => {
            if let Ok(KnownWatermark::As(watermark)) = with_file("durable", bytes, Watermark::load) {
                assert!(watermark.bound(&EpochHistory::default()) <= watermark.durable);
            }
        }
        3 => drop(with_sealed("origin", bytes, Origin::load)),
        4 => {
            if let Ok(slots) = with_sealed("slots", bytes, Slots::load) {
                assert!(slots.iter().count() <= SLOTS_MAX);
                let _ = slots.hold();
            }
        }
        5 => {
            let name = format!("snapshot/{STATE_FILE}");
            if let Ok(Some(incoming)) = with_file(&name, bytes, Incoming::resume) {
                assert!(incoming.verified() <= incoming.facts().bytes);
            }
        }
        _ => {
            // A marker alone is an instruction without its copy: it may fail, and it may not panic.
            let name = format!("snapshot/{READY_FILE}");
            drop(with_file(&name, bytes, install::finish));
        }
    }
}
