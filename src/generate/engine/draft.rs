//! Speculative decoding with a small draft model (Leviathan et al., 2023) that samples with the target model's random
//! numbers.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::prefix::common;
use super::{Guess, Guesser};
use crate::error::Result;
use crate::generate::decode::{Decoder, Feed, Predictions, Wanted};
use crate::generate::sampler::Sampler;

/// Most prompt tokens read at once.
const PREFILL: usize = 512;

/// Drafts with a decoder of the same vocabulary.
pub struct Draft<'a, D: Decoder> {
    decoder: &'a D,
    max_positions: usize,
    /// Prompt caches by ticket.
    prompts: BTreeMap<u64, Arc<D::Cache>>,
    answers: BTreeMap<(u64, usize), State<D::Cache>>,
    predictions: Predictions,
}

/// Draft state of one answer.
struct State<C> {
    cache: C,
    /// Answer tokens in the cache, including drafted ones.
    read: Vec<u32>,
    sampler: Sampler,
}

/// One answer's state within a call.
struct Turn {
    asked: usize,
    /// Tokens to read next.
    feed: Vec<u32>,
}

impl<'a, D: Decoder> Draft<'a, D> {
    /// A drafter without any answers.
    pub fn new(decoder: &'a D, max_positions: usize) -> Self {
        Self {
            decoder,
            max_positions,
            prompts: BTreeMap::new(),
            answers: BTreeMap::new(),
            predictions: Predictions::default(),
        }
    }

    /// The cache of a request's prompt; prefilled on its first answer.
    fn prompt(&mut self, ticket: u64, tokens: &[u32]) -> Result<Arc<D::Cache>> {
        if let Some(cache) = self.prompts.get(&ticket) {
            return Ok(Arc::clone(cache));
        }
        let mut cache = self.decoder.cache(None);
        for tokens in tokens.chunks(PREFILL) {
            let feed =
                Feed { cache: &mut cache, tokens, wanted: Wanted::Nothing, adaptation: None };
            self.decoder.forward(&mut [feed], &mut self.predictions)?;
        }
        let cache = Arc::new(cache);
        self.prompts.insert(ticket, Arc::clone(&cache));
        Ok(cache)
    }

    /// Rolls an answer's cache back to the tokens actually sampled, and collects the unread ones.
    fn catch_up(&mut self, index: usize, asked: &Guess<'_>) -> Result<Turn> {
        let prompt = &asked.request.prompt.tokens;
        if !self.answers.contains_key(&asked.key) {
            let parent = self.prompt(asked.key.0, prompt)?;
            let state = State {
                cache: self.decoder.cache(Some((parent, prompt.len()))),
                read: Vec::new(),
                sampler: Sampler::new(&asked.request.sampling, &asked.request.extras),
            };
            self.answers.insert(asked.key, state);
        }
        let mut feed = Vec::new();
        if let Some(state) = self.answers.get_mut(&asked.key) {
            let known = common(&state.read, asked.ids).min(asked.ids.len() - 1);
            state.read.truncate(known);
            self.decoder.truncate(&mut state.cache, prompt.len() + known)?;
            feed.extend_from_slice(&asked.ids[known..]);
        }
        Ok(Turn { asked: index, feed })
    }

    /// Reads each answer's unread tokens; returns the predictions after the last ones.
    fn read(&mut self, turns: &mut [Turn], asked: &[Guess<'_>]) -> Result<Predictions> {
        // In key order, as the answers arrive.
        turns.sort_by_key(|turn| asked[turn.asked].key);
        let mut feeds = Vec::with_capacity(turns.len());
        let mut states = self.answers.iter_mut();
        for turn in &*turns {
            let key = asked[turn.asked].key;
            if let Some((_, state)) = states.by_ref().find(|(other, _)| **other == key) {
                state.read.extend_from_slice(&turn.feed);
                feeds.push(Feed {
                    cache: &mut state.cache,
                    tokens: &turn.feed,
                    wanted: Wanted::Last,
                    adaptation: None,
                });
            }
        }
        let mut predictions = std::mem::take(&mut self.predictions);
        self.decoder.forward(&mut feeds, &mut predictions)?;
        Ok(predictions)
    }
}

impl<D: Decoder> Guesser for Draft<'_, D> {
    fn guess(&mut self, asked: &mut [Guess<'_>]) -> Result<()> {
        let mut turns = Vec::new();
        for (index, one) in asked.iter().enumerate() {
            let len = one.request.prompt.tokens.len() + one.ids.len() + one.most;
            if one.most > 0 && len < self.max_positions {
                turns.push(self.catch_up(index, one)?);
            }
        }
        while !turns.is_empty() {
            let mut predictions = self.read(&mut turns, asked)?;
            let rows = predictions.logits.chunks_exact_mut(self.decoder.vocab_size());
            for (turn, logits) in turns.iter_mut().zip(rows) {
                let one = &mut asked[turn.asked];
                let Some(state) = self.answers.get_mut(&one.key) else { continue };
                let mut history = Vec::new();
                if state.sampler.looks_back() {
                    history.extend_from_slice(&one.request.prompt.tokens);
                    history.extend_from_slice(one.ids);
                    history.extend_from_slice(one.guess);
                }
                let answer = one.request.prompt.tokens.len();
                turn.feed.clear();
                // A draft with non-finite logits stops guessing; the answer does not depend on it.
                if let Ok(draw) = state.sampler.draw(logits, (&history, answer), None, &mut one.rng)
                {
                    one.guess.push(draw.id);
                    turn.feed.push(draw.id);
                }
            }
            turns.retain(|turn| {
                let one = &asked[turn.asked];
                !turn.feed.is_empty() && one.guess.len() < one.most
            });
            self.predictions = predictions;
        }
        Ok(())
    }

    fn forget(&mut self, key: (u64, usize)) {
        self.answers.remove(&key);
        if self.answers.range((key.0, 0)..=(key.0, usize::MAX)).next().is_none() {
            self.prompts.remove(&key.0);
        }
    }
}
