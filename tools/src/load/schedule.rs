//! When transactions of an open-loop run (`-R`) are due: a Poisson process, as in pgbench. Latency counts from the
//! time that stands here, so a stalled node cannot hide behind clients that wait for it. Reads no clock.

use std::time::{Duration, Instant};

use rand::RngExt;

use super::expr::Random;

/// Between two transactions at most so many mean intervals pass, as in pgbench.
const INTERVALS_MAX: f64 = 15.0;

/// The schedule of one thread.
#[derive(Debug)]
pub struct Schedule {
    due: Instant,
    mean: Duration,
    random: Random,
}

impl Schedule {
    /// `rate` transactions a second on average from `start` on.
    pub fn new(rate: f64, start: Instant, random: Random) -> Schedule {
        let mut schedule = Schedule { due: start, mean: Duration::from_secs_f64(1.0 / rate), random };
        schedule.take();
        schedule
    }

    /// When the next transaction is due.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Takes the next transaction off the schedule and returns when it was due.
    pub fn take(&mut self) -> Instant {
        let uniform = 1.0 - self.random.random::<f64>();
        let wait = self.mean.mul_f64((-uniform.ln()).min(INTERVALS_MAX));
        let due = self.due;
        self.due += wait;
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn the_rate_holds_on_average_and_arrivals_are_irregular() {
        let start = Instant::now();
        let mut schedule = Schedule::new(1000.0, start, Random::seed_from_u64(3));
        let mut waits = Vec::new();
        let mut last = start;
        for _ in 0..20_000 {
            let due = schedule.take();
            waits.push((due - last).as_secs_f64());
            last = due;
        }
        let seconds = (last - start).as_secs_f64();
        assert!((19.4..20.6).contains(&seconds), "20000 at 1000/s took {seconds} s");
        let longer = waits.iter().filter(|wait| **wait > 0.001).count() as f64 / waits.len() as f64;
        assert!(
            (0.35..0.39).contains(&longer),
            "a Poisson process waits longer than its mean in 1/e of cases: {longer}"
        );
    }
}
