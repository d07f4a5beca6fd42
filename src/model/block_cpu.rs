//! The block on the CPU, its backward written out by hand.
//!
//! The same mathematics as [`Block::forward`] over plain buffers: gradients of weights are accumulated by the products
//! themselves, residual sums happen in place, and what is cheap (norms, the activation) is computed again rather than
//! kept. The graph form is its twin in the tests and runs on other devices. Why by hand: `docs/decisions/0006`.

use candle_core::Tensor;

use super::block::{Block, Layout, Projection};
use super::gradients::Gradients;
use crate::error::Result;
use crate::ops::cpu::attention::{self, Inputs};
use crate::ops::cpu::matmul::{Mat, Threads, matmul, matmul_into};
use crate::ops::{cpu, linear, norm, residual, rope, swiglu};

/// What a block's backward needs of its forward, besides the block's input.
#[derive(Debug)]
pub(super) struct Kept {
    /// Rotated queries `[T, H, E]`, rotated keys and values `[T, G, E]`.
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// What attention saw, `[T, H, E]`, and its log-sum-exps.
    seen: Vec<f32>,
    log_sum_exp: Vec<f32>,
    /// The sum after attention, `[T, D]`.
    middle: Vec<f32>,
    /// `[T, F]` each.
    gate: Vec<f32>,
    up: Vec<f32>,
}

/// `x` as rows of `width`.
fn rows_of(x: &[f32], width: usize) -> Mat<'_> {
    Mat::new(x, x.len() / width, width)
}

impl Projection {
    fn rows(&self) -> usize {
        self.weight.dims()[0]
    }

    fn width(&self) -> usize {
        self.weight.dims()[1]
    }

    fn with_weight<R>(&self, read: impl FnOnce(Mat<'_>) -> R) -> Result<R> {
        let (rows, width) = (self.rows(), self.width());
        Ok(cpu::with_slice(&self.weight, |weight| read(Mat::new(weight, rows, width)))?)
    }

    /// `x · Wᵀ + b`. Shapes: `[T, I] -> [T, O]`.
    fn apply(&self, x: &[f32]) -> Result<Vec<f32>> {
        Ok(linear::forward(x, &self.weight, self.bias.as_ref())?)
    }

    /// `d_x += d_y · W`. Shapes: `d_y` `[T, O]`, `d_x` `[T, I]`.
    fn pull_back(&self, d_y: &[f32], d_x: &mut Vec<f32>) -> Result<()> {
        let d_y = rows_of(d_y, self.rows());
        self.with_weight(|weight| {
            if d_x.is_empty() {
                *d_x = matmul(d_y, weight, Threads::All);
            } else {
                matmul_into(d_x, d_y, weight, true, Threads::All);
            }
        })
    }

    /// Adds the gradients of weight and bias, where they are trained.
    fn add_gradients(&self, x: &[f32], d_y: &[f32], grads: &mut Gradients) -> Result<()> {
        if self.weight.is_variable() {
            let d_y = rows_of(d_y, self.rows()).t();
            grads.add_product(&self.name, d_y, rows_of(x, self.width()))?;
        }
        match &self.bias {
            Some(bias) if bias.is_variable() => {
                let mut sum = vec![0.0; self.rows()];
                d_y.chunks_exact(sum.len()).for_each(|d_y| cpu::simd::axpy(&mut sum, 1.0, d_y));
                grads.add(&self.bias_name(), Tensor::from_vec(sum, self.rows(), bias.device())?)
            }
            _ => Ok(()),
        }
    }
}

impl Block {
    /// The block over a packed forest. Shapes: `[T, D] -> [T, D]`.
    pub(super) fn forward_cpu(&self, x: &[f32], layout: &Layout) -> Result<(Vec<f32>, Kept)> {
        let normed = self.norm(x, &self.input_norm)?;
        let (mut q, mut k) = (self.q.apply(&normed)?, self.k.apply(&normed)?);
        let v = self.v.apply(&normed)?;
        drop(normed);
        rope::rotate(&mut q, &layout.rotary, 1.0);
        rope::rotate(&mut k, &layout.rotary, 1.0);
        let (seen, log_sum_exp) = attention::forward(&self.inputs(&q, &k, &v, layout));
        let mut middle = self.o.apply(&seen)?;
        residual::add(&mut middle, x);
        let normed = self.norm(&middle, &self.post_norm)?;
        let (gate, up) = (self.gate.apply(&normed)?, self.up.apply(&normed)?);
        drop(normed);
        let mut y = self.down.apply(&swiglu::forward(&gate, &up))?;
        residual::add(&mut y, &middle);
        Ok((y, Kept { q, k, v, seen, log_sum_exp, middle, gate, up }))
    }

