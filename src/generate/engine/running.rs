//! An answer being decoded.

use std::sync::Arc;

use llguidance::toktrie::SimpleVob;
use rand_chacha::ChaCha8Rng;
use serde_json::Map;

use super::prefix::{Held, Share};
use super::{Answer, Finish, Likely, Piece, Request, Ticket, Vocabulary};
use crate::error::Result;
use crate::generate::decode::{Feed, Wanted};
use crate::generate::grammar::Matcher;
use crate::generate::sampler::{Draw, Sampler};
use crate::generate::stop::{Shown, StopStrings};
use crate::ops::sample::Chance;

/// Identifies the answer, and holds what it needs from its request.
pub(super) struct Task<C> {
    pub(super) ticket: Ticket,
    pub(super) sample: usize,
    pub(super) request: Arc<Request>,
    pub(super) stops: Arc<StopStrings>,
    pub(super) cache: C,
    pub(super) held: Arc<Held<C>>,
    pub(super) share: Share,
    pub(super) rng: ChaCha8Rng,
    /// Most tokens in this answer.
    pub(super) room: usize,
}

pub(super) struct Running<C> {
    pub(super) task: Task<C>,
    sampler: Sampler,
    matcher: Option<Matcher>,
    /// Tokens that penalties apply to: prompt and answer; empty without penalties.
    history: Vec<u32>,
    pub(super) ids: Vec<u32>,
    logprobs: Vec<f32>,
    sample_logprobs: Vec<f32>,
    top_logprobs: Vec<Vec<Likely>>,
    /// Speculative tokens, read together with the last token.
    pub(super) guess: Vec<u32>,
    /// Input of the next forward pass: the last token and the guess.
    pub(super) feed: Vec<u32>,
    /// The next draw, if the decoder samples it.
    chance: Option<Chance>,
    /// Tokens the grammar allows for that draw.
    allowed: Option<SimpleVob>,
    shown: Shown,
    pub(super) ended: Option<(Finish, String)>,
}

impl<C> Running<C> {
    pub(super) fn new(task: Task<C>) -> Self {
        let Request { prompt, sampling, extras } = &*task.request;
        let sampler = Sampler::new(sampling, extras);
        let matcher = extras.grammar.as_ref().map(|grammar| grammar.start());
        let history = if sampler.looks_back() { prompt.tokens.clone() } else { Vec::new() };
        Self {
            task,
            sampler,
            matcher,
            history,
            ids: Vec::new(),
            logprobs: Vec::new(),
            sample_logprobs: Vec::new(),
            top_logprobs: Vec::new(),
            guess: Vec::new(),
            feed: Vec::new(),
            chance: None,
            allowed: None,
            shown: Shown::default(),
            ended: None,
        }
    }

    /// Chooses the next forward pass's input, and whether a decoder that `draws` samples the next token: only without a
    /// pending guess, and if the draw depends on nothing but the settings and a grammar.
    pub(super) fn prepare(&mut self, draws: bool) {
        self.feed.clear();
        self.feed.extend(self.ids.last());
        self.feed.extend_from_slice(&self.guess);
        let may = draws && self.guess.is_empty();
        self.chance = may.then(|| self.sampler.chance(&self.task.rng)).flatten();
        self.allowed = None;
        if let (Some(_), Some(matcher)) = (self.chance, &mut self.matcher) {
            match matcher.allowed() {
                Ok(allowed) => self.allowed = Some(allowed),
                // The draw on the host reports the error.
                Err(_) => self.chance = None,
            }
        }
    }

