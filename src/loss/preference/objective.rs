//! Preference objective over the pairs or ranked lists (DPO, appendix A.3) of a forest: any number of losses, plus an
//! optional negative log-likelihood of the best response.
//!
//! Llama 3's recipe (section 4.1.4): `sigmoid` with formatting tokens masked on both sides, plus 0.2 of the chosen
//! response's negative log-likelihood over all its tokens.

use std::collections::BTreeMap;
use std::mem::replace;

use super::{LiveReference, LossOptions, Pair, PreferenceLoss, Response, Sides, Summing};
use crate::data::forest::Forest;
use crate::data::tree::Tree;
use crate::error::{Error, Result};
use crate::loss::ranking::{Ranking, plackett_luce};
use crate::loss::{Mean, Objective, Reading, StepTotals, Weighed, of_rows};
use crate::ops::head::{Detail, Pairs, RowStats};

/// The preference objective. A tree's leaves are ranked responses, best first, usually one chosen and one rejected.
/// With [`PreferenceLoss::Kto`] the first two are the pair and further leaves are responses to other prompts.
#[derive(Clone, Debug)]
pub struct Preference {
    /// Losses and their weights; may be empty if `sft_weight` is set.
    pub losses: Vec<(PreferenceLoss, f64)>,
    /// Constants of the losses.
    pub options: LossOptions,
    /// How more than two responses are compared. Pairwise losses are means over the step's pairs, Plackett-Luce over
    /// its trees.
    pub ranking: Ranking,
    /// Weight of the best responses' negative log-likelihood, a mean over their tokens in the step; 0 disables it.
    pub sft_weight: f64,
    /// Which tokens enter the preference losses.
    pub summing: Summing,
    /// Weight each pair by the policy's own likelihood of it (`use_weighting`; WPO, Zhou et al., 2024, equation 2):
    /// `exp` of the mean of `ln p − ln Σp²` over each response's tokens, held constant.
    pub weighting: bool,
    /// Reference log-probability of each leaf, under the same mask, by row. Empty if no loss needs one.
    pub reference: BTreeMap<usize, Vec<f64>>,
    /// A moving reference; overrides `reference` if set.
    pub live: Option<LiveReference>,
    /// Column `margin` by row, if a loss reads it: how much each response is better than the next.
    pub margins: BTreeMap<usize, Vec<f64>>,
    /// Column `ranks` by row, best first, if present; tied responses are not compared.
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

/// Loss inputs read from one forest's log-probabilities.
#[derive(Default)]
pub(super) struct Read {
    pub(super) pairs: Vec<Pair>,
    /// Leaves (better, worse) of each pair.
    pub(super) leaves: Vec<(usize, usize)>,
    /// Each tree's first leaf, and its responses' log-ratios, best first.
    lists: Vec<(usize, Vec<f64>)>,
    /// Log-ratios of responses to other prompts.
    mismatched: Vec<f64>,
}

impl Preference {
    /// Whether a loss with non-zero weight reads the reference.
    pub fn needs_reference(&self) -> bool {
        self.has(PreferenceLoss::needs_reference)
    }

    fn has(&self, property: fn(PreferenceLoss) -> bool) -> bool {
        self.losses.iter().any(|(loss, _)| property(*loss))
    }

    /// Rejects a row's tree that has no valid loss: fewer than two responses, a response without a contributing token,
    /// or two identical responses.
    ///
    /// # Errors
    /// Names the problem.
    pub fn check_tree(&self, tree: &Tree) -> Result<()> {
        let leaves = tree.leaves();
        check_leaves(leaves.len())?;
        if leaves.len() > 2
            && (self.has(PreferenceLoss::needs_mismatched) || self.summing.ld_alpha < 1.0)
        {
            return Err(Error::run(format!("{} ranked responses, expected two", leaves.len()))
                .hint("`kto` and `ld_alpha` support pairs only"));
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

    /// Number of pairs in a forest.
    fn pairs(&self, forest: &Forest) -> usize {
        let mut leaves = vec![0; forest.trees()];
        forest.leaves.iter().for_each(|leaf| leaves[leaf.tree] += 1);
        let two_at_most = self.has(PreferenceLoss::needs_mismatched);
        let ranked = |count: usize| if two_at_most { count.min(2) } else { count };
        // An invalid list is reported when it is read.
        let of_tree =
            |(count, &source)| self.compared(source, ranked(count)).map_or(0, |all| all.len());
        leaves.into_iter().zip(&forest.sources).map(of_tree).sum()
    }

    /// Index pairs (better, worse) among a row's ranked responses.
    fn compared(&self, source: usize, ranked: usize) -> Result<Vec<(usize, usize)>> {
        match self.ranks.get(&source) {
            Some(ranks) => self.ranking.pairs_of(&ranks[..ranked.min(ranks.len())]),
            None => Ok(self.ranking.pairs(ranked)),
        }
    }

    /// Loss inputs of each tree. `logps`: one per target.
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

    /// Reads one tree; `first` is its first leaf.
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

    /// Rejects a row that lacks margins a loss needs.
    ///
    /// # Errors
    /// The row does not have exactly one margin fewer than responses.
    pub fn check_margins(&self, margins: &[f64], tree: &Tree) -> Result<()> {
        if self.has(PreferenceLoss::needs_margin) && margins.len() + 1 != tree.leaves().len() {
            return Err(without_margin());
        }
        Ok(())
    }

    /// Length-normalised alignment of each leaf; a pair's log-weight is the sum over its two leaves. Empty if pairs are
    /// not weighted. See [`Preference::weighting`].
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

    /// Gradient with respect to each leaf's log-probability (weights and counts applied), and each loss's unweighted
    /// sum.
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

    /// Weight of one best-response token in the negative log-likelihood term.
    pub(super) fn per_token(&self, totals: &StepTotals) -> f64 {
        if self.sft_weight > 0.0 { self.sft_weight / totals.counts[self.losses.len()] } else { 0.0 }
    }

    /// Each loss's slice of the step's statistics.
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

    /// TRL's names. Without a reference, rewards are `β log π`. `kl/chosen` is the mean of `ln π − ln π_ref` over
    /// chosen tokens: the k1 estimator of KL(π ‖ π_ref) on tokens not sampled from π, so it can be negative.
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

/// The pair at two indices of a list.
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

/// Error for a response without a contributing token.
pub(super) fn empty(leaf: usize) -> Error {
    let side = match leaf {
        0 => "the first response",
        1 => "the second response",
        _ => "a further response",
    };
    Error::run(format!("{side} has no token in the loss")).hint(
        "an empty response has formatting tokens only, which mask_formatting_tokens leaves out",
    )
}

/// Side of each leaf: 0 if it only wins, 1 if it only loses, 2 otherwise.
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

/// Mean logit over the vocabulary and each side's trained tokens, if row statistics were read. `sides` gives each
/// leaf's side: 0 chosen, 1 rejected, larger for neither.
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

/// Whether each leaf is the first of its tree.
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

    fn detail(&self) -> Detail {
        if self.weighting { Detail::Rows } else { Detail::Targets }
    }

    fn pairs(&self, forest: &Forest, totals: &StepTotals) -> Result<Option<Pairs>> {
        self.by_margin(forest, totals)
    }

    fn for_forest(&self, forest: &Forest) -> Result<Box<dyn Objective>> {
        let place = (self.summing, forest);
        let reference = LiveReference::for_forest(self.live.as_ref(), &self.reference, place)?;
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
        // The first two leaves of a tree form the pair.
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
