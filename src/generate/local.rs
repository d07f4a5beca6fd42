//! A model in this process that answers prompts: the local teacher, and the policy that is sampled.

use candle_core::DType;
use half::bf16;

use super::cache::CacheShape;
use super::decode::CpuDecoder;
use super::engine::{Answer, Engine, Limits, Prompt, Vocabulary};
use super::plain::PlainDecoder;
use super::sampling::Sampling;
use super::teacher::{Asked, Teacher};
use crate::data::forest::{Forest, micro_batches};
use crate::data::tokenizer::ChatTokenizer;
use crate::data::tree::{Role, Tree};
use crate::error::{Context, Error, Result};
use crate::model::checkpoint::Checkpoint;
use crate::model::transformer::Transformer;
use crate::ops::head;

/// Most answers under way at once.
const MAX_BATCH: usize = 64;
/// Most prompt tokens of one forward pass.
const MAX_PREFILL: usize = 512;
/// Bytes of all caches together.
const CACHE_BYTES: usize = 1 << 30;

/// A causal language model with its tokenizer.
pub struct LocalModel {
    backend: Backend,
    words: Words,
    limits: Limits,
}

enum Backend {
    Cpu(CpuDecoder),
    Bf16(CpuDecoder<bf16>),
    Plain(PlainDecoder),
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
        let on_cpu = weights.values().all(|tensor| tensor.device().is_cpu());
        let in_bf16 = weights.values().any(|tensor| tensor.dtype() == DType::BF16);
        let backend = match (on_cpu, in_bf16) {
            (true, true) => Backend::Bf16(CpuDecoder::new(config, weights)?),
            (true, false) => Backend::Cpu(CpuDecoder::new(config, weights)?),
            (false, _) => Backend::Plain(PlainDecoder::new(config, weights)?),
        };
        let shape = CacheShape::new(config);
        let bytes_a_token = match backend {
            Backend::Bf16(_) => shape.bytes_a_token::<bf16>(),
            Backend::Cpu(_) | Backend::Plain(_) => shape.bytes_a_token::<f32>(),
        };
        let limits = Limits {
            max_batch: MAX_BATCH,
            max_prefill: MAX_PREFILL,
            cache_tokens: CACHE_BYTES / bytes_a_token.max(1),
            max_positions: config.max_position_embeddings,
        };
        let words = Words { tokenizer: checkpoint.tokenizer()?.clone(), ends: checkpoint.ends() };
        Ok(Self { backend, words, limits })
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

    /// Answers to prompts that are tokens already; see [`Engine::run`].
    ///
    /// # Errors
    /// As [`Engine::run`].
    pub fn run(
        &self,
        prompts: &[Prompt],
        sampling: &Sampling,
        done: &mut dyn FnMut(usize, Vec<Answer>) -> Result<()>,
    ) -> Result<()> {
        let (vocabulary, limits) = (&self.words, self.limits);
        match &self.backend {
            Backend::Cpu(decoder) => {
                Engine { decoder, vocabulary, limits }.run(prompts, sampling, done)
            }
            Backend::Bf16(decoder) => {
                Engine { decoder, vocabulary, limits }.run(prompts, sampling, done)
            }
            Backend::Plain(decoder) => {
                Engine { decoder, vocabulary, limits }.run(prompts, sampling, done)
            }
        }
    }
}

impl Teacher for LocalModel {
    fn answer(
        &self,
        asked: &[Asked],
        sampling: &Sampling,
        done: &mut dyn FnMut(usize, Vec<Answer>) -> Result<()>,
    ) -> Result<()> {
        let mut prompts = Vec::with_capacity(asked.len());
        for asked in asked {
            let tokens = self.prompt_ids(asked)?;
            if tokens.len() >= self.limits.max_positions {
                let (len, limit) = (tokens.len(), self.limits.max_positions);
                return Err(Error::run(format!(
                    "a prompt of {len} tokens leaves no room for an answer in {limit} positions"
                ))
                .at(&asked.place));
            }
            prompts.push(Prompt { index: asked.index, tokens });
        }
        self.run(&prompts, sampling, done)
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
