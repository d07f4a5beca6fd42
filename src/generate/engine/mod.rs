//! Continuous batching: prompts are read in pieces beside the answers that are written, samples of a prompt share its
//! cache, prompts that begin alike share what they have in common, and a finished answer's place goes to the next one.
//!
//! An answer depends on its prompt, its settings and its own random stream, never on its neighbours: the CPU decoder
//! keeps the row rule and draws are keyed by (seed, prompt index, sample index). On a GPU the draws are the same, but
//! cuBLAS adds in an order that depends on the number of rows.

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

/// What bounds a batch. Changes speed and memory, and on the CPU never an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most answers under way at once.
    pub max_batch: usize,
    /// Most prompt tokens read in one forward pass.
    pub max_prefill: usize,
    /// Most tokens in all caches of this model together, counted in whole pages of [`Decoder::page`](super::decode::Decoder::page);
    /// a draft model's are its own. One answer is always let in.
    pub cache_tokens: usize,
    /// The model's positions.
    pub max_positions: usize,
    /// Whether caches of answered prompts are kept for prompts that come later, as long as there is room. Where not, a
    /// cache is kept that way only if the prompt that waits first begins like it.
    pub keep_prefixes: bool,
}

/// What generation needs to know of the text behind the tokens.
pub trait Vocabulary: Sync {
    /// Tokens to text, special tokens left out.
    fn text(&self, ids: &[u32]) -> String;
    /// Tokens that end an answer.
    fn ends(&self) -> &[u32];
}

/// A [`Scheduler`] of any decoder.
pub trait Schedule {
    /// Takes a request. Tickets count from 0.
    ///
    /// # Errors
    /// A request that this model can never answer.
    fn submit(&mut self, request: Request) -> Result<Ticket>;

    /// Forgets a request, wherever it stands. Nothing more is reported of it.
    fn cancel(&mut self, ticket: Ticket);

    /// One forward pass: a piece of the prompts that are read, and the next token of every answer. False where nothing
    /// is left to do.
    ///
    /// # Errors
    /// The device's, and those of `on`. What is wrong with one request alone is reported as [`Event::Failed`].
    fn step(&mut self, on: &mut dyn FnMut(Event) -> Result<()>) -> Result<bool>;

    /// How many requests wait to be read, and how many answers are under way.
    fn load(&self) -> (usize, usize);

    /// Tokens in all caches, and promised to them.
    fn cached_tokens(&self) -> usize;
}

/// Has an idle scheduler draw `sampling.num_samples` answers to each prompt. `done` is called with a prompt's place in the
/// list and its answers, in the order of the samples, as soon as they are all there; an error from it ends the call.
///
/// # Errors
/// Settings that no distribution has; a prompt that is empty or leaves no position for an answer.
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

/// Has an idle scheduler answer all requests. `done` is called with a request's place and its answers.
///
/// # Errors
/// The first request's that cannot be answered.
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
    // Tickets are numbered as they are given.
    let first = first.unwrap_or(0);
    let mut on = |event| match event {
        Event::Done(ticket, answers, _) => done((ticket.0 - first) as usize, answers),
        Event::Failed(_, error) => Err(error),
        Event::Piece(..) => Ok(()),
    };
    while scheduler.step(&mut on)? {}
    Ok(())
}
