//! SwiGLU (Shazeer, 2020): `silu(gate) · up`.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::cpu::{self, Element, simd};

/// Elements per chunk: widened copies of all inputs fit in the L1 cache.
const CHUNK: usize = 1 << 10;
/// Chunks per task.
const TASK: usize = 16;

/// `silu(gate) · up`, elementwise.
///
/// # Shapes
/// - `gate`, `up`: `[T, F]`  →  `[T, F]`
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.device().is_cpu() && gate.dtype() == DType::F32 {
        return gate.contiguous()?.apply_op2(&up.contiguous()?, SwiGlu);
    }
    #[cfg(feature = "cuda")]
    if gate.device().is_cuda() && matches!(gate.dtype(), DType::F32 | DType::BF16) {
        return super::cuda::launch::swiglu::on_cuda(gate, up);
    }
    plain(gate, up)
}

/// The plain form.
pub fn plain(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()? * up
}

struct SwiGlu;

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (cpu::slice(gate, gate_layout)?, cpu::slice(up, up_layout)?);
        Ok((CpuStorage::F32(forward(gate, up)), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let d_out = d_out.contiguous()?;
        let (d_gate, d_up) = cpu::with_slice::<f32, _>(gate, |gate| {
            cpu::with_slice(up, |up| cpu::with_slice(&d_out, |d_out| gradients(gate, up, d_out)))
        })???;
        let tensor = |values| Tensor::from_vec(values, gate.shape(), gate.device());
        Ok((Some(tensor(d_gate)?), Some(tensor(d_up)?)))
    }
}

/// `silu(gate) · up` on slices.
pub(crate) fn forward<E: Element>(gate: &[E], up: &[E]) -> Vec<E> {
    let mut out = vec![E::default(); gate.len()];
    let inputs = gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK));
    out.par_chunks_mut(CHUNK).zip(inputs).with_min_len(TASK).for_each_init(
        <[Vec<f32>; 3]>::default,
        |[a, b, c], (out, (gate, up))| {
            let (gate, up) = (E::widen(gate, a), E::widen(up, b));
            E::write(out, c, |out| simd::swiglu(out, gate, up));
        },
    );
    out
}

/// Gradients of `gate` and `up`.
pub(crate) fn gradients<E: Element>(gate: &[E], up: &[E], d_out: &[f32]) -> (Vec<E>, Vec<E>) {
    let (mut d_gate, mut d_up) = (vec![E::default(); gate.len()], vec![E::default(); gate.len()]);
    let inputs = gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)).zip(d_out.par_chunks(CHUNK));
    let outputs = d_gate.par_chunks_mut(CHUNK).zip(d_up.par_chunks_mut(CHUNK));
    outputs.zip(inputs).with_min_len(TASK).for_each_init(
        <[Vec<f32>; 4]>::default,
        |[a, b, c, d], ((d_gate, d_up), ((gate, up), d_out))| {
            let inputs = [E::widen(gate, a), E::widen(up, b), d_out];
            E::write(d_gate, c, |d_gate| {
                E::write(d_up, d, |d_up| simd::swiglu_grad(d_gate, d_up, inputs));
            });
        },
    );
    (d_gate, d_up)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear::tests::{gradients_agree, random};

    #[test]
    fn both_forms_agree_at_odd_shapes() {
        for (t, f) in [(1, 1), (3, 7), (41, 513)] {
            gradients_agree(
                &[random(1, (t, f)), random(2, (t, f))],
                |x| swiglu(&x[0], &x[1]),
                |x| plain(&x[0], &x[1]),
            );
        }
    }
}
