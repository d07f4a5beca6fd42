//! Several URLs serving one model: each request goes to the least loaded one; a failing URL is set aside for a while
//! and retried. Limits are per host: URLs that differ only in their path share them.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::adaptive::Window;
use super::http::{Failure, Trouble};
use super::pace::Bucket;
use super::spec::ServerSpec;

/// Consecutive failures after which a URL is set aside.
const PATIENCE: u32 = 3;
/// Seconds it is set aside at first; doubled each time, up to a minute.
const AWAY: f64 = 1.0;
const LONGEST_AWAY: f64 = 60.0;

/// All endpoints.
#[derive(Debug)]
pub(super) struct Endpoints {
    all: Mutex<All>,
    freed: Notify,
}

#[derive(Debug, Default)]
struct All {
    urls: Vec<Endpoint>,
    hosts: Vec<Host>,
}

#[derive(Debug)]
struct Endpoint {
    url: String,
    /// Index of its host.
    host: usize,
    in_flight: usize,
    /// Set after too many failures: no request is sent before then, and afterwards one at a time until one succeeds.
    away_until: Option<Instant>,
    /// Consecutive failures.
    failures: u32,
}

/// A host and port, with its limits.
#[derive(Debug)]
struct Host {
    name: String,
    in_flight: usize,
    window: Window,
    requests: Bucket,
    tokens: Bucket,
    /// No requests before then (`Retry-After`).
    paused_until: Option<Instant>,
}

/// A slot in a host's window.
#[derive(Clone, Debug)]
pub(super) struct Lease {
    pub(super) url: String,
    index: usize,
    begun: Instant,
    /// Reserved tokens, settled when the answer arrives.
    reserved: f64,
    full: bool,
}

impl All {
    fn add(&mut self, url: &str, spec: &ServerSpec, now: Instant) {
        let name = host_of(url);
        let known = self.hosts.iter().position(|host| host.name == name);
        let host = known.unwrap_or_else(|| {
            self.hosts.push(Host {
                name,
                in_flight: 0,
                window: Window::new(spec.max_concurrency),
                requests: Bucket::new(spec.requests_per_minute, now),
                tokens: Bucket::new(spec.tokens_per_minute, now),
                paused_until: None,
            });
            self.hosts.len() - 1
        });
        let url = url.to_owned();
        self.urls.push(Endpoint { url, host, in_flight: 0, away_until: None, failures: 0 });
    }

    /// Frees a lease's slot; returns its URL and host.
    fn release(&mut self, lease: &Lease) -> (&mut Endpoint, &mut Host) {
        let endpoint = &mut self.urls[lease.index];
        let host = &mut self.hosts[endpoint.host];
        endpoint.in_flight -= 1;
        host.in_flight -= 1;
        (endpoint, host)
    }
}

/// `name:port` of a URL; the whole text if it is not a URL.
fn host_of(url: &str) -> String {
    let parsed = reqwest::Url::parse(url).ok();
    let host =
        parsed.as_ref().and_then(|url| Some((url.host_str()?, url.port_or_known_default()?)));
    host.map_or_else(|| url.to_owned(), |(name, port)| format!("{name}:{port}"))
}

