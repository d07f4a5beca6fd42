//! Batched generation: prompts are read several at once, samples of a prompt share its cache, and a finished
//! answer's place in the batch goes to the next one.
//!
//! An answer depends on its prompt, its settings and its own random stream, never on its neighbours: the CPU decoder
//! keeps the row rule and draws are keyed by (seed, prompt index, sample index).

use std::collections::VecDeque;
use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::decode::{Decoder, Feed};
use super::sampler::{Draw, Sampler};
use super::sampling::Sampling;
use super::stop::StopStrings;
use crate::error::{Error, Result};
use crate::rng::Stream;

/// A prompt to answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Keys the draws: the row's index in its dataset, so that a resumed run draws the same answers.
    pub index: u64,
    /// Token ids, at least one.
    pub tokens: Vec<u32>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// An end-of-turn token or a stop string.
    Stop,
    /// `max_new_tokens`, or the model's last position.
    Length,
    /// A server's filter withheld the answer or the rest of it.
    Filtered,
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The text, without end-of-turn token and stop string.
    pub text: String,
    /// Every token drawn, the end-of-turn token included; empty where a server did not say them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<u32>,
    /// Log-probability of each under the model alone, in nats; empty where a server did not say them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<f32>,
    /// Log-probability of each under the distribution it was drawn from, in nats; servers do not say them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sample_logprobs: Vec<f32>,
    /// How many tokens were drawn. A server that only counts the tokens of several answers together has each
    /// answer take an equal share.
    pub tokens: usize,
    /// Why it ended.
    pub finish: Finish,
    /// Further fields of the message, as a server gave them: `tool_calls`, `reasoning_content`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub fields: Map<String, Value>,
}

impl Answer {
    /// Log-probability of the whole answer under the model alone, in nats; 0 where it is not known.
    pub fn logprob_sum(&self) -> f64 {
        self.logprobs.iter().map(|&logprob| f64::from(logprob)).sum()
    }
}

/// What bounds a batch. Changes speed and memory, never an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most answers under way at once.
    pub max_batch: usize,
    /// Most prompt tokens read in one forward pass.
    pub max_prefill: usize,
    /// Most tokens in all caches together. One answer is always let in.
    pub cache_tokens: usize,
    /// The model's positions.
    pub max_positions: usize,
}

/// What generation needs to know of the text behind the tokens.
pub trait Vocabulary: Sync {
    /// Tokens to text, special tokens left out.
    fn text(&self, ids: &[u32]) -> String;
    /// Tokens that end an answer.
    fn ends(&self) -> &[u32];
}

/// Generates with one model.
pub struct Engine<'a, D: Decoder> {
    /// The model.
    pub decoder: &'a D,
    /// Its tokens.
    pub vocabulary: &'a dyn Vocabulary,
    /// Batch bounds.
    pub limits: Limits,
}

/// A prompt that was read and whose answers are not all there yet.
struct Open<C> {
    cache: Arc<C>,
    /// The prediction after the prompt: every sample starts from it.
    logits: Vec<f32>,
    started: usize,
    answers: Vec<Option<Answer>>,
}

/// An answer under way.
struct Running<C> {
    prompt: usize,
    sample: usize,
    cache: C,
    rng: ChaCha8Rng,
    sampler: Sampler,
    /// What the repetition penalty looks back on; empty where there is none.
    history: Vec<u32>,
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    sample_logprobs: Vec<f32>,
    /// Most tokens of this answer.
    room: usize,
}

impl<C> Running<C> {
    fn take(&mut self, draw: Draw) {
        self.ids.push(draw.id);
        self.logprobs.push(draw.logprob);
        self.sample_logprobs.push(draw.sample_logprob);
        if !self.history.is_empty() {
            self.history.push(draw.id);
        }
    }
}

/// One call's state.
struct Run<'a, 'b, D: Decoder> {
    engine: &'b Engine<'a, D>,
    prompts: &'b [Prompt],
    sampling: &'b Sampling,
    stops: StopStrings,
    stream: Stream,
    /// The next prompt to read.
    next: usize,
    /// Prompts by index, `None` before they are read and after they are done.
    open: Vec<Option<Open<D::Cache>>>,
    /// Prompts with samples to start.
    waiting: VecDeque<usize>,
    running: Vec<Running<D::Cache>>,
    /// Tokens promised to caches.
    reserved: usize,
    done: &'b mut dyn FnMut(usize, Vec<Answer>) -> Result<()>,
}

