//! Server metrics in Prometheus' text format.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Upper bounds of the histograms' buckets, in seconds.
const BOUNDS: [f64; 14] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// A counter or gauge.
#[derive(Debug, Default)]
pub(super) struct Number(AtomicU64);

impl Number {
    pub(super) fn add(&self, count: usize) {
        self.0.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub(super) fn set(&self, value: usize) {
        self.0.store(value as u64, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A histogram of durations.
#[derive(Debug, Default)]
pub(super) struct Histogram(Mutex<Buckets>);

#[derive(Debug, Default)]
struct Buckets {
    counts: [u64; BOUNDS.len()],
    count: u64,
    sum: f64,
}

impl Histogram {
    pub(super) fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let mut buckets = locked(&self.0);
        if let Some(place) = BOUNDS.iter().position(|bound| seconds <= *bound) {
            buckets.counts[place] += 1;
        }
        buckets.count += 1;
        buckets.sum += seconds;
    }

    fn write(&self, text: &mut String, name: &str) {
        let buckets = locked(&self.0);
        let mut below = 0;
        for (bound, count) in BOUNDS.iter().zip(buckets.counts) {
            below += count;
            let _ = writeln!(text, "{name}_bucket{{le=\"{bound}\"}} {below}");
        }
        let Buckets { count, sum, .. } = *buckets;
        let _ = writeln!(text, "{name}_bucket{{le=\"+Inf\"}} {count}\n{name}_sum {sum}");
        let _ = writeln!(text, "{name}_count {count}");
    }
}

/// Counts stay valid even if a thread panicked while holding the lock.
fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All metrics.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    answered: Mutex<BTreeMap<(&'static str, u16), u64>>,
    pub(super) waiting: Number,
    pub(super) running: Number,
    pub(super) cached_tokens: Number,
    pub(super) prompt_tokens: Number,
    pub(super) cached_prompt_tokens: Number,
    pub(super) generated_tokens: Number,
    pub(super) cancelled: Number,
    pub(super) first_token: Histogram,
    pub(super) request: Histogram,
}

impl Metrics {
    /// Counts an HTTP request.
    pub(super) fn answered(&self, route: &'static str, status: u16) {
        *locked(&self.answered).entry((route, status)).or_default() += 1;
    }

    /// The page scraped by Prometheus.
    pub(super) fn page(&self) -> String {
        let mut text = String::new();
        head(&mut text, "arriero_requests_total", "counter", "HTTP requests by route and status.");
        for ((route, status), count) in &*locked(&self.answered) {
            let labels = format!("route=\"{route}\",status=\"{status}\"");
            let _ = writeln!(text, "arriero_requests_total{{{labels}}} {count}");
        }
        let numbers = [
            ("arriero_requests_waiting", "gauge", "Requests that wait to be read.", &self.waiting),
            ("arriero_answers_running", "gauge", "Prompts and answers under way.", &self.running),
            (
                "arriero_cache_tokens",
                "gauge",
                "Tokens in all caches, or promised to them.",
                &self.cached_tokens,
            ),
            (
                "arriero_prompt_tokens_total",
                "counter",
                "Prompt tokens of answered requests.",
                &self.prompt_tokens,
            ),
            (
                "arriero_cached_prompt_tokens_total",
                "counter",
                "Prompt tokens that a kept cache had already.",
                &self.cached_prompt_tokens,
            ),
            ("arriero_generated_tokens_total", "counter", "Tokens drawn.", &self.generated_tokens),
            (
                "arriero_requests_cancelled_total",
                "counter",
                "Requests whose client went away.",
                &self.cancelled,
            ),
        ];
        for (name, kind, help, number) in numbers {
            head(&mut text, name, kind, help);
            let _ = writeln!(text, "{name} {}", number.get());
        }
        let histograms = [
            (
                "arriero_time_to_first_token_seconds",
                "From a request's arrival to its first token.",
                &self.first_token,
            ),
            (
                "arriero_request_seconds",
                "From a request's arrival to the end of its answers.",
                &self.request,
            ),
        ];
        for (name, help, histogram) in histograms {
            head(&mut text, name, "histogram", help);
            histogram.write(&mut text, name);
        }
        text
    }
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histogram_buckets_are_cumulative() {
        let metrics = Metrics::default();
        for millis in [4, 20, 20, 700, 1_000_000] {
            metrics.request.observe(Duration::from_millis(millis));
        }
        metrics.answered("/health", 200);
        metrics.answered("/health", 200);
        metrics.generated_tokens.add(7);
        let page = metrics.page();
        for line in [
            "arriero_requests_total{route=\"/health\",status=\"200\"} 2",
            "arriero_request_seconds_bucket{le=\"0.005\"} 1",
            "arriero_request_seconds_bucket{le=\"0.025\"} 3",
            "arriero_request_seconds_bucket{le=\"300\"} 4",
            "arriero_request_seconds_bucket{le=\"+Inf\"} 5",
            "arriero_request_seconds_count 5",
            "arriero_generated_tokens_total 7",
            "# TYPE arriero_time_to_first_token_seconds histogram",
        ] {
            assert!(page.lines().any(|found| found == line), "{line}:\n{page}");
        }
    }
}
