//! The kernels of `cached.cu` on Candle's stream.

#![expect(unsafe_code, reason = "kernels are given addresses")]

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, PushKernelArg};
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{Result, Tensor, bail};

use super::{Lists, Run, Slice};
use crate::ops::cached::{CachePlan, PAGE, Sequence};
use crate::ops::cuda::attention::{Kernel, aligned, prepared};
use crate::ops::cuda::launch::host::sent;
use crate::ops::cuda::launch::{Number, by_type, cuda, grid, tensor, together, view};
use crate::ops::cuda::ptx::kernel;

/// Threads of a block that copies one token's keys and values.
const COPY: u32 = 128;
/// Threads of a block that combines the parts of some queries, one warp per query.
const COMBINE: u32 = 512;
/// Scratch bytes per launch.
const SCRATCH: usize = 256 << 20;

/// A plan's lists on a device, shared by all blocks of a forward pass.
#[derive(Debug)]
pub(crate) struct Uploaded {
    parts: CudaSlice<u32>,
    spans: CudaSlice<u64>,
    wholes: CudaSlice<u32>,
    /// Address of each new token's keys in the first layer.
    places: CudaSlice<u64>,
    slices: Vec<Slice>,
    /// Shape of a page, `[L, PAGE, 2, G, E]`.
    page: [usize; 5],
}

impl Uploaded {
    fn new<E: Number>(plan: &CachePlan, device: &CudaDevice) -> Result<Self> {
        let Some(first) = plan.sequences.iter().find_map(|sequence| sequence.spans.first()) else {
            bail!("new tokens without a page")
        };
        let page: [usize; 5] = first.page.tensor().dims5()?.into();
        let [layers, positions, both, groups, width] = page;
        if positions != PAGE || both != 2 || layers == 0 {
            bail!("a page of shape {page:?}");
        }
        let mut all = Vec::with_capacity(plan.sequences.len());
        let mut places = Vec::with_capacity(plan.tokens);
        for sequence in &plan.sequences {
            let runs = runs::<E>(sequence, device, &page)?;
            let first = sequence.len() - sequence.new;
            let new = runs.iter().flat_map(|run| {
                let skip = first.saturating_sub(run.position).min(run.count);
                (skip..run.count).map(move |at| run.keys + at as u64 * run.line)
            });
            places.extend(new);
            all.push((runs, sequence.new));
        }
        let row = groups * (width + 2) * size_of::<f32>();
        let lists = Lists::new(all.into_iter(), plan.share, SCRATCH / row.max(1));
        Ok(Self {
            parts: sent(device, lists.parts.as_flattened())?,
            spans: sent(device, lists.spans.as_flattened())?,
            wholes: sent(device, lists.wholes.as_flattened())?,
            places: sent(device, &places)?,
            slices: lists.slices,
            page,
        })
    }

    /// The plan's lists, created on first use; `x` with `heads` heads must match their pages.
    fn of<'a, E: Number>(
        plan: &'a CachePlan,
        layer: usize,
        (x, heads): (&Tensor, usize),
    ) -> Result<&'a Self> {
        if plan.on_device.get().is_none() {
            // A concurrent caller has created the same.
            let _ = plan.on_device.set(Self::new::<E>(plan, x.device().as_cuda_device()?)?);
        }
        let Some(uploaded) = plan.on_device.get() else {
            bail!("the lists of a forward pass are lost")
        };
        let [layers, _, _, groups, width] = uploaded.page;
        if layer >= layers || x.dims3()? != (plan.tokens, heads * groups, width) {
            bail!("layer {layer} and rows of {:?} for pages of {:?}", x.shape(), uploaded.page);
        }
        Ok(uploaded)
    }

    /// Elements of a page before a layer.
    fn before(&self, layer: usize) -> u64 {
        (layer * self.page[1..].iter().product::<usize>()) as u64
    }
}

/// A sequence's spans by address.
fn runs<E: Number>(
    sequence: &Sequence,
    device: &CudaDevice,
    shape: &[usize; 5],
) -> Result<Vec<Run>> {
    let stream = device.cuda_stream();
    let line = (shape[2..].iter().product::<usize>() * size_of::<E>()) as u64;
    let mut next = 0;
    let mut runs = Vec::with_capacity(sequence.spans.len());
    for span in &sequence.spans {
        let page = span.page.tensor();
        let (at, count) = (span.slot, span.count);
        if page.dims() != shape || span.position != next || at + count > PAGE {
            bail!("{count} positions from {at} on, expected position {next}, of a page {page:?}");
        }
        let (own, other) = (device.location(), page.device().location());
        if own != other {
            bail!("a cache's page on {other:?}, the tokens on {own:?}");
        }
        next += count;
        let (storage, layout) = page.storage_and_layout();
        let whole = view::<E>(cuda(&storage)?, layout)?;
        // The page lives as long as its plan, and work on the stream is in order.
        let (address, _written) = whole.device_ptr(&stream);
        runs.push(Run { keys: address + at as u64 * line, line, position: span.position, count });
    }
    if sequence.new > next {
        bail!("{} new tokens of {next} positions", sequence.new);
    }
    Ok(runs)
}

