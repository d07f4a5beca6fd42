//! AdamW with `adamw.cu`, and the norm for gradient clipping with `reduce.cu`: from gradients to weights without
//! synchronising with the host.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, CudaViewMut, PushKernelArg};
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};
use half::bf16;

use super::{NULL, Number, by_type, cuda, grid, grid_over, together, view, with_view_mut};
use crate::ops::cpu::adamw::{Chance, Update};
use crate::ops::cuda::ptx::kernel;

/// Elements per partial sum, as in `reduce.cu`.
const CHUNK: usize = 1 << 16;
/// Threads per summing block.
const SUM: u32 = 512;

/// Adds a gradient to an f32 sum, in place.
///
/// # Shapes
/// - `sum`, `grad`: equal, any; `sum` contiguous.
pub(crate) fn accumulate(sum: &Tensor, grad: &Tensor) -> Result<()> {
    if grad.elem_count() == 0 {
        return Ok(());
    }
    together("a sum of gradients", [sum, grad])?;
    let grad = grad.contiguous()?;
    by_type!(grad.dtype(), "a sum of gradients", E => {
        let device = grad.device().as_cuda_device()?;
        let (storage, layout) = grad.storage_and_layout();
        let more = view::<E>(cuda(&storage)?, layout)?;
        let function = kernel(device, "reduce", &format!("accumulate_{}", E::NAME))?;
        with_view_mut::<f32, _>(sum, |mut sum| {
            let count = sum.len() as u64;
            let mut launch = function.builder();
            launch.arg(&mut sum).arg(&more).arg(&count);
            // SAFETY: the kernel's arguments, as many elements each: the shapes are equal.
            unsafe { launch.launch(grid_over("a sum of gradients", more.len())?) }.w()?;
            Ok(())
        })
    })
}

/// Sums of squares of gradients, kept on the device until read.
pub(crate) struct Squares {
    device: CudaDevice,
    sums: CudaSlice<f64>,
}

/// Gradient scale, on the device. NaN if the gradients are not finite.
pub(crate) struct Factor(CudaSlice<f32>);

impl Squares {
    /// Room for `count` gradients, at least one.
    pub(crate) fn new(device: &Device, count: usize) -> Result<Self> {
        let device = device.as_cuda_device()?.clone();
        let sums = device.alloc_zeros::<f64>(count.max(1))?;
        Ok(Self { device, sums })
    }

    /// Stores a gradient's sum of squares at `index`.
    pub(crate) fn put(&mut self, index: usize, grad: &Tensor) -> Result<()> {
        if index >= self.sums.len() {
            bail!("a gradient more than the {} that there is room for", self.sums.len());
        }
        if grad.elem_count() == 0 {
            return Ok(());
        }
        let grad = grad.contiguous()?;
        by_type!(grad.dtype(), "a sum of squares", E => self.sum::<E>(index, &grad))
    }

    fn sum<E: Number>(&mut self, index: usize, grad: &Tensor) -> Result<()> {
        let (grad, layout) = grad.storage_and_layout();
        let grad = view::<E>(cuda(&grad)?, layout)?;
        let (count, parts) = (grad.len() as u64, grad.len().div_ceil(CHUNK));
        // SAFETY: the first kernel writes it whole.
        let mut partials = unsafe { self.device.alloc::<f64>(parts) }?;
        let function = kernel(&self.device, "reduce", &format!("square_sum_{}", E::NAME))?;
        let mut launch = function.builder();
        launch.arg(&grad).arg(&mut partials).arg(&count);
        // SAFETY: the kernel's arguments; a block a chunk, of which there are as many partial sums.
        unsafe { launch.launch(grid("a sum of squares", (parts, 1), SUM)?) }.w()?;
        let function = kernel(&self.device, "reduce", "sum_partials")?;
        let (parts, add) = (parts as u64, 0_u32);
        let mut sum = self.sums.slice_mut(index..=index);
        let mut launch = function.builder();
        launch.arg(&partials).arg(&mut sum).arg(&parts).arg(&add);
        // SAFETY: the kernel's arguments; one block.
        unsafe { launch.launch(grid("a sum of squares", (1, 1), SUM)?) }.w()?;
        Ok(())
    }

    /// The factor that clips the norm of a range of gradients to `max_norm`, see
    /// [`clip_factor`](crate::optim::clip_factor).
    pub(crate) fn clip(&self, which: std::ops::Range<usize>, max_norm: f64) -> Result<Factor> {
        // SAFETY: the kernel writes both.
        let (mut norm, mut factor) =
            unsafe { (self.device.alloc::<f64>(1)?, self.device.alloc::<f32>(1)?) };
        let (squares, count) = (self.sums.slice(which.clone()), which.len() as u64);
        let function = kernel(&self.device, "reduce", "clip")?;
        let mut launch = function.builder();
        launch.arg(&squares).arg(&mut norm).arg(&mut factor).arg(&count).arg(&max_norm);
        // SAFETY: the kernel's arguments; one block.
        unsafe { launch.launch(grid("a sum of squares", (1, 1), SUM)?) }.w()?;
        Ok(Factor(factor))
    }

    /// All sums. Synchronises with the device.
    pub(crate) fn read(&self) -> Result<Vec<f64>> {
        self.device.clone_dtoh(&self.sums)
    }
}

/// Sum of squares of one tensor. Synchronises with the device.
pub(crate) fn square_sum(tensor: &Tensor) -> Result<f64> {
    let mut squares = Squares::new(tensor.device(), 1)?;
    squares.put(0, tensor)?;
    Ok(squares.read()?[0])
}

