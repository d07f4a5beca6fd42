//! The likeliest tokens of rows, by `head.cu`.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, CudaViewMut, PushKernelArg};
use candle_core::{CudaDevice, Result};

use super::{NULL, grid};
use crate::ops::cuda::ptx::kernel;

/// Elements of a row that a thread has at least, if the row has as many.
const OWN: usize = 32;

/// Rows of logits on a device.
pub(in crate::ops::cuda) struct Logits<'a> {
    /// `[R, V]`.
    pub(in crate::ops::cuda) values: &'a CudaView<'a, f32>,
    /// `V`.
    pub(in crate::ops::cuda) vocab: usize,
    /// The logarithm of each row's sum, `[R]`.
    pub(in crate::ops::cuda) log_sums: &'a CudaView<'a, f32>,
}

/// Writes the ids and log-probabilities of the `k` likeliest tokens of some rows, likeliest first: of those that `which` names,
/// or of the first as many as `logps` has room for. Where fewer are finite, ids have all bits, and minus infinity is beside
/// them.
///
/// # Shapes
/// - `ids` and `logps`: `[rows, k]`; `k`: 1 to `V`
pub(in crate::ops::cuda) fn likeliest(
    device: &CudaDevice,
    logits: &Logits<'_>,
    (which, k): (Option<&CudaSlice<u32>>, usize),
    (ids, logps): (&mut CudaViewMut<'_, u32>, &mut CudaViewMut<'_, f32>),
) -> Result<()> {
    let rows = logps.len() / k;
    // Each of the `k` turns reduces over the block: more threads than their elements are worth would only wait.
    let block = (logits.vocab / OWN).next_multiple_of(32).clamp(32, 1024) as u32;
    let (vocab, count) = (logits.vocab as u64, k as u32);
    let function = kernel(device, "head", "head_top_f32")?;
    let mut launch = function.builder();
    launch.arg(logits.values).arg(&vocab).arg(&count);
    match which {
        Some(which) => launch.arg(which),
        None => launch.arg(NULL),
    };
    launch.arg(logits.log_sums).arg(ids).arg(logps);
    // SAFETY: the kernel's arguments; a block for each row, which writes `k` of both.
    unsafe { launch.launch(grid("likely tokens", (rows, 1), block)?) }.w()?;
    Ok(())
}
