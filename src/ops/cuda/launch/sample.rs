//! Draws by `sample.cu`.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{LaunchConfig, PushKernelArg};
use candle_core::{DType, Result, Tensor, bail};

use super::{NULL, cuda, view};
use crate::ops::cuda::ptx::kernel;
use crate::ops::sample::{Chance, Drawn, NoDraw, shared};

/// Threads of the block that has a row.
const BLOCK: u32 = 1024;
/// A token of each row. The host waits for them: 16 bytes a row come to it instead of a row of logits.
///
/// # Shapes
/// - `logits`: `[R, V]`, f32; `chances`: `R`
///
/// # Errors
/// Other shapes or types; the device's. A row that no token can be drawn from is a row's own error.
pub(crate) fn on_cuda(
    logits: &Tensor,
    chances: &[Chance],
) -> Result<Vec<std::result::Result<Drawn, NoDraw>>> {
    let (rows, vocab) = logits.dims2()?;
    if rows != chances.len() || logits.dtype() != DType::F32 || vocab == 0 {
        bail!("{} draws from logits of {:?} {:?}", chances.len(), logits.dtype(), logits.shape());
    }
    if rows == 0 {
        return Ok(Vec::new());
    }
    let device = logits.device().as_cuda_device()?;
    let logits = logits.contiguous()?;
    let (storage, layout) = logits.storage_and_layout();
    let logits = view::<f32>(cuda(&storage)?, layout)?;
    let words: Vec<[u64; 8]> = chances.iter().map(Chance::words).collect();
    let settings = device.clone_htod(words.as_flattened())?;
    // SAFETY: scratch, which the kernel writes before it reads; and a row of `draws` is written by each block.
    let (mut weights, mut draws) =
        unsafe { (device.alloc::<f32>(rows * vocab)?, device.alloc::<u32>(rows * 4)?) };
    let function = kernel(device, "sample", "sample")?;
    let count = vocab as u32;
    let mut launch = function.builder();
    launch.arg(&logits).arg(NULL).arg(&settings).arg(&mut weights).arg(&mut draws).arg(&count);
    let config = LaunchConfig {
        grid_dim: (rows as u32, 1, 1),
        block_dim: (BLOCK, 1, 1),
        shared_mem_bytes: shared(vocab) as u32,
    };
    // SAFETY: the kernel's arguments; a block a row, with the shared memory that it asks for.
    unsafe { launch.launch(config) }.w()?;
    let draws = device.clone_dtoh(&draws)?;
    Ok(draws.as_chunks().0.iter().map(Drawn::of).collect())
}
