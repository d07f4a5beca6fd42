//! Supervised fine-tuning: cross-entropy on trained tokens, averaged over the tokens of the whole step
//! (Llama 3, section 4.1.3), or another loss, normalisation and weight of rows by name.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::anchor::LiveAnchor;
use super::{FixedGradient, Mean, Objective, Reading, StepTotals, Weighed, of_rows};
use crate::data::forest::Forest;
use crate::error::{Error, Result};
use crate::ops::head::{Anchor, Detail, RowStats, TOP};

/// What a trained token costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenLoss {
    /// `−ln p`.
    #[default]
    #[serde(alias = "cross_entropy", alias = "chunked_nll")]
    Nll,
    /// `−p ln p` with `p` held constant: Dynamic Fine-Tuning (Wu et al., 2025, equation 9). Tokens that the model
    /// finds unlikely pull less.
    Dft,
    /// [`Dft`](Self::Dft), plus `α` times the divergence of the policy from the initial one, `KL(π_ref‖π)` over the
    /// vocabulary: Anchored Supervised Fine-Tuning (Zhu et al., 2025), which keeps DFT from drifting. The direction is that of
    /// the authors' code; the paper's text has the other.
    Asft,
    /// `−(H / ln K)^α ln p`, the factor held constant: Entropy-Adaptive Fine-Tuning (Diao et al., 2026), where `H` is the
    /// entropy among the `K` = [`TOP`] likeliest tokens. What the model is sure of pulls less, be it right or wrong.
    Eaft,
}

/// What a step's sum of token losses is divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalization {
    /// The step's trained tokens: each token weighs the same.
    #[default]
    Token,
    /// Each row's trained tokens, then the step's rows: each row weighs the same, however long.
    Row,
    /// The step's rows alone: token losses are summed, as in Tulu 3, and a step's scale does not depend on its lengths
    /// or on how many rows it has.
    Step,
}

impl TokenLoss {
    /// Its name in recipes and in logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nll => "nll",
            Self::Dft => "dft",
            Self::Asft => "asft",
            Self::Eaft => "eaft",
        }
    }
}

/// The objective. By default the mean negative log-likelihood of the trained tokens.
#[derive(Clone, Debug)]
pub struct Sft {
    /// What a token costs.
    pub loss: TokenLoss,
    /// EAFT's `α`, 0 or more; with 0 all tokens weigh the same.
    pub eaft_alpha: f64,
    /// ASFT's `α`, 0 or more; with 0 it is DFT.
    pub asft_alpha: f64,
    /// ASFT's reference.
    pub reference: Option<LiveAnchor>,
    /// What the sum is divided by.
    pub normalization: Normalization,
    /// Weights of rows, 0 or more; a row that is not listed weighs 1.
    pub row_weights: BTreeMap<usize, f64>,
    /// Share `ε` of each token's probability that is spread evenly over the vocabulary: a token costs
    /// `(1 − ε)(−ln p) + ε mean_v(−ln p(v))`, as `torch.nn.functional.cross_entropy` has it (Szegedy et al., 2016).
    pub label_smoothing: f64,
    /// `c` of the z-loss `c (ln Σ e^x)²` a token, which keeps logits from drifting (PaLM, Chowdhery et al., 2022,
    /// section 5).
    pub z_loss_coefficient: f64,
}

impl Default for Sft {
    fn default() -> Self {
        Self {
            loss: TokenLoss::Nll,
            eaft_alpha: 1.0,
            asft_alpha: 0.1,
            reference: None,
            normalization: Normalization::Token,
            row_weights: BTreeMap::new(),
            label_smoothing: 0.0,
            z_loss_coefficient: 0.0,
        }
    }
}

impl Sft {
    /// The factor of a token's `−ln p`, held constant: the token costs the product, and its slope is the negated factor.
    /// `top_entropy` is [`RowStats::top_entropy`](crate::ops::head::RowStats::top_entropy) of its row, read by EAFT only.
    ///
    /// ```
    /// use arriero::loss::sft::{Sft, TokenLoss};
    /// let dft = Sft { loss: TokenLoss::Dft, ..Sft::default() };
    /// assert!((dft.factor(0.25_f64.ln(), 0.0) - 0.25).abs() < 1e-12);
    /// ```
    pub fn factor(&self, logp: f64, top_entropy: f64) -> f64 {
        match self.loss {
            TokenLoss::Nll => 1.0,
            TokenLoss::Dft | TokenLoss::Asft => logp.exp(),
            // Rounding may leave slightly less than 0, which has no powers.
            TokenLoss::Eaft => (top_entropy.max(0.0) / (TOP as f64).ln()).powf(self.eaft_alpha),
        }
    }

