//! Preference losses over the pairs of a forest, or its ranked lists (DPO, appendix A.3), several at once, with the best
//! response's negative log-likelihood beside them.
//!
//! In the form of Llama 3 (section 4.1.4): `sigmoid`, formatting tokens left out of both sides' log-probabilities, and
//! 0.2 of the chosen response's negative log-likelihood over all its tokens.

use std::collections::BTreeMap;
use std::mem::replace;

use super::{LiveReference, LossOptions, Pair, PreferenceLoss, Response, Sides, Summing};
use crate::data::forest::Forest;
use crate::data::tree::Tree;
use crate::error::{Error, Result};
use crate::loss::ranking::{Ranking, plackett_luce};
use crate::loss::{Mean, Objective, Reading, StepTotals, Weighed, of_rows};
use crate::ops::head::{Pairs, RowStats};

/// The preference objective: each tree's leaves are ranked responses, best first, mostly a chosen and a rejected one. With
/// [`PreferenceLoss::Kto`] a tree has two, and further leaves are responses to other prompts.
#[derive(Clone, Debug)]
pub struct Preference {
    /// The losses, each with its weight; may be empty beside `sft_weight`.
    pub losses: Vec<(PreferenceLoss, f64)>,
    /// Their constants.
    pub options: LossOptions,
    /// What is compared of more than two responses. By pairs, losses are means over all pairs of the step; as
    /// Plackett-Luce lists, over its trees.
    pub ranking: Ranking,
    /// Weight of the best response's negative log-likelihood, a mean over the tokens of the step's best responses; 0 turns
    /// it off.
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
    /// The column `margin` by row, where a loss reads it: by how much each response is better than the next.
    pub margins: BTreeMap<usize, Vec<f64>>,
    /// The column `ranks` by row, best first, of those that have one: of equal ranks neither is better.
    pub ranks: BTreeMap<usize, Vec<f64>>,
}

impl Default for Preference {
    fn default() -> Self {
        Self {
            losses: vec![(PreferenceLoss::Sigmoid, 1.0)],
            options: LossOptions::default(),
            ranking: Ranking::default(),
            sft_weight: 0.0,
            summing: Summing::default(),
            weighting: false,
            reference: BTreeMap::new(),
            live: None,
            margins: BTreeMap::new(),
            ranks: BTreeMap::new(),
        }
    }
}

/// What one forest's log-probabilities say.
#[derive(Default)]
pub(super) struct Read {
    pub(super) pairs: Vec<Pair>,
    /// Leaves (better, worse) of each pair.
    pub(super) leaves: Vec<(usize, usize)>,
    /// Each tree's first leaf, and the log-ratios of its responses, best first.
    lists: Vec<(usize, Vec<f64>)>,
    /// Log-ratios of the responses to other prompts.
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

    /// Refuses a row's tree that no loss can be taken of: not two or more responses, one without a token that enters, two
    /// that are equal.
    ///
    /// # Errors
    /// Says which.
    pub fn check_tree(&self, tree: &Tree) -> Result<()> {
        let leaves = tree.leaves();
        check_leaves(leaves.len())?;
        if leaves.len() > 2
            && (self.has(PreferenceLoss::needs_mismatched) || self.summing.ld_alpha < 1.0)
        {
            return Err(Error::run(format!("{} ranked responses, expected two", leaves.len()))
                .hint("`kto` and `ld_alpha` know a chosen and a rejected one only"));
        }
        let lengths = self.summing.lengths(tree);
        if let Some(leaf) = lengths.iter().position(|&length| length == 0) {
            return Err(empty(leaf));
        }
        match tree.twins() {
            None => Ok(()),
            Some((one, other)) => Err(Error::run(match leaves.len() {
                2 => "chosen and rejected are the same tokens".to_owned(),
                _ => format!("responses {one} and {other} are the same tokens"),
            })
            .hint("such a pair teaches nothing; where only their ends differ, raise max_length")),
        }
    }

