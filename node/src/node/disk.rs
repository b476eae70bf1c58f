//! What the node asks of its disk: how much space is left for log and checkpoints, and whether its files are still in the directory.

use std::time::Duration;

use walferry_applier::store::SPACE_CHECKPOINT_BYTES_MIN;
use walferry_cluster::consensus::REGISTER_FILE;
use walferry_engine::held::{HeldFile, HeldFiles};
use walferry_engine::prepare::free_bytes;
use walferry_engine::world;

use crate::error::DaemonError;
use crate::node::Node;

/// How often it is looked how much space the disk has left.
const SPACE_LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// With less than so many times what the next checkpoint needs, space is scarce.
const SPACE_SCARCE_SHARE: u64 = 4;

impl Node {
    /// Tells the store what space it has.
    pub(super) fn look_at_space(&mut self) {
        if world::is_simulated() {
            return;
        }
        self.space.looked_at = world::now();
        // Where the disk cannot be asked, a checkpoint finds out.
        let (free, wanted) = (free_bytes(&self.config.data).unwrap_or(u64::MAX), self.store.space_wanted());
        self.space.is_scarce = wanted > 0 && free / SPACE_SCARCE_SHARE < wanted;
        self.store.set_free(free);
    }

    /// On a full disk a checkpoint is due as soon as it lets a segment go, or when the log has to leave space for one.
    pub(super) fn ask_for_space(&mut self) {
        let looked = self.clock.now.saturating_duration_since(self.space.looked_at);
        if self.space.is_scarce || looked >= SPACE_LOOK_INTERVAL {
            self.look_at_space();
        }
        if !self.log.is_short_of_space() {
            return;
        }
        let segment_bytes = self.meta.segment_bytes;
        let applied = self.store.applied();
        let lets_go = applied.segment(segment_bytes) > self.store.durable_applied().segment(segment_bytes);
        if lets_go {
            // A log that ran out of segments ends where one ends.
            let begun = applied.segment(segment_bytes).start(segment_bytes);
            self.store.ask_for_space_before(begun.advance(1).min(applied));
        } else if self.store.overlay_bytes() >= SPACE_CHECKPOINT_BYTES_MIN {
            self.store.ask_for_space_before(applied);
        }
    }

    /// The segment that is written to is looked at, before an older one may be recycled.
    pub(super) fn look_at_segment(&mut self) -> Result<(), DaemonError> {
        if let Some(number) = self.log.current_segment()
            && self.held.wants_segment(number)
            && let Some(file) =
                self.log.current_file().map_err(DaemonError::file("open the newest segment in", &self.config.data))?
        {
            self.held.set_segment(number, file);
        }
        Ok(())
    }

    /// Looks from now on at the files that are open now: at the start, and after others took their place.
    pub(super) fn watch_files(&mut self) -> Result<(), DaemonError> {
        let mut files = self.log.held_files().map_err(DaemonError::file("open the log in", &self.config.data))?;
        files.push(HeldFile::at(self.store.path()).map_err(DaemonError::file("open", self.store.path()))?);
        let register = self.config.data.join(REGISTER_FILE);
        if self.config.members.is_some() && register.exists() {
            files.push(HeldFile::at(&register).map_err(DaemonError::file("open", &register))?);
        }
        self.held = HeldFiles::watch(files, self.waker.clone())
            .map_err(DaemonError::file("watch the files in", &self.config.data))?;
        Ok(())
    }
}
