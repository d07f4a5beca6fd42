//! Preference losses over the pairs of a forest, several at once, with the chosen side's negative log-likelihood beside
//! them.
//!
//! In the form of Llama 3 (section 4.1.4): `sigmoid`, formatting tokens left out of both sides' log-probabilities, and
//! 0.2 of the chosen response's negative log-likelihood over all its tokens.

use std::collections::BTreeMap;
use std::mem::replace;

use super::{LiveReference, LossOptions, Pair, PairLoss, PreferenceLoss, Response, Sides, Summing};
use crate::data::forest::Forest;
use crate::data::tree::Tree;
use crate::error::{Error, Result};
use crate::loss::{Mean, Objective, Reading, StepTotals, Weighed};
use crate::ops::head::RowStats;

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
    /// Weigh each pair by how likely the policy itself is to answer so (`use_weighting`; WPO, Zhou et al., 2024,
    /// equation 2): by `exp` of the mean of `ln p − ln Σp²` over each response's tokens, held constant.
    pub weighting: bool,
    /// The reference's log-probability of each leaf, under the same mask, by the pair's row. Empty where no loss
    /// needs one.
    pub reference: BTreeMap<usize, Vec<f64>>,
    /// A reference that moves; asked instead of `reference` where there is one.
    pub live: Option<LiveReference>,
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
            weighting: false,
            reference: BTreeMap::new(),
            live: None,
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
        let place = (self.summing, forest);
        let table = LiveReference::table(self.live.as_ref(), &self.reference, place)?;
        for (source, policy) in self.summing.trees(forest, logps) {
            let count = policy.len();
            let row = || format!("row {source}");
            self.check_leaves(count).map_err(|error| error.at(row()))?;
            if let Some(leaf) = policy.iter().position(|response| response.length < 1.0) {
                return Err(empty(leaf).at(row()));
            }
            let reference =
                self.reference_of(&table, source, count).map_err(|error| error.at(row()))?;
            let margin = self.margin_of(source).map_err(|error| error.at(row()))?;
            read.pairs.push(pair(&policy, &reference, margin));
            let others = policy.iter().zip(&reference).skip(2);
            read.mismatched.extend(others.map(|(response, reference)| response.logp - reference));
        }
        Ok(read)
    }

    fn reference_of(
        &self,
        table: &BTreeMap<usize, Vec<f64>>,
        source: usize,
        leaves: usize,
    ) -> Result<Vec<f64>> {
        if !self.needs_reference() {
            return Ok(vec![0.0; leaves]);
        }
        table
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

    /// The weight of each pair's losses; see [`Preference::weighting`].
    fn pair_weights(&self, forest: &Forest, reading: Reading<'_>) -> Vec<f64> {
        if !self.weighting {
            return vec![1.0; forest.trees()];
        }
        let alignment = |(logp, row): (&f32, &RowStats)| logp - row.log_sum_squares;
        let aligned: Vec<f32> = reading.values.iter().zip(reading.rows).map(alignment).collect();
        let summing = Summing { ld_alpha: 1.0, ..self.summing };
        let weight = |(_, responses): (usize, Vec<Response>)| {
            responses.iter().take(2).map(|one| one.logp / one.length).sum::<f64>().exp()
        };
        summing.trees(forest, &aligned).into_iter().map(weight).collect()
    }

    /// The slopes of each pair, with weights and counts, and each loss's plain sum.
    fn losses_of(
        &self,
        pairs: &[Pair],
        pair_weights: &[f64],
        totals: &StepTotals,
    ) -> (Vec<PairLoss>, Vec<f64>) {
        let mut all = vec![PairLoss::default(); pairs.len()];
        let mut sums = Vec::with_capacity(self.losses.len() + 1);
        let shares = self.shares(totals);
        for (((loss, weight), count), own) in self.losses.iter().zip(&totals.counts).zip(shares) {
            let mut sum = 0.0;
            for ((pair, pair_weight), total) in pairs.iter().zip(pair_weights).zip(&mut all) {
                let one = loss.of_pair(pair, own, &self.options);
                sum += pair_weight * one.loss;
                total.d_chosen += weight * pair_weight * one.d_chosen / count;
                total.d_rejected += weight * pair_weight * one.d_rejected / count;
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

    /// TRL's names. Rewards without a reference are `β log π`. `kl/chosen` is the mean over chosen tokens of
    /// `ln π − ln π_ref`: the estimator k1 of KL(π ‖ π_ref) on tokens that π did not draw, so that it may be negative.
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
            mean("lengths/chosen", &|pair| pair.lengths.chosen),
            mean("lengths/rejected", &|pair| pair.lengths.rejected),
        ];
        if self.needs_reference() {
            let ratios = mean("kl/chosen", &|pair| pair.log_ratios().chosen);
            let tokens = read.pairs.iter().map(|pair| pair.lengths.chosen).sum();
            metrics.push(Mean { count: tokens, ..ratios });
        }
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

/// Which of its tree's leaves each leaf is: 0 chosen, 1 rejected, further ones carry no gradient.
fn places(forest: &Forest) -> Vec<usize> {
    let chosen = is_first(forest);
    let mut place = vec![0; chosen.len()];
    for leaf in 1..place.len() {
        place[leaf] = if chosen[leaf] { 0 } else { place[leaf - 1] + 1 };
    }
    place
}

/// Mean logit over the vocabulary and each side's trained tokens, where rows were read.
fn mean_logits(forest: &Forest, rows: &[RowStats]) -> Vec<Mean> {
    let place = places(forest);
    let sides = ["logits/chosen", "logits/rejected"].into_iter().enumerate();
    let mean = |(side, name): (usize, &'static str)| {
        let targets = forest.targets.iter().zip(rows);
        let own = targets.filter(|(target, _)| place[target.leaf as usize] == side);
        let logits: Vec<f64> = own.map(|(_, row)| f64::from(row.mean_logit)).collect();
        Mean { name, sum: logits.iter().sum(), count: logits.len() as f64 }
    };
    sides.map(mean).filter(|mean| mean.count > 0.0).collect()
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

    fn reads_rows(&self) -> bool {
        self.weighting
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

    fn weigh(&self, forest: &Forest, reading: Reading<'_>, totals: &StepTotals) -> Result<Weighed> {
        let logps = reading.values;
        let read = self.read(forest, logps)?;
        let pair_weights = self.pair_weights(forest, reading);
        let (slopes, mut sums) = self.losses_of(&read.pairs, &pair_weights, totals);
        let per_token = if self.sft_weight > 0.0 {
            self.sft_weight / totals.counts[self.losses.len()]
        } else {
            0.0
        };
        let place = places(forest);
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
        let mut metrics = self.metrics(&read, totals);
        metrics.extend(mean_logits(forest, reading.rows));
        Ok(Weighed { d_values, sums, metrics })
    }
}
