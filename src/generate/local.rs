//! An in-process model that answers prompts: the local teacher, and the policy being sampled.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device};
use half::bf16;
use serde_json::Value;

use super::adaptation::Adaptation;
use super::cache::CacheShape;
use super::decode::{CpuDecoder, Decoder};
use super::engine::{
    Answer, Draft, Extras, Guesser, Limits, Lookup, Prompt, Request, Schedule, Scheduler,
    Vocabulary, answer_all, answer_requests,
};
use super::grammar::Grammars;
use super::plain::PlainDecoder;
use super::sampling::{Sampling, WeightFormat};
use super::states;
use super::teacher::{Asked, Teacher};
use crate::data::forest::{Forest, micro_batches};
use crate::data::tokenizer::ChatTokenizer;
use crate::data::tree::{Role, Tree};
use crate::error::{Context, Error, Result};
use crate::model::Weights;
use crate::model::checkpoint::Checkpoint;
use crate::model::lora::peft::Saved;
use crate::model::transformer::Transformer;
use crate::ops::cuda::device;
use crate::ops::head;

/// Most answers decoded at once.
const MAX_BATCH: usize = 64;
/// Most prompt tokens per forward pass.
const MAX_PREFILL: usize = 512;
/// Total bytes of all caches.
const CACHE_BYTES: usize = 1 << 30;
/// On a GPU many rows cost little more than one. Caches get a quarter of the free memory: they use whole pages, and
/// another model may be loaded.
const GPU_MAX_BATCH: usize = 256;
const GPU_MAX_PREFILL: usize = 2048;

/// A causal language model with its tokenizer.
pub struct LocalModel {
    backend: Backend,
    words: Words,
    layers: usize,
    hidden_size: usize,
    limits: Limits,
    grammars: OnceLock<Grammars>,
    guessing: Guessing,
}

/// Source of speculative tokens, and how many tokens ahead.
#[derive(Default)]
pub enum Guessing {
    /// No speculation.
    #[default]
    None,
    /// Tokens that followed the same tokens earlier in prompt and answer; see [`Lookup`].
    Lookup {
        /// Tokens ahead.
        tokens: usize,
    },
    /// A draft model with the same vocabulary.
    Draft {
        /// The model.
        model: Box<LocalModel>,
        /// Tokens ahead.
        tokens: usize,
    },
}

enum Backend {
    Cpu(CpuDecoder),
    Bf16(CpuDecoder<bf16>),
    Plain(PlainDecoder),
}

/// The CPU compute dtype for these weights; `None` if they are on another device.
fn numbers(weights: &Weights) -> Option<DType> {
    let on_cpu = weights.values().all(|tensor| tensor.device().is_cpu());
    let in_bf16 = weights.values().any(|tensor| tensor.dtype() == DType::BF16);
    on_cpu.then_some(if in_bf16 { DType::BF16 } else { DType::F32 })
}

struct Words {
    tokenizer: ChatTokenizer,
    ends: Vec<u32>,
}

impl Vocabulary for Words {
    fn text(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, true)
    }

    fn ends(&self) -> &[u32] {
        &self.ends
    }
}

impl LocalModel {
    /// Shares a checkpoint's weights without copying them, and computes in their dtype.
    ///
    /// # Errors
    /// A reward model, or a checkpoint without a tokenizer.
    pub fn new(checkpoint: &Checkpoint) -> Result<Self> {
        let Checkpoint { config, weights, .. } = checkpoint;
        let backend = match numbers(weights) {
            Some(DType::BF16) => Backend::Bf16(CpuDecoder::new(config, weights)?),
            Some(_) => Backend::Cpu(CpuDecoder::new(config, weights)?),
            None => Backend::Plain(PlainDecoder::new(config, weights)?),
        };
        Self::of(checkpoint, backend)
    }

