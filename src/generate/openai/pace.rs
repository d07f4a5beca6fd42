//! Rate limits (requests and tokens per minute) and retry delays.

use std::time::{Duration, Instant};

use rand::Rng;

use crate::rng::Stream;

/// Seconds' worth of the limit that may be used at once after a pause.
const BURST: f64 = 2.0;
/// Longest delay between two attempts, in seconds.
const LONGEST_PAUSE: f64 = 60.0;

/// A token bucket. It may be overdrawn; the next request then waits longer.
#[derive(Clone, Debug)]
pub struct Bucket {
    /// Units per second; 0 for no limit.
    rate: f64,
    filled: f64,
    at: Instant,
}

impl Bucket {
    /// A bucket of `a_minute` units per minute; 0 for no limit.
    pub fn new(a_minute: f64, now: Instant) -> Self {
        let rate = a_minute / 60.0;
        Self { rate, filled: (rate * BURST).max(1.0), at: now }
    }

    /// Time until units are available; zero if they are now.
    pub fn wait(&mut self, now: Instant) -> Duration {
        if self.rate <= 0.0 {
            return Duration::ZERO;
        }
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.filled = (self.filled + passed * self.rate).min((self.rate * BURST).max(1.0));
        self.at = now;
        // Rounding must not cause a second wait.
        if self.filled >= 0.999 {
            Duration::ZERO
        } else {
            Duration::from_secs_f64(((1.0 - self.filled) / self.rate).min(3600.0))
        }
    }

    /// Takes `units`; a negative number returns them.
    pub fn take(&mut self, units: f64) {
        if self.rate > 0.0 {
            self.filled -= units;
        }
    }
}

/// Delay before attempt `tried` + 1: exponential backoff with full jitter, over a span of `first` seconds that doubles
/// each time up to a minute, so that requests that failed together are not retried together.
pub(super) fn backoff(first: f64, seed: u64, tried: u32) -> Duration {
    let span = (first * 2.0_f64.powi(tried.clamp(1, 31) as i32 - 1)).min(LONGEST_PAUSE);
    let share: f64 = Stream::new(seed, "teacher-retry").at(0, u64::from(tried)).random();
    Duration::from_secs_f64(span * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_a_minute_and_is_uniform_over_its_span() {
        const REQUESTS: u64 = 400;
        for (tried, span) in
            [(1, 0.5), (2, 1.0), (3, 2.0), (7, 32.0), (8, 60.0), (31, 60.0), (u32::MAX, 60.0)]
        {
            let pauses: Vec<f64> =
                (0..REQUESTS).map(|seed| backoff(0.5, seed, tried).as_secs_f64()).collect();
            assert!(pauses.iter().all(|pause| (0.0..=span).contains(pause)), "{tried}: {pauses:?}");
            // Uniform over the span: mean within five standard errors of its half, extremes near both ends.
            let mean = pauses.iter().sum::<f64>() / REQUESTS as f64;
            let error = span / (12.0 * REQUESTS as f64).sqrt();
            assert!((mean - span / 2.0).abs() < 5.0 * error, "{tried}: {mean}");
            for (low, high) in [(0.0, 0.05), (0.95, 1.0)] {
                assert!(pauses.iter().any(|pause| (low..=high).contains(&(pause / span))));
            }
        }
        assert_eq!(backoff(0.5, 7, 3), backoff(0.5, 7, 3));
        assert_eq!(backoff(0.0, 7, 3), Duration::ZERO);
    }

    #[test]
    fn bucket_admits_its_limit_per_minute() {
        let start = Instant::now();
        let mut bucket = Bucket::new(60.0, start);
        let mut now = start;
        let mut taken = 0;
        while now < start + Duration::from_mins(1) {
            let wait = bucket.wait(now);
            if wait.is_zero() {
                bucket.take(1.0);
                taken += 1;
            }
            now += wait;
        }
        assert!((60..=63).contains(&taken), "{taken}");
    }

    #[test]
    fn an_overdrawn_bucket_waits_until_it_is_paid_back() {
        let start = Instant::now();
        let mut bucket = Bucket::new(6000.0, start);
        assert!(bucket.wait(start).is_zero());
        bucket.take(1000.0);
        let wait = bucket.wait(start).as_secs_f64();
        assert!((wait - 8.01).abs() < 1e-6, "{wait}");
        bucket.take(-900.0);
        assert!(bucket.wait(start).is_zero());
        let mut free = Bucket::new(0.0, start);
        free.take(1e9);
        assert!(free.wait(start).is_zero());
    }
}
