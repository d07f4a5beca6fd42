//! The training step: forward block by block, the head, then blocks backwards, one micro-batch at a time.

use std::borrow::Borrow;

use super::Learner;
use super::batch::{Batch, MicroBatch};
use super::memory::{Adapted, Footprint, Recompute};
use super::noise::Noise;
pub use super::weighing::is_not_finite;
use super::weighing::{self, head_step, weigh};
use crate::data::examples::Examples;
use crate::data::forest::{Forest, packed};
use crate::data::tree::Tree;
use crate::error::{Error, Result};
use crate::loss::{Mean, Objective, Readout, StepTotals, Weighed};
use crate::model::gradients::Gradients;
use crate::model::lora::Dropout;
use crate::model::transformer::{Keep, Trace, Transformer};
use crate::model::{Config, Precision};
use crate::ops::cuda::device;
use crate::ops::head::{Pending, Readings};
use crate::report::record::Metrics;

/// How a step runs. All but the type, the dropout and the noise affect only memory and speed, never the result.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a choice of its own")]
pub struct StepOptions {
    /// Token budget of a micro-batch.
    pub max_tokens: usize,
    /// Which blocks are recomputed in the backward pass.
    pub recompute: Recompute,
    /// Bytes that a step may use, if `recompute` is by memory.
    pub budget: u64,
    /// Compute type of the model.
    pub dtype: Precision,
    /// Sizes, if only part of the model is trained.
    pub adapted: Option<Adapted>,
    /// Dropout on the adapters' inputs.
    pub dropout: Option<Dropout>,
    /// Weights are updated in the backward pass: see [`update`](super::update::update).
    pub optimizer_in_backward: bool,
    /// Masters and moments are in host memory, not on the device.
    pub optimizer_offload: bool,
    /// Inputs of recomputed blocks wait in host memory.
    pub activation_offload: bool,
    /// A moving average of the weights is held as well: see [`Ema`](super::Ema).
    pub averages: bool,
    /// A reference that follows the policy is held as well: see [`Follower`](super::Follower).
    pub follows: bool,
    /// A frozen copy of the policy is held as well: see [`anchor`](super::anchor::anchor).
    pub anchored: bool,
    /// Noise on the token embeddings.
    pub noise: Option<Noise>,
    /// Runs on a GPU, where more is held at once and slopes of pairs are computed on the device.
    pub gpu: bool,
}

impl StepOptions {
    /// In f32, without recomputation.
    pub const fn new(max_tokens: usize) -> Self {
        Self {
            max_tokens,
            recompute: Recompute::None,
            budget: u64::MAX,
            dtype: Precision::F32,
            adapted: None,
            dropout: None,
            optimizer_in_backward: false,
            optimizer_offload: false,
            activation_offload: false,
            averages: false,
            follows: false,
            anchored: false,
            noise: None,
            gpu: false,
        }
    }

    /// The outcome of recomputation by memory, for people.
    pub fn explain(&self, config: &Config) -> String {
        let (tokens, budget) = (self.max_tokens, self.budget >> 20);
        let keep = self.keep(config, tokens);
        let needed = Footprint::new(config, self, tokens).bytes(keep) >> 20;
        let blocks = config.num_hidden_layers;
        if needed > budget {
            return format!(
                "a step of {tokens} tokens needs about {needed} MiB even where every block is recomputed, and {budget} MiB \
                 may be filled: lower max_tokens_per_micro_batch"
            );
        }
        format!(
            "{keep} of {blocks} blocks keep their activations: {needed} of {budget} MiB at {tokens} tokens"
        )
    }

    /// Error of a step. For a full device, it says what fills the memory, largest first, and which settings help.
    pub fn out_of_memory(&self, config: &Config, error: Error) -> Error {
        let (tokens, keep) = (self.max_tokens, self.keep(config, self.max_tokens));
        let parts = Footprint::new(config, self, tokens).parts(keep);
        let ways = [
            (keep > 0, "gradient_checkpointing = \"block\""),
            (true, "a lower max_tokens_per_micro_batch"),
            (!self.optimizer_in_backward, "optimizer_in_backward = true"),
            (!self.optimizer_offload, "optimizer_offload = true"),
            (keep == 0 && !self.activation_offload, "activation_offload = true"),
            (self.dtype == Precision::F32, "dtype = \"bf16\""),
            (self.averages, "no ema_decay"),
            (self.adapted.is_none(), "use_peft = true"),
        ];
        let ways: Vec<&str> =
            ways.into_iter().filter(|(helps, _)| *helps).map(|(_, way)| way).collect();
        let what = format!("in a step of {tokens} tokens");
        device::out_of_memory(error, &what, parts, &ways.join(", or "))
    }