/// As [`CachePlan::store`], with checked shapes.
///
/// # Errors
/// A dtype or device other than the pages'; a device error.
pub(crate) fn store(plan: &CachePlan, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
    if plan.tokens == 0 {
        return Ok(());
    }
    together("a cache", [k, v])?;
    let (k, v) = (k.contiguous()?, v.contiguous()?);
    by_type!(k.dtype(), "a cache", E => store_as::<E>(plan, layer, (&k, &v)))
}

fn store_as<E: Number>(plan: &CachePlan, layer: usize, (k, v): (&Tensor, &Tensor)) -> Result<()> {
    let device = k.device().as_cuda_device()?;
    let (tokens, groups, width) = k.dims3()?;
    let uploaded = Uploaded::of::<E>(plan, layer, (k, 1))?;
    let ((k, of_k), (v, of_v)) = (k.storage_and_layout(), v.storage_and_layout());
    let (k, v) = (view::<E>(cuda(&k)?, of_k)?, view::<E>(cuda(&v)?, of_v)?);
    let line = (groups * width) as u32;
    let before = uploaded.before(layer);
    let function = kernel(device, "cached", &format!("cache_store_{}", E::NAME))?;
    let mut launch = function.builder();
    launch.arg(&k).arg(&v).arg(&uploaded.places).arg(&before).arg(&line);
    // SAFETY: the kernel's arguments; a block a token, each of which has a place in a page of this shape.
    unsafe { launch.launch(grid("a cache", (tokens, 1), COPY)?) }.w()?;
    Ok(())
}

/// As [`CachePlan::attend`], with checked shapes, for `groups` key heads.
///
/// # Errors
/// A dtype or device other than the pages'; a device error.
pub(crate) fn attend(plan: &CachePlan, layer: usize, q: &Tensor) -> Result<Tensor> {
    if plan.tokens == 0 {
        return Ok(q.clone());
    }
    let q = aligned(q)?;
    by_type!(q.dtype(), "attention over a cache", E => attend_as::<E>(plan, layer, &q))
}

fn attend_as<E: Number>(plan: &CachePlan, layer: usize, q: &Tensor) -> Result<Tensor> {
    let device = q.device().as_cuda_device()?;
    let (tokens, heads, width) = q.dims3()?;
    let (share, groups) = (plan.share, heads / plan.share);
    let uploaded = Uploaded::of::<E>(plan, layer, (q, share))?;
    let (storage, layout) = q.storage_and_layout();
    let view = view::<E>(cuda(&storage)?, layout)?;
    let rows = uploaded.slices.iter().map(|slice| slice.rows).max().unwrap_or(0) * groups;
    // SAFETY: the first kernel writes what the second reads of both: each row is of one query and one part. The second
    // writes `out` whole: each query is in one whole.
    let (mut sums, mut numbers, mut out) = unsafe {
        let sums = device.alloc::<f32>(rows * width)?;
        (sums, device.alloc::<f32>(rows * 2)?, device.alloc::<E>(tokens * heads * width)?)
    };
    let (before, scale) = (uploaded.before(layer), 1.0 / (width as f32).sqrt());
    let [share, row] = [share, width].map(|size| size as u32);
    for slice in &uploaded.slices {
        let parts = uploaded.parts.slice(slice.parts.start * 6..slice.parts.end * 6);
        let wholes = uploaded.wholes.slice(slice.wholes.start * 4..slice.wholes.end * 4);
        let rows = slice.rows as u32;
        let blocks = (slice.parts.len(), groups);
        let (function, config) = prepared::<E>(device, Kernel::Cached, width, blocks)?;
        let mut launch = function.builder();
        launch.arg(&view).arg(&parts).arg(&uploaded.spans).arg(&mut sums).arg(&mut numbers);
        launch.arg(&before).arg(&rows).arg(&share).arg(&scale);
        // SAFETY: the kernel's arguments; the lists are those of a plan with as many tokens, over pages that were checked.
        unsafe { launch.launch(config) }.w()?;
        let function = kernel(device, "cached", &format!("attention_combine_{}", E::NAME))?;
        let mut launch = function.builder();
        launch.arg(&sums).arg(&numbers).arg(&wholes).arg(&mut out);
        launch.arg(&rows).arg(&share).arg(&row);
        // SAFETY: the kernel's arguments, of the same lists.
        unsafe {
            launch.launch(grid("attention over a cache", (slice.wholes.len(), groups), COMBINE)?)
        }
        .w()?;
    }
    Ok(tensor(device, out, (tokens, heads, width)))
}
