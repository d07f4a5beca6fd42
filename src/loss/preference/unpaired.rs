//! KTO on single responses labelled desirable or undesirable.

use std::collections::BTreeMap;

use super::coupled::{kl_estimate, shift};
use super::objective::{empty, is_first, mean_logits};
use super::{LiveReference, LossOptions, PreferenceLoss, Response, Summing};
use crate::data::forest::Forest;
use crate::data::tree::Tree;
use crate::error::{Error, Result};
use crate::loss::{Mean, Objective, Reading, StepTotals, Weighed, of_rows};

/// The unpaired objective. Each tree's first leaf is a labelled response; further leaves are responses to other
/// prompts, used to estimate the KL.
#[derive(Clone, Debug)]
pub struct Unpaired {
    /// [`PreferenceLoss::Kto`] or [`PreferenceLoss::ApoZeroUnpaired`].
    pub loss: PreferenceLoss,
    /// Weight in the total loss.
    pub weight: f64,
    /// Constants of the loss.
    pub options: LossOptions,
    /// Which tokens contribute.
    pub summing: Summing,
    /// Whether each row's response is desirable.
    pub labels: BTreeMap<usize, bool>,
    /// Reference log-probability of each leaf, under the same mask, by row.
    pub reference: BTreeMap<usize, Vec<f64>>,
    /// A moving reference; overrides `reference` if set.
    pub live: Option<LiveReference>,
}

/// One tree's loss inputs.
struct Labelled {
    desirable: bool,
    logp: f64,
    length: f64,
    log_ratio: f64,
}

#[derive(Default)]
struct Read {
    rows: Vec<Labelled>,
    mismatched: Vec<f64>,
}

impl Read {
    /// Side of each leaf: 0 desirable, 1 undesirable, 2 a response to another prompt.
    fn sides(&self, forest: &Forest) -> Vec<usize> {
        let side = |(first, tree): (bool, usize)| {
            if first { usize::from(!self.rows[tree].desirable) } else { 2 }
        };
        let trees = forest.leaves.iter().map(|leaf| leaf.tree);
        is_first(forest).into_iter().zip(trees).map(side).collect()
    }
}

impl Unpaired {
    /// Rejects a tree without a label, or with a response without a contributing token.
    ///
    /// # Errors
    /// Names the problem.
    pub fn check_tree(&self, tree: &Tree) -> Result<()> {
        self.label(tree.source)?;
        match self.summing.lengths(tree).iter().position(|&length| length == 0) {
            Some(leaf) => Err(empty(leaf)),
            None => Ok(()),
        }
    }

    fn label(&self, source: usize) -> Result<bool> {
        self.labels.get(&source).copied().ok_or_else(|| {
            Error::run("the row has no `label`")
                .hint("true for a response that is wanted, false for one that is not")
        })
    }

    fn read(&self, forest: &Forest, logps: &[f32]) -> Result<Read> {
        let mut read = Read::default();
        let place = (self.summing, forest);
        let table = LiveReference::table(self.live.as_ref(), &self.reference, place)?;
        for (source, policy) in self.summing.trees(forest, logps) {
            let reference = table.get(&source).map_or(&[][..], Vec::as_slice);
            self.read_tree((source, reference), &policy, &mut read)
                .map_err(|error| error.at(format!("row {source}")))?;
        }
        Ok(read)
    }

    fn read_tree(
        &self,
        (source, reference): (usize, &[f64]),
        policy: &[Response],
        read: &mut Read,
    ) -> Result<()> {
        if let Some(leaf) = policy.iter().position(|response| response.length < 1.0) {
            return Err(empty(leaf));
        }
        if reference.len() != policy.len() {
            return Err(Error::run("no reference log-probability was computed"));
        }
        let mut ratios = policy.iter().zip(reference).map(|(own, other)| own.logp - other);
        let log_ratio = ratios.next().unwrap_or_default();
        read.mismatched.extend(ratios);
        read.rows.push(Labelled {
            desirable: self.label(source)?,
            logp: policy[0].logp,
            length: policy[0].length,
            log_ratio,
        });
        Ok(())
    }

