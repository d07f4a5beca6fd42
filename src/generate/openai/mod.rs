//! A teacher behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, this program's own.
//!
//! ```text
//! answer()        one thread: makes requests as places free up, records and hands out what comes back  (run)
//!   └ request     a task: waits for a place, sends, tries again after a pause                          (request)
//!       ├ place   the URL with the fewest requests under way, windows that adapt, limits by the minute (endpoints, adaptive, pace)
//!       └ http    one exchange, and what kind of failure it was                                        (http, wire)
//! ```
//!
//! A request's seed comes from (seed, prompt, sample), so that a resumed run asks for the same answers; whether a
//! server repeats itself for a seed is its own affair. What came back is in a ledger before anything else happens
//! to it. Memory does not grow with the number of prompts.

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

use self::http::Failure;
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

/// After this long without any answer the user is told what the trouble is.
const SILENCE: Duration = Duration::from_secs(30);

/// A server's client.
pub struct Server<'a> {
    spec: ServerSpec,
    /// Requests run here; dropped, it ends those under way.
    runtime: tokio::runtime::Runtime,
    sender: Arc<Sender>,
    ledger: Mutex<Option<Ledger>>,
    /// What was found out, or what was in the way: it holds for all who ask, each of whom would wait as long for it.
    probed: OnceLock<Result<Probe, Failure>>,
    /// Held while the server is being probed.
    probing: Mutex<()>,
    events: &'a dyn Events,
}

/// Who answered and what it cost, for people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Account {
    /// Where.
    pub base_url: Vec<String>,
    /// The model's name there.
    pub model: String,
    /// What the server says of itself; nothing where nothing was asked.
    pub probe: Option<Probe>,
    /// Requests, repetitions included, of all processes that worked on this.
    pub requests: u64,
    /// Tokens of prompts and answers.
    pub tokens: u64,
    /// Requests that failed and were tried again, in this process.
    pub retries: u64,
}

impl Account {
    /// This process's account of a server without a ledger, with what `earlier` ones have come to.
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
    /// A client of `spec`. Answers are recorded in `ledger` where one is given. Speaks to nobody yet.
    ///
    /// # Errors
    /// Settings that cannot be acted on, a key that is not there, a ledger that cannot be read.
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

    /// Finds out what the server can do, with a few small requests.
    ///
    /// # Errors
    /// No URL answers, no such model, a key that is not accepted, or something missing that is needed.
    pub fn probe(&self, needs: Needs) -> Result<Probe> {
        self.visited(needs)?.map_err(Error::from)
    }

    /// What the server can do, or what kept it from showing it; an error where the user asked to stop.
    fn visited(&self, needs: Needs) -> Result<Result<Probe, Failure>> {
        // Of many who wait for one another here each would begin before it looks.
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

    /// What the server can do, found out once, whoever asks first.
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

    /// The same, of what no earlier process has seen; keeps it for later ones, and says what is missing.
    fn find_out(&self, needs: Needs) -> Result<Result<Probe, Failure>> {
        let model = &self.spec.model;
        let seen = self.ledger().as_ref().map(|ledger| ledger.seen(model)).transpose()?;
        let seen = seen.unwrap_or_default();
        let mut probe = match self.visited(needs.beyond(&seen))? {
            Ok(probe) => probe,
            failed @ Err(_) => return Ok(failed),
        };
        probe.n = seen.n.or(probe.n);
        probe.json_schema = seen.json_schema.or(probe.json_schema);
        probe.seed = seen.seed.or(probe.seed);
        if let Some(ledger) = self.ledger().as_ref() {
            let Probe { n, json_schema, seed, .. } = probe;
            let now = Seen { model: model.clone(), n, json_schema, seed };
            if now != seen {
                ledger.see(&now)?;
            }
        }
        for lack in probe.lacks() {
            self.note(&format!("the server {lack}"));
        }
        Ok(Ok(probe))
    }

    /// Tells the user something of this server: there may be several.
    fn note(&self, text: &str) {
        self.events.note(&format!("{}: {text}", self.spec.model));
    }

    /// Tells the user what the trouble is, where nothing has been `heard` for long.
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

    /// Who answered and what it cost.
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