impl<D: Decoder> Engine<'_, D> {
    /// Draws `sampling.num_samples` answers to each prompt. `done` is called with a prompt's place in the list and
    /// its answers, in the order of the samples, as soon as they are all there; an error from it ends the call.
    ///
    /// # Errors
    /// Settings that no distribution has; a prompt that is empty or leaves no position for an answer.
    pub fn run(
        &self,
        prompts: &[Prompt],
        sampling: &Sampling,
        done: &mut dyn FnMut(usize, Vec<Answer>) -> Result<()>,
    ) -> Result<()> {
        sampling.check()?;
        let limit = self.limits.max_positions;
        for (place, prompt) in prompts.iter().enumerate() {
            let len = prompt.tokens.len();
            if len == 0 || len >= limit {
                return Err(Error::run(format!(
                    "{len} tokens, expected 1 to {} so that the model's {limit} positions hold an answer",
                    limit - 1
                ))
                .at(format_args!("prompt {place}")));
            }
        }
        let mut run = Run {
            engine: self,
            prompts,
            sampling,
            stops: StopStrings::new(&sampling.stop),
            stream: Stream::new(sampling.seed, "generate"),
            next: 0,
            open: prompts.iter().map(|_| None).collect(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            reserved: 0,
            done,
        };
        let mut logits = Vec::new();
        loop {
            run.admit(&mut logits)?;
            if run.running.is_empty() {
                return Ok(());
            }
            run.step(&mut logits)?;
        }
    }

    /// All answers at once, prompt by prompt.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn answers(&self, prompts: &[Prompt], sampling: &Sampling) -> Result<Vec<Vec<Answer>>> {
        let mut all = vec![Vec::new(); prompts.len()];
        self.run(prompts, sampling, &mut |place, answers| {
            all[place] = answers;
            Ok(())
        })?;
        Ok(all)
    }
}

impl<D: Decoder> Run<'_, '_, D> {
    /// Fills the batch: starts samples of prompts that were read, and reads more prompts when those run out.
    fn admit(&mut self, logits: &mut Vec<f32>) -> Result<()> {
        loop {
            while let Some(&prompt) = self.waiting.front() {
                if !self.has_room(self.answer_room(prompt)) {
                    return Ok(());
                }
                self.start(prompt)?;
            }
            if self.next == self.prompts.len()
                || !self
                    .has_room(self.prompts[self.next].tokens.len() + self.answer_room(self.next))
            {
                return Ok(());
            }
            self.prefill(logits)?;
        }
    }

    fn has_room(&self, tokens: usize) -> bool {
        let limits = &self.engine.limits;
        self.running.is_empty()
            || (self.running.len() < limits.max_batch.max(1)
                && self.reserved + tokens <= limits.cache_tokens)
    }

    fn answer_room(&self, prompt: usize) -> usize {
        let left = self.engine.limits.max_positions - self.prompts[prompt].tokens.len();
        self.sampling.max_new_tokens.min(left)
    }

    /// Reads the next prompts in one forward pass, or one long prompt in several.
    fn prefill(&mut self, logits: &mut Vec<f32>) -> Result<()> {
        let limits = &self.engine.limits;
        let decoder = self.engine.decoder;
        let places = limits.max_batch.max(1) - self.running.len().min(limits.max_batch.max(1) - 1);
        let most = places.div_ceil(self.sampling.num_samples);
        let (mut end, mut tokens, mut reserved) = (self.next, 0, self.reserved);
        while end < self.prompts.len() && end - self.next < most {
            let len = self.prompts[end].tokens.len();
            let reserve = len + self.answer_room(end);
            let fits =
                tokens + len <= limits.max_prefill && reserved + reserve <= limits.cache_tokens;
            if end > self.next && !fits {
                break;
            }
            (end, tokens, reserved) = (end + 1, tokens + len, reserved + reserve);
        }
        let range = self.next..end;
        let mut caches: Vec<D::Cache> = range.clone().map(|_| decoder.cache(None)).collect();
        if range.len() == 1 {
            for tokens in self.prompts[self.next].tokens.chunks(limits.max_prefill.max(1)) {
                decoder.forward(&mut [Feed { cache: &mut caches[0], tokens }], logits)?;
            }
        } else {
            let mut feeds: Vec<Feed<'_, D::Cache>> = caches
                .iter_mut()
                .zip(&self.prompts[range.clone()])
                .map(|(cache, prompt)| Feed { cache, tokens: &prompt.tokens })
                .collect();
            decoder.forward(&mut feeds, logits)?;
        }
        let rows = logits.chunks_exact(decoder.vocab_size());
        for ((prompt, cache), logits) in range.clone().zip(caches).zip(rows) {
            self.reserved += self.prompts[prompt].tokens.len();
            self.open[prompt] = Some(Open {
                cache: Arc::new(cache),
                logits: logits.to_vec(),
                started: 0,
                answers: vec![None; self.sampling.num_samples],
            });
        }
        self.waiting.extend(range.clone());
        self.next = range.end;
        Ok(())
    }

