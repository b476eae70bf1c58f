//! The disk as a file of this host, for a loop device: FUSE with one file and no directory, so that this host's kernel writes to
//! the same disk as a guest does, recorded and cut in the same way. What the kernel writes into the loop device comes here at
//! once, what it flushes comes as FSYNC. Reads every request that is there before it answers one. Needs root; knows no trace.
//!
//! The protocol is `struct fuse_*` of `<linux/fuse.h>`, numbers as this machine keeps them.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Content, Disk, Failed, Pending, Request};

const VERSION: (u32, u32) = (7, 31);
const SETATTR: u32 = 4;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const INIT: u32 = 26;
/// FORGET, INTERRUPT, BATCH_FORGET: nobody waits for an answer.
const UNANSWERED: [u32; 3] = [2, 36, 42];

/// FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_MAX_PAGES
const INIT_FLAGS: u32 = 1 | 1 << 5 | 1 << 22;
const WRITE_BYTES_MAX: usize = 1 << 20;
const PAGES_MAX: u16 = (WRITE_BYTES_MAX / 4096) as u16;
const HEAD_BYTES: usize = 40;
/// Of READ and WRITE, before a write's bytes.
const ARGUMENT_BYTES: usize = 40;
const REQUEST_BYTES_MAX: usize = WRITE_BYTES_MAX + 4096;
/// Requests that are read ahead of the one that is answered.
const WAITING_MAX: usize = 256;
const FILE_MODE: u32 = 0o100_600;
/// The file is closed within this time after the last process that used it.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(60);

/// The disk as a file, until it is dropped or this process ends.
#[derive(Debug)]
pub struct DiskFile {
    path: PathBuf,
    opened: Arc<Opened>,
}

/// How often the file is open.
#[derive(Debug, Default)]
struct Opened {
    count: Mutex<usize>,
    changed: Condvar,
}

impl Opened {
    fn change(&self, change: impl FnOnce(&mut usize)) {
        change(&mut self.count.lock().expect("the count's lock"));
        self.changed.notify_all();
    }
}

impl DiskFile {
    /// Puts the disk over the file at `path`, in this thread's mount namespace.
    pub fn serve(disk: &Disk, path: &Path) -> io::Result<DiskFile> {
        File::create(path)?;
        let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/fuse")?;
        let options = format!("fd={},rootmode={FILE_MODE:o},user_id=0,group_id=0", device.as_raw_fd());
        mount(Some("power"), path, Some("fuse"), MsFlags::MS_NODEV | MsFlags::MS_NOSUID, Some(options.as_str()))?;
        let opened = Arc::new(Opened::default());
        let server =
            Server { disk: disk.clone(), device, opened: Arc::clone(&opened), bytes: disk.state().image.bytes() };
        std::thread::Builder::new().name("disk-file".to_owned()).spawn(move || {
            // Ends with an error when the file is unmounted.
            let _ = server.run();
        })?;
        Ok(DiskFile { path: path.to_owned(), opened })
    }

    /// Waits until nobody has it open; false when somebody keeps it.
    pub fn wait_until_closed(&self) -> bool {
        let count = self.opened.count.lock().expect("the count's lock");
        let waited = self.opened.changed.wait_timeout_while(count, CLOSE_TIME_MAX, |count| *count > 0);
        !waited.expect("the count's lock").1.timed_out()
    }
}