    /// Refuses constants that it cannot be taken with.
    ///
    /// # Errors
    /// Names the key, its value and what was expected.
    pub fn check(&self) -> Result<()> {
        let refuse = |key: &str, value: f64, expected: &str| {
            Err(Error::usage(format!("`{key}` is {value}, expected {expected}")))
        };
        let Self { label_smoothing, z_loss_coefficient, .. } = *self;
        if !(0.0..1.0).contains(&label_smoothing) {
            return refuse("label_smoothing", label_smoothing, "0 or more and less than 1");
        }
        if !z_loss_coefficient.is_finite() || z_loss_coefficient < 0.0 {
            return refuse("z_loss_coefficient", z_loss_coefficient, "0 or more");
        }
        for (key, value) in
            [("label_smoothing", label_smoothing), ("z_loss_coefficient", z_loss_coefficient)]
        {
            if value > 0.0 && self.loss != TokenLoss::Nll {
                let expected = format!("0 with `loss_type` \"{}\"", self.loss.name());
                return refuse(key, value, &expected);
            }
        }
        let default = Self::default();
        for (key, value, default, reader) in [
            ("eaft_alpha", self.eaft_alpha, default.eaft_alpha, TokenLoss::Eaft),
            ("asft_alpha", self.asft_alpha, default.asft_alpha, TokenLoss::Asft),
        ] {
            if !value.is_finite() || value < 0.0 {
                return refuse(key, value, "0 or more");
            }
            if ![default].contains(&value) && self.loss != reader {
                let (loss, reader) = (self.loss.name(), reader.name());
                let expected =
                    format!("{default} with `loss_type` \"{loss}\": only \"{reader}\" reads it");
                return refuse(key, value, &expected);
            }
        }
        Ok(())
    }

    /// Whether it compares the policy with a frozen one.
    pub fn needs_reference(&self) -> bool {
        self.loss == TokenLoss::Asft && self.asft_alpha > 0.0
    }

    fn weight_of(&self, forest: &Forest, leaf: usize) -> f64 {
        let row = forest.sources[forest.leaves[leaf].tree];
        self.row_weights.get(&row).copied().unwrap_or(1.0)
    }

    /// How much a token weighs within its row: what its message says.
    fn of_token(forest: &Forest, target: usize) -> f64 {
        forest.weights.get(target).map_or(1.0, |weight| f64::from(*weight))
    }

    /// Trained tokens of each sequence, each counted as much as it weighs.
    fn lengths(forest: &Forest) -> Vec<f64> {
        let mut lengths = vec![0.0; forest.leaves.len()];
        for (at, target) in forest.targets.iter().enumerate() {
            lengths[target.leaf as usize] += Self::of_token(forest, at);
        }
        lengths
    }

    /// Weight of each target in the step's sum.
    fn weights(&self, forest: &Forest) -> Vec<f64> {
        let lengths = Self::lengths(forest);
        let weight = |leaf: usize| match self.normalization {
            Normalization::Token | Normalization::Step => self.weight_of(forest, leaf),
            Normalization::Row => self.weight_of(forest, leaf) / lengths[leaf],
        };
        let targets = forest.targets.iter().enumerate();
        targets
            .map(|(at, target)| Self::of_token(forest, at) * weight(target.leaf as usize))
            .collect()
    }

    /// What whole rows of probabilities cost beside the tokens themselves: the terms of label smoothing, of the z-loss and of
    /// ASFT's divergence.
    fn row_terms(&self) -> Vec<RowTerm> {
        let apart = if self.loss == TokenLoss::Asft { self.asft_alpha } else { 0.0 };
        let all = [
            RowTerm {
                name: "uniform",
                weight: self.label_smoothing,
                of: |row| f64::from(row.log_sum_exp) - f64::from(row.mean_logit),
            },
            RowTerm {
                name: "z_loss",
                weight: self.z_loss_coefficient,
                of: |row| f64::from(row.log_sum_exp).powi(2),
            },
            RowTerm { name: "kl", weight: apart, of: |row| f64::from(row.divergence) },
        ];
        all.into_iter().filter(|term| term.weight > 0.0).collect()
    }
}

