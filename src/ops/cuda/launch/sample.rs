//! Draws by `sample.cu`.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, PushKernelArg};
use candle_core::{CudaDevice, DType, Result, Tensor, bail};

use super::host::sent;
use super::top::{self, Logits};
use super::{NULL, cuda, grid, view};
use crate::ops::cuda::ptx::kernel;
use crate::ops::sample::{Chance, Drawn, Likeliest, NoDraw, shared};

/// Threads of the block that has a row.
const BLOCK: u32 = 1024;

/// A token of each row, and the likeliest where they are asked for. The host waits for them: 16 bytes a row come to it, and 8
/// for each likely token, instead of a row of logits.
///
/// # Shapes
/// - `logits`: `[R, V]`, f32; `chances`: `R`, each with a bit for each token that is allowed, where not all are
///
/// # Errors
/// Other shapes or types; the device's. A row that no token can be drawn from is a row's own error.
pub(crate) fn on_cuda(
    logits: &Tensor,
    chances: &[(Chance, Option<&[u32]>)],
) -> Result<Vec<std::result::Result<(Drawn, Likeliest), NoDraw>>> {
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
    let words: Vec<[u64; 8]> = chances.iter().map(|(chance, _)| chance.words()).collect();
    let settings = device.clone_htod(words.as_flattened())?;
    let allowed = masks(chances, vocab).map(|words| sent(device, &words)).transpose()?;
    // SAFETY: scratch, which the kernel writes before it reads; and a row of the others is written by each block.
    let (mut weights, mut draws, mut log_sums) = unsafe {
        (device.alloc::<f32>(rows * vocab)?, device.alloc::<u32>(rows * 4)?, device.alloc(rows)?)
    };
    let function = kernel(device, "sample", "sample")?;
    let count = vocab as u32;
    let mut launch = function.builder();
    launch.arg(&logits);
    match &allowed {
        Some(allowed) => launch.arg(allowed),
        None => launch.arg(NULL),
    };
    launch.arg(&settings).arg(&mut weights).arg(&mut draws).arg(&mut log_sums).arg(&count);
    let mut config = grid("draws", (rows, 1), BLOCK)?;
    config.shared_mem_bytes = shared(vocab) as u32;
    // SAFETY: the kernel's arguments; a block a row, with the shared memory that it asks for.
    unsafe { launch.launch(config) }.w()?;
    let likeliest = likeliest(device, (&logits, &log_sums), vocab, chances)?;
    let draws = device.clone_dtoh(&draws)?;
    let draws = draws.as_chunks().0.iter().zip(likeliest);
    Ok(draws.map(|(words, likeliest)| Ok((Drawn::of(words)?, likeliest))).collect())
}

/// The allowed tokens of all rows, `ceil(V / 32)` words each, where some row does not allow all.
fn masks(chances: &[(Chance, Option<&[u32]>)], vocab: usize) -> Option<Vec<u32>> {
    chances.iter().any(|(_, allowed)| allowed.is_some()).then(|| {
        let words = vocab.div_ceil(32);
        let row = |allowed: Option<&[u32]>| match allowed {
            // Words that are missing allow nothing.
            Some(given) => given.iter().copied().chain(std::iter::repeat(0)).take(words).collect(),
            None => vec![u32::MAX; words],
        };
        chances.iter().flat_map(|(_, allowed)| row(*allowed)).collect()
    })
}

/// The likeliest tokens of each row whose chance asks for some.
fn likeliest(
    device: &CudaDevice,
    (logits, log_sums): (&CudaView<'_, f32>, &CudaSlice<f32>),
    vocab: usize,
    chances: &[(Chance, Option<&[u32]>)],
) -> Result<Vec<Likeliest>> {
    let mut all = vec![Vec::new(); chances.len()];
    let asked = (0_u32..).zip(chances).filter(|(_, (chance, _))| chance.top > 0);
    let (which, counts): (Vec<u32>, Vec<usize>) =
        asked.map(|(row, (chance, _))| (row, chance.top)).unzip();
    let most = counts.iter().copied().max().unwrap_or(0).min(vocab);
    if most == 0 {
        return Ok(all);
    }
    let rows = device.clone_htod(&which)?;
    let found = which.len() * most;
    // SAFETY: the kernel writes both whole.
    let (mut ids, mut logps) =
        unsafe { (device.alloc::<u32>(found)?, device.alloc::<f32>(found)?) };
    let logits = Logits { values: logits, vocab, log_sums: &log_sums.as_view() };
    let places = (&mut ids.as_view_mut(), &mut logps.as_view_mut());
    top::likeliest(device, &logits, (Some(&rows), most), places)?;
    let (ids, logps) = (device.clone_dtoh(&ids)?, device.clone_dtoh(&logps)?);
    let tokens = ids.chunks(most).zip(logps.chunks(most));
    for ((&row, count), (ids, logps)) in which.iter().zip(counts).zip(tokens) {
        // Where there are no more that are finite, ids have all bits.
        let real = ids.iter().copied().zip(logps.iter().copied()).filter(|(id, _)| *id != u32::MAX);
        all[row as usize] = real.take(count).collect();
    }
    Ok(all)
}
