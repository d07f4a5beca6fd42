//! Preference losses over the pairs of a forest, several at once, with the chosen side's negative log-likelihood beside
//! them.
//!
//! In the form of Llama 3 (section 4.1.4): `sigmoid`, formatting tokens left out of both sides' log-probabilities, and
//! 0.2 of the chosen response's negative log-likelihood over all its tokens.

use std::collections::BTreeMap;
use std::mem::replace;

use super::{LossOptions, Pair, PairLoss, PreferenceLoss, Response, Sides, Summing};
use crate::data::forest::Forest;
use crate::data::tree::Tree;
use crate::error::{Error, Result};
use crate::loss::{Mean, Objective, StepTotals, Weighed};

/// The preference objective: the chosen response is each tree's first leaf, the rejected one its second. With
/// [`PreferenceLoss::Kto`] further leaves are responses to other prompts.
#[derive(Clone, Debug)]
pub struct Preference {
    /// The losses, each with its weight; may be empty beside `sft_weight`.
    pub losses: Vec<(PreferenceLoss, f64)>,
    /// Their constants.
    pub options: LossOptions,
    /// Weight of the chosen response's negative log-likelihood, a mean over the step's chosen tokens; 0 turns it off.
    pub sft_weight: f64,
    /// Which tokens enter the preference losses.
    pub summing: Summing,
    /// The reference's log-probability of each leaf, under the same mask, by the pair's row. Empty where no loss
    /// needs one.
    pub reference: BTreeMap<usize, Vec<f64>>,
    /// The column `margin` by row, where a loss reads it.
    pub margins: BTreeMap<usize, f64>,
}

impl Default for Preference {
    fn default() -> Self {
        Self {
            losses: vec![(PreferenceLoss::Sigmoid, 1.0)],
            options: LossOptions::default(),
            sft_weight: 0.0,
            summing: Summing::default(),
            reference: BTreeMap::new(),
            margins: BTreeMap::new(),
        }
    }
}

/// The pairs of one forest, and the log-ratios of the responses to other prompts.
#[derive(Default)]
struct Read {
    pairs: Vec<Pair>,
    mismatched: Vec<f64>,
}

impl Preference {
    /// Whether a loss with weight reads the reference.
    pub fn needs_reference(&self) -> bool {
        self.has(PreferenceLoss::needs_reference)
    }

    fn has(&self, property: fn(PreferenceLoss) -> bool) -> bool {
        self.losses.iter().any(|(loss, _)| property(*loss))
    }

    /// Refuses a tree that no loss can be taken of: not a pair, a response without a token that enters, two equal
    /// responses.
    ///
    /// # Errors
    /// Says which.
    pub fn check_tree(&self, tree: &Tree) -> Result<()> {
        let leaves = tree.leaves();
        self.check_leaves(leaves.len())?;
        let lengths = self.summing.lengths(tree);
        if let Some(leaf) = lengths.iter().position(|&length| length == 0) {
            return Err(empty(leaf));
        }
        if tree.unroll(leaves[0]).0 == tree.unroll(leaves[1]).0 {
            return Err(Error::run("chosen and rejected are the same tokens").hint(
                "such a pair teaches nothing; where only their ends differ, raise max_length",
            ));
        }
        Ok(())
    }

    fn check_leaves(&self, leaves: usize) -> Result<()> {
        if leaves == 2 || leaves > 2 && self.has(PreferenceLoss::needs_mismatched) {
            return Ok(());
        }
        Err(Error::run(format!("{leaves} responses, expected two: a chosen and a rejected one")))
    }

    /// What the losses are told of each tree.
    fn read(&self, forest: &Forest, logps: &[f32]) -> Result<Read> {
        let mut read = Read::default();
        for (source, policy) in self.summing.trees(forest, logps) {
            let count = policy.len();
            let row = || format!("row {source}");
            self.check_leaves(count).map_err(|error| error.at(row()))?;
            if let Some(leaf) = policy.iter().position(|response| response.length < 1.0) {
                return Err(empty(leaf).at(row()));
            }
            let reference = self.reference_of(source, count).map_err(|error| error.at(row()))?;
            let margin = self.margin_of(source).map_err(|error| error.at(row()))?;
            read.pairs.push(pair(&policy, &reference, margin));
            let others = policy.iter().zip(&reference).skip(2);
            read.mismatched.extend(others.map(|(response, reference)| response.logp - reference));
        }
        Ok(read)
    }

    fn reference_of(&self, source: usize, leaves: usize) -> Result<Vec<f64>> {
        if !self.needs_reference() {
            return Ok(vec![0.0; leaves]);
        }
        self.reference
            .get(&source)
            .filter(|logps| logps.len() == leaves)
            .cloned()
            .ok_or_else(|| Error::run("no reference log-probability was computed"))
    }

    fn margin_of(&self, source: usize) -> Result<f64> {
        if !self.has(PreferenceLoss::needs_margin) {
            return Ok(0.0);
        }
        self.margins.get(&source).copied().ok_or_else(|| {
            Error::run("the row has no `margin`")
                .hint("rpo needs it: by how much the chosen response's reward is higher")
        })
    }

    /// The slopes of each pair, with weights and counts, and each loss's plain sum.
    fn losses_of(&self, pairs: &[Pair], totals: &StepTotals) -> (Vec<PairLoss>, Vec<f64>) {
        let mut all = vec![PairLoss::default(); pairs.len()];
        let mut sums = Vec::with_capacity(self.losses.len() + 1);
        let shares = self.shares(totals);
        for (((loss, weight), count), own) in self.losses.iter().zip(&totals.counts).zip(shares) {
            let mut sum = 0.0;
            for (pair, total) in pairs.iter().zip(&mut all) {
                let one = loss.of_pair(pair, own, &self.options);
                sum += one.loss;
                total.d_chosen += weight * one.d_chosen / count;
                total.d_rejected += weight * one.d_rejected / count;
            }
            sums.push(sum);
        }
        (all, sums)
    }