    /// A model with its matrices quantised or packed; see [`CpuDecoder::packed`]. Matrices that nothing else owns are
    /// freed one by one.
    ///
    /// # Errors
    /// As [`new`](Self::new); rows that are not a whole number of blocks; quantisation on a device other than the CPU.
    pub fn held(mut checkpoint: Checkpoint, format: WeightFormat) -> Result<Self> {
        let weights = std::mem::take(&mut checkpoint.weights);
        let config = &checkpoint.config;
        let backend = match (format.block_type(), numbers(&weights)) {
            (Some(_), None) => {
                return Err(Error::usage("`quantization` on another device than the CPU")
                    .hint("quantization = \"none\""));
            }
            (Some(kind), Some(_)) => Backend::Cpu(CpuDecoder::rounded(config, weights, kind)?),
            (None, Some(DType::BF16)) => Backend::Bf16(CpuDecoder::packed(config, weights)?),
            (None, Some(_)) => Backend::Cpu(CpuDecoder::packed(config, weights)?),
            (None, None) => Backend::Plain(PlainDecoder::new(config, &weights)?),
        };
        Self::of(&checkpoint, backend)
    }

    fn of(checkpoint: &Checkpoint, backend: Backend) -> Result<Self> {
        let config = &checkpoint.config;
        let shape = CacheShape::new(config);
        let (bytes_a_token, device) = match &backend {
            Backend::Bf16(_) => (shape.bytes_a_token::<bf16>(), &Device::Cpu),
            Backend::Cpu(_) => (shape.bytes_a_token::<f32>(), &Device::Cpu),
            Backend::Plain(decoder) if decoder.dtype() == DType::BF16 => {
                (shape.bytes_a_token::<bf16>(), decoder.device())
            }
            Backend::Plain(decoder) => (shape.bytes_a_token::<f32>(), decoder.device()),
        };
        let (max_batch, max_prefill, cache_bytes) = match device::facts(device)? {
            Some(facts) => (GPU_MAX_BATCH, GPU_MAX_PREFILL, (facts.free / 4) as usize),
            None => (MAX_BATCH, MAX_PREFILL, CACHE_BYTES),
        };
        let limits = Limits {
            max_batch,
            max_prefill,
            cache_tokens: cache_bytes / bytes_a_token.max(1),
            max_positions: config.max_position_embeddings,
            keep_prefixes: false,
        };
        let words = Words { tokenizer: checkpoint.tokenizer()?.clone(), ends: checkpoint.ends() };
        Ok(Self {
            backend,
            words,
            layers: config.num_hidden_layers,
            hidden_size: config.hidden_size,
            limits,
            grammars: OnceLock::new(),
            guessing: Guessing::None,
        })
    }

    /// An adapter for requests to this model, in the model's compute dtype. `weights`: the model's, unquantised.
    ///
    /// # Errors
    /// An adapter of another base or of a reward model, or one with fully trained parameters.
    pub fn adaptation(&self, saved: &Saved, weights: &Weights) -> Result<Arc<Adaptation>> {
        let dtype = match &self.backend {
            Backend::Cpu(_) => DType::F32,
            Backend::Bf16(_) => DType::BF16,
            Backend::Plain(decoder) => decoder.dtype(),
        };
        let layers = self.layers;
        Ok(Arc::new(Adaptation::new(saved, weights, layers, dtype)?))
    }

    /// Batch limits for this model.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Share of [`Limits::cache_tokens`] used by a cache with this many positions of its own: whole pages.
    pub fn in_pages(&self, tokens: usize) -> usize {
        match &self.backend {
            Backend::Cpu(decoder) => decoder.in_pages(tokens),
            Backend::Bf16(decoder) => decoder.in_pages(tokens),
            Backend::Plain(decoder) => decoder.in_pages(tokens),
        }
    }

    /// The device the model runs on.
    pub fn device(&self) -> &Device {
        match &self.backend {
            Backend::Cpu(_) | Backend::Bf16(_) => &Device::Cpu,
            Backend::Plain(decoder) => decoder.device(),
        }
    }

    /// The model's vocabulary size, `V`.
    pub fn vocab_size(&self) -> usize {
        match &self.backend {
            Backend::Cpu(decoder) => decoder.vocab_size(),
            Backend::Bf16(decoder) => decoder.vocab_size(),
            Backend::Plain(decoder) => decoder.vocab_size(),
        }
    }

