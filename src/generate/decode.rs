//! The decoder's forward pass: new tokens of many sequences at once against their KV caches.
//!
//! [`CpuDecoder`] keeps the row rule (see [`matmul`](crate::ops::cpu::matmul)): a sequence's logits are bit-identical
//! whatever it is batched with, and equal to those of training for equal weights and segments.
//! [`PlainDecoder`](super::plain::PlainDecoder) runs on every device.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;
use llguidance::toktrie::SimpleVob;

use super::adaptation::{Adaptation, Adapted, Place};
use super::attend::{Heads, attention};
use super::cache::{self, CacheShape, PagedCache, Part};
use super::parts::{Input, Matrix, Parts};
use super::sampler::Draw;
use super::states::States;
use crate::error::{Error, Result};
use crate::model::packed::BlockType;
use crate::model::{Config, Weights};
use crate::ops::cpu::awake::awake;
use crate::ops::cpu::{self, Element};
use crate::ops::sample::Chance;
use crate::ops::{Rotary, linear, norm, residual, rope, swiglu};

/// New tokens of one sequence.
#[derive(Debug)]
pub struct Feed<'a, C> {
    /// The sequence's cache; the tokens are appended to it.
    pub cache: &'a mut C,
    /// At least one token.
    pub tokens: &'a [u32],
    /// Which predictions are wanted.
    pub wanted: Wanted<'a>,
    /// The adapter; the same for a whole sequence.
    pub adaptation: Option<&'a Adaptation>,
}

/// The tokens of a feed after which predictions are wanted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wanted<'a> {
    /// None: more of the sequence follows.
    Nothing,
    /// The last token.
    Last,
    /// All tokens, in order.
    All,
    /// A token sampled after the last one instead of its logits, from the allowed tokens if restricted; only for
    /// decoders that [draw](Decoder::draws).
    Token(Chance, Option<&'a SimpleVob>),
}

impl Wanted<'_> {
    /// Range of the wanted tokens among `count`.
    pub fn of(self, count: usize) -> Range<usize> {
        match self {
            Self::Nothing => count..count,
            Self::Last | Self::Token(..) => count - 1..count,
            Self::All => 0..count,
        }
    }
}

/// Results of a forward pass.
#[derive(Debug, Default)]
pub struct Predictions {
    /// `[wanted, V]`: logits after the wanted tokens, in the order of the feeds.
    pub logits: Vec<f32>,
    /// Sampled tokens, in the order of the feeds that want one; errors are per feed.
    pub draws: Vec<Result<Draw>>,
}

/// A model that reads tokens into caches and predicts the next ones.
pub trait Decoder {
    /// KV cache of one sequence.
    type Cache: Send + Sync;

    /// An empty cache that continues the given number of positions of `parent`.
    fn cache(&self, parent: Option<(Arc<Self::Cache>, usize)>) -> Self::Cache;

    /// Drops a cache's tokens from position `end` on; its parent's stay.
    ///
    /// # Errors
    /// A device error.
    fn truncate(&self, cache: &mut Self::Cache, end: usize) -> Result<()>;

    /// Reads each feed's tokens, and replaces the contents of `predictions`.
    ///
    /// # Errors
    /// A device error, or a token outside the vocabulary.
    fn forward(
        &self,
        feeds: &mut [Feed<'_, Self::Cache>],
        predictions: &mut Predictions,
    ) -> Result<()>;

    /// Granularity of cache growth, in positions; reservations are in whole pages.
    fn page(&self) -> usize {
        1
    }

    /// Cache size for this many own positions, in whole pages.
    fn in_pages(&self, tokens: usize) -> usize {
        tokens.next_multiple_of(self.page())
    }

    /// Whether it samples tokens on its own device, so that logits need not be transferred.
    fn draws(&self) -> bool {
        false
    }

    /// Vocabulary size, `V`.
    fn vocab_size(&self) -> usize;
}

/// The forward pass on the CPU with kernels that keep the row rule. `E` is the dtype of its matrices and caches.
#[derive(Clone, Debug)]
pub struct CpuDecoder<E = f32> {
    parts: Parts,
    elements: PhantomData<E>,
}

/// The new tokens of one forward pass.
struct Rows<'a> {
    /// Feed and position of each token.
    places: Vec<(usize, usize)>,
    rotary: Rotary,
    adapted: Adapted<'a>,
}

