//! What the files in a node's `lost/` hold: they are read back as a person would read them, who wants to know what was cut off.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use walferry_applier::record::{Effect, effects};
use walferry_engine::frame::Frame;
use walferry_engine::log::{LOST_DIR, lost_range};
use walferry_engine::lsn::Lsn;

/// One file.
pub struct LostFrames {
    pub from: Lsn,
    pub to: Lsn,
    pub commits: u64,
    /// Keys that were set, and to what.
    pub puts: Vec<(Vec<u8>, Vec<u8>)>,
}

impl LostFrames {
    fn read(path: &Path, (from, to): (Lsn, Lsn)) -> Result<LostFrames, String> {
        let text = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let bytes = fs::read(path).map_err(|error| text(&error))?;
        let mut lost = LostFrames { from, to, commits: 0, puts: Vec::new() };
        let mut at = from;
        while at < to {
            let rest = bytes.get(at.since(from) as usize..).unwrap_or_default();
            let frame = Frame::read(rest, at).map_err(|error| text(&error))?;
            let header = frame.header();
            lost.commits += if header.filler { 0 } else { u64::from(header.record_count) };
            for (_, record) in frame.records() {
                for effect in effects(record) {
                    if let Effect::Put { key, value } = effect.map_err(|error| text(&error))? {
                        lost.puts.push((key.to_vec(), value.to_vec()));
                    }
                }
            }
            at = header.end();
        }
        if at != to || bytes.len() as u64 != to.since(from) {
            return Err(text(&"it ends elsewhere than its name says"));
        }
        Ok(lost)
    }
}

/// Whether a store was kept in the place of log that had been recycled behind it; what it holds is not read here.
pub fn keeps_a_store(data: &Path) -> bool {
    let names = fs::read_dir(data.join(LOST_DIR)).into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.into_iter().any(|name| name.to_string_lossy().starts_with("store-"))
}

/// All files of the data directory, by name.
pub fn lost_frames(data: &Path) -> Result<BTreeMap<String, LostFrames>, String> {
    let files = fs::read_dir(data.join(LOST_DIR)).into_iter().flatten().flatten();
    let named = files.filter_map(|file| {
        let name = file.file_name().to_string_lossy().into_owned();
        Some((lost_range(&name)?, name, file.path()))
    });
    named.map(|(range, name, path)| Ok((name, LostFrames::read(&path, range)?))).collect()
}
