//! The two elementwise steps around a block: the residual sum, and the start of its backward.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::cpu;

const CHUNK: usize = 1 << 14;

/// `x + y`, in the dtype of `x`. Shapes: equal, any.
pub fn residual(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() && x.dtype() == DType::F32 && x.shape() == y.shape() {
        return x.contiguous()?.apply_op2(&y.contiguous()?, Add);
    }
    x + y.to_dtype(x.dtype())?
}

/// `sum += x` in place, visible to all tensors that share its storage. Shapes: equal, any; `sum` is f32.
///
/// # Errors
/// A shape mismatch, a `sum` that is not contiguous or not f32, a device error.
pub fn accumulate(sum: &Tensor, x: &Tensor) -> Result<()> {
    if sum.shape() != x.shape() {
        candle_core::bail!("{:?} added to a sum of {:?}", x.shape(), sum.shape());
    }
    #[cfg(feature = "cuda")]
    if sum.device().is_cuda() {
        return super::cuda::launch::optimizer::accumulate(sum, x);
    }
    let x = x.to_dtype(DType::F32)?.contiguous()?;
    cpu::with_slice_mut(sum, |sum| cpu::with_slice(&x, |x| add(sum, x)))?
}

/// A scalar whose gradient with respect to `output` is exactly `d_output`: the root of a vector-Jacobian product. Its
/// own value is meaningless.
pub fn vjp_root(output: &Tensor, d_output: &Tensor) -> Result<Tensor> {
    let by_op = output.device().is_cpu() || cfg!(feature = "cuda") && output.device().is_cuda();
    if by_op {
        return output.apply_op1(Root { d_output: d_output.clone() });
    }
    (output * d_output)?.sum_all()
}

/// `x += y` on slices.
pub(crate) fn add(x: &mut [f32], y: &[f32]) {
    x.par_chunks_mut(CHUNK).zip(y.par_chunks(CHUNK)).for_each(|(x, y)| cpu::simd::axpy(x, 1.0, y));
}

struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "residual"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        y: &CpuStorage,
        y_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut out = cpu::slice(x, x_layout)?.to_vec();
        let y = cpu::slice(y, y_layout)?;
        add(&mut out, y);
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        _x: &Tensor,
        _y: &Tensor,
        _out: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(d.clone()), Some(d.clone())))
    }
}

struct Root {
    d_output: Tensor,
}

impl Root {
    fn check(&self, layout: &Layout) -> Result<()> {
        if layout.shape() == self.d_output.shape() {
            return Ok(());
        }
        candle_core::bail!(
            "a gradient of {:?} for an output of {:?}",
            self.d_output.shape(),
            layout.shape()
        )
    }
}

impl CustomOp1 for Root {
    fn name(&self) -> &'static str {
        "vjp-root"
    }

    fn cpu_fwd(&self, output: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.check(layout)?;
        let zero = match output {
            CpuStorage::F64(_) => CpuStorage::F64(vec![0.0]),
            _ => CpuStorage::F32(vec![0.0]),
        };
        Ok((zero, Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        output: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.check(layout)?;
        Ok((super::cuda::launch::zero(output)?, Shape::from(())))
    }

    fn bwd(&self, _output: &Tensor, _root: &Tensor, _d: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.d_output.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear::tests::{gradients_agree, random};

    #[test]
    fn both_forms_agree() {
        gradients_agree(
            &[random(1, (3, 7)), random(2, (3, 7))],
            |x| residual(&x[0], &x[1]),
            |x| &x[0] + &x[1],
        );
    }

    #[test]
    fn accumulate_adds_in_place() {
        let (sum, x) = (random(1, (3, 7)), random(2, (7, 3)).t().unwrap());
        let expected = (&sum + &x).unwrap().to_vec2::<f32>().unwrap();
        let sum = sum.copy().unwrap();
        let twin = sum.clone();
        accumulate(&sum, &x).unwrap();
        assert_eq!(twin.to_vec2::<f32>().unwrap(), expected);
        let error = accumulate(&sum, &x.t().unwrap()).unwrap_err().to_string();
        assert!(error.contains("added to a sum of [3, 7]"), "{error}");
    }

    #[test]
    fn vjp_root_passes_its_gradient_through() {
        let output = candle_core::Var::from_tensor(&random(1, (3, 7))).unwrap();
        let d_output = random(2, (3, 7));
        let grads = vjp_root(&output, &d_output).unwrap().backward().unwrap();
        let (ours, given) = (grads.get(&output).unwrap(), &d_output);
        assert_eq!(ours.to_vec2::<f32>().unwrap(), given.to_vec2::<f32>().unwrap());
    }
}
