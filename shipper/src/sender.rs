//! What to send to one replica next. Core: looks at how far the leader is and what this replica was sent and told; the
//! link driver does it. Whether bytes come from memory or from segment files is decided here.
//!
//! Order of duties: 1. fall back to the segment files when the memory is about to be reused; 2. tell a newer flushed
//! LSN, since the replica's readers wait for it; 3. frames; 4. a heartbeat.

use std::time::{Duration, Instant};

use walferry_engine::lsn::Lsn;

/// Of the log buffer, the share that a replica on the hot path may lag behind before segment files feed it.
const HOT_LAG_SHARE: u64 = 2;
/// Of the log buffer, the share within which a replica has to be to leave the segment files. Less than the share for
/// going there, so that a replica in between does not change over and over.
const HANDOVER_SHARE: u64 = 4;

/// A replica's readers of committed state wait for the commit LSN: where no frame tells it before, a heartbeat does after this. Not at
/// once: the client whose commit it was often sends the next one now. A path over which packets are rationed (a congestion window of
/// four, as BBR has it for a while every ten seconds) makes each needless one cost a later one a round trip.
const COMMITTED_NEWS_AFTER: Duration = Duration::from_millis(5);

const _: () = assert!(HANDOVER_SHARE > HOT_LAG_SHARE);

/// The leader's positions at one moment: `hot_start <= flushed <= sealed`, `committed <= flushed`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// The oldest frame in memory.
    pub hot_start: Lsn,
    /// End of the sealed frames.
    pub sealed: Lsn,
    /// Durable here, thus in the segment files.
    pub flushed: Lsn,
    /// Confirmed by the sync policy.
    pub committed: Lsn,
    /// Size of the log buffer.
    pub hot_bytes_max: u64,
}

impl View {
    /// A replica at `position` on the hot path is so far behind that memory should not wait for it.
    fn is_cold(&self, position: Lsn) -> bool {
        self.sealed.since(position) > self.hot_bytes_max / HOT_LAG_SHARE
    }

    /// A replica fed from files that has reached `position` can go on from memory.
    pub fn can_hand_over(&self, position: Lsn) -> bool {
        position >= self.hot_start && self.sealed.since(position) <= self.hot_bytes_max / HANDOVER_SHARE
    }
}

/// What to do for a replica now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing until something changes or [`Sender::due`].
    Nothing,
    /// Feed it from the segment files, from its position on.
    CatchUp,
    /// Send these.
    Send {
        /// A heartbeat, in front.
        heartbeat: bool,
        /// Frames from the position on.
        frames: bool,
    },
}

/// What one replica was sent and told.
#[derive(Clone, Copy, Debug)]
pub struct Sender {
    /// Where the next frame starts.
    position: Lsn,
    /// The flushed LSN that the replica knows.
    told_flushed: Lsn,
    /// The commit LSN that the replica knows.
    told_committed: Lsn,
    /// Since when there is a commit LSN that it does not know.
    news_since: Option<Instant>,
    /// When it was last sent a heartbeat: frames do not tell how fresh it is.
    heartbeat_at: Instant,
    heartbeat_interval: Duration,
    /// A thread feeds it from the segment files.
    catching_up: bool,
}

impl Sender {
    /// A replica that streams from `start`.
    pub fn new(start: Lsn, heartbeat_interval: Duration, now: Instant) -> Sender {
        let (told_flushed, told_committed) = (Lsn::ZERO, Lsn::ZERO);
        Sender {
            position: start,
            told_flushed,
            told_committed,
            news_since: None,
            heartbeat_at: now,
            heartbeat_interval,
            catching_up: false,
        }
    }

    /// Where the next frame starts.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// True while segment files feed it.
    pub fn is_catching_up(&self) -> bool {
        self.catching_up
    }

    /// What to do. `mid_frame`: the socket took only a part of the frame that ends at the position.
    pub fn next(&mut self, view: &View, mid_frame: bool, now: Instant) -> Next {
        if view.committed > self.told_committed {
            self.news_since.get_or_insert(now);
        }
        assert!(self.position <= view.sealed, "sent {} of {}", self.position, view.sealed);
        if self.catching_up {
            return Next::Nothing;
        }
        // The rest of a frame comes from the file, so the file must have it.
        let in_files = self.position <= view.flushed;
        if in_files && (self.position < view.hot_start || view.is_cold(self.position)) {
            return Next::CatchUp;
        }
        let frames = self.position < view.sealed || mid_frame;
        let heartbeat = view.flushed > self.told_flushed || now >= self.due(view.committed);
        if frames || heartbeat { Next::Send { heartbeat, frames } } else { Next::Nothing }
    }

    /// When the next heartbeat is due while the commit LSN is `committed`.
    pub fn due(&self, committed: Lsn) -> Instant {
        let heartbeat = self.heartbeat_at + self.heartbeat_interval;
        match self.news_since {
            Some(since) if committed > self.told_committed => heartbeat.min(since + COMMITTED_NEWS_AFTER),
            _ => heartbeat,
        }
    }

    /// A frame that ends at `end` goes out; its header says what is `flushed` and `committed`.
    pub fn frame_sent(&mut self, end: Lsn, (flushed, committed): (Lsn, Lsn)) {
        assert!(end > self.position);
        self.position = end;
        self.tell(flushed, committed);
    }

    fn tell(&mut self, flushed: Lsn, committed: Lsn) {
        self.told_flushed = self.told_flushed.max(flushed);
        if committed > self.told_committed {
            self.told_committed = committed;
            self.news_since = None;
        }
    }

