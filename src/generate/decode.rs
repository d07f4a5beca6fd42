//! The forward pass of generation: new tokens of many sequences at once against their caches.
//!
//! [`CpuDecoder`] keeps the row rule (see [`matmul`](crate::ops::cpu::matmul)): logits of a sequence are the same bits
//! whatever it is batched with, and the bits that training computes for equal weights and segments. [`PlainDecoder`](super::plain::PlainDecoder) runs on every device.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;
use rayon::prelude::*;

use super::cache::{CacheShape, PagedCache, Part};
use crate::error::{Error, Result};
use crate::model::{Architecture, Config, Weights};
use crate::ops::cpu::{self, Element, rows, simd};
use crate::ops::{Rotary, linear, norm, residual, rope, swiglu};

/// New tokens of one sequence.
#[derive(Debug)]
pub struct Feed<'a, C> {
    /// The sequence's cache; the tokens are added to it.
    pub cache: &'a mut C,
    /// At least one token.
    pub tokens: &'a [u32],
    /// Whose predictions are wanted.
    pub wanted: Wanted,
}

/// The tokens of a feed after which the model's predictions are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// None: more of the same sequence follows.
    Nothing,
    /// The last.
    Last,
    /// All, in their order.
    All,
}

impl Wanted {
    /// Which of `count` tokens.
    pub fn of(self, count: usize) -> Range<usize> {
        match self {
            Self::Nothing => count..count,
            Self::Last => count - 1..count,
            Self::All => 0..count,
        }
    }
}

/// A model that reads tokens into caches and predicts the next ones.
pub trait Decoder {
    /// Keys and values of one sequence.
    type Cache: Send + Sync;

    /// An empty cache that continues so many first positions of `parent`.
    fn cache(&self, parent: Option<(Arc<Self::Cache>, usize)>) -> Self::Cache;

    /// Forgets the tokens of a cache from position `end` on; those of its parent stay.
    ///
    /// # Errors
    /// The device's.
    fn truncate(&self, cache: &mut Self::Cache, end: usize) -> Result<()>;

    /// Reads each feed's tokens. `logits` becomes `[wanted, V]`: the predictions after the wanted tokens, in the order of
    /// the feeds.
    ///
    /// # Errors
    /// The device fails, or a token lies outside the vocabulary.
    fn forward(&self, feeds: &mut [Feed<'_, Self::Cache>], logits: &mut Vec<f32>) -> Result<()>;

    /// The vocabulary's size, `V`.
    fn vocab_size(&self) -> usize;
}

/// One block's weights.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub(super) input_norm: Tensor,
    pub(super) qkv: [(Tensor, Option<Tensor>); 3],
    pub(super) o: (Tensor, Option<Tensor>),
    pub(super) post_norm: Tensor,
    pub(super) gate: Tensor,
    pub(super) up: Tensor,
    pub(super) down: Tensor,
}

/// The weights of a causal language model in the order of the forward pass. Tensors are shared, not copied.
#[derive(Clone, Debug)]
pub(super) struct Parts {
    pub(super) config: Config,
    pub(super) embedding: Tensor,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Tensor,
    pub(super) head: Tensor,
    pub(super) frequencies: Vec<f32>,
}

impl Parts {
    pub(super) fn new(config: &Config, weights: &Weights) -> Result<Self> {
        if config.architecture != Architecture::CausalLm {
            return Err(Error::usage("a reward model cannot write text")
                .hint("give a causal language model here"));
        }
        let get = |name: &str| -> Result<Tensor> {
            let tensor =
                weights.get(name).ok_or_else(|| Error::run("missing from the weights").at(name))?;
            Ok(tensor.detach().contiguous()?)
        };
        let head =
            if config.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
        let layer = |index: usize| -> Result<Layer> {
            let at = |name: &str| get(&format!("model.layers.{index}.{name}"));
            let linear = |name: &str, bias: bool| -> Result<(Tensor, Option<Tensor>)> {
                let bias = if bias { Some(at(&format!("{name}.bias"))?) } else { None };
                Ok((at(&format!("{name}.weight"))?, bias))
            };
            Ok(Layer {
                input_norm: at("input_layernorm.weight")?,
                qkv: [
                    linear("self_attn.q_proj", config.qkv_bias)?,
                    linear("self_attn.k_proj", config.qkv_bias)?,
                    linear("self_attn.v_proj", config.qkv_bias)?,
                ],
                o: linear("self_attn.o_proj", config.output_bias)?,
                post_norm: at("post_attention_layernorm.weight")?,
                gate: at("mlp.gate_proj.weight")?,
                up: at("mlp.up_proj.weight")?,
                down: at("mlp.down_proj.weight")?,
            })
        };
        Ok(Self {
            embedding: get("model.embed_tokens.weight")?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            norm: get("model.norm.weight")?,
            head: get(head)?,
            frequencies: config.rope.inverse_frequencies(config.head_dim),
            config: config.clone(),
        })
    }

