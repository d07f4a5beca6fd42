//! RMSNorm with `norm.cu`, alone or fused with a residual sum.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, PushKernelArg};
use candle_core::cuda_backend::{CudaDevice, CudaStorage, WrapErr};
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};

use super::{NULL, Number, by_type, cuda, grid, on_cpu, tensor, threads_of, together, view};
use crate::ops::cuda::ptx::kernel;

/// Most blocks of the backward: two per multiprocessor of the largest GPUs.
const PARTS: usize = 264;
/// Most shared memory for a block's sums, in bytes.
const SHARED: usize = 40 << 10;

/// The norm of each row of `x`, rounded to `dtype`.
///
/// # Shapes
/// - `x`: `[T, D]`, `weight`: `[D]`, f32 both  →  `[T, D]`
pub(crate) fn on_cuda(x: &Tensor, weight: &Tensor, eps: f64, dtype: DType) -> Result<Tensor> {
    check(x, weight)?;
    if x.elem_count() == 0 {
        return x.to_dtype(dtype);
    }
    x.contiguous()?.apply_op2(&weight.contiguous()?, RmsNorm::new(weight, eps, dtype))
}

/// `x + y` and its norm, in one kernel.
///
/// # Shapes
/// - `x`, `y`: `[T, D]`, `weight`: `[D]`, f32 all  →  `[T, D]` both, the norm in `dtype`
pub(crate) fn of_sum(
    (x, y): (&Tensor, &Tensor),
    weight: &Tensor,
    eps: f64,
    dtype: DType,
) -> Result<[Tensor; 2]> {
    check(x, weight)?;
    if y.shape() != x.shape() || y.dtype() != DType::F32 || x.elem_count() == 0 {
        bail!("a residual sum of {:?} and {:?} {:?}", x.shape(), y.dtype(), y.shape());
    }
    together("a residual sum", [x, y, weight])?;
    let (x, y, weight) = (x.contiguous()?, y.contiguous()?, weight.contiguous()?);
    let [sum, normed] = by_type!(dtype, "a norm", E => made::<E>([&x, &y, &weight], eps as f32)?);
    // The graph has two ops, which return the precomputed results.
    let sum = x.apply_op2(&y, Sum { made: Mutex::new(Some(sum)) })?;
    let op = RmsNorm { made: Mutex::new(Some(normed)), ..RmsNorm::new(&weight, eps, dtype) };
    let normed = sum.apply_op2(&weight, op)?;
    Ok([sum, normed])
}

fn check(x: &Tensor, weight: &Tensor) -> Result<()> {
    let width = weight.dims1()?;
    let f32 = x.dtype() == DType::F32 && weight.dtype() == DType::F32;
    if f32 && x.rank() > 0 && x.dims().last() == Some(&width) {
        return Ok(());
    }
    let (of_x, of_weight) = (x.dtype(), weight.dtype());
    bail!("a norm of {of_x:?} {:?} by {of_weight:?} {:?}", x.shape(), weight.shape())
}

/// The sum of the first two, and its norm.
fn made<E: Number>([x, y, weight]: [&Tensor; 3], eps: f32) -> Result<[CudaStorage; 2]> {
    let device = x.device().as_cuda_device()?;
    let ((x, of_x), (y, of_y)) = (x.storage_and_layout(), y.storage_and_layout());
    let (weight, of_weight) = weight.storage_and_layout();
    let (x, y) = (view::<f32>(cuda(&x)?, of_x)?, view::<f32>(cuda(&y)?, of_y)?);
    let weight = view::<f32>(cuda(&weight)?, of_weight)?;
    // SAFETY: the kernel writes it whole.
    let mut sum = unsafe { device.alloc::<f32>(x.len()) }?;
    let normed = forward::<E>(device, (&x, Some((&y, &mut sum))), &weight, eps)?;
    let storage = CudaStorage::wrap_cuda_slice(sum, device.clone());
    Ok([storage, CudaStorage::wrap_cuda_slice(normed, device.clone())])
}

/// The addend, and the destination of the sum.
type Added<'a> = (&'a CudaView<'a, f32>, &'a mut CudaSlice<f32>);

/// The norm of `x`, or of its sum with an addend, which is stored.
fn forward<E: Number>(
    device: &CudaDevice,
    (x, add): (&CudaView<'_, f32>, Option<Added<'_>>),
    weight: &CudaView<'_, f32>,
    eps: f32,
) -> Result<CudaSlice<E>> {
    let width = weight.len();
    // SAFETY: the kernel writes it whole.
    let mut y = unsafe { device.alloc::<E>(x.len()) }?;
    let function = kernel(device, "norm", &format!("rms_norm_forward_{}", E::NAME))?;
    let long_width = width as u64;
    let mut launch = function.builder();
    launch.arg(x);
    match add {
        Some((add, sum)) => launch.arg(add).arg(sum),
        None => launch.arg(NULL).arg(NULL),
    };
    launch.arg(weight).arg(&mut y).arg(&long_width).arg(&eps);
    // SAFETY: the kernel's arguments, whole rows of `width` all.
    unsafe { launch.launch(grid("a norm", (x.len() / width, 1), threads_of(width))?) }.w()?;
    Ok(y)
}

