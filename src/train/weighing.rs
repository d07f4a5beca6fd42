//! Reads a micro-batch's values, has the objective weigh them, and computes the gradient passed down into the blocks.
//!
//! On a GPU nothing here waits: if the objective is needed between the head's two passes, a driver callback calls it
//! once the values are there, and logged values are read after all micro-batches of the step are enqueued.

use std::sync::Arc;

use candle_core::Tensor;

use super::step::StepOptions;
use crate::data::forest::Forest;
use crate::error::{Error, Result};
use crate::loss::{Mean, Objective, Reading, Readout, StepTotals, Weighed};
use crate::model::gradients::Gradients;
use crate::model::transformer::Transformer;
use crate::ops;
use crate::ops::head::{self, Asked, Detail, Pending, Readings, RowStats};

/// The values an objective reads from hidden states, `[T, D]`: log-probabilities, `[N]`, or scores, `[E, L]`.
pub(super) fn values(
    model: &Transformer,
    readout: Readout,
    (forest, hidden): (&Forest, &Tensor),
) -> Result<Pending> {
    match readout {
        Readout::Logps => {
            Ok(head::reading(hidden, model.head(), &forest.targets, (Detail::Targets, None))?)
        }
        Readout::Scores => Ok(model.scores_of(hidden, &forest.ends)?.into()),
    }
}

/// The same plus the row statistics that the objective or the log needs, read by the same kernel as in the step's own
/// pass, because a coupled objective looks its values up among them.
pub(super) fn readings(
    model: &Transformer,
    objective: &dyn Objective,
    (forest, hidden): (&Forest, &Tensor),
) -> Result<Pending> {
    match objective.readout() {
        Readout::Logps => {
            let anchor = objective.anchor(forest, None)?;
            let what = (detail(model, objective), anchor.as_ref());
            Ok(head::reading(hidden, model.head(), &forest.targets, what)?)
        }
        Readout::Scores => values(model, Readout::Scores, (forest, hidden)),
    }
}

/// What the objective needs and what is logged. Row statistics cost the CPU 2-3 % of the head (0.5 % of a step) and a GPU kernel
/// no extra memory traffic; the plain implementation, used on Metal, costs more.
fn detail(model: &Transformer, objective: &dyn Objective) -> Detail {
    let logged = if model.device().is_metal() { Detail::Targets } else { Detail::Rows };
    objective.detail().max(logged)
}

/// Values read from a micro-batch, possibly still in flight from a GPU.
pub(super) struct Measured {
    readings: Pending,
    /// The objective that was asked for slopes, if any.
    asked: Option<Arc<dyn Objective>>,
}

impl Measured {
    /// Waits for the readings and returns the objective's evaluation of them.
    ///
    /// # Errors
    /// A value that is not finite, named by its row; an error of the objective.
    pub(super) fn wait(
        self,
        objective: &dyn Objective,
        forest: &Forest,
        totals: &StepTotals,
    ) -> Result<Weighed> {
        let objective = self.asked.as_deref().unwrap_or(objective);
        weigh(objective, forest, &self.readings.wait()?, totals)
    }
}

