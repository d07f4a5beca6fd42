//! Adaptive request concurrency: additive increase while the server keeps up, multiplicative decrease when it does not
//! (Chiu and Jain, 1989).

use std::time::Instant;

/// Initial concurrency.
const START: f64 = 8.0;
/// The window stops growing once requests take this many times their best time. A batching server slows a single
/// request long before its throughput saturates, so this is generous.
const STABLE: f64 = 4.0;
/// Weight of a new measurement in the running mean.
const FRESH: f64 = 0.1;
/// Slow decay of the best time, in case a server has become permanently slower.
const FORGET: f64 = 1.001;

/// The allowed number of concurrent requests.
#[derive(Clone, Debug)]
pub struct Window {
    size: f64,
    most: f64,
    /// Slow start: until the first failure each answer adds one, so the window doubles each round trip.
    doubling: bool,
    cut_at: Option<Instant>,
    /// Running mean of seconds per token.
    pace: f64,
    best: f64,
}

impl Window {
    /// A window of at most `most` requests.
    ///
    /// ```
    /// use arriero::generate::openai::adaptive::Window;
    /// use std::time::Instant;
    /// let mut window = Window::new(64);
    /// assert_eq!(window.limit(), 8);
    /// window.answered(0.01, true);
    /// assert_eq!(window.limit(), 9);
    /// window.trouble(Instant::now());
    /// assert_eq!(window.limit(), 4);
    /// ```
    pub fn new(most: usize) -> Self {
        let most = most.max(1) as f64;
        let (pace, best) = (0.0, f64::INFINITY);
        Self { size: START.min(most), most, doubling: true, cut_at: None, pace, best }
    }

    /// Current limit on concurrent requests.
    pub fn limit(&self) -> usize {
        self.size as usize
    }

    /// Records an answer that took `seconds` per token; `full` says whether the window was fully used, without which
    /// nothing is learned about a larger one.
    pub fn answered(&mut self, seconds: f64, full: bool) {
        self.pace =
            if self.pace > 0.0 { self.pace + FRESH * (seconds - self.pace) } else { seconds };
        self.best = (self.best * FORGET).min(self.pace);
        if full && self.pace <= STABLE * self.best {
            let step = if self.doubling { 1.0 } else { 1.0 / self.size };
            self.size = (self.size + step).min(self.most);
        } else if full {
            self.doubling = false;
        }
    }

    /// Records a rejected or lost request, begun at `begun`. Concurrent failures count once.
    pub fn trouble(&mut self, begun: Instant) {
        self.doubling = false;
        if self.cut_at.is_none_or(|cut_at| begun >= cut_at) {
            self.size = (self.size / 2.0).max(1.0);
            self.cut_at = Some(Instant::now());
        }
    }

    /// Restarts the window after the server was away, with a single request as a test.
    pub fn restart(&mut self) {
        self.size = 1.0;
        self.doubling = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn window_doubles_then_halves_once_per_round_then_grows_slowly() {
        let mut window = Window::new(64);
        for _ in 0..24 {
            window.answered(0.01, true);
        }
        assert_eq!(window.limit(), 32);
        let begun = Instant::now();
        for _ in 0..32 {
            window.trouble(begun);
        }
        assert_eq!(window.limit(), 16);
        for _ in 0..17 {
            window.answered(0.01, true);
        }
        assert_eq!(window.limit(), 17);
        window.trouble(Instant::now() + Duration::from_secs(1));
        assert_eq!(window.limit(), 8);
    }

    #[test]
    fn window_stops_growing_when_requests_slow_down_or_it_is_unused() {
        let mut window = Window::new(64);
        window.answered(0.01, true);
        for _ in 0..100 {
            window.answered(0.1, true);
        }
        let slow = window.limit();
        for _ in 0..100 {
            window.answered(0.1, true);
        }
        assert!(window.limit() <= slow + 1 && slow < 24, "{slow} {}", window.limit());
        let mut idle = Window::new(64);
        for _ in 0..100 {
            idle.answered(0.01, false);
        }
        assert_eq!(idle.limit(), 8);
    }

    #[test]
    fn window_stays_between_one_and_its_limit() {
        let mut window = Window::new(3);
        assert_eq!(window.limit(), 3);
        window.answered(0.01, true);
        assert_eq!(window.limit(), 3);
        for second in 0..10 {
            window.trouble(Instant::now() + Duration::from_secs(second));
        }
        assert_eq!(window.limit(), 1);
    }
}
