//! Continuous batching with chunked prefill: prompts are read in pieces beside running answers, samples of a prompt
//! share its cache, prompts share common prefixes, and a finished answer's slot goes to the next one.
//!
//! An answer depends on its prompt, its settings and its own random stream, never on other requests: the CPU decoder
//! keeps the row rule, and draws are keyed by (seed, prompt index, sample index). On a GPU the draws are the same, but
//! cuBLAS sums in an order that depends on the number of rows.

mod draft;
mod guess;
mod prefix;
mod reading;
mod request;
mod running;
mod scheduler;

use std::sync::Arc;

pub use draft::Draft;
pub use guess::{Guess, Guesser, Lookup};
pub use request::{
    Answer, Event, Extras, Finish, Likely, Piece, Prompt, PromptScores, Request, Ticket,
};
pub use scheduler::Scheduler;

use super::sampling::Sampling;
use crate::error::{Context, Result};

/// Batch limits. They change speed and memory, but on the CPU never an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most answers decoded at once.
    pub max_batch: usize,
    /// Most prompt tokens read in one forward pass.
    pub max_prefill: usize,
    /// Most tokens in all caches of this model together, in whole pages of
    /// [`Decoder::page`](super::decode::Decoder::page); excludes a draft model's. One request is always admitted.
    pub cache_tokens: usize,
    /// The model's maximum positions.
    pub max_positions: usize,
    /// Keep caches of answered prompts for later prompts while there is room. If false, a cache is kept only if the
    /// first waiting prompt shares its prefix.
    pub keep_prefixes: bool,
}

/// Tokenizer functions needed during generation.
pub trait Vocabulary: Sync {
    /// Decodes tokens, without special tokens.
    fn text(&self, ids: &[u32]) -> String;
    /// Tokens that end an answer.
    fn ends(&self) -> &[u32];
}

/// A [`Scheduler`] over any decoder.
pub trait Schedule {
    /// Queues a request. Tickets count from 0.
    ///
    /// # Errors
    /// A request this model can never answer.
    fn submit(&mut self, request: Request) -> Result<Ticket>;

    /// Drops a request in any state. It produces no further events.
    fn cancel(&mut self, ticket: Ticket);

    /// One forward pass: a chunk of prefill and the next token of every answer. False if there is nothing left to do.
    ///
    /// # Errors
    /// Device errors and those of `on`. Errors of a single request are reported as [`Event::Failed`].
    fn step(&mut self, on: &mut dyn FnMut(Event) -> Result<()>) -> Result<bool>;

    /// Number of requests not yet read, and of answers in progress.
    fn load(&self) -> (usize, usize);

    /// Tokens in all caches, including reserved ones.
    fn cached_tokens(&self) -> usize;

    /// Lets caches go that were kept for prompts of adapters that nobody has any more. The end of every request does so
    /// too, since it may have been the last with its adapter; whoever drops an adapter elsewhere has to call this.
    fn tidy(&mut self);
}

/// Samples `sampling.num_samples` answers to each prompt on an idle scheduler. `done` is called with a prompt's index
/// and its answers, in sample order, as soon as all are finished; an error from it ends the call.
///
/// # Errors
/// Invalid sampling settings; an empty prompt, or one that leaves no position for an answer.
pub fn answer_all(
    scheduler: &mut dyn Schedule,
    prompts: &[Prompt],
    sampling: &Sampling,
    done: &mut dyn FnMut(usize, Vec<Answer>) -> Result<()>,
) -> Result<()> {
    sampling.check()?;
    let sampling = Arc::new(sampling.clone());
    let requests = prompts.iter().map(|prompt| Request::new(prompt.clone(), Arc::clone(&sampling)));
    answer_requests(scheduler, requests, done)
}

/// Answers all requests on an idle scheduler. `done` is called with a request's index and its answers.
///
/// # Errors
/// The first error of a request.
pub fn answer_requests(
    scheduler: &mut dyn Schedule,
    requests: impl Iterator<Item = Request>,
    done: &mut dyn FnMut(usize, Vec<Answer>) -> Result<()>,
) -> Result<()> {
    let mut first = None;
    for (place, request) in requests.enumerate() {
        let Ticket(ticket) = scheduler.submit(request).at(format_args!("prompt {place}"))?;
        first.get_or_insert(ticket);
    }
    // Tickets are numbered consecutively.
    let first = first.unwrap_or(0);
    let mut on = |event| match event {
        Event::Done(ticket, answers, _) => done((ticket.0 - first) as usize, answers),
        Event::Failed(_, error) => Err(error),
        Event::Piece(..) => Ok(()),
    };
    while scheduler.step(&mut on)? {}
    Ok(())
}
