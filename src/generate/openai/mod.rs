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
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use serde::Serialize;

use self::ledger::{Ledger, Spent};
use self::probe::{Needs, Probe};
use self::request::Sender;
use self::run::Run;
use self::spec::ServerSpec;
use super::engine::Answer;
use super::sampling::Sampling;
use super::teacher::{Asked, Teacher};
use crate::error::{Error, Result};
use crate::report::record::Events;

/// A server's client.
pub struct Server<'a> {
    spec: ServerSpec,
    /// Requests run here; dropped, it ends those under way.
    runtime: tokio::runtime::Runtime,
    sender: Arc<Sender>,
    ledger: Mutex<Option<Ledger>>,
    probed: OnceLock<Probe>,
    /// Held while the server is being probed.
    probing: Mutex<()>,
    events: &'a dyn Events,
}

/// Who answered and what it cost, for people.
#[derive(Clone, Debug, PartialEq, Serialize)]
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
        self.runtime.block_on(async {
            let mut probe = std::pin::pin!(self.sender.probe(&self.spec, needs));
            loop {
                match tokio::time::timeout(run::TICK, &mut probe).await {
                    Ok(found) => return found.map_err(Error::from),
                    Err(_) => self.events.check_interrupt()?,
                }
            }
        })
    }

    /// What the server can do, found out once, whoever asks first.
    fn probed(&self, needs: Needs) -> Result<&Probe> {
        let _one = self.probing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(probe) = self.probed.get() {
            return Ok(probe);
        }
        let probe = self.probe(needs)?;
        if probe.seed == Some(false) {
            self.events.note("the server does not repeat an answer for an equal seed");
        }
        if probe.json_schema == Some(false) {
            self.events.note(
                "the server does not hold answers to a JSON schema: they are read as they come",
            );
        }
        Ok(self.probed.get_or_init(|| probe))
    }

    /// Who answered and what it cost.
    pub fn account(&self) -> Account {
        let spent = self.sender.spent();
        Account {
            base_url: self.spec.base_url.clone(),
            model: self.spec.model.clone(),
            probe: self.probed.get().cloned(),
            requests: spent.requests,
            tokens: spent.tokens,
            retries: self.sender.retries(),
        }
    }
}

impl Teacher for Server<'_> {
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
