//! The copy that a replica receives: a file that grows piece by piece, and beside it what it is and how far it is known to be
//! good. What the state file says is durable before it says so; a piece that came after it is asked for again. No sockets.
//!
//! ```text
//! DIR/snapshot/incoming   walferry snapshot 1
//!                     cluster HEX / snapshot LSN / crc HEX / segment_bytes N / bytes N / verified N
//!                     epoch N LSN         each, as in the leader's history
//!                     pieces HEX HEX ...  CRC32C of each verified piece
//!                     end HEX             CRC32C of all lines before
//! ```

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use walferry_cluster::member::ClusterId;
use walferry_cluster::message::Offer;
use walferry_cluster::snapshot::{CopyPhase, CopyProgress, PIECE_BYTES, SNAPSHOT_BYTES_MAX, piece_bytes};
use walferry_engine::epoch::EpochHistory;
use walferry_engine::lsn::Lsn;
use walferry_engine::prepare::free_bytes;
use walferry_engine::small_file::replace_file;

use super::{SNAPSHOT_DIR, SnapshotError, failed, remove, sync_dir};

/// The copy's file in `DIR/snapshot`.
pub const INCOMING_FILE: &str = "incoming.redb";
/// What is known of it.
pub const STATE_FILE: &str = "incoming";
/// The same once the copy is whole.
pub const READY_FILE: &str = "ready";
/// The state is written after so many bytes, or a hundredth of the copy, whichever is more: a list of checksums goes with it.
const SAVE_BYTES_MIN: u64 = 4 << 20;
/// What the disk must have beside the copy, for the log to go on.
const SPARE_BYTES: u64 = 64 << 20;
/// A larger state file is not one.
const STATE_BYTES_MAX: u64 = 64 << 20;
const HEADING: &str = "walferry snapshot 1";

/// What a copy is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The cluster that it belongs to.
    pub cluster_id: ClusterId,
    /// It holds everything before this.
    pub snapshot: Lsn,
    /// Of the frame that ends there.
    pub crc: u32,
    /// The cluster's segment size.
    pub segment_bytes: u64,
    /// Its length.
    pub bytes: u64,
    /// The leader's epochs.
    pub history: EpochHistory,
}

impl Facts {
    /// What a leader offers; `None` when its history does not ascend.
    pub fn of(offer: &Offer) -> Option<Facts> {
        Some(Facts {
            cluster_id: offer.cluster_id,
            snapshot: offer.snapshot,
            crc: offer.crc,
            segment_bytes: offer.segment_bytes,
            bytes: offer.bytes,
            history: EpochHistory::from_entries(&offer.history)?,
        })
    }

    /// True when a part of one is a part of the other: epochs may have begun since.
    fn is_same_copy(&self, other: &Facts) -> bool {
        Facts { history: EpochHistory::default(), ..self.clone() }
            == Facts { history: EpochHistory::default(), ..other.clone() }
    }
}

/// A copy on its way.
pub struct Incoming {
    dir: PathBuf,
    facts: Facts,
    file: File,
    /// Of each verified piece.
    crcs: Vec<u32>,
    /// Pieces up to here are verified; `saved <= verified <= facts.bytes`.
    verified: u64,
    saved: u64,
}

