//! Preference losses on the log-probabilities of a chosen and a rejected response.
//!
//! [`sigmoid`] is Direct Preference Optimization (Rafailov et al., 2023, equation 7). [`Dpo`] applies it in the form of
//! Llama 3 (section 4.1.4): formatting tokens are left out of both sides' log-probabilities, and the negative
//! log-likelihood of the chosen response, over all its tokens, is added with a small weight.

use std::collections::BTreeMap;

use super::{Mean, Objective, StepTotals, Weighed, log_sigmoid, sigmoid as logistic};
use crate::data::forest::Forest;
use crate::data::tree::Role;
use crate::error::{Error, Result};

/// Log-probabilities of both responses of a pair, each summed over its tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PairLogps {
    /// Of the preferred response.
    pub chosen: f64,
    /// Of the other.
    pub rejected: f64,
}

/// One pair's loss, its slopes, and its implicit rewards.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairLoss {
    /// Value.
    pub loss: f64,
    /// Slope with respect to the policy's chosen log-probability.
    pub d_chosen: f64,
    /// Slope with respect to the policy's rejected log-probability.
    pub d_rejected: f64,
    /// `β (log π − log π_ref)` of the chosen response.
    pub chosen_reward: f64,
    /// The same of the rejected response.
    pub rejected_reward: f64,
}

/// `−(1 − ε) ln σ(m) − ε ln σ(−m)` with `m = β (Δ_chosen − Δ_rejected)`, `Δ = log π − log π_ref`.
///
/// `ε = 0` is DPO; `ε > 0` is conservative DPO with label smoothing (Mitchell, 2023).
///
/// ```
/// use arriero::loss::preference::{PairLogps, sigmoid};
/// let start = PairLogps { chosen: -3.0, rejected: -5.0 };
/// let pair = sigmoid(start, start, 0.1, 0.0);
/// assert_eq!(pair.loss, std::f64::consts::LN_2);
/// assert_eq!((pair.d_chosen, pair.d_rejected), (-0.05, 0.05));
/// ```
pub fn sigmoid(
    policy: PairLogps,
    reference: PairLogps,
    beta: f64,
    label_smoothing: f64,
) -> PairLoss {
    let chosen_reward = beta * (policy.chosen - reference.chosen);
    let rejected_reward = beta * (policy.rejected - reference.rejected);
    let margin = chosen_reward - rejected_reward;
    let loss =
        -(1.0 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin);
    let slope =
        beta * (label_smoothing * logistic(margin) - (1.0 - label_smoothing) * logistic(-margin));
    PairLoss { loss, d_chosen: slope, d_rejected: -slope, chosen_reward, rejected_reward }
}

/// The preference objective: the chosen response is each tree's first leaf, the rejected one its second.
#[derive(Clone, Debug)]
pub struct Dpo {
    /// Strength of the tie to the reference.
    pub beta: f64,
    /// Share of labels taken to be wrong.
    pub label_smoothing: f64,
    /// Weight of the chosen response's negative log-likelihood; 0 turns it off.
    pub sft_weight: f64,
    /// Leave tokens that the template produced out of the preference term.
    pub mask_formatting_tokens: bool,
    /// The reference's log-probabilities, under the same mask, by the pair's row.
    pub reference: BTreeMap<usize, PairLogps>,
}

impl Dpo {
    /// Whether a target enters the preference term.
    fn counts_for_preference(&self, role: Role) -> bool {
        role == Role::Content || (role == Role::Format && !self.mask_formatting_tokens)
    }

    /// Log-probabilities of both sides of each pair of the forest, tree by tree.
    ///
    /// # Errors
    /// A tree that is not a pair.
    pub fn pair_logps(&self, forest: &Forest, logps: &[f32]) -> Result<Vec<PairLogps>> {
        let mut sums = vec![0.0; forest.leaves.len()];
        for (target, logp) in forest.targets.iter().zip(logps) {
            if self.counts_for_preference(target.role) {
                sums[target.leaf as usize] += f64::from(*logp);
            }
        }
        let pairs = forest.sources.iter().enumerate().map(|(tree, source)| {
            let mut leaves = (0..sums.len()).filter(|&leaf| forest.leaves[leaf].tree == tree);
            match (leaves.next(), leaves.next(), leaves.next()) {
                (Some(chosen), Some(rejected), None) => {
                    Ok(PairLogps { chosen: sums[chosen], rejected: sums[rejected] })
                }
                _ => Err(Error::run("expected a chosen and a rejected response")
                    .at(format!("row {source}"))),
            }
        });
        pairs.collect()
    }

    fn is_chosen(forest: &Forest) -> Vec<bool> {
        let mut seen = vec![false; forest.trees()];
        forest.leaves.iter().map(|leaf| !std::mem::replace(&mut seen[leaf.tree], true)).collect()
    }
}

impl Objective for Dpo {
    fn terms(&self) -> Vec<(&'static str, f64)> {
        vec![("sigmoid", 1.0), ("sft", self.sft_weight)]
    }

    fn counts(&self, forest: &Forest) -> Vec<f64> {
        let chosen = Self::is_chosen(forest);
        let chosen_tokens =
            forest.targets.iter().filter(|target| chosen[target.leaf as usize]).count();
        vec![forest.trees() as f64, chosen_tokens as f64]
    }

