//! `walferry log dump` and `walferry log verify`: what stands in the segment files of a data directory. They read only and
//! take no lock, so they also work beside a running node; `walferry log repair` changes it. Knows not the store.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use walferry_engine::epoch::EpochHistory;
use walferry_engine::error::RecoverError;
use walferry_engine::frame::{Frame, FrameHeader};
use walferry_engine::lsn::Lsn;
use walferry_engine::meta::Meta;
use walferry_engine::origin::Origin;
use walferry_engine::reader::LogReader;
use walferry_engine::recover::{Known, Recovery, recover};
use walferry_engine::segment::{list_segments, run_start};
use walferry_engine::watermark::Watermark;

use crate::failure::{Failure, say};
use walferry_node::units::ByteSize;

pub mod against;
mod effects;
mod lost;
mod repair;

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry log dump --data /var/lib/walferry/a --limit 10
  walferry log dump --data ./a --from 0/5000 --records
  walferry log dump --data ./a --lost --records
  walferry log verify --data ./a
  walferry log verify --data ./a --against ./b
  walferry log repair --data ./a --from 127.0.0.1:6411
  walferry log repair --data ./a --from db2:6401 --tls-cert a.pem --tls-key a.key --peer-tls-ca ca.pem

The first two read only, and work while the node runs; repair needs it stopped, and keeps what it writes over in DIR/damaged. LSNs are printed as PostgreSQL prints them, in hexadecimal.

Exit codes: 0 read to the end, no damage; 1 damage (file, offset and LSN are named), or the directory cannot be read;
2 wrong usage.";

/// The directory of the segments in a data directory.
const LOG_DIR: &str = "log";
/// Beside a running node the tail moves while it is read; damage counts when it is found so often in a row.
const LOOKS_MAX: usize = 3;
/// Between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// `walferry log ...`
#[derive(Debug, Subcommand)]
pub enum LogCommand {
    /// Print frames, one a line
    Dump(DumpArgs),
    /// Verify every frame: checksum, chain, epoch
    Verify(VerifyArgs),
    /// Give a stopped node's log back what its disk lost, from nodes that run
    Repair(repair::RepairArgs),
}

/// Flags of `walferry log dump`.
#[derive(Debug, Args)]
pub struct DumpArgs {
    /// The data directory
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Begin with the frame that holds this LSN [default: the oldest]
    #[arg(long, value_name = "LSN")]
    from: Option<Lsn>,
    /// Frames to print at most
    #[arg(long, value_name = "N", default_value_t = u64::MAX, hide_default_value = true)]
    limit: u64,
    /// Print what each record changes, too
    #[arg(long)]
    records: bool,
    /// Print instead what was cut off this node's log after a failover, and kept
    #[arg(long)]
    lost: bool,
}

/// Flags of `walferry log verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The data directory
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Compare its log, byte by byte, with that of this data directory
    #[arg(long, value_name = "DIR")]
    against: Option<PathBuf>,
    /// Compare up to this LSN, such as the commit LSN of a running cluster [default: the shorter log's end]
    #[arg(long, value_name = "LSN", requires = "against")]
    up_to: Option<Lsn>,
}

/// Runs `walferry log`.
pub fn run(command: &LogCommand) -> Result<(), Failure> {
    match command {
        LogCommand::Dump(args) if args.lost => lost::dump(args),
        LogCommand::Dump(args) => dump(args),
        LogCommand::Verify(args) => verify(args),
        LogCommand::Repair(args) => repair::repair(args),
    }
}

/// The log of a data directory.
struct Log {
    dir: PathBuf,
    segment_bytes: u64,
    /// The oldest position from which on no segment is missing.
    start: Lsn,
    origin: Option<Origin>,
    history: EpochHistory,
}