/// Reads the head and returns the gradient of the hidden states, `[T, D]`, from the objective's slopes of the readings.
///
/// # Errors
/// A device error. Values that are not finite and errors of the objective surface in [`Measured::wait`]; the gradient
/// is then NaN.
pub(super) fn head_step(
    (model, options): (&Transformer, StepOptions),
    objective: &dyn Objective,
    (forest, hidden): (&Forest, &Tensor),
    totals: &StepTotals,
    grads: &mut Gradients,
) -> Result<(Measured, Tensor)> {
    let (weight, targets) = (model.head(), forest.targets.as_slice());
    if objective.readout() == Readout::Scores {
        let scores = model.scores_of(hidden, &forest.ends)?;
        let pairs = if options.gpu { objective.pairs(forest, totals)? } else { None };
        if let Some(pairs) = pairs {
            let d_scores = head::slopes_of_pairs(&scores, &pairs)?;
            let d_hidden = model.scores_backward(hidden, &forest.ends, &d_scores, grads)?;
            return Ok((Measured { readings: scores.into(), asked: None }, d_hidden));
        }
        let (weigh, asked) = weigher(objective, forest, totals)?;
        let of_scores =
            |scores: &[f32]| weigh(&Readings { logps: scores.to_vec(), rows: Vec::new() });
        let d_scores = ops::by_host(&scores, Box::new(of_scores))?;
        let d_hidden = model.scores_backward(hidden, &forest.ends, &d_scores, grads)?;
        return Ok((Measured { readings: scores.into(), asked: Some(asked) }, d_hidden));
    }
    let anchor = objective.anchor(forest, Some(totals))?;
    let wanted = Asked {
        detail: detail(model, objective),
        d_weight: weight.is_variable(),
        anchor: anchor.as_ref(),
    };
    let pairs = if options.gpu { objective.pairs(forest, totals)? } else { None };
    let mut asked = None;
    let out = if let Some(known) = objective.fixed_gradient(forest, totals) {
        head::backward(hidden, weight, targets, known.slopes(), wanted)?
    } else if let Some(pairs) = pairs {
        head::backward_of_pairs(hidden, weight, targets, &pairs, wanted)?
    } else {
        let (weigh, for_forest) = weigher(objective, forest, totals)?;
        asked = Some(for_forest);
        head::backward_by(hidden, weight, targets, Box::new(weigh), wanted)?
    };
    if let Some(d_weight) = out.d_weight {
        grads.add(model.head_name(), &d_weight)?;
    }
    Ok((Measured { readings: out.readings, asked }, out.d_hidden))
}

/// A closure that turns readings into slopes on any thread, at any time, and the objective that it calls.
type Weigher<W> = (W, Arc<dyn Objective>);

/// Slopes are NaN if the objective fails or has nothing to say.
fn weigher(
    objective: &dyn Objective,
    forest: &Forest,
    totals: &StepTotals,
) -> Result<Weigher<impl FnOnce(&Readings) -> Vec<f32> + Send + 'static>> {
    let objective: Arc<dyn Objective> = objective.for_forest(forest)?.into();
    let (own, forest, totals) = (Arc::clone(&objective), forest.clone(), totals.clone());
    let slopes = move |readings: &Readings| match weigh(&*own, &forest, readings, &totals) {
        Ok(weighed) => weighed.d_values,
        Err(_) => vec![f32::NAN; readings.logps.len()],
    };
    Ok((slopes, objective))
}

/// Begins what [`weigh`] says of a value that is not finite.
const OUTPUT: &str = "the model's output is";

/// Whether an error is that of an output that is not finite, as of a model that has diverged.
pub fn is_not_finite(error: &Error) -> bool {
    error.to_string().contains(OUTPUT)
}

/// Weighs values after checking that all of them are finite.
pub(super) fn weigh(
    objective: &dyn Objective,
    forest: &Forest,
    Readings { logps: values, rows }: &Readings,
    totals: &StepTotals,
) -> Result<Weighed> {
    if let Some(index) = values.iter().position(|value| !value.is_finite()) {
        let tree = match objective.readout() {
            Readout::Logps => forest.leaves[forest.targets[index].leaf as usize].tree,
            Readout::Scores => forest.ends[index * forest.ends.len() / values.len()].tree,
        };
        let row = forest.sources[tree];
        return Err(Error::run(format!("{OUTPUT} {}", values[index]))
            .at(format!("row {row}"))
            .hint("the weights have diverged: lower learning_rate, or look for a bad row"));
    }
    let mut weighed = objective.weigh(forest, Reading { values, rows }, totals)?;
    if !rows.is_empty() {
        let answers = objective.answers(forest);
        let counted = |leaf: u32| answers.as_ref().is_none_or(|all| all[leaf as usize]);
        let own = || {
            let all = forest.targets.iter().zip(values.iter().zip(rows));
            all.filter(|(target, _)| counted(target.leaf)).map(|(_, read)| read)
        };
        let count = own().count() as f64;
        let mean = |name, of: &dyn Fn(&f32, &RowStats) -> f64| Mean {
            name,
            sum: own().map(|(logp, row)| of(logp, row)).sum(),
            count,
        };
        weighed.metrics.push(mean("entropy", &|_, row| f64::from(row.entropy)));
        let right = |logp: &f32, row: &RowStats| f64::from(u8::from(*logp >= row.best_logp));
        weighed.metrics.push(mean("mean_token_accuracy", &right));
    }
    Ok(weighed)
}