impl Incoming {
    /// What an earlier attempt in this data directory left; `None` when there is nothing to go on with.
    pub fn resume(data: &Path) -> Result<Option<Incoming>, SnapshotError> {
        let dir = data.join(SNAPSHOT_DIR);
        let Some((facts, crcs, verified)) = load(&dir.join(STATE_FILE))? else { return Ok(None) };
        let path = dir.join(INCOMING_FILE);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open", &path)(error)),
        };
        let length = file.metadata().map_err(failed("look at", &path))?.len();
        if length != facts.bytes {
            return Ok(None);
        }
        Ok(Some(Incoming { dir, facts, file, crcs, verified, saved: verified }))
    }

    /// Allocates space for a copy of which nothing is there yet, and forgets any other.
    pub fn begin(data: &Path, facts: Facts) -> Result<Incoming, SnapshotError> {
        let dir = data.join(SNAPSHOT_DIR);
        let path = dir.join(INCOMING_FILE);
        remove(&dir.join(STATE_FILE))?;
        remove(&path)?;
        let free = free_bytes(&dir).map_err(failed("look at", &dir))?;
        let needed = facts.bytes + SPARE_BYTES;
        if free < needed {
            return Err(SnapshotError::NoSpace { path: dir, needed, free });
        }
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o640).open(&path);
        let file = file.map_err(failed("make", &path))?;
        let length = i64::try_from(facts.bytes).expect("bounded by SNAPSHOT_BYTES_MAX");
        // SAFETY: a file of ours.
        if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, length) } != 0 {
            match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    file.set_len(facts.bytes).map_err(failed("allocate space in", &path))?;
                }
                error => return Err(failed("allocate space in", &path)(error)),
            }
        }
        let mut incoming = Incoming { dir, facts, file, crcs: Vec::new(), verified: 0, saved: 0 };
        incoming.save()?;
        Ok(incoming)
    }

    /// What it is.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The next piece belongs here.
    pub fn verified(&self) -> u64 {
        self.verified
    }

    /// True when nothing is missing.
    pub fn is_complete(&self) -> bool {
        self.verified == self.facts.bytes
    }

    /// True when what is offered is the rest of this; then its newer history counts.
    pub fn goes_on_with(&mut self, facts: &Facts, offset: u64) -> bool {
        let same = self.facts.is_same_copy(facts) && offset == self.verified;
        if same {
            self.facts.history.clone_from(&facts.history);
        }
        same
    }

    /// Takes the next piece; false when it is not what its checksum says.
    pub fn push(&mut self, piece: &[u8], crc: u32) -> Result<bool, SnapshotError> {
        assert_eq!(piece.len(), piece_bytes(self.verified, self.facts.bytes), "the next piece");
        if crc32c::crc32c(piece) != crc {
            return Ok(false);
        }
        let path = self.dir.join(INCOMING_FILE);
        self.file.write_all_at(piece, self.verified).map_err(failed("write", &path))?;
        self.verified += piece.len() as u64;
        self.crcs.push(crc);
        if self.verified - self.saved >= SAVE_BYTES_MIN.max(self.facts.bytes / 100) || self.is_complete() {
            self.save()?;
        }
        Ok(true)
    }

    /// Makes durable what has come, and then the word of it.
    pub fn save(&mut self) -> Result<(), SnapshotError> {
        let path = self.dir.join(INCOMING_FILE);
        self.file.sync_data().map_err(failed("flush", &path))?;
        let state = self.dir.join(STATE_FILE);
        replace_file(&state, self.encode().as_bytes()).map_err(failed("write", &state))?;
        self.saved = self.verified;
        Ok(())
    }

    /// Reads all of it back from the disk. True when it is whole and good; else it is cut to the first bad piece, and the rest is to
    /// be fetched again. `go_on` is asked between pieces.
    pub fn verify(&mut self, progress: &CopyProgress, go_on: impl Fn() -> bool) -> Result<bool, SnapshotError> {
        let path = self.dir.join(INCOMING_FILE);
        // What the page cache holds proves nothing of the disk.
        // SAFETY: advice on our own descriptor.
        unsafe { libc::posix_fadvise(self.file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        let mut piece = vec![0; PIECE_BYTES];
        let mut at = 0;
        for (index, crc) in self.crcs.iter().enumerate() {
            progress.set(CopyPhase::Verifying, at, self.facts.bytes);
            let bytes = &mut piece[..piece_bytes(at, self.facts.bytes)];
            self.file.read_exact_at(bytes, at).map_err(failed("read", &path))?;
            if crc32c::crc32c(bytes) != *crc {
                tracing::warn!(file = %path.display(), offset = at, "a piece of the snapshot is damaged here: it is fetched again");
                (self.verified, self.saved) = (at, at);
                self.crcs.truncate(index);
                self.save()?;
                return Ok(false);
            }
            at += bytes.len() as u64;
            if !go_on() {
                return Ok(false);
            }
        }
        Ok(self.is_complete())
    }

    /// The copy is whole and was read back: whatever opens the data directory next puts it in place.
    pub fn declare_ready(data: &Path) -> Result<(), SnapshotError> {
        let dir = data.join(SNAPSHOT_DIR);
        let (state, ready) = (dir.join(STATE_FILE), dir.join(READY_FILE));
        let text = fs::read(&state).map_err(failed("read", &state))?;
        replace_file(&ready, &text).map_err(failed("write", &ready))
    }

    /// Forgets what has come.
    pub fn discard(data: &Path) -> Result<(), SnapshotError> {
        let dir = data.join(SNAPSHOT_DIR);
        remove(&dir.join(STATE_FILE))?;
        remove(&dir.join(INCOMING_FILE))
    }

    fn encode(&self) -> String {
        let Facts { cluster_id, snapshot, crc, segment_bytes, bytes, history } = &self.facts;
        let mut text = format!(
            "{HEADING}\ncluster {:032x}\nsnapshot {snapshot}\ncrc {crc:08x}\nsegment_bytes {segment_bytes}\nbytes {bytes}\nverified {}\n",
            cluster_id.0, self.verified
        );
        for (epoch, start) in history.entries() {
            writeln!(text, "epoch {epoch} {start}").expect("writing to memory");
        }
        text.push_str("pieces");
        for crc in &self.crcs {
            write!(text, " {crc:08x}").expect("writing to memory");
        }
        text.push('\n');
        let crc = crc32c::crc32c(text.as_bytes());
        writeln!(text, "end {crc:08x}").expect("writing to memory");
        text
    }
}

/// What a state file or ready marker says; `None` when there is none that can be trusted.
pub(super) fn load(path: &Path) -> Result<Option<(Facts, Vec<u32>, u64)>, SnapshotError> {
    let read = || {
        if fs::metadata(path)?.len() > STATE_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        fs::read_to_string(path)
    };
    match read() {
        Ok(text) => Ok(decode(&text)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => Ok(None),
        Err(error) => Err(failed("read", path)(error)),
    }
}

fn decode(text: &str) -> Option<(Facts, Vec<u32>, u64)> {
    let hex = |digits: &str| u32::from_str_radix(digits, 16).ok();
    let (body, crc) = text.strip_suffix('\n')?.rsplit_once("end ")?;
    if hex(crc)? != crc32c::crc32c(body.as_bytes()) {
        return None;
    }
    let mut lines = body.lines();
    if lines.next()? != HEADING {
        return None;
    }
    let mut value = |key: &str| lines.next()?.strip_prefix(key)?.strip_prefix(' ');
    let cluster_id = ClusterId(u128::from_str_radix(value("cluster")?, 16).ok()?);
    let (snapshot, crc) = (value("snapshot")?.parse().ok()?, hex(value("crc")?)?);
    let (segment_bytes, bytes) = (value("segment_bytes")?.parse().ok()?, value("bytes")?.parse::<u64>().ok()?);
    let verified: u64 = value("verified")?.parse().ok()?;
    let (mut entries, mut crcs) = (Vec::new(), Vec::new());
    for line in lines {
        if let Some(entry) = line.strip_prefix("epoch ") {
            let (epoch, start) = entry.split_once(' ')?;
            entries.push((epoch.parse().ok()?, start.parse::<Lsn>().ok()?));
        } else {
            let list = line.strip_prefix("pieces")?.split_ascii_whitespace();
            crcs = list.map(hex).collect::<Option<Vec<u32>>>()?;
        }
    }
    let in_pieces = (crcs.len() as u64 * PIECE_BYTES as u64).min(bytes);
    let history = EpochHistory::from_entries(&entries)?;
    let right = verified == in_pieces && (1..=SNAPSHOT_BYTES_MAX).contains(&bytes);
    right.then_some((Facts { cluster_id, snapshot, crc, segment_bytes, bytes, history }, crcs, verified))
}

/// Makes `DIR/snapshot`.
pub(super) fn make_dir(data: &Path) -> Result<PathBuf, SnapshotError> {
    let dir = data.join(SNAPSHOT_DIR);
    match fs::create_dir(&dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed("make", &dir)(error)),
        _ => sync_dir(data)?,
    }
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use walferry_engine::lsn::Epoch;

    use super::*;

    const PIECE: u64 = PIECE_BYTES as u64;

    fn facts(bytes: u64) -> Facts {
        let history = EpochHistory::from_entries(&[(Epoch(1), Lsn::ZERO), (Epoch(3), Lsn(4096))]).expect("ascending");
        Facts {
            cluster_id: ClusterId(7),
            snapshot: Lsn(0x16_0000_3000),
            crc: 9,
            segment_bytes: 16 << 20,
            bytes,
            history,
        }
    }

    fn content(bytes: u64) -> Vec<u8> {
        (0..bytes).map(|at| ((at * 2_654_435_761) >> 13) as u8).collect()
    }

    fn piece(content: &[u8], at: u64) -> &[u8] {
        &content[at as usize..][..piece_bytes(at, content.len() as u64)]
    }

    fn take(incoming: &mut Incoming, content: &[u8], until: u64) {
        while incoming.verified() < until.min(content.len() as u64) {
            let piece = piece(content, incoming.verified());
            assert!(incoming.push(piece, crc32c::crc32c(piece)).expect("it is written"));
        }
    }

    fn data() -> tempfile::TempDir {
        let data = tempfile::tempdir().expect("a directory");
        make_dir(data.path()).expect("made");
        data
    }

    #[test]
    fn a_copy_goes_on_where_its_state_was_durable() {
        let data = data();
        assert!(Incoming::resume(data.path()).expect("nothing").is_none());
        let content = content(11 * PIECE + 77);
        let mut incoming = Incoming::begin(data.path(), facts(content.len() as u64)).expect("begun");
        take(&mut incoming, &content, 6 * PIECE);
        drop(incoming);
        // Four pieces at once are made durable: of six the first four.
        let mut incoming = Incoming::resume(data.path()).expect("read").expect("something to go on with");
        assert_eq!(incoming.verified(), 4 * PIECE);
        let mut newer = facts(content.len() as u64);
        newer.history.push(Epoch(9), Lsn(1 << 50)).expect("a later epoch");
        assert!(!incoming.goes_on_with(&Facts { snapshot: Lsn(4096), ..newer.clone() }, 4 * PIECE));
        assert!(!incoming.goes_on_with(&newer, 5 * PIECE));
        assert!(incoming.goes_on_with(&newer, 4 * PIECE));
        take(&mut incoming, &content, u64::MAX);
        assert!(incoming.is_complete());
        assert!(incoming.verify(&CopyProgress::default(), || true).expect("read back"));
        Incoming::declare_ready(data.path()).expect("declared");
        let (ready, crcs, verified) = load(&data.path().join("snapshot/ready")).expect("read").expect("whole");
        assert_eq!((ready, crcs.len(), verified), (newer, 12, content.len() as u64));
        assert!(fs::read(data.path().join("snapshot/incoming.redb")).expect("the file") == content);
    }

    #[test]
    fn a_piece_that_arrives_damaged_is_not_taken() {
        let data = data();
        let content = content(2 * PIECE);
        let mut incoming = Incoming::begin(data.path(), facts(2 * PIECE)).expect("begun");
        let mut damaged = piece(&content, 0).to_vec();
        damaged[12345] ^= 1;
        assert!(!incoming.push(&damaged, crc32c::crc32c(piece(&content, 0))).expect("no error of the disk"));
        assert_eq!(incoming.verified(), 0);
    }

    #[test]
    fn flipped_bit_in_a_snapshot_is_found_and_fetched_again() {
        let content = content(9 * PIECE + 1);
        for bad in 0..10 {
            let data = data();
            let mut incoming = Incoming::begin(data.path(), facts(content.len() as u64)).expect("begun");
            take(&mut incoming, &content, u64::MAX);
            let file = OpenOptions::new().write(true).open(data.path().join("snapshot/incoming.redb")).expect("there");
            let at = bad * PIECE;
            file.write_all_at(&[content[at as usize] ^ 8], at).expect("a flipped bit");
            assert!(!incoming.verify(&CopyProgress::default(), || true).expect("read back"));
            drop(incoming);
            let mut incoming = Incoming::resume(data.path()).expect("read").expect("the good pieces");
            assert_eq!(incoming.verified(), at);
            take(&mut incoming, &content, u64::MAX);
            assert!(incoming.verify(&CopyProgress::default(), || true).expect("read back"));
        }
    }

    #[test]
    fn a_damaged_state_is_no_state_and_too_small_a_disk_is_named() {
        let data = data();
        let content = content(5 * PIECE);
        let mut incoming = Incoming::begin(data.path(), facts(5 * PIECE)).expect("begun");
        take(&mut incoming, &content, u64::MAX);
        drop(incoming);
        let path = data.path().join("snapshot/incoming");
        let whole = fs::read(&path).expect("the state");
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).expect("cut");
            assert!(Incoming::resume(data.path()).expect("no error").is_none(), "cut to {cut}");
        }
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            fs::write(&path, &flipped).expect("flipped");
            assert!(Incoming::resume(data.path()).expect("no error").is_none(), "flipped at {at}");
        }
        let text = Incoming::begin(data.path(), facts(SNAPSHOT_BYTES_MAX)).err().expect("refused").to_string();
        assert!(text.contains("free some space"), "{text}");
    }
}
