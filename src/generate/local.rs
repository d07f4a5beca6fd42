//! A model in this process that answers prompts: the local teacher, and the policy that is sampled.

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

/// Most answers under way at once.
const MAX_BATCH: usize = 64;
/// Most prompt tokens of one forward pass.
const MAX_PREFILL: usize = 512;
/// Bytes of all caches together.
const CACHE_BYTES: usize = 1 << 30;
/// On a GPU, where many rows at once cost little more than one. A quarter of what is free is for caches: they take whole
/// pages, and another model may come.
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

/// Who guesses what comes next, and how many tokens ahead.
#[derive(Default)]
pub enum Guessing {
    /// Nobody.
    #[default]
    None,
    /// What followed the same tokens earlier in prompt and answer; see [`Lookup`].
    Lookup {
        /// Tokens ahead.
        tokens: usize,
    },
    /// A smaller model of the same vocabulary.
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

/// What the CPU computes in with these weights; nothing where they lie elsewhere.
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
    /// Takes a checkpoint's weights, which are shared, not copied, and computes in their type.
    ///
    /// # Errors
    /// A reward model, or a checkpoint without tokenizer.
    pub fn new(checkpoint: &Checkpoint) -> Result<Self> {
        let Checkpoint { config, weights, .. } = checkpoint;
        let backend = match numbers(weights) {
            Some(DType::BF16) => Backend::Bf16(CpuDecoder::new(config, weights)?),
            Some(_) => Backend::Cpu(CpuDecoder::new(config, weights)?),
            None => Backend::Plain(PlainDecoder::new(config, weights)?),
        };
        Self::of(checkpoint, backend)
    }

    /// A model that keeps its matrices in a form of its own, rounded or in the order in which they are read; see
    /// [`CpuDecoder::packed`]. Matrices that nobody else holds are freed one by one.
    ///
    /// # Errors
    /// As [`new`](Self::new); rows that are no whole blocks; blocks elsewhere than on the CPU.
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

    /// An adapter for requests to this model, computed with in the model's own type of numbers. `weights`: the model's,
    /// not rounded to blocks.
    ///
    /// # Errors
    /// An adapter of another base, of a reward model, or with parameters that were trained in full.
    pub fn adaptation(&self, saved: &Saved, weights: &Weights) -> Result<Arc<Adaptation>> {
        let dtype = match &self.backend {
            Backend::Cpu(_) => DType::F32,
            Backend::Bf16(_) => DType::BF16,
            Backend::Plain(decoder) => decoder.dtype(),
        };
        let layers = self.layers;
        Ok(Arc::new(Adaptation::new(saved, weights, layers, dtype)?))
    }

    /// What bounds a batch of this model.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// What a cache of so many positions of its own takes of [`Limits::cache_tokens`]: whole pages.
    pub fn in_pages(&self, tokens: usize) -> usize {
        match &self.backend {
            Backend::Cpu(decoder) => decoder.in_pages(tokens),
            Backend::Bf16(decoder) => decoder.in_pages(tokens),
            Backend::Plain(decoder) => decoder.in_pages(tokens),
        }
    }

    /// Where it computes.
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

    /// Calls `done` with the place of each text and the hidden states after the final norm of its tokens, `[T, D]`: the
    /// model's own, whatever form its matrices have. A text without tokens has none.
    ///
    /// # Errors
    /// The device's; tokens that are none of the model's.
    pub fn states(&self, texts: &[Vec<u32>], done: &mut dyn FnMut(usize, Vec<f32>)) -> Result<()> {
        match &self.backend {
            Backend::Cpu(decoder) => states::of_texts(decoder, texts, done),
            Backend::Bf16(decoder) => states::of_texts(decoder, texts, done),
            Backend::Plain(decoder) => states::of_texts(decoder, texts, done),
        }
    }

    /// The width of a state, `D`.
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// The vocabulary held against grammars; read at the first call.
    ///
    /// # Errors
    /// A tokenizer whose tokens have no bytes, or no end-of-turn token.
    pub fn grammars(&self) -> Result<&Grammars> {
        if let Some(grammars) = self.grammars.get() {
            return Ok(grammars);
        }
        let Words { tokenizer, ends } = &self.words;
        let grammars = Grammars::new(tokenizer, ends, self.vocab_size())?;
        Ok(self.grammars.get_or_init(|| grammars))
    }

    /// Guesses ahead as the settings say; `load` loads the assistant.
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

    /// Guesses tokens ahead, which changes how fast answers come and never an answer.
    ///
    /// # Errors
    /// A draft model of another vocabulary.
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

    /// A scheduler of this model for requests that come and go.
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

    /// The text of tokens, special ones left out.
    pub fn text(&self, ids: &[u32]) -> String {
        self.words.text(ids)
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &ChatTokenizer {
        &self.words.tokenizer
    }

    /// The ids of a conversation that waits for its answer.
    ///
    /// # Errors
    /// The chat template refuses the messages.
    pub fn prompt_ids(&self, asked: &Asked) -> Result<Vec<u32>> {
        self.words
            .tokenizer
            .prompt_ids_with(&asked.messages, asked.tools.as_ref(), &asked.template_kwargs)
            .at(&asked.place)
    }

    /// Answers to prompts that are tokens already; see [`answer_all`].
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
        // Rows of one judge share their schema.
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

/// Log-probability of every token of every answer to one prompt under another model, in nats. The prompt is read
/// once for all answers.
///
/// # Errors
/// A sequence longer than the model's positions.
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

    /// One of the two tiny models, which share their tokenizer.
    fn tiny(name: &str) -> Checkpoint {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny").join(name);
        Checkpoint::load_dir(&dir, &Device::Cpu).unwrap()
    }

    fn student() -> LocalModel {
        LocalModel::new(&tiny("student").computed_in(Sampling::default().dtype).unwrap()).unwrap()
    }

    /// The answers to a prompt that repeats itself, and how many forward passes they took.
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
    fn guessing_as_the_settings_say_changes_no_answer() {
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
                // A model guesses itself without a mistake.
                assert!(name == "teacher" || fewer < passes, "{name}: {fewer} of {passes}");
            }
        }
    }

    #[test]
    fn a_draft_model_of_another_vocabulary_is_refused() {
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