    /// Calls `done` with each text's index and the hidden states of its tokens after the final norm, `[T, D]`, as this
    /// model computes them in its matrix format. A text without tokens has none.
    ///
    /// # Errors
    /// A device error; tokens outside the vocabulary.
    pub fn states(&self, texts: &[Vec<u32>], done: &mut dyn FnMut(usize, Vec<f32>)) -> Result<()> {
        match &self.backend {
            Backend::Cpu(decoder) => states::of_texts(decoder, texts, done),
            Backend::Bf16(decoder) => states::of_texts(decoder, texts, done),
            Backend::Plain(decoder) => states::of_texts(decoder, texts, done),
        }
    }

    /// Hidden size, `D`.
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// The vocabulary prepared for grammars; read on first use.
    ///
    /// # Errors
    /// A tokenizer whose tokens have no byte form, or that has no end-of-turn token.
    pub fn grammars(&self) -> Result<&Grammars> {
        if let Some(grammars) = self.grammars.get() {
            return Ok(grammars);
        }
        let Words { tokenizer, ends } = &self.words;
        let grammars = Grammars::new(tokenizer, ends, self.vocab_size())?;
        Ok(self.grammars.get_or_init(|| grammars))
    }

    /// Enables speculation as configured; `load` loads the draft model.
    ///
    /// # Errors
    /// As [`guessing`](Self::guessing), and those of `load`.
    pub fn guessing_as(
        self,
        sampling: &Sampling,
        load: impl FnOnce(&str) -> Result<Checkpoint>,
    ) -> Result<Self> {
        let Sampling { prompt_lookup_num_tokens, assistant_model, .. } = sampling;
        if *prompt_lookup_num_tokens > 0 {
            return self.guessing(Guessing::Lookup { tokens: *prompt_lookup_num_tokens });
        }
        if assistant_model.is_empty() {
            return Ok(self);
        }
        let checkpoint = load(assistant_model)?.computed_in(sampling.dtype)?;
        let model = Self::held(checkpoint, sampling.quantization).at(assistant_model)?;
        let tokens = sampling.num_assistant_tokens;
        self.guessing(Guessing::Draft { model: Box::new(model), tokens }).at(assistant_model)
    }

    /// Enables speculative decoding, which changes speed but never an answer.
    ///
    /// # Errors
    /// A draft model with another vocabulary.
    pub fn guessing(mut self, guessing: Guessing) -> Result<Self> {
        if let Guessing::Draft { model, .. } = &guessing {
            let (own, other) = (self.tokenizer().hash(), model.tokenizer().hash());
            if own != other || self.vocab_size() != model.vocab_size() {
                return Err(Error::usage("the draft model has another vocabulary")
                    .hint("a draft model guesses token by token: its tokenizer must be the same"));
            }
        }
        self.guessing = guessing;
        Ok(self)
    }

