//! Forest attention: a token attends to its own segment up to itself and to all ancestor segments.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp3, D, DType, Device, Layout, Result, Shape, Tensor};

use super::cpu;
use crate::data::forest::{Forest, Span};

/// The attention mask of one packed forest. Built once per micro-batch and shared by all blocks.
#[derive(Clone, Debug)]
pub struct AttentionPlan {
    /// Segments, parents first.
    pub spans: Vec<Span>,
    /// Span indices of each tree.
    pub trees: Vec<std::ops::Range<usize>>,
    /// Number of tokens, `T`.
    pub tokens: usize,
    /// Lists used by a device's kernels.
    #[cfg(feature = "cuda")]
    pub(super) on_device: super::cuda::attention::Kept,
}

impl AttentionPlan {
    /// The plan of a forest.
    pub fn new(forest: &Forest) -> Self {
        let mut trees: Vec<std::ops::Range<usize>> = Vec::with_capacity(forest.trees());
        for (index, span) in forest.spans.iter().enumerate() {
            match trees.get_mut(span.tree) {
                Some(tree) => tree.end = index + 1,
                None => trees.push(index..index + 1),
            }
        }
        Self {
            spans: forest.spans.clone(),
            trees,
            tokens: forest.len(),
            #[cfg(feature = "cuda")]
            on_device: super::cuda::attention::Kept::default(),
        }
    }

    /// Prepares the kernels' lists for `share` query heads per key head in page-locked memory, so that uploading them
    /// needs no synchronisation.
    ///
    /// # Errors
    /// A driver error.
    #[cfg(feature = "cuda")]
    pub(crate) fn stage(&self, share: usize, device: &candle_core::CudaDevice) -> Result<()> {
        super::cuda::attention::stage(self, share, device)
    }

    /// Row ranges visible to the tokens of `span` before their own segment, root first.
    pub fn ancestors(&self, span: usize) -> Vec<std::ops::Range<usize>> {
        let mut ranges = Vec::new();
        let mut next = self.spans[span].parent;
        while let Some(index) = next {
            let span = &self.spans[index];
            ranges.push(span.start..span.start + span.len);
            next = span.parent;
        }
        ranges.reverse();
        ranges
    }

    /// The additive mask `[T, T]` of the plain form: 0 where visible, -inf elsewhere.
    fn mask(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        let t = self.tokens;
        let mut mask = vec![f32::NEG_INFINITY; t * t];
        for (index, span) in self.spans.iter().enumerate() {
            let ancestors = self.ancestors(index);
            for offset in 0..span.len {
                let row = &mut mask[(span.start + offset) * t..][..t];
                ancestors.iter().cloned().for_each(|range| row[range].fill(0.0));
                row[span.start..=span.start + offset].fill(0.0);
            }
        }
        Tensor::from_vec(mask, (t, t), device)?.to_dtype(dtype)
    }
}

/// Softmax attention with grouped key/value heads, scaled by `1/sqrt(E)`.
///
/// # Shapes
/// - `q`: `[T, H, E]`, `k`, `v`: `[T, G, E]` with `G` dividing `H`  →  `[T, H, E]`
///
/// # Errors
/// Shapes that do not match each other or the plan.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, plan: &Arc<AttentionPlan>) -> Result<Tensor> {
    let (t, h, e) = q.dims3()?;
    let (_, g, _) = k.dims3()?;
    if k.dims3()? != (t, g, e) || v.dims3()? != (t, g, e) || h % g != 0 || plan.tokens != t {
        let (k, v) = (k.shape(), v.shape());
        candle_core::bail!(
            "attention over {} tokens got q {:?}, k {k:?}, v {v:?}",
            plan.tokens,
            q.shape()
        );
    }
    if q.device().is_cpu() && q.dtype() == DType::F32 {
        let op = ForestAttention { plan: plan.clone(), log_sum_exp: Mutex::default() };
        return q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op);
    }
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        use super::cuda::attention::{on_cuda, padded, takes};
        if let Some(width) = padded(e).filter(|width| takes(q.dtype(), h / g, *width)) {
            // Zero padding changes neither scores nor the other output columns.
            let wide = |x: &Tensor| x.pad_with_zeros(D::Minus1, 0, width - e);
            let scale = 1.0 / (e as f32).sqrt();
            return on_cuda([&wide(q)?, &wide(k)?, &wide(v)?], scale, plan)?.narrow(
                D::Minus1,
                0,
                e,
            );
        }
        // Scores in bf16 would be too coarse.
        let [q32, k32, v32] = [q, k, v].map(|x| x.to_dtype(DType::F32));
        return plain(&q32?, &k32?, &v32?, plan)?.to_dtype(q.dtype());
    }
    plain(q, k, v, plan)
}

