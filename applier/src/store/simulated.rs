//! The store's file on a simulated disk: what is written and not flushed yet may be taken back by a crash, and after one nothing is
//! written any more. The bytes themselves are in an ordinary file. Used where the world is simulated, in place of the database's own
//! access to its file.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use redb::StorageBackend;
use redb::backends::FileBackend;
use walferry_engine::mutants;
use walferry_engine::world::simulated::{Undo, World, world};

/// The file.
#[derive(Debug)]
pub struct SimulatedFile {
    path: PathBuf,
    file: FileBackend,
}

impl SimulatedFile {
    /// Opens the file at `path`, which is there.
    pub fn open(path: &Path) -> Result<SimulatedFile, redb::Error> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(SimulatedFile { path: path.to_owned(), file: FileBackend::new(file)? })
    }

    fn disk(&self) -> Rc<dyn World> {
        world().expect("the file of a simulated node")
    }
}

impl StorageBackend for SimulatedFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.disk().writes(&self.path, Undo::Length(self.len()?))?;
        self.file.set_len(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()?;
        if !mutants::is_on("checkpoint-without-a-flush") {
            self.disk().synced(&self.path);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut before = vec![0; data.len()];
        self.file.read(offset, &mut before)?;
        self.disk().writes(&self.path, Undo::Bytes(offset, before))?;
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }
}