/// An already computed residual sum.
struct Sum {
    made: Mutex<Option<CudaStorage>>,
}

impl CustomOp2 for Sum {
    fn name(&self) -> &'static str {
        "residual-cuda"
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
        _: &CudaStorage,
        x_layout: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        match self.made.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(sum) => Ok((sum, x_layout.shape().clone())),
            None => bail!("a residual sum was asked for twice"),
        }
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(d.clone()), Some(d.clone())))
    }
}

struct RmsNorm {
    eps: f32,
    dtype: DType,
    trained: bool,
    /// The norm, if computed together with the preceding sum.
    made: Mutex<Option<CudaStorage>>,
}

impl RmsNorm {
    fn new(weight: &Tensor, eps: f64, dtype: DType) -> Self {
        Self { eps: eps as f32, dtype, trained: weight.track_op(), made: Mutex::default() }
    }

    /// Gradients of `x` and, if trained, of `weight`.
    fn gradients<E: Number>(
        &self,
        (x, weight): (&Tensor, &Tensor),
        d_y: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (device, shape, d_y) = (x.device().as_cuda_device()?, x.shape(), d_y.contiguous()?);
        let ((x, of_x), (d_y, of_d_y)) = (x.storage_and_layout(), d_y.storage_and_layout());
        let (weight, of_weight) = weight.storage_and_layout();
        let (x, d_y) = (view::<f32>(cuda(&x)?, of_x)?, view::<E>(cuda(&d_y)?, of_d_y)?);
        let weight = view::<f32>(cuda(&weight)?, of_weight)?;
        let width = weight.len();
        let rows = x.len() / width;
        let part = rows.div_ceil(PARTS);
        let parts = rows.div_ceil(part);
        // SAFETY: the kernel writes both whole.
        let (mut d_x, mut partials) =
            unsafe { (device.alloc::<f32>(x.len())?, device.alloc::<f32>(parts * width)?) };
        let shared = if width * 4 <= SHARED { width as u32 * 4 } else { 0 };
        let (long_rows, long_width) = (rows as u64, width as u64);
        let (part, in_shared) = (part as u32, u32::from(shared > 0));
        let function = kernel(device, "norm", &format!("rms_norm_backward_{}", E::NAME))?;
        let mut launch = function.builder();
        launch.arg(&x).arg(&weight).arg(&d_y).arg(NULL).arg(&mut d_x).arg(&mut partials);
        launch.arg(&long_rows).arg(&long_width).arg(&part).arg(&in_shared).arg(&self.eps);
        let mut config = grid("a norm", (parts, 1), threads_of(width))?;
        config.shared_mem_bytes = shared;
        // SAFETY: the kernel's arguments, whole rows of `width` all; its shared memory as it was told.
        unsafe { launch.launch(config) }.w()?;
        let d_weight = self.trained.then(|| column_sum(device, &partials, width)).transpose()?;
        Ok((tensor(device, d_x, shape), d_weight.map(|sum| tensor(device, sum, width))))
    }
}

/// Sum over rows of `width`.
fn column_sum(
    device: &CudaDevice,
    partials: &CudaSlice<f32>,
    width: usize,
) -> Result<CudaSlice<f32>> {
    // SAFETY: the kernel writes it whole.
    let mut sum = unsafe { device.alloc::<f32>(width) }?;
    let (parts, long_width, add) = ((partials.len() / width) as u64, width as u64, 0_u32);
    let function = kernel(device, "norm", "column_sum")?;
    let mut launch = function.builder();
    launch.arg(partials).arg(&mut sum).arg(&parts).arg(&long_width).arg(&add);
    // Few threads per block, so that columns spread over many multiprocessors.
    // SAFETY: the kernel's arguments; a thread a column.
    unsafe { launch.launch(grid("a norm", (width.div_ceil(64), 1), 64)?) }.w()?;
    Ok(sum)
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm-cuda"
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
        let shape = x_layout.shape().clone();
        if let Some(made) = self.made.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Ok((made, shape));
        }
        let device = x.device();
        let (x, weight) = (view::<f32>(x, x_layout)?, view::<f32>(weight, weight_layout)?);
        by_type!(self.dtype, "a norm", E => {
            let y = forward::<E>(device, (&x, None), &weight, self.eps)?;
            Ok((CudaStorage::wrap_cuda_slice(y, device.clone()), shape))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        d_y: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (d_x, d_weight) = by_type!(self.dtype, "a norm", E => {
            self.gradients::<E>((x, weight), d_y)?
        });
        Ok((Some(d_x), d_weight))
    }
}