impl Log {
    fn open(data: &Path) -> Result<Log, Failure> {
        let failed =
            |error: &dyn std::fmt::Display| Failure::failed(format_args!("--data {}: {error}", data.display()));
        let meta = Meta::load(data).map_err(Failure::failed)?;
        let meta = meta.ok_or_else(|| failed(&"no data directory of a walferry node (there is no `meta` file)"))?;
        let dir = data.join(LOG_DIR);
        let segments = list_segments(&dir).map_err(|error| failed(&format_args!("{}: {error}", dir.display())))?;
        let history = EpochHistory::load(data).map_err(Failure::failed)?;
        let origin = Origin::load(data).map_err(Failure::failed)?;
        let start = run_start(&segments).start(meta.segment_bytes).max(origin.map_or(Lsn::ZERO, |origin| origin.lsn));
        Ok(Log { dir, segment_bytes: meta.segment_bytes, start, origin, history })
    }

    /// What is known of it beside its frames. Beside a running node the watermark is to be read before they are: the log may grow
    /// meanwhile, but never falls behind it.
    fn known(&self, data: &Path) -> Result<Known, Failure> {
        let watermark = Watermark::load(data).map_err(Failure::failed)?;
        Ok(Known { applied: self.start, watermark, origin: self.origin })
    }

    fn reader(&self, from: Lsn, until: Lsn) -> Result<LogReader, Failure> {
        LogReader::open(&self.dir, self.segment_bytes, from, until).map_err(Failure::failed)
    }
}

fn dump(args: &DumpArgs) -> Result<(), Failure> {
    let log = Log::open(&args.data)?;
    let from = args.from.unwrap_or(log.start);
    if from < log.start {
        let start = log.start;
        return Err(Failure::failed(format_args!(
            "--from {from}: the log begins at {start}; what was before is recycled"
        )));
    }
    // Frames start at segment starts, and where the log begins; from there the chain leads to the frame asked for.
    let segment_start = from.segment(log.segment_bytes).start(log.segment_bytes).max(log.start);
    let mut reader = log.reader(segment_start, Lsn::MAX)?;
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut left = args.limit;
    while left > 0 {
        let at = reader.position();
        let frame = match reader.next_frame() {
            Ok(Some(frame)) => frame,
            Ok(None) => break,
            Err(RecoverError::Rot { path, offset, reason, .. }) => {
                let path = path.display();
                writeln!(out, "{at} no further frame: {reason} ({path} at offset {offset})")?;
                break;
            }
            Err(RecoverError::Missing { path, .. }) => {
                writeln!(out, "{at} no further frame: there is no {}", path.display())?;
                break;
            }
            Err(error) => return Err(Failure::failed(error)),
        };
        if !epoch_fits(&log.history, frame.header()) {
            let epoch = frame.header().epoch;
            writeln!(out, "{at} no further frame: the next one is of epoch {epoch}, cut off by a later one")?;
            break;
        }
        if frame.header().end() > from {
            print_frame(&mut out, &frame, args.records)?;
            left -= 1;
        }
    }
    Ok(out.flush()?)
}

fn epoch_fits(history: &EpochHistory, header: &FrameHeader) -> bool {
    history.entries().is_empty() || history.epoch_at(header.lsn) == header.epoch
}

fn print_frame(out: &mut impl Write, frame: &Frame<'_>, records: bool) -> Result<(), Failure> {
    let header = frame.header();
    let kind = if header.filler { "filler" } else { "frame" };
    writeln!(
        out,
        "{} {kind} epoch {}, {} records, {} bytes in {}, flushed {}, committed {}, crc {:08x} after {:08x}, sealed {}",
        header.lsn,
        header.epoch,
        header.record_count,
        header.payload_bytes,
        ByteSize(header.span_bytes() as u64),
        header.flushed,
        header.committed,
        header.crc,
        header.previous_crc,
        utc(header.sealed_at_us),
    )?;
    if records {
        for (lsn, record) in frame.records() {
            writeln!(out, "  {lsn} {}", effects::describe(record))?;
        }
    }
    Ok(())
}

/// What a walk over the whole log counted.
#[derive(Debug, Default)]
struct Counted {
    frames: u64,
    records: u64,
    payload_bytes: u64,
    log_bytes: u64,
}