impl Drop for DiskFile {
    fn drop(&mut self) {
        // Its server ends with it.
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

struct Server {
    disk: Disk,
    device: File,
    opened: Arc<Opened>,
    bytes: u64,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl Server {
    fn run(&self) -> io::Result<()> {
        let mut waiting: VecDeque<Pending> = VecDeque::new();
        let mut buffer = vec![0; REQUEST_BYTES_MAX];
        loop {
            while waiting.len() < WAITING_MAX {
                match (&self.device).read(&mut buffer) {
                    Ok(length) => waiting.extend(self.receive(&buffer[..length])?),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock && !waiting.is_empty() => break,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        poll(&mut [PollFd::new(self.device.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)?;
                    }
                    // A request that was taken back before it was read.
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                    Err(error) => return Err(error),
                }
            }
            self.disk.wait_while_stalled();
            let written = |pending: &Pending| match &pending.request {
                Request::Write { content, .. } => Some(content.len() as u32),
                _ => None,
            };
            let lengths: Vec<_> = waiting.iter().map(|pending| (pending.cookie, written(pending))).collect();
            let answer = self.disk.state().answer_one(&mut waiting);
            let Some((unique, outcome)) = answer else { continue };
            let length = lengths.iter().find(|(cookie, _)| *cookie == unique).and_then(|(_, length)| *length);
            match (outcome, length) {
                (Err(Failed), _) => self.reply(unique, libc::EIO, &[])?,
                (Ok(_), Some(length)) => self.reply(unique, 0, &[length.to_ne_bytes(), [0; 4]].concat())?,
                (Ok(data), None) => self.reply(unique, 0, &data)?,
            }
        }
    }

    /// Takes a request: one for the disk is returned, any other answered.
    fn receive(&self, request: &[u8]) -> io::Result<Option<Pending>> {
        let (operation, unique) = (u32_at(request, 4), u64_at(request, 8));
        let arguments = &request[HEAD_BYTES..];
        let request = match operation {
            READ | WRITE => {
                let (offset, length) = (u64_at(arguments, 8), u32_at(arguments, 16) as usize);
                if !self.disk.state().image.holds(offset, length) {
                    self.reply(unique, libc::EINVAL, &[])?;
                    return Ok(None);
                }
                match operation {
                    READ => Request::Read { offset, length },
                    _ => {
                        let bytes = arguments[ARGUMENT_BYTES..][..length].to_vec();
                        Request::Write { offset, content: Content::new(bytes), forced: false }
                    }
                }
            }
            FSYNC => Request::Flush,
            _ => {
                self.answer(operation, unique)?;
                return Ok(None);
            }
        };
        Ok(Some(self.disk.state().arrive(unique, request)))
    }

    fn answer(&self, operation: u32, unique: u64) -> io::Result<()> {
        match operation {
            INIT => {
                let mut out = [0; 64];
                for (at, number) in [(0, VERSION.0), (4, VERSION.1), (8, 128 << 10), (12, INIT_FLAGS)] {
                    out[at..at + 4].copy_from_slice(&number.to_ne_bytes());
                }
                // max_background and congestion_threshold stay at the kernel's own; max_write, time_gran, max_pages.
                out[20..24].copy_from_slice(&(WRITE_BYTES_MAX as u32).to_ne_bytes());
                out[24..28].copy_from_slice(&1_u32.to_ne_bytes());
                out[28..30].copy_from_slice(&PAGES_MAX.to_ne_bytes());
                self.reply(unique, 0, &out)
            }
            GETATTR | SETATTR => {
                let mut out = [0; 104];
                let numbers = [(0, 3600), (16, 1), (24, self.bytes), (32, self.bytes / 512)];
                numbers.iter().for_each(|(at, number)| out[*at..at + 8].copy_from_slice(&number.to_ne_bytes()));
                // After three times and their nanoseconds: mode, links; the preferred size of a block.
                for (at, number) in [(76, FILE_MODE), (80, 1), (96, 4096)] {
                    out[at..at + 4].copy_from_slice(&u32::to_ne_bytes(number));
                }
                self.reply(unique, 0, &out)
            }
            // No flags: what the kernel remembers of the file is forgotten, the image may be another one.
            OPEN => {
                self.opened.change(|count| *count += 1);
                self.reply(unique, 0, &[0; 16])
            }
            RELEASE => {
                self.reply(unique, 0, &[])?;
                self.opened.change(|count| *count -= 1);
                Ok(())
            }
            _ if UNANSWERED.contains(&operation) => Ok(()),
            _ => self.reply(unique, libc::ENOSYS, &[]),
        }
    }

    fn reply(&self, unique: u64, error: i32, data: &[u8]) -> io::Result<()> {
        let length = (16 + data.len()) as u32;
        let reply = [&length.to_ne_bytes()[..], &(-error).to_ne_bytes(), &unique.to_ne_bytes(), data].concat();
        match (&self.device).write(&reply) {
            // Its process was killed meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            written => written.map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_a_file_is_written_and_flushed_the_disk_records() {
        let dir = tempfile::tempdir().unwrap();
        let private = walferry_mounts::own();
        let disk = Disk::new(vec![7; 1 << 20], 1);
        disk.state().record();
        let path = dir.path().join("disk");
        let served = private.map_err(io::Error::from).and_then(|()| DiskFile::serve(&disk, &path));
        let file = match served {
            Ok(file) => file,
            Err(error) => return println!("skipped: this user may not mount a filesystem ({error})"),
        };
        let opened = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        assert_eq!(opened.metadata().unwrap().len(), 1 << 20);
        opened.write_all_at(&[1; 5000], 4096).unwrap();
        opened.sync_data().unwrap();
        let mut read = [0; 3];
        opened.read_exact_at(&mut read, 4096 + 4998).unwrap();
        assert_eq!(read, [1, 1, 7]);
        let trace = disk.state().recorded();
        assert_eq!(trace.writes.iter().map(|write| write.content.len()).sum::<usize>(), 5000);
        assert!(trace.flushes.len() == 1 && trace.writes[0].answered < Some(trace.flushes[0].arrived));
        // Another image under the same name: nothing of the old one is remembered.
        drop(opened);
        assert!(file.wait_until_closed());
        disk.state().image.reset();
        File::open(&path).unwrap().read_exact_at(&mut read, 4096).unwrap();
        assert_eq!(read, [7; 3]);
        drop(file);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0, "it is not mounted any more");
    }
}
