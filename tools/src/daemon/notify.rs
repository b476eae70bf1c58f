//! What the node tells systemd: that it serves, that it is alive, that it is ending. Does nothing when systemd did not start it.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use walferry_engine::told::Told;

/// The way to the service manager.
pub struct Notifier {
    /// Half of WatchdogSec, as systemd advises.
    watchdog_interval: Option<Duration>,
    told: Cell<Option<Instant>>,
    failures_told: RefCell<Told>,
}

impl Notifier {
    /// Reads from the environment what the service manager wants to hear.
    pub fn new() -> Notifier {
        Notifier {
            watchdog_interval: sd_notify::watchdog_enabled().map(|limit| limit / 2),
            told: Cell::new(None),
            failures_told: RefCell::default(),
        }
    }

    fn send(&self, states: &[NotifyState<'_>]) {
        if let Err(error) = sd_notify::notify(states)
            && self.failures_told.borrow_mut().tell(&error.to_string(), Instant::now()).is_some()
        {
            tracing::warn!(%error, "the service manager could not be told");
        }
    }

    /// The node serves.
    pub fn ready(&self, status: &str) {
        self.send(&[NotifyState::Ready, NotifyState::Status(status)]);
    }

    /// The loop turns; called often, tells as often as the watchdog needs.
    pub fn alive(&self, now: Instant) {
        let due = |interval| self.told.get().is_none_or(|told| now.duration_since(told) >= interval);
        if self.watchdog_interval.is_some_and(due) {
            self.told.set(Some(now));
            self.send(&[NotifyState::Watchdog]);
        }
    }

    /// The node repairs what its disk lost; it asks for as much more time as that may take.
    pub fn repairing(&self, status: &str, time_max: Duration) {
        self.send(&[NotifyState::Status(status)]);
        self.needs_time(time_max);
    }

    /// The node does something that may take so long.
    pub fn needs_time(&self, time_max: Duration) {
        let more = u32::try_from(time_max.as_micros()).unwrap_or(u32::MAX);
        self.send(&[NotifyState::ExtendTimeoutUsec(more)]);
    }

    /// The node drains and will end.
    pub fn stopping(&self) {
        self.send(&[NotifyState::Stopping]);
    }
}
