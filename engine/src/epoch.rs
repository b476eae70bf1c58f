//! Which leadership wrote which part of the log. A frame is valid at its position only if its epoch is the one that the
//! history has for that position: this is what betrays frames that a truncation left behind. `fork_with` and `epoch_at` are
//! pure; `load` and `save` keep the history in one small file.

use std::io;
use std::path::{Path, PathBuf};

use crate::lsn::{Epoch, Lsn};
use crate::small_file::{self, Found};

/// The file of the history in the data directory.
pub const EPOCHS_FILE: &str = "epochs";
/// Epochs that a history holds; beyond it a node refuses to begin another.
pub const EPOCHS_MAX: usize = 1 << 20;
const HEADING: &str = "# walferry epoch history: epoch, LSN of its first frame";

/// Why a history cannot be read, written or extended.
#[derive(Debug, thiserror::Error)]
pub enum EpochError {
    /// The file cannot be read or written.
    #[error("cannot {what} the epoch history {}: {source}", path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file and its copy are damaged.
    #[error(
        "{} is damaged, and so is its copy beside it: without it nobody can tell which of this node's frames count. Restore one of \
         the two from a copy of the directory, or join anew: empty the directory and start the node again, with `walferry remove` \
         before it for a member of a cluster",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// The file is whole and says what no history can say.
    #[error("{}, line {line}: not an epoch and the LSN of its start in ascending order; restore the file from a copy", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// Neither epochs nor positions may go back.
    #[error("epoch {epoch} at {start} does not follow epoch {last} at {last_start}")]
    Order {
        /// The epoch that was to begin.
        epoch: Epoch,
        /// Where.
        start: Lsn,
        /// The last one.
        last: Epoch,
        /// Where that began.
        last_start: Lsn,
    },
}

/// The epochs of a log and where each began, both ascending. Before the first entry the log is in epoch 0, which has no frames.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EpochHistory {
    starts: Vec<(Epoch, Lsn)>,
}