    /// How many pairs a forest has.
    fn pairs(&self, forest: &Forest) -> usize {
        let mut leaves = vec![0; forest.trees()];
        forest.leaves.iter().for_each(|leaf| leaves[leaf.tree] += 1);
        let two_at_most = self.has(PreferenceLoss::needs_mismatched);
        let ranked = |count: usize| if two_at_most { count.min(2) } else { count };
        // Where a list is refused, it is when it is read.
        let of_tree =
            |(count, &source)| self.compared(source, ranked(count)).map_or(0, |all| all.len());
        leaves.into_iter().zip(&forest.sources).map(of_tree).sum()
    }

    /// Places (better, worse) of what is compared of a row's ranked responses.
    fn compared(&self, source: usize, ranked: usize) -> Result<Vec<(usize, usize)>> {
        match self.ranks.get(&source) {
            Some(ranks) => self.ranking.pairs_of(&ranks[..ranked.min(ranks.len())]),
            None => Ok(self.ranking.pairs(ranked)),
        }
    }

    /// What the losses are told of each tree.
    pub(super) fn read(&self, forest: &Forest, logps: &[f32]) -> Result<Read> {
        let mut read = Read::default();
        let place = (self.summing, forest);
        let table = LiveReference::table(self.live.as_ref(), &self.reference, place)?;
        let mut first = 0;
        for (source, policy) in self.summing.trees(forest, logps) {
            self.read_tree((source, first), &policy, &table, &mut read)
                .map_err(|error| error.at(format!("row {source}")))?;
            first += policy.len();
        }
        Ok(read)
    }

