//! The inner loop of AdamW: one pass over a parameter, its moments and its bf16 copy.

#![expect(
    unsafe_code,
    clippy::inline_always,
    reason = "a body compiled for a CPU feature may only be called where it was detected"
)]

use half::bf16;

use super::simd::{multiversion, to_bf16};

/// The update's constants: `g ← g·grad_scale`, `m ← β₁m + (1 − β₁)g`, `v ← β₂v + (1 − β₂)g²`,
/// `p ← p·shrink − step_size · m / (√v / root_correction + eps)`.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// First-moment decay.
    pub beta1: f32,
    /// Second-moment decay.
    pub beta2: f32,
    /// Multiplies the gradient first (clipping).
    pub grad_scale: f32,
    /// `1 − lr · weight decay`.
    pub shrink: f32,
    /// `lr / (1 − β₁ᵗ)`.
    pub step_size: f32,
    /// `√(1 − β₂ᵗ)`.
    pub root_correction: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
}

#[inline(always)]
fn update_body(
    param: &mut [f32],
    moments: [&mut [f32]; 2],
    grad: &[f32],
    copy: &mut [bf16],
    constants: Update,
) {
    let Update { beta1, beta2, grad_scale, shrink, step_size, root_correction, eps } = constants;
    let [first, second] = moments;
    for (((param, first), second), grad) in param.iter_mut().zip(first).zip(second).zip(grad) {
        let grad = grad * grad_scale;
        *first = beta1 * *first + (1.0 - beta1) * grad;
        *second = beta2 * *second + (1.0 - beta2) * (grad * grad);
        *param = *param * shrink - step_size * *first / (second.sqrt() / root_correction + eps);
    }
    if !copy.is_empty() {
        to_bf16(copy, param);
    }
}

multiversion! {
    /// Updates a piece of a parameter, its first and second moment, and its bf16 copy where that is not empty.
    pub fn update(param: &mut [f32], moments: [&mut [f32]; 2], grad: &[f32], copy: &mut [bf16], constants: Update) =
        update_body
}
