//! How far one replica is, as its leader knows it. Core: fed with handshakes, sends and acknowledgements by the
//! shipper; knows neither sockets nor the log.
//!
//! ```text
//!  Disconnected --hello--> Probe --welcome--> Catchup <--> Streaming
//!       ^-------------------- any error or silence ------------'        slot past its bound: Lost
//! ```

use std::fmt;

use walferry_cluster::message::Ack;
use walferry_engine::lsn::Lsn;

/// What a replica is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ReplicaState {
    /// No connection.
    #[default]
    Disconnected,
    /// Its history and position are being compared with ours.
    Probe,
    /// It is fed from segment files.
    Catchup,
    /// It is fed from memory as frames are sealed.
    Streaming,
    /// Its slot was given up: the log that it needs may be gone.
    Lost,
    /// It receives a copy of the store, of which it has so many percent.
    SnapshotTransfer(u8),
}

impl fmt::Display for ReplicaState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let ReplicaState::SnapshotTransfer(percent) = self {
            return f.pad(&format!("snapshot {percent} %"));
        }
        f.pad(match self {
            ReplicaState::Disconnected => "disconnected",
            ReplicaState::Probe => "probe",
            ReplicaState::Catchup => "catchup",
            ReplicaState::Streaming => "streaming",
            ReplicaState::Lost => "lost",
            ReplicaState::SnapshotTransfer(_) => unreachable!("told above"),
        })
    }
}

/// An acknowledgement that cannot be true.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AckError {
    /// It confirms what was never sent.
    #[error("the replica confirms {confirmed}, but only {sent} was sent")]
    Beyond {
        /// What it confirms.
        confirmed: Lsn,
        /// What was sent.
        sent: Lsn,
    },
    /// It takes back what it had confirmed.
    #[error("the replica went back from {from} to {to}")]
    Back {
        /// What it had confirmed.
        from: Lsn,
        /// What it confirms now.
        to: Lsn,
    },
}

/// A replica's positions: `applied <= flushed <= written <= sent`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    sent: Lsn,
    written: Lsn,
    flushed: Lsn,
    applied: Lsn,
    /// Nothing was acknowledged on this connection yet: `applied` is of an earlier one. A replica that was restarted
    /// begins with an older store.
    unheard: bool,
    /// The positions are those of the slot, from an earlier leadership: nothing was heard of the replica in this one, and it may have
    /// lost its disk meanwhile. They confirm no commit.
    remembered: bool,
}

impl Progress {
    /// A replica of which only its slot is known: it had flushed everything before `restart`.
    pub fn remembered(restart: Lsn) -> Progress {
        let (sent, written, flushed) = (restart, restart, restart);
        Progress { sent, written, flushed, applied: Lsn::ZERO, unheard: true, remembered: true }
    }

    /// True until the replica connects: then its hello tells what it holds.
    pub fn is_remembered(&self) -> bool {
        self.remembered
    }

    /// A new connection streams from `start`: the replica holds everything before it, durably.
    pub fn restart(&mut self, start: Lsn) {
        let applied = self.applied.min(start);
        *self = Progress { sent: start, written: start, flushed: start, applied, unheard: true, remembered: false };
        self.assert_order();
    }

    /// Everything before `sent` has been handed to the socket.
    pub fn send(&mut self, sent: Lsn) {
        assert!(sent >= self.sent, "sent goes back from {} to {sent}", self.sent);
        self.sent = sent;
        self.assert_order();
    }

    /// Takes an acknowledgement. `Ok(true)` when a position moved.
    pub fn acknowledge(&mut self, ack: &Ack) -> Result<bool, AckError> {
        if ack.written > self.sent {
            return Err(AckError::Beyond { confirmed: ack.written, sent: self.sent });
        }
        if std::mem::take(&mut self.unheard) {
            self.applied = self.applied.min(ack.applied);
        }
        let pairs = [(self.written, ack.written), (self.flushed, ack.flushed), (self.applied, ack.applied)];
        if let Some((from, to)) = pairs.into_iter().find(|(before, now)| now < before) {
            return Err(AckError::Back { from, to });
        }
        (self.written, self.flushed, self.applied) = (ack.written, ack.flushed, ack.applied);
        self.assert_order();
        Ok(pairs.into_iter().any(|(before, now)| now > before))
    }

    fn assert_order(&self) {
        assert!(self.applied <= self.flushed, "applied {} > flushed {}", self.applied, self.flushed);
        assert!(self.flushed <= self.written, "flushed {} > written {}", self.flushed, self.written);
        assert!(self.written <= self.sent, "written {} > sent {}", self.written, self.sent);
    }

    /// Handed to the socket.
    pub fn sent(&self) -> Lsn {
        self.sent
    }

    /// Handed to the replica's disk.
    pub fn written(&self) -> Lsn {
        self.written
    }

    /// Durable at the replica.
    pub fn flushed(&self) -> Lsn {
        self.flushed
    }

    /// Visible to the replica's readers.
    pub fn applied(&self) -> Lsn {
        self.applied
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ack(written: u64, flushed: u64, applied: u64) -> Ack {
        let (written, flushed, applied) = (Lsn(written), Lsn(flushed), Lsn(applied));
        Ack { written, flushed, applied, ..Ack::default() }
    }

    #[test]
    fn acknowledgements_move_forward_within_what_was_sent() {
        let mut progress = Progress::default();
        progress.restart(Lsn(100));
        progress.send(Lsn(200));
        let table = [
            (ack(100, 100, 0), Ok(false)),
            (ack(200, 100, 50), Ok(true)),
            (ack(200, 200, 50), Ok(true)),
            (ack(200, 200, 50), Ok(false)),
            (ack(201, 200, 50), Err(AckError::Beyond { confirmed: Lsn(201), sent: Lsn(200) })),
            (ack(200, 150, 50), Err(AckError::Back { from: Lsn(200), to: Lsn(150) })),
            (ack(200, 200, 200), Ok(true)),
        ];
        for (ack, expected) in table {
            assert_eq!(progress.acknowledge(&ack), expected, "{ack:?}");
        }
        // A new connection behind a fork takes everything back.
        progress.restart(Lsn(150));
        let all = [progress.sent(), progress.written(), progress.flushed(), progress.applied()];
        assert_eq!(all, [Lsn(150); 4]);
        // Restarted, it begins with its last checkpoint; but only once.
        assert_eq!(progress.acknowledge(&ack(150, 150, 120)), Ok(false));
        assert_eq!(progress.applied(), Lsn(120));
        let back = AckError::Back { from: Lsn(120), to: Lsn(110) };
        assert_eq!(progress.acknowledge(&ack(150, 150, 110)), Err(back));
    }
}
