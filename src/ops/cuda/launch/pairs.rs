//! Gradients of pairwise losses with `head.cu`: from the log-probabilities of the head's first pass to the input of its
//! second.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, PushKernelArg};
use candle_core::{CudaDevice, Result, Tensor};

use super::host::sent;
use super::{BLOCK, NULL, cuda, grid, tensor, view};
use crate::ops::cuda::ptx::kernel;
use crate::ops::head::{PairTerm, Pairs, Placed};

/// Threads per warp; a warp sums one sequence.
const WARP: usize = 32;

/// The gradient with respect to each of a contiguous tensor's values.
///
/// # Shapes
/// `[N] -> [N]`, or any other shapes with as many elements
pub(in crate::ops) fn of_values(values: &Tensor, pairs: &Pairs) -> Result<Tensor> {
    if values.elem_count() == 0 {
        return Ok(values.detach());
    }
    let device = values.device().as_cuda_device()?;
    let (storage, layout) = values.storage_and_layout();
    let read = view::<f32>(cuda(&storage)?, layout)?;
    let slopes = Uploaded::new(device, pairs, &Placed::in_order(pairs))?.slopes(&read)?;
    Ok(tensor(device, slopes, values.shape()))
}

/// Uploaded inputs of pairwise losses.
pub(in crate::ops::cuda) struct Uploaded<'a> {
    device: &'a CudaDevice,
    terms: &'a [PairTerm],
    targets: usize,
    sequences: usize,
    trees: usize,
    /// As in [`Placed`].
    of_targets: CudaSlice<u32>,
    weights: CudaSlice<f64>,
    addends: CudaSlice<f64>,
    order: CudaSlice<u32>,
    starts: CudaSlice<u32>,
    /// As in [`Pairs`].
    references: CudaSlice<f64>,
    lengths: CudaSlice<f64>,
    tree_starts: CudaSlice<u32>,
    /// `None` if there are no pairs.
    pairs: Option<CudaSlice<u32>>,
}

impl<'a> Uploaded<'a> {
    /// Uploads the inputs, for at least one target.
    pub(in crate::ops::cuda) fn new(
        device: &'a CudaDevice,
        pairs: &'a Pairs,
        placed: &Placed,
    ) -> Result<Self> {
        let both = pairs.pairs.as_flattened();
        Ok(Self {
            device,
            terms: &pairs.terms,
            targets: placed.sequences.len(),
            sequences: pairs.references.len(),
            trees: pairs.starts.len() - 1,
            of_targets: sent(device, &placed.sequences)?,
            weights: sent(device, &placed.weights)?,
            addends: sent(device, &placed.addends)?,
            order: sent(device, &placed.order)?,
            starts: sent(device, &placed.starts)?,
            references: sent(device, &pairs.references)?,
            lengths: sent(device, &pairs.lengths)?,
            tree_starts: sent(device, &pairs.starts)?,
            pairs: (!both.is_empty()).then(|| sent(device, both)).transpose()?,
        })
    }

    /// Gradient of each log-probability, in the order of `logps`, which is that of the head's rows.
    ///
    /// # Shapes
    /// `[N] -> [N]`
    pub(in crate::ops::cuda) fn slopes(&self, logps: &CudaView<'_, f32>) -> Result<CudaSlice<f32>> {
        let sums = self.sums(logps)?;
        let mut d_sums = self.device.alloc_zeros::<f64>(self.sequences)?;
        for term in self.terms {
            self.add(term, &sums, &mut d_sums)?;
        }
        // SAFETY: the kernel writes it whole.
        let mut d_logps = unsafe { self.device.alloc::<f32>(self.targets) }?;
        let function = kernel(self.device, "head", "target_slopes")?;
        let targets = self.targets as u32;
        let mut launch = function.builder();
        launch.arg(&d_sums).arg(&self.of_targets).arg(&self.weights).arg(&self.addends);
        launch.arg(&targets).arg(&mut d_logps);
        let blocks = self.targets.div_ceil(BLOCK as usize);
        // SAFETY: the kernel's arguments; a thread a target.
        unsafe { launch.launch(grid("slopes of pairs", (blocks, 1), BLOCK)?) }.w()?;
        Ok(d_logps)
    }

    fn sums(&self, logps: &CudaView<'_, f32>) -> Result<CudaSlice<f64>> {
        // SAFETY: the kernel writes it whole.
        let mut sums = unsafe { self.device.alloc::<f64>(self.sequences) }?;
        let function = kernel(self.device, "head", "sequence_sums")?;
        let sequences = self.sequences as u32;
        let mut launch = function.builder();
        launch.arg(logps).arg(&self.weights).arg(&self.order).arg(&self.starts);
        launch.arg(&sequences).arg(&mut sums);
        let blocks = self.sequences.div_ceil(BLOCK as usize / WARP);
        // SAFETY: the kernel's arguments; a warp a sequence.
        unsafe { launch.launch(grid("slopes of pairs", (blocks, 1), BLOCK)?) }.w()?;
        Ok(sums)
    }

    /// Adds one loss's gradients of the sums.
    fn add(
        &self,
        term: &PairTerm,
        sums: &CudaSlice<f64>,
        d_sums: &mut CudaSlice<f64>,
    ) -> Result<()> {
        let Some(pairs) = &self.pairs else { return Ok(()) };
        let ((kind, smoothing), trees) = (term.kind(), self.trees as u32);
        let function = kernel(self.device, "head", "pair_slopes")?;
        let mut launch = function.builder();
        launch.arg(sums);
        for given in [(term.referenced, &self.references), (term.by_length, &self.lengths)] {
            match given {
                (true, values) => launch.arg(values),
                (false, _) => launch.arg(NULL),
            };
        }
        launch.arg(pairs).arg(&self.tree_starts).arg(&trees).arg(&kind);
        launch.arg(&term.beta).arg(&smoothing).arg(&term.offset).arg(&term.scale).arg(d_sums);
        let blocks = self.trees.div_ceil(BLOCK as usize);
        // SAFETY: the kernel's arguments; a thread a tree, whose sequences are in no other's pairs.
        unsafe { launch.launch(grid("slopes of pairs", (blocks, 1), BLOCK)?) }.w()?;
        Ok(())
    }
}
