//! One request until it is answered or abandoned: slot, exchange, delay before the next attempt.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::endpoints::Endpoints;
use super::http::{Failure, Http, Trouble};
use super::ledger::Spent;
use super::pace::backoff;
use super::probe::{self, Needs, Probe};
use super::spec::ServerSpec;
use super::wire::ChatReply;
use crate::error::Result;
use crate::generate::engine::Answer;

/// Retries after a malformed reply: a proxy's hiccup passes, a non-conforming server does not improve.
const MALFORMED_RETRIES: u32 = 2;
/// How often a waiting request checks for an interrupt.
const TICK: Duration = Duration::from_millis(200);

/// State shared by all requests of a server.
#[derive(Debug)]
pub(super) struct Sender {
    http: Http,
    endpoints: Endpoints,
    max_retries: u32,
    retry_delay: f64,
    logprobs: bool,
    /// An answer had a finish reason, so all others must.
    says_end: AtomicBool,
    max_requests: u64,
    max_tokens: u64,
    requests: AtomicU64,
    tokens: AtomicU64,
    retries: AtomicU64,
    /// Model named in the first reply.
    model: OnceLock<String>,
    /// The latest failure, shown to users who wait.
    trouble: Mutex<Option<String>>,
}

/// A request to send.
#[derive(Debug)]
pub(super) struct Job {
    /// The prompt's index in the list.
    pub(super) place: usize,
    /// First sample requested.
    pub(super) first: usize,
    /// Number of answers requested.
    pub(super) count: usize,
    pub(super) key: String,
    pub(super) seed: u64,
    pub(super) body: Vec<u8>,
    /// Rough upper bound of its token usage.
    pub(super) tokens: f64,
}

/// Result of a request.
#[derive(Debug)]
pub(super) enum Ended {
    Answered(Vec<Answer>),
    Failed(Failure),
    /// The named budget is used up.
    OutOfBudget(&'static str),
    /// The run is ending.
    Stopped,
}

/// A finished request.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) job: Job,
    pub(super) used: Spent,
    pub(super) ended: Ended,
}

impl Sender {
    pub(super) fn new(spec: &ServerSpec, spent: Spent) -> Result<Self> {
        Ok(Self {
            http: Http::new(spec)?,
            endpoints: Endpoints::new(spec),
            max_retries: spec.max_retries,
            retry_delay: spec.retry_delay,
            logprobs: spec.logprobs,
            says_end: AtomicBool::new(false),
            max_requests: spec.max_requests,
            max_tokens: spec.max_tokens_total,
            requests: AtomicU64::new(spent.requests),
            tokens: AtomicU64::new(spent.tokens),
            retries: AtomicU64::new(0),
            model: OnceLock::new(),
            trouble: Mutex::new(None),
        })
    }

    pub(super) fn spent(&self) -> Spent {
        Spent {
            requests: self.requests.load(Ordering::Relaxed),
            tokens: self.tokens.load(Ordering::Relaxed),
        }
    }

    pub(super) fn retries(&self) -> u64 {
        self.retries.load(Ordering::Relaxed)
    }

    /// The latest failure; returned once.
    pub(super) fn take_trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Sends a request until it is answered, cannot succeed, or its run is `stopping`.
    pub(super) async fn ask(&self, job: Job, stopping: &AtomicBool) -> Outcome {
        let mut used = Spent::default();
        let ended = self.attempts(&job, &mut used, stopping).await;
        Outcome { job, used, ended }
    }

    async fn attempts(&self, job: &Job, used: &mut Spent, stopping: &AtomicBool) -> Ended {
        loop {
            let Some(lease) = self.endpoints.lease(job.tokens, stopping).await else {
                return Ended::Stopped;
            };
            if let Err(budget) = self.spend() {
                self.endpoints.unused(&lease);
                return Ended::OutOfBudget(budget);
            }
            used.requests += 1;
            let url = format!("{}/chat/completions", lease.url);
            let reply = self.http.post::<ChatReply>(&url, job.body.clone()).await;
            let failure = match reply {
                Ok(reply) => {
                    let usage = reply.body.usage.unwrap_or_default();
                    let tokens = usage.prompt_tokens + usage.completion_tokens;
                    used.tokens += tokens;
                    self.tokens.fetch_add(tokens, Ordering::Relaxed);
                    let same = self.same_model(&url, reply.body.model.as_deref());
                    let says = reply.body.says_end();
                    let says = self.says_end.fetch_or(says, Ordering::Relaxed) || says;
                    let read = |()| reply.body.answers(&url, job.count, self.logprobs, says);
                    match same.and_then(read) {
                        Ok(answers) => {
                            self.endpoints.answered(&lease, usage.completion_tokens, tokens);
                            return Ended::Answered(answers);
                        }
                        // The key has not yet been redacted from text inside a valid reply.
                        Err(failure) => self.http.without_key(failure),
                    }
                }
                Err(failure) => failure,
            };
            self.endpoints.failed(&lease, &failure);
            let tried = used.requests as u32;
            let most = match failure.trouble {
                Trouble::Malformed => self.max_retries.min(MALFORMED_RETRIES),
                _ => self.max_retries,
            };
            if !failure.trouble.passes() || tried > most {
                return Ended::Failed(failure);
            }
            self.note(&failure);
            if !self.pause(job.seed, tried, stopping).await {
                return Ended::Stopped;
            }
        }
    }

