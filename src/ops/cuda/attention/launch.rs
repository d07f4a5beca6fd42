//! The kernels of `attention.cu` as an op of Candle's graph.

#![expect(unsafe_code, reason = "kernels are given addresses")]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute_enum as Attribute;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::{CudaDevice, CudaStorage, WrapErr};
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};

use super::{Kernel, Lists, THREADS};
use crate::ops::AttentionPlan;
use crate::ops::cuda::launch::host::Sendable;
use crate::ops::cuda::launch::{Number, by_type, cuda, grid, on_cpu, tensor, view};
use crate::ops::cuda::ptx::{CudaFunc, kernel};

/// Head dimensions that kernels are compiled for.
const WIDTHS: [usize; 4] = [32, 64, 96, 128];
/// Largest number of query heads per key head: the kernels' fast division needs small numbers.
const MOST_SHARE: usize = 512;
/// Its name in errors.
const OP: &str = "attention";
/// Shared memory available to a launch without opting in.
const GIVEN: usize = 48 << 10;

/// Whether there are kernels for `share` query heads per key head, this head dimension and dtype. The plain form
/// supports any.
pub(crate) fn takes(dtype: DType, share: usize, width: usize) -> bool {
    matches!(dtype, DType::F32 | DType::BF16) && share <= MOST_SHARE && WIDTHS.contains(&width)
}

/// The smallest supported head dimension that is at least this one.
pub(crate) fn padded(width: usize) -> Option<usize> {
    WIDTHS.into_iter().find(|of_kernels| *of_kernels >= width)
}

/// As `attention` of `ops`, with checked shapes. Scores are multiplied by `scale` and never stored.
///
/// # Errors
/// An unsupported dtype or head dimension; a device error.
pub(crate) fn on_cuda(
    [q, k, v]: [&Tensor; 3],
    scale: f32,
    plan: &Arc<AttentionPlan>,
) -> Result<Tensor> {
    let ((tokens, heads, width), groups) = (q.dims3()?, k.dim(1)?);
    let share = heads / groups.max(1);
    if !takes(q.dtype(), share, width) || k.dtype() != q.dtype() || v.dtype() != q.dtype() {
        bail!(
            "attention on CUDA got heads of width {width} in {:?}, {:?} and {:?}, {share} to a key head; expected a width of \
             32, 64, 96 or 128, f32 or bf16, at most {MOST_SHARE}",
            q.dtype(),
            k.dtype(),
            v.dtype()
        );
    }
    // The kernels count rows in 32 bits, including a tile beyond the last.
    if tokens.saturating_mul(heads) > 1 << 31 {
        bail!("attention over {tokens} tokens of {heads} heads; expected a smaller micro-batch");
    }
    if tokens == 0 {
        return Ok(q.clone());
    }
    let lists = Uploaded::of(plan, share, q.device().as_cuda_device()?)?;
    let op = ForestAttention { lists, scale, log_sums: Mutex::default() };
    aligned(q)?.apply_op3(&aligned(k)?, &aligned(v)?, op)
}

/// Contiguous and 16-byte aligned.
pub(in crate::ops::cuda) fn aligned(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    let offset = x.layout().start_offset() * x.dtype().size_in_bytes();
    if offset.is_multiple_of(16) { Ok(x) } else { x.force_contiguous() }
}

/// Computes a plan's lists into page-locked memory, so that uploading them needs no synchronisation; callable on any
/// thread.
///
/// # Errors
/// A driver error.
pub(crate) fn stage(plan: &AttentionPlan, share: usize, device: &CudaDevice) -> Result<()> {
    let lists = Prepared::new(plan, share, device)?;
    *plan.on_device.lock() = State::Sendable(Box::new(lists));
    Ok(())
}

/// A plan's lists for a device, shared by the forward and backward of all blocks of a micro-batch, and by clones.
#[derive(Clone, Debug, Default)]
pub(crate) struct Kept(Arc<Mutex<State>>);

impl Kept {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Not,
    Sendable(Box<Prepared>),
    There(Arc<Uploaded>),
}

/// Lists in page-locked memory.
#[derive(Debug)]
struct Prepared {
    share: usize,
    queries: [Sendable<u32>; 2],
    keys: [Sendable<u32>; 2],
}

impl Prepared {
    fn new(plan: &AttentionPlan, share: usize, device: &CudaDevice) -> Result<Self> {
        let locked = |Lists { tiles, ranges }: Lists| -> Result<_> {
            let tiles = Sendable::new(device, tiles.as_flattened())?;
            Ok([tiles, Sendable::new(device, ranges.as_flattened())?])
        };
        let (queries, keys) = (Lists::of_queries(plan, share), Lists::of_keys(plan));
        Ok(Self { share, queries: locked(queries)?, keys: locked(keys)? })
    }

