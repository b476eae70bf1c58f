//! Puts a whole snapshot in the place of a node's log and store. Called under the directory's lock before either is opened: by
//! a node that has just received the copy, and by every start, because the one before may have been cut short. The ready marker
//! decides: without it nothing was changed, with it every step is done again until the marker is gone.
//!
//! | step | what | done before, it |
//! |---|---|---|
//! | Log | removes the segments: the copy holds what they said, and what it does not was put aside | finds none |
//! | Origin | says where the new log begins, and with which crc | writes the same |
//! | Epochs | takes the leader's epoch history | writes the same |
//! | Watermark | removes the durable watermark, which speaks of the old log | finds none |
//! | Cluster | takes the leader's cluster, if the node had none | writes the same |
//! | Store | renames the copy into the store's place | finds no copy: it is there |
//! | State | removes what is left of the fetch | finds none |
//! | Marker | removes the marker | is not reached |

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use walferry_engine::log::{LOG_DIR, LOST_DIR};
use walferry_engine::meta::Meta;
use walferry_engine::origin::Origin;
use walferry_engine::segment::list_segments;
use walferry_engine::watermark::WATERMARK_FILE;

use super::incoming::{Facts, INCOMING_FILE, READY_FILE, STATE_FILE, load};
use super::{SNAPSHOT_DIR, SnapshotError, failed, remove, sync_dir};
use crate::store::{Position, STORE_DIR, STORE_FILE};

/// One step; see the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Log,
    Origin,
    Epochs,
    Watermark,
    Cluster,
    Store,
    State,
    Marker,
}

const STEPS: [Step; 8] =
    [Step::Log, Step::Origin, Step::Epochs, Step::Watermark, Step::Cluster, Step::Store, Step::State, Step::Marker];

/// Finishes an install that is due in this data directory; what was put in place, if anything was.
pub fn finish(data: &Path) -> Result<Option<Facts>, SnapshotError> {
    let ready = data.join(SNAPSHOT_DIR).join(READY_FILE);
    let Some((facts, _, verified)) = load(&ready)? else {
        // One that cannot be trusted was never whole: it is renamed into its place.
        remove(&ready)?;
        return Ok(None);
    };
    debug_assert_eq!(verified, facts.bytes);
    for step in STEPS {
        run(step, data, &facts)?;
    }
    Ok(Some(facts))
}

fn run(step: Step, data: &Path, facts: &Facts) -> Result<(), SnapshotError> {
    let snapshot = data.join(SNAPSHOT_DIR);
    match step {
        Step::Log => remove_segments(&data.join(LOG_DIR)),
        Step::Origin => Ok(Origin { lsn: facts.snapshot, crc: facts.crc }.save(data)?),
        Step::Epochs => Ok(facts.history.save(data)?),
        Step::Watermark => {
            remove(&data.join(WATERMARK_FILE))?;
            sync_dir(data)
        }
        Step::Cluster => match Meta::load(data)? {
            Some(meta) if meta.cluster_id == 0 => Ok(Meta { cluster_id: facts.cluster_id.0, ..meta }.save(data)?),
            _ => Ok(()),
        },
        Step::Store => replace_store(&snapshot, &data.join(STORE_DIR)),
        Step::State => {
            remove(&snapshot.join(STATE_FILE))?;
            sync_dir(&snapshot)
        }
        Step::Marker => {
            remove(&snapshot.join(READY_FILE))?;
            sync_dir(&snapshot)
        }
    }
}

/// Keeps the store's file beside the frames that truncations cut off, because a part of what it holds is nowhere else. It is a
/// second name of the same file, which the copy then replaces.
pub fn keep_store(data: &Path, at: Position) -> Result<PathBuf, SnapshotError> {
    let (dir, store) = (data.join(LOST_DIR), data.join(STORE_DIR).join(STORE_FILE));
    // Named by its last frame as well: another state of the same LSN may be there from an earlier time.
    let kept = dir.join(format!("store-{:016X}-{:08x}.redb", at.applied.0, at.crc));
    match fs::hard_link(&store, &kept) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        outcome => outcome.map_err(failed("keep", &store))?,
    }
    sync_dir(&dir)?;
    Ok(kept)
}

fn remove_segments(log: &Path) -> Result<(), SnapshotError> {
    let segments = match list_segments(log) {
        Ok(segments) => segments,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("list", log)(error)),
    };
    // The newest first: what a crash leaves is a log that ends early, not one with a hole.
    for number in segments.into_iter().rev() {
        remove(&log.join(number.file_name()))?;
    }
    sync_dir(log)
}