    /// A heartbeat that names these goes out.
    pub fn heartbeat_sent(&mut self, flushed: Lsn, committed: Lsn, now: Instant) {
        self.tell(flushed, committed);
        self.heartbeat_at = now;
    }

    /// The segment files feed the replica from now on.
    pub fn catch_up_began(&mut self) {
        assert!(!self.catching_up);
        self.catching_up = true;
    }

    /// Memory feeds it again, from `position` on.
    pub fn catch_up_ended(&mut self, position: Lsn, now: Instant) {
        assert!(self.catching_up && position >= self.position);
        (self.catching_up, self.position) = (false, position);
        self.heartbeat_at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(1);

    fn view(hot_start: u64, flushed: u64, sealed: u64) -> View {
        let (hot_start, flushed, sealed) = (Lsn(hot_start), Lsn(flushed), Lsn(sealed));
        View { hot_start, sealed, flushed, committed: Lsn::ZERO, hot_bytes_max: 100 }
    }

    #[test]
    fn what_comes_next() {
        let start = Instant::now();
        let mut sender = Sender::new(Lsn(100), INTERVAL, start);
        sender.heartbeat_sent(Lsn(100), Lsn::ZERO, start);
        let send = |heartbeat, frames| Next::Send { heartbeat, frames };
        let table = [
            // what, view, mid-frame, ms since the last message, next
            ("idle", view(90, 100, 100), false, 0, Next::Nothing),
            ("idle for long", view(90, 100, 100), false, 1000, send(true, false)),
            ("a frame was sealed", view(90, 100, 140), false, 0, send(false, true)),
            ("and flushed", view(90, 140, 140), false, 0, send(true, true)),
            ("a part of a frame is left", view(90, 100, 100), true, 0, send(false, true)),
            ("at the edge of the hot lag", view(90, 140, 150), false, 0, send(true, true)),
            ("beyond it", view(90, 140, 151), false, 0, Next::CatchUp),
            ("beyond it, not in the files yet", view(90, 99, 151), false, 0, send(false, true)),
            ("no longer in memory", view(101, 120, 120), false, 0, Next::CatchUp),
        ];
        for (what, view, mid_frame, ms, expected) in table {
            let now = start + Duration::from_millis(ms);
            assert_eq!(sender.next(&view, mid_frame, now), expected, "{what}");
        }
    }

    #[test]
    fn a_frame_that_tells_the_flushed_position_saves_the_heartbeat() {
        let start = Instant::now();
        let mut sender = Sender::new(Lsn(100), INTERVAL, start);
        sender.frame_sent(Lsn(120), (Lsn(110), Lsn::ZERO));
        assert_eq!(sender.position(), Lsn(120));
        assert_eq!(sender.next(&view(90, 110, 120), false, start), Next::Nothing);
        let told = Next::Send { heartbeat: true, frames: false };
        assert_eq!(sender.next(&view(90, 120, 120), false, start), told);
    }

    #[test]
    fn frames_do_not_put_off_heartbeats_and_a_commit_is_told_soon() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut sender = Sender::new(Lsn(100), INTERVAL, start);
        sender.heartbeat_sent(Lsn(100), Lsn::ZERO, start);
        sender.frame_sent(Lsn(120), (Lsn(120), Lsn::ZERO));
        let idle = view(90, 120, 120);
        assert_eq!(sender.next(&idle, false, at(999)), Next::Nothing);
        let heartbeat = Next::Send { heartbeat: true, frames: false };
        assert_eq!(sender.next(&idle, false, at(1000)), heartbeat);
        sender.heartbeat_sent(Lsn(120), Lsn::ZERO, at(1000));
        let committed = View { committed: Lsn(120), ..idle };
        assert_eq!(sender.next(&committed, false, at(1100)), Next::Nothing, "a frame may be about to tell it");
        assert_eq!(sender.due(Lsn(120)), at(1105));
        assert_eq!(sender.next(&committed, false, at(1104)), Next::Nothing);
        assert_eq!(sender.next(&committed, false, at(1105)), heartbeat);
        sender.heartbeat_sent(Lsn(120), Lsn(120), at(1105));
        assert_eq!(sender.next(&committed, false, at(1150)), Next::Nothing);
    }

    #[test]
    fn frame_that_tells_a_commit_saves_the_heartbeat() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut sender = Sender::new(Lsn(100), INTERVAL, start);
        sender.heartbeat_sent(Lsn(120), Lsn(100), start);
        let committed = |end| View { committed: Lsn(120), ..view(90, 120, end) };
        assert_eq!(sender.next(&committed(120), false, at(50)), Next::Send { heartbeat: false, frames: true });
        // The next commit of the same client, which names the one before.
        sender.frame_sent(Lsn(140), (Lsn(120), Lsn(120)));
        assert_eq!(sender.next(&committed(140), false, at(100)), Next::Nothing);
        assert_eq!(sender.due(Lsn(120)), start + INTERVAL);
    }

    #[test]
    fn catch_up_ends_well_inside_the_hot_window() {
        let start = Instant::now();
        let mut sender = Sender::new(Lsn(10), INTERVAL, start);
        let view = view(90, 180, 190);
        assert_eq!(sender.next(&view, false, start), Next::CatchUp);
        sender.catch_up_began();
        assert_eq!(sender.next(&view, false, start + INTERVAL * 9), Next::Nothing);
        for (position, handed_over) in [(89, false), (164, false), (165, true), (180, true)] {
            assert_eq!(view.can_hand_over(Lsn(position)), handed_over, "{position}");
        }
        sender.catch_up_ended(Lsn(180), start);
        let frames = Next::Send { heartbeat: true, frames: true };
        assert_eq!(sender.next(&view, false, start), frames);
    }
}
