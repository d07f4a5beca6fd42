//! The head on CUDA: cuBLAS products around the kernels of `head.cu`, one chunk of rows at a time.
//!
//! Logits are f32 whatever the weight's type, as on the CPU: a product of bf16 matrices is written in f32, and rounded
//! to bf16 only as a gradient, for the next products. All sums of a row have one order, so a run repeats bit for bit;
//! the products' order is cuBLAS's, which may choose by the number of rows.

#![expect(unsafe_code, reason = "kernels and cuBLAS are given addresses")]

mod anchor;
mod product;

use candle_core::cuda_backend::cudarc::cublas::sys;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DevicePtrMut, PushKernelArg};
use candle_core::cuda_backend::{WrapErr, gemm_reduced_precision_f32};
use candle_core::{CudaDevice, DType, Result, Tensor, WithDType};
use half::bf16;

use crate::ops::cuda::launch::top::{self, Logits};
use crate::ops::cuda::launch::{self, NULL, cuda, grid, host::sent, pairs::Uploaded, tensor, view};
use crate::ops::head::{
    Anchor, Asked, Detail, GPU_CHUNK_ELEMENTS, Grads, Pairs, Pass, Pending, Placed, Readings,
    RowStats, Rows, TOP, Weigh, entropy_among,
};
use anchor::{AnchorOnDevice, ReadRows};
use product::{Matrix, product};

/// Threads of a block that reads a row.
const READ_BLOCK: u32 = 512;
/// Threads of a block that writes a part of a row.
const WRITE_BLOCK: u32 = 256;
/// Elements of such a part.
const SPAN: u64 = 16384;
/// Numbers that the kernel says of a row.
const STATS: usize = 5;

/// What the head computes with.
trait Number: launch::Number + WithDType {
    /// Its name in cuBLAS.
    const TYPE: sys::cudaDataType;
    /// The kernel that writes a gradient of this type.
    const GRAD: &'static str;

    fn compute() -> sys::cublasComputeType_t;
}

impl Number for f32 {
    const TYPE: sys::cudaDataType = sys::cudaDataType_t::CUDA_R_32F;
    const GRAD: &'static str = "head_grad_f32";

    fn compute() -> sys::cublasComputeType_t {
        if gemm_reduced_precision_f32() {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
        } else {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
        }
    }
}

impl Number for bf16 {
    const TYPE: sys::cudaDataType = sys::cudaDataType_t::CUDA_R_16BF;
    const GRAD: &'static str = "head_grad_f32_to_bf16";

    fn compute() -> sys::cublasComputeType_t {
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
    }
}

/// As `on_cpu` of `ops::head`, without waiting.
///
/// # Shapes
/// - `hidden`: `[T, D]`, `weight`: `[V, D]`, contiguous on one device
pub(crate) fn on_cuda(
    hidden: &Tensor,
    weight: &Tensor,
    rows: Rows,
    pass: Pass<'_>,
) -> Result<(Pending, Grads)> {
    let slopes = pass.gradient.map(|(slopes, d_weight)| {
        let d_logps = in_order(&rows, slopes.d_logps);
        (
            Origin::Host { d_logps, mean_logp: slopes.mean_logp, squared_lse: slopes.squared_lse },
            d_weight,
        )
    });
    by_type((hidden, weight), pass.anchor, (rows, pass.detail), slopes)
}

/// What is said of targets, row by row.
fn in_order(rows: &Rows, of_targets: &[f32]) -> Vec<f32> {
    rows.order.iter().map(|&(index, _)| of_targets[index]).collect()
}

