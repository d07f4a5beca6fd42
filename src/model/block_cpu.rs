//! The block on the CPU with a hand-written backward.
//!
//! Same mathematics as [`Block::forward`], on plain buffers: the products accumulate weight gradients directly,
//! residual sums are in place, and cheap steps (norms, the activation) are recomputed rather than kept. The graph form
//! is its reference in tests, and runs on other devices. Rationale: `docs/decisions/0006`.
//!
//! In bf16 all product inputs are bf16: weights, normed rows, queries, keys, values, attention outputs, the MLP's inner
//! rows, and the gradients of each product's output. The residual stream, sums, norms, softmax and weight gradients are
//! f32.

use candle_core::{DType, Tensor};
use half::bf16;

use super::block::{Block, Layout};
use super::gradients::Gradients;
use super::lora::Masks;
use super::projection::Projection;
use crate::error::Result;
use crate::ops::cpu::Element;
use crate::ops::cpu::attention::{self, Inputs};
use crate::ops::{cpu, norm, residual, rope, swiglu};

/// Activations kept for a block's backward, besides the block's input.
#[derive(Debug)]
pub(super) enum Kept {
    F32(Activations<f32>),
    Bf16(Activations<bf16>),
}

#[derive(Debug)]
pub(super) struct Activations<E> {
    /// Queries `[T, H, E]` and keys `[T, G, E]` after RoPE, and values `[T, G, E]`.
    q: Vec<E>,
    k: Vec<E>,
    v: Vec<E>,
    /// Attention output, `[T, H, E]`, and its log-sum-exps.
    seen: Vec<E>,
    log_sum_exp: Vec<f32>,
    /// The residual stream after attention, `[T, D]`.
    middle: Vec<f32>,
    /// `[T, F]` each.
    gate: Vec<E>,
    up: Vec<E>,
}

impl Block {
    /// The block over a packed forest, in the dtype of its weights. Shapes: `[T, D] -> [T, D]`.
    pub(super) fn forward_cpu(&self, x: &[f32], layout: &Layout) -> Result<(Vec<f32>, Kept)> {
        if self.dtype == DType::BF16 {
            let (y, kept) = self.forward_in::<bf16>(x, layout)?;
            return Ok((y, Kept::Bf16(kept)));
        }
        let (y, kept) = self.forward_in::<f32>(x, layout)?;
        Ok((y, Kept::F32(kept)))
    }

    fn forward_in<E: Element>(
        &self,
        x: &[f32],
        layout: &Layout,
    ) -> Result<(Vec<f32>, Activations<E>)> {
        let masks = layout.masks.as_deref();
        let normed = self.norm::<E>(x, &self.input_norm)?;
        let rotated = |projection: &Projection| -> Result<Vec<E>> {
            let mut y = projection.apply(&normed, masks)?;
            rope::rotate(&mut y, &layout.rotary, 1.0);
            Ok(E::rounded(y))
        };
        let (q, k) = (rotated(&self.q)?, rotated(&self.k)?);
        let v = E::rounded(self.v.apply(&normed, masks)?);
        drop(normed);
        let (seen, log_sum_exp) = attention::forward(&self.inputs(&q, &k, &v, layout));
        let mut middle = self.o.apply(&seen, masks)?;
        residual::add(&mut middle, x);
        let normed = self.norm::<E>(&middle, &self.post_norm)?;
        let gate = E::rounded(self.gate.apply(&normed, masks)?);
        let up = E::rounded(self.up.apply(&normed, masks)?);
        drop(normed);
        let mut y = self.down.apply(&swiglu::forward(&gate, &up), masks)?;
        residual::add(&mut y, &middle);
        Ok((y, Activations { q, k, v, seen, log_sum_exp, middle, gate, up }))
    }

    /// Backpropagates from the block's output to its input `x`, `[T, D]` each; accumulates the gradients of trained
    /// tensors.
    pub(super) fn backward_cpu(
        &self,
        (x, kept): (&[f32], Kept),
        d_y: Vec<f32>,
        layout: &Layout,
        grads: &mut Gradients,
    ) -> Result<Vec<f32>> {
        match kept {
            Kept::F32(kept) => self.backward_in((x, kept), d_y, layout, grads),
            Kept::Bf16(kept) => self.backward_in((x, kept), d_y, layout, grads),
        }
    }