fn replace_store(snapshot: &Path, store: &Path) -> Result<(), SnapshotError> {
    let (from, to) = (snapshot.join(INCOMING_FILE), store.join(STORE_FILE));
    fs::create_dir_all(store).map_err(failed("make", store))?;
    match fs::rename(&from, &to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        outcome => outcome.map_err(failed("rename", &from))?,
    }
    sync_dir(store)?;
    sync_dir(snapshot)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use walferry_cluster::member::ClusterId;
    use walferry_cluster::snapshot::PIECE_BYTES;
    use walferry_engine::epoch::EpochHistory;
    use walferry_engine::log::SyncMethod;
    use walferry_engine::lsn::{Epoch, Lsn, SegmentNo};

    use super::super::incoming::{Incoming, make_dir};
    use super::*;

    fn old_state(data: &Path, cluster_id: u128) {
        let meta = Meta {
            cluster_id,
            name: "b".to_owned(),
            segment_bytes: 16 << 20,
            sync_method: SyncMethod::Dsync,
            write_depth: 4,
        };
        meta.save(data).expect("meta");
        EpochHistory::from_entries(&[(Epoch(1), Lsn::ZERO)]).expect("one").save(data).expect("epochs");
        fs::write(data.join(WATERMARK_FILE), "an old mark").expect("mark");
        for dir in [LOG_DIR, STORE_DIR] {
            fs::create_dir(data.join(dir)).expect("a directory");
        }
        for number in 3..6 {
            fs::write(data.join(LOG_DIR).join(SegmentNo(number).file_name()), "old").expect("a segment");
        }
        fs::write(data.join(STORE_DIR).join(STORE_FILE), "the old store").expect("store");
    }

    fn receive(data: &Path) {
        make_dir(data).expect("made");
        let bytes = PIECE_BYTES as u64 + 5;
        let history = EpochHistory::from_entries(&[(Epoch(1), Lsn::ZERO), (Epoch(4), Lsn(8192))]).expect("two");
        let facts =
            Facts { cluster_id: ClusterId(7), snapshot: Lsn(1 << 33), crc: 5, segment_bytes: 16 << 20, bytes, history };
        let mut incoming = Incoming::begin(data, facts).expect("begun");
        for piece in [vec![1; PIECE_BYTES], vec![2; 5]] {
            assert!(incoming.push(&piece, crc32c::crc32c(&piece)).expect("written"));
        }
    }

    /// Every file with its bytes.
    fn image(dir: &Path) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(dir).expect("a directory") {
            let entry = entry.expect("an entry");
            let name = entry.file_name().into_string().expect("text");
            if entry.file_type().expect("a type").is_dir() {
                files.extend(image(&entry.path()).into_iter().map(|(file, bytes)| (format!("{name}/{file}"), bytes)));
            } else {
                files.insert(name, fs::read(entry.path()).expect("bytes"));
            }
        }
        files
    }

    #[test]
    fn interrupted_install_leaves_the_old_or_the_new_state() {
        for cluster_id in [0, 7] {
            let expected = {
                let data = tempfile::tempdir().expect("a directory");
                old_state(data.path(), cluster_id);
                receive(data.path());
                Incoming::declare_ready(data.path()).expect("declared");
                assert_eq!(finish(data.path()).expect("done").expect("something to do").snapshot, Lsn(1 << 33));
                image(data.path())
            };
            let names: Vec<&str> = expected.keys().map(String::as_str).collect();
            assert_eq!(
                names,
                ["epochs", "epochs.copy", "meta", "meta.copy", "origin", "origin.copy", "store/store.redb"]
            );
            assert_eq!(expected["store/store.redb"].len(), PIECE_BYTES + 5);
            assert!(String::from_utf8_lossy(&expected["meta"]).contains("00000007\n"));
            // Without the marker nothing happens.
            let data = tempfile::tempdir().expect("a directory");
            old_state(data.path(), cluster_id);
            receive(data.path());
            let before = image(data.path());
            assert_eq!(finish(data.path()).expect("nothing to do"), None);
            assert_eq!(image(data.path()), before);
            // Steps are whole or not begun; the one that is many (Log) is cut within as well.
            for done in 0..=STEPS.len() {
                for segments_gone in 0..=3 {
                    let data = tempfile::tempdir().expect("a directory");
                    old_state(data.path(), cluster_id);
                    receive(data.path());
                    Incoming::declare_ready(data.path()).expect("declared");
                    for number in (3..6).rev().take(segments_gone) {
                        remove(&data.path().join(LOG_DIR).join(SegmentNo(number).file_name())).expect("removed");
                    }
                    let (facts, _, _) = load(&data.path().join("snapshot/ready")).expect("read").expect("whole");
                    STEPS[..done].iter().for_each(|step| run(*step, data.path(), &facts).expect("a step"));
                    let again = finish(data.path()).expect("the next start");
                    assert_eq!(again.is_some(), done < STEPS.len());
                    assert!(image(data.path()) == expected, "cut short after {done} steps");
                    assert_eq!(finish(data.path()).expect("the start after that"), None);
                }
            }
        }
    }
}
