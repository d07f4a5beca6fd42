//! One call of [`Server`]: makes requests as places free up, records what comes back, hands out whole prompts.

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

/// How often a run that waits looks whether it is still wanted.
pub(super) const TICK: Duration = Duration::from_millis(200);

/// Takes a prompt's place and its answers.
type Done<'d> = dyn FnMut(usize, Vec<Answer>) -> Result<()> + 'd;

/// A prompt whose answers are not all there.
struct Open {
    answers: Vec<Option<Answer>>,
    missing: usize,
    /// The server refused it.
    refused: bool,
}

/// The state of one call.
pub(super) struct Run<'r, 'a> {
    server: &'r Server<'a>,
    asked: &'r [Asked],
    sampling: &'r Sampling,
    /// Whether answers can be held to a schema.
    schema: bool,
    /// Answers a request.
    at_once: usize,
    /// The next request: its prompt's place and its first sample.
    next: (usize, usize),
    open: BTreeMap<usize, Open>,
    tasks: JoinSet<()>,
    outcomes: (Sender<Outcome>, Receiver<Outcome>),
    in_flight: usize,
    capacity: usize,
    answered: usize,
    failed: Option<Error>,
    /// Nothing new is to be sent.
    stopping: Arc<AtomicBool>,
    /// Nobody takes answers any more; those under way are only recorded.
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

    /// Answers everything. On an error, of a request or of `done`, and on an interrupt nothing more is sent, but what is
    /// under way is waited for and recorded: it is paid for. Without a ledger nobody would have anything of it.
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

    /// How many answers the request that begins with sample `first` asks for.
    fn count(&self, first: usize) -> usize {
        self.at_once.min(self.sampling.num_samples - first)
    }

    fn body(&self, asked: &Asked, count: usize) -> Map<String, Value> {
        wire::body(&self.server.spec, asked, self.sampling, count, self.schema)
    }

    /// The next request, made only now: however many prompts there are, those that wait cost nothing.
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
        // Below 2^31: servers read seeds as integers of various widths.
        let seed = u64::from((base >> 1).wrapping_add(first as u32) & 0x7fff_ffff);
        body.insert("seed".to_owned(), Value::from(seed));
        let body = Value::Object(body).to_string().into_bytes();
        // About four bytes a token, for the limit by the minute only.
        let tokens = (body.len() / 4 + self.sampling.max_new_tokens * count) as f64;
        Some(Job { place, first, count, key, seed, body, tokens })
    }

    /// Sends requests while there is room; those of the ledger are answered at once.
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
                // Nobody listens any more where the call has ended with an error.
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

    /// The next outcome, or none after a while without one.
    fn receive(&mut self) -> Result<Option<Outcome>> {
        while let Some(ended) = self.tasks.try_join_next() {
            ended.map_err(|error| Error::run(format!("a request broke off: {error}")))?;
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

    /// Records an outcome and acts on it.
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

    /// Keeps the first error and sends nothing more.
    fn fail(&mut self, error: impl FnOnce() -> Error) {
        self.failed.get_or_insert_with(error);
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// The same for an error of whoever takes the answers, or an interrupt: they take no more.
    fn leave(&mut self, error: Error) {
        self.deaf = true;
        self.fail(|| error);
        if self.records && self.in_flight > 0 {
            let text = format!("{} requests are under way: waiting, to keep them", self.in_flight);
            self.server.note(&text);
        }
    }

    /// Takes a request's answers, or none where the server refused the prompt, and hands out the prompt once whole.
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
