//! The decoder's forward pass as a graph of ops for any device: on a GPU, caches, predictions and draws stay on the
//! device.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::adaptation::{Adapted, Place};
use super::decode::{Decoder, Feed, Predictions, Wanted};
use super::parts::Parts;
use super::sampler::draw_rows;
use super::states::States;
use crate::error::{Error, Result};
use crate::model::params::count;
use crate::model::{Config, Weights};
use crate::ops::cached::{CachePlan, PAGE, Page, Sequence, Span};
use crate::ops::cuda::device::out_of_memory;
use crate::ops::{self, Rotary, embed, head, norm, rope};

/// KV cache of one segment, in pages.
#[derive(Debug)]
pub struct TensorCache {
    parent: Option<Arc<Self>>,
    start: usize,
    len: usize,
    pages: Vec<Page>,
}

impl TensorCache {
    fn end(&self) -> usize {
        self.start + self.len
    }

    /// All positions visible before `end`, the root's first.
    fn spans(&self, end: usize) -> Vec<Span> {
        let mut spans = match &self.parent {
            Some(parent) => parent.spans(end.min(self.start)),
            None => Vec::new(),
        };
        let visible = end.min(self.end()).saturating_sub(self.start);
        spans.extend(self.pages.iter().enumerate().map_while(|(index, page)| {
            let count = visible.saturating_sub(index * PAGE).min(PAGE);
            let position = self.start + index * PAGE;
            (count > 0).then(|| Span { page: page.clone(), slot: 0, position, count })
        }));
        spans
    }
}

/// A causal language model on any device. The residual stream is f32, as in training.
#[derive(Clone, Debug)]
pub struct PlainDecoder {
    parts: Parts,
    device: Device,
    /// Dtype of its matrices.
    dtype: DType,
    /// Dtype of product inputs; on the CPU, rows are rounded within products.
    inner: DType,
}

/// State shared by the blocks of one forward pass.
struct Pass<'a> {
    rotary: Rotary,
    adapted: Adapted<'a>,
    plan: CachePlan,
}

impl PlainDecoder {
    /// Wraps the weights of a causal language model. They are shared, not copied.
    ///
    /// # Errors
    /// A missing tensor, or a reward model.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        let parts = Parts::new(config, weights)?;
        let embedding = parts.embedding.dense()?;
        let (device, dtype) = (embedding.device().clone(), embedding.dtype());
        let inner = if device.is_cpu() { DType::F32 } else { dtype };
        Ok(Self { parts, device, dtype, inner })
    }

    /// Dtype of its matrices.
    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Device of its matrices.
    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    fn page(&self) -> Result<Page> {
        let config = &self.parts.config;
        let shape = (self.parts.layers.len(), config.num_key_value_heads, config.head_dim);
        Ok(Page::new(shape, self.inner, &self.device)?)
    }

    /// Product of rows with a projection of a block, with adapters and bias added.
    fn project(
        &self,
        (index, place): (usize, Place),
        x: &Tensor,
        adapted: &Adapted<'_>,
    ) -> Result<Tensor> {
        let layer = &self.parts.layers[index];
        let y = ops::linear(x, layer.matrix(place).dense()?, None)?;
        let y = adapted.graph((index, place), layer, x, y)?;
        match layer.bias(place) {
            Some(bias) => Ok(ops::linear::with_bias(&y, bias)?),
            None => Ok(y),
        }
    }

    /// One transformer block. `x`: `[M, D]`.
    fn block(&self, index: usize, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let (config, layer) = (&self.parts.config, &self.parts.layers[index]);
        let Pass { rotary, adapted, plan } = pass;
        let (rows, eps) = (x.dim(0)?, config.rms_norm_eps);
        let project = |place: Place, x: &Tensor| self.project((index, place), x, adapted);
        let normed = norm::rms_norm_in(x, &layer.input_norm, eps, self.inner)?;
        let heads = |place: Place, heads: usize| -> Result<Tensor> {
            Ok(project(place, &normed)?.reshape((rows, heads, config.head_dim))?)
        };
        let q = rope::rope_in_place(&heads(Place::Q, config.num_attention_heads)?, rotary)?;
        let k = rope::rope_in_place(&heads(Place::K, config.num_key_value_heads)?, rotary)?;
        plan.store(index, &k, &heads(Place::V, config.num_key_value_heads)?)?;
        let seen = project(Place::O, &plan.attend(index, &q)?.flatten_from(1)?)?;
        let [x, normed] = norm::residual_norm((x, &seen), &layer.post_norm, eps, self.inner)?;
        let active = ops::swiglu(&project(Place::Gate, &normed)?, &project(Place::Up, &normed)?)?;
        Ok(ops::residual(&x, &project(Place::Down, &active)?)?)
    }

    /// Appends the feeds' tokens to their caches and prepares the pass; also returns the tokens.
    fn prepare<'a>(&self, feeds: &mut [Feed<'a, TensorCache>]) -> Result<(Vec<u32>, Pass<'a>)> {
        let config = &self.parts.config;
        let (mut tokens, mut positions, mut adapted) = (Vec::new(), Vec::new(), Adapted::default());
        let mut sequences = Vec::with_capacity(feeds.len());
        for feed in feeds {
            self.parts.check_tokens(feed.tokens)?;
            let new = feed.tokens.len();
            adapted.push(tokens.len()..tokens.len() + new, feed.adaptation);
            tokens.extend_from_slice(feed.tokens);
            positions.extend((feed.cache.end()..feed.cache.end() + new).map(|at| at as u32));
            while feed.cache.pages.len() * PAGE < feed.cache.len + new {
                feed.cache.pages.push(self.page()?);
            }
            feed.cache.len += new;
            sequences.push(Sequence { spans: feed.cache.spans(usize::MAX), new });
        }
        let rotary = Rotary::new(&self.parts.frequencies, &positions);
        let share = config.num_attention_heads / config.num_key_value_heads.max(1);
        Ok((tokens, Pass { rotary, adapted, plan: CachePlan::new(sequences, share) }))
    }

    /// Adds memory usage to an out-of-memory error of a pass over this many caches.
    fn full(&self, error: Error, caches: usize) -> Error {
        let weights = count(&self.parts.config) * self.dtype.size_in_bytes();
        let what = format!("while {caches} answers were written or prompts read");
        let ways = "dtype = \"bf16\", shorter prompts, a lower max_new_tokens, or a GPU that nobody else uses: caches may fill a \
                    quarter of what was free when the model was loaded";
        out_of_memory(error, &what, [("weights", weights as u64)], ways)
    }

    /// The residual stream after the last block, `[M, D]`.
    fn residuals(&self, feeds: &mut [Feed<'_, TensorCache>]) -> Result<Tensor> {
        let (tokens, pass) = self.prepare(feeds)?;
        let mut x = embed::embed(self.parts.embedding.dense()?, &tokens)?;
        for index in 0..self.parts.layers.len() {
            x = self.block(index, &x, &pass)?;
        }
        Ok(x)
    }

    /// Logits after the rows `wanted` of `x`, `[R, V]`.
    fn predict(&self, x: &Tensor, wanted: Vec<u32>) -> Result<Tensor> {
        let parts = &self.parts;
        let rows = x.index_select(&Tensor::new(wanted, &self.device)?, 0)?;
        let rows = norm::rms_norm_in(&rows, &parts.norm, parts.config.rms_norm_eps, self.inner)?;
        Ok(head::logits(&rows, parts.head.dense()?)?)
    }
}

