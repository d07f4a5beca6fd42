//! RMSNorm (Zhang and Sennrich, 2019): `y = x / sqrt(mean(x²) + eps) · w`.

use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::cpu::{self, Element, simd};

/// Normalises each row to unit mean square and scales it.
///
/// # Shapes
/// - `x`: `[T, D]`, `weight`: `[D]`  →  `[T, D]`
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if x.device().is_cpu() && x.dtype() == DType::F32 {
        let op = RmsNorm { eps: eps as f32, trained: weight.track_op() };
        return x.contiguous()?.apply_op2(&weight.contiguous()?, op);
    }
    #[cfg(feature = "cuda")]
    if has_kernel(x, weight) {
        return super::cuda::launch::norm::on_cuda(x, weight, eps, DType::F32);
    }
    plain(x, weight, eps)
}

/// As [`rms_norm`], rounded to `dtype`, for input to a product.
///
/// # Shapes
/// As [`rms_norm`].
pub fn rms_norm_in(x: &Tensor, weight: &Tensor, eps: f64, dtype: DType) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if has_kernel(x, weight) {
        return super::cuda::launch::norm::on_cuda(x, weight, eps, dtype);
    }
    rms_norm(x, weight, eps)?.to_dtype(dtype)
}

/// The residual sum `x + y`, and its norm rounded to `dtype`.
///
/// # Shapes
/// - `x`, `y`: `[T, D]`, `weight`: `[D]`  →  `[T, D]` both
pub fn residual_norm(
    (x, y): (&Tensor, &Tensor),
    weight: &Tensor,
    eps: f64,
    dtype: DType,
) -> Result<[Tensor; 2]> {
    #[cfg(feature = "cuda")]
    if has_kernel(x, weight) && x.elem_count() > 0 {
        let y = y.to_dtype(DType::F32)?;
        return super::cuda::launch::norm::of_sum((x, &y), weight, eps, dtype);
    }
    let sum = super::residual(x, y)?;
    let normed = rms_norm_in(&sum, weight, eps, dtype)?;
    Ok([sum, normed])
}

#[cfg(feature = "cuda")]
fn has_kernel(x: &Tensor, weight: &Tensor) -> bool {
    x.device().is_cuda() && x.dtype() == DType::F32 && weight.dtype() == DType::F32
}

/// The plain form.
pub fn plain(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + eps)?.sqrt()?)?.broadcast_mul(weight)
}

struct RmsNorm {
    eps: f32,
    trained: bool,
}

fn inverse_rms(row: &[f32], eps: f32) -> f32 {
    1.0 / (simd::dot(row, row) / row.len() as f32 + eps).sqrt()
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (cpu::slice(x, x_layout)?, cpu::slice(weight, weight_layout)?);
        Ok((CpuStorage::F32(forward(x, weight, self.eps)), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        d_y: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let width = weight.dim(0)?;
        let d_y = d_y.contiguous()?;
        let (d_x, d_weight) = cpu::with_slice(x, |x| {
            cpu::with_slice(weight, |weight| {
                cpu::with_slice(&d_y, |d_y| gradients(x, weight, d_y, self.eps))
            })
        })???;
        let d_weight =
            if self.trained { Some(Tensor::from_vec(d_weight, width, x.device())?) } else { None };
        Ok((Some(Tensor::from_vec(d_x, x.shape(), x.device())?), d_weight))
    }
}

/// The norm of each row on slices, rounded to `E`. Shapes: `x` `[T, D]`, `weight` `[D]` -> `[T, D]`.
pub(crate) fn forward<E: Element>(x: &[f32], weight: &[f32], eps: f32) -> Vec<E> {
    let width = weight.len();
    let mut out = vec![E::default(); x.len()];
    let rows = out.par_chunks_mut(width).zip(x.par_chunks(width)).with_min_len(16);
    rows.for_each_init(Vec::new, |scratch, (out, x)| {
        let scale = inverse_rms(x, eps);
        E::write(out, scratch, |out| {
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = x * scale * weight;
            }
        });
    });
    out
}

/// Gradients with respect to `x` `[T, D]` and `weight` `[D]`.
///
/// With `s = 1/rms`, `x̂ = x·s`, `g = dy·w`:  `dx = s·(g − x̂·mean(g·x̂))`,  `dw = Σ_t dy·x̂`.
pub(crate) fn gradients(x: &[f32], weight: &[f32], d_y: &[f32], eps: f32) -> (Vec<f32>, Vec<f32>) {
    /// Rows per partial sum of `dw`: fixed, so that the order of summation does not depend on the threads.
    const ROWS: usize = 64;
    let width = weight.len();
    let mut d_x = vec![0.0; x.len()];
    let partials: Vec<Vec<f32>> = d_x
        .par_chunks_mut(ROWS * width)
        .zip(x.par_chunks(ROWS * width).zip(d_y.par_chunks(ROWS * width)))
        .map(|(d_x, (x, d_y))| {
            let mut d_weight = vec![0.0; width];
            let mut g = vec![0.0; width];
            for ((d_x, x), d_y) in
                d_x.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(d_y.chunks_exact(width))
            {
                let scale = inverse_rms(x, eps);
                for i in 0..width {
                    g[i] = d_y[i] * weight[i];
                    d_weight[i] += d_y[i] * x[i] * scale;
                }
                let mean = simd::dot(&g, x) * scale / width as f32;
                for i in 0..width {
                    d_x[i] = scale * (g[i] - x[i] * scale * mean);
                }
            }
            d_weight
        })
        .collect();
    let mut d_weight = vec![0.0; width];
    for partial in &partials {
        simd::axpy(&mut d_weight, 1.0, partial);
    }
    (d_x, d_weight)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear::tests::{gradients_agree, random};

    #[test]
    fn both_forms_agree_at_odd_shapes() {
        for (t, d) in [(1, 3), (5, 17), (130, 64)] {
            gradients_agree(
                &[random(1, (t, d)), random(2, d)],
                |x| rms_norm(&x[0], &x[1], 1e-5),
                |x| plain(&x[0], &x[1], 1e-5),
            );
        }
    }
}