impl EpochHistory {
    /// The history with these entries; `None` unless epochs ascend and positions do not go back.
    pub fn from_entries(entries: &[(Epoch, Lsn)]) -> Option<EpochHistory> {
        let ascending = entries.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1);
        let fits = entries.len() <= EPOCHS_MAX && entries.first().is_none_or(|first| first.0 > Epoch(0));
        (ascending && fits).then(|| EpochHistory { starts: entries.to_vec() })
    }

    /// All entries, oldest first.
    pub fn entries(&self) -> &[(Epoch, Lsn)] {
        &self.starts
    }

    /// The newest epoch; 0 when none has begun.
    pub fn last_epoch(&self) -> Epoch {
        self.starts.last().map_or(Epoch(0), |last| last.0)
    }

    /// Where the newest epoch began.
    pub fn last_start(&self) -> Lsn {
        self.starts.last().map_or(Lsn::ZERO, |last| last.1)
    }

    /// The epoch of a frame that starts at `lsn`.
    pub fn epoch_at(&self, lsn: Lsn) -> Epoch {
        let after = self.starts.partition_point(|&(_, start)| start <= lsn);
        after.checked_sub(1).map_or(Epoch(0), |index| self.starts[index].0)
    }

    /// The epoch of the last frame of a log that ends at `end`; 0 for an empty log.
    pub fn epoch_of_end(&self, end: Lsn) -> Epoch {
        // Asked for each read: nearly always the newest.
        match self.starts.last() {
            Some(&(epoch, start)) if end > start => epoch,
            _ => end.0.checked_sub(1).map_or(Epoch(0), |last| self.epoch_at(Lsn(last))),
        }
    }

    /// Where `epoch` ended, if a later one began; `None` for the newest and for one that is not in the history.
    pub fn end_of(&self, epoch: Epoch) -> Option<Lsn> {
        let index = self.starts.binary_search_by_key(&epoch, |entry| entry.0).ok()?;
        self.starts.get(index + 1).map(|next| next.1)
    }

    /// Forgets epochs that began beyond `end`: a log that ends there holds nothing of them.
    pub fn cut(&mut self, end: Lsn) {
        self.starts.retain(|&(_, start)| start <= end);
    }

    /// Begins `epoch` at `start`.
    pub fn push(&mut self, epoch: Epoch, start: Lsn) -> Result<(), EpochError> {
        let (last, last_start) = (self.last_epoch(), self.last_start());
        if epoch <= last || start < last_start || self.starts.len() >= EPOCHS_MAX {
            return Err(EpochError::Order { epoch, start, last, last_start });
        }
        self.starts.push((epoch, start));
        Ok(())
    }

    /// Up to where a log with history `theirs` that ends at `their_end` holds the same frames as ours: the end of the newest
    /// epoch that both have, in the log where it ended first.
    pub fn fork_with(&self, theirs: &EpochHistory, their_end: Lsn) -> Lsn {
        let shared = self.starts.iter().rev().find(|entry| theirs.starts.binary_search(entry).is_ok());
        let Some(&(epoch, _)) = shared else {
            // Nothing in common: equal only where neither has frames.
            return self.starts.first().map_or(Lsn::ZERO, |first| first.1).min(their_end);
        };
        let ours = self.end_of(epoch).unwrap_or(Lsn::MAX);
        ours.min(theirs.end_of(epoch).unwrap_or(Lsn::MAX)).min(their_end)
    }

    /// Reads the history of a data directory; a directory without one has an empty history.
    pub fn load(dir: &Path) -> Result<EpochHistory, EpochError> {
        let path = dir.join(EPOCHS_FILE);
        let text = match small_file::load(&path) {
            Ok(Found::Text(text)) => text,
            Ok(Found::Nothing) => return Ok(EpochHistory::default()),
            Ok(Found::Damaged) => return Err(EpochError::Damaged { path }),
            Err(source) => return Err(EpochError::Io { what: "read", path, source }),
        };
        let mut history = EpochHistory::default();
        for (index, line) in text.lines().enumerate() {
            if line.starts_with('#') || line.is_empty() {
                continue;
            }
            let entry = line.split_once(' ').and_then(|(epoch, lsn)| Some((epoch.parse().ok()?, lsn.parse().ok()?)));
            let taken = entry.is_some_and(|(epoch, lsn)| history.push(epoch, lsn).is_ok());
            if !taken {
                return Err(EpochError::Line { path, line: index + 1 });
            }
        }
        Ok(history)
    }

    /// Makes the history durable: a new file, flushed, renamed over the old one, and the directory flushed.
    pub fn save(&self, dir: &Path) -> Result<(), EpochError> {
        let path = dir.join(EPOCHS_FILE);
        let mut text = format!("{HEADING}\n");
        for (epoch, start) in &self.starts {
            text.push_str(&format!("{epoch} {start}\n"));
        }
        small_file::save(&path, &text).map_err(|source| EpochError::Io { what: "write", path, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(entries: &[(u64, u64)]) -> EpochHistory {
        let entries: Vec<_> = entries.iter().map(|&(epoch, lsn)| (Epoch(epoch), Lsn(lsn))).collect();
        EpochHistory::from_entries(&entries).expect("ascending")
    }

    #[test]
    fn position_belongs_to_the_last_epoch_begun_before_it() {
        let history = history(&[(1, 0), (2, 100), (4, 100), (5, 300)]);
        for (lsn, epoch) in [(0, 1), (99, 1), (100, 4), (299, 4), (300, 5), (9999, 5)] {
            assert_eq!(history.epoch_at(Lsn(lsn)), Epoch(epoch), "at {lsn}");
        }
        assert_eq!(EpochHistory::default().epoch_at(Lsn(5)), Epoch(0));
        for (end, epoch) in [(0, 0), (1, 1), (100, 1), (101, 4), (300, 4), (301, 5)] {
            assert_eq!(history.epoch_of_end(Lsn(end)), Epoch(epoch), "up to {end}");
        }
    }

    #[test]
    fn the_fork_is_where_the_newest_shared_epoch_ended_first() {
        let leader = history(&[(1, 0), (2, 100), (3, 200)]);
        type Case = (&'static [(u64, u64)], u64, u64);
        let cases: [Case; 6] = [
            (&[(1, 0), (2, 100), (3, 200)], 500, 500),
            (&[(1, 0), (2, 100)], 250, 200),
            (&[(1, 0), (2, 100)], 150, 150),
            (&[(1, 0)], 180, 100),
            (&[(1, 0), (2, 100), (4, 150)], 400, 150),
            (&[], 0, 0),
        ];
        for (entries, end, fork) in cases {
            assert_eq!(leader.fork_with(&history(entries), Lsn(end)), Lsn(fork), "{entries:?} up to {end}");
        }
    }

    #[test]
    fn fork_of_leaders_that_began_the_same_number_is_found() {
        let common = history(&[(1, 0)]);
        let begun = |random, start, later: &[u64]| {
            let mut history = common.clone();
            let mut epoch = Epoch(1).next_alone(random);
            history.push(epoch, Lsn(start)).unwrap();
            for start in later {
                epoch = epoch.next_alone(random);
                history.push(epoch, Lsn(*start)).unwrap();
            }
            history
        };
        let promoted = begun(7, 100, &[]);
        for (restarted, end, fork) in [
            (begun(8, 100, &[]), 150, 100),
            (begun(8, 100, &[400]), 500, 100),
            (begun(8, 120, &[]), 150, 100),
            (begun(8, 60, &[]), 150, 60),
        ] {
            assert_eq!(promoted.fork_with(&restarted, Lsn(end)), Lsn(fork), "{restarted:?}");
            assert_eq!(restarted.fork_with(&promoted, Lsn(end)), Lsn(fork), "{restarted:?}");
        }
    }

    #[test]
    fn neither_epochs_nor_positions_go_back() {
        let mut history = history(&[(1, 0), (2, 100)]);
        assert!(history.push(Epoch(2), Lsn(200)).is_err());
        assert!(history.push(Epoch(3), Lsn(99)).is_err());
        assert!(history.push(Epoch(3), Lsn(100)).is_ok());
    }

    #[test]
    fn a_log_that_is_too_short_for_an_epoch_forgets_it() {
        let mut history = history(&[(1, 0), (2, 100), (3, 200)]);
        history.cut(Lsn(150));
        assert_eq!(history.last_epoch(), Epoch(2));
        assert!(history.push(Epoch(4), Lsn(150)).is_ok());
    }

    #[test]
    fn a_saved_history_is_loaded_and_a_damaged_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(EpochHistory::load(dir.path()).unwrap(), EpochHistory::default());
        let saved = history(&[(1, 0), (7, 0x16_0000_1000)]);
        saved.save(dir.path()).unwrap();
        assert_eq!(EpochHistory::load(dir.path()).unwrap(), saved);
        small_file::save(&dir.path().join(EPOCHS_FILE), "3 0/1000\n2 0/2000\n").unwrap();
        let error = EpochHistory::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("epochs, line 2"), "{error}");
        for name in [EPOCHS_FILE, "epochs.copy"] {
            std::fs::write(dir.path().join(name), "3 0/1000\n").unwrap();
        }
        let error = EpochHistory::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("epochs is damaged"), "{error}");
    }
}
