//! What a session reads and commits: which state is good enough for it, up to where it has seen the log, and what its replies are held
//! for. The rules are in `reading`.

use walferry_engine::mutants;

use crate::session::command::view::View;
use crate::session::host::{Host, Refusal};
use crate::session::outbox::{CommittedReads, Hold};
use crate::session::reading::{Facts, Guarantee, Missing, Mode, Position, Strong, Verdict};

use super::client::Client;
use super::reading;

impl Client {
    /// The view that a read of this session needs, and what its reply is then held for.
    pub fn read<'a>(&mut self, host: &'a dyn Host) -> (View<'a>, Hold) {
        let newest = self.mode == Mode::Strong || self.seen.lsn > host.applied();
        let pending = newest && !host.pending().is_empty();
        let (view, at) = match pending {
            true => (View::pending(host), host.log_end()),
            false => (View::durable(host), host.applied()),
        };
        let position = Position::at(at, host.history());
        let committed = !matches!(self.mode, Mode::Committed | Mode::Strong) || host.committed_here() >= at;
        if !committed {
            self.seen = self.seen.max(position);
            return (view, Hold::Committed(position));
        }
        self.see(position);
        (view, if pending { Hold::Seen(at) } else { Hold::Nothing })
    }

    /// The session sees `position`, whatever becomes of replies that are held.
    pub(super) fn see(&mut self, position: Position) {
        self.firm = self.firm.max(position);
        self.seen = self.seen.max(self.firm);
    }

    /// What was read of a state that was not committed yet was told, or was not.
    pub(super) fn note_committed(&mut self, reads: CommittedReads) {
        if reads.untold {
            self.seen = self.firm;
        }
        if let Some(position) = reads.told {
            self.see(position);
        }
    }

    /// False when any state will do: nothing needs to be asked.
    pub(super) fn is_guarded(&self) -> bool {
        self.tracked || self.mode.is_timed()
    }

    pub(super) fn guarantee(&self) -> Guarantee {
        Guarantee { floor: if self.tracked { self.seen } else { Position::default() }, mode: self.mode }
    }

    pub(super) fn facts<'a>(&self, host: &'a dyn Host) -> Facts<'a> {
        let applied = host.applied();
        let readable = if host.pending().is_empty() { applied } else { host.log_end() };
        let now = if self.mode.is_timed() { host.clock() } else { host.now() };
        let strong = if self.mode == Mode::Strong { host.strong(now) } else { Strong::Held };
        Facts { history: host.history(), applied, readable, staleness: host.staleness(now), strong }
    }

    /// Whether the node's state is good enough for a read of this session.
    pub fn judge(&self, host: &dyn Host) -> Verdict {
        if !self.is_guarded() || mutants::is_on("forget-the-session") {
            return Verdict::Ready;
        }
        reading::judge(&self.guarantee(), &self.facts(host))
    }

    /// What a read answers that waited in vain.
    pub fn waited(&self, missing: Missing, host: &dyn Host) -> String {
        reading::waited(missing, &self.guarantee(), &self.facts(host))
    }

    /// The session learned of the newest state without changing it: what its reply is held for.
    pub fn observe(&mut self, host: &dyn Host) -> Hold {
        // A replica's log may run ahead of what its readers see, but it has nothing pending: nothing of that was looked at.
        if host.pending().is_empty() {
            self.see(Position::at(host.applied(), host.history()));
            return Hold::Nothing;
        }
        let end = host.log_end();
        self.see(Position::at(end, host.history()));
        Hold::Seen(end)
    }

    /// Appends `record` and says what its reply is held for.
    pub fn commit(&mut self, record: &[u8], host: &mut dyn Host) -> Result<Hold, Refusal> {
        let lsn = host.commit(record, self.level)?;
        let position = Position::at(lsn, host.history());
        debug_assert!(self.last_commit < position);
        self.last_commit = position;
        self.see(position);
        Ok(Hold::Commit(self.level, lsn))
    }
}
