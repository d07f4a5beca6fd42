//! What a log-probability or a score is worth. Pure functions on numbers, one example at a time; no models.
//!
//! A loss has two sides: a scalar function with its hand-derived slope (`sigmoid`, `bradley_terry`), and an
//! [`Objective`] that applies it to the sequences of a forest. Each loss term returns its own sum and count; counts are
//! taken over the whole optimizer step before the first backward, so that no split into micro-batches changes a
//! gradient.

pub mod anchor;
pub mod preference;
pub mod ranking;
pub mod reward;
pub mod sft;

use std::collections::BTreeMap;

use crate::data::forest::Forest;
use crate::error::Result;
use crate::ops::head::{Anchor, Detail, Pairs, RowStats, Slopes};
use reward::Observation;

/// Which numbers of a forest an objective reads and weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readout {
    /// The log-probability of each of [`Forest::targets`].
    Logps,
    /// The scores of each of [`Forest::ends`], as many as the head has outputs.
    Scores,
}

/// Sums over the whole optimizer step, known before the first backward.
#[derive(Clone, Debug, Default)]
pub struct StepTotals {
    /// One count a term: what its sum is divided by. What an objective counts beyond its terms comes after.
    pub counts: Vec<f64>,
    /// What [`Objective::statistics`] returned for a coupled objective; empty otherwise.
    pub statistics: Vec<f64>,
}

/// What was read of one micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct Reading<'a> {
    /// One value a target or a leaf, as the [`Readout`] says.
    pub values: &'a [f32],
    /// What each target's row says; as much as [`Objective::detail`] asks for at least.
    pub rows: &'a [RowStats],
}

impl<'a> From<&'a [f32]> for Reading<'a> {
    /// Of the values alone.
    fn from(values: &'a [f32]) -> Self {
        Self { values, rows: &[] }
    }
}

/// A gradient that is known before anything is read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FixedGradient {
    /// Of each log-probability.
    pub d_logps: Vec<f32>,
    /// As in [`Slopes`].
    pub mean_logp: f32,
    /// As in [`Slopes`].
    pub squared_lse: f32,
}

impl FixedGradient {
    /// The gradient as the head takes it.
    pub fn slopes(&self) -> Slopes<'_> {
        let Self { d_logps, mean_logp, squared_lse } = self;
        Slopes { d_logps, mean_logp: *mean_logp, squared_lse: *squared_lse }
    }
}

/// A mean in the making: metrics are averaged over the step, not over micro-batches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mean {
    /// What it is called in logs.
    pub name: &'static str,
    /// Sum of values.
    pub sum: f64,
    /// Number of values.
    pub count: f64,
}

/// What an objective says about one micro-batch.
#[derive(Clone, Debug, Default)]
pub struct Weighed {
    /// Gradient of the step's loss with respect to each value read.
    pub d_values: Vec<f32>,
    /// One sum a term, not yet divided by its count and not yet weighted.
    pub sums: Vec<f64>,
    /// For the log.
    pub metrics: Vec<Mean>,
}

/// A method, as far as the training loop is concerned.
pub trait Objective: Send + Sync {
    /// Which numbers it reads.
    fn readout(&self) -> Readout {
        Readout::Logps
    }

    /// Its terms by name, each with its weight in the loss: `loss = Σ weight · sum / count`.
    fn terms(&self) -> Vec<(&'static str, f64)>;

    /// What this micro-batch adds to each term's count, and then to counts of its own.
    fn counts(&self, forest: &Forest) -> Vec<f64>;

    /// How much of [`Reading::rows`] [`weigh`](Self::weigh) needs.
    fn detail(&self) -> Detail {
        Detail::Targets
    }

    /// The gradient where it does not depend on the values (SFT): the head then runs in one pass.
    fn fixed_gradient(&self, _forest: &Forest, _totals: &StepTotals) -> Option<FixedGradient> {
        None
    }

    /// The gradient where it follows from margins of pairs alone (most of DPO's family): a GPU then computes it between
    /// the head's two passes, and the host does not wait. [`weigh`](Self::weigh) says the same gradient.
    ///
    /// # Errors
    /// As [`weigh`](Self::weigh), before anything is read.
    fn pairs(&self, _forest: &Forest, _totals: &StepTotals) -> Result<Option<Pairs>> {
        Ok(None)
    }

    /// What it needs to weigh this micro-batch, owned: a device asks it in its own time. A reference that moves is asked now.
    ///
    /// # Errors
    /// That reference's.
    fn for_forest(&self, forest: &Forest) -> Result<Box<dyn Objective>>;

    /// The frozen model whose distribution this micro-batch's rows are compared with, and the slope of each target's
    /// divergence from it where `totals` are known. The head takes that part of the gradient; [`weigh`](Self::weigh) returns
    /// the rest, and the divergences' sum.
    ///
    /// # Errors
    /// That model's.
    fn anchor(&self, _forest: &Forest, _totals: Option<&StepTotals>) -> Result<Option<Anchor>> {
        Ok(None)
    }

    /// Bytes on the model's device that it holds: those of a frozen model.
    fn bytes(&self) -> u64 {
        0
    }

    /// Whether an example's loss depends on the other examples of its step (KTO, BCO, AOT). The loop then reads all
    /// micro-batches first and hands the values to [`statistics`](Self::statistics).
    fn coupled(&self) -> bool {
        false
    }

    /// Whether each leaf answers its own prompt, where some do not (KTO's): what is logged of all tokens is of those that do.
    fn answers(&self, _forest: &Forest) -> Option<Vec<bool>> {
        None
    }

    /// The step's statistics, from every micro-batch and its values.
    fn statistics(&self, _readings: &[(&Forest, &[f32])]) -> Result<Vec<f64>> {
        Ok(Vec::new())
    }

    /// Loss and gradient for the values of one micro-batch.
    fn weigh(&self, forest: &Forest, reading: Reading<'_>, totals: &StepTotals) -> Result<Weighed>;

    /// What an evaluation keeps of one micro-batch for [`summarize`](Self::summarize).
    fn observe(&self, _forest: &Forest, _values: &[f32]) -> Vec<Observation> {
        Vec::new()
    }

    /// Numbers of a whole evaluation that are no means over its micro-batches.
    fn summarize(&self, _observations: &[Observation]) -> Vec<(String, f64)> {
        Vec::new()
    }
}

/// What a table says of a forest's rows.
fn of_rows<T: Clone>(table: &BTreeMap<usize, T>, forest: &Forest) -> BTreeMap<usize, T> {
    let rows = forest.sources.iter();
    rows.filter_map(|row| Some((*row, table.get(row)?.clone()))).collect()
}

/// `ln σ(x)`, exact to rounding at both ends.
///
/// ```
/// use arriero::loss::log_sigmoid;
/// assert_eq!(log_sigmoid(0.0), -std::f64::consts::LN_2);
/// assert_eq!(log_sigmoid(-800.0), -800.0);
/// assert!((log_sigmoid(2.5) - log_sigmoid(-2.5) - 2.5).abs() < 1e-15);
/// ```
pub fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// `σ(x)`, the slope of `-log_sigmoid(-x)`.
pub fn sigmoid(x: f64) -> f64 {
    log_sigmoid(x).exp()
}