/// Index of the first non-finite element of a tensor. Synchronises with the device.
pub(crate) fn first_not_finite(tensor: &Tensor) -> Result<Option<usize>> {
    if tensor.elem_count() == 0 {
        return Ok(None);
    }
    let tensor = tensor.contiguous()?;
    by_type!(tensor.dtype(), "a search", E => search::<E>(&tensor))
}

fn search<E: Number>(tensor: &Tensor) -> Result<Option<usize>> {
    let device = tensor.device().as_cuda_device()?;
    let (storage, layout) = tensor.storage_and_layout();
    let values = view::<E>(cuda(&storage)?, layout)?;
    let (count, parts) = (values.len() as u64, values.len().div_ceil(CHUNK));
    // SAFETY: each is written whole by a kernel before it is read.
    let (mut partials, mut found) =
        unsafe { (device.alloc::<u64>(parts)?, device.alloc::<u64>(1)?) };
    let function = kernel(device, "reduce", &format!("first_not_finite_{}", E::NAME))?;
    let mut launch = function.builder();
    launch.arg(&values).arg(&mut partials).arg(&count);
    // SAFETY: the kernel's arguments; a block a chunk, of which there are as many partial results.
    unsafe { launch.launch(grid("the search for a number", (parts, 1), SUM)?) }.w()?;
    let function = kernel(device, "reduce", "minimum")?;
    let parts = parts as u64;
    let mut launch = function.builder();
    launch.arg(&partials).arg(&mut found).arg(&parts);
    // SAFETY: the kernel's arguments; one block.
    unsafe { launch.launch(grid("the search for a number", (1, 1), SUM)?) }.w()?;
    let found = device.clone_dtoh(&found)?[0];
    // All bits set means that none was found.
    Ok((found < count).then_some(found as usize))
}

/// A parameter and its optimizer state, all of one shape and contiguous. The copy, if any, is bf16, all else f32.
pub(crate) struct Parameter<'a> {
    /// Master weights, updated by the optimizer.
    pub master: &'a Tensor,
    /// The copy the model computes with.
    pub copy: Option<&'a Tensor>,
    /// First and second moment.
    pub moments: [&'a Tensor; 2],
    /// The gradient.
    pub grad: &'a Tensor,
    /// Stochastic rounding of the copy, if enabled.
    pub chance: Option<Chance>,
}

/// One optimizer step for a parameter. The gradient is also multiplied by `clip`, if given; if that is NaN, nothing
/// changes.
pub(crate) fn adamw(
    parameter: &Parameter<'_>,
    update: Update,
    clip: Option<&Factor>,
) -> Result<()> {
    let Parameter { master, copy, moments: [first, second], grad, chance } = *parameter;
    let count = master.elem_count();
    together("adamw", [master, first, second, grad, copy.unwrap_or(master)])?;
    let all = [first, second, grad].into_iter().chain(copy);
    if all.into_iter().any(|tensor| tensor.elem_count() != count) {
        bail!("a parameter of {:?} with moments, a gradient or a copy of another", master.shape());
    }
    if count == 0 {
        return Ok(());
    }
    let (device, grad) = (master.device().as_cuda_device()?, grad.contiguous()?);
    let (grad, layout) = grad.storage_and_layout();
    let grad = view::<f32>(cuda(&grad)?, layout)?;
    let how = (update, chance);
    with_view_mut::<f32, _>(master, |master| {
        with_view_mut::<f32, _>(first, |first| {
            with_view_mut::<f32, _>(second, |second| {
                let states = [master, first, second];
                match copy.map(|copy| (copy, copy.dtype())) {
                    Some((copy, DType::BF16)) => with_view_mut::<bf16, _>(copy, |copy| {
                        pass(device, (states, &grad, Some(copy)), how, clip)
                    }),
                    Some((_, other)) => bail!("a copy in {other:?}, expected bf16"),
                    None => pass::<f32>(device, (states, &grad, None), how, clip),
                }
            })
        })
    })
}

/// Views of a parameter: master and moments, gradient, copy.
type Views<'a, E> = ([CudaViewMut<'a, f32>; 3], &'a CudaView<'a, f32>, Option<CudaViewMut<'a, E>>);

fn pass<E: Number>(
    device: &CudaDevice,
    (mut states, grad, mut copy): Views<'_, E>,
    (update, chance): (Update, Option<Chance>),
    clip: Option<&Factor>,
) -> Result<()> {
    let Update { beta1, beta2, grad_scale, shrink, step_size, root_correction, eps } = update;
    // In the layout of the kernel's struct: seven floats.
    let constants = [beta1, beta2, grad_scale, shrink, step_size, root_correction, eps];
    let count = grad.len();
    let (long_count, stochastic) = (count as u64, u32::from(chance.is_some()));
    let Chance { seed, stream } = chance.unwrap_or(Chance { seed: 0, stream: 0 });
    let function = kernel(device, "adamw", &format!("adamw_{}", E::NAME))?;
    let mut launch = function.builder();
    for state in &mut states {
        launch.arg(state);
    }
    launch.arg(grad);
    match &mut copy {
        Some(copy) => launch.arg(copy),
        None => launch.arg(NULL),
    };
    match clip {
        Some(Factor(clip)) => launch.arg(clip),
        None => launch.arg(NULL),
    };
    launch.arg(&long_count).arg(&constants).arg(&stochastic).arg(&seed).arg(&stream);
    // SAFETY: the kernel's arguments, `count` elements each.
    unsafe { launch.launch(grid_over("adamw", count)?) }.w()?;
    Ok(())
}
