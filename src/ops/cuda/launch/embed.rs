//! Embedding rows and their gradient, with `embed.cu`.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, PushKernelArg};
use candle_core::{CudaDevice, Result, Tensor, bail};

use super::host::sent;
use super::{Number, by_type, cuda, grid, tensor, threads_of, together, view, with_view_mut};
use crate::ops::cuda::ptx::kernel;

/// Threads of a block that adds part of a row.
const ADD: usize = 256;

/// Rows of `table` for each token, in f32, without a graph. The ids are already checked.
///
/// # Shapes
/// - `table`: `[V, D]`, `tokens`: `T` ids, at least one  →  `[T, D]`
pub(crate) fn on_cuda(table: &Tensor, tokens: &[u32]) -> Result<Tensor> {
    by_type!(table.dtype(), "an embedding", E => rows::<E>(&table.contiguous()?, tokens))
}

fn rows<E: Number>(table: &Tensor, tokens: &[u32]) -> Result<Tensor> {
    let (device, (vocab, width)) = (table.device().as_cuda_device()?, table.dims2()?);
    let (table, layout) = table.storage_and_layout();
    let table = view::<E>(cuda(&table)?, layout)?;
    let ids = sent(device, tokens)?;
    // SAFETY: the kernel writes it whole.
    let mut out = unsafe { device.alloc::<f32>(tokens.len() * width) }?;
    let (long_width, vocab) = (width as u64, vocab as u32);
    let function = kernel(device, "embed", &format!("embed_forward_{}", E::NAME))?;
    let mut launch = function.builder();
    launch.arg(&table).arg(&ids).arg(&mut out).arg(&long_width).arg(&vocab);
    // SAFETY: the kernel's arguments; a block a token, each of which is a row of the table.
    unsafe { launch.launch(grid("an embedding", (tokens.len(), 1), threads_of(width))?) }.w()?;
    Ok(tensor(device, out, (tokens.len(), width)))
}

/// Adds row `t` of `d_x` to row `tokens[t]` of `d_table`, in token order. Updates `d_table` in place.
///
/// # Shapes
/// - `d_table`: `[V, D]`, f32, contiguous, `d_x`: `[T, D]`
pub(crate) fn add_rows(d_table: &Tensor, tokens: &[u32], d_x: &Tensor) -> Result<()> {
    let (vocab, width) = d_table.dims2()?;
    if d_x.dims2()? != (tokens.len(), width) || tokens.iter().any(|&id| id as usize >= vocab) {
        let (rows, table) = (d_x.shape(), d_table.shape());
        bail!("a gradient of {rows:?} for {} rows of a table {table:?}", tokens.len());
    }
    if d_x.elem_count() == 0 {
        return Ok(());
    }
    together("a sum of rows", [d_table, d_x])?;
    let segments = Segments::new(tokens, d_table.device().as_cuda_device()?)?;
    let d_x = d_x.contiguous()?;
    by_type!(d_x.dtype(), "the gradient of an embedding", E => {
        segments.add::<E>(d_table, &d_x, width)
    })
}

/// The tokens of each row that has any.
struct Segments<'a> {
    device: &'a CudaDevice,
    count: usize,
    order: CudaSlice<u32>,
    starts: CudaSlice<u32>,
    rows: CudaSlice<u32>,
}

impl<'a> Segments<'a> {
    fn new(tokens: &[u32], device: &'a CudaDevice) -> Result<Self> {
        let mut order: Vec<u32> = (0..tokens.len() as u32).collect();
        // Stable sort: tokens of a row keep their order.
        order.sort_by_key(|&token| tokens[token as usize]);
        let (mut starts, mut rows) = (Vec::new(), Vec::new());
        for (place, &token) in order.iter().enumerate() {
            let row = tokens[token as usize];
            if rows.last() != Some(&row) {
                starts.push(place as u32);
                rows.push(row);
            }
        }
        starts.push(order.len() as u32);
        Ok(Self {
            device,
            count: rows.len(),
            order: sent(device, &order)?,
            starts: sent(device, &starts)?,
            rows: sent(device, &rows)?,
        })
    }

    fn add<E: Number>(&self, d_table: &Tensor, d_x: &Tensor, width: usize) -> Result<()> {
        let (d_x, layout) = d_x.storage_and_layout();
        let d_x = view::<E>(cuda(&d_x)?, layout)?;
        let function = kernel(self.device, "embed", &format!("embed_backward_{}", E::NAME))?;
        let long_width = width as u64;
        with_view_mut::<f32, _>(d_table, |mut d_table| {
            let mut launch = function.builder();
            launch.arg(&d_x).arg(&self.order).arg(&self.starts).arg(&self.rows);
            launch.arg(&mut d_table).arg(&long_width);
            let parts = width.div_ceil(4 * ADD);
            // SAFETY: the kernel's arguments; the segments are of as many tokens as `d_x` has rows, their rows are
            // different ones of the table.
            unsafe { launch.launch(grid("a sum of rows", (self.count, parts), ADD as u32)?) }
                .w()?;
            Ok(())
        })
    }
}
