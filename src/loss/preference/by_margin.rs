//! Pair losses that depend on a single margin, in the form in which a GPU computes their gradients between the head's
//! two passes ([`Pairs`]). The host computes loss values and metrics once the log-probabilities arrive.

use super::objective::is_first;
use super::{FDivergence, LossOptions, Preference, PreferenceLoss};
use crate::data::forest::Forest;
use crate::error::Result;
use crate::loss::StepTotals;
use crate::loss::ranking::Ranking;
use crate::ops::head::{self, MarginLoss, PairTerm, Pairs};

impl PreferenceLoss {
    /// The loss as a function of a pair's margin; `None` if it is not one.
    fn by_margin(self, options: &LossOptions) -> Option<PairTerm> {
        let LossOptions { beta, label_smoothing: epsilon, .. } = *options;
        if self.reads_divergence() && options.divergence != FDivergence::ReverseKl {
            return None;
        }
        let sigmoid = PairTerm {
            loss: MarginLoss::Sigmoid(epsilon),
            beta,
            offset: 0.0,
            referenced: self.needs_reference(),
            by_length: false,
            scale: 1.0,
        };
        // `robust` weighs the two labels by (1 − ε) and −ε, divided by their sum.
        let unbiased = MarginLoss::Sigmoid(-epsilon / (1.0 - 2.0 * epsilon));
        Some(match self {
            Self::Sigmoid | Self::Cpo => sigmoid,
            Self::SigmoidNorm => PairTerm { by_length: true, ..sigmoid },
            Self::Simpo => PairTerm { by_length: true, offset: options.simpo_gamma, ..sigmoid },
            Self::Hinge => PairTerm { loss: MarginLoss::Hinge, ..sigmoid },
            Self::Ipo => PairTerm { loss: MarginLoss::Ipo, by_length: true, ..sigmoid },
            Self::Robust => PairTerm { loss: unbiased, ..sigmoid },
            _ => return None,
        })
    }
}

impl Preference {
    /// See [`Objective::pairs`](crate::loss::Objective::pairs). `None` if a weight depends on the policy or the
    /// reference moves.
    pub(super) fn by_margin(&self, forest: &Forest, totals: &StepTotals) -> Result<Option<Pairs>> {
        if self.weighting || self.live.is_some() || self.ranking == Ranking::PlackettLuce {
            return Ok(None);
        }
        let terms = self.losses.iter().zip(&totals.counts).map(|((loss, weight), count)| {
            let term = loss.by_margin(&self.options)?;
            Some(PairTerm { scale: weight / count, ..term })
        });
        let Some(terms) = terms.collect() else { return Ok(None) };
        // References, lengths and indices do not depend on the policy.
        let read = self.read(forest, &vec![0.0; forest.targets.len()])?;
        let leaves = forest.leaves.len();
        let mut pairs = Pairs {
            sequences: forest.targets.iter().map(|target| target.leaf).collect(),
            weights: self.summing.weights(forest),
            addends: self.nll_slopes(forest, totals),
            references: vec![0.0; leaves],
            lengths: vec![1.0; leaves],
            pairs: Vec::with_capacity(read.pairs.len()),
            starts: head::starts(
                read.leaves.iter().map(|&(better, _)| forest.leaves[better].tree),
                forest.trees(),
            ),
            terms,
        };
        for (pair, &(better, worse)) in read.pairs.iter().zip(&read.leaves) {
            let (reference, length) = (pair.reference, pair.lengths);
            (pairs.references[better], pairs.references[worse]) =
                (reference.chosen, reference.rejected);
            (pairs.lengths[better], pairs.lengths[worse]) = (length.chosen, length.rejected);
            pairs.pairs.push([better as u32, worse as u32]);
        }
        Ok(Some(pairs))
    }

