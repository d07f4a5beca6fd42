//! The forward pass of generation in plain Candle: correct on every device, one sequence's attention at a time.

use std::sync::Arc;

use candle_core::{D, DType, Device, Tensor};

use super::adaptation::{Adapted, Place};
use super::decode::{Decoder, Feed};
use super::parts::Parts;
use crate::error::Result;
use crate::model::{Config, Weights};
use crate::ops::{self, Rotary};

/// Keys and values of one segment: one pair of `[len, G, E]` a layer.
#[derive(Debug)]
pub struct TensorCache {
    parent: Option<Arc<Self>>,
    start: usize,
    len: usize,
    layers: Vec<Option<[Tensor; 2]>>,
}

impl TensorCache {
    fn end(&self) -> usize {
        self.start + self.len
    }

    /// Adds keys and values of new tokens, and returns those of all that is visible.
    fn grow(&mut self, layer: usize, new: [Tensor; 2]) -> Result<[Tensor; 2]> {
        let old = &mut self.layers[layer];
        *old = Some(match old.take() {
            Some([keys, values]) => {
                [Tensor::cat(&[&keys, &new[0]], 0)?, Tensor::cat(&[&values, &new[1]], 0)?]
            }
            None => new,
        });
        let seen = self.gather(layer)?;
        let all =
            |part: usize| Tensor::cat(&seen.iter().map(|pair| &pair[part]).collect::<Vec<_>>(), 0);
        Ok([all(0)?, all(1)?])
    }

    /// Keys and values of all that is visible, the root's first.
    fn gather(&self, layer: usize) -> Result<Vec<[Tensor; 2]>> {
        self.gather_before(layer, usize::MAX)
    }

    fn gather_before(&self, layer: usize, end: usize) -> Result<Vec<[Tensor; 2]>> {
        let mut parts = match &self.parent {
            Some(parent) => parent.gather_before(layer, end.min(self.start))?,
            None => Vec::new(),
        };
        let visible = end.min(self.end()).saturating_sub(self.start);
        if let (Some([keys, values]), 1..) = (&self.layers[layer], visible) {
            parts.push([cut(keys, visible)?, cut(values, visible)?]);
        }
        Ok(parts)
    }
}

/// The first `count` rows at most.
fn cut(rows: &Tensor, count: usize) -> Result<Tensor> {
    Ok(rows.narrow(0, 0, count.min(rows.dim(0)?))?)
}

/// A causal language model on any device.
#[derive(Clone, Debug)]
pub struct PlainDecoder {
    parts: Parts,
    device: Device,
    dtype: DType,
}

