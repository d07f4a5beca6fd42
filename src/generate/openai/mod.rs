//! A teacher behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, or this program's own.
//!
//! ```text
//! answer()        one thread: makes requests as places free up, records and hands out what comes back  (run)
//!   └ request     a task: waits for a place, sends, tries again after a pause                          (request)
//!       ├ place   the URL with the fewest requests under way, windows that adapt, limits by the minute (endpoints, adaptive, pace)
//!       └ http    one exchange, and what kind of failure it was                                        (http, wire)
//! ```
//!
//! A request's seed is derived from (seed, prompt, sample), so a resumed run sends the same requests; whether a server
//! is deterministic for a seed is up to the server. Answers are written to the ledger before anything else is done with
//! them. Memory does not grow with the number of prompts.

pub mod adaptive;
mod endpoints;
mod http;
pub mod ledger;
pub mod pace;
pub mod probe;
mod request;
mod run;
pub mod spec;
mod wire;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use self::http::{Failure, Trouble};
use self::ledger::{Ledger, Seen, Spent};
use self::probe::{Needs, Probe};
use self::request::Sender;
use self::run::Run;
use self::spec::ServerSpec;
use super::engine::Answer;
use super::sampling::Sampling;
use super::teacher::{Asked, Teacher};
use crate::error::{Error, Result};
use crate::report::record::Events;

/// After this long without an answer, the user is told what the problem is.
const SILENCE: Duration = Duration::from_secs(30);

/// A server's client.
pub struct Server<'a> {
    spec: ServerSpec,
    /// Runs the requests; dropping it ends those in flight.
    runtime: tokio::runtime::Runtime,
    sender: Arc<Sender>,
    ledger: Mutex<Option<Ledger>>,
    /// The probe's result or failure, shared by all callers: each would wait just as long for the same outcome.
    probed: OnceLock<Result<Probe, Failure>>,
    /// Held while the server is being probed.
    probing: Mutex<()>,
    events: &'a dyn Events,
}

/// Usage report of a server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Account {
    /// Its URLs.
    pub base_url: Vec<String>,
    /// The server's name for the model.
    pub model: String,
    /// The server's self-description; `None` if no request was sent.
    pub probe: Option<Probe>,
    /// Requests including retries, over all processes of this stage.
    pub requests: u64,
    /// Tokens in prompts and answers.
    pub tokens: u64,
    /// Requests that failed and were retried, in this process.
    pub retries: u64,
}

impl Account {
    /// This process's usage of a server without a ledger, added to the `earlier` ones.
    #[must_use]
    pub fn after(self, earlier: Self) -> Self {
        Self {
            probe: self.probe.or(earlier.probe),
            requests: self.requests + earlier.requests,
            tokens: self.tokens + earlier.tokens,
            retries: self.retries + earlier.retries,
            ..self
        }
    }
}

impl<'a> Server<'a> {
    /// A client of `spec`. Answers are recorded in `ledger`, if given. Sends no request yet.
    ///
    /// # Errors
    /// Invalid settings, a missing key, an unreadable ledger.
    pub fn new(spec: &ServerSpec, ledger: Option<&Path>, events: &'a dyn Events) -> Result<Self> {
        spec.check()?;
        let opened = ledger.map(Ledger::open).transpose()?;
        let (ledger, spent) =
            opened.map_or((None, Spent::default()), |(l, spent)| (Some(l), spent));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("teacher")
            .enable_all()
            .build()
            .map_err(|error| Error::from(error).at("teacher"))?;
        let sender = Arc::new(Sender::new(spec, spent)?);
        Ok(Self {
            spec: spec.clone(),
            runtime,
            sender,
            ledger: Mutex::new(ledger),
            probed: OnceLock::new(),
            probing: Mutex::new(()),
            events,
        })
    }

    /// Probes the server's abilities with a few small requests.
    ///
    /// # Errors
    /// No reachable URL, no such model, a rejected key, or a missing ability that is needed.
    pub fn probe(&self, needs: Needs) -> Result<Probe> {
        self.visited(needs)?.map_err(Error::from)
    }

