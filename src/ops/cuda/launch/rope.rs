//! Rotary position embedding by `rope.cu`.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::cuda_backend::{CudaStorage, WrapErr};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};

use super::{Number, by_type, cuda, grid, on_cpu, threads_of, view};
use crate::ops::cuda::ptx::kernel;

/// `x` turned by the angles whose cosines and sines are given.
///
/// # Shapes
/// - `x`: `[T, H, E]`, `cos`, `sin`: `[T, E/2]`, f32  →  `[T, H, E]`
pub(crate) fn on_cuda(x: &Tensor, [cos, sin]: [Tensor; 2]) -> Result<Tensor> {
    let (tokens, heads, width) = x.dims3()?;
    for table in [&cos, &sin] {
        let fits = table.dims2()? == (tokens, width / 2) && width.is_multiple_of(2);
        if !fits || table.dtype() != DType::F32 || !table.device().same_device(x.device()) {
            let (dtype, shape) = (table.dtype(), table.shape());
            bail!("a rotation of {:?} by angles of {dtype:?} {shape:?}", x.shape());
        }
    }
    // The kernel counts a token's pairs in 32 bits.
    if heads.saturating_mul(width) > u32::MAX as usize {
        bail!("a rotation of {heads} heads of width {width}");
    }
    if x.elem_count() == 0 {
        return Ok(x.clone());
    }
    let op = Rope { cos: cos.contiguous()?, sin: sin.contiguous()?, sign: 1.0 };
    x.contiguous()?.apply_op1(op)
}

/// A rotation; its backward is the rotation by the opposite angles.
struct Rope {
    cos: Tensor,
    sin: Tensor,
    sign: f32,
}

impl Rope {
    fn turned<E: Number>(&self, x: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
        let (tokens, heads, width) = layout.shape().dims3()?;
        let (device, x) = (x.device(), view::<E>(x, layout)?);
        let ((cos, of_cos), (sin, of_sin)) =
            (self.cos.storage_and_layout(), self.sin.storage_and_layout());
        let (cos, sin) = (view::<f32>(cuda(&cos)?, of_cos)?, view::<f32>(cuda(&sin)?, of_sin)?);
        // SAFETY: the kernel writes it whole.
        let mut out = unsafe { device.alloc::<E>(x.len()) }?;
        let (stride, heads, half) = ((heads * width) as u64, heads as u32, width as u32 / 2);
        let function = kernel(device, "rope", &format!("rope_{}", E::NAME))?;
        let mut launch = function.builder();
        launch.arg(&x).arg(&mut out).arg(&cos).arg(&sin);
        launch.arg(&stride).arg(&heads).arg(&half).arg(&self.sign);
        let block = threads_of(heads as usize * half as usize);
        // SAFETY: the kernel's arguments; a block a token, of which all four have as many.
        unsafe { launch.launch(grid("rope", (tokens, 1), block)?) }.w()?;
        Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope-cuda"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        on_cpu(self.name())
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let out = by_type!(x.dtype(), "a rotation", E => self.turned::<E>(x, layout)?);
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, d_y: &Tensor) -> Result<Option<Tensor>> {
        let inverse = Self { cos: self.cos.clone(), sin: self.sin.clone(), sign: -self.sign };
        Ok(Some(d_y.contiguous()?.apply_op1(inverse)?))
    }
}
