//! Several URLs that serve one model: each request goes where the fewest are under way, a URL that fails is set
//! aside for a while and tried again.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::adaptive::Window;
use super::http::{Failure, Trouble};
use super::pace::Bucket;
use super::spec::ServerSpec;

/// Failures in a row after which a URL is set aside.
const PATIENCE: u32 = 3;
/// Seconds that it is set aside for at first; doubled each time, up to a minute.
const AWAY: f64 = 1.0;
const LONGEST_AWAY: f64 = 60.0;

/// All URLs.
#[derive(Debug)]
pub(super) struct Endpoints {
    all: Mutex<Vec<Endpoint>>,
    freed: Notify,
}

#[derive(Debug)]
struct Endpoint {
    url: String,
    in_flight: usize,
    window: Window,
    requests: Bucket,
    tokens: Bucket,
    /// The server asked not to be spoken to before (`Retry-After`).
    paused_until: Option<Instant>,
    /// It has failed too often: nobody is sent there before, and then one request at first.
    away_until: Option<Instant>,
    /// Failures in a row.
    failures: u32,
}

/// A place in a URL's window.
#[derive(Clone, Debug)]
pub(super) struct Lease {
    pub(super) url: String,
    index: usize,
    begun: Instant,
    /// Tokens reserved, to be settled when the answer is there.
    reserved: f64,
    full: bool,
}