impl States for PlainDecoder {
    fn states(&self, feeds: &mut [Feed<'_, TensorCache>]) -> Result<Vec<f32>> {
        let (norm, eps) = (&self.parts.norm, self.parts.config.rms_norm_eps);
        let caches = feeds.len();
        let mut states = || -> Result<Vec<f32>> {
            let states = ops::rms_norm(&self.residuals(feeds)?, norm, eps)?;
            Ok(states.flatten_all()?.to_vec1()?)
        };
        states().map_err(|error| self.full(error, caches))
    }
}

impl Decoder for PlainDecoder {
    type Cache = TensorCache;

    fn cache(&self, parent: Option<(Arc<TensorCache>, usize)>) -> TensorCache {
        let (parent, start) = match parent {
            Some((parent, shared)) => (Some(parent), shared),
            None => (None, 0),
        };
        TensorCache { parent, start, len: 0, pages: Vec::new() }
    }

    fn truncate(&self, cache: &mut TensorCache, end: usize) -> Result<()> {
        cache.len = cache.len.min(end.saturating_sub(cache.start));
        cache.pages.truncate(cache.len.div_ceil(PAGE));
        Ok(())
    }

    fn forward(
        &self,
        feeds: &mut [Feed<'_, TensorCache>],
        predictions: &mut Predictions,
    ) -> Result<()> {
        let caches = feeds.len();
        self.predict_all(feeds, predictions).map_err(|error| self.full(error, caches))
    }

    fn page(&self) -> usize {
        PAGE
    }

    fn draws(&self) -> bool {
        true
    }

    fn vocab_size(&self) -> usize {
        self.parts.config.vocab_size
    }
}

impl PlainDecoder {
    /// One forward pass.
    fn predict_all(
        &self,
        feeds: &mut [Feed<'_, TensorCache>],
        predictions: &mut Predictions,
    ) -> Result<()> {
        // Rows to sample from come first: all rows meet the head in one product.
        let (mut rows, mut wanted, mut chances) = (Vec::new(), Vec::new(), Vec::new());
        let mut first = 0;
        for feed in feeds.iter() {
            let own = feed.wanted.of(feed.tokens.len()).map(|row| (first + row) as u32);
            if let Wanted::Token(chance, allowed) = feed.wanted {
                chances.push((chance, allowed));
                rows.extend(own);
            } else {
                wanted.extend(own);
            }
            first += feed.tokens.len();
        }
        let x = self.residuals(feeds)?;
        *predictions = Predictions::default();
        let (drawn, left) = (rows.len(), wanted.len());
        rows.append(&mut wanted);
        if rows.is_empty() {
            return Ok(());
        }
        let logits = self.predict(&x, rows)?;
        if left > 0 {
            predictions.logits = logits.narrow(0, drawn, left)?.flatten_all()?.to_vec1()?;
        }
        if drawn > 0 {
            predictions.draws = draw_rows(&logits.narrow(0, 0, drawn)?, &chances)?;
        }
        Ok(())
    }
}
