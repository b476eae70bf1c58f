//! Which faults a drill injects, one after another: as they were named, or at random from a seed. Core; the seed makes the same
//! sequence again, though not the same moments.

use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::fault::Fault;

/// A random fault lasts at least so long.
const LASTS_MIN: Duration = Duration::from_millis(300);
/// One in so many random faults is followed by the next one at once, before the members have come back.
const HURRIED_ONE_IN: u32 = 2;

/// What `--faults` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// This one.
    One(Fault),
    /// Any, again and again.
    Random,
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Wanted, String> {
        if text == "random" {
            return Ok(Wanted::Random);
        }
        Fault::from_str(text, false).map(Wanted::One).map_err(|_| {
            let names: Vec<String> = Fault::ALL.iter().map(Fault::to_string).collect();
            format!("no such fault; there are {}, and random", names.join(", "))
        })
    }
}

/// One fault of a drill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// What is done.
    pub fault: Fault,
    /// For how long.
    pub lasts: Duration,
    /// To which replica, if to one.
    pub replica: usize,
    /// The one before was not waited for.
    pub hurried: bool,
    /// The next one follows at once.
    pub hurries: bool,
}

impl Step {
    fn calm(fault: Fault) -> Step {
        Step { fault, lasts: fault.lasts(), replica: 0, hurried: false, hurries: false }
    }
}

/// Each of the faults in their order, `rounds` times.
pub fn in_order(faults: &[Fault], rounds: usize) -> Vec<Step> {
    (0..rounds).flat_map(|_| faults.iter().copied().map(Step::calm)).collect()
}

/// `rounds` of the faults at random.
pub fn random(faults: &[Fault], rounds: usize, seed: u64) -> Vec<Step> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut hurried = false;
    let mut steps = Vec::with_capacity(rounds);
    for number in 0..rounds {
        let fault = faults[rng.random_range(0..faults.len())];
        let longest = fault.lasts().max(LASTS_MIN);
        let lasts = Duration::from_millis(rng.random_range(LASTS_MIN.as_millis()..=longest.as_millis()) as u64);
        // After the last one everything is looked at.
        let hurries = rng.random_range(0..HURRIED_ONE_IN) == 0 && number + 1 < rounds;
        steps.push(Step { fault, lasts, replica: rng.random_range(0..16), hurried, hurries });
        hurried = hurries;
    }
    steps
}

/// The same, but the members come back after each one.
pub fn random_calm(faults: &[Fault], rounds: usize, seed: u64) -> Vec<Step> {
    let calm = |step| Step { hurried: false, hurries: false, ..step };
    random(faults, rounds, seed).into_iter().map(calm).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_named_and_a_wrong_name_tells_the_right_ones() {
        assert_eq!("kill".parse(), Ok(Wanted::One(Fault::Kill)));
        assert_eq!("random".parse(), Ok(Wanted::Random));
        let error = "klll".parse::<Wanted>().expect_err("no fault");
        assert!(Fault::ALL.iter().all(|fault| error.contains(&fault.to_string())), "{error}");
    }

    #[test]
    fn a_seed_makes_a_sequence_again_and_its_end_is_looked_at() {
        let steps = random(&Fault::ALL, 200, 7);
        assert_eq!(steps, random(&Fault::ALL, 200, 7));
        assert_ne!(steps, random(&Fault::ALL, 200, 8));
        assert!(Fault::ALL.iter().all(|fault| steps.iter().any(|step| step.fault == *fault)));
        assert!(steps.windows(2).all(|pair| pair[0].hurries == pair[1].hurried));
        assert!(steps.iter().all(|step| step.lasts >= LASTS_MIN && step.lasts <= step.fault.lasts().max(LASTS_MIN)));
        assert!((0..50).all(|seed| random(&Fault::ALL, 3, seed).last().is_some_and(|step| !step.hurries)));
        assert_eq!(in_order(&[Fault::Kill, Fault::Stop], 2).len(), 4);
    }
}