fn verify(args: &VerifyArgs) -> Result<(), Failure> {
    let mut looks = 0;
    let (log, found, counted) = loop {
        looks += 1;
        let log = Log::open(&args.data)?;
        let known = log.known(&args.data)?;
        let outcome = recover(&log.dir, log.segment_bytes, known, &log.history).and_then(|found| {
            let counted = count(&log, &found)?;
            Ok((found, counted))
        });
        match outcome {
            Ok((found, counted)) => break (log, found, counted),
            Err(error) if looks == LOOKS_MAX => return Err(Failure::failed(error)),
            // A running node may have written between two reads, or recycled the oldest segment.
            Err(_) => std::thread::sleep(LOOK_PAUSE),
        }
    };
    let Counted { frames, records, payload_bytes, log_bytes } = counted;
    say(format_args!("{}: {} to {}, no damage", log.dir.display(), log.start, found.end))?;
    let padding = if log_bytes == 0 { 0.0 } else { (log_bytes - payload_bytes) as f64 * 100.0 / log_bytes as f64 };
    say(format_args!(
        "{frames} frames, {records} records, {log_bytes} bytes of which {padding:.1} % headers and padding"
    ))?;
    for (epoch, start) in log.history.entries() {
        say(format_args!("epoch {epoch} from {start}"))?;
    }
    if let Some(other) = &args.against {
        let same = against::compare(&args.data, other, args.up_to)?;
        say(format_args!("the same bytes as {} from {} to {}", other.display(), same.from, same.to))?;
    }
    match found.cut {
        None => Ok(()),
        Some(cut) => {
            let (from, to, reason) = (cut.lsn, cut.to, cut.reason);
            say(format_args!(
                "a torn tail from {from} to {to} was never acknowledged ({reason}); the next start cuts it"
            ))
        }
    }
}

/// Verifies the log of a node that has ended in order: nothing may be damaged, nothing torn. What was verified, in words.
pub fn verified_clean(data: &Path) -> Result<String, Failure> {
    let log = Log::open(data)?;
    let known = log.known(data)?;
    let found = recover(&log.dir, log.segment_bytes, known, &log.history).map_err(Failure::failed)?;
    if let Some(cut) = found.cut {
        let (dir, lsn, reason) = (log.dir.display(), cut.lsn, cut.reason);
        return Err(Failure::failed(format_args!("{dir}: a torn tail at {lsn} after an end in order: {reason}")));
    }
    let counted = count(&log, &found).map_err(Failure::failed)?;
    Ok(format!("log {} to {}, {} frames, no damage", log.start, found.end, counted.frames))
}

fn count(log: &Log, found: &Recovery) -> Result<Counted, RecoverError> {
    let mut reader = LogReader::open(&log.dir, log.segment_bytes, log.start, found.end)?;
    let mut counted = Counted::default();
    while let Some(frame) = reader.next_frame()? {
        counted.frames += 1;
        counted.records += u64::from(frame.header().record_count);
        counted.payload_bytes += if frame.header().filler { 0 } else { u64::from(frame.header().payload_bytes) };
        counted.log_bytes += frame.header().span_bytes() as u64;
    }
    Ok(counted)
}

/// Microseconds since the Unix epoch as `2024-05-06T07:08:09.123456Z`.
fn utc(us: u64) -> String {
    let (seconds, micros) = (us / 1_000_000, us % 1_000_000);
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Howard Hinnant's days-to-civil: eras of 400 years, years that begin in March.
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3_600, of_day % 3_600 / 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_print_as_utc() {
        assert_eq!(utc(0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(utc(951_782_400_000_001), "2000-02-29T00:00:00.000001Z");
        assert_eq!(utc(1_735_689_599_999_999), "2024-12-31T23:59:59.999999Z");
    }

    #[test]
    fn a_directory_that_is_no_nodes_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let args = VerifyArgs { data: dir.path().to_owned(), against: None, up_to: None };
        let error = verify(&args).unwrap_err().to_string();
        assert!(error.contains("there is no `meta` file"), "{error}");
    }
}