    /// How many blocks keep their activations for `tokens` tokens.
    pub fn keep(&self, config: &Config, tokens: usize) -> usize {
        match self.recompute {
            Recompute::None => config.num_hidden_layers,
            Recompute::Block => 0,
            Recompute::Auto => Footprint::new(config, self, tokens).keep_within(self.budget),
        }
    }
}

/// Measurements of one step (or one evaluation).
#[derive(Clone, Debug, Default)]
pub struct StepReport {
    /// `Σ weight · sum / count` over the objective's terms.
    pub loss: f64,
    /// `loss/<term>` for each term, and the objective's metrics as means over the step.
    pub metrics: Metrics,
    /// Tokens processed, shared ones counted once.
    pub tokens: usize,
}

/// The gradient of the objective over all `trees`, independent of the micro-batches, and the step's measurements.
///
/// # Errors
/// A step in which nothing is trained; a value that is not finite, named by its row.
pub fn gradients(
    learner: &Learner,
    objective: &dyn Objective,
    trees: &[&Tree],
    options: StepOptions,
) -> Result<(Gradients, StepReport)> {
    let batch = Batch::new(learner.model(), trees, options.max_tokens)?;
    gradients_of(learner, objective, batch, options)
}

/// [`gradients`] of a prepared step.
pub(super) fn gradients_of(
    learner: &Learner,
    objective: &dyn Objective,
    Batch { parts, .. }: Batch,
    options: StepOptions,
) -> Result<(Gradients, StepReport)> {
    let model = learner.model();
    let totals =
        totals(objective, &parts, &|part| read_as_trained(model, objective, part, options))?;
    let mut grads = Gradients::new(model.device());
    let mut measured = Vec::with_capacity(parts.len());
    // A part's device data is freed with the part.
    for part in parts {
        let forest = &part.forest;
        let trace = trace(model, &part, options)?;
        let place = (forest, &trace.hidden);
        let (own, d_hidden) = head_step((model, options), objective, place, &totals, &mut grads)?;
        model.backward(forest, trace, &d_hidden, &mut grads)?;
        measured.push((part.forest, own));
    }
    // On a GPU, all micro-batches are enqueued before the host waits for the first.
    let mut sums = Sums::new(objective);
    for (forest, measured) in measured {
        sums.add(measured.wait(objective, &forest, &totals)?, &forest);
    }
    Ok((grads, sums.report(objective, &totals)))
}

/// The forward pass of a step.
pub(super) fn trace(model: &Transformer, part: &MicroBatch, options: StepOptions) -> Result<Trace> {
    let MicroBatch { forest, layout } = part;
    let keep = options.keep(model.config(), forest.len());
    let masks = options.dropout.map(|dropout| dropout.over(forest));
    let mut x = model.embed(&forest.tokens)?;
    if let Some(noise) = options.noise {
        x = noise.add(forest, &x)?;
    }
    let inputs_on_host = options.activation_offload;
    model.trace_embedded(layout, &x, Keep { blocks: keep, masks, inputs_on_host })
}

/// Measures the objective without gradients, one micro-batch at a time.
pub fn evaluate(
    model: &Transformer,
    objective: &dyn Objective,
    examples: &dyn Examples,
    max_tokens: usize,
) -> Result<StepReport> {
    let totals = if objective.coupled() {
        // Statistics cover all examples at once.
        let forests: Vec<Forest> = packed(examples, max_tokens).collect::<Result<_>>()?;
        let read = |forest: &Forest| {
            weighing::readings(model, objective, (forest, &model.hidden(forest)?))
        };
        totals(objective, &forests, &read)?
    } else {
        let mut counts = Counts::new(objective);
        for forest in packed(examples, max_tokens) {
            counts.add(&forest?);
        }
        StepTotals { counts: counts.check()?, statistics: Vec::new() }
    };
    let (mut sums, mut seen) = (Sums::new(objective), Vec::new());
    for forest in packed(examples, max_tokens) {
        let forest = forest?;
        let hidden = model.hidden(&forest)?;
        let readings = weighing::readings(model, objective, (&forest, &hidden))?.wait()?;
        seen.extend(objective.observe(&forest, &readings.logps));
        sums.add(weigh(objective, &forest, &readings, &totals)?, &forest);
    }
    let mut report = sums.report(objective, &totals);
    report.metrics.extend(objective.summarize(&seen));
    Ok(report)
}

/// The values an objective reads from one forest: log-probabilities of its targets, `[N]`, or scores at its ends,
/// `[E, L]` flattened.
pub fn read(model: &Transformer, readout: Readout, forest: &Forest) -> Result<Vec<f32>> {
    let values = weighing::values(model, readout, (forest, &model.hidden(forest)?))?;
    Ok(values.wait()?.logps)
}