    /// Counts one more request.
    fn spend(&self) -> Result<(), &'static str> {
        if self.max_tokens > 0 && self.tokens.load(Ordering::Relaxed) >= self.max_tokens {
            return Err("max_tokens_total");
        }
        let before = self.requests.fetch_add(1, Ordering::Relaxed);
        if self.max_requests > 0 && before >= self.max_requests {
            self.requests.fetch_sub(1, Ordering::Relaxed);
            return Err("max_requests");
        }
        Ok(())
    }

    /// Rejects an answer from a different model than the first: one of the URLs serves the wrong model.
    fn same_model(&self, url: &str, model: Option<&str>) -> Result<(), Failure> {
        let Some(model) = model.filter(|model| !model.is_empty()) else { return Ok(()) };
        let first = self.model.get_or_init(|| model.to_owned());
        if first == model {
            return Ok(());
        }
        let message = format!("{url}: an answer of `{model}`, the first one was of `{first}`");
        Err(Failure {
            hint: Some("every `base_url` has to serve the same model".to_owned()),
            ..Failure::new(Trouble::Denied, message)
        })
    }

    fn note(&self, failure: &Failure) {
        self.retries.fetch_add(1, Ordering::Relaxed);
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        *trouble = Some(failure.message.clone());
    }

    /// Waits before attempt `tried` + 1. `false` if the run ends meanwhile.
    async fn pause(&self, seed: u64, tried: u32, stopping: &AtomicBool) -> bool {
        let mut left = backoff(self.retry_delay, seed, tried);
        while !left.is_zero() {
            if stopping.load(Ordering::Relaxed) {
                return false;
            }
            let slice = left.min(TICK);
            tokio::time::sleep(slice).await;
            left -= slice;
        }
        !stopping.load(Ordering::Relaxed)
    }

    /// Rejects a reachable URL that serves the wrong model. An unreachable one may come back.
    async fn check_others(&self, answered: &String, spec: &ServerSpec) -> Result<(), Failure> {
        for url in spec.base_url.iter().filter(|url| *url != answered) {
            match probe::models(&self.http, url, spec, &mut Probe::default()).await {
                Err(failure) if failure.trouble == Trouble::Denied => return Err(failure),
                _ => {}
            }
        }
        Ok(())
    }

    /// Probes the server; see [`probe::probe`]. The first URL that answers stands for all; the others are only asked
    /// which models they serve.
    pub(super) async fn probe(&self, spec: &ServerSpec, needs: Needs) -> Result<Probe, Failure> {
        let mut tried = 0;
        loop {
            let mut last = None;
            let is_last = tried >= self.max_retries;
            for url in &spec.base_url {
                match probe::probe(&self.http, url, spec, needs, is_last).await {
                    Ok(probe) => {
                        let says = probe.finish_reason == Some(true);
                        self.says_end.fetch_or(says, Ordering::Relaxed);
                        self.check_others(url, spec).await?;
                        return Ok(probe);
                    }
                    Err(failure) if !failure.trouble.passes() => return Err(failure),
                    Err(failure) => last = Some(failure),
                }
            }
            tried += 1;
            let Some(failure) = last else {
                return Err(Failure::new(Trouble::Denied, "no `base_url`"));
            };
            let most = match failure.trouble {
                Trouble::Malformed => self.max_retries.min(MALFORMED_RETRIES),
                _ => self.max_retries,
            };
            if tried > most {
                return Err(failure.tried(u64::from(tried)));
            }
            self.note(&failure);
            if let Some(asked) = failure.retry_after {
                tokio::time::sleep(asked).await;
            }
            self.pause(0, tried, &AtomicBool::new(false)).await;
        }
    }
}