impl Endpoints {
    pub(super) fn new(spec: &ServerSpec) -> Self {
        let now = Instant::now();
        let mut all = All::default();
        for url in &spec.base_url {
            all.add(url, spec, now);
        }
        Self { all: Mutex::new(all), freed: Notify::new() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, All> {
        // Nothing panics while holding it; even then the counters would be usable.
        self.all.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Waits for a slot; `None` if the run ends meanwhile. `tokens`: upper bound of the request's usage.
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
            // The notification may go to another waiter, so check again after the timeout.
            let _ = tokio::time::timeout(wait, freed).await;
        }
    }

    /// A slot, or how long to wait at most before retrying.
    fn try_lease(&self, tokens: f64, now: Instant) -> Result<Lease, Duration> {
        let mut all = self.lock();
        let All { urls, hosts } = &mut *all;
        let mut wait = Duration::from_secs(1);
        let mut best: Option<((f64, usize), usize)> = None;
        for (index, endpoint) in urls.iter().enumerate() {
            let host = &mut hosts[endpoint.host];
            let until = endpoint.away_until.max(host.paused_until);
            if let Some(until) = until.filter(|&until| until > now) {
                wait = wait.min(until - now);
                continue;
            }
            let limit = host.window.limit();
            let is_tried = endpoint.away_until.is_some() && endpoint.in_flight > 0;
            if is_tried || host.in_flight >= limit {
                continue;
            }
            let pause = host.requests.wait(now).max(host.tokens.wait(now));
            if !pause.is_zero() {
                wait = wait.min(pause);
                continue;
            }
            let load = (host.in_flight as f64 / limit as f64, endpoint.in_flight);
            if best.is_none_or(|(least, _)| load < least) {
                best = Some((load, index));
            }
        }
        let Some((_, index)) = best else { return Err(wait.max(Duration::from_millis(1))) };
        let endpoint = &mut urls[index];
        let host = &mut hosts[endpoint.host];
        endpoint.in_flight += 1;
        host.in_flight += 1;
        host.requests.take(1.0);
        host.tokens.take(tokens);
        let full = host.in_flight >= host.window.limit();
        Ok(Lease { url: endpoint.url.clone(), index, begun: now, reserved: tokens, full })
    }

    /// Returns an unused slot.
    pub(super) fn unused(&self, lease: &Lease) {
        let mut all = self.lock();
        let (_, host) = all.release(lease);
        host.requests.take(-1.0);
        host.tokens.take(-lease.reserved);
        drop(all);
        self.freed.notify_one();
    }

    /// Frees a slot after an answer of `completion` tokens that used `tokens` in total.
    pub(super) fn answered(&self, lease: &Lease, completion: u64, tokens: u64) {
        let seconds = lease.begun.elapsed().as_secs_f64() / completion.max(1) as f64;
        let mut all = self.lock();
        let (endpoint, host) = all.release(lease);
        endpoint.failures = 0;
        let was_away = endpoint.away_until.take().is_some();
        host.tokens.take(tokens as f64 - lease.reserved);
        if was_away && host.in_flight == 0 {
            // The window was learned before the outage.
            host.window.restart();
        }
        host.window.answered(seconds, lease.full);
        drop(all);
        // Twice, because the window may have grown by one.
        self.freed.notify_one();
        self.freed.notify_one();
    }

    /// Frees a slot after a failure, and applies the failure to the URL and its host.
    pub(super) fn failed(&self, lease: &Lease, failure: &Failure) {
        let now = Instant::now();
        let mut all = self.lock();
        let (endpoint, host) = all.release(lease);
        host.tokens.take(-lease.reserved);
        match failure.trouble {
            // The request's own fault: the server works.
            Trouble::Refused | Trouble::Denied | Trouble::Malformed => endpoint.failures = 0,
            Trouble::Busy => host.window.trouble(lease.begun),
            Trouble::Server | Trouble::Silent | Trouble::Unreachable => {
                host.window.trouble(lease.begun);
                endpoint.failures += 1;
                if endpoint.failures >= PATIENCE {
                    let doubled = 2.0_f64.powi((endpoint.failures - PATIENCE).min(16) as i32);
                    let seconds = (AWAY * doubled).min(LONGEST_AWAY);
                    endpoint.away_until = Some(now + Duration::from_secs_f64(seconds));
                }
            }
        }
        if let Some(pause) = failure.retry_after {
            host.paused_until = host.paused_until.max(Some(now + pause));
        }
        drop(all);
        self.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(urls: &[&str], most: usize) -> ServerSpec {
        let base_url = urls.iter().map(|url| (*url).to_owned()).collect();
        ServerSpec { base_url, max_concurrency: most, ..ServerSpec::default() }
    }

    fn endpoints(urls: &[&str], most: usize) -> Endpoints {
        Endpoints::new(&spec(urls, most))
    }

    fn failure(trouble: Trouble) -> Failure {
        Failure { trouble, message: String::new(), hint: None, retry_after: None }
    }

    #[test]
    fn requests_go_to_the_url_with_the_fewest_in_flight() {
        let endpoints = endpoints(&["a", "b"], 2);
        let urls: Vec<String> =
            (0..4).map(|_| endpoints.try_lease(0.0, Instant::now()).unwrap().url).collect();
        assert_eq!(urls, ["a", "b", "a", "b"]);
        assert!(endpoints.try_lease(0.0, Instant::now()).is_err());
    }

    #[test]
    fn dead_url_is_set_aside_and_retried_with_one_request() {
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

    const PATHS: [&str; 3] = ["http://h/one/v1", "http://h:80/two/v1", "http://h:81/v1"];

    #[test]
    fn urls_of_one_host_share_its_limits() {
        let now = Instant::now();
        let urls = |endpoints: &Endpoints| -> Vec<String> {
            (0..9)
                .map_while(|_| endpoints.try_lease(0.0, now).ok())
                .map(|lease| lease.url)
                .collect()
        };
        let [one, two, other] = PATHS;
        assert_eq!(urls(&endpoints(&PATHS, 2)), [one, other, two, other]);
        // A burst of two requests per host, then two per second.
        let by_the_minute = ServerSpec { requests_per_minute: 60.0, ..spec(&PATHS, 8) };
        let endpoints = Endpoints::new(&by_the_minute);
        assert_eq!(urls(&endpoints), [one, other, two, other]);
        let tokens = ServerSpec { tokens_per_minute: 60.0, ..spec(&PATHS[..2], 8) };
        let endpoints = Endpoints::new(&tokens);
        endpoints.try_lease(100.0, now).unwrap();
        assert!(endpoints.try_lease(0.0, now).is_err());
    }

    #[test]
    fn dead_path_does_not_disable_another_path_of_the_same_host() {
        let endpoints = endpoints(&PATHS[..2], 8);
        let now = Instant::now();
        let [dead, alive] = [0, 1].map(|_| endpoints.try_lease(0.0, now).unwrap());
        assert_eq!([&dead.url, &alive.url], [PATHS[0], PATHS[1]]);
        endpoints.failed(&dead, &failure(Trouble::Server));
        for _ in 1..PATIENCE {
            let lease = endpoints.try_lease(0.0, now).unwrap();
            assert_eq!(lease.url, PATHS[0]);
            endpoints.failed(&lease, &failure(Trouble::Server));
        }
        assert_eq!(endpoints.try_lease(0.0, now).unwrap().url, PATHS[1]);
        let later = Instant::now() + Duration::from_secs(2);
        assert_eq!(endpoints.try_lease(0.0, later).unwrap().url, PATHS[0]);
        assert_eq!(endpoints.try_lease(0.0, later).unwrap().url, PATHS[1]);
        // Its slots are the host's, whose window was halved once.
        assert!(endpoints.try_lease(0.0, later).is_err());
    }

    #[test]
    fn retry_after_applies_to_the_whole_host() {
        let endpoints = endpoints(&PATHS[..2], 4);
        let lease = endpoints.try_lease(0.0, Instant::now()).unwrap();
        let busy = Failure { retry_after: Some(Duration::from_secs(5)), ..failure(Trouble::Busy) };
        endpoints.failed(&lease, &busy);
        assert!(endpoints.try_lease(0.0, Instant::now()).is_err());
        let later = Instant::now() + Duration::from_secs(6);
        assert!(endpoints.try_lease(0.0, later).is_ok());
    }
}
