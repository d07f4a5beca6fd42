//! Kernel launches on Candle's stream, one file per op. Nothing here waits for the device.
//!
//! Work on a stream runs in order, so memory may be freed or overwritten by a later launch.

#![expect(unsafe_code, reason = "kernels are given addresses")]

pub(crate) mod by_host;
pub(crate) mod embed;
pub(crate) mod host;
pub(crate) mod linear;
pub(crate) mod norm;
pub(crate) mod optimizer;
pub(in crate::ops) mod pairs;
pub(crate) mod rope;
pub(crate) mod sample;
pub(crate) mod swiglu;
pub(in crate::ops::cuda) mod top;
pub(crate) mod unpack;

use std::cell::Cell;
use std::marker::PhantomData;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaView, CudaViewMut, DeviceRepr, LaunchConfig,
};
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Shape, Storage, Tensor, bail};
use half::bf16;

use super::limits;

/// A null pointer, as an argument.
pub(in crate::ops::cuda) const NULL: &u64 = &0;

/// Element types with compiled kernels.
pub(crate) trait Number: CudaDType + DeviceRepr {
    /// Suffix of their entries.
    const NAME: &'static str;
}

impl Number for f32 {
    const NAME: &'static str = "f32";
}

impl Number for bf16 {
    const NAME: &'static str = "bf16";
}

/// Evaluates an expression with `$E` as the type of a [`DType`](candle_core::DType).
macro_rules! by_type {
    ($dtype:expr, $what:literal, $E:ident => $call:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $E = f32;
                $call
            }
            candle_core::DType::BF16 => {
                type $E = half::bf16;
                $call
            }
            other => candle_core::bail!("{} on CUDA in {other:?}, expected f32 or bf16", $what),
        }
    };
}
pub(in crate::ops::cuda) use by_type;

/// The CUDA storage.
pub(in crate::ops::cuda) fn cuda(storage: &Storage) -> Result<&CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        _ => bail!("a kernel for CUDA was given a tensor elsewhere"),
    }
}

/// Checks that all tensors are on one GPU; Candle does not check direct accesses to storages.
///
/// # Errors
/// Names two that are not, and their devices.
pub(in crate::ops::cuda) fn together<const N: usize>(
    op: &str,
    tensors: [&Tensor; N],
) -> Result<()> {
    let place = |tensor: &Tensor| tensor.device().location();
    match tensors.windows(2).find(|pair| place(pair[0]) != place(pair[1])) {
        Some(pair) => {
            bail!(
                "{op} of tensors on {:?} and {:?}, expected one GPU",
                place(pair[0]),
                place(pair[1])
            )
        }
        None => Ok(()),
    }
}

/// The elements of a contiguous storage.
pub(in crate::ops::cuda) fn view<'a, E: CudaDType>(
    storage: &'a CudaStorage,
    layout: &Layout,
) -> Result<CudaView<'a, E>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<E>()?.slice(start..end)),
        None => bail!("a kernel for CUDA was given a tensor with gaps, {:?}", layout.shape()),
    }
}

/// A zero, on the device of a given storage.
pub(crate) fn zero(beside: &CudaStorage) -> Result<CudaStorage> {
    let device = beside.device();
    Ok(CudaStorage::wrap_cuda_slice(device.alloc_zeros::<f32>(1)?, device.clone()))
}

/// The error for a CUDA op invoked on the CPU.
pub(in crate::ops::cuda) fn on_cpu(op: &str) -> Result<(CpuStorage, Shape)> {
    bail!("{op} for CUDA was given a tensor on the CPU")
}

/// A slice as a tensor without a graph.
pub(in crate::ops) fn tensor<E: CudaDType>(
    device: &CudaDevice,
    slice: CudaSlice<E>,
    shape: impl Into<Shape>,
) -> Tensor {
    let storage = CudaStorage::wrap_cuda_slice(slice, device.clone());
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// A grid of `of` blocks with `block` threads each, for an op.
///
/// # Errors
/// As [`blocks`](limits::blocks).
pub(in crate::ops::cuda) fn grid(op: &str, of: (usize, usize), block: u32) -> Result<LaunchConfig> {
    let (x, y) = limits::blocks(op, of)?;
    Ok(LaunchConfig { grid_dim: (x, y, 1), block_dim: (block, 1, 1), shared_mem_bytes: 0 })
}

/// Threads per block for rows of this width: one per vector of four, up to 512.
fn threads_of(width: usize) -> u32 {
    (width.div_ceil(4).next_multiple_of(32)).clamp(32, 512) as u32
}

/// Threads per block for elementwise kernels.
const BLOCK: u32 = 256;

/// A grid over the elements of a tensor, at most as large as any GPU runs at once; each thread processes several
/// vectors.
fn grid_over(op: &str, count: usize) -> Result<LaunchConfig> {
    grid(op, (count.div_ceil(BLOCK as usize * 8).clamp(1, 1 << 12), 1), BLOCK)
}

/// Calls `write` with the elements of a contiguous device tensor; visible to all tensors that share its storage.
///
/// # Errors
/// Another dtype or device, or a non-contiguous layout.
fn with_view_mut<E: CudaDType, R>(
    tensor: &Tensor,
    write: impl FnOnce(CudaViewMut<'_, E>) -> Result<R>,
) -> Result<R> {
    let op = Write { once: Cell::new(Some(write)), result: Cell::new(None), elements: PhantomData };
    tensor.inplace_op1(&op)?;
    match op.result.take() {
        Some(result) => Ok(result),
        None => bail!("a kernel for CUDA was given a tensor elsewhere"),
    }
}

/// Candle only gives write access to a storage through an op; this one runs once.
struct Write<F, R, E> {
    once: Cell<Option<F>>,
    result: Cell<Option<R>>,
    elements: PhantomData<E>,
}

impl<E: CudaDType, R, F: FnOnce(CudaViewMut<'_, E>) -> Result<R>> InplaceOp1 for Write<F, R, E> {
    fn name(&self) -> &'static str {
        "write-cuda"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        on_cpu("write").map(drop)
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let (Some((start, end)), Some(write)) = (layout.contiguous_offsets(), self.once.take())
        else {
            bail!("a kernel for CUDA was given a tensor with gaps, {:?}", layout.shape())
        };
        let slice = storage.as_cuda_slice_mut::<E>()?;
        self.result.set(Some(write(slice.slice_mut(start..end))?));
        Ok(())
    }
}
