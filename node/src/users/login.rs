//! Logins: what follows a right password, what a wrong one costs, and the thread that compares passwords with salted hashes, so
//! that the ring thread never does. `session` parks until a login has its answer.
//!
//! A wrong password is answered late, and each further one of the same connection later; whoever guesses is held to a few guesses
//! a second and connection, and `clients` bounds the connections. The delay counts from the command, so it tells nothing of how
//! long the comparison took.

use std::net::IpAddr;
use std::rc::Rc;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;

use walferry_engine::waker::Waker;
use walferry_shipper::snapshot::serve::give_way;

use crate::session::id::SessionId;
use crate::users::login_queue::LoginQueue;
use crate::users::salted::SaltedHash;
use crate::users::{Check, User};

/// Told to whoever gives a wrong name or password; redis-server's words.
pub const WRONG_PASSWORD: &str = "WRONGPASS invalid username-password pair or user is disabled.";
/// Told when too many passwords wait to be compared.
pub const BUSY: &str = "ERR too many logins are being checked at the moment: try again";
/// Told when all places are taken but those that are kept for operators; redis-server's words.
pub const NO_PLACE: &str = "ERR max number of clients reached";

/// The first wrong password of a connection is answered after this, and each further one after twice as long, up to `DELAY_MAX`.
pub const DELAY: Duration = Duration::from_millis(500);
/// The longest delay.
pub const DELAY_MAX: Duration = Duration::from_secs(8);

/// How long the answer to a wrong password is held, after so many others.
pub fn delay(failures: u32) -> Duration {
    DELAY.saturating_mul(1 << failures.min(16)).min(DELAY_MAX)
}

/// What is answered once the password is found right.
#[derive(Debug)]
pub enum Next {
    /// AUTH.
    Auth,
    /// HELLO with AUTH.
    Hello {
        /// The protocol that it chose.
        resp3: bool,
        /// SETNAME.
        name: Option<Vec<u8>>,
    },
}

/// Where the answer of the thread appears.
pub type Answer = Arc<OnceLock<Outcome>>;

/// What came of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The password is right.
    Right,
    /// The password is wrong.
    Wrong,
    /// Too many waited.
    NotCompared,
}

/// What a login waits for.
pub enum State {
    /// The thread compares.
    Asked(Check, Answer),
    /// It is refused with this text once its delay is over.
    Refused(&'static str),
}

/// A login without an answer yet.
pub struct Login {
    /// What it waits for.
    pub state: State,
    /// What comes after.
    pub next: Next,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Login({:?})", self.next)
    }
}

/// Logins of one connection that failed and that nobody has counted yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FailedLogins {
    /// How many.
    pub count: u64,
    /// Whose password was wrong last. What is no user's name may be a password in the wrong place, and is not kept.
    pub user: Option<String>,
}

impl FailedLogins {
    /// Counts one more failed login.
    pub fn add(&mut self, user: Option<&Rc<User>>) {
        self.count += 1;
        self.user = user.map(|user| user.name.clone());
    }
}

/// A password to compare.
pub struct Job {
    /// Whose login it is.
    pub session: SessionId,
    /// Where its connection comes from.
    pub from: Option<IpAddr>,
    /// The password.
    pub password: Vec<u8>,
    /// It is right if it fits one of these.
    pub hashes: Vec<SaltedHash>,
    /// Where the answer goes.
    pub answer: Answer,
}

impl Job {
    /// Compares; tens of milliseconds a hash.
    pub fn run(&self) {
        let right = self.hashes.iter().fold(false, |right, hash| right | hash.is_right(&self.password));
        // The answer is set once, here: an error is impossible.
        let _ = self.answer.set(if right { Outcome::Right } else { Outcome::Wrong });
    }
}

/// The thread that compares, with what waits for it. It is started when it is needed first, and ends with this.
pub struct Checker {
    waker: Waker,
    running: Option<Running>,
    /// Sessions whose passwords found no place in the queue.
    left_out: Vec<SessionId>,
}

struct Running {
    queue: Arc<(Mutex<LoginQueue>, Condvar)>,
    done: Receiver<SessionId>,
}

impl Checker {
    /// A checker that wakes the ring thread by `waker`.
    pub fn new(waker: Waker) -> Checker {
        Checker { waker, running: None, left_out: Vec::new() }
    }

    /// Has a password compared; it is answered in any case.
    pub fn check(&mut self, job: Job) {
        if self.running.is_none() {
            self.running =
                start(self.waker.clone()).inspect_err(|error| tracing::error!(%error, "no thread for logins")).ok();
        }
        let left_out = match &self.running {
            Some(running) => running.add(job),
            None => Some(job),
        };
        if let Some(job) = left_out {
            job.leave_out();
            self.left_out.push(job.session);
        }
    }

    /// Moves to `ready` the sessions whose logins have an answer.
    pub fn done(&mut self, ready: &mut Vec<SessionId>) {
        ready.append(&mut self.left_out);
        ready.extend(self.running.iter().flat_map(|running| running.done.try_iter()));
    }
}

impl Running {
    fn add(&self, job: Job) -> Option<Job> {
        let (queue, filled) = &*self.queue;
        let left_out = queue.lock().expect("nobody panics with it").push(job);
        filled.notify_one();
        left_out
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let (queue, filled) = &*self.queue;
        queue.lock().expect("nobody panics with it").closed = true;
        filled.notify_one();
    }
}

/// The next job, once there is one; none: nothing more is compared.
fn next_job((queue, filled): &(Mutex<LoginQueue>, Condvar)) -> Option<Job> {
    let mut queue = queue.lock().expect("nobody panics with it");
    loop {
        if queue.closed {
            return None;
        }
        match queue.pop() {
            Some(job) => return Some(job),
            None => queue = filled.wait(queue).expect("nobody panics with it"),
        }
    }
}

fn start(waker: Waker) -> std::io::Result<Running> {
    let running: Arc<(Mutex<LoginQueue>, Condvar)> = Arc::default();
    let queue = Arc::clone(&running);
    // As many answers wait as sessions are parked for one, at most: the ring thread takes them each turn.
    let (outbox, done) = channel();
    std::thread::Builder::new().name("logins".to_owned()).spawn(move || {
        // Commits come first.
        give_way();
        while let Some(job) = next_job(&queue) {
            job.run();
            if outbox.send(job.session).is_err() {
                return;
            }
            waker.wake();
        }
    })?;
    Ok(Running { queue: running, done })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delay_doubles_up_to_its_bound() {
        let delays: Vec<u64> = (0..6).map(|failures| delay(failures).as_millis() as u64).collect();
        assert_eq!(delays, [500, 1000, 2000, 4000, 8000, 8000]);
        assert_eq!(delay(u32::MAX), DELAY_MAX);
    }
}
