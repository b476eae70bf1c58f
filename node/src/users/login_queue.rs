//! Passwords that wait to be compared, one address after the other: whoever sends many waits for its own, and delays a client of another
//! address by one comparison for each address that sends. A core; `login` has the thread that takes them out.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use crate::users::login::{Job, Outcome};

/// Passwords that wait, each of 16 KiB at most.
pub const JOBS_MAX: usize = 1024;
/// Of an IPv6 address this much names who has it: a host chooses the rest itself.
const IPV6_PREFIX: u128 = !0 << 64;

/// The jobs of one address, or of one network of IPv6.
struct Lane {
    of: Option<IpAddr>,
    jobs: VecDeque<Job>,
}

/// What waits. `lanes` has no empty one; the first is the next to be served. The jobs of all are `JOBS_MAX` at most.
#[derive(Default)]
pub struct LoginQueue {
    lanes: VecDeque<Lane>,
    /// The node ends: no password is compared any more.
    pub closed: bool,
}

fn lane_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & IPV6_PREFIX).into(),
        address => address,
    }
}

/// Nobody waits for the answer any more: its connection is gone.
fn is_abandoned(job: &Job) -> bool {
    Arc::strong_count(&job.answer) == 1
}

impl LoginQueue {
    fn len(&self) -> usize {
        self.lanes.iter().map(|lane| lane.jobs.len()).sum()
    }

    fn forget_abandoned(&mut self) {
        self.lanes.iter_mut().for_each(|lane| lane.jobs.retain(|job| !is_abandoned(job)));
        self.lanes.retain(|lane| !lane.jobs.is_empty());
    }

    /// Adds a job; the one that finds no place for it comes back. In a full queue that is the newest of the address that has most.
    pub fn push(&mut self, job: Job) -> Option<Job> {
        let mut left_out = None;
        if self.len() >= JOBS_MAX {
            self.forget_abandoned();
        }
        let of = job.from.map(lane_of);
        if self.len() >= JOBS_MAX {
            let own = self.lanes.iter().find(|lane| lane.of == of).map_or(0, |lane| lane.jobs.len());
            let longest = self.lanes.iter_mut().max_by_key(|lane| lane.jobs.len()).expect("it is full");
            if longest.jobs.len() <= own + 1 {
                return Some(job);
            }
            left_out = longest.jobs.pop_back();
        }
        match self.lanes.iter_mut().find(|lane| lane.of == of) {
            Some(lane) => lane.jobs.push_back(job),
            None => self.lanes.push_back(Lane { of, jobs: VecDeque::from([job]) }),
        }
        left_out
    }

    /// The next job that somebody waits for.
    pub fn pop(&mut self) -> Option<Job> {
        while let Some(mut lane) = self.lanes.pop_front() {
            let job = lane.jobs.pop_front();
            if !lane.jobs.is_empty() {
                self.lanes.push_back(lane);
            }
            if job.as_ref().is_some_and(|job| !is_abandoned(job)) {
                return job;
            }
        }
        None
    }
}

impl Job {
    /// Answers a login for which the queue had no place.
    pub fn leave_out(&self) {
        // The answer is set once, here: an error is impossible.
        let _ = self.answer.set(Outcome::NotCompared);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::id::SessionId;
    use crate::users::login::Answer;

    fn job(session: u64, from: &str) -> (Job, Answer) {
        let answer = Answer::default();
        let from = Some(from.parse().expect("an address"));
        let (password, hashes) = (Vec::new(), Vec::new());
        (Job { session: SessionId(session), from, password, hashes, answer: Answer::clone(&answer) }, answer)
    }

    /// So many jobs of one address, and their answers, which keep them from being abandoned.
    fn flood(queue: &mut LoginQueue, count: usize, from: &str) -> Vec<Answer> {
        let jobs = (0..count).map(|number| job(number as u64, from));
        jobs.map(|(job, answer)| {
            if let Some(left_out) = queue.push(job) {
                left_out.leave_out();
            }
            answer
        })
        .collect()
    }

    #[test]
    fn client_of_another_address_waits_for_one_job_of_a_flood() {
        let mut queue = LoginQueue::default();
        let _answers = flood(&mut queue, 2 * JOBS_MAX, "10.0.0.1");
        assert_eq!(queue.len(), JOBS_MAX);
        let (good, answer) = job(99_999, "10.0.0.2");
        let left_out = queue.push(good).expect("one of the flood gives way");
        assert_eq!((left_out.session, queue.len()), (SessionId(JOBS_MAX as u64 - 1), JOBS_MAX));
        assert_eq!(queue.pop().map(|job| job.session), Some(SessionId(0)));
        assert_eq!(queue.pop().map(|job| job.session), Some(SessionId(99_999)));
        assert!(answer.get().is_none());
    }

    #[test]
    fn addresses_of_one_ipv6_network_share_a_lane() {
        let mut queue = LoginQueue::default();
        let mut kept = Vec::new();
        for (number, from) in
            ["2001:db8::1", "2001:db8::2", "::ffff:10.0.0.1", "2001:db8:0:1::1", "10.0.0.1"].into_iter().enumerate()
        {
            let (job, answer) = job(number as u64, from);
            assert!(queue.push(job).is_none());
            kept.push(answer);
        }
        let order: Vec<u64> = std::iter::from_fn(|| queue.pop()).map(|job| job.session.0).collect();
        assert_eq!(order, [0, 2, 3, 1, 4]);
    }

    #[test]
    fn jobs_of_connections_that_are_gone_are_not_run() {
        let mut queue = LoginQueue::default();
        drop(flood(&mut queue, JOBS_MAX, "10.0.0.1"));
        let kept = flood(&mut queue, 1, "10.0.0.1");
        assert_eq!(queue.len(), 1, "they give way to the next one");
        assert!(queue.pop().is_some() && queue.pop().is_none());
        assert!(kept[0].get().is_none());
        drop(flood(&mut queue, 3, "10.0.0.1"));
        assert!(queue.pop().is_none());
    }

    #[test]
    fn full_queue_leaves_out_the_newest_of_the_longest() {
        let mut queue = LoginQueue::default();
        let answers = flood(&mut queue, JOBS_MAX, "10.0.0.1");
        let more = flood(&mut queue, 1, "10.0.0.1");
        assert_eq!(more[0].get(), Some(&Outcome::NotCompared), "its own address has most");
        let others = flood(&mut queue, 3, "10.0.0.2");
        assert!(others.iter().all(|answer| answer.get().is_none()));
        assert_eq!(answers.iter().filter(|answer| answer.get().is_some()).count(), 3);
    }
}