    /// A scheduler for requests that come and go.
    pub fn scheduler(&self, limits: Limits) -> Box<dyn Schedule + '_> {
        match &self.backend {
            Backend::Cpu(decoder) => self.scheduler_of(decoder, limits),
            Backend::Bf16(decoder) => self.scheduler_of(decoder, limits),
            Backend::Plain(decoder) => self.scheduler_of(decoder, limits),
        }
    }

    fn scheduler_of<'a, D: Decoder>(
        &'a self,
        decoder: &'a D,
        limits: Limits,
    ) -> Box<dyn Schedule + 'a> {
        let scheduler = Scheduler::new(decoder, &self.words, limits);
        let Some((guesser, most)) = self.guesser() else { return Box::new(scheduler) };
        Box::new(scheduler.guessing(guesser, most))
    }

    fn guesser(&self) -> Option<(Box<dyn Guesser + '_>, usize)> {
        match &self.guessing {
            Guessing::None => None,
            Guessing::Lookup { tokens } => Some((Box::new(Lookup::default()), *tokens)),
            Guessing::Draft { model, tokens } => {
                let positions = model.limits.max_positions;
                let draft: Box<dyn Guesser + '_> = match &model.backend {
                    Backend::Cpu(decoder) => Box::new(Draft::new(decoder, positions)),
                    Backend::Bf16(decoder) => Box::new(Draft::new(decoder, positions)),
                    Backend::Plain(decoder) => Box::new(Draft::new(decoder, positions)),
                };
                Some((draft, *tokens))
            }
        }
    }

    /// Decodes tokens, without special ones.
    pub fn text(&self, ids: &[u32]) -> String {
        self.words.text(ids)
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &ChatTokenizer {
        &self.words.tokenizer
    }

    /// Token ids of a conversation, up to where the answer begins.
    ///
    /// # Errors
    /// The chat template refuses the messages.
    pub fn prompt_ids(&self, asked: &Asked) -> Result<Vec<u32>> {
        self.words
            .tokenizer
            .prompt_ids_with(&asked.messages, asked.tools.as_ref(), &asked.template_kwargs)
            .at(&asked.place)
    }

    /// Answers prompts given as tokens; see [`answer_all`].
    ///
    /// # Errors
    /// As [`answer_all`].
    pub fn run(
        &self,
        prompts: &[Prompt],
        sampling: &Sampling,
        done: &mut dyn FnMut(usize, Vec<Answer>) -> Result<()>,
    ) -> Result<()> {
        answer_all(&mut *self.scheduler(self.limits), prompts, sampling, done)
    }
}

impl Teacher for LocalModel {
    fn on_gpu(&self) -> bool {
        self.device().is_cuda()
    }

    fn answer(
        &self,
        asked: &[Asked],
        sampling: &Sampling,
        done: &mut dyn FnMut(usize, Vec<Answer>) -> Result<()>,
    ) -> Result<()> {
        sampling.check()?;
        let sampling = Arc::new(sampling.clone());
        // Rows of one judge share a schema.
        let mut form: Option<(&Value, Arc<Extras>)> = None;
        let (mut requests, mut places) = (Vec::with_capacity(asked.len()), Vec::new());
        for (place, asked) in asked.iter().enumerate() {
            let prompt = Prompt { index: asked.index, tokens: self.prompt_ids(asked)? };
            let mut request = Request::new(prompt, Arc::clone(&sampling));
            if sampling.skip_refused && !request.leaves_room(self.limits.max_positions) {
                done(place, Vec::new())?;
                continue;
            }
            request.check(self.limits.max_positions, self.vocab_size()).at(&asked.place)?;
            if let Some(schema) = &asked.schema {
                let known = form.take().filter(|(known, _)| *known == schema);
                let known = if let Some(known) = known {
                    known
                } else {
                    let grammar = self.grammars()?.json_schema(schema).at(&asked.place)?;
                    let extras = Extras { grammar: Some(grammar), ..Extras::default() };
                    (schema, Arc::new(extras))
                };
                let (_, extras) = form.insert(known);
                request.extras = Arc::clone(extras);
            }
            requests.push(request);
            places.push(place);
        }
        let mut done = |at: usize, answers| done(places[at], answers);
        answer_requests(&mut *self.scheduler(self.limits), requests.into_iter(), &mut done)
    }
}