impl Endpoints {
    pub(super) fn new(spec: &ServerSpec) -> Self {
        let now = Instant::now();
        let endpoint = |url: &String| Endpoint {
            url: url.clone(),
            in_flight: 0,
            window: Window::new(spec.max_concurrency),
            requests: Bucket::new(spec.requests_per_minute, now),
            tokens: Bucket::new(spec.tokens_per_minute, now),
            paused_until: None,
            away_until: None,
            failures: 0,
        };
        let all = Mutex::new(spec.base_url.iter().map(endpoint).collect());
        Self { all, freed: Notify::new() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Endpoint>> {
        // Nothing panics while it is held; were it so, the numbers would still be usable.
        self.all.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Waits for a place; none where the run ends meanwhile. `tokens` is what the request may use at most.
    pub(super) async fn lease(&self, tokens: f64, stopping: &AtomicBool) -> Option<Lease> {
        loop {
            let freed = self.freed.notified();
            if stopping.load(Ordering::Relaxed) {
                // Wake the next one, which must end as well.
                self.freed.notify_one();
                return None;
            }
            let wait = match self.try_lease(tokens, Instant::now()) {
                Ok(lease) => return Some(lease),
                Err(wait) => wait,
            };
            // The notice may go to another: look again after the wait in any case.
            let _ = tokio::time::timeout(wait, freed).await;
        }
    }

    /// A place, or how long to wait at most before asking again.
    fn try_lease(&self, tokens: f64, now: Instant) -> Result<Lease, Duration> {
        let mut all = self.lock();
        let mut wait = Duration::from_secs(1);
        let mut best: Option<(f64, usize)> = None;
        for (index, endpoint) in all.iter_mut().enumerate() {
            let until = endpoint.away_until.max(endpoint.paused_until);
            if let Some(until) = until.filter(|&until| until > now) {
                wait = wait.min(until - now);
                continue;
            }
            if endpoint.away_until.is_some() {
                // Kept until the first answer shows that it is back: one request at a time.
                endpoint.window.restart();
                if endpoint.in_flight == 0 {
                    endpoint.away_until = None;
                }
            }
            let limit = endpoint.window.limit();
            if endpoint.in_flight >= limit {
                continue;
            }
            let pause = endpoint.requests.wait(now).max(endpoint.tokens.wait(now));
            if !pause.is_zero() {
                wait = wait.min(pause);
                continue;
            }
            let load = endpoint.in_flight as f64 / limit as f64;
            if best.is_none_or(|(least, _)| load < least) {
                best = Some((load, index));
            }
        }
        let Some((_, index)) = best else { return Err(wait.max(Duration::from_millis(1))) };
        let endpoint = &mut all[index];
        endpoint.in_flight += 1;
        endpoint.requests.take(1.0);
        endpoint.tokens.take(tokens);
        let full = endpoint.in_flight >= endpoint.window.limit();
        Ok(Lease { url: endpoint.url.clone(), index, begun: now, reserved: tokens, full })
    }

    /// Gives a place back that was not used.
    pub(super) fn unused(&self, lease: &Lease) {
        let mut all = self.lock();
        let endpoint = &mut all[lease.index];
        endpoint.in_flight -= 1;
        endpoint.requests.take(-1.0);
        endpoint.tokens.take(-lease.reserved);
        drop(all);
        self.freed.notify_one();
    }

    /// Gives a place back after an answer of `completion` tokens that used `tokens` in all.
    pub(super) fn answered(&self, lease: &Lease, completion: u64, tokens: u64) {
        let seconds = lease.begun.elapsed().as_secs_f64() / completion.max(1) as f64;
        let mut all = self.lock();
        let endpoint = &mut all[lease.index];
        endpoint.in_flight -= 1;
        endpoint.failures = 0;
        endpoint.away_until = None;
        endpoint.tokens.take(tokens as f64 - lease.reserved);
        endpoint.window.answered(seconds, lease.full);
        drop(all);
        // Two, because the window may have grown by one.
        self.freed.notify_one();
        self.freed.notify_one();
    }

    /// Gives a place back after a failure, with what follows from it for the URL.
    pub(super) fn failed(&self, lease: &Lease, failure: &Failure) {
        let now = Instant::now();
        let mut all = self.lock();
        let endpoint = &mut all[lease.index];
        endpoint.in_flight -= 1;
        endpoint.tokens.take(-lease.reserved);
        match failure.trouble {
            // The request's own fault: the server works.
            Trouble::Refused | Trouble::Denied | Trouble::Malformed => endpoint.failures = 0,
            Trouble::Busy => endpoint.window.trouble(lease.begun),
            Trouble::Server | Trouble::Silent | Trouble::Unreachable => {
                endpoint.window.trouble(lease.begun);
                endpoint.failures += 1;
                if endpoint.failures >= PATIENCE {
                    let doubled = 2.0_f64.powi((endpoint.failures - PATIENCE).min(16) as i32);
                    let seconds = (AWAY * doubled).min(LONGEST_AWAY);
                    endpoint.away_until = Some(now + Duration::from_secs_f64(seconds));
                }
            }
        }
        if let Some(pause) = failure.retry_after {
            endpoint.paused_until = endpoint.paused_until.max(Some(now + pause));
        }
        drop(all);
        self.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(urls: &[&str], most: usize) -> Endpoints {
        Endpoints::new(&ServerSpec {
            base_url: urls.iter().map(|url| (*url).to_owned()).collect(),
            max_concurrency: most,
            ..ServerSpec::default()
        })
    }

    fn failure(trouble: Trouble) -> Failure {
        Failure { trouble, message: String::new(), hint: None, retry_after: None }
    }

    #[test]
    fn requests_go_where_the_fewest_are_under_way() {
        let endpoints = endpoints(&["a", "b"], 2);
        let urls: Vec<String> =
            (0..4).map(|_| endpoints.try_lease(0.0, Instant::now()).unwrap().url).collect();
        assert_eq!(urls, ["a", "b", "a", "b"]);
        assert!(endpoints.try_lease(0.0, Instant::now()).is_err());
    }

    #[test]
    fn a_dead_url_is_set_aside_and_tried_with_one_request() {
        let endpoints = endpoints(&["a", "b"], 4);
        let now = Instant::now();
        for _ in 0..PATIENCE {
            let lease = endpoints.try_lease(0.0, now).unwrap();
            assert_eq!(lease.url, "a");
            endpoints.failed(&lease, &failure(Trouble::Unreachable));
        }
        for _ in 0..4 {
            assert_eq!(endpoints.try_lease(0.0, Instant::now()).unwrap().url, "b");
        }
        assert!(endpoints.try_lease(0.0, Instant::now()).is_err());
        let later = Instant::now() + Duration::from_secs(2);
        let back = endpoints.try_lease(0.0, later).unwrap();
        assert_eq!(back.url, "a");
        assert!(endpoints.try_lease(0.0, later).is_err());
        endpoints.answered(&back, 1, 1);
        assert_eq!(endpoints.try_lease(0.0, later).unwrap().url, "a");
    }

    #[test]
    fn retry_after_holds_for_the_whole_url() {
        let endpoints = endpoints(&["a"], 4);
        let lease = endpoints.try_lease(0.0, Instant::now()).unwrap();
        let busy = Failure { retry_after: Some(Duration::from_secs(5)), ..failure(Trouble::Busy) };
        endpoints.failed(&lease, &busy);
        assert!(endpoints.try_lease(0.0, Instant::now()).is_err());
        let later = Instant::now() + Duration::from_secs(6);
        assert!(endpoints.try_lease(0.0, later).is_ok());
    }
}