    /// From the gradient of the block's output to that of its input `x`, `[T, D]` each; adds the gradients of what is
    /// trained.
    pub(super) fn backward_cpu(
        &self,
        (x, kept): (&[f32], Kept),
        d_y: Vec<f32>,
        layout: &Layout,
        grads: &mut Gradients,
    ) -> Result<Vec<f32>> {
        let Kept { q, k, v, seen, log_sum_exp, middle, gate, up } = kept;
        let d_middle = self.feed_forward_backward((&middle, gate, up), d_y, grads)?;

        self.o.add_gradients(&seen, &d_middle, grads)?;
        let mut d_seen = Vec::new();
        self.o.pull_back(&d_middle, &mut d_seen)?;
        let inputs = self.inputs(&q, &k, &v, layout);
        let [mut d_q, mut d_k, d_v] = attention::backward(&inputs, &log_sum_exp, &seen, &d_seen);
        drop((q, k, v, seen, d_seen));
        rope::rotate(&mut d_q, &layout.rotary, -1.0);
        rope::rotate(&mut d_k, &layout.rotary, -1.0);

        let normed = self.norm(x, &self.input_norm)?;
        let mut d_normed = Vec::new();
        for (projection, d) in [(&self.q, &d_q), (&self.k, &d_k), (&self.v, &d_v)] {
            projection.add_gradients(&normed, d, grads)?;
            projection.pull_back(d, &mut d_normed)?;
        }
        self.norm_backward((x, &self.input_norm, "input_layernorm"), &d_normed, d_middle, grads)
    }

    /// The second half of the backward; returns the gradient of the sum after attention.
    fn feed_forward_backward(
        &self,
        (middle, gate, up): (&[f32], Vec<f32>, Vec<f32>),
        d_y: Vec<f32>,
        grads: &mut Gradients,
    ) -> Result<Vec<f32>> {
        self.down.add_gradients(&swiglu::forward(&gate, &up), &d_y, grads)?;
        let mut d_hidden = Vec::new();
        self.down.pull_back(&d_y, &mut d_hidden)?;
        let (d_gate, d_up) = swiglu::gradients(&gate, &up, &d_hidden);
        drop((gate, up, d_hidden));
        let normed = self.norm(middle, &self.post_norm)?;
        let mut d_normed = Vec::new();
        for (projection, d) in [(&self.gate, &d_gate), (&self.up, &d_up)] {
            projection.add_gradients(&normed, d, grads)?;
            projection.pull_back(d, &mut d_normed)?;
        }
        let place = (middle, &self.post_norm, "post_attention_layernorm");
        self.norm_backward(place, &d_normed, d_y, grads)
    }

    /// Adds a norm's part to the gradient that passes it by on the residual path.
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
            grads.add(&format!("{}{name}.weight", self.prefix), d_weight)?;
        }
        Ok(past)
    }

    fn norm(&self, x: &[f32], weight: &Tensor) -> Result<Vec<f32>> {
        Ok(cpu::with_slice(weight, |weight| norm::forward(x, weight, self.eps as f32))?)
    }

    fn inputs<'a>(
        &self,
        q: &'a [f32],
        k: &'a [f32],
        v: &'a [f32],
        layout: &'a Layout,
    ) -> Inputs<'a> {
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