    fn backward_in<E: Element>(
        &self,
        (x, kept): (&[f32], Activations<E>),
        d_y: Vec<f32>,
        layout: &Layout,
        grads: &mut Gradients,
    ) -> Result<Vec<f32>> {
        let Activations { q, k, v, seen, log_sum_exp, middle, gate, up } = kept;
        let masks = layout.masks.as_deref();
        let d_middle = self.feed_forward_backward((&middle, gate, up), d_y, masks, grads)?;

        let d = E::rounded_from(&d_middle);
        let mut d_seen = Vec::new();
        self.o.backward((&seen, masks), &d, &mut d_seen, grads)?;
        drop(d);
        let inputs = self.inputs(&q, &k, &v, layout);
        let [mut d_q, mut d_k, d_v] = attention::backward(&inputs, &log_sum_exp, &seen, &d_seen);
        drop((q, k, v, seen, d_seen));
        rope::rotate(&mut d_q, &layout.rotary, -1.0);
        rope::rotate(&mut d_k, &layout.rotary, -1.0);

        let normed = self.norm::<E>(x, &self.input_norm)?;
        let mut d_normed = Vec::new();
        for (projection, d) in [(&self.q, d_q), (&self.k, d_k), (&self.v, d_v)] {
            projection.backward((&normed, masks), &E::rounded(d), &mut d_normed, grads)?;
        }
        self.norm_backward((x, &self.input_norm, "input_layernorm"), &d_normed, d_middle, grads)
    }

    /// Backward of the MLP half; returns the gradient of the residual stream after attention.
    fn feed_forward_backward<E: Element>(
        &self,
        (middle, gate, up): (&[f32], Vec<E>, Vec<E>),
        d_y: Vec<f32>,
        masks: Option<&Masks>,
        grads: &mut Gradients,
    ) -> Result<Vec<f32>> {
        let d = E::rounded_from(&d_y);
        let mut d_hidden = Vec::new();
        self.down.backward((&swiglu::forward(&gate, &up), masks), &d, &mut d_hidden, grads)?;
        drop(d);
        let (d_gate, d_up) = swiglu::gradients(&gate, &up, &d_hidden);
        drop((gate, up, d_hidden));
        let normed = self.norm::<E>(middle, &self.post_norm)?;
        let mut d_normed = Vec::new();
        for (projection, d) in [(&self.gate, &d_gate), (&self.up, &d_up)] {
            projection.backward((&normed, masks), d, &mut d_normed, grads)?;
        }
        let place = (middle, &self.post_norm, "post_attention_layernorm");
        self.norm_backward(place, &d_normed, d_y, grads)
    }

    /// Adds the gradient through a norm to that of the residual path.
    fn norm_backward(
        &self,
        (x, weight, name): (&[f32], &Tensor, &str),
        d_normed: &[f32],
        mut past: Vec<f32>,
        grads: &mut Gradients,
    ) -> Result<Vec<f32>> {
        let (d_x, d_weight) = cpu::with_slice(weight, |weight| {
            norm::gradients(x, weight, d_normed, self.eps as f32)
        })?;
        residual::add(&mut past, &d_x);
        if weight.is_variable() {
            let d_weight = Tensor::from_vec(d_weight, weight.shape(), weight.device())?;
            grads.add(&format!("{}{name}.weight", self.prefix), &d_weight)?;
        }
        Ok(past)
    }

    fn norm<E: Element>(&self, x: &[f32], weight: &Tensor) -> Result<Vec<E>> {
        Ok(cpu::with_slice(weight, |weight| norm::forward(x, weight, self.eps as f32))?)
    }

    fn inputs<'a, E>(
        &self,
        q: &'a [E],
        k: &'a [E],
        v: &'a [E],
        layout: &'a Layout,
    ) -> Inputs<'a, E> {
        let row = layout.attention.tokens.max(1) * self.head_dim;
        Inputs {
            plan: &layout.attention,
            heads: q.len() / row,
            groups: k.len() / row,
            width: self.head_dim,
            q,
            k,
            v,
        }
    }
}