    /// Metrics under TRL's names, per label. `counts` are those of the step.
    fn metrics(&self, read: &Read, kl: f64, counts: &[f64]) -> Vec<Mean> {
        let mut metrics = Vec::new();
        let mut margin = 0.0;
        for (desirable, of_step, [reward, logp, length, count]) in [
            (true, counts[1], ["rewards/chosen", "logps/chosen", "lengths/chosen", "count/chosen"]),
            (
                false,
                counts[0] - counts[1],
                ["rewards/rejected", "logps/rejected", "lengths/rejected", "count/rejected"],
            ),
        ] {
            let rows = || read.rows.iter().filter(|row| row.desirable == desirable);
            let own = rows().count() as f64;
            let mut mean = |name, of: &dyn Fn(&Labelled) -> f64| {
                let sum: f64 = rows().map(of).sum();
                metrics.extend((own > 0.0).then_some(Mean { name, sum, count: own }));
                sum
            };
            let rewards = mean(reward, &|row| self.options.beta * row.log_ratio);
            mean(logp, &|row| row.logp);
            // The watchdog reads the log-probability per token.
            mean(length, &|row| row.length);
            // Plain sums over the step.
            metrics.push(Mean { name: count, sum: own, count: 0.0 });
            margin += if desirable { rewards / of_step } else { -rewards / of_step };
        }
        let wanted = read.rows.iter().filter(|row| row.desirable);
        let (ratios, tokens) =
            wanted.fold((0.0, 0.0), |(sum, count), row| (sum + row.log_ratio, count + row.length));
        metrics.extend((tokens > 0.0).then_some(Mean {
            name: "kl/chosen",
            sum: ratios,
            count: tokens,
        }));
        // Undefined for a step with one label only.
        if margin.is_finite() {
            metrics.push(Mean { name: "rewards/margins", sum: margin, count: 0.0 });
        }
        if self.loss.needs_mismatched() {
            let count = read.rows.len() as f64;
            metrics.push(Mean { name: "kto/kl", sum: kl * count, count });
        }
        metrics
    }
}

impl Objective for Unpaired {
    fn terms(&self) -> Vec<(&'static str, f64)> {
        vec![(self.loss.name(), self.weight)]
    }

    /// Number of responses, and of desirable ones.
    fn counts(&self, forest: &Forest) -> Vec<f64> {
        let desirable = forest.sources.iter().filter(|row| self.labels.get(row) == Some(&true));
        vec![forest.trees() as f64, desirable.count() as f64]
    }

    fn for_forest(&self, forest: &Forest) -> Result<Box<dyn Objective>> {
        let place = (self.summing, forest);
        let reference = LiveReference::for_forest(self.live.as_ref(), &self.reference, place)?;
        let labels = of_rows(&self.labels, forest);
        Ok(Box::new(Self { labels, reference, live: None, ..*self }))
    }

    fn coupled(&self) -> bool {
        self.loss.coupled()
    }

    fn answers(&self, forest: &Forest) -> Option<Vec<bool>> {
        self.loss.needs_mismatched().then(|| is_first(forest))
    }

    fn statistics(&self, readings: &[(&Forest, &[f32])]) -> Result<Vec<f64>> {
        let mut mismatched = Vec::new();
        for (forest, logps) in readings {
            mismatched.extend(self.read(forest, logps)?.mismatched);
        }
        Ok(vec![kl_estimate(&mismatched)])
    }

    fn weigh(&self, forest: &Forest, reading: Reading<'_>, totals: &StepTotals) -> Result<Weighed> {
        let logps = reading.values;
        let read = self.read(forest, logps)?;
        let kl = shift(&totals.statistics);
        let losses: Vec<(f64, f64)> = read
            .rows
            .iter()
            .map(|row| self.loss.of_response(row.desirable, row.log_ratio, kl, &self.options))
            .collect();
        let first = is_first(forest);
        let weights = self.summing.weights(forest);
        let of_loss = self.weight / totals.counts[0];
        let d_values = forest.targets.iter().zip(weights).map(|(target, weight)| {
            let leaf = target.leaf as usize;
            let (_, slope) = losses[forest.leaves[leaf].tree];
            if first[leaf] { (weight * slope * of_loss) as f32 } else { 0.0 }
        });
        let mut metrics = self.metrics(&read, kl, &totals.counts);
        metrics.extend(mean_logits(forest, &read.sides(forest), reading.rows));
        Ok(Weighed {
            d_values: d_values.collect(),
            sums: vec![losses.iter().map(|(loss, _)| loss).sum()],
            metrics,
        })
    }
}