    /// The next forward pass's feed for this answer's cache.
    pub(super) fn next(&mut self) -> Feed<'_, C> {
        let wanted = match self.chance {
            Some(chance) => Wanted::Token(chance, self.allowed.as_ref()),
            None => Wanted::All,
        };
        Feed {
            cache: &mut self.task.cache,
            tokens: &self.feed,
            wanted,
            adaptation: self.task.request.adaptation(),
        }
    }

    /// Whether the decoder samples the next token.
    pub(super) fn is_drawn_there(&self) -> bool {
        self.chance.is_some()
    }

    /// Accepts a token the decoder sampled.
    ///
    /// # Errors
    /// A grammar error.
    pub(super) fn take_drawn(&mut self, draw: Draw, vocabulary: &dyn Vocabulary) -> Result<()> {
        self.sampler.skip(&mut self.task.rng);
        self.take(draw, vocabulary)
    }

    /// Rows of logits that the next forward pass returns for it.
    pub(super) fn rows(&self) -> usize {
        if self.is_drawn_there() { 0 } else { self.feed.len() }
    }

    /// Samples after the last token and after each guessed one while the guesses hold, so the tokens are those that
    /// would be sampled without speculation. Returns the number of sampled tokens.
    ///
    /// # Errors
    /// Non-finite logits; a grammar error.
    pub(super) fn draw_all(
        &mut self,
        logits: &mut [f32],
        vocab: usize,
        vocabulary: &dyn Vocabulary,
    ) -> Result<usize> {
        let mut drawn = 0;
        for (place, logits) in logits.chunks_exact_mut(vocab).enumerate() {
            let id = self.draw(logits, vocabulary)?;
            drawn += 1;
            if self.ended.is_some() || self.guess.get(place) != Some(&id) {
                break;
            }
        }
        Ok(drawn)
    }

    /// Samples one token.
    pub(super) fn draw(&mut self, logits: &mut [f32], vocabulary: &dyn Vocabulary) -> Result<u32> {
        let allowed = self.matcher.as_mut().map(Matcher::allowed).transpose()?;
        let answer = self.task.request.prompt.tokens.len();
        let draw = self.sampler.draw(
            logits,
            (&self.history, answer),
            allowed.as_ref(),
            &mut self.task.rng,
        )?;
        let id = draw.id;
        self.take(draw, vocabulary)?;
        Ok(id)
    }

    fn take(&mut self, draw: Draw, vocabulary: &dyn Vocabulary) -> Result<()> {
        let Draw { id, logprob, sample_logprob, top } = draw;
        self.ids.push(id);
        self.logprobs.push(logprob);
        self.sample_logprobs.push(sample_logprob);
        if self.task.request.extras.top_logprobs > 0 {
            self.top_logprobs.push(top);
        }
        if self.sampler.looks_back() {
            self.history.push(id);
        }
        if let Some(matcher) = &mut self.matcher {
            matcher.take(id)?;
        }
        self.ended = self.end(vocabulary);
        Ok(())
    }

    /// Whether the answer ends at its newest token, and its text if so.
    fn end(&self, vocabulary: &dyn Vocabulary) -> Option<(Finish, String)> {
        let (last, before) = self.ids.split_last()?;
        let own = &self.task.request.extras.stop_token_ids;
        if vocabulary.ends().contains(last) || own.contains(last) {
            return Some((Finish::Stop, vocabulary.text(before)));
        }
        if let Some(text) = self.task.stops.cut(vocabulary, &self.ids) {
            return Some((Finish::Stop, text));
        }
        if self.matcher.as_ref().is_some_and(Matcher::is_done) {
            return Some((Finish::Stop, vocabulary.text(&self.ids)));
        }
        (self.ids.len() >= self.task.room).then(|| (Finish::Length, vocabulary.text(&self.ids)))
    }

    /// The output that became final since the last piece, if the answer is streamed.
    pub(super) fn piece(&mut self, drawn: usize, vocabulary: &dyn Vocabulary) -> Option<Piece> {
        if !self.task.request.extras.stream {
            return None;
        }
        let text = match &self.ended {
            Some((_, whole)) => self.shown.rest(whole),
            None => self.shown.more(vocabulary, &self.ids, &self.task.stops),
        };
        let first = self.ids.len() - drawn;
        Some(Piece {
            sample: self.task.sample,
            text,
            ids: self.ids[first..].to_vec(),
            logprobs: self.logprobs[first..].to_vec(),
            top_logprobs: self.top_logprobs.get(first..).unwrap_or_default().to_vec(),
            finish: self.ended.as_ref().map(|(finish, _)| *finish),
        })
    }

    /// The finished answer.
    pub(super) fn answer(&mut self, finish: Finish, text: String) -> Answer {
        Answer {
            text,
            tokens: self.ids.len(),
            ids: std::mem::take(&mut self.ids),
            logprobs: std::mem::take(&mut self.logprobs),
            sample_logprobs: std::mem::take(&mut self.sample_logprobs),
            top_logprobs: std::mem::take(&mut self.top_logprobs),
            finish,
            fields: Map::new(),
        }
    }
}
