//! The kernels of `cached.cu` on Candle's stream.

#![expect(unsafe_code, reason = "kernels are given addresses")]

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, PushKernelArg};
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{Result, Tensor, bail};

use super::{Lists, Run};
use crate::ops::cached::{CachePlan, PAGE, Sequence};
use crate::ops::cuda::attention::{Kernel, aligned, prepared};
use crate::ops::cuda::launch::{Number, by_type, cuda, grid, tensor, view};
use crate::ops::cuda::ptx::kernel;

/// Threads of a block that copies a token's keys and values.
const COPY: u32 = 128;
/// Threads of a block that adds up the parts of some queries, a warp for each.
const COMBINE: u32 = 512;

/// A plan's lists on a device, for all blocks of a forward pass.
#[derive(Debug)]
pub(crate) struct Uploaded {
    parts: CudaSlice<u32>,
    spans: CudaSlice<u64>,
    wholes: CudaSlice<u32>,
    /// Where each new token's keys in the first layer are.
    places: CudaSlice<u64>,
    rows: usize,
}

impl Uploaded {
    fn new<E: Number>(plan: &CachePlan, device: &CudaDevice) -> Result<Self> {
        let mut all = Vec::with_capacity(plan.sequences.len());
        let mut places = Vec::with_capacity(plan.tokens);
        for sequence in &plan.sequences {
            let runs = runs::<E>(sequence, device)?;
            let first = sequence.len() - sequence.new;
            let new = runs.iter().flat_map(|run| {
                let skip = first.saturating_sub(run.position).min(run.count);
                (skip..run.count).map(move |at| run.keys + at as u64 * run.line)
            });
            places.extend(new);
            all.push((runs, sequence.new));
        }
        let lists = Lists::new(all.into_iter(), plan.share);
        Ok(Self {
            parts: device.clone_htod(lists.parts.as_flattened())?,
            spans: device.clone_htod(lists.spans.as_flattened())?,
            wholes: device.clone_htod(lists.wholes.as_flattened())?,
            places: device.clone_htod(&places)?,
            rows: lists.rows,
        })
    }

    /// Those of the plan, made when they are first asked for.
    fn of<'a, E: Number>(plan: &'a CachePlan, device: &CudaDevice) -> Result<&'a Self> {
        if plan.on_device.get().is_none() {
            // Whoever comes second has made the same.
            let _ = plan.on_device.set(Self::new::<E>(plan, device)?);
        }
        match plan.on_device.get() {
            Some(uploaded) => Ok(uploaded),
            None => bail!("the lists of a forward pass are lost"),
        }
    }
}

/// A sequence's spans by their addresses.
fn runs<E: Number>(sequence: &Sequence, device: &CudaDevice) -> Result<Vec<Run>> {
    let stream = device.cuda_stream();
    sequence
        .spans
        .iter()
        .map(|span| {
            let page = span.page.tensor();
            let (layers, positions, both, groups, width) = page.dims5()?;
            if positions != PAGE || both != 2 || layers == 0 {
                bail!("a page of shape {:?}", page.shape());
            }
            let line = (both * groups * width * size_of::<E>()) as u64;
            let (storage, layout) = page.storage_and_layout();
            let whole = view::<E>(cuda(&storage)?, layout)?;
            // The page lives as long as its plan, and work on the stream is in order.
            let (address, _written) = whole.device_ptr(&stream);
            let keys = address + span.slot as u64 * line;
            Ok(Run { keys, line, position: span.position, count: span.count })
        })
        .collect()
}

/// As [`CachePlan::store`], whose shapes were checked.
///
/// # Errors
/// Another type or device than the pages'; the device's.
pub(crate) fn store(plan: &CachePlan, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
    if plan.tokens == 0 {
        return Ok(());
    }
    let page = page_like(plan, k)?;
    let (k, v) = (k.contiguous()?, v.contiguous()?);
    by_type!(page.dtype(), "a cache", E => store_as::<E>(plan, layer, (&k, &v)))
}

