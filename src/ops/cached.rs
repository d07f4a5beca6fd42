//! Attention of new tokens over a paged KV cache, for generation. No gradients.

use candle_core::{D, DType, Device, Result, Tensor, bail};

#[cfg(feature = "cuda")]
use super::cuda::cached::Uploaded;

/// Positions per page.
pub const PAGE: usize = 64;

/// Keys and values of up to [`PAGE`] consecutive positions of a sequence in all layers, `[L, PAGE, 2, G, E]`. Clones
/// share storage: a writer must have its positions to itself.
#[derive(Clone, Debug)]
pub struct Page(Tensor);

impl Page {
    /// An empty page for `layers` layers of `groups` key heads of dimension `width`.
    ///
    /// # Errors
    /// A device error.
    pub fn new(
        (layers, groups, width): (usize, usize, usize),
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Ok(Self(Tensor::zeros((layers, PAGE, 2, groups, width), dtype, device)?))
    }

    /// The whole tensor.
    #[cfg(feature = "cuda")]
    pub(super) fn tensor(&self) -> &Tensor {
        &self.0
    }
}

/// Consecutive positions of a sequence in one page.
#[derive(Clone, Debug)]
pub struct Span {
    /// Their page.
    pub page: Page,
    /// Slot of the first position in the page.
    pub slot: usize,
    /// First position in the sequence.
    pub position: usize,
    /// Number of positions.
    pub count: usize,
}

/// Positions visible to the new tokens of one sequence: all up to the last of them, in order.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// The positions from 0 on, without gaps.
    pub spans: Vec<Span>,
    /// How many of them, at the end, are new.
    pub new: usize,
}

impl Sequence {
    /// Number of positions.
    pub(super) fn len(&self) -> usize {
        self.spans.last().map_or(0, |span| span.position + span.count)
    }

    /// Runs of new tokens with their page and first slot, in order.
    fn new_runs(&self) -> impl Iterator<Item = (&Page, usize, usize)> {
        let first = self.len() - self.new;
        self.spans.iter().filter_map(move |span| {
            let skip = first.saturating_sub(span.position);
            (skip < span.count).then(|| (&span.page, span.slot + skip, span.count - skip))
        })
    }
}

/// The sequences of one forward pass. Built once and shared by all blocks.
#[derive(Debug)]
pub struct CachePlan {
    pub(super) sequences: Vec<Sequence>,
    /// Total number of new tokens, `M`.
    pub(super) tokens: usize,
    /// Query heads per key head, `H/G`.
    pub(super) share: usize,
    #[cfg(feature = "cuda")]
    pub(super) on_device: std::sync::OnceLock<Uploaded>,
}

impl CachePlan {
    /// A plan for these sequences, with `share` query heads per key head.
    pub fn new(sequences: Vec<Sequence>, share: usize) -> Self {
        Self {
            tokens: sequences.iter().map(|sequence| sequence.new).sum(),
            sequences,
            share: share.max(1),
            #[cfg(feature = "cuda")]
            on_device: std::sync::OnceLock::new(),
        }
    }

    /// Writes keys and values of the new tokens into their pages.
    ///
    /// # Shapes
    /// - `k`, `v`: `[M, G, E]`, in the pages' dtype
    ///
    /// # Errors
    /// Wrong shapes or dtypes; a device error.
    pub fn store(&self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        let (m, groups, width) = k.dims3()?;
        if v.dims3()? != (m, groups, width) || m != self.tokens {
            let (k, v) = (k.shape(), v.shape());
            bail!("{} new tokens got keys {k:?} and values {v:?}", self.tokens);
        }
        #[cfg(feature = "cuda")]
        if k.device().is_cuda() {
            return super::cuda::cached::store(self, layer, k, v);
        }
        let both = Tensor::stack(&[k, v], 1)?.unsqueeze(0)?; // [1, M, 2, G, E]
        let mut first = 0;
        for (page, slot, count) in self.sequences.iter().flat_map(Sequence::new_runs) {
            let rows = both.narrow(1, first, count)?.contiguous()?;
            page.0.narrow(0, layer, 1)?.slice_set(&rows, 1, slot)?;
            first += count;
        }
        Ok(())
    }

    /// Softmax attention of each new token over its sequence up to itself, scaled by `1/sqrt(E)`. The tokens' own keys
    /// and values must already be stored.
    ///
    /// # Shapes
    /// - `q`: `[M, H, E]` in the pages' dtype → `[M, H, E]`
    ///
    /// # Errors
    /// Wrong shapes; a device error.
    pub fn attend(&self, layer: usize, q: &Tensor) -> Result<Tensor> {
        let (m, heads, width) = q.dims3()?;
        if m != self.tokens || !heads.is_multiple_of(self.share) {
            bail!(
                "{} new tokens, {} heads a key, got queries {:?}",
                self.tokens,
                self.share,
                q.shape()
            );
        }
        #[cfg(feature = "cuda")]
        if q.device().is_cuda() && super::cuda::attention::takes(q.dtype(), self.share, width) {
            return super::cuda::cached::attend(self, layer, q);
        }
        self.attend_plainly(layer, q)?.reshape((m, heads, width))
    }

