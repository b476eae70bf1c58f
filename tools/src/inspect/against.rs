//! `walferry log verify --against`: whether two data directories hold the same bytes. Replicas write what they receive, so up to
//! the commit LSN any difference is damage or a fork. Used by `log verify` and, while nodes run, by `drill`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use walferry_engine::lsn::Lsn;
use walferry_engine::recover::recover;

use super::Log;
use crate::failure::Failure;

/// Read from both sides at once.
const COMPARED_BYTES: usize = 1 << 20;

/// What was compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compared {
    /// The first byte that both have.
    pub from: Lsn,
    /// Up to here they are the same.
    pub to: Lsn,
}

/// Compares what both directories still have up to `up_to`, or without it up to where the shorter log ends.
pub fn compare(data: &Path, against: &Path, up_to: Option<Lsn>) -> Result<Compared, Failure> {
    let (ours, theirs) = (Log::open(data)?, Log::open(against)?);
    if ours.segment_bytes != theirs.segment_bytes {
        return Err(Failure::failed(format_args!(
            "{} has segments of {} bytes, {} of {}: not nodes of one cluster",
            data.display(),
            ours.segment_bytes,
            against.display(),
            theirs.segment_bytes
        )));
    }
    let to = match up_to {
        Some(lsn) => lsn,
        None => end(&ours, data)?.min(end(&theirs, against)?),
    };
    let mut from = ours.start.max(theirs.start);
    let mut at = from;
    let (mut left, mut right) = (vec![0; COMPARED_BYTES], vec![0; COMPARED_BYTES]);
    while at < to {
        let in_segment = at.segment(ours.segment_bytes).next().start(ours.segment_bytes) - at;
        let bytes = in_segment.min(to - at).min(COMPARED_BYTES as u64) as usize;
        let read = read(&ours, at, &mut left[..bytes]).and_then(|()| read(&theirs, at, &mut right[..bytes]));
        let differs = left[..bytes].iter().zip(&right[..bytes]).position(|(a, b)| a != b);
        if read.is_err() || differs.is_some() {
            // Nodes that run recycle log meanwhile: what one of them has no more is not compared.
            let start = Log::open(data)?.start.max(Log::open(against)?.start);
            if start > at {
                (from, at) = (start, start);
                continue;
            }
        }
        read?;
        if let Some(index) = differs {
            let lsn = at.advance(index as u64);
            let number = lsn.segment(ours.segment_bytes).file_name();
            let offset = lsn.offset(ours.segment_bytes);
            return Err(Failure::failed(format_args!(
                "{} and {} differ at {lsn} ({number} at offset {offset}); they are the same from {from} to there",
                ours.dir.display(),
                theirs.dir.display()
            )));
        }
        at = at.advance(bytes as u64);
    }
    Ok(Compared { from: from.min(to), to })
}

fn end(log: &Log, data: &Path) -> Result<Lsn, Failure> {
    let known = log.known(data)?;
    Ok(recover(&log.dir, log.segment_bytes, known, &log.history).map_err(Failure::failed)?.end)
}

fn read(log: &Log, at: Lsn, into: &mut [u8]) -> Result<(), Failure> {
    let path = log.dir.join(at.segment(log.segment_bytes).file_name());
    let read = File::open(&path).and_then(|file| file.read_exact_at(into, at.offset(log.segment_bytes)));
    read.map_err(|error: io::Error| Failure::failed(format_args!("cannot read {} at {at}: {error}", path.display())))
}