    /// `first` is the tree's first leaf.
    fn read_tree(
        &self,
        (source, first): (usize, usize),
        policy: &[Response],
        table: &BTreeMap<usize, Vec<f64>>,
        read: &mut Read,
    ) -> Result<()> {
        check_leaves(policy.len())?;
        if let Some(leaf) = policy.iter().position(|response| response.length < 1.0) {
            return Err(empty(leaf));
        }
        let reference = self.reference_of(table, source, policy.len())?;
        let mismatches = self.has(PreferenceLoss::needs_mismatched);
        let ranked = if mismatches { 2 } else { policy.len() };
        let margins = self.margins_of(source, ranked)?;
        for (better, worse) in self.compared(source, ranked)? {
            let margin = margins[better..worse].iter().sum();
            read.pairs.push(pair((better, worse), policy, &reference, margin));
            read.leaves.push((first + better, first + worse));
        }
        let ratios = policy.iter().zip(&reference);
        let mut ratios: Vec<f64> =
            ratios.map(|(policy, reference)| policy.logp - reference).collect();
        read.mismatched.extend(ratios.drain(ranked..));
        read.lists.push((first, ratios));
        Ok(())
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

    fn margins_of(&self, source: usize, responses: usize) -> Result<Vec<f64>> {
        if !self.has(PreferenceLoss::needs_margin) {
            return Ok(vec![0.0; responses - 1]);
        }
        let margins = self.margins.get(&source).filter(|margins| margins.len() + 1 == responses);
        margins.cloned().ok_or_else(without_margin)
    }

    /// Refuses a row without the margins that a loss asks for.
    ///
    /// # Errors
    /// Where there is not one fewer than responses.
    pub fn check_margins(&self, margins: &[f64], tree: &Tree) -> Result<()> {
        if self.has(PreferenceLoss::needs_margin) && margins.len() + 1 != tree.leaves().len() {
            return Err(without_margin());
        }
        Ok(())
    }

    /// Of each leaf, the length-normalised alignment whose sum over a pair is the logarithm of the pair's weight; nothing
    /// where pairs are not weighted. See [`Preference::weighting`].
    fn alignments(&self, forest: &Forest, reading: Reading<'_>) -> Vec<f64> {
        if !self.weighting {
            return Vec::new();
        }
        let alignment = |(logp, row): (&f32, &RowStats)| logp - row.log_sum_squares;
        let aligned: Vec<f32> = reading.values.iter().zip(reading.rows).map(alignment).collect();
        let summing = Summing { ld_alpha: 1.0, ..self.summing };
        let trees = summing.trees(forest, &aligned).into_iter();
        trees.flat_map(|(_, responses)| responses).map(|one| one.logp / one.length).collect()
    }

    /// The slope of each leaf's log-probability, with weights and counts, and each loss's plain sum.
    fn losses_of(
        &self,
        (read, alignments): (&Read, &[f64]),
        leaves: usize,
        totals: &StepTotals,
    ) -> (Vec<f64>, Vec<f64>) {
        let mut slopes = vec![0.0; leaves];
        let pair_weight = |better: usize, worse: usize| match alignments {
            [] => 1.0,
            all => (all[better] + all[worse]).exp(),
        };
        let mut sums = Vec::with_capacity(self.losses.len() + 1);
        let shares = self.shares(totals);
        for (((loss, weight), count), own) in self.losses.iter().zip(&totals.counts).zip(shares) {
            let mut sum = 0.0;
            if self.ranking == Ranking::PlackettLuce {
                for (first, ratios) in &read.lists {
                    let beta = self.options.beta;
                    let rewards: Vec<f64> = ratios.iter().map(|ratio| beta * ratio).collect();
                    let (value, by_reward) = plackett_luce(&rewards);
                    sum += value;
                    for (total, slope) in slopes[*first..].iter_mut().zip(by_reward) {
                        *total += weight * beta * slope / count;
                    }
                }
            } else {
                for (pair, &(better, worse)) in read.pairs.iter().zip(&read.leaves) {
                    let one = loss.of_pair(pair, own, &self.options);
                    let pair_weight = pair_weight(better, worse);
                    sum += pair_weight * one.loss;
                    slopes[better] += weight * pair_weight * one.d_chosen / count;
                    slopes[worse] += weight * pair_weight * one.d_rejected / count;
                }
            }
            sums.push(sum);
        }
        (slopes, sums)
    }

    /// What a token of a best response weighs in the loss beside the pairs.
    pub(super) fn per_token(&self, totals: &StepTotals) -> f64 {
        if self.sft_weight > 0.0 { self.sft_weight / totals.counts[self.losses.len()] } else { 0.0 }
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

fn check_leaves(leaves: usize) -> Result<()> {
    if leaves >= 2 {
        return Ok(());
    }
    Err(Error::run(format!("{leaves} response, expected two or more, best first")))
}

/// The pair of two places of a list.
fn pair(
    (better, worse): (usize, usize),
    policy: &[Response],
    reference: &[f64],
    margin: f64,
) -> Pair {
    let (chosen, rejected) = (policy[better], policy[worse]);
    Pair {
        policy: Sides { chosen: chosen.logp, rejected: rejected.logp },
        reference: Sides { chosen: reference[better], rejected: reference[worse] },
        lengths: Sides { chosen: chosen.length, rejected: rejected.length },
        margin,
    }
}

fn without_margin() -> Error {
    Error::run("the row has no `margin`")
        .hint("rpo needs it: by how much the chosen response's reward is higher")
}

/// A response without a token to sum.
pub(super) fn empty(leaf: usize) -> Error {
    let side = match leaf {
        0 => "the first response",
        1 => "the second response",
        _ => "a further response",
    };
    Error::run(format!("{side} has no token that enters the loss")).hint(
        "an empty response has formatting tokens only, which mask_formatting_tokens leaves out",
    )
}

/// Of each leaf: 0 where it is better than another and worse than none, 1 the other way, 2 for the rest.
fn sides(leaves: usize, pairs: &[(usize, usize)]) -> Vec<usize> {
    let (mut better, mut worse) = (vec![false; leaves], vec![false; leaves]);
    for &(chosen, rejected) in pairs {
        (better[chosen], worse[rejected]) = (true, true);
    }
    let side = |(better, worse)| match (better, worse) {
        (true, false) => 0,
        (false, true) => 1,
        _ => 2,
    };
    better.into_iter().zip(worse).map(side).collect()
}

/// Mean logit over the vocabulary and each side's trained tokens, where rows were read. `sides` says of each leaf: 0 chosen, 1
/// rejected, more for neither.
pub(super) fn mean_logits(forest: &Forest, sides: &[usize], rows: &[RowStats]) -> Vec<Mean> {
    let names = ["logits/chosen", "logits/rejected"].into_iter().enumerate();
    let mean = |(side, name): (usize, &'static str)| {
        let targets = forest.targets.iter().zip(rows);
        let own = targets.filter(|(target, _)| sides[target.leaf as usize] == side);
        let logits: Vec<f64> = own.map(|(_, row)| f64::from(row.mean_logit)).collect();
        Mean { name, sum: logits.iter().sum(), count: logits.len() as f64 }
    };
    names.map(mean).filter(|mean| mean.count > 0.0).collect()
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
        let counted = match self.ranking {
            Ranking::PlackettLuce => forest.trees(),
            _ => self.pairs(forest),
        };
        let mut counts = vec![counted as f64; self.losses.len()];
        counts.push(tokens as f64);
        counts
    }

    fn reads_rows(&self) -> bool {
        self.weighting
    }

    fn pairs(&self, forest: &Forest, totals: &StepTotals) -> Result<Option<Pairs>> {
        self.by_margin(forest, totals)
    }

    fn of_forest(&self, forest: &Forest) -> Result<Box<dyn Objective>> {
        let place = (self.summing, forest);
        let reference = LiveReference::of_forest(self.live.as_ref(), &self.reference, place)?;
        Ok(Box::new(Self {
            losses: self.losses.clone(),
            reference,
            live: None,
            margins: of_rows(&self.margins, forest),
            ranks: of_rows(&self.ranks, forest),
            ..*self
        }))
    }

    fn coupled(&self) -> bool {
        self.has(PreferenceLoss::coupled)
    }

    fn answers(&self, forest: &Forest) -> Option<Vec<bool>> {
        // Two are the pair's.
        let second = |leaf: usize, first: &[bool]| first[leaf] || leaf > 0 && first[leaf - 1];
        self.has(PreferenceLoss::needs_mismatched).then(|| {
            let first = is_first(forest);
            (0..first.len()).map(|leaf| second(leaf, &first)).collect()
        })
    }

    fn statistics(&self, readings: &[(&Forest, &[f32])]) -> Result<Vec<f64>> {
        let mut all = Read::default();
        for (forest, logps) in readings {
            let read = self.read(forest, logps)?;
            all.pairs.extend(read.pairs);
            all.mismatched.extend(read.mismatched);
        }
        let statistic = |(loss, _): &(PreferenceLoss, f64)| {
            loss.statistics(&all.pairs, &all.mismatched, &self.options)
        };
        Ok(self.losses.iter().flat_map(statistic).collect())
    }

    fn weigh(&self, forest: &Forest, reading: Reading<'_>, totals: &StepTotals) -> Result<Weighed> {
        let logps = reading.values;
        let read = self.read(forest, logps)?;
        let alignments = self.alignments(forest, reading);
        let (slopes, mut sums) = self.losses_of((&read, &alignments), forest.leaves.len(), totals);
        let per_token = self.per_token(totals);
        let best = is_first(forest);
        let mut nll = 0.0;
        let weights = self.summing.weights(forest);
        let d_values =
            forest.targets.iter().zip(logps).zip(weights).map(|((target, &logp), weight)| {
                let leaf = target.leaf as usize;
                let preference = weight * slopes[leaf];
                if !best[leaf] {
                    return preference as f32;
                }
                nll -= f64::from(logp);
                (preference - per_token) as f32
            });
        let d_values = d_values.collect();
        sums.push(nll);
        let mut metrics = self.metrics(&read, totals);
        let sides = sides(forest.leaves.len(), &read.leaves);
        metrics.extend(mean_logits(forest, &sides, reading.rows));
        Ok(Weighed { d_values, sums, metrics })
    }
}
