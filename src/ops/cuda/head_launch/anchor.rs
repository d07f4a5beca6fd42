//! The divergence from an anchor, chunk by chunk, by `head.cu`.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, CudaViewMut, PushKernelArg};
use candle_core::{CudaDevice, Result};

use super::product::{Matrix, product};
use super::{Number, READ_BLOCK};
use crate::ops::cuda::launch::{NULL, grid, host::sent};
use crate::ops::cuda::ptx::kernel;

/// What an anchor needs on the device beside the views of its own inputs.
pub(super) struct AnchorOnDevice {
    /// `[chunk, V]`: its logits, then what it takes off their gradient.
    pub(super) logits: CudaSlice<f32>,
    /// What it adds to the factor of a row's softmax, twice, `[chunk, 2]`.
    pub(super) factors: CudaSlice<f32>,
    /// Of the targets' divergences, row by row; `None` where they are only read.
    slopes: Option<CudaSlice<f32>>,
}

/// Some rows of a head that have been read.
pub(super) struct ReadRows<'a> {
    /// Their logits, `[R, V]`.
    pub(super) logits: CudaView<'a, f32>,
    /// The logarithm of each row's sum, `[R]`.
    pub(super) log_sums: CudaView<'a, f32>,
    /// Where each row's targets start.
    pub(super) starts: CudaView<'a, u32>,
}

impl AnchorOnDevice {
    /// Room for chunks of `chunk` rows of `vocab` logits. `slopes`: of the targets, row by row, or none.
    pub(super) fn new(
        device: &CudaDevice,
        (chunk, vocab): (usize, usize),
        slopes: &[f32],
    ) -> Result<Self> {
        let slopes = (!slopes.is_empty()).then(|| sent(device, slopes)).transpose()?;
        // SAFETY: both are written before they are read, row by row.
        let (logits, factors) =
            unsafe { (device.alloc::<f32>(chunk * vocab)?, device.alloc::<f32>(chunk * 2)?) };
        Ok(Self { logits, factors, slopes })
    }

    /// Writes the divergences of some rows, `[R]`, and leaves their part of the gradient here. `x`: `[R, D']`, `w`: `[V, D']`.
    pub(super) fn diverge<E: Number>(
        &mut self,
        device: &CudaDevice,
        rows: &ReadRows<'_>,
        (x, w): (&CudaView<'_, E>, &CudaView<'_, E>),
        divergences: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let count = rows.log_sums.len();
        let vocab = rows.logits.len() / count;
        let width = w.len() / vocab;
        let mut logits = self.logits.slice_mut(..count * vocab);
        let factors = (Matrix::plain(x), Matrix::turned(w));
        product(device, factors, &mut logits, [count, vocab, width], false)?;
        let function = kernel(device, "head", "head_anchor_f32")?;
        let vocab = vocab as u64;
        let mut launch = function.builder();
        launch.arg(&rows.logits).arg(&mut logits).arg(&vocab).arg(&rows.starts);
        launch.arg(&rows.log_sums);
        match &self.slopes {
            Some(slopes) => launch.arg(slopes),
            None => launch.arg(NULL),
        };
        launch.arg(divergences).arg(&mut self.factors);
        // SAFETY: the kernel's arguments, each as long as the rows of the launch ask for.
        unsafe { launch.launch(grid("head", (count, 1), READ_BLOCK)?) }.w()?;
        Ok(())
    }
}
