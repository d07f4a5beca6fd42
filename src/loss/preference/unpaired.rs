//! KTO on single responses that somebody called desirable or not.

use std::collections::BTreeMap;

use super::coupled::{kl_estimate, shift};
use super::objective::{empty, is_first};
use super::{LiveReference, LossOptions, PreferenceLoss, Response, Summing};
use crate::data::forest::Forest;
use crate::data::tree::Tree;
use crate::error::{Error, Result};
use crate::loss::{Mean, Objective, Reading, StepTotals, Weighed};

/// The unpaired objective: each tree's first leaf is a labelled response, its further leaves are responses to other
/// prompts, from which the KL is estimated.
#[derive(Clone, Debug)]
pub struct Unpaired {
    /// [`PreferenceLoss::Kto`] or [`PreferenceLoss::ApoZeroUnpaired`].
    pub loss: PreferenceLoss,
    /// Its constants.
    pub options: LossOptions,
    /// Which tokens enter.
    pub summing: Summing,
    /// Whether each row's response is desirable.
    pub labels: BTreeMap<usize, bool>,
    /// The reference's log-probability of each leaf, under the same mask, by row.
    pub reference: BTreeMap<usize, Vec<f64>>,
    /// A reference that moves; asked instead of `reference` where there is one.
    pub live: Option<LiveReference>,
}

/// One tree.
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

impl Unpaired {
    /// Refuses a tree without a label or with a response that has no token to sum.
    ///
    /// # Errors
    /// Says which.
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

    /// TRL's names; each side over the rows that have its label.
    fn metrics(&self, read: &Read, kl: f64) -> Vec<Mean> {
        let mut metrics = Vec::new();
        for (desirable, [reward, logp, length]) in [
            (true, ["rewards/chosen", "logps/chosen", "lengths/chosen"]),
            (false, ["rewards/rejected", "logps/rejected", "lengths/rejected"]),
        ] {
            let rows = || read.rows.iter().filter(|row| row.desirable == desirable);
            let count = rows().count() as f64;
            let mut mean = |name, of: &dyn Fn(&Labelled) -> f64| {
                let sum = rows().map(of).sum();
                metrics.extend((count > 0.0).then_some(Mean { name, sum, count }));
            };
            mean(reward, &|row| self.options.beta * row.log_ratio);
            mean(logp, &|row| row.logp);
            // The watchdog looks at the log-probability a token.
            mean(length, &|row| row.length);
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
        vec![(self.loss.name(), 1.0)]
    }

    fn counts(&self, forest: &Forest) -> Vec<f64> {
        vec![forest.trees() as f64]
    }

    fn coupled(&self) -> bool {
        self.loss.coupled()
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
        let d_values = forest.targets.iter().zip(weights).map(|(target, weight)| {
            let leaf = target.leaf as usize;
            let (_, slope) = losses[forest.leaves[leaf].tree];
            if first[leaf] { (weight * slope / totals.counts[0]) as f32 } else { 0.0 }
        });
        Ok(Weighed {
            d_values: d_values.collect(),
            sums: vec![losses.iter().map(|(loss, _)| loss).sum()],
            metrics: self.metrics(&read, kl),
        })
    }
}
