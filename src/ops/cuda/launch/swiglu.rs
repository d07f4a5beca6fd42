//! SwiGLU with `swiglu.cu`.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::cuda_backend::{CudaStorage, WrapErr};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::{Number, by_type, cuda, grid_over, on_cpu, tensor, view};
use crate::ops::cuda::ptx::kernel;

/// `silu(gate) · up`, elementwise. Shapes: equal, any.
pub(crate) fn on_cuda(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.shape() != up.shape() || gate.dtype() != up.dtype() {
        let (of_gate, of_up) = (gate.dtype(), up.dtype());
        bail!("swiglu of {of_gate:?} {:?} and {of_up:?} {:?}", gate.shape(), up.shape());
    }
    if gate.elem_count() == 0 {
        return Ok(gate.clone());
    }
    gate.contiguous()?.apply_op2(&up.contiguous()?, SwiGlu)
}

struct SwiGlu;

impl SwiGlu {
    fn forward<E: Number>([gate, up]: [(&CudaStorage, &Layout); 2]) -> Result<CudaStorage> {
        let device = gate.0.device();
        let (gate, up) = (view::<E>(gate.0, gate.1)?, view::<E>(up.0, up.1)?);
        // SAFETY: the kernel writes it whole.
        let mut out = unsafe { device.alloc::<E>(gate.len()) }?;
        let count = gate.len() as u64;
        let function = kernel(device, "swiglu", &format!("swiglu_forward_{}", E::NAME))?;
        let mut launch = function.builder();
        launch.arg(&gate).arg(&up).arg(&mut out).arg(&count);
        // SAFETY: the kernel's arguments, `count` elements each.
        unsafe { launch.launch(grid_over("swiglu", gate.len())?) }.w()?;
        Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
    }

    /// Gradients of `gate` and `up`.
    fn backward<E: Number>(gate: &Tensor, up: &Tensor, d_out: &Tensor) -> Result<[Tensor; 2]> {
        let (device, shape) = (gate.device().as_cuda_device()?, gate.shape());
        let ((gate, of_gate), (up, of_up)) = (gate.storage_and_layout(), up.storage_and_layout());
        let (d_out, of_d_out) = d_out.storage_and_layout();
        let (gate, up) = (view::<E>(cuda(&gate)?, of_gate)?, view::<E>(cuda(&up)?, of_up)?);
        let d_out = view::<E>(cuda(&d_out)?, of_d_out)?;
        // SAFETY: the kernel writes both whole.
        let (mut d_gate, mut d_up) =
            unsafe { (device.alloc::<E>(gate.len())?, device.alloc::<E>(gate.len())?) };
        let count = gate.len() as u64;
        let function = kernel(device, "swiglu", &format!("swiglu_backward_{}", E::NAME))?;
        let mut launch = function.builder();
        launch.arg(&gate).arg(&up).arg(&d_out).arg(&mut d_gate).arg(&mut d_up).arg(&count);
        // SAFETY: the kernel's arguments, `count` elements each.
        unsafe { launch.launch(grid_over("swiglu", gate.len())?) }.w()?;
        Ok([tensor(device, d_gate, shape), tensor(device, d_up, shape)])
    }
}

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu-cuda"
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
        gate: &CudaStorage,
        gate_layout: &Layout,
        up: &CudaStorage,
        up_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let inputs = [(gate, gate_layout), (up, up_layout)];
        let out = by_type!(gate.dtype(), "swiglu", E => Self::forward::<E>(inputs)?);
        Ok((out, gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let d_out = d_out.contiguous()?;
        let [d_gate, d_up] =
            by_type!(gate.dtype(), "swiglu", E => Self::backward::<E>(gate, up, &d_out)?);
        Ok((Some(d_gate), Some(d_up)))
    }
}