/// What the rows of trained tokens cost.
struct RowTerm {
    name: &'static str,
    weight: f64,
    /// The cost of one row.
    of: fn(&RowStats) -> f64,
}

impl Objective for Sft {
    fn terms(&self) -> Vec<(&'static str, f64)> {
        let own = match self.loss {
            TokenLoss::Asft => TokenLoss::Dft,
            loss => loss,
        };
        let of_rows = self.row_terms().into_iter().map(|term| (term.name, term.weight));
        [(own.name(), 1.0 - self.label_smoothing)].into_iter().chain(of_rows).collect()
    }

    fn counts(&self, forest: &Forest) -> Vec<f64> {
        let count = Self::lengths(forest).into_iter().enumerate().map(|(leaf, length)| {
            let weight = self.weight_of(forest, leaf);
            match self.normalization {
                Normalization::Token => weight * length,
                Normalization::Row | Normalization::Step => {
                    weight * f64::from(u8::from(length > 0.0))
                }
            }
        });
        vec![count.sum(); 1 + self.row_terms().len()]
    }

    fn detail(&self) -> Detail {
        match self.loss {
            TokenLoss::Eaft => Detail::Top,
            _ if self.row_terms().is_empty() => Detail::Targets,
            _ => Detail::Rows,
        }
    }

    fn for_forest(&self, forest: &Forest) -> Result<Box<dyn Objective>> {
        let row_weights = of_rows(&self.row_weights, forest);
        Ok(Box::new(Self { row_weights, reference: None, ..*self }))
    }

    fn anchor(&self, forest: &Forest, totals: Option<&StepTotals>) -> Result<Option<Anchor>> {
        if !self.needs_reference() {
            return Ok(None);
        }
        let reference = self.reference.as_ref().ok_or_else(|| {
            Error::usage("`asft` has no reference to stay close to, expected the initial policy")
        })?;
        let slopes = totals.map_or_else(Vec::new, |totals| {
            let weights = self.weights(forest).into_iter();
            weights.map(|weight| (self.asft_alpha * weight / totals.counts[0]) as f32).collect()
        });
        reference.of(forest, slopes).map(Some)
    }

    fn bytes(&self) -> u64 {
        self.reference.as_ref().map_or(0, LiveAnchor::bytes)
    }

    fn fixed_gradient(&self, forest: &Forest, totals: &StepTotals) -> Option<FixedGradient> {
        if self.loss != TokenLoss::Nll {
            return None;
        }
        let own = 1.0 - self.label_smoothing;
        let weights = self.weights(forest).into_iter();
        Some(FixedGradient {
            d_logps: weights.map(|weight| (-own * weight / totals.counts[0]) as f32).collect(),
            mean_logp: (self.label_smoothing / own) as f32,
            squared_lse: (-self.z_loss_coefficient / own) as f32,
        })
    }