    fn send(self, device: &CudaDevice) -> Result<Uploaded> {
        let sent = |[tiles, ranges]: [Sendable<u32>; 2]| -> Result<_> {
            Ok(OnDevice { tiles: tiles.send(device)?, ranges: ranges.send(device)? })
        };
        let Self { share, queries, keys } = self;
        let (queries, keys) = (sent(queries)?, sent(keys)?);
        Ok(Uploaded { device: device.clone(), share, queries, keys })
    }
}

/// Lists on a device.
#[derive(Debug)]
struct Uploaded {
    device: CudaDevice,
    share: usize,
    queries: OnDevice,
    keys: OnDevice,
}

#[derive(Debug)]
struct OnDevice {
    tiles: CudaSlice<u32>,
    ranges: CudaSlice<u32>,
}

impl OnDevice {
    fn count(&self) -> usize {
        self.tiles.len() / 4
    }
}

impl Uploaded {
    /// The existing lists, or new ones.
    fn of(plan: &AttentionPlan, share: usize, device: &CudaDevice) -> Result<Arc<Self>> {
        let mut kept = plan.on_device.lock();
        let lists = match std::mem::take(&mut *kept) {
            State::There(lists) if lists.share == share && lists.device.id() == device.id() => {
                lists
            }
            State::Sendable(lists) if lists.share == share => Arc::new(lists.send(device)?),
            _ => Arc::new(Prepared::new(plan, share, device)?.send(device)?),
        };
        *kept = State::There(lists.clone());
        Ok(lists)
    }
}

/// The forward keeps one log-sum-exp per query, `[G, T, H/G]`, for the backward.
struct ForestAttention {
    lists: Arc<Uploaded>,
    scale: f32,
    log_sums: Mutex<Option<CudaSlice<f32>>>,
}

/// A kernel for a head dimension, and its launch configuration for this many tiles and key heads.
pub(in crate::ops::cuda) fn prepared<E: Number>(
    device: &CudaDevice,
    which: Kernel,
    width: usize,
    (tiles, groups): (usize, usize),
) -> Result<(CudaFunc, LaunchConfig)> {
    let function = kernel(device, which.module(), &which.entry(E::NAME, width))?;
    let shared = which.shared(size_of::<E>(), width);
    if shared > GIVEN {
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, shared as i32).w()?;
    }
    let mut config = grid(OP, (tiles, groups), THREADS)?;
    config.shared_mem_bytes = shared as u32;
    Ok((function, config))
}

/// Sizes passed to every launch.
struct Sizes {
    tokens: u32,
    groups: u32,
    share: u32,
    width: usize,
    scale: f32,
}

impl Sizes {
    fn of(q: &Shape, k: &Shape, scale: f32) -> Result<Self> {
        let ((tokens, heads, width), (_, groups, _)) = (q.dims3()?, k.dims3()?);
        let [tokens, groups, share] = [tokens, groups, heads / groups].map(|size| size as u32);
        Ok(Self { tokens, groups, share, width, scale })
    }

    /// Grid of a launch over a list of tiles.
    fn blocks(&self, lists: &OnDevice) -> (usize, usize) {
        (lists.count(), self.groups as usize)
    }

    /// Total number of queries.
    fn rows(&self) -> usize {
        self.tokens as usize * (self.groups * self.share) as usize
    }

    /// `out · d_out` of each query, `[G, T, H/G]`.
    fn deltas<E: Number>(
        &self,
        device: &CudaDevice,
        (out, d_out): (&CudaView<'_, E>, &CudaView<'_, E>),
    ) -> Result<CudaSlice<f32>> {
        // SAFETY: the kernel writes it whole.
        let mut deltas = unsafe { device.alloc::<f32>(self.rows()) }?;
        let function = kernel(device, "attention", &format!("attention_delta_{}", E::NAME))?;
        let width = self.width as u32;
        let mut launch = function.builder();
        launch.arg(out).arg(d_out).arg(&mut deltas);
        launch.arg(&self.tokens).arg(&self.groups).arg(&self.share).arg(&width);
        // One warp per row, up to as many blocks as any GPU runs at once.
        let warps = (THREADS / 32) as usize;
        let blocks = self.rows().div_ceil(warps).min(1 << 14);
        let config = grid(OP, (blocks, 1), THREADS)?;
        // SAFETY: the kernel's arguments, of as many rows.
        unsafe { launch.launch(config) }.w()?;
        Ok(deltas)
    }
}

