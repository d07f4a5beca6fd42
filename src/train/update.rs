//! One complete optimizer step: the gradient, its norm, and the weight update, after or within the backward pass.

#[cfg(feature = "cuda")]
mod on_cuda;
#[cfg(test)]
mod tests;

use candle_core::Tensor;

use super::batch::MicroBatch;
use super::norms::Norms;
use super::step::{self, StepOptions, StepReport, Sums};
use super::weighing::head_step;
use super::{Batch, Learner};
use crate::data::tree::Tree;
use crate::error::{Error, Result};
use crate::loss::Objective;
use crate::model::gradients::{Gradients, square_sum};
use crate::optim::adamw::AdamW;
use crate::optim::clip_factor;

/// Learning rate and clipping of one step.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// The learning rate of this step.
    pub lr: f64,
    /// Clips the global gradient norm; 0 disables clipping.
    pub max_grad_norm: f64,
}

/// Takes one optimizer step. Returns the measurements and the global gradient norm before clipping.
///
/// # Errors
/// As [`step::gradients`]; a loss or gradient that is not finite, before any weight is updated.
pub fn update(
    learner: &Learner,
    (objective, trees): (&dyn Objective, &[&Tree]),
    options: StepOptions,
    adamw: &mut AdamW,
    pace: Pace,
) -> Result<(StepReport, f64)> {
    let batch = Batch::new(learner.model(), trees, options.max_tokens)?;
    take(learner, (objective, batch), options, adamw, pace)
}

/// [`update`] for a prepared step.
pub(super) fn take(
    learner: &Learner,
    (objective, batch): (&dyn Objective, Batch),
    options: StepOptions,
    adamw: &mut AdamW,
    pace: Pace,
) -> Result<(StepReport, f64)> {
    if options.optimizer_in_backward {
        return in_backward(learner, (objective, &batch), options, adamw, pace.lr);
    }
    let rows = batch.rows.clone();
    let (grads, mut report) = step::gradients_of(learner, objective, batch, options)?;
    #[cfg(feature = "cuda")]
    if learner.model().device().is_cuda() {
        let norm = on_cuda::step((learner, adamw), &grads, (&rows, pace), &mut report)?;
        return Ok((report, norm));
    }
    let mut norms = Norms::default();
    for (name, grad) in grads.iter() {
        norms.add(name, square_sum(grad)?);
    }
    let norm = norms.total();
    check_norm((report.loss, norm), &grads, &rows)?;
    norms.log(&mut report.metrics);
    adamw.step(learner.params(), &grads, pace.lr, clip_factor(norm, pace.max_grad_norm))?;
    Ok((report, norm))
}

/// Updates the weights in the backward pass: a block's gradients are used and freed before the next block's exist.
///
/// # Errors
/// More than one micro-batch; a loss or gradient of the hidden states that is not finite, before any weight is updated;
/// a gradient further down that is not, after the weights of later blocks are.
fn in_backward(
    learner: &Learner,
    (objective, batch): (&dyn Objective, &Batch),
    options: StepOptions,
    adamw: &mut AdamW,
    lr: f64,
) -> Result<(StepReport, f64)> {
    let model = learner.model();
    let [part] = batch.parts.as_slice() else {
        return Err(several(batch.tokens(), options.max_tokens));
    };
    let forest = &part.forest;
    let read = |part: &MicroBatch| step::read_as_trained(model, objective, part, options);
    let totals = step::totals(objective, &batch.parts, &read)?;
    let mut grads = Gradients::new(model.device());
    let mut sums = Sums::new(objective);
    let trace = step::trace(model, part, options)?;
    let place = (forest, &trace.hidden);
    let (measured, d_hidden) = head_step((model, options), objective, place, &totals, &mut grads)?;
    // The backward pass updates the weights, so read the measurements first.
    sums.add(measured.wait(objective, forest, &totals)?, forest);
    let mut report = sums.report(objective, &totals);
    check(report.loss, square_sum(&d_hidden)?.sqrt(), &batch.rows)?;

    adamw.begin_step();
    let mut moving = Moving {
        #[cfg(feature = "cuda")]
        unread: on_cuda::Unread::new(learner)?,
        learner,
        adamw,
        lr,
        norms: Norms::default(),
    };
    let mut backward = model.backward_from(forest, trace, &d_hidden, &mut grads)?;
    while let Some(block) = backward.next_block(&mut grads)? {
        moving.apply(grads.take(block.prefix()))?;
    }
    drop(backward);
    moving.apply(grads.take(""))?;
    #[cfg(feature = "cuda")]
    moving.read()?;
    moving.norms.log(&mut report.metrics);
    Ok((report, moving.norms.total()))
}

/// The weight update, part by part.
struct Moving<'a> {
    learner: &'a Learner,
    adamw: &'a mut AdamW,
    lr: f64,
    norms: Norms,
    /// Norms of gradients on a GPU that the host has not read yet.
    #[cfg(feature = "cuda")]
    unread: Option<on_cuda::Unread>,
}

impl Moving<'_> {
    /// Updates the parameters of these gradients.
    fn apply(&mut self, grads: Vec<(String, Tensor)>) -> Result<()> {
        for (name, grad) in grads {
            #[cfg(feature = "cuda")]
            if let Some(unread) = &mut self.unread {
                let clip = unread.add(&name, &grad)?;
                self.adamw.apply_clipped(self.learner.params(), (&name, &grad), self.lr, &clip)?;
                continue;
            }
            self.note(&name, square_sum(&grad)?)?;
            self.adamw.apply(self.learner.params(), (&name, &grad), self.lr, 1.0)?;
        }
        Ok(())
    }

    /// Records a gradient's sum of squares.
    fn note(&mut self, name: &str, square: f64) -> Result<()> {
        if square.is_finite() {
            self.norms.add(name, square);
            return Ok(());
        }
        Err(Error::run("a gradient is not finite")
            .at(name)
            .hint("later blocks have moved: go on from the last checkpoint"))
    }

    /// Records the sums from the GPU, once available.
    #[cfg(feature = "cuda")]
    fn read(&mut self) -> Result<()> {
        if let Some(unread) = self.unread.take() {
            for (name, square) in unread.read()? {
                self.note(&name, square)?;
            }
        }
        Ok(())
    }
}

fn check(loss: f64, norm: f64, rows: &[usize]) -> Result<()> {
    if loss.is_finite() && norm.is_finite() {
        return Ok(());
    }
    Err(Error::run(format!("loss {loss} with gradient norm {norm} on rows {rows:?}"))
        .hint("no update was made; lower learning_rate, or look at these rows"))
}

/// [`check`] of the norm of these gradients; the error locates the first element that is not finite.
fn check_norm((loss, norm): (f64, f64), grads: &Gradients, rows: &[usize]) -> Result<()> {
    let Err(error) = check(loss, norm, rows) else { return Ok(()) };
    Err(match grads.first_not_finite()? {
        Some((name, index)) => error.at(format!("element {index} of the gradient of `{name}`")),
        None => error,
    })
}

fn several(tokens: usize, max_tokens: usize) -> Error {
    Error::usage(format!(
        "`optimizer_in_backward` with {tokens} tokens a step and `max_tokens_per_micro_batch` {max_tokens}: weights would \
         move between micro-batches"
    ))
    .hint("raise max_tokens_per_micro_batch, or set optimizer_in_backward = false")
}