    fn weigh(&self, forest: &Forest, reading: Reading<'_>, totals: &StepTotals) -> Result<Weighed> {
        let weights = self.weights(forest);
        let own = 1.0 - self.label_smoothing;
        let mut sums = vec![0.0];
        let mut d_values = Vec::with_capacity(weights.len());
        for (at, (weight, &logp)) in weights.iter().zip(reading.values).enumerate() {
            let entropy = match self.loss {
                TokenLoss::Eaft => f64::from(reading.rows[at].top_entropy),
                TokenLoss::Nll | TokenLoss::Dft | TokenLoss::Asft => 0.0,
            };
            let factor = weight * self.factor(f64::from(logp), entropy);
            sums[0] += factor * -f64::from(logp);
            d_values.push((-own * factor / totals.counts[0]) as f32);
        }
        for term in self.row_terms() {
            let of_rows = weights.iter().zip(reading.rows);
            sums.push(of_rows.map(|(weight, row)| weight * (term.of)(row)).sum());
        }
        let trained = reading.values.len() as f64;
        Ok(Weighed {
            d_values,
            sums,
            metrics: vec![Mean { name: "trained_tokens", sum: trained, count: 0.0 }],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tree::{Role, Tree};
    use crate::ops::head::RowStats;

    /// Rows of 1 and 3 trained tokens.
    fn forest() -> (Forest, [f32; 4]) {
        let row = |len: usize, source| {
            let roles = [vec![Role::Context; 2], vec![Role::Content; len]].concat();
            Tree::sequence(vec![5; len + 2], roles, source)
        };
        (Forest::pack(&[row(1, 0), row(3, 1)]).unwrap(), [-1.0, -2.0, -0.5, -0.25])
    }

    /// Sum over count, and the gradient.
    fn of(objective: &Sft) -> (f64, Vec<f32>) {
        let (forest, logps) = forest();
        let totals = StepTotals { counts: objective.counts(&forest), statistics: Vec::new() };
        let weighed = objective.weigh(&forest, logps.as_slice().into(), &totals).unwrap();
        if let Some(fixed) = objective.fixed_gradient(&forest, &totals) {
            assert_eq!(fixed.d_logps, weighed.d_values);
        }
        (weighed.sums[0] / totals.counts[0], weighed.d_values)
    }

    #[track_caller]
    fn check(objective: &Sft, loss: f64, gradient: [f32; 4]) {
        let (value, slopes) = of(objective);
        assert!((value - loss).abs() < 1e-12, "{value}, expected {loss}");
        for (slope, expected) in slopes.iter().zip(gradient) {
            assert!((slope - expected).abs() < 1e-6, "{slopes:?}, expected {gradient:?}");
        }
    }

    /// Rows cost 1 over 1 token and 2.75 over 3.
    #[test]
    fn loss_sum_is_divided_by_tokens_rows_or_steps() {
        let with = |normalization| Sft { normalization, ..Sft::default() };
        check(&with(Normalization::Token), 3.75 / 4.0, [-0.25; 4]);
        let third = -1.0 / 6.0;
        check(
            &with(Normalization::Row),
            f64::midpoint(1.0, 2.75 / 3.0),
            [-0.5, third, third, third],
        );
        check(&with(Normalization::Step), 3.75 / 2.0, [-0.5; 4]);
    }

    #[test]
    fn row_weight_scales_the_row_and_zero_removes_it() {
        let with = |normalization, weight| Sft {
            normalization,
            row_weights: [(0, weight)].into(),
            ..Sft::default()
        };
        let sixth = -1.0 / 6.0;
        check(&with(Normalization::Token, 3.0), 5.75 / 6.0, [-0.5, sixth, sixth, sixth]);
        let row = (3.0 + 2.75 / 3.0) / 4.0;
        check(&with(Normalization::Row, 3.0), row, [-0.75, sixth / 2.0, sixth / 2.0, sixth / 2.0]);
        let third = -1.0 / 3.0;
        check(&with(Normalization::Token, 0.0), 2.75 / 3.0, [0.0, third, third, third]);
    }

    #[test]
    fn message_weights_apply_to_tokens_within_their_row() {
        let (mut forest, logps) = forest();
        // Tokens cost 1 | 2, 0.5, 0.25.
        forest.weights = vec![1.0, 0.5, 0.0, 2.0];
        for (normalization, loss) in [
            (Normalization::Token, (1.0 + 1.0 + 0.5) / 3.5),
            (Normalization::Row, f64::midpoint(1.0, 1.5 / 2.5)),
            (Normalization::Step, 2.5 / 2.0),
        ] {
            let objective = Sft { normalization, ..Sft::default() };
            let counts = objective.counts(&forest);
            let totals = StepTotals { counts, statistics: Vec::new() };
            let weighed = objective.weigh(&forest, logps.as_slice().into(), &totals).unwrap();
            let value = weighed.sums[0] / totals.counts[0];
            assert!((value - loss).abs() < 1e-12, "{normalization:?}: {value}, expected {loss}");
            let moved: f32 = weighed.d_values.iter().zip(logps).map(|(d, logp)| d * logp).sum();
            assert!((f64::from(moved) - loss).abs() < 1e-6, "{normalization:?}: slopes of {moved}");
        }
    }

    #[test]
    fn invalid_loss_constants_are_refused() {
        let refused = |sft: Sft| sft.check().unwrap_err().to_string();
        assert_eq!(
            refused(Sft { label_smoothing: 1.0, ..Sft::default() }),
            "`label_smoothing` is 1, expected 0 or more and less than 1"
        );
        assert_eq!(
            refused(Sft { z_loss_coefficient: -1e-4, ..Sft::default() }),
            "`z_loss_coefficient` is -0.0001, expected 0 or more"
        );
        assert_eq!(
            refused(Sft { z_loss_coefficient: 1e-4, loss: TokenLoss::Dft, ..Sft::default() }),
            "`z_loss_coefficient` is 0.0001, expected 0 with `loss_type` \"dft\""
        );
        assert_eq!(
            refused(Sft { asft_alpha: -0.5, loss: TokenLoss::Asft, ..Sft::default() }),
            "`asft_alpha` is -0.5, expected 0 or more"
        );
        assert_eq!(
            refused(Sft { asft_alpha: 0.5, loss: TokenLoss::Dft, ..Sft::default() }),
            "`asft_alpha` is 0.5, expected 0.1 with `loss_type` \"dft\": only \"asft\" reads it"
        );
        let eaft = Sft { loss: TokenLoss::Eaft, ..Sft::default() };
        assert_eq!(
            refused(Sft { label_smoothing: 0.1, ..eaft.clone() }),
            "`label_smoothing` is 0.1, expected 0 with `loss_type` \"eaft\""
        );
        assert_eq!(
            refused(Sft { eaft_alpha: -1.0, ..eaft.clone() }),
            "`eaft_alpha` is -1, expected 0 or more"
        );
        assert_eq!(
            refused(Sft { eaft_alpha: 2.0, loss: TokenLoss::Dft, ..eaft }),
            "`eaft_alpha` is 2, expected 1 with `loss_type` \"dft\": only \"eaft\" reads it"
        );
    }

    /// The slope of DFT is `−p`, not the derivative of its value: `p` is held.
    #[test]
    fn dft_gradient_scales_with_the_token_probability() {
        let (_, logps) = forest();
        let p = logps.map(|logp| f64::from(logp).exp());
        let value: f64 = p.iter().zip(logps).map(|(p, logp)| -p * f64::from(logp)).sum();
        let dft = Sft { loss: TokenLoss::Dft, ..Sft::default() };
        check(&dft, value / 4.0, p.map(|p| (-p / 4.0) as f32));
    }

    /// Tokens cost 1, 2, 0.5 and 0.25; the entropy is the largest, none, a quarter of the largest, and the largest.
    #[test]
    fn eaft_gradient_scales_with_the_entropy_of_the_likeliest_tokens() {
        let (forest, logps) = forest();
        let largest = (TOP as f32).ln();
        let rows = [1.0, 0.0, 0.25, 1.0]
            .map(|share| RowStats { top_entropy: share * largest, ..RowStats::default() });
        for (eaft_alpha, factors) in
            [(1.0, [1.0, 0.0, 0.25, 1.0]), (0.5, [1.0, 0.0, 0.5, 1.0]), (0.0, [1.0; 4])]
        {
            let objective = Sft { loss: TokenLoss::Eaft, eaft_alpha, ..Sft::default() };
            assert_eq!(objective.detail(), Detail::Top);
            assert_eq!(objective.terms(), [("eaft", 1.0)]);
            let totals = StepTotals { counts: objective.counts(&forest), statistics: Vec::new() };
            assert!(objective.fixed_gradient(&forest, &totals).is_none());
            let reading = Reading { values: &logps, rows: &rows };
            let weighed = objective.weigh(&forest, reading, &totals).unwrap();
            let costs = [1.0, 2.0, 0.5, 0.25];
            let expected: f64 = factors.iter().zip(costs).map(|(factor, cost)| factor * cost).sum();
            assert!((weighed.sums[0] - expected).abs() < 1e-6, "alpha {eaft_alpha}");
            for (slope, factor) in weighed.d_values.iter().zip(factors) {
                assert!((f64::from(*slope) + factor / 4.0).abs() < 1e-6, "alpha {eaft_alpha}");
            }
        }
    }
}