impl CustomOp3 for ForestAttention {
    fn name(&self) -> &'static str {
        "forest-attention-cuda"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        on_cpu(self.name())
    }

    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let sizes = Sizes::of(q_layout.shape(), k_layout.shape(), self.scale)?;
        let inputs = [(q, q_layout), (k, k_layout), (v, v_layout)];
        let out = by_type!(q.dtype(), "attention", E => self.forward::<E>(inputs, &sizes)?);
        Ok((out, q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let d_out = aligned(&d_out.to_dtype(q.dtype())?)?;
        let inputs = [q, k, v, out, &d_out];
        let [d_q, d_k, d_v] = by_type!(q.dtype(), "attention", E => self.backward::<E>(inputs)?);
        Ok((Some(d_q), Some(d_k), Some(d_v)))
    }
}

impl ForestAttention {
    fn forward<E: Number>(
        &self,
        inputs: [(&CudaStorage, &Layout); 3],
        sizes: &Sizes,
    ) -> Result<CudaStorage> {
        let device = inputs[0].0.device();
        let [q, k, v] = inputs.map(|(storage, layout)| view::<E>(storage, layout));
        let (q, k, v) = (q?, k?, v?);
        let lists = &self.lists.queries;
        // SAFETY: the kernel writes both whole: each query lies in one tile.
        let (mut out, mut log_sums) = unsafe {
            (device.alloc::<E>(sizes.rows() * sizes.width)?, device.alloc::<f32>(sizes.rows())?)
        };
        let (function, config) =
            prepared::<E>(device, Kernel::Forward, sizes.width, sizes.blocks(lists))?;
        let mut launch = function.builder();
        launch.arg(&q).arg(&k).arg(&v).arg(&mut out).arg(&mut log_sums);
        launch.arg(&lists.tiles).arg(&lists.ranges);
        launch.arg(&sizes.tokens).arg(&sizes.share).arg(&sizes.scale);
        // SAFETY: the kernel's arguments; the lists are those of a plan with as many tokens.
        unsafe { launch.launch(config) }.w()?;
        *self.log_sums.lock().unwrap_or_else(PoisonError::into_inner) = Some(log_sums);
        Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
    }

    /// Gradients of q, k and v, given q, k, v, the output and its gradient.
    fn backward<E: Number>(&self, tensors: [&Tensor; 5]) -> Result<[Tensor; 3]> {
        let sizes = Sizes::of(tensors[0].shape(), tensors[1].shape(), self.scale)?;
        let device = tensors[0].device().as_cuda_device()?;
        let kept = self.log_sums.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(log_sums) = &*kept else { bail!("attention's backward ran before its forward") };
        let guards = tensors.map(Tensor::storage_and_layout);
        let mut views = Vec::with_capacity(5);
        for (storage, layout) in &guards {
            views.push(view::<E>(cuda(storage)?, layout)?);
        }
        let [q, k, v, out, d_out] = &views[..] else {
            bail!("attention's backward has five inputs")
        };
        let deltas = sizes.deltas(device, (out, d_out))?;
        let keys = sizes.tokens as usize * sizes.groups as usize * sizes.width;
        // SAFETY: the kernels write all three whole: each query and each key lies in one tile.
        let (mut d_q, mut d_k, mut d_v) = unsafe {
            let d_q = device.alloc::<E>(sizes.rows() * sizes.width)?;
            (d_q, device.alloc::<E>(keys)?, device.alloc::<E>(keys)?)
        };
        for which in [Kernel::BackwardKeys, Kernel::BackwardQueries] {
            let of_keys = which == Kernel::BackwardKeys;
            let lists = if of_keys { &self.lists.keys } else { &self.lists.queries };
            let (function, config) =
                prepared::<E>(device, which, sizes.width, sizes.blocks(lists))?;
            let mut launch = function.builder();
            launch.arg(q).arg(k).arg(v).arg(d_out).arg(log_sums).arg(&deltas);
            if of_keys {
                launch.arg(&mut d_k).arg(&mut d_v);
            } else {
                launch.arg(&mut d_q);
            }
            launch.arg(&lists.tiles).arg(&lists.ranges);
            launch.arg(&sizes.tokens).arg(&sizes.share).arg(&sizes.scale);
            // SAFETY: the kernel's arguments; the lists are those of a plan with as many tokens.
            unsafe { launch.launch(config) }.w()?;
        }
        let (of_queries, of_keys) = (tensors[0].shape(), tensors[1].shape());
        Ok([
            tensor(device, d_q, of_queries),
            tensor(device, d_k, of_keys),
            tensor(device, d_v, of_keys),
        ])
    }
}