    fn weigh(&self, forest: &Forest, logps: &[f32], totals: &StepTotals) -> Result<Weighed> {
        let chosen = Self::is_chosen(forest);
        let policy = self.pair_logps(forest, logps)?;
        let mut losses = Vec::with_capacity(policy.len());
        for (source, policy) in forest.sources.iter().zip(&policy) {
            let reference = self.reference.get(source).ok_or_else(|| {
                Error::run("no reference log-probability was computed").at(format!("row {source}"))
            })?;
            losses.push(sigmoid(*policy, *reference, self.beta, self.label_smoothing));
        }
        let mut nll = 0.0;
        let d_values = forest.targets.iter().zip(logps).map(|(target, &logp)| {
            let leaf = target.leaf as usize;
            let pair = &losses[forest.leaves[leaf].tree];
            let slope = if chosen[leaf] { pair.d_chosen } else { pair.d_rejected };
            let mut d = if self.counts_for_preference(target.role) {
                slope / totals.counts[0]
            } else {
                0.0
            };
            if chosen[leaf] {
                nll -= f64::from(logp);
                d -= self.sft_weight / totals.counts[1];
            }
            d as f32
        });
        let d_values = d_values.collect();
        let sums = vec![losses.iter().map(|pair| pair.loss).sum(), nll];
        Ok(Weighed { d_values, sums, metrics: metrics(&losses, &policy) })
    }
}

/// TRL's names.
fn metrics(losses: &[PairLoss], policy: &[PairLogps]) -> Vec<Mean> {
    let count = losses.len() as f64;
    let mean = |name, value: &dyn Fn(&PairLoss) -> f64| Mean {
        name,
        sum: losses.iter().map(value).sum(),
        count,
    };
    vec![
        mean("rewards/chosen", &|pair| pair.chosen_reward),
        mean("rewards/rejected", &|pair| pair.rejected_reward),
        mean("rewards/margins", &|pair| pair.chosen_reward - pair.rejected_reward),
        mean("rewards/accuracies", &|pair| {
            f64::from(u8::from(pair.chosen_reward > pair.rejected_reward))
        }),
        Mean { name: "logps/chosen", sum: policy.iter().map(|pair| pair.chosen).sum(), count },
        Mean { name: "logps/rejected", sum: policy.iter().map(|pair| pair.rejected).sum(), count },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Against the textbook formula, and the slope against central differences.
    #[track_caller]
    fn check(policy: [f64; 2], reference: [f64; 2], beta: f64, smoothing: f64) {
        let logps = |[chosen, rejected]: [f64; 2]| PairLogps { chosen, rejected };
        let at = |chosen: f64, rejected: f64| {
            sigmoid(logps([chosen, rejected]), logps(reference), beta, smoothing)
        };
        let pair = at(policy[0], policy[1]);
        let margin = beta * ((policy[0] - policy[1]) - (reference[0] - reference[1]));
        let expected =
            (1.0 - smoothing) * (-margin).exp().ln_1p() + smoothing * margin.exp().ln_1p();
        assert!(
            (pair.loss - expected).abs() < 1e-12 * expected.max(1.0),
            "{} {expected}",
            pair.loss
        );
        let h = 1e-4;
        let chosen =
            (at(policy[0] + h, policy[1]).loss - at(policy[0] - h, policy[1]).loss) / (2.0 * h);
        let rejected =
            (at(policy[0], policy[1] + h).loss - at(policy[0], policy[1] - h).loss) / (2.0 * h);
        assert!((pair.d_chosen - chosen).abs() < 1e-7 && (pair.d_rejected - rejected).abs() < 1e-7);
    }

    #[test]
    fn an_untrained_policy_starts_at_ln_two_with_half_the_slope() {
        check([-3.0, -5.0], [-3.0, -5.0], 0.1, 0.0);
    }

    #[test]
    fn preferring_the_chosen_side_lowers_the_loss() {
        check([-1.0, -9.0], [-3.0, -5.0], 0.1, 0.0);
        check([-1.0, -9.0], [-3.0, -5.0], 0.5, 0.1);
    }

    #[test]
    fn a_hopeless_pair_stays_finite() {
        check([-900.0, 0.0], [0.0, 0.0], 0.1, 0.0);
        let far = sigmoid(
            PairLogps { chosen: -1e6, rejected: 0.0 },
            PairLogps { chosen: 0.0, rejected: 0.0 },
            1.0,
            0.0,
        );
        assert!((far.loss - 1e6).abs() < 1e-6 && (far.d_chosen + 1.0).abs() < 1e-12);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn only_differences_matter(shift in -50.0_f64..50.0, chosen in -90.0_f64..0.0, rejected in -90.0_f64..0.0) {
            let policy = PairLogps { chosen, rejected };
            let moved = PairLogps { chosen: chosen + shift, rejected: rejected + shift };
            let reference = PairLogps { chosen: -7.0, rejected: -4.0 };
            let (a, b) = (sigmoid(policy, reference, 0.1, 0.0).loss, sigmoid(moved, reference, 0.1, 0.0).loss);
            prop_assert!((a - b).abs() < 1e-12 * a.max(1.0));
        }
    }
}
