//! One call of [`Server`]: sends requests as slots free up, records answers, hands out completed prompts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use rand::Rng;
use serde_json::{Map, Value};
use tokio::task::JoinSet;

use super::Server;
use super::http::Trouble;
use super::ledger;
use super::probe::Probe;
use super::request::{Ended, Job, Outcome};
use super::wire;
use crate::error::{Error, Result};
use crate::generate::engine::Answer;
use crate::generate::sampling::Sampling;
use crate::generate::teacher::Asked;
use crate::rng::Stream;

/// How often a waiting run checks for an interrupt.
pub(super) const TICK: Duration = Duration::from_millis(200);

/// Receives a prompt's index and its answers.
type Done<'d> = dyn FnMut(usize, Vec<Answer>) -> Result<()> + 'd;

/// A prompt with missing answers.
struct Open {
    answers: Vec<Option<Answer>>,
    missing: usize,
    /// The server refused it.
    refused: bool,
}

/// State of one call.
pub(super) struct Run<'r, 'a> {
    server: &'r Server<'a>,
    asked: &'r [Asked],
    sampling: &'r Sampling,
    /// Whether the server supports JSON schemas.
    schema: bool,
    /// Answers per request.
    at_once: usize,
    /// The next request: prompt index and first sample.
    next: (usize, usize),
    open: BTreeMap<usize, Open>,
    tasks: JoinSet<()>,
    outcomes: (Sender<Outcome>, Receiver<Outcome>),
    in_flight: usize,
    capacity: usize,
    answered: usize,
    failed: Option<Error>,
    /// Send nothing new.
    stopping: Arc<AtomicBool>,
    /// The caller takes no more answers; those in flight are only recorded.
    deaf: bool,
    /// Whether answers are recorded.
    records: bool,
    heard: Instant,
}

impl<'r, 'a> Run<'r, 'a> {
    pub(super) fn new(
        server: &'r Server<'a>,
        probe: &Probe,
        asked: &'r [Asked],
        sampling: &'r Sampling,
    ) -> Self {
        let spec = &server.spec;
        let at_once = match spec.samples_per_request {
            _ if probe.n == Some(false) => 1,
            0 => sampling.num_samples,
            some => some.min(sampling.num_samples),
        };
        Self {
            server,
            asked,
            sampling,
            schema: probe.json_schema != Some(false),
            at_once,
            next: (0, 0),
            open: BTreeMap::new(),
            tasks: JoinSet::new(),
            outcomes: channel(),
            in_flight: 0,
            capacity: spec.max_concurrency.saturating_mul(spec.base_url.len()),
            answered: 0,
            failed: None,
            stopping: Arc::default(),
            deaf: false,
            records: server.ledger().is_some(),
            heard: Instant::now(),
        }
    }

    /// Answers all prompts. On an error (of a request or of `done`) or an interrupt nothing more is sent, but requests
    /// in flight are awaited and recorded, since they are paid for. Without a ledger, an error of `done` or an
    /// interrupt drops them.
    pub(super) fn go(mut self, done: &mut Done<'_>) -> Result<()> {
        loop {
            self.fill(done)?;
            if self.in_flight == 0 || self.deaf && !self.records {
                break;
            }
            if let Some(outcome) = self.receive()? {
                self.settle(outcome, done)?;
            }
        }
        self.failed.map_or(Ok(()), Err)
    }

    /// Number of answers in the request that starts at sample `first`.
    fn count(&self, first: usize) -> usize {
        self.at_once.min(self.sampling.num_samples - first)
    }

    fn body(&self, asked: &Asked, count: usize) -> Map<String, Value> {
        wire::body(&self.server.spec, asked, self.sampling, count, self.schema)
    }

    /// Builds the next request only now, so that pending prompts use no memory.
    fn next_job(&mut self) -> Option<Job> {
        let (place, first) = self.next;
        let asked = self.asked.get(place)?;
        let count = self.count(first);
        self.next = match first + count {
            end if end >= self.sampling.num_samples => (place + 1, 0),
            end => (place, end),
        };
        let mut body = self.body(asked, count);
        let key = ledger::key(&body);
        let base: u32 = Stream::new(self.sampling.seed, "teacher").at(0, asked.index).random();
        // Below 2^31: servers parse seeds as integers of various widths.
        let seed = u64::from((base >> 1).wrapping_add(first as u32) & 0x7fff_ffff);
        body.insert("seed".to_owned(), Value::from(seed));
        let body = Value::Object(body).to_string().into_bytes();
        // About four bytes per token; used by the rate limit only.
        let tokens = (body.len() / 4 + self.sampling.max_new_tokens * count) as f64;
        Some(Job { place, first, count, key, seed, body, tokens })
    }