    /// The probe's result or the server's failure; an error if the user asked to stop.
    fn visited(&self, needs: Needs) -> Result<Result<Probe, Failure>> {
        // Threads queueing for the probe would otherwise each start one before noticing the interrupt.
        self.events.check_interrupt()?;
        let mut heard = Instant::now();
        self.runtime.block_on(async {
            let mut probe = std::pin::pin!(self.sender.probe(&self.spec, needs));
            loop {
                match tokio::time::timeout(run::TICK, &mut probe).await {
                    Ok(found) => return Ok(found),
                    Err(_) => self.events.check_interrupt()?,
                }
                self.say_trouble(&mut heard);
            }
        })
    }

    /// The server's abilities, probed once by the first caller.
    fn probed(&self, needs: Needs) -> Result<&Probe> {
        let _one = self.probing.lock().unwrap_or_else(PoisonError::into_inner);
        let found = if let Some(found) = self.probed.get() {
            found
        } else {
            let found = self.find_out(needs)?;
            self.probed.get_or_init(|| found)
        };
        found.as_ref().map_err(|failure| failure.clone().into())
    }

    /// Probes abilities that no earlier process has observed, stores them, and reports what is missing.
    fn find_out(&self, needs: Needs) -> Result<Result<Probe, Failure>> {
        let model = &self.spec.model;
        let seen = self.ledger().as_ref().map(|ledger| ledger.seen(model)).transpose()?;
        let seen = seen.unwrap_or_default();
        let mut probe = match self.visited(needs.beyond(&seen))? {
            Ok(probe) => probe,
            failed @ Err(_) => return Ok(failed),
        };
        if let Some(failure) = other_model(&seen, &probe) {
            return Ok(Err(failure));
        }
        probe.n = seen.n.or(probe.n);
        probe.json_schema = seen.json_schema.or(probe.json_schema);
        probe.seed = seen.seed.or(probe.seed);
        if let Some(ledger) = self.ledger().as_ref() {
            let Probe { n, json_schema, seed, .. } = probe;
            let answers_as = seen.answers_as.clone().or_else(|| probe.answers_as.clone());
            let now = Seen { model: model.clone(), answers_as, n, json_schema, seed };
            if now != seen {
                ledger.see(&now)?;
            }
        }
        for lack in probe.lacks() {
            self.note(&format!("the server {lack}"));
        }
        if let Some(name) = &probe.answers_as
            && !name.starts_with(model.as_str())
        {
            self.note(&format!("the server's answers name another model: `{name}`"));
        }
        Ok(Ok(probe))
    }

    /// Notifies the user, naming the server: there may be several.
    fn note(&self, text: &str) {
        self.events.note(&format!("{}: {text}", self.spec.model));
    }

    /// Tells the user about the current problem if nothing was `heard` for a while.
    fn say_trouble(&self, heard: &mut Instant) {
        if heard.elapsed() > SILENCE
            && let Some(trouble) = self.sender.take_trouble()
        {
            self.note(&format!("still trying: {trouble}"));
            *heard = Instant::now();
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Option<Ledger>> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server's identity and usage.
    pub fn account(&self) -> Account {
        let spent = self.sender.spent();
        Account {
            base_url: self.spec.base_url.clone(),
            model: self.spec.model.clone(),
            probe: self.probed.get().and_then(|found| found.as_ref().ok()).cloned(),
            requests: spent.requests,
            tokens: spent.tokens,
            retries: self.sender.retries(),
        }
    }
}

/// The failure of a server whose model was exchanged since earlier answers were recorded.
fn other_model(seen: &Seen, probe: &Probe) -> Option<Failure> {
    let (before, now) = (seen.answers_as.as_ref()?, probe.answers_as.as_ref()?);
    (before != now).then(|| Failure {
        hint: Some(format!("serve `{before}` again, or begin in a new run directory")),
        ..Failure::new(
            Trouble::Denied,
            format!("an answer of `{now}`, those recorded so far were of `{before}`"),
        )
    })
}

impl Teacher for Server<'_> {
    fn served_by(&self) -> Option<Account> {
        Some(self.account())
    }

    fn answer(
        &self,
        asked: &[Asked],
        sampling: &Sampling,
        done: &mut dyn FnMut(usize, Vec<Answer>) -> Result<()>,
    ) -> Result<()> {
        if asked.is_empty() {
            return Ok(());
        }
        let needs = Needs {
            n: sampling.num_samples > 1 && self.spec.samples_per_request != 1,
            logprobs: self.spec.logprobs,
            json_schema: asked.iter().any(|asked| asked.schema.is_some()),
            seed: sampling.temperature > 0.0,
            all: false,
        };
        Run::new(self, self.probed(needs)?, asked, sampling).go(done)
    }
}
