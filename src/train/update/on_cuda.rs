//! The end of a step on a GPU: norm, clipping and weight update are launched back to back, and the host reads the norms
//! once, afterwards. If the masters are in host memory, it reads them first.

use crate::error::Result;
use crate::model::gradients::Gradients;
use crate::ops::cuda::launch::optimizer::{Factor, Squares};
use crate::optim::adamw::AdamW;
use crate::optim::clip_factor;
use crate::train::Learner;
use crate::train::norms::Norms;
use crate::train::step::StepReport;

use super::{Pace, check, check_norm};

/// Clips the gradients and updates the weights. Returns the norm before clipping.
///
/// # Errors
/// A loss that is not finite; a gradient that is not finite, in which case no weight is updated.
pub(super) fn step(
    (learner, adamw): (&Learner, &mut AdamW),
    grads: &Gradients,
    (rows, pace): (&[usize], Pace),
    report: &mut StepReport,
) -> Result<f64> {
    check(report.loss, 0.0, rows)?;
    let names: Vec<&str> = grads.iter().map(|(name, _)| name).collect();
    let mut squares = Squares::new(learner.model().device(), names.len())?;
    for (index, (_, grad)) in grads.iter().enumerate() {
        squares.put(index, grad)?;
    }
    let read = |squares: &Squares| -> Result<Norms> {
        let mut norms = Norms::default();
        for (name, square) in names.iter().zip(squares.read()?) {
            norms.add(name, square);
        }
        check_norm((report.loss, norms.total()), grads, rows)?;
        Ok(norms)
    };
    let norms = if learner.is_offloaded() {
        // The host updates the weights, so it waits for the norm first.
        let norms = read(&squares)?;
        let scale = clip_factor(norms.total(), pace.max_grad_norm);
        adamw.step(learner.params(), grads, pace.lr, scale)?;
        norms
    } else {
        let clip = squares.clip(0..names.len(), pace.max_grad_norm)?;
        adamw.begin_step();
        for (name, grad) in grads.iter() {
            adamw.apply_clipped(learner.params(), (name, grad), pace.lr, &clip)?;
        }
        read(&squares)?
    };
    norms.log(&mut report.metrics);
    Ok(norms.total())
}

/// Sums of squares of gradients already applied to the weights; gradients that were not finite were skipped.
pub(super) struct Unread {
    squares: Squares,
    names: Vec<String>,
}

impl Unread {
    /// For a step of this learner, if its masters are on a GPU.
    pub(super) fn new(learner: &Learner) -> Result<Option<Self>> {
        let device = learner.model().device();
        if !device.is_cuda() || learner.is_offloaded() {
            return Ok(None);
        }
        let squares = Squares::new(device, learner.params().len())?;
        Ok(Some(Self { squares, names: Vec::new() }))
    }

    /// Adds a gradient's sum of squares. The factor is 1, or NaN if the gradient is not finite.
    pub(super) fn add(&mut self, name: &str, grad: &candle_core::Tensor) -> Result<Factor> {
        let index = self.names.len();
        self.squares.put(index, grad)?;
        self.names.push(name.to_owned());
        Ok(self.squares.clip(index..index + 1, 0.0)?)
    }

    /// All sums with their names, in the order added. The host waits.
    pub(super) fn read(self) -> Result<impl Iterator<Item = (String, f64)>> {
        let squares = self.squares.read()?;
        Ok(self.names.into_iter().zip(squares))
    }
}