    /// Sends requests while there are slots; those in the ledger are answered at once.
    fn fill(&mut self, done: &mut Done<'_>) -> Result<()> {
        while self.failed.is_none() && self.in_flight < self.capacity {
            let Some(job) = self.next_job() else { return Ok(()) };
            let samples = self.sampling.num_samples;
            self.open.entry(job.place).or_insert_with(|| Open {
                answers: vec![None; samples],
                missing: samples,
                refused: false,
            });
            if let Some(answers) = self.recorded(&job)? {
                self.take(&job, Some(answers), done);
                continue;
            }
            let (sender, outcomes) = (self.server.sender.clone(), self.outcomes.0.clone());
            let stopping = Arc::clone(&self.stopping);
            let task = async move {
                let outcome = sender.ask(job, &stopping).await;
                // The receiver is gone if the call ended with an error.
                let _ = outcomes.send(outcome);
            };
            self.tasks.spawn_on(task, self.server.runtime.handle());
            self.in_flight += 1;
        }
        Ok(())
    }

    fn recorded(&self, job: &Job) -> Result<Option<Vec<Answer>>> {
        match self.server.ledger().as_mut() {
            Some(ledger) => ledger.take(&job.key, job.seed),
            None => Ok(None),
        }
    }

    /// The next outcome, or `None` after a timeout.
    fn receive(&mut self) -> Result<Option<Outcome>> {
        while let Some(ended) = self.tasks.try_join_next() {
            ended.map_err(|error| Error::run(format!("a request task panicked: {error}")))?;
        }
        match self.outcomes.1.recv_timeout(TICK) {
            Ok(outcome) => {
                self.in_flight -= 1;
                self.heard = Instant::now();
                Ok(Some(outcome))
            }
            Err(RecvTimeoutError::Disconnected) => Err(Error::run("the requests have ended")),
            Err(RecvTimeoutError::Timeout) => {
                if !self.deaf
                    && let Err(interrupted) = self.server.events.check_interrupt()
                {
                    self.leave(interrupted);
                }
                self.server.say_trouble(&mut self.heard);
                Ok(None)
            }
        }
    }

    /// Records and processes an outcome.
    fn settle(&mut self, outcome: Outcome, done: &mut Done<'_>) -> Result<()> {
        let Outcome { job, used, ended } = outcome;
        match ended {
            Ended::Answered(answers) => {
                if let Some(ledger) = self.server.ledger().as_mut() {
                    ledger.record((&job.key, job.seed), used, &answers)?;
                }
                self.take(&job, Some(answers), done);
            }
            Ended::Failed(failure)
                if failure.trouble == Trouble::Refused && self.server.spec.skip_refused =>
            {
                self.take(&job, None, done);
            }
            Ended::Failed(failure) => {
                let place = &self.asked[job.place].place;
                self.fail(|| Error::from(failure.tried(used.requests)).at(place));
            }
            Ended::OutOfBudget(budget) => {
                let (answered, all) = (self.answered, self.asked.len());
                self.fail(|| {
                    Error::run(format!(
                        "`{budget}` is used up: {answered} of {all} prompts were answered"
                    ))
                    .hint("what was received is kept: raise it and run the same command again")
                });
            }
            Ended::Stopped => {}
        }
        Ok(())
    }

    /// Keeps the first error and stops sending.
    fn fail(&mut self, error: impl FnOnce() -> Error) {
        self.failed.get_or_insert_with(error);
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// As [`fail`](Self::fail), for an error of `done` or an interrupt: the caller takes no more answers.
    fn leave(&mut self, error: Error) {
        self.deaf = true;
        self.fail(|| error);
        if self.records && self.in_flight > 0 {
            let text = format!("{} requests are under way: waiting, to keep them", self.in_flight);
            self.server.note(&text);
        }
    }

    /// Takes a request's answers, or `None` if the server refused the prompt; hands out the prompt once complete.
    fn take(&mut self, job: &Job, answers: Option<Vec<Answer>>, done: &mut Done<'_>) {
        if self.deaf {
            return;
        }
        let Some(open) = self.open.get_mut(&job.place) else { return };
        open.missing -= job.count;
        match answers {
            None => open.refused = true,
            Some(answers) => {
                for (slot, answer) in open.answers[job.first..].iter_mut().zip(answers) {
                    *slot = Some(answer);
                }
            }
        }
        if open.missing > 0 {
            return;
        }
        let Some(open) = self.open.remove(&job.place) else { return };
        let answers = if open.refused {
            Vec::new()
        } else {
            self.answered += 1;
            open.answers.into_iter().flatten().collect()
        };
        if let Err(error) = done(job.place, answers) {
            self.leave(error);
        }
    }
}
