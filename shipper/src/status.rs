//! What a leader tells of its replicas: plain values, made by the shipper, shown by the node.

use std::time::Duration;

use walferry_cluster::member::MemberName;
use walferry_cluster::policy::SyncState;
use walferry_engine::lsn::Lsn;

use crate::lag::Lag;
use crate::progress::ReplicaState;
use crate::transport::Transport;

/// Bytes of the log sent to a replica, by the way they took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SentBytes {
    /// SEND_ZC from the log buffer, not copied by the kernel.
    pub zero_copy: u64,
    /// From the log buffer, copied by the kernel; SEND_ZC included where the kernel reports that it copied.
    pub copy: u64,
    /// From segment files by `sendfile`.
    pub sendfile: u64,
}

impl SentBytes {
    /// The sum of two counts.
    pub fn plus(self, other: SentBytes) -> SentBytes {
        SentBytes {
            zero_copy: self.zero_copy + other.zero_copy,
            copy: self.copy + other.copy,
            sendfile: self.sendfile + other.sendfile,
        }
    }
}

/// What a replica says of its own stages, for the newest frame concerned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Durations {
    /// Receipt to written.
    pub write: Duration,
    /// Receipt to flushed.
    pub flush: Duration,
    /// Flushed to applied.
    pub apply: Duration,
}

/// One slot, as in `pg_replication_slots`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotStatus {
    /// Its name, and its replica's.
    pub name: MemberName,
    /// Its replica needs nothing before this.
    pub restart: Lsn,
    /// It was given up, and holds nothing.
    pub lost: bool,
    /// The log that it holds back.
    pub held_bytes: u64,
    /// Its replica is connected, or receives a snapshot.
    pub connected: bool,
}

/// One replica, as in `pg_stat_replication`. `applied <= flushed <= written <= sent`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// Its name, and its slot's.
    pub name: MemberName,
    /// Its address, `HOST:PORT`; empty while it has no connection.
    pub address: String,
    /// What carries its connection.
    pub transport: Transport,
    /// What it is doing.
    pub state: ReplicaState,
    /// Handed to its socket.
    pub sent: Lsn,
    /// Handed to its disk.
    pub written: Lsn,
    /// Durable there.
    pub flushed: Lsn,
    /// Visible to its readers.
    pub applied: Lsn,
    /// Log that it has not written.
    pub write_lag: Lag,
    /// Log that it has not flushed.
    pub flush_lag: Lag,
    /// Log that it has not applied.
    pub apply_lag: Lag,
    /// Its slot is lost: it is fed only as long as the log happens to be there.
    pub slot_lost: bool,
    /// What the sync policy makes of it.
    pub sync_state: SyncState,
    /// Member of the in-sync set.
    pub in_sync: bool,
    /// Network round trip of the last heartbeat; `None` until one was measured.
    pub round_trip: Option<Duration>,
    /// Its own durations.
    pub durations: Durations,
    /// Bytes sent to it since this leadership began.
    pub sent_bytes: SentBytes,
    /// For how long it has had no connection; zero while it has one.
    pub silence: Duration,
    /// Why its last connection ended; empty when none did.
    pub last_error: String,
}