    /// The plain form, one sequence at a time, in f32.
    fn attend_plainly(&self, layer: usize, q: &Tensor) -> Result<Tensor> {
        let mut mixed = Vec::with_capacity(self.sequences.len());
        let mut first = 0;
        for sequence in self.sequences.iter().filter(|sequence| sequence.new > 0) {
            let rows = q.narrow(0, first, sequence.new)?.to_dtype(DType::F32)?;
            let both = sequence.spans.iter().map(|span| {
                span.page.0.get(layer)?.narrow(0, span.slot, span.count)?.to_dtype(DType::F32)
            });
            let both = Tensor::cat(&both.collect::<Result<Vec<_>>>()?, 0)?; // [T, 2, G, E]
            mixed.push(of_last(&rows, &both.get_on_dim(1, 0)?, &both.get_on_dim(1, 1)?)?);
            first += sequence.new;
        }
        Tensor::cat(&mixed, 0)?.to_dtype(q.dtype())
    }
}

/// Causal attention of the last rows of a sequence over the whole sequence.
///
/// # Shapes
/// - `q`: `[M, H, E]`, `keys`, `values`: `[T, G, E]`  →  `[M, H·E]`
fn of_last(q: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
    let ((m, h, e), (t, g, _)) = (q.dims3()?, keys.dims3()?);
    // Row r of head i in its group is at r · (H/G) + i, so that shared keys need no copies.
    let q = q.reshape((m, g, h / g, e))?.permute((1, 0, 2, 3))?.contiguous()?;
    let q = q.reshape((g, m * (h / g), e))?;
    let keys = keys.permute((1, 2, 0))?.contiguous()?;
    let values = values.permute((1, 0, 2))?.contiguous()?;
    let scores = (q.matmul(&keys)? / (e as f64).sqrt())?;
    let additive = (0..m).flat_map(|row| {
        (0..h / g).flat_map(move |_| {
            (0..t).map(move |column| if column + m > row + t { f32::NEG_INFINITY } else { 0.0 })
        })
    });
    let mask = Tensor::from_iter(additive, q.device())?.reshape((1, m * (h / g), t))?;
    let probs = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
    let mixed = probs.matmul(&values)?.reshape((g, m, h / g, e))?;
    mixed.permute((1, 0, 2, 3))?.contiguous()?.reshape((m, h * e))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::data::forest::Forest;
    use crate::data::tree::{Role, Tree};
    use crate::ops::linear::tests::random;
    use crate::ops::{AttentionPlan, attention};

    /// A prompt of 70 tokens in two pages, shared up to different positions by two answers, read in two passes.
    #[test]
    fn attention_over_pages_matches_forest_attention() {
        let (heads, groups, width, layer) = (4, 2, 8, 1);
        let tokens = |len| (vec![0; len], vec![Role::Content; len]);
        let tree = Tree::siblings(vec![0; 70], vec![tokens(67), tokens(3)], 0);
        let forest = Forest::pack(&[tree]).unwrap();
        let t = forest.len();
        let q = random(1, (t, heads, width));
        let [k, v] = [2, 3].map(|index| random(index, (t, groups, width)));
        let plan = Arc::new(AttentionPlan::new(&forest));
        let expected = attention(&q, &k, &v, &plan).unwrap();

        let page = || Page::new((2, groups, width), DType::F32, &Device::Cpu).unwrap();
        let span =
            |page: &Page, slot, position, count| Span { page: page.clone(), slot, position, count };
        let (prompt, first, second) = ([page(), page()], [page(), page()], page());
        let whole = [span(&prompt[0], 0, 0, 64), span(&prompt[1], 0, 64, 6)];
        let sequence = |spans: &[Span], new| Sequence { spans: spans.to_vec(), new };
        let with = |spans: &[Span]| [&whole[..], spans].concat();
        // New tokens of each pass, and the rows they see.
        let passes = [
            vec![(0..50, sequence(&[span(&prompt[0], 0, 0, 50)], 50))],
            vec![(50..70, sequence(&whole, 20))],
            vec![
                (
                    70..135,
                    sequence(&with(&[span(&first[0], 0, 70, 64), span(&first[1], 0, 134, 1)]), 65),
                ),
                (137..138, sequence(&with(&[span(&second, 0, 70, 1)]), 1)),
            ],
            vec![
                (
                    135..137,
                    sequence(&with(&[span(&first[0], 0, 70, 64), span(&first[1], 0, 134, 3)]), 2),
                ),
                (138..140, sequence(&with(&[span(&second, 0, 70, 3)]), 2)),
            ],
        ];
        for pass in passes {
            let rows = |x: &Tensor| {
                let parts: Vec<Tensor> = pass
                    .iter()
                    .map(|(new, _)| x.narrow(0, new.start, new.len()).unwrap())
                    .collect();
                Tensor::cat(&parts, 0).unwrap()
            };
            let plan = CachePlan::new(
                pass.iter().map(|(_, sequence)| sequence.clone()).collect(),
                heads / groups,
            );
            plan.store(layer, &rows(&k), &rows(&v)).unwrap();
            let found = plan.attend(layer, &rows(&q)).unwrap();
            let apart = (found - rows(&expected)).unwrap().abs().unwrap().max_all().unwrap();
            assert!(apart.to_scalar::<f32>().unwrap() < 1e-6);
        }
    }

    #[test]
    fn rows_that_do_not_match_the_plan_are_refused() {
        let page = Page::new((1, 1, 4), DType::F32, &Device::Cpu).unwrap();
        let spans = vec![Span { page, slot: 0, position: 0, count: 3 }];
        let plan = CachePlan::new(vec![Sequence { spans, new: 2 }], 1);
        let rows = random(1, (3, 1, 4));
        let problem = plan.store(0, &rows, &rows).unwrap_err().to_string();
        assert!(problem.contains("2 new tokens got keys [3, 1, 4]"), "{problem}");
        assert!(plan.attend(0, &rows).is_err());
    }
}