/// A page of the plan, where it has the type and the device of `x`.
fn page_like<'a>(plan: &'a CachePlan, x: &Tensor) -> Result<&'a Tensor> {
    let mut pages = plan.sequences.iter().flat_map(|sequence| &sequence.spans);
    let Some(first) = pages.next() else { bail!("new tokens without a page") };
    let first = first.page.tensor();
    let same = |page: &Tensor| {
        page.dtype() == x.dtype()
            && page.device().same_device(x.device())
            && page.shape() == first.shape()
    };
    match std::iter::once(first)
        .chain(pages.map(|span| span.page.tensor()))
        .find(|page| !same(page))
    {
        None => Ok(first),
        Some(page) => bail!("rows of {:?} for a page of {:?}", x.dtype(), page.dtype()),
    }
}

fn store_as<E: Number>(plan: &CachePlan, layer: usize, (k, v): (&Tensor, &Tensor)) -> Result<()> {
    let device = k.device().as_cuda_device()?;
    let (tokens, groups, width) = k.dims3()?;
    let uploaded = Uploaded::of::<E>(plan, device)?;
    let ((k, of_k), (v, of_v)) = (k.storage_and_layout(), v.storage_and_layout());
    let (k, v) = (view::<E>(cuda(&k)?, of_k)?, view::<E>(cuda(&v)?, of_v)?);
    let line = (groups * width) as u32;
    let before = (layer * PAGE * 2 * groups * width) as u64;
    let function = kernel(device, "cached", &format!("cache_store_{}", E::NAME))?;
    let mut launch = function.builder();
    launch.arg(&k).arg(&v).arg(&uploaded.places).arg(&before).arg(&line);
    // SAFETY: the kernel's arguments; a block a token, each of which has a place in a page of this shape.
    unsafe { launch.launch(grid((tokens, 1), COPY)) }.w()?;
    Ok(())
}

/// As [`CachePlan::attend`], whose shapes were checked, for `groups` key heads.
///
/// # Errors
/// Another type or device than the pages'; the device's.
pub(crate) fn attend(plan: &CachePlan, layer: usize, q: &Tensor) -> Result<Tensor> {
    if plan.tokens == 0 {
        return Ok(q.clone());
    }
    let page = page_like(plan, q)?;
    let q = aligned(q)?;
    by_type!(page.dtype(), "attention over a cache", E => attend_as::<E>(plan, layer, &q))
}

fn attend_as<E: Number>(plan: &CachePlan, layer: usize, q: &Tensor) -> Result<Tensor> {
    let device = q.device().as_cuda_device()?;
    let (tokens, heads, width) = q.dims3()?;
    let (share, groups) = (plan.share, heads / plan.share);
    let uploaded = Uploaded::of::<E>(plan, device)?;
    let (storage, layout) = q.storage_and_layout();
    let view = view::<E>(cuda(&storage)?, layout)?;
    let scratch = groups * uploaded.rows;
    // SAFETY: the first kernel writes both whole: each row is of one query and one part. The second writes `out`: each
    // query is in one whole.
    let (mut sums, mut numbers, mut out) = unsafe {
        let sums = device.alloc::<f32>(scratch * width)?;
        (sums, device.alloc::<f32>(scratch * 2)?, device.alloc::<E>(tokens * heads * width)?)
    };
    let before = (layer * PAGE * 2 * groups * width) as u64;
    let [rows, share, row] = [uploaded.rows, share, width].map(|size| size as u32);
    let scale = 1.0 / (width as f32).sqrt();
    let blocks = (uploaded.parts.len() / 6, groups);
    let (function, config) = prepared::<E>(device, Kernel::Cached, width, blocks)?;
    let mut launch = function.builder();
    launch.arg(&view).arg(&uploaded.parts).arg(&uploaded.spans).arg(&mut sums).arg(&mut numbers);
    launch.arg(&before).arg(&rows).arg(&share).arg(&scale);
    // SAFETY: the kernel's arguments; the lists are those of a plan with as many tokens, over pages of this shape.
    unsafe { launch.launch(config) }.w()?;
    let function = kernel(device, "cached", &format!("attention_combine_{}", E::NAME))?;
    let mut launch = function.builder();
    launch.arg(&sums).arg(&numbers).arg(&uploaded.wholes).arg(&mut out);
    launch.arg(&rows).arg(&share).arg(&row);
    let blocks = (uploaded.wholes.len() / 4, groups);
    // SAFETY: the kernel's arguments, of the same lists.
    unsafe { launch.launch(grid(blocks, COMBINE)) }.w()?;
    Ok(tensor(device, out, (tokens, heads, width)))
}