    /// Contribution of the best responses' negative log-likelihood to each target's gradient.
    fn nll_slopes(&self, forest: &Forest, totals: &StepTotals) -> Vec<f64> {
        let (best, per_token) = (is_first(forest), self.per_token(totals));
        let of_target = |leaf: u32| if best[leaf as usize] { -per_token } else { 0.0 };
        forest.targets.iter().map(|target| of_target(target.leaf)).collect()
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::data::tree::{Role, Tree};
    use crate::loss::Objective;
    use crate::loss::preference::Summing;

    /// Lists of two to four responses with formatting tokens, and policy and reference log-probabilities.
    fn case(seed: u64) -> (Forest, Vec<f32>, Preference) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut objective = Preference::default();
        let trees: Vec<Tree> = (0..rng.random_range(1..5))
            .map(|row| {
                let leaves = if seed.is_multiple_of(2) { 2 } else { rng.random_range(2..5) };
                let responses = (0..leaves).map(|leaf| {
                    let len = rng.random_range(1..9);
                    let mut roles = vec![Role::Content; len];
                    roles.push(Role::Format);
                    (vec![leaf; len + 1], roles)
                });
                let tree = Tree::siblings(vec![7; row + 1], responses.collect(), row);
                let reference = (0..leaves).map(|_| rng.random_range(-30.0..-5.0)).collect();
                objective.reference.insert(row, reference);
                tree
            })
            .collect();
        let forest = Forest::pack(&trees).unwrap();
        let logps = forest.targets.iter().map(|_| rng.random_range(-6.0..-0.1)).collect();
        (forest, logps, objective)
    }

    /// Gradients in the GPU's form equal those of the objective.
    #[track_caller]
    fn check(objective: &Preference, forest: &Forest, logps: &[f32]) {
        let counts = objective.counts(forest).into_iter().map(|count| count + 3.0).collect();
        let totals = StepTotals { counts, statistics: Vec::new() };
        let weighed = objective.weigh(forest, logps.into(), &totals).unwrap();
        let pairs = objective.pairs(forest, &totals).unwrap().unwrap();
        let found = pairs.slopes(logps);
        assert_eq!(found.len(), weighed.d_values.len());
        for (found, expected) in found.iter().zip(&weighed.d_values) {
            let bound = 1e-6 * expected.abs() + 1e-12;
            let losses = &objective.losses;
            assert!((found - expected).abs() <= bound, "{found}, expected {expected}: {losses:?}");
        }
    }

    #[test]
    fn slopes_by_margin_match_those_of_the_objective() {
        use PreferenceLoss::{Cpo, Hinge, Ipo, Robust, Sigmoid, SigmoidNorm, Simpo};
        for seed in 0..12 {
            let (forest, logps, base) = case(seed);
            for loss in [Sigmoid, SigmoidNorm, Hinge, Ipo, Robust, Cpo, Simpo] {
                for label_smoothing in [0.0, 0.2] {
                    let losses = vec![(loss, 0.7)];
                    let options = LossOptions { label_smoothing, beta: 0.3, ..base.options };
                    check(&Preference { losses, options, ..base.clone() }, &forest, &logps);
                }
            }
            // Several losses, the NLL term, formatting tokens and LD-DPO tails.
            let several = Preference {
                losses: vec![(Sigmoid, 1.0), (Ipo, 0.01), (Simpo, 0.5)],
                sft_weight: 0.2,
                summing: Summing { mask_formatting_tokens: true, ld_alpha: 0.4 },
                ..base.clone()
            };
            check(&several, &forest, &logps);
            // Tied ranks; the first row has no pair at all.
            let ranks = base.reference.iter().map(|(&row, leaves)| {
                let rank = |at: usize| if row == 0 { 0.0 } else { (at / 2) as f64 };
                (row, (0..leaves.len()).map(rank).collect())
            });
            let ranks = ranks.collect();
            check(&Preference { ranks, ranking: Ranking::Adjacent, ..base }, &forest, &logps);
        }
    }

    #[test]
    fn losses_not_determined_by_a_margin_are_weighed_on_the_host() {
        let (forest, _, base) = case(0);
        let pairs = |objective: &Preference| {
            let counts = objective.counts(&forest);
            objective.pairs(&forest, &StepTotals { counts, statistics: Vec::new() }).unwrap()
        };
        assert!(pairs(&base).is_some());
        let divergence = FDivergence::JsDivergence;
        for other in [
            Preference { weighting: true, ..base.clone() },
            Preference { ranking: Ranking::PlackettLuce, ..base.clone() },
            Preference { options: LossOptions { divergence, ..base.options }, ..base.clone() },
            Preference { losses: vec![(PreferenceLoss::Bco, 1.0)], ..base.clone() },
            Preference {
                losses: vec![(PreferenceLoss::Sigmoid, 1.0), (PreferenceLoss::NcaPair, 0.1)],
                ..base
            },
        ] {
            assert!(pairs(&other).is_none(), "{other:?}");
        }
    }
}