/// Log-probability of every token of every answer to one prompt under another model, in nats. The prompt is read once
/// for all answers.
///
/// # Errors
/// A sequence longer than the model's maximum positions.
pub fn answer_logprobs(
    model: &Transformer,
    prompt: &[u32],
    answers: &[&[u32]],
) -> Result<Vec<Vec<f32>>> {
    const BUDGET: usize = 4096;
    let trees: Vec<Tree> = answers
        .chunks((BUDGET / answers.iter().map(|ids| ids.len()).max().unwrap_or(1).max(1)).max(1))
        .map(|answers| {
            let children = answers.iter().map(|ids| (ids.to_vec(), vec![Role::Content; ids.len()]));
            Tree::siblings(prompt.to_vec(), children.collect(), 0)
        })
        .collect();
    let borrowed: Vec<&Tree> = trees.iter().collect();
    let mut all = Vec::with_capacity(answers.len());
    for range in micro_batches(&borrowed, BUDGET) {
        let forest = Forest::pack(&trees[range])?;
        let hidden = model.hidden(&forest)?;
        let logps = head::logps(&hidden, model.head(), &forest.targets)?;
        let first = all.len();
        all.resize(first + forest.leaves.len(), Vec::new());
        for (target, logp) in forest.targets.iter().zip(logps) {
            all[first + target.leaf as usize].push(logp);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::generate::engine::Event;

    /// One of the two tiny models; they share a tokenizer.
    fn tiny(name: &str) -> Checkpoint {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny").join(name);
        Checkpoint::load_dir(&dir, &Device::Cpu).unwrap()
    }

    fn student() -> LocalModel {
        LocalModel::new(&tiny("student").computed_in(Sampling::default().dtype).unwrap()).unwrap()
    }

    /// The answers to a repetitive prompt, and the number of forward passes.
    fn answers(model: &LocalModel, sampling: &Sampling) -> (Vec<Answer>, usize) {
        let text = "Tom has 3 coins. Dora has 3 coins. Tom has 3 coins. Dora has";
        let prompt = Prompt { index: 0, tokens: model.tokenizer().encode(text) };
        let mut scheduler = model.scheduler(model.limits());
        scheduler.submit(Request::new(prompt, Arc::new(sampling.clone()))).unwrap();
        let (mut all, mut passes) = (Vec::new(), 0);
        let mut on = |event| {
            match event {
                Event::Done(_, answers, _) => all = answers,
                Event::Failed(_, error) => return Err(error),
                Event::Piece(..) => {}
            }
            Ok(())
        };
        while scheduler.step(&mut on).unwrap() {
            passes += 1;
        }
        (all, passes)
    }

    #[test]
    fn configured_guessing_does_not_change_answers() {
        let by_chance = Sampling { num_samples: 2, temperature: 0.7, ..Sampling::default() };
        for plain in [Sampling::greedy(40), Sampling { max_new_tokens: 40, ..by_chance }] {
            let nothing = |name: &str| -> Result<Checkpoint> { panic!("{name} is not wanted") };
            let alone = student().guessing_as(&plain, nothing).unwrap();
            assert!(matches!(alone.guessing, Guessing::None));
            let (expected, passes) = answers(&alone, &plain);

            let looks_up = Sampling { prompt_lookup_num_tokens: 3, ..plain.clone() };
            let model = student().guessing_as(&looks_up, nothing).unwrap();
            assert!(matches!(model.guessing, Guessing::Lookup { tokens: 3 }));
            let (found, fewer) = answers(&model, &looks_up);
            assert!(found == expected && fewer <= passes, "{fewer} passes of {passes}");

            for name in ["student", "teacher"] {
                let assistant_model = name.to_owned();
                let drafts = Sampling { assistant_model, num_assistant_tokens: 3, ..plain.clone() };
                let model = student().guessing_as(&drafts, |name| Ok(tiny(name))).unwrap();
                assert!(matches!(model.guessing, Guessing::Draft { tokens: 3, .. }));
                let (found, fewer) = answers(&model, &drafts);
                assert!(found == expected && fewer <= passes, "{name}: {fewer} of {passes}");
                // A model drafting for itself is always right.
                assert!(name == "teacher" || fewer < passes, "{name}: {fewer} of {passes}");
            }
        }
    }

    #[test]
    fn draft_model_with_another_vocabulary_is_refused() {
        let sampling = Sampling { assistant_model: "other".to_owned(), ..Sampling::default() };
        let other = |_: &str| -> Result<Checkpoint> {
            let mut other = tiny("student");
            let (tokenizer, added) =
                other.tokenizer()?.with_special_tokens(&["<|more|>".to_owned()])?;
            assert_eq!(added, 1);
            other.tokenizer = Some(tokenizer);
            Ok(other)
        };
        let error = student().guessing_as(&sampling, other).err().unwrap();
        assert_eq!(error.to_string(), "other: the draft model has another vocabulary");
        assert!(error.hint_text().unwrap().contains("must be the same"));
    }
}
