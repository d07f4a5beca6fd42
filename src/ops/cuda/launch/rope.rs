//! RoPE with `rope.cu`.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaView, PushKernelArg};
use candle_core::cuda_backend::{CudaDevice, CudaStorage, WrapErr};
use candle_core::{CpuStorage, CustomOp1, DType, InplaceOp1, Layout, Result, Shape, Tensor, bail};

use super::{Number, by_type, cuda, grid, on_cpu, threads_of, view};
use crate::ops::cuda::ptx::kernel;

/// Rotates `x` by the angles with the given cosines and sines.
///
/// # Shapes
/// - `x`: `[T, H, E]`, `cos`, `sin`: `[T, E/2]`, f32  →  `[T, H, E]`
pub(crate) fn on_cuda(x: &Tensor, tables: [Tensor; 2]) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Rope::new(x, tables)?)
}

/// As [`on_cuda`], in the memory of `x` if it owns its whole storage. The storage is replaced by a single element, so
/// that neither the graph node of `x` nor tensors sharing it keep the memory; they must not be read any more.
pub(crate) fn in_place(x: &Tensor, tables: [Tensor; 2]) -> Result<Tensor> {
    let rope = Rope::new(x, tables)?;
    x.inplace_op1(&rope)?;
    if rope.own().is_some() { x.apply_op1(rope) } else { x.contiguous()?.apply_op1(rope) }
}

/// A rotation; its backward is the rotation by the opposite angles.
struct Rope {
    cos: Tensor,
    sin: Tensor,
    sign: f32,
    /// The storage to rotate in place, once taken from its tensor.
    own: Mutex<Option<CudaStorage>>,
}

impl Rope {
    /// A rotation of `x` by matching angles.
    fn new(x: &Tensor, [cos, sin]: [Tensor; 2]) -> Result<Self> {
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
        let (cos, sin) = (cos.contiguous()?, sin.contiguous()?);
        Ok(Self { cos, sin, sign: 1.0, own: Mutex::default() })
    }

    fn own(&self) -> MutexGuard<'_, Option<CudaStorage>> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turned<E: Number>(&self, x: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
        let device = x.device();
        let x = view::<E>(x, layout)?;
        // SAFETY: the kernel writes it whole.
        let out = unsafe { device.alloc::<E>(x.len()) }?;
        let out = CudaStorage::wrap_cuda_slice(out, device.clone());
        let there = out.as_cuda_slice::<E>()?.as_view();
        self.launch((&x, &there), device, layout.shape().dims3()?)?;
        Ok(out)
    }

    fn turned_in_place<E: Number>(&self, x: &CudaStorage, shape: &Shape) -> Result<()> {
        let there = x.as_cuda_slice::<E>()?.as_view();
        self.launch((&there, &there), x.device(), shape.dims3()?)
    }

    /// Rotates `x` into `out`, which may alias it and is not used elsewhere.
    fn launch<E: Number>(
        &self,
        (x, out): (&CudaView<'_, E>, &CudaView<'_, E>),
        device: &CudaDevice,
        (tokens, heads, width): (usize, usize, usize),
    ) -> Result<()> {
        let ((cos, of_cos), (sin, of_sin)) =
            (self.cos.storage_and_layout(), self.sin.storage_and_layout());
        let (cos, sin) = (view::<f32>(cuda(&cos)?, of_cos)?, view::<f32>(cuda(&sin)?, of_sin)?);
        let (stride, heads, half) = ((heads * width) as u64, heads as u32, width as u32 / 2);
        let function = kernel(device, "rope", &format!("rope_{}", E::NAME))?;
        let mut launch = function.builder();
        launch.arg(x).arg(out).arg(&cos).arg(&sin);
        launch.arg(&stride).arg(&heads).arg(&half).arg(&self.sign);
        let block = threads_of(heads as usize * half as usize);
        // SAFETY: the kernel's arguments; a block a token, of which all four have as many. Each pair is read and written by one
        // thread, so it may stay where it is.
        unsafe { launch.launch(grid("rope", (tokens, 1), block)?) }.w()?;
        Ok(())
    }
}

/// Takes the storage to rotate from its tensor, if it is all of the tensor's storage.
impl InplaceOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope-in-place-cuda"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        on_cpu("rope").map(drop)
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let device = storage.device().clone();
        let left = by_type!(storage.dtype(), "a rotation", E => {
            if layout.contiguous_offsets() != Some((0, storage.as_cuda_slice::<E>()?.len())) {
                return Ok(());
            }
            CudaStorage::wrap_cuda_slice(device.alloc_zeros::<E>(1)?, device)
        });
        *self.own() = Some(std::mem::replace(storage, left));
        Ok(())
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope-cuda"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        on_cpu("rope")
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let shape = layout.shape();
        if let Some(own) = self.own().take() {
            by_type!(own.dtype(), "a rotation", E => self.turned_in_place::<E>(&own, shape)?);
            return Ok((own, shape.clone()));
        }
        let out = by_type!(x.dtype(), "a rotation", E => self.turned::<E>(x, layout)?);
        Ok((out, shape.clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, d_y: &Tensor) -> Result<Option<Tensor>> {
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let inverse = Self { cos, sin, sign: -self.sign, own: Mutex::default() };
        Ok(Some(d_y.contiguous()?.apply_op1(inverse)?))
    }
}