    /// Refuses token ids that the embedding does not have.
    pub(super) fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let size = self.config.vocab_size;
        match tokens.iter().find(|&&token| token as usize >= size) {
            Some(token) => Err(Error::run(format!("token {token}, the model has {size}"))
                .hint("this tokenizer does not belong to this model")),
            None => Ok(()),
        }
    }
}

/// The forward pass on the CPU with kernels that keep the row rule. `E` is the type of its matrices, and of its caches.
#[derive(Clone, Debug)]
pub struct CpuDecoder<E = f32> {
    parts: Parts,
    elements: PhantomData<E>,
}

/// The new tokens of one forward pass.
struct Rows {
    /// Feed and position of each.
    places: Vec<(usize, usize)>,
    rotary: Rotary,
}

impl<E: Element> CpuDecoder<E> {
    /// Takes the weights of a causal language model. They are shared, not copied.
    ///
    /// # Errors
    /// A missing tensor, matrices of another type, or a reward model.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        let parts = Parts::new(config, weights)?;
        let found = parts.embedding.dtype();
        if found != E::DTYPE {
            return Err(Error::run(format!("weights of {found:?}, expected {:?}", E::DTYPE)));
        }
        Ok(Self { parts, elements: PhantomData })
    }

    /// How this model's caches are laid out.
    pub fn cache_shape(&self) -> CacheShape {
        CacheShape::new(&self.parts.config)
    }

    fn norm(&self, x: &[f32], weight: &Tensor) -> Result<Vec<E>> {
        let eps = self.parts.config.rms_norm_eps as f32;
        Ok(cpu::with_slice(weight, |weight| norm::forward(x, weight, eps))?)
    }

    /// One block. `x`: `[M, D]`.
    fn block(
        &self,
        index: usize,
        x: &mut [f32],
        feeds: &mut [Feed<'_, PagedCache<E>>],
        rows: &Rows,
    ) -> Result<()> {
        let Rows { places, rotary } = rows;
        let layer = &self.parts.layers[index];
        let half = self.parts.frequencies.len();
        let normed = self.norm(x, &layer.input_norm)?;
        let project = |i: usize| apply(&normed, &layer.qkv[i]);
        let rotated = |i: usize| -> Result<Vec<E>> {
            let mut y = project(i)?;
            rope::rotate(&mut y, rotary, 1.0);
            Ok(E::rounded(y))
        };
        let (q, k, v) = (rotated(0)?, rotated(1)?, E::rounded(project(2)?));
        let (q_len, kv_len) = (q.len() / places.len(), k.len() / places.len());
        for (row, &(feed, position)) in places.iter().enumerate() {
            let cache = &mut *feeds[feed].cache;
            cache.write(index, Part::Keys, position, &k[row * kv_len..][..kv_len]);
            cache.write(index, Part::Values, position, &v[row * kv_len..][..kv_len]);
        }
        let group = self.parts.config.group_size();
        let feeds = &*feeds;
        let mut mixed = vec![E::default(); q.len()];
        mixed.par_chunks_mut(q_len).zip(q.par_chunks(q_len)).zip(places).for_each_init(
            <[Vec<f32>; 3]>::default,
            |[a, b, tile], ((out, q), &(feed, position))| {
                let heads = out.chunks_exact_mut(2 * half).zip(q.chunks_exact(2 * half));
                for (head, (out, q)) in heads.enumerate() {
                    let (place, q) = ((&*feeds[feed].cache, index, head / group), E::widen(q, a));
                    E::write(out, b, |out| attend(out, q, place, position, tile));
                }
            },
        );
        residual::add(x, &apply(&mixed, &layer.o)?);
        let normed = self.norm(x, &layer.post_norm)?;
        let gate = E::rounded(linear::forward(&normed, &layer.gate, None)?);
        let up = E::rounded(linear::forward(&normed, &layer.up, None)?);
        residual::add(x, &linear::forward(&swiglu::forward(&gate, &up), &layer.down, None)?);
        Ok(())
    }
}