/// As `backward_of_pairs` of `ops::head`, without waiting.
///
/// # Shapes
/// As [`on_cuda`].
pub(crate) fn of_pairs(
    hidden: &Tensor,
    weight: &Tensor,
    rows: Rows,
    (pairs, asked): (&Pairs, Asked<'_>),
) -> Result<(Pending, Grads)> {
    let slopes = Origin::Pairs(pairs, Placed::new(pairs, &rows));
    let wanted = (rows, asked.detail);
    by_type((hidden, weight), asked.anchor, wanted, Some((slopes, asked.d_weight)))
}

/// As `backward_by` of `ops::head`, without waiting.
///
/// # Shapes
/// As [`on_cuda`].
pub(crate) fn by_host(
    hidden: &Tensor,
    weight: &Tensor,
    rows: Rows,
    (weigh, asked): (Weigh, Asked<'_>),
) -> Result<(Pending, Grads)> {
    let wanted = (rows, asked.detail);
    by_type((hidden, weight), asked.anchor, wanted, Some((Origin::Asked(weigh), asked.d_weight)))
}

/// Where the slopes of the targets come from.
enum Origin<'a> {
    /// The host knows them, row by row; the other two are as in `Slopes`.
    Host { d_logps: Vec<f32>, mean_logp: f32, squared_lse: f32 },
    /// They follow from what the head reads.
    Pairs(&'a Pairs, Placed),
    /// The host makes them of what the head reads.
    Asked(Weigh),
}

/// `wanted`: the rows, and how much of them; `slopes`, with whether the weight's gradient is.
fn by_type(
    (hidden, weight): (&Tensor, &Tensor),
    anchor: Option<&Anchor>,
    wanted: (Rows, Detail),
    slopes: Option<(Origin<'_>, bool)>,
) -> Result<(Pending, Grads)> {
    launch::together("the head", [hidden, weight])?;
    if let Some(anchor) = anchor {
        launch::together("the head", [hidden, &anchor.hidden, &anchor.weight])?;
    }
    match weight.dtype() {
        DType::BF16 => by_chunks::<bf16>((hidden, weight), anchor, wanted, slopes),
        DType::F32 => by_chunks::<f32>((hidden, weight), anchor, wanted, slopes),
        other => candle_core::bail!("a head of {other:?}, expected f32 or bf16"),
    }
}

/// As `logits` of `ops::head`, of rows in the weight's type.
///
/// # Shapes
/// - `x`: `[R, D]`, `weight`: `[V, D]`, on one device  →  `[R, V]`, f32
pub(crate) fn logits(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    launch::together("the head", [x, weight])?;
    match weight.dtype() {
        DType::BF16 => logits_of::<bf16>(x, weight),
        DType::F32 => logits_of::<f32>(x, weight),
        other => candle_core::bail!("a head of {other:?}, expected f32 or bf16"),
    }
}

fn logits_of<E: Number>(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (device, (rows, width), vocab) = (x.device().as_cuda_device()?, x.dims2()?, weight.dim(0)?);
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let ((x, of_x), (w, of_w)) = (x.storage_and_layout(), weight.storage_and_layout());
    let (x, w) = (view::<E>(cuda(&x)?, of_x)?, view::<E>(cuda(&w)?, of_w)?);
    // SAFETY: the product writes it whole.
    let mut logits = unsafe { device.alloc::<f32>(rows * vocab) }?;
    let factors = (Matrix::plain(&x), Matrix::turned(&w));
    product(device, factors, &mut logits.slice_mut(..), [rows, vocab, width], false)?;
    Ok(tensor(device, logits, (rows, vocab)))
}

/// The inputs of a head on the device, `[R, D]` and `[V, D]`.
type Views<'a, E> = (&'a CudaView<'a, E>, &'a CudaView<'a, E>);

/// What a pass reads: the head's inputs and, where rows are compared with it, an anchor's.
#[derive(Clone, Copy)]
struct Inputs<'a, E> {
    own: Views<'a, E>,
    anchor: Option<Views<'a, E>>,
}

fn by_chunks<E: Number>(
    (hidden, weight): (&Tensor, &Tensor),
    anchor: Option<&Anchor>,
    (rows, detail): (Rows, Detail),
    slopes: Option<(Origin<'_>, bool)>,
) -> Result<(Pending, Grads)> {
    let Some(anchor) = anchor else {
        return beside::<E>((hidden, weight), None, (rows, detail), slopes);
    };
    let some = some_rows(anchor.hidden.device().as_cuda_device()?, &rows, anchor.hidden.dim(0)?)?;
    let x = rows_of(&anchor.hidden, some.as_ref())?.to_dtype(E::DTYPE)?.contiguous()?;
    let ((x, of_x), (w, of_w)) = (x.storage_and_layout(), anchor.weight.storage_and_layout());
    let views = (&view::<E>(cuda(&x)?, of_x)?, &view::<E>(cuda(&w)?, of_w)?);
    let slopes_of =
        if anchor.slopes.is_empty() { Vec::new() } else { in_order(&rows, &anchor.slopes) };
    beside((hidden, weight), Some(&(views, slopes_of)), (rows, detail), slopes)
}

/// The ids of a head's rows, where they are not all rows.
fn some_rows(device: &CudaDevice, rows: &Rows, all: usize) -> Result<Option<Tensor>> {
    let count = rows.hidden.len();
    let some = (0 < count && count < all).then(|| sent(device, &rows.hidden)).transpose()?;
    Ok(some.map(|ids| tensor(device, ids, count)))
}

fn rows_of(hidden: &Tensor, some: Option<&Tensor>) -> Result<Tensor> {
    some.map_or_else(|| Ok(hidden.clone()), |ids| hidden.index_select(ids, 0))
}

/// `anchor`: its inputs of the rows, and the slopes of their targets, row by row.
fn beside<E: Number>(
    (hidden, weight): (&Tensor, &Tensor),
    anchor: Option<&(Views<'_, E>, Vec<f32>)>,
    (rows, detail): (Rows, Detail),
    slopes: Option<(Origin<'_>, bool)>,
) -> Result<(Pending, Grads)> {
    let (device, (t, width), vocab) =
        (hidden.device().as_cuda_device()?, hidden.dims2()?, weight.dim(0)?);
    let (count, all) = (rows.hidden.len(), hidden.device());
    let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, all);
    if count == 0 {
        let wanted = |wanted: bool| wanted.then(|| zeros((vocab, width))).transpose();
        let grads =
            slopes.map(|(_, w)| Ok::<_, candle_core::Error>((zeros((t, width))?, wanted(w)?)));
        return Ok((Readings::zeros(0, detail).into(), grads.transpose()?));
    }
    let ids = some_rows(device, &rows, t)?;
    let x = rows_of(hidden, ids.as_ref())?.to_dtype(E::DTYPE)?.contiguous()?;
    let mut head = Head::<E>::new(device, &rows, (width, vocab), detail)?;
    let ((x, of_x), (w, of_w)) = (x.storage_and_layout(), weight.storage_and_layout());
    let own = (&view::<E>(cuda(&x)?, of_x)?, &view::<E>(cuda(&w)?, of_w)?);
    let inputs = Inputs { own, anchor: anchor.map(|(views, _)| *views) };
    if let Some((_, slopes)) = anchor {
        head.stand_beside(slopes)?;
    }
    match slopes {
        None => head.chunks(inputs)?,
        Some((Origin::Host { d_logps, mean_logp, squared_lse }, d_weight)) => {
            let slopes = (sent(device, &d_logps)?, mean_logp, squared_lse);
            head.grads = Some(GradsOnDevice::new(&head, slopes, d_weight)?);
            head.chunks(inputs)?;
        }
        Some((Origin::Pairs(pairs, placed), d_weight)) => {
            let pairs = Uploaded::new(device, pairs, &placed)?;
            head.two_passes(inputs, d_weight, |readings| pairs.slopes(&readings.logps.slice(..)))?;
        }
        Some((Origin::Asked(weigh), d_weight)) => {
            let weigh = |readings: &OnDevice| readings.slopes(device, rows.clone(), weigh);
            head.two_passes(inputs, d_weight, weigh)?;
        }
    }
    let unread = |rows| Unread { readings: head.readings, device: device.clone(), rows };
    let Some(grads) = head.grads else { return Ok((unread(rows).into(), None)) };
    let d_x = tensor(device, grads.d_x, (count, width));
    let d_hidden = match ids {
        // Candle's `index_add` gives a thread a column: few threads for many rows.
        Some(_) => {
            let d_hidden = zeros((t, width))?;
            launch::embed::add_rows(&d_hidden, &rows.hidden, &d_x)?;
            d_hidden
        }
        None => d_x,
    };
    let d_weight = grads.d_weight.map(|d| tensor(device, d, (vocab, width)));
    Ok((unread(rows).into(), Some((d_hidden, d_weight))))
}

/// Everything of one call that lies on the device.
struct Head<'a, E> {
    device: &'a CudaDevice,
    rows: usize,
    width: usize,
    vocab: usize,
    /// Rows at once.
    chunk: usize,
    /// Where each row's targets start, and their ids, row by row.
    starts: CudaSlice<u32>,
    ids: CudaSlice<u32>,
    logits: CudaSlice<f32>,
    readings: OnDevice,
    anchor: Option<AnchorOnDevice>,
    /// Whether the readings are there.
    is_read: bool,
    grads: Option<GradsOnDevice<E>>,
}

/// What rows say.
#[derive(Debug)]
struct OnDevice {
    /// Of the targets, row by row.
    logps: CudaSlice<f32>,
    log_sums: CudaSlice<f32>,
    /// [`RowStats`], [`STATS`] numbers a row.
    stats: Option<CudaSlice<f32>>,
    top: Option<TopOnDevice>,
    /// From an anchor, one a row.
    divergences: Option<CudaSlice<f32>>,
}

/// The likeliest tokens of rows.
#[derive(Debug)]
struct TopOnDevice {
    /// So many a row.
    most: usize,
    /// Of all rows.
    logps: CudaSlice<f32>,
    /// Of a chunk's rows: nobody asks for them.
    ids: CudaSlice<u32>,
}

/// Readings that the host has not waited for.
#[derive(Debug)]
pub(crate) struct Unread {
    readings: OnDevice,
    device: CudaDevice,
    rows: Rows,
}

struct GradsOnDevice<E> {
    /// Of the targets, row by row.
    d_logps: CudaSlice<f32>,
    /// As in `Slopes`.
    mean_logp: f32,
    squared_lse: f32,
    /// `None` where the gradient takes the place of the logits.
    d_logits: Option<CudaSlice<E>>,
    d_x: CudaSlice<f32>,
    d_weight: Option<CudaSlice<f32>>,
}

impl<E: Number> GradsOnDevice<E> {
    /// Of a head, by the slopes and the two factors beside them.
    fn new(
        head: &Head<'_, E>,
        (d_logps, mean_logp, squared_lse): (CudaSlice<f32>, f32, f32),
        d_weight: bool,
    ) -> Result<Self> {
        let Head { device, rows, width, vocab, chunk, .. } = *head;
        let apart = E::DTYPE != DType::F32;
        let d_weight = d_weight.then(|| device.alloc_zeros::<f32>(vocab * width)).transpose()?;
        // SAFETY: both are written before they are read, row by row.
        let (d_logits, d_x) = unsafe {
            let d_logits = apart.then(|| device.alloc::<E>(chunk * vocab)).transpose()?;
            (d_logits, device.alloc::<f32>(rows * width)?)
        };
        Ok(Self { d_logps, mean_logp, squared_lse, d_logits, d_x, d_weight })
    }
}

impl<'a, E: Number> Head<'a, E> {
    fn new(
        device: &'a CudaDevice,
        rows: &Rows,
        (width, vocab): (usize, usize),
        detail: Detail,
    ) -> Result<Self> {
        let count = rows.hidden.len();
        let chunk = (GPU_CHUNK_ELEMENTS / vocab.max(1)).clamp(16, 4096).min(count);
        let starts: Vec<u32> = rows.starts.iter().map(|&start| start as u32).collect();
        let ids: Vec<u32> = rows.order.iter().map(|&(_, id)| id).collect();
        let (stats, most) = (detail >= Detail::Rows, TOP.min(vocab));
        // SAFETY: `readings` and `logits` are written before they are read, row by row.
        let (readings, logits) = unsafe {
            let top = (detail == Detail::Top).then(|| {
                let (logps, ids) = (device.alloc(count * most)?, device.alloc(chunk * most)?);
                Ok::<_, candle_core::Error>(TopOnDevice { most, logps, ids })
            });
            let readings = OnDevice {
                logps: device.alloc::<f32>(ids.len())?,
                log_sums: device.alloc::<f32>(count)?,
                stats: stats.then(|| device.alloc::<f32>(count * STATS)).transpose()?,
                top: top.transpose()?,
                divergences: None,
            };
            (readings, device.alloc::<f32>(chunk * vocab)?)
        };
        Ok(Self {
            device,
            rows: count,
            width,
            vocab,
            chunk,
            starts: sent(device, &starts)?,
            ids: sent(device, &ids)?,
            logits,
            readings,
            anchor: None,
            is_read: false,
            grads: None,
        })
    }

    /// Makes room for an anchor's logits and the divergences from it.
    fn stand_beside(&mut self, slopes: &[f32]) -> Result<()> {
        self.anchor = Some(AnchorOnDevice::new(self.device, (self.chunk, self.vocab), slopes)?);
        // SAFETY: written before they are read, row by row.
        self.readings.divergences = Some(unsafe { self.device.alloc::<f32>(self.rows) }?);
        Ok(())
    }

    /// Reads all rows, and takes the gradient by the slopes that follow. An anchor is looked at in the second pass.
    fn two_passes(
        &mut self,
        inputs: Inputs<'_, E>,
        d_weight: bool,
        slopes: impl FnOnce(&OnDevice) -> Result<CudaSlice<f32>>,
    ) -> Result<()> {
        self.chunks(Inputs { anchor: None, ..inputs })?;
        self.is_read = true;
        let slopes = (slopes(&self.readings)?, 0.0, 0.0);
        self.grads = Some(GradsOnDevice::new(self, slopes, d_weight)?);
        self.chunks(inputs)
    }

    /// One pass over all rows.
    fn chunks(&mut self, inputs: Inputs<'_, E>) -> Result<()> {
        for first in (0..self.rows).step_by(self.chunk) {
            self.chunk_of(inputs, first..(first + self.chunk).min(self.rows))?;
        }
        Ok(())
    }

    /// Reads the targets of some rows, if nobody has, and, where asked, adds their part to the gradients.
    fn chunk_of(
        &mut self,
        Inputs { own: (x, w), anchor }: Inputs<'_, E>,
        slots: std::ops::Range<usize>,
    ) -> Result<()> {
        let (width, vocab, count) = (self.width, self.vocab, slots.len());
        let x = x.slice(slots.start * width..slots.end * width);
        let (a, b) = (Matrix::plain(&x), Matrix::turned(w));
        let mut logits = self.logits.slice_mut(..count * vocab);
        product(self.device, (a, b), &mut logits, [count, vocab, width], false)?;
        if !self.is_read {
            self.read(&slots)?;
        }
        if let Some(anchor) = anchor {
            self.diverge(anchor, &slots)?;
        }
        if self.grads.is_none() {
            return Ok(());
        }
        self.write_gradient(&slots)?;
        let Some(grads) = &mut self.grads else { return Ok(()) };
        let mut d_x = grads.d_x.slice_mut(slots.start * width..slots.end * width);
        let view = match &grads.d_logits {
            Some(d_logits) => d_logits.slice(..count * vocab),
            // SAFETY: `E` is f32 here.
            None => match unsafe { self.logits.transmute::<E>(count * vocab) } {
                Some(view) => view,
                None => candle_core::bail!("the logits are shorter than a chunk"),
            },
        };
        let sizes = [count, width, vocab];
        product(self.device, (Matrix::plain(&view), Matrix::plain(w)), &mut d_x, sizes, false)?;
        if let Some(d_weight) = &mut grads.d_weight {
            let (a, b) = (Matrix::turned(&view), Matrix::plain(&x));
            let mut d_weight = d_weight.slice_mut(..);
            product(self.device, (a, b), &mut d_weight, [vocab, width, count], true)?;
        }
        Ok(())
    }

    fn read(&mut self, slots: &std::ops::Range<usize>) -> Result<()> {
        let entry = if self.readings.stats.is_some() { "head_stats_f32" } else { "head_logps_f32" };
        let function = super::ptx::kernel(self.device, "head", entry)?;
        let (vocab, starts) = (self.vocab as u64, self.starts.slice(slots.start..));
        let OnDevice { logps, log_sums, stats, top, .. } = &mut self.readings;
        let mut log_sums = log_sums.slice_mut(slots.start..slots.end);
        let mut stats =
            stats.as_mut().map(|all| all.slice_mut(slots.start * STATS..slots.end * STATS));
        let mut launch = function.builder();
        launch.arg(&self.logits).arg(&vocab).arg(&starts).arg(&self.ids);
        launch.arg(logps).arg(&mut log_sums);
        if let Some(stats) = &mut stats {
            launch.arg(stats);
        }
        // SAFETY: the kernel's arguments, each as long as the rows of the launch ask for.
        unsafe { launch.launch(grid("head", (slots.len(), 1), READ_BLOCK)?) }.w()?;
        if let Some(top) = top {
            let logits = Logits {
                values: &self.logits.slice(..slots.len() * self.vocab),
                vocab: self.vocab,
                log_sums: &log_sums.as_view(),
            };
            let mut ids = top.ids.slice_mut(..slots.len() * top.most);
            let mut logps = top.logps.slice_mut(slots.start * top.most..slots.end * top.most);
            let places = (&mut ids, &mut logps);
            top::likeliest(self.device, &logits, (None, top.most), places)?;
        }
        Ok(())
    }

    /// Compares some rows with an anchor's.
    fn diverge(&mut self, (x, w): Views<'_, E>, slots: &std::ops::Range<usize>) -> Result<()> {
        let Self { anchor: Some(anchor), readings, .. } = self else { return Ok(()) };
        let OnDevice { log_sums, divergences: Some(divergences), .. } = readings else {
            return Ok(());
        };
        let rows = ReadRows {
            logits: self.logits.slice(..slots.len() * self.vocab),
            log_sums: log_sums.slice(slots.clone()),
            starts: self.starts.slice(slots.start..),
        };
        let width = w.len() / self.vocab;
        let x = x.slice(slots.start * width..slots.end * width);
        let mut divergences = divergences.slice_mut(slots.clone());
        anchor.diverge(self.device, &rows, (&x, w), &mut divergences)
    }

    fn write_gradient(&mut self, slots: &std::ops::Range<usize>) -> Result<()> {
        let Some(grads) = &mut self.grads else { return Ok(()) };
        let function = super::ptx::kernel(self.device, "head", E::GRAD)?;
        let stream = self.device.cuda_stream();
        let (vocab, starts) = (self.vocab as u64, self.starts.slice(slots.start..));
        let log_sums = self.readings.log_sums.slice(slots.start..slots.end);
        // In place, the same memory is both arguments.
        let own = self.logits.device_ptr_mut(&stream).0;
        let mut launch = function.builder();
        launch.arg(&self.logits);
        match &mut grads.d_logits {
            Some(d_logits) => launch.arg(d_logits),
            None => launch.arg(&own),
        };
        launch.arg(&vocab).arg(&SPAN).arg(&log_sums).arg(&starts).arg(&self.ids);
        launch.arg(&self.readings.logps).arg(&grads.d_logps);
        launch.arg(&grads.mean_logp).arg(&grads.squared_lse);
        // No teacher.
        let k = 0_u32;
        launch.arg(NULL).arg(NULL).arg(NULL);
        match &self.anchor {
            Some(anchor) => launch.arg(&anchor.factors).arg(&k).arg(&anchor.logits),
            None => launch.arg(NULL).arg(&k).arg(NULL),
        };
        let parts = self.vocab.div_ceil(SPAN as usize);
        // SAFETY: as above; `own` is the address of the logits, which live as long as the stream's work on them.
        unsafe { launch.launch(grid("head", (slots.len(), parts), WRITE_BLOCK)?) }.w()?;
        Ok(())
    }
}

impl OnDevice {
    /// What `weigh` makes of it, when the device gets there.
    fn slopes(&self, device: &CudaDevice, rows: Rows, weigh: Weigh) -> Result<CudaSlice<f32>> {
        let mut inputs = vec![self.logps.slice(..)];
        inputs.extend(self.stats.as_ref().map(|stats| stats.slice(..)));
        inputs.extend(self.top.as_ref().map(|top| top.logps.slice(..)));
        let compute = move |inputs: &[&[f32]]| {
            let (stats, top) = (inputs.get(1).copied(), inputs.get(2).copied());
            let slopes = weigh(&placed(&rows, inputs[0], [stats, top, None]));
            if slopes.len() != rows.order.len() {
                return Vec::new();
            }
            rows.order.iter().map(|&(target, _)| slopes[target]).collect()
        };
        launch::by_host::by_host(device, &inputs, self.logps.len(), Box::new(compute))
    }
}

impl Unread {
    /// Waits for all work that was launched before.
    pub(crate) fn read(&self) -> Result<Readings> {
        let Self { readings, device, rows } = self;
        let logps = device.clone_dtoh(&readings.logps)?;
        let stats = readings.stats.as_ref().map(|stats| device.clone_dtoh(stats)).transpose()?;
        let top = readings.top.as_ref().map(|top| device.clone_dtoh(&top.logps)).transpose()?;
        let apart =
            readings.divergences.as_ref().map(|apart| device.clone_dtoh(apart)).transpose()?;
        Ok(placed(rows, &logps, [stats.as_deref(), top.as_deref(), apart.as_deref()]))
    }
}

/// What rows say, row by row, with each target where the caller has it: statistics, likeliest tokens and divergences, as far as
/// they were read.
fn placed(rows: &Rows, logps: &[f32], [stats, top, apart]: [Option<&[f32]>; 3]) -> Readings {
    let detail = if stats.is_some() { Detail::Rows } else { Detail::Targets };
    let mut readings = Readings::zeros(rows.order.len(), detail);
    let most = top.map_or(0, |top| top.len() / rows.hidden.len().max(1));
    for slot in 0..rows.hidden.len() {
        let top_entropy = top.map_or(0.0, |top| entropy_among(&top[slot * most..][..most]));
        let divergence = apart.map_or(0.0, |apart| apart[slot]);
        let row = stats.map(|stats| RowStats {
            top_entropy,
            divergence,
            ..row_stats(&stats[slot * STATS..][..STATS])
        });
        for place in rows.starts[slot]..rows.starts[slot + 1] {
            readings.set(rows.order[place].0, logps[place], row);
        }
    }
    readings
}

/// As the kernel writes them.
fn row_stats(five: &[f32]) -> RowStats {
    RowStats {
        log_sum_exp: five[0],
        mean_logit: five[1],
        entropy: five[2],
        log_sum_squares: five[3],
        best_logp: five[4],
        top_entropy: 0.0,
        divergence: 0.0,
    }
}