/// [`read`] with the noise and dropout of the step's own pass: the values that a coupled objective compares with.
pub(super) fn read_as_trained(
    model: &Transformer,
    objective: &dyn Objective,
    part: &MicroBatch,
    options: StepOptions,
) -> Result<Pending> {
    let MicroBatch { forest, layout } = part;
    if options.noise.is_none() && options.dropout.is_none() {
        return weighing::readings(model, objective, (forest, &model.hidden_in(forest, layout)?));
    }
    let options = StepOptions { recompute: Recompute::Block, activation_offload: false, ..options };
    weighing::readings(model, objective, (forest, &trace(model, part, options)?.hidden))
}

/// How much each term of an objective has to weigh, over any number of micro-batches.
struct Counts<'a> {
    objective: &'a dyn Objective,
    of_terms: Vec<f64>,
    /// The first rows, to name in an error.
    rows: Vec<usize>,
}

impl<'a> Counts<'a> {
    fn new(objective: &'a dyn Objective) -> Self {
        Self { objective, of_terms: vec![0.0; objective.terms().len()], rows: Vec::new() }
    }

    fn add(&mut self, forest: &Forest) {
        let counts = self.objective.counts(forest);
        self.of_terms.resize(counts.len().max(self.of_terms.len()), 0.0);
        self.of_terms.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        self.rows.extend(forest.sources.iter().take(4 - self.rows.len()));
    }

    /// Returns the counts, or an error if a term with nonzero weight has nothing to train on.
    fn check(self) -> Result<Vec<f64>> {
        for ((term, weight), count) in self.objective.terms().iter().zip(&self.of_terms) {
            if *weight != 0.0 && *count <= 0.0 {
                let rows = &self.rows;
                return Err(Error::run(format!(
                    "nothing is trained by `{term}` in a step of rows {rows:?} …"
                )));
            }
        }
        Ok(self.of_terms)
    }
}

/// Counts, and the statistics of a coupled objective, over all micro-batches, with values from `read`. On a GPU, all
/// are enqueued before the host waits for the first.
pub(super) fn totals<F: Borrow<Forest>>(
    objective: &dyn Objective,
    forests: &[F],
    read: &dyn Fn(&F) -> Result<Pending>,
) -> Result<StepTotals> {
    let mut counts = Counts::new(objective);
    for forest in forests {
        counts.add(forest.borrow());
    }
    let mut totals = StepTotals { counts: counts.check()?, statistics: Vec::new() };
    if objective.coupled() {
        let under_way: Vec<Pending> = forests.iter().map(read).collect::<Result<_>>()?;
        let values: Vec<Readings> =
            under_way.into_iter().map(Pending::wait).collect::<candle_core::Result<_>>()?;
        let readings: Vec<(&Forest, &[f32])> = forests
            .iter()
            .zip(&values)
            .map(|(forest, values)| (forest.borrow(), values.logps.as_slice()))
            .collect();
        totals.statistics = objective.statistics(&readings)?;
    }
    Ok(totals)
}

/// Running sums of a step.
pub(super) struct Sums {
    terms: Vec<f64>,
    means: Vec<Mean>,
    tokens: usize,
}

impl Sums {
    pub(super) fn new(objective: &dyn Objective) -> Self {
        Self { terms: vec![0.0; objective.terms().len()], means: Vec::new(), tokens: 0 }
    }

    pub(super) fn add(&mut self, weighed: Weighed, forest: &Forest) {
        self.terms.iter_mut().zip(weighed.sums).for_each(|(sum, value)| *sum += value);
        self.tokens += forest.len();
        for mean in weighed.metrics {
            match self.means.iter_mut().find(|known| known.name == mean.name) {
                Some(known) => {
                    known.sum += mean.sum;
                    known.count += mean.count;
                }
                None => self.means.push(mean),
            }
        }
    }

    pub(super) fn report(self, objective: &dyn Objective, totals: &StepTotals) -> StepReport {
        let mut report = StepReport { tokens: self.tokens, ..StepReport::default() };
        let terms = objective.terms();
        for (((name, weight), sum), count) in terms.iter().zip(&self.terms).zip(&totals.counts) {
            // Weights below 1 may leave a count below 1; a step without anything to count has no sum either.
            let value = if *count > 0.0 { sum / count } else { 0.0 };
            report.loss += weight * value;
            if terms.len() > 1 && *weight != 0.0 {
                report.metrics.insert(format!("loss/{name}"), value);
            }
        }
        for Mean { name, sum, count } in self.means {
            // A count of zero marks a plain sum.
            report.metrics.insert(name.to_owned(), if count > 0.0 { sum / count } else { sum });
        }
        report
    }
}