impl PlainDecoder {
    /// Takes the weights of a causal language model. They are shared, not copied.
    ///
    /// # Errors
    /// A missing tensor, or a reward model.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        let parts = Parts::new(config, weights)?;
        let embedding = parts.embedding.dense()?;
        let (device, dtype) = (embedding.device().clone(), embedding.dtype());
        Ok(Self { parts, device, dtype })
    }

    /// The type of its matrices.
    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// The product of rows with a projection of a block, adapters and bias added.
    fn project(
        &self,
        index: usize,
        place: Place,
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

    fn block(
        &self,
        index: usize,
        x: &Tensor,
        feeds: &mut [Feed<'_, TensorCache>],
        (rotary, adapted): (&Rotary, &Adapted<'_>),
    ) -> Result<Tensor> {
        let (config, layer) = (&self.parts.config, &self.parts.layers[index]);
        let rows = x.dim(0)?;
        let normed = ops::rms_norm(x, &layer.input_norm, config.rms_norm_eps)?;
        let heads = |place: Place, heads: usize| -> Result<Tensor> {
            let y = self.project(index, place, &normed, adapted)?;
            Ok(y.reshape((rows, heads, config.head_dim))?)
        };
        let q = ops::rope(&heads(Place::Q, config.num_attention_heads)?, rotary)?;
        let k = ops::rope(&heads(Place::K, config.num_key_value_heads)?, rotary)?;
        let v = heads(Place::V, config.num_key_value_heads)?;
        let mut mixed = Vec::with_capacity(feeds.len());
        let mut first = 0;
        for feed in feeds.iter_mut() {
            let count = feed.tokens.len();
            let own = [k.narrow(0, first, count)?, v.narrow(0, first, count)?];
            let [keys, values] = feed.cache.grow(index, own)?;
            mixed.push(self.attend(&q.narrow(0, first, count)?, &keys, &values)?);
            first += count;
        }
        let mixed = Tensor::cat(&mixed, 0)?;
        let x = (x + self.project(index, Place::O, &mixed, adapted)?)?;
        let normed = ops::rms_norm(&x, &layer.post_norm, config.rms_norm_eps)?;
        let active = ops::swiglu(
            &self.project(index, Place::Gate, &normed, adapted)?,
            &self.project(index, Place::Up, &normed, adapted)?,
        )?;
        Ok((&x + self.project(index, Place::Down, &active, adapted)?)?)
    }

    /// Causal attention of the last rows of a sequence over all of it.
    ///
    /// # Shapes
    /// - `q`: `[M, H, E]`, `keys`, `values`: `[T, G, E]`  →  `[M, H·E]`
    fn attend(&self, q: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
        let ((m, h, e), (t, g, _)) = (q.dims3()?, keys.dims3()?);
        // Row r of head group i stands at r · (H/G) + i, so that the shared keys need no copies.
        let q = q.reshape((m, g, h / g, e))?.permute((1, 0, 2, 3))?.contiguous()?;
        let q = q.reshape((g, m * (h / g), e))?;
        let keys = keys.permute((1, 2, 0))?.contiguous()?;
        let values = values.permute((1, 0, 2))?.contiguous()?;
        let scores = (q.matmul(&keys)? / (e as f64).sqrt())?;
        let hidden = (0..m).flat_map(|row| {
            (0..h / g).flat_map(move |_| {
                (0..t).map(move |column| if column + m > row + t { f32::NEG_INFINITY } else { 0.0 })
            })
        });
        let mask = Tensor::from_iter(hidden, &self.device)?.reshape((1, m * (h / g), t))?;
        let probs = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
        let mixed = probs.matmul(&values)?.reshape((g, m, h / g, e))?;
        Ok(mixed.permute((1, 0, 2, 3))?.contiguous()?.reshape((m, h * e))?)
    }
}

impl Decoder for PlainDecoder {
    type Cache = TensorCache;

    fn cache(&self, parent: Option<(Arc<TensorCache>, usize)>) -> TensorCache {
        let (parent, start) = match parent {
            Some((parent, shared)) => (Some(parent), shared),
            None => (None, 0),
        };
        TensorCache { parent, start, len: 0, layers: vec![None; self.parts.layers.len()] }
    }

    fn truncate(&self, cache: &mut TensorCache, end: usize) -> Result<()> {
        cache.len = cache.len.min(end.saturating_sub(cache.start));
        for layer in &mut cache.layers {
            *layer = match layer.take() {
                Some([keys, values]) if cache.len > 0 => {
                    Some([cut(&keys, cache.len)?, cut(&values, cache.len)?])
                }
                _ => None,
            };
        }
        Ok(())
    }

    fn forward(&self, feeds: &mut [Feed<'_, TensorCache>], logits: &mut Vec<f32>) -> Result<()> {
        let parts = &self.parts;
        let (mut tokens, mut positions, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
        let mut adapted = Adapted::default();
        for feed in feeds.iter_mut() {
            parts.check_tokens(feed.tokens)?;
            let first = feed.cache.end() as u32;
            let rows = feed.wanted.of(feed.tokens.len());
            wanted.extend(rows.map(|row| (tokens.len() + row) as u32));
            adapted.push(tokens.len()..tokens.len() + feed.tokens.len(), feed.adaptation);
            tokens.extend_from_slice(feed.tokens);
            positions.extend((0..feed.tokens.len() as u32).map(|offset| first + offset));
            feed.cache.len += feed.tokens.len();
        }
        let rotary = Rotary::new(&parts.frequencies, &positions);
        let mut x =
            parts.embedding.dense()?.index_select(&Tensor::new(tokens, &self.device)?, 0)?;
        for index in 0..parts.layers.len() {
            x = self.block(index, &x, feeds, (&rotary, &adapted))?;
        }
        if wanted.is_empty() {
            logits.clear();
            return Ok(());
        }
        let last = x.index_select(&Tensor::new(wanted, &self.device)?, 0)?;
        let last = ops::rms_norm(&last, &parts.norm, parts.config.rms_norm_eps)?;
        let predicted = ops::linear(&last, parts.head.dense()?, None)?.to_dtype(DType::F32)?;
        *logits = predicted.flatten_all()?.to_vec1()?;
        Ok(())
    }

    fn vocab_size(&self) -> usize {
        self.parts.config.vocab_size
    }
}