impl<E: Element> CpuDecoder<E> {
    /// Wraps the weights of a causal language model. They are shared, not copied.
    ///
    /// # Errors
    /// A missing tensor, matrices of another dtype, or a reward model.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        Self::of(Parts::new(config, weights)?)
    }

    /// As [`new`](Self::new), with packed matrices: products with few rows run at close to memory bandwidth, and those
    /// with many need no packing first. Matrices only `weights` owns are freed one by one.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn packed(config: &Config, weights: Weights) -> Result<Self> {
        Self::of(Parts::packed(config, weights)?)
    }

    fn of(parts: Parts) -> Result<Self> {
        let found = match &parts.embedding {
            Matrix::Dense(table) => table.dtype(),
            Matrix::Packed(table) => table.dtype(),
            Matrix::Blocks(_) => E::DTYPE,
        };
        if found != E::DTYPE {
            return Err(Error::run(format!("weights of {found:?}, expected {:?}", E::DTYPE)));
        }
        Ok(Self { parts, elements: PhantomData })
    }

    /// Layout of this model's caches.
    pub fn cache_shape(&self) -> CacheShape {
        CacheShape::new(&self.parts.config)
    }

    fn norm(&self, x: &[f32], weight: &Tensor) -> Result<Vec<E>> {
        let eps = self.parts.config.rms_norm_eps as f32;
        Ok(cpu::with_slice(weight, |weight| norm::forward(x, weight, eps))?)
    }

    /// Products of the same rows with several projections of a block, with adapters and biases added.
    fn project<const N: usize>(
        &self,
        index: usize,
        x: &[E],
        places: [Place; N],
        rows: &Rows<'_>,
    ) -> Result<[Vec<f32>; N]> {
        let layer = &self.parts.layers[index];
        let mut all = Input::new(x).times(places.map(|place| layer.matrix(place)))?;
        for (y, place) in all.iter_mut().zip(places) {
            rows.adapted.add((index, place), x, y)?;
            if let Some(bias) = layer.bias(place) {
                linear::add_bias(y, bias)?;
            }
        }
        Ok(all)
    }

    /// One transformer block. `x`: `[M, D]`.
    fn block(
        &self,
        index: usize,
        x: &mut [f32],
        feeds: &mut [Feed<'_, PagedCache<E>>],
        rows: &Rows<'_>,
    ) -> Result<()> {
        let Rows { places, rotary, .. } = rows;
        let layer = &self.parts.layers[index];
        let normed = self.norm(x, &layer.input_norm)?;
        let [mut q, mut k, v] =
            self.project(index, &normed, [Place::Q, Place::K, Place::V], rows)?;
        rope::rotate(&mut q, rotary, 1.0);
        rope::rotate(&mut k, rotary, 1.0);
        let (q, k, v) = (E::rounded(q), E::rounded(k), E::rounded(v));
        let kv_len = k.len() / places.len();
        for (row, &(feed, position)) in places.iter().enumerate() {
            let cache = &mut *feeds[feed].cache;
            cache.write(index, Part::Keys, position, &k[row * kv_len..][..kv_len]);
            cache.write(index, Part::Values, position, &v[row * kv_len..][..kv_len]);
        }
        let config = &self.parts.config;
        let heads = Heads {
            layer: index,
            shared: config.num_key_value_heads,
            group: config.group_size(),
            width: config.head_dim,
        };
        let seen: Vec<(&PagedCache<E>, usize)> =
            places.iter().map(|&(feed, position)| (&*feeds[feed].cache, position)).collect();
        let mixed = attention(&q, &seen, heads);
        let [y] = self.project(index, &mixed, [Place::O], rows)?;
        residual::add(x, &y);
        let normed = self.norm(x, &layer.post_norm)?;
        let [gate, up] = self.project(index, &normed, [Place::Gate, Place::Up], rows)?;
        let active = swiglu::forward(&E::rounded(gate), &E::rounded(up));
        let [y] = self.project(index, &active, [Place::Down], rows)?;
        residual::add(x, &y);
        Ok(())
    }
}

impl CpuDecoder {
    /// Quantises the matrices of a causal language model to blocks; rows are quantised to 8 bits in products.
    ///
    /// # Errors
    /// A missing tensor, rows that are not a whole number of blocks, or a reward model.
    pub fn rounded(config: &Config, weights: Weights, kind: BlockType) -> Result<Self> {
        Ok(Self { parts: Parts::rounded(config, weights, kind)?, elements: PhantomData })
    }
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

    fn forward(
        &self,
        feeds: &mut [Feed<'_, PagedCache<E>>],
        predictions: &mut Predictions,
    ) -> Result<()> {
        awake(|| self.read(feeds, &mut predictions.logits))
    }

    fn page(&self) -> usize {
        cache::PAGE
    }

    fn vocab_size(&self) -> usize {
        self.parts.config.vocab_size
    }
}

impl<E: Element> States for CpuDecoder<E> {
    fn states(&self, feeds: &mut [Feed<'_, PagedCache<E>>]) -> Result<Vec<f32>> {
        let eps = self.parts.config.rms_norm_eps as f32;
        let x = awake(|| self.residuals(feeds))?;
        Ok(cpu::with_slice(&self.parts.norm, |weight| norm::forward(&x, weight, eps))?)
    }
}

impl<E: Element> CpuDecoder<E> {
    /// The residual stream after the last block, `[M, D]`.
    fn residuals(&self, feeds: &mut [Feed<'_, PagedCache<E>>]) -> Result<Vec<f32>> {
        let parts = &self.parts;
        let (mut places, mut adapted) = (Vec::new(), Adapted::default());
        let mut x = Vec::new();
        for (index, feed) in feeds.iter_mut().enumerate() {
            parts.check_tokens(feed.tokens)?;
            let first = feed.cache.extend(feed.tokens.len());
            adapted.push(places.len()..places.len() + feed.tokens.len(), feed.adaptation);
            places.extend((0..feed.tokens.len()).map(|offset| (index, first + offset)));
            parts.embed::<E>(feed.tokens, &mut x)?;
        }
        let positions: Vec<u32> = places.iter().map(|&(_, position)| position as u32).collect();
        let rotary = Rotary::new(&parts.frequencies, &positions);
        let rows = Rows { places, rotary, adapted };
        for index in 0..parts.layers.len() {
            self.block(index, &mut x, feeds, &rows)?;
        }
        Ok(x)
    }

    fn read(&self, feeds: &mut [Feed<'_, PagedCache<E>>], logits: &mut Vec<f32>) -> Result<()> {
        let x = self.residuals(feeds)?;
        let (parts, width) = (&self.parts, self.parts.config.hidden_size);
        let mut wanted = Vec::with_capacity(feeds.len() * width);
        let mut first = 0;
        for feed in feeds.iter() {
            let rows = feed.wanted.of(feed.tokens.len());
            wanted.extend_from_slice(&x[(first + rows.start) * width..(first + rows.end) * width]);
            first += feed.tokens.len();
        }
        let wanted = self.norm(&wanted, &parts.norm)?;
        [*logits] = Input::new(&wanted).times([&parts.head])?;
        Ok(())
    }
}
