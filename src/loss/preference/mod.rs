//! Preference losses on the log-probabilities of a chosen and a rejected response.
//!
//! [`PreferenceLoss`] names the losses as TRL does and states what each one needs. `pairwise` holds losses of a single
//! pair, `coupled` those that depend on the whole optimizer step, `divergence` the f-divergences that turn log-ratios
//! into scores. [`Preference`] applies any number of them to the pairs of a forest, [`Unpaired`] the KTO family to
//! single labelled responses. `docs/losses.md` lists the tests of each loss.
//!
//! Conventions: log-probabilities are natural logarithms, summed over the tokens that [`Summing`] includes; a
//! *log-ratio* is `log π(y|x) − log π_ref(y|x)`, a *reward* is `β` times it, `Δ` is the chosen log-ratio minus the
//! rejected one. Lengths count the same tokens. Logged rewards are never divided by a length (TRL 1.16).

mod by_margin;
mod coupled;
mod divergence;
mod live;
mod objective;
mod pairwise;
mod summing;
mod unpaired;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

pub use divergence::FDivergence;
pub use live::LiveReference;
pub use objective::Preference;
pub use summing::{Response, Summing};
pub use unpaired::Unpaired;

/// One value for each side of a pair.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sides {
    /// Value for the preferred response.
    pub chosen: f64,
    /// Value for the other response.
    pub rejected: f64,
}

impl Sides {
    /// Chosen minus rejected.
    pub fn gap(self) -> f64 {
        self.chosen - self.rejected
    }
}

/// Inputs of a pairwise loss.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pair {
    /// The policy's log-probabilities, each summed over its response's tokens, in nats.
    pub policy: Sides,
    /// The reference's log-probabilities under the same mask; zeros if no loss reads them.
    pub reference: Sides,
    /// Number of tokens in each sum.
    pub lengths: Sides,
    /// How much higher an annotator or reward model scored the chosen response (column `margin`).
    pub margin: f64,
}

impl Pair {
    /// Log-ratios of policy to reference, per side.
    pub fn log_ratios(&self) -> Sides {
        Sides {
            chosen: self.policy.chosen - self.reference.chosen,
            rejected: self.policy.rejected - self.reference.rejected,
        }
    }
}

/// Loss of one pair and its derivatives.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PairLoss {
    /// Loss value.
    pub loss: f64,
    /// Derivative with respect to the policy's chosen log-probability.
    pub d_chosen: f64,
    /// Derivative with respect to the policy's rejected log-probability.
    pub d_rejected: f64,
}

/// Constants of the losses, named as in TRL.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossOptions {
    /// KL-regularisation strength `β`; the regularisation `τ` of IPO, the temperature of CPO and SimPO, the weight of
    /// ORPO's odds-ratio term.
    pub beta: f64,
    /// Assumed fraction `ε` of flipped labels.
    pub label_smoothing: f64,
    /// f-divergence that turns a log-ratio into a score.
    pub divergence: FDivergence,
    /// Coefficient `α` of the α-divergence.
    pub alpha: f64,
    /// SimPO's target margin `γ`.
    pub simpo_gamma: f64,
    /// DiscoPOP's temperature `τ`.
    pub discopop_tau: f64,
    /// RPO's scale `η` for the column `margin`.
    pub gt_reward_scale: f64,
    /// KTO's weight for desirable responses.
    pub desirable_weight: f64,
    /// KTO's weight for undesirable responses.
    pub undesirable_weight: f64,
}

impl Default for LossOptions {
    fn default() -> Self {
        Self {
            beta: 0.1,
            label_smoothing: 0.0,
            divergence: FDivergence::ReverseKl,
            alpha: 0.5,
            simpo_gamma: 0.5,
            discopop_tau: 0.05,
            gt_reward_scale: 1.0,
            desirable_weight: 1.0,
            undesirable_weight: 1.0,
        }
    }
}