fn apply<E: Element>(x: &[E], (weight, bias): &(Tensor, Option<Tensor>)) -> Result<Vec<f32>> {
    Ok(linear::forward(x, weight, bias.as_ref())?)
}

/// One head of one row: `out = softmax(q · Kᵀ / √E) · V` over everything up to `position`.
fn attend<E: Element>(
    out: &mut [f32],
    query: &[f32],
    (cache, layer, head): (&PagedCache<E>, usize, usize),
    position: usize,
    tile: &mut Vec<f32>,
) {
    let width = query.len();
    let scale = 1.0 / (width as f32).sqrt();
    let mut probs = vec![0.0; position + 1];
    let mut done = 0;
    cache.visit((layer, Part::Keys, head), position, &mut |count, keys| {
        rows::scores(&mut probs[done..][..count], query, E::widen(keys, tile), scale);
        done += count;
    });
    let top = simd::max(&probs);
    let sum = simd::exp_sub(&mut probs, top);
    simd::scale(&mut probs, 1.0 / sum);
    let mut mixture = rows::Mixture::new(out);
    let mut done = 0;
    cache.visit((layer, Part::Values, head), position, &mut |count, values| {
        let values = E::widen(&values[..count * width], tile);
        mixture.add(&probs[done..][..count], values);
        done += count;
    });
    mixture.finish();
}

impl<E: Element> Decoder for CpuDecoder<E> {
    type Cache = PagedCache<E>;

    fn cache(&self, parent: Option<(Arc<PagedCache<E>>, usize)>) -> PagedCache<E> {
        PagedCache::new(self.cache_shape(), parent)
    }

    fn truncate(&self, cache: &mut PagedCache<E>, end: usize) -> Result<()> {
        cache.truncate(end);
        Ok(())
    }

    fn forward(&self, feeds: &mut [Feed<'_, PagedCache<E>>], logits: &mut Vec<f32>) -> Result<()> {
        let parts = &self.parts;
        let width = parts.config.hidden_size;
        let mut places = Vec::new();
        let mut x = Vec::new();
        for (index, feed) in feeds.iter_mut().enumerate() {
            parts.check_tokens(feed.tokens)?;
            let first = feed.cache.extend(feed.tokens.len());
            places.extend((0..feed.tokens.len()).map(|offset| (index, first + offset)));
            cpu::with_slice::<E, _>(&parts.embedding, |table| {
                for &token in feed.tokens {
                    let row = &table[token as usize * width..][..width];
                    x.extend(row.iter().map(|x| x.widened()));
                }
            })?;
        }
        let positions: Vec<u32> = places.iter().map(|&(_, position)| position as u32).collect();
        let rows = Rows { rotary: Rotary::new(&parts.frequencies, &positions), places };
        for index in 0..parts.layers.len() {
            self.block(index, &mut x, feeds, &rows)?;
        }
        let mut wanted = Vec::with_capacity(feeds.len() * width);
        let mut first = 0;
        for feed in feeds.iter() {
            let rows = feed.wanted.of(feed.tokens.len());
            wanted.extend_from_slice(&x[(first + rows.start) * width..(first + rows.end) * width]);
            first += feed.tokens.len();
        }
        let wanted = self.norm(&wanted, &parts.norm)?;
        *logits = linear::forward(&wanted, &parts.head, None)?;
        Ok(())
    }

    fn vocab_size(&self) -> usize {
        self.parts.config.vocab_size
    }
}
