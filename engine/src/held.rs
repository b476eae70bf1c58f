//! Whether the files that a process has open are still those of its data directory. One that was removed, or whose directory was
//! replaced, renamed or mounted over, takes writes and flushes as before, and nobody finds them again: what a node acknowledged then
//! would be gone with its process. A thread looks (a file system may hang), the node asks what it saw once a turn.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use crate::lsn::SegmentNo;
use crate::waker::Waker;
use crate::world::{self, Pace, Task};

/// How often the thread looks.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// A file or directory that this process has open, and under which name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl HeldFile {
    /// What stands at `path` now.
    pub fn at(path: &Path) -> io::Result<HeldFile> {
        Ok(HeldFile::of(path, &fs::metadata(path)?))
    }

    /// The open file, which is to stand at `path`.
    pub fn open(path: &Path, file: &File) -> io::Result<HeldFile> {
        Ok(HeldFile::of(path, &file.metadata()?))
    }

    fn of(path: &Path, facts: &fs::Metadata) -> HeldFile {
        HeldFile { path: path.to_owned(), device: facts.dev(), inode: facts.ino() }
    }

    /// Why it is not the one at its path any more. What cannot be looked at may still be it.
    pub fn gone(&self) -> Option<String> {
        let path = self.path.display();
        match fs::metadata(&self.path) {
            Ok(facts) if (facts.dev(), facts.ino()) == (self.device, self.inode) => None,
            Ok(_) => Some(format!(
                "{path} is another file than the one that this process has open: it was replaced or mounted over"
            )),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Some(format!("{path} was removed or renamed, and what this process writes is not in it"))
            }
            Err(_) => None,
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    files: Vec<HeldFile>,
    /// The segment that is written to.
    segment: Mutex<Option<(SegmentNo, HeldFile)>>,
    gone: OnceLock<String>,
    stop: AtomicBool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nobody panics with it")
}

impl Shared {
    fn look(&self) -> Option<String> {
        if let Some(text) = self.files.iter().find_map(HeldFile::gone) {
            return Some(text);
        }
        let (number, held) = locked(&self.segment).clone()?;
        let text = held.gone()?;
        // One that is not written to any more may have been recycled meanwhile.
        locked(&self.segment).as_ref().is_some_and(|(now, _)| *now == number).then_some(text)
    }
}

/// The files of a data directory that are being looked at, until this is dropped; by default none.
#[derive(Debug, Default)]
pub struct HeldFiles {
    shared: Arc<Shared>,
    task: Option<Task>,
    segment: Option<SegmentNo>,
}

impl HeldFiles {
    /// Begins to look at `files`; the waker ends the node's wait when one of them is gone. A simulated world has no other files.
    pub fn watch(files: Vec<HeldFile>, waker: Waker) -> io::Result<HeldFiles> {
        let shared = Arc::new(Shared { files, ..Shared::default() });
        if world::is_simulated() {
            return Ok(HeldFiles { shared, task: None, segment: None });
        }
        let seen = Arc::clone(&shared);
        let look = move || {
            if seen.stop.load(Ordering::Acquire) {
                return Pace::Over;
            }
            let Some(text) = seen.look() else { return Pace::Idle(LOOK_INTERVAL) };
            let _ = seen.gone.set(text);
            waker.wake();
            Pace::Over
        };
        let task = world::spawn("held-files", Box::new(look))?;
        Ok(HeldFiles { shared, task: Some(task), segment: None })
    }

    /// True when `number` is not the segment that is looked at yet.
    pub fn wants_segment(&self, number: SegmentNo) -> bool {
        self.segment != Some(number)
    }

    /// The log writes to this segment now, and no longer to the one before.
    pub fn set_segment(&mut self, number: SegmentNo, file: HeldFile) {
        self.segment = Some(number);
        *locked(&self.shared.segment) = Some((number, file));
    }

    /// What is gone, once something is.
    pub fn gone(&self) -> Option<&str> {
        self.shared.gone.get().map(String::as_str)
    }
}

impl Drop for HeldFiles {
    fn drop(&mut self) {
        // Not waited for: it may stand in a call to a file system that hangs.
        self.shared.stop.store(true, Ordering::Release);
        self.task.iter().for_each(Task::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_that_was_removed_replaced_or_moved_is_gone() {
        let dir = tempfile::tempdir().expect("a directory");
        let data = dir.path().join("data");
        let path = data.join("file");
        let make = || {
            fs::create_dir_all(&data).expect("made");
            File::create(&path).expect("made")
        };
        let changes: [(&str, &dyn Fn()); 5] = [
            ("removed", &|| fs::remove_file(&path).expect("removed")),
            ("replaced", &|| {
                fs::write(data.join("other"), b"").expect("made");
                fs::rename(data.join("other"), &path).expect("renamed");
            }),
            ("directory removed", &|| fs::remove_dir_all(&data).expect("removed")),
            ("directory renamed", &|| fs::rename(&data, dir.path().join("moved")).expect("renamed")),
            ("directory replaced", &|| {
                fs::rename(&data, dir.path().join("aside")).expect("renamed");
                drop(make());
            }),
        ];
        for (what, change) in changes {
            let file = make();
            let held = HeldFile::open(&path, &file).expect("looked at");
            assert_eq!(held, HeldFile::at(&path).expect("looked at"));
            assert_eq!(held.gone(), None, "before it is {what}");
            change();
            assert!(held.gone().is_some_and(|text| text.contains("file")), "{what}");
        }
    }

    #[test]
    fn segment_counts_only_while_it_is_written_to() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("segment");
        let file = File::create(&path).expect("made");
        let shared = Shared {
            files: vec![HeldFile::at(dir.path()).expect("there")],
            segment: Mutex::new(Some((SegmentNo(3), HeldFile::open(&path, &file).expect("open")))),
            ..Shared::default()
        };
        assert_eq!(shared.look(), None);
        fs::rename(&path, dir.path().join("next")).expect("recycled");
        assert!(shared.look().is_some());
        *locked(&shared.segment) = None;
        assert_eq!(shared.look(), None);
    }
}