/// The preference losses, under TRL's names where TRL has the loss; aliases are other trainers' names. `r_c` and `r_r`
/// are the rewards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PreferenceLoss {
    /// DPO, `−ln σ(βΔ)` (Rafailov et al., 2023, equation 7); with label smoothing, cDPO (Mitchell, 2023).
    #[serde(alias = "dpo")]
    Sigmoid,
    /// DPO on per-token log-ratios (length-normalised DPO; Tulu 3, section 5.1.1).
    #[serde(alias = "dpo_norm")]
    SigmoidNorm,
    /// `max(0, 1 − βΔ)` (SLiC, Zhao et al., 2023; RSO, Liu et al., 2023).
    #[serde(alias = "rso", alias = "slic")]
    Hinge,
    /// `(Δ − 1/2β)²` on per-token log-ratios (Azar et al., 2023, equation 17).
    Ipo,
    /// `((ε − 1) ln σ(βΔ) + ε ln σ(−βΔ)) / (1 − 2ε)`: unbiased under flipped labels (Chowdhury et al., 2024).
    Robust,
    /// `KL(p_θ ‖ p_labels)` over the two responses (Ji et al., 2024, equation 16).
    #[serde(alias = "exo")]
    ExoPair,
    /// Noise contrastive alignment, `−ln σ(r_c) − ½ ln σ(−r_c) − ½ ln σ(−r_r)` (Chen et al., 2024).
    #[serde(alias = "nca")]
    NcaPair,
    /// `−ln σ(r_c) − ln σ(−r_r)`: binary classification of each side without a shift, TRL 1.16's `bco_pair`.
    BcoPair,
    /// Binary classifier optimisation (Jung et al., 2024): as `bco_pair`, with rewards shifted by the step's mean
    /// reward.
    Bco,
    /// Self-play preference optimisation with hard labels, `(r_c/β − 1/2β)² + (r_r/β + 1/2β)²` (Wu et al., 2024).
    #[serde(alias = "sppo")]
    SppoHard,
    /// Anchored preference optimisation for chosen responses better than the policy, `1 − σ(r_c) + σ(r_r)`
    /// (D'Oosterlinck et al., 2024, equation 7).
    ApoZero,
    /// APO for chosen responses worse than the policy, `σ(r_c) + 1 − σ(r_c − r_r)` (equation 8).
    ApoDown,
    /// Alignment by optimal transport, on the sorted gaps of policy and reference (Melnyk et al., 2024).
    #[serde(alias = "aot_pair", alias = "aot_paired")]
    Aot,
    /// AOT on the sorted log-ratios of chosen and of rejected responses.
    AotUnpaired,
    /// Log-ratio modulated loss (Lu et al., 2024, equation 5).
    Discopop,
    /// Reward-aware preference optimisation, `KL(σ(ηr) ‖ σ(βΔ))` (Nemotron-4 340B, 2024; as in NeMo-Aligner).
    #[serde(alias = "rpo")]
    RpoBwdKl,
    /// RPO with `KL(σ(βΔ) ‖ σ(ηr))`.
    RpoFwdKl,
    /// Kahneman-Tversky optimisation (Ethayarajh et al., 2024, equation 7) with its KL estimate.
    #[serde(alias = "kto_pair")]
    Kto,
    /// KTO with its KL estimate fixed at zero (TRL's KTO trainer).
    ApoZeroUnpaired,
    /// `−ln σ(β (log π_c − log π_r))`, without a reference (Xu et al., 2024, equation 3).
    Cpo,
    /// CPO on per-token log-probabilities with a target margin `γ` (Meng et al., 2024).
    Simpo,
    /// `−β ln σ` of the log odds ratio (Hong et al., 2024, equation 7); its NLL is the separate term `sft`.
    Orpo,
}

impl PreferenceLoss {
    /// All losses, in the order of the documentation.
    pub const ALL: [Self; 22] = [
        Self::Sigmoid,
        Self::SigmoidNorm,
        Self::Hinge,
        Self::Ipo,
        Self::Robust,
        Self::ExoPair,
        Self::NcaPair,
        Self::BcoPair,
        Self::Bco,
        Self::SppoHard,
        Self::ApoZero,
        Self::ApoDown,
        Self::Aot,
        Self::AotUnpaired,
        Self::Discopop,
        Self::RpoBwdKl,
        Self::RpoFwdKl,
        Self::Kto,
        Self::ApoZeroUnpaired,
        Self::Cpo,
        Self::Simpo,
        Self::Orpo,
    ];

    /// Name in recipes and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sigmoid => "sigmoid",
            Self::SigmoidNorm => "sigmoid_norm",
            Self::Hinge => "hinge",
            Self::Ipo => "ipo",
            Self::Robust => "robust",
            Self::ExoPair => "exo_pair",
            Self::NcaPair => "nca_pair",
            Self::BcoPair => "bco_pair",
            Self::Bco => "bco",
            Self::SppoHard => "sppo_hard",
            Self::ApoZero => "apo_zero",
            Self::ApoDown => "apo_down",
            Self::Aot => "aot",
            Self::AotUnpaired => "aot_unpaired",
            Self::Discopop => "discopop",
            Self::RpoBwdKl => "rpo_bwd_kl",
            Self::RpoFwdKl => "rpo_fwd_kl",
            Self::Kto => "kto",
            Self::ApoZeroUnpaired => "apo_zero_unpaired",
            Self::Cpo => "cpo",
            Self::Simpo => "simpo",
            Self::Orpo => "orpo",
        }
    }

    /// Whether it reads the reference's log-probabilities.
    pub fn needs_reference(self) -> bool {
        !matches!(self, Self::Cpo | Self::Simpo | Self::Orpo)
    }

    /// Whether it reads the column `margin`.
    pub fn needs_margin(self) -> bool {
        matches!(self, Self::RpoBwdKl | Self::RpoFwdKl)
    }

    /// Whether it needs an additional response to another prompt per row (for KTO's KL estimate).
    pub fn needs_mismatched(self) -> bool {
        self == Self::Kto
    }

    /// Whether it is defined for a single labelled response.
    pub fn unpaired(self) -> bool {
        matches!(self, Self::Kto | Self::ApoZeroUnpaired)
    }

    /// Whether a pair's loss depends on the other pairs of the step.
    pub fn coupled(self) -> bool {
        matches!(self, Self::Kto | Self::Bco | Self::Aot | Self::AotUnpaired)
    }

    /// Whether `label_smoothing` changes it.
    pub fn reads_label_smoothing(self) -> bool {
        matches!(
            self,
            Self::Sigmoid
                | Self::SigmoidNorm
                | Self::Robust
                | Self::ExoPair
                | Self::Aot
                | Self::AotUnpaired
                | Self::Cpo
                | Self::Simpo
        )
    }

    /// Whether the f-divergence changes it; the other losses are defined on the log-ratios directly.
    pub fn reads_divergence(self) -> bool {
        matches!(
            self,
            Self::Sigmoid
                | Self::SigmoidNorm
                | Self::Hinge
                | Self::Ipo
                | Self::Robust
                | Self::ExoPair
                | Self::Discopop
        )
    }
}

