//! The longest time without a success, from the moments of all successes. Core.

use std::time::{Duration, Instant};

/// The longest gap between successes that ends after `from`, with the last success before `from` as its earliest beginning. What
/// has not ended by `now` counts up to then.
pub fn longest_gap(successes: &[Instant], from: Instant, now: Instant) -> Duration {
    let first = successes.partition_point(|at| *at <= from);
    let mut last = first.checked_sub(1).map_or(from, |index| successes[index]);
    let mut longest = Duration::ZERO;
    for at in successes[first..].iter().copied().chain([now]) {
        longest = longest.max(at.saturating_duration_since(last));
        last = at;
    }
    longest
}

/// The value at `share` of the sorted values; `None` when there are none.
pub fn quantile(values: &mut [Duration], share: f64) -> Option<Duration> {
    values.sort_unstable();
    let index = (share * (values.len().checked_sub(1)? as f64)).round() as usize;
    values.get(index).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gap_that_a_fault_made_is_found() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let successes = [0, 10, 20, 500, 510, 700].map(at);
        let gap = |from, now| longest_gap(&successes, at(from), at(now)).as_millis();
        assert_eq!(gap(25, 710), 480);
        assert_eq!(gap(505, 710), 190, "an earlier gap is another fault's");
        assert_eq!(gap(25, 2000), 1300, "writes have not come back");
        assert_eq!(longest_gap(&[], at(0), at(30)).as_millis(), 30);
    }

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let mut values: Vec<Duration> = (1..=30).rev().map(Duration::from_millis).collect();
        assert_eq!(quantile(&mut values, 0.5), Some(Duration::from_millis(16)));
        assert_eq!(quantile(&mut values, 0.99), Some(Duration::from_millis(30)));
        assert_eq!(quantile(&mut [], 0.5), None);
    }
}
