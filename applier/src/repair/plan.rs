//! Whom to ask for what the log lost, when to ask again, and when to give up. A core: no socket and no clock. The driver asks
//! `next`, does it, and says `answered` or `sent`.
//!
//! | a peer's answer | what follows |
//! |---|---|
//! | frames that fit | it is asked for the rest as well |
//! | it does not hold the part, or frames that do not fit | it is not asked for this gap again |
//! | it cannot be reached, or says that it cannot at the moment | it is asked again after RETRY_PAUSE |
//!
//! Given up at once when no peer is left to ask, else at the deadline.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// Between two questions to a peer that could not answer.
pub const RETRY_PAUSE: Duration = Duration::from_millis(250);

/// Another node that may hold what is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// How it is called: its name, or where that is not known its address.
    pub name: String,
    /// Its peer address, `HOST:PORT`.
    pub address: String,
}

/// What came of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// This node does not have the frames; its reason.
    No(String),
    /// Perhaps later.
    NotNow(String),
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Ask the peer with this index.
    Ask(usize),
    /// Ask nobody before this time.
    Wait(Instant),
    /// Every node was asked and none has the frames.
    GiveUp,
}

#[derive(Clone, Debug)]
struct Peer {
    source: Source,
    /// `None` once it has said no.
    ask_at: Option<Instant>,
    said: Option<String>,
}

/// The questions about one gap.
#[derive(Clone, Debug)]
pub struct Plan {
    peers: Vec<Peer>,
    deadline: Instant,
}

impl Plan {
    /// Nobody was asked yet; unreachable peers are waited for until `deadline`.
    pub fn new(sources: &[Source], now: Instant, deadline: Instant) -> Plan {
        let peer = |source: &Source| Peer { source: source.clone(), ask_at: Some(now), said: None };
        Plan { peers: sources.iter().map(peer).collect(), deadline }
    }

    /// What to do at `now`.
    pub fn next(&self, now: Instant) -> Next {
        let due = self.peers.iter().enumerate().filter_map(|(index, peer)| Some((peer.ask_at?, index))).min();
        match due {
            None => Next::GiveUp,
            Some((at, index)) if at <= now => Next::Ask(index),
            Some(_) if now >= self.deadline => Next::GiveUp,
            Some((at, _)) => Next::Wait(at.min(self.deadline)),
        }
    }

    /// The peer with this index gave no frames that fit.
    pub fn answered(&mut self, index: usize, answer: Answer, now: Instant) {
        let peer = &mut self.peers[index];
        let (said, ask_at) = match answer {
            Answer::No(text) => (text, None),
            Answer::NotNow(text) if now >= self.deadline => (text, None),
            Answer::NotNow(text) => (text, Some(now + RETRY_PAUSE)),
        };
        (peer.said, peer.ask_at) = (Some(said), ask_at);
    }

    /// The peer with this index.
    pub fn source(&self, index: usize) -> &Source {
        &self.peers[index].source
    }

    /// Who was asked, and what each said.
    pub fn report(&self) -> String {
        let mut text = String::new();
        for Peer { source: Source { name, address }, said, .. } in &self.peers {
            let said = said.as_deref().unwrap_or("was not asked");
            let separator = if text.is_empty() { "" } else { "; " };
            let named = if name == address { name.clone() } else { format!("{name} ({address})") };
            write!(text, "{separator}{named}: {said}").expect("writing to memory");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(names: &[&str]) -> Vec<Source> {
        names.iter().map(|name| Source { name: (*name).to_owned(), address: format!("{name}:1") }).collect()
    }

    #[test]
    fn every_order_of_answers_ends_as_the_table_says() {
        let now = Instant::now();
        let later = |pauses: u32| now + RETRY_PAUSE * pauses;
        let (no, not_now) = (|| Answer::No("has it not".to_owned()), || Answer::NotNow("is away".to_owned()));
        let plan = || Plan::new(&sources(&["b", "c"]), now, later(4));
        // Nobody to ask.
        assert_eq!(Plan::new(&[], now, later(4)).next(now), Next::GiveUp);
        // One after the other; two noes end it at once.
        let mut asked = plan();
        assert_eq!(asked.next(now), Next::Ask(0));
        asked.answered(0, no(), now);
        assert_eq!(asked.next(now), Next::Ask(1));
        asked.answered(1, no(), now);
        assert_eq!(asked.next(now), Next::GiveUp);
        assert_eq!(asked.report(), "b (b:1): has it not; c (c:1): has it not");
        // One that is away is waited for, the other is not asked again.
        let mut asked = plan();
        asked.answered(0, not_now(), now);
        asked.answered(1, no(), now);
        assert_eq!(asked.next(now), Next::Wait(later(1)));
        assert_eq!(asked.next(later(1)), Next::Ask(0));
        asked.answered(0, no(), later(1));
        assert_eq!(asked.next(later(1)), Next::GiveUp);
        // Until the deadline, and not beyond it.
        let mut asked = plan();
        asked.answered(1, no(), now);
        for pause in 0..4 {
            assert_eq!(asked.next(later(pause)), Next::Ask(0), "{pause}");
            asked.answered(0, not_now(), later(pause));
        }
        assert_eq!(asked.next(later(4)), Next::Ask(0), "a last time");
        asked.answered(0, not_now(), later(4));
        assert_eq!(asked.next(later(4)), Next::GiveUp);
        // The one that has waited longest comes first.
        let mut asked = plan();
        asked.answered(0, not_now(), later(1));
        asked.answered(1, not_now(), now);
        assert_eq!(asked.next(later(3)), Next::Ask(1));
    }
}
