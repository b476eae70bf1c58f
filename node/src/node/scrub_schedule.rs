//! When old log is read again (`scrub` reads it), and what becomes of the outcome.

use std::time::Duration;

use walferry_engine::lsn::Lsn;
use walferry_engine::meta::Meta;

use crate::error::DaemonError;
use crate::node::scrub::{Scrub, Unreadable};
use crate::node::{Node, Role};
use crate::repair::{self};

/// Old log is not read again sooner than this after the last time.
const SCRUB_PAUSE: Duration = Duration::from_secs(5);

impl Node {
    /// Reads the part of the log that recovery did not look at.
    pub(super) fn begin_scrub(&mut self) -> Result<(), DaemonError> {
        let segment_bytes = self.meta.segment_bytes;
        // Whole segments that nothing writes to any more.
        let (from, to) = (self.log.start(), self.store.durable_applied().min(self.log.flushed()));
        let to = to.segment(segment_bytes).start(segment_bytes);
        self.scrubbing.began_at = self.clock.now;
        if from < to && self.scrubbing.walk.is_none() {
            // A replica that has joined since it started knows its cluster by its link.
            let meta = Meta { cluster_id: self.known_cluster_id(), ..self.meta.clone() };
            let repairer = repair::repairer(&self.config, &meta, &self.history, &self.tls)?;
            match Scrub::start(repairer, from, to, self.waker.clone()) {
                Ok(scrub) => self.scrubbing.walk = Some(scrub),
                Err(error) => tracing::warn!("no thread to read the old log: {error}"),
            }
        }
        Ok(())
    }

    /// Takes what a walk over old log found, and begins another when a replica could not be fed, or when it is time again.
    pub(super) fn poll_scrub(&mut self) -> Result<(), DaemonError> {
        self.take_scrubbed();
        if self.scrubbing.walk.is_some() {
            return Ok(());
        }
        let rested = self.clock.now.saturating_duration_since(self.scrubbing.began_at);
        let broken = match &self.role {
            Role::Leader(shipper) => shipper.catchups_broken(),
            _ => self.scrubbing.catchups_broken,
        };
        let called_for = broken > self.scrubbing.catchups_broken && rested > SCRUB_PAUSE;
        if called_for || self.config.scrub_interval.is_some_and(|interval| rested >= interval) {
            self.scrubbing.catchups_broken = broken;
            self.begin_scrub()?;
        }
        Ok(())
    }

    pub(super) fn take_scrubbed(&mut self) {
        if let Some(outcome) = self.scrubbing.walk.as_ref().and_then(Scrub::outcome) {
            self.scrubbing.walk = None;
            match outcome {
                Ok(repaired) => {
                    self.repaired.add(&repaired);
                    self.scrubbing.readable_from = Lsn::ZERO;
                }
                Err(Unreadable { error, before }) => {
                    self.scrubbing.readable_from = before;
                    // Read again whenever a replica could not be fed.
                    if self.scrubbing.told.tell(&error.to_string(), self.clock.now).is_some() {
                        tracing::error!(
                            "the old log is damaged, replicas that need it before {before} get a snapshot: {error}"
                        );
                    }
                }
            }
        }
    }

    /// Ends a walk over old log; false while its thread has not: until then it may still mend files of the log.
    pub(super) fn end_scrub(&mut self) -> bool {
        let Some(scrub) = &self.scrubbing.walk else { return true };
        scrub.stop();
        self.take_scrubbed();
        self.scrubbing.walk.is_none()
    }
}