impl LossOptions {
    /// Rejects constants that are invalid for the given losses, or that none of them reads.
    ///
    /// # Errors
    /// Names the key, its value and the expected range.
    pub fn check(&self, losses: &[PreferenceLoss]) -> Result<()> {
        let refuse = |key: &str, value: f64, expected: &str| {
            Err(Error::usage(format!("`{key}` is {value}, expected {expected}")))
        };
        let names = || losses.iter().map(|loss| loss.name()).collect::<Vec<_>>().join(", ");
        for (key, value) in [
            ("beta", self.beta),
            ("gt_reward_scale", self.gt_reward_scale),
            ("desirable_weight", self.desirable_weight),
            ("undesirable_weight", self.undesirable_weight),
        ] {
            if !value.is_finite() || value <= 0.0 {
                return refuse(key, value, "more than 0");
            }
        }
        if !self.simpo_gamma.is_finite() || self.simpo_gamma < 0.0 {
            return refuse("simpo_gamma", self.simpo_gamma, "0 or more");
        }
        // Above 1 the exponential outgrows the modulation, and very negative margins give an infinite loss.
        if !(self.discopop_tau > 0.0 && self.discopop_tau <= 1.0) {
            return refuse("discopop_tau", self.discopop_tau, "more than 0 and at most 1");
        }
        let smoothing = self.label_smoothing;
        if !(0.0..0.5).contains(&smoothing) {
            return refuse("label_smoothing", smoothing, "0 or more and less than 0.5");
        }
        if smoothing > 0.0 && !losses.iter().any(|loss| loss.reads_label_smoothing()) {
            return refuse(
                "label_smoothing",
                smoothing,
                &format!("0: {} does not read it", names()),
            );
        }
        if smoothing <= 0.0 && losses.contains(&PreferenceLoss::ExoPair) {
            return refuse("label_smoothing", smoothing, "more than 0 for `exo_pair`")
                .map_err(|error| error.hint("the paper takes 0.001"));
        }
        if self.divergence != FDivergence::ReverseKl
            && !losses.iter().any(|loss| loss.reads_divergence())
        {
            return Err(Error::usage(format!(
                "`f_divergence_type` is written, but {} does not read it",
                names()
            ))
            .hint("leave it out"));
        }
        if !self.alpha.is_finite() {
            return refuse("f_alpha_divergence_coef", self.alpha, "a finite number");
        }
        self.check_read(losses)
    }

    /// Rejects constants that were set but are not read.
    fn check_read(&self, losses: &[PreferenceLoss]) -> Result<()> {
        use PreferenceLoss::{ApoZeroUnpaired, Discopop, Kto, RpoBwdKl, RpoFwdKl, Simpo};
        let plain = Self::default();
        let by = |readers: &[PreferenceLoss]| losses.iter().any(|loss| readers.contains(loss));
        let (labels, rpo) = (by(&[Kto, ApoZeroUnpaired]), by(&[RpoBwdKl, RpoFwdKl]));
        let alpha = self.divergence == FDivergence::AlphaDivergence;
        for (key, value, plain, is_read) in [
            ("simpo_gamma", self.simpo_gamma, plain.simpo_gamma, by(&[Simpo])),
            ("discopop_tau", self.discopop_tau, plain.discopop_tau, by(&[Discopop])),
            ("gt_reward_scale", self.gt_reward_scale, plain.gt_reward_scale, rpo),
            ("desirable_weight", self.desirable_weight, plain.desirable_weight, labels),
            ("undesirable_weight", self.undesirable_weight, plain.undesirable_weight, labels),
            ("f_alpha_divergence_coef", self.alpha, plain.alpha, alpha),
        ] {
            if value.to_bits() != plain.to_bits() && !is_read {
                let what = if key == "f_alpha_divergence_coef" {
                    "f_divergence_type"
                } else {
                    "loss_type"
                };
                return Err(Error::usage(format!("`{key}` is {value}, and nothing reads it"))
                    .hint(format!("leave it out, or see `{what}`")));
            }
        }
        Ok(())
    }
}
