//! What the node tells systemd: that it serves, that it is alive, that it is ending. Does nothing when systemd did not start it.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use walferry_engine::told::Told;

/// How often it is looked whether the node is something else by now.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// The way to the service manager.
pub struct Notifier {
    /// Half of WatchdogSec, as systemd advises.
    watchdog_interval: Option<Duration>,
    told: Cell<Option<Instant>>,
    /// Somebody listens.
    is_used: bool,
    status: RefCell<Status>,
    failures_told: RefCell<Told>,
}

impl Notifier {
    /// Reads from the environment what the service manager wants to hear.
    pub fn new() -> Notifier {
        Notifier {
            watchdog_interval: sd_notify::watchdog_enabled().map(|limit| limit / 2),
            told: Cell::new(None),
            is_used: std::env::var_os("NOTIFY_SOCKET").is_some(),
            status: RefCell::default(),
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
        self.status.borrow_mut().text = status.to_owned();
        self.send(&[NotifyState::Ready, NotifyState::Status(status)]);
    }

    /// What the node is now; called often, looks at it once in a while and tells it when it is something else.
    pub fn status(&self, now: Instant, look: impl FnOnce() -> String) {
        let mut status = self.status.borrow_mut();
        if self.is_used && status.is_due(now) && status.changes(look()) {
            self.send(&[NotifyState::Status(&status.text)]);
        }
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
        self.send(&[NotifyState::Stopping, NotifyState::Status("ending: what is held is answered first")]);
    }
}

/// What was told of the node, and when it was looked at.
#[derive(Debug, Default)]
struct Status {
    text: String,
    looked: Option<Instant>,
}

impl Status {
    fn is_due(&mut self, now: Instant) -> bool {
        let due = self.looked.is_none_or(|looked| now.saturating_duration_since(looked) >= STATUS_INTERVAL);
        if due {
            self.looked = Some(now);
        }
        due
    }

    fn changes(&mut self, text: String) -> bool {
        let is_new = self.text != text;
        self.text = text;
        is_new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_looked_at_rarely_and_told_on_change() {
        let (mut status, begun) = (Status::default(), Instant::now());
        let looks = (0..10).filter(|tenth| status.is_due(begun + STATUS_INTERVAL / 10 * *tenth)).count();
        assert_eq!((looks, status.is_due(begun + STATUS_INTERVAL)), (1, true));
        let told = ["leader a", "leader a", "a without a leader", "leader a"];
        assert_eq!(told.map(|text| status.changes(text.to_owned())), [true, false, true, true]);
    }
}
