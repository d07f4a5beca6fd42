//! A prompt during prefill.

use std::sync::Arc;

use super::prefix::{Held, Share};
use super::{PromptScores, Request, Ticket};
use crate::error::Result;
use crate::generate::decode::Wanted;
use crate::generate::sampler;

/// Most prompt tokens per forward pass when every position is scored: each needs a row of `V` logits.
pub(super) const SCORED: usize = 64;

/// A prompt being prefilled.
pub(super) struct Reading<C> {
    pub(super) ticket: Ticket,
    pub(super) request: Arc<Request>,
    pub(super) cache: C,
    pub(super) parent: Option<Arc<Held<C>>>,
    pub(super) share: Share,
    /// Tokens already read.
    pub(super) done: usize,
    /// Tokens read by the next forward pass.
    pub(super) now: usize,
    pub(super) scores: PromptScores,
}

impl<C> Reading<C> {
    /// Chooses how many tokens to read now: at most `most`, and at most `scored` if every position is scored.
    pub(super) fn plan(&mut self, most: usize, scored: &mut usize) -> usize {
        self.now = self.left().min(most);
        if self.request.extras.prompt_logprobs {
            self.now = self.now.min(*scored);
            *scored -= self.now;
        }
        self.now
    }

    /// Tokens not yet read.
    pub(super) fn left(&self) -> usize {
        self.request.prompt.tokens.len() - self.done
    }

    /// Which predictions the next forward pass must return.
    pub(super) fn wanted(&self) -> Wanted<'static> {
        match self.request.extras.prompt_logprobs {
            true => Wanted::All,
            false if self.now < self.left() => Wanted::Nothing,
            false => Wanted::Last,
        }
    }

    /// Scores the prompt's next token with its logits.
    pub(super) fn score(&mut self, logits: &[f32]) -> Result<()> {
        let Request { prompt, extras, .. } = &*self.request;
        let place = self.scores.logprobs.len() + 1;
        if let (true, Some(&next)) = (extras.prompt_logprobs, prompt.tokens.get(place)) {
            let (logprob, top) = sampler::scores(logits, next, extras.top_logprobs)?;
            self.scores.logprobs.push(logprob);
            if extras.top_logprobs > 0 {
                self.scores.top_logprobs.push(top);
            }
        }
        Ok(())
    }
}