    /// Starts the next sample of a prompt that was read.
    fn start(&mut self, prompt: usize) -> Result<()> {
        let room = self.answer_room(prompt);
        let Some(open) = &mut self.open[prompt] else {
            return Err(Error::run(format!(
                "prompt {prompt} was to be sampled before it was read"
            )));
        };
        let sample = open.started;
        open.started += 1;
        if open.started == self.sampling.num_samples {
            self.waiting.pop_front();
        }
        let penalised = self.sampling.repetition_penalty.to_bits() != 1.0_f64.to_bits();
        let Prompt { index, tokens } = &self.prompts[prompt];
        let mut running = Running {
            prompt,
            sample,
            cache: self.engine.decoder.cache(Some(Arc::clone(&open.cache))),
            rng: self.stream.at(*index, sample as u64),
            sampler: Sampler::new(self.sampling),
            history: if penalised { tokens.clone() } else { Vec::new() },
            ids: Vec::new(),
            logprobs: Vec::new(),
            sample_logprobs: Vec::new(),
            room,
        };
        let mut logits = open.logits.clone();
        let draw = running.sampler.draw(&mut logits, &running.history, &mut running.rng)?;
        running.take(draw);
        self.reserved += room;
        if let Some((finish, text)) = self.ended(&running) {
            return self.finish(running, finish, text);
        }
        self.running.push(running);
        Ok(())
    }

    /// One token for every answer under way.
    fn step(&mut self, logits: &mut Vec<f32>) -> Result<()> {
        let mut feeds: Vec<Feed<'_, D::Cache>> = self
            .running
            .iter_mut()
            .map(|running| {
                let last = running.ids.len() - 1;
                Feed { cache: &mut running.cache, tokens: &running.ids[last..] }
            })
            .collect();
        self.engine.decoder.forward(&mut feeds, logits)?;
        drop(feeds);
        let vocab = self.engine.decoder.vocab_size();
        self.running.par_iter_mut().zip(logits.par_chunks_exact_mut(vocab)).try_for_each(
            |(running, logits)| {
                let draw = running.sampler.draw(logits, &running.history, &mut running.rng)?;
                running.take(draw);
                Ok::<(), Error>(())
            },
        )?;
        for running in std::mem::take(&mut self.running) {
            match self.ended(&running) {
                Some((finish, text)) => self.finish(running, finish, text)?,
                None => self.running.push(running),
            }
        }
        Ok(())
    }

    /// Whether the answer ends after its newest token, and its text if so.
    fn ended(&self, running: &Running<D::Cache>) -> Option<(Finish, String)> {
        let vocabulary = self.engine.vocabulary;
        let (last, before) = running.ids.split_last()?;
        if vocabulary.ends().contains(last) {
            return Some((Finish::Stop, vocabulary.text(before)));
        }
        if let Some(text) = self.stops.cut(vocabulary, &running.ids) {
            return Some((Finish::Stop, text));
        }
        (running.ids.len() >= running.room).then(|| (Finish::Length, vocabulary.text(&running.ids)))
    }

    fn finish(&mut self, running: Running<D::Cache>, finish: Finish, text: String) -> Result<()> {
        let Running { prompt, sample, ids, logprobs, sample_logprobs, room, .. } = running;
        self.reserved -= room;
        let Some(open) = &mut self.open[prompt] else { return Ok(()) };
        open.answers[sample] = Some(Answer {
            text,
            tokens: ids.len(),
            ids,
            logprobs,
            sample_logprobs,
            finish,
            fields: Map::new(),
        });
        if open.answers.iter().any(Option::is_none) {
            return Ok(());
        }
        let answers = open.answers.drain(..).flatten().collect();
        self.open[prompt] = None;
        self.reserved -= self.prompts[prompt].tokens.len();
        (self.done)(prompt, answers)
    }
}