/// The plain form: dense scores, an additive mask, Candle's differentiable softmax.
pub fn plain(q: &Tensor, k: &Tensor, v: &Tensor, plan: &AttentionPlan) -> Result<Tensor> {
    let (t, h, e) = q.dims3()?;
    let (_, g, _) = k.dims3()?;
    let heads = |x: &Tensor| -> Result<Tensor> {
        let x = x.unsqueeze(2)?.broadcast_as((t, g, h / g, e))?.reshape((t, h, e))?;
        x.transpose(0, 1)?.contiguous()
    };
    let q = q.transpose(0, 1)?.contiguous()?; // [H, T, E]
    let scores = (q.matmul(&heads(k)?.t()?)? / (e as f64).sqrt())?; // [H, T, T]
    let scores = scores.broadcast_add(&plan.mask(q.dtype(), q.device())?)?;
    let probs = candle_nn::ops::softmax(&scores, D::Minus1)?;
    probs.matmul(&heads(v)?)?.transpose(0, 1)?.contiguous()
}

/// The CPU form. The forward keeps one log-sum-exp per (head, token) for the backward.
struct ForestAttention {
    plan: Arc<AttentionPlan>,
    log_sum_exp: Mutex<Vec<f32>>,
}

impl CustomOp3 for ForestAttention {
    fn name(&self) -> &'static str {
        "forest-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, heads, width) = q_layout.shape().dims3()?;
        let groups = k_layout.shape().dims3()?.1;
        let inputs = cpu::attention::Inputs {
            plan: &self.plan,
            heads,
            groups,
            width,
            q: cpu::slice(q, q_layout)?,
            k: cpu::slice(k, k_layout)?,
            v: cpu::slice(v, v_layout)?,
        };
        let (out, log_sum_exp) = cpu::attention::forward(&inputs);
        match self.log_sum_exp.lock() {
            Ok(mut kept) => *kept = log_sum_exp,
            Err(poisoned) => *poisoned.into_inner() = log_sum_exp,
        }
        Ok((CpuStorage::F32(out), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (_, heads, width) = q.dims3()?;
        let groups = k.dims3()?.1;
        let d_out = d_out.contiguous()?;
        let kept = match self.log_sum_exp.lock() {
            Ok(kept) => kept,
            Err(poisoned) => poisoned.into_inner(),
        };
        let grads = cpu::with_slice::<f32, _>(q, |q| {
            cpu::with_slice(k, |k| {
                cpu::with_slice(v, |v| {
                    cpu::with_slice(out, |out| {
                        cpu::with_slice(&d_out, |d_out| {
                            let inputs = cpu::attention::Inputs {
                                plan: &self.plan,
                                heads,
                                groups,
                                width,
                                q,
                                k,
                                v,
                            };
                            cpu::attention::backward(&inputs, &kept, out, d_out)
                        })
                    })
                })
            })
        })?????;
        let [dq, dk, dv] = grads;
        let device = q.device();
        Ok((
            Some(Tensor::from_vec(dq, q.shape(), device)?),
            Some(Tensor::from_vec(dk, k.shape(), device)?),
            Some(Tensor::from_vec(dv, v.shape(), device)?),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tree::{Role, Segment, Tree};
    use crate::ops::linear::tests::{gradients_agree, random};

    fn forest(trees: &[&[(Option<usize>, usize)]]) -> Forest {
        let trees: Vec<Tree> = trees
            .iter()
            .map(|segments| Tree {
                segments: segments
                    .iter()
                    .map(|&(parent, len)| Segment {
                        parent,
                        tokens: vec![0; len],
                        roles: vec![Role::Content; len],
                    })
                    .collect(),
                ..Tree::default()
            })
            .collect();
        Forest::pack(&trees).unwrap()
    }

    fn check(trees: &[&[(Option<usize>, usize)]], heads: usize, groups: usize, width: usize) {
        let plan = Arc::new(AttentionPlan::new(&forest(trees)));
        let t = plan.tokens;
        let inputs = [
            random(1, (t, heads, width)),
            random(2, (t, groups, width)),
            random(3, (t, groups, width)),
        ];
        gradients_agree(
            &inputs,
            |x| attention(&x[0], &x[1], &x[2], &plan),
            |x| plain(&x[0], &x[1], &x[2], &plan),
        );
    }

    #[test]
    fn both_forms_agree_on_trees_of_any_shape() {
        check(&[&[(None, 5)]], 2, 1, 4);
        check(&[&[(None, 1)], &[(None, 3), (Some(0), 2), (Some(0), 1)]], 4, 2, 8);
        check(&[&[(None, 0), (Some(0), 3), (Some(0), 2)]], 2, 2, 4);
        check(
            &[&[(None, 4), (Some(0), 3), (Some(1), 2), (Some(1), 1), (Some(0), 6)], &[(None, 9)]],
            3,
            1,
            6,
        );
    }

    #[test]
    fn both_forms_agree_across_tiles() {
        check(&[&[(None, 150), (Some(0), 70), (Some(0), 131)]], 2, 1, 8);
    }
}
