//! The linear layer with cuBLAS and its own backward: Candle's would also compute gradients of untrained weights, and
//! return the others transposed.

use candle_core::cuda_backend::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::on_cpu;
use crate::ops::linear::product;

/// `x · Wᵀ`, both of one dtype. Accumulates in f32 and rounds to that dtype.
///
/// # Shapes
/// - `x`: `[T, I]`, `weight`: `[O, I]`  →  `[T, O]`
pub(crate) fn on_cuda(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let op = Linear { trained: weight.track_op() };
    x.contiguous()?.apply_op2(&weight.contiguous()?, op)
}

struct Linear {
    trained: bool,
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear-cuda"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        on_cpu(self.name())
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        product((x, x_layout), (weight, weight_layout))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        d_y: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let d_y = d_y.contiguous()?;
        let d_x = d_y.matmul(&weight.detach())?;
        let d_weight = if self.trained { Some(d_y.t()?.matmul(&x.detach())?) } else { None };
        Ok((Some(d_x), d_weight))
    }
}