    /// Each loss's part of the step's statistics.
    fn shares<'a>(&self, totals: &'a StepTotals) -> Vec<&'a [f64]> {
        let mut statistics = totals.statistics.as_slice();
        let share = self.losses.iter().zip(&totals.counts).map(|((loss, _), count)| {
            let length = loss.statistics_len(*count as usize).min(statistics.len());
            let (own, rest) = statistics.split_at(length);
            statistics = rest;
            own
        });
        share.collect()
    }

    /// TRL's names. Rewards without a reference are `β log π`.
    fn metrics(&self, read: &Read, totals: &StepTotals) -> Vec<Mean> {
        let count = read.pairs.len() as f64;
        let beta = self.options.beta;
        let mean = |name, value: &dyn Fn(&Pair) -> f64| Mean {
            name,
            sum: read.pairs.iter().map(value).sum(),
            count,
        };
        let mut metrics = vec![
            mean("rewards/chosen", &|pair| beta * pair.log_ratios().chosen),
            mean("rewards/rejected", &|pair| beta * pair.log_ratios().rejected),
            mean("rewards/margins", &|pair| beta * pair.log_ratios().gap()),
            mean("rewards/accuracies", &|pair| f64::from(u8::from(pair.log_ratios().gap() > 0.0))),
            mean("logps/chosen", &|pair| pair.policy.chosen),
            mean("logps/rejected", &|pair| pair.policy.rejected),
        ];
        for ((loss, _), own) in self.losses.iter().zip(self.shares(totals)) {
            if loss.needs_mismatched() {
                let kl = own.first().copied().unwrap_or_default();
                metrics.push(Mean { name: "kto/kl", sum: kl * count, count });
            }
        }
        metrics
    }
}

fn pair(policy: &[Response], reference: &[f64], margin: f64) -> Pair {
    Pair {
        policy: Sides { chosen: policy[0].logp, rejected: policy[1].logp },
        reference: Sides { chosen: reference[0], rejected: reference[1] },
        lengths: Sides { chosen: policy[0].length, rejected: policy[1].length },
        margin,
    }
}

/// A response without a token to sum.
pub(super) fn empty(leaf: usize) -> Error {
    let side = match leaf {
        0 => "the first response",
        1 => "the second response",
        _ => "the response to another prompt",
    };
    Error::run(format!("{side} has no token that enters the loss")).hint(
        "an empty response has formatting tokens only, which mask_formatting_tokens leaves out",
    )
}

/// Whether each leaf is its tree's first.
pub(super) fn is_first(forest: &Forest) -> Vec<bool> {
    let mut seen = vec![false; forest.trees()];
    forest.leaves.iter().map(|leaf| !replace(&mut seen[leaf.tree], true)).collect()
}

impl Objective for Preference {
    fn terms(&self) -> Vec<(&'static str, f64)> {
        let losses = self.losses.iter().map(|(loss, weight)| (loss.name(), *weight));
        losses.chain([("sft", self.sft_weight)]).collect()
    }

    fn counts(&self, forest: &Forest) -> Vec<f64> {
        let chosen = is_first(forest);
        let tokens = forest.targets.iter().filter(|target| chosen[target.leaf as usize]).count();
        let mut counts = vec![forest.trees() as f64; self.losses.len()];
        counts.push(tokens as f64);
        counts
    }

    fn coupled(&self) -> bool {
        self.has(PreferenceLoss::coupled)
    }

    fn statistics(&self, readings: &[(&Forest, &[f32])]) -> Vec<f64> {
        let mut all = Read::default();
        for (forest, logps) in readings {
            // A forest that cannot be read is refused with its row when it is weighed.
            let read = self.read(forest, logps).unwrap_or_default();
            all.pairs.extend(read.pairs);
            all.mismatched.extend(read.mismatched);
        }
        let statistic = |(loss, _): &(PreferenceLoss, f64)| {
            loss.statistics(&all.pairs, &all.mismatched, &self.options)
        };
        self.losses.iter().flat_map(statistic).collect()
    }

    fn weigh(&self, forest: &Forest, logps: &[f32], totals: &StepTotals) -> Result<Weighed> {
        let read = self.read(forest, logps)?;
        let (slopes, mut sums) = self.losses_of(&read.pairs, totals);
        let per_token = if self.sft_weight > 0.0 {
            self.sft_weight / totals.counts[self.losses.len()]
        } else {
            0.0
        };
        let chosen = is_first(forest);
        // Which of its tree's leaves a leaf is: 0 chosen, 1 rejected, further ones carry no gradient.
        let mut place = vec![0_usize; forest.leaves.len()];
        for leaf in 1..place.len() {
            place[leaf] = if chosen[leaf] { 0 } else { place[leaf - 1] + 1 };
        }
        let mut nll = 0.0;
        let weights = self.summing.weights(forest);
        let d_values =
            forest.targets.iter().zip(logps).zip(weights).map(|((target, &logp), weight)| {
                let leaf = target.leaf as usize;
                let slopes = &slopes[forest.leaves[leaf].tree];
                match place[leaf] {
                    0 => {
                        nll -= f64::from(logp);
                        (weight * slopes.d_chosen - per_token) as f32
                    }
                    1 => (weight * slopes.d_rejected) as f32,
                    _ => 0.0,
                }
            });
        let d_values = d_values.collect();
        sums.push(nll);
        Ok(Weighed { d_values, sums, metrics: self.metrics(&read, totals) })
    }
}
