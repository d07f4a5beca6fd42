//! Each loss as a function of one pair: value and derivatives in closed form.

use super::coupled;
use super::{LossOptions, Pair, PairLoss, PreferenceLoss, Sides};
use crate::loss::{log_sigmoid, sigmoid};

const ONE: Sides = Sides { chosen: 1.0, rejected: 1.0 };

impl PreferenceLoss {
    /// Loss of one pair and its derivatives. `statistics` is the result of [`statistics`](Self::statistics) for the
    /// step; empty for losses that are not coupled.
    ///
    /// ```
    /// use arriero::loss::preference::{LossOptions, Pair, PreferenceLoss, Sides};
    /// let start = Sides { chosen: -3.0, rejected: -5.0 };
    /// let lengths = Sides { chosen: 4.0, rejected: 2.0 };
    /// let pair = Pair { policy: start, reference: start, lengths, margin: 0.0 };
    /// let dpo = PreferenceLoss::Sigmoid.of_pair(&pair, &[], &LossOptions::default());
    /// assert_eq!(dpo.loss, std::f64::consts::LN_2);
    /// assert_eq!((dpo.d_chosen, dpo.d_rejected), (-0.05, 0.05));
    /// ```
    pub fn of_pair(self, pair: &Pair, statistics: &[f64], options: &LossOptions) -> PairLoss {
        let LossOptions { beta, label_smoothing: epsilon, .. } = *options;
        let ratios = pair.log_ratios();
        let (chosen, rejected) = (beta * ratios.chosen, beta * ratios.rejected);
        match self {
            Self::Sigmoid => scored(pair, ONE, options, |x| smoothed(x, epsilon)),
            Self::SigmoidNorm => scored(pair, pair.lengths, options, |x| smoothed(x, epsilon)),
            Self::Hinge => scored(pair, ONE, options, hinge),
            Self::Ipo => scored(pair, pair.lengths, options, |x| ipo(x, beta)),
            Self::Robust => scored(pair, ONE, options, |x| robust(x, epsilon)),
            Self::ExoPair => {
                let labels = ((1.0 - epsilon) / epsilon).ln();
                scored(pair, ONE, options, |x| bernoulli_kl(x, labels))
            }
            Self::Discopop => scored(pair, ONE, options, |x| discopop(x, options.discopop_tau)),
            Self::RpoBwdKl | Self::RpoFwdKl => rpo(self, pair, options),
            Self::NcaPair => {
                let (up, down) = (softplus(-chosen), softplus(chosen));
                let lose = softplus(rejected);
                of_rewards(
                    beta,
                    (up.0 + 0.5 * down.0, -up.1 + 0.5 * down.1),
                    (0.5 * lose.0, 0.5 * lose.1),
                )
            }
            Self::BcoPair => classified(beta, chosen, rejected, 0.0),
            Self::Bco => classified(beta, chosen, rejected, coupled::shift(statistics)),
            Self::SppoHard => {
                let (win, lose) = (ratios.chosen - 0.5 / beta, ratios.rejected + 0.5 / beta);
                PairLoss {
                    loss: win * win + lose * lose,
                    d_chosen: 2.0 * win,
                    d_rejected: 2.0 * lose,
                }
            }
            Self::ApoZero => of_rewards(beta, falling(chosen), rising(rejected)),
            Self::ApoDown => {
                let (gap, slope) = falling(chosen - rejected);
                let (value, down) = rising(chosen);
                of_rewards(beta, (value + gap, down + slope), (0.0, -slope))
            }
            Self::Aot | Self::AotUnpaired => coupled::aot(self, pair, statistics, options),
            Self::Kto | Self::ApoZeroUnpaired => {
                // Mean over the pair's two responses; TRL counts each as a row.
                let kl = coupled::shift(statistics);
                let (win, up) = self.of_response(true, ratios.chosen, kl, options);
                let (lose, down) = self.of_response(false, ratios.rejected, kl, options);
                PairLoss { loss: 0.5 * (win + lose), d_chosen: 0.5 * up, d_rejected: 0.5 * down }
            }
            Self::Cpo => on_gap(pair, ONE, beta, |x| smoothed(x, epsilon)),
            Self::Simpo => {
                on_gap(pair, pair.lengths, beta, |x| smoothed(x - options.simpo_gamma, epsilon))
            }
            Self::Orpo => orpo(pair, beta),
        }
    }

    /// Loss and derivative for one labelled response with the given log-ratio, for [`unpaired`](Self::unpaired) losses.
    /// `kl` is the step's KL estimate in nats.
    ///
    /// ```
    /// use arriero::loss::preference::{LossOptions, PreferenceLoss};
    /// let (loss, slope) = PreferenceLoss::Kto.of_response(true, 0.5, 0.5, &LossOptions::default());
    /// assert_eq!((loss, slope), (0.5, -0.025));
    /// ```
    pub fn of_response(
        self,
        desirable: bool,
        log_ratio: f64,
        kl: f64,
        options: &LossOptions,
    ) -> (f64, f64) {
        let kl = if self.needs_mismatched() { kl } else { 0.0 };
        let x = options.beta * (log_ratio - kl);
        let (weight, (value, slope)) = if desirable {
            (options.desirable_weight, falling(x))
        } else {
            (options.undesirable_weight, rising(x))
        };
        (weight * value, weight * options.beta * slope)
    }
}

/// Loss `f(x)` with `x = β (s_c/n_c − s_r/n_r)`, where `s` are the log-ratio scores and `n` the divisors.
fn scored(
    pair: &Pair,
    divisors: Sides,
    options: &LossOptions,
    f: impl Fn(f64) -> (f64, f64),
) -> PairLoss {
    let ratios = pair.log_ratios();
    let (chosen, up) = options.divergence.score(ratios.chosen, options.alpha);
    let (rejected, down) = options.divergence.score(ratios.rejected, options.alpha);
    let x = options.beta * (chosen / divisors.chosen - rejected / divisors.rejected);
    let (loss, slope) = f(x);
    PairLoss {
        loss,
        d_chosen: options.beta * slope * up / divisors.chosen,
        d_rejected: -options.beta * slope * down / divisors.rejected,
    }
}

/// Reference-free loss `f(x)` with `x = β (log π_c/n_c − log π_r/n_r)`.
fn on_gap(pair: &Pair, divisors: Sides, beta: f64, f: impl Fn(f64) -> (f64, f64)) -> PairLoss {
    let x =
        beta * (pair.policy.chosen / divisors.chosen - pair.policy.rejected / divisors.rejected);
    let (loss, slope) = f(x);
    PairLoss {
        loss,
        d_chosen: beta * slope / divisors.chosen,
        d_rejected: -beta * slope / divisors.rejected,
    }
}

/// Sum of one term per side, each given with its derivative with respect to that side's reward.
fn of_rewards(beta: f64, chosen: (f64, f64), rejected: (f64, f64)) -> PairLoss {
    PairLoss {
        loss: chosen.0 + rejected.0,
        d_chosen: beta * chosen.1,
        d_rejected: beta * rejected.1,
    }
}

/// `ln(1 + e^x) = −ln σ(−x)` and its derivative.
fn softplus(x: f64) -> (f64, f64) {
    (-log_sigmoid(-x), sigmoid(x))
}

/// `σ(x)` and its derivative.
fn rising(x: f64) -> (f64, f64) {
    (sigmoid(x), sigmoid(x) * sigmoid(-x))
}

/// `1 − σ(x)` and its derivative.
fn falling(x: f64) -> (f64, f64) {
    (sigmoid(-x), -sigmoid(x) * sigmoid(-x))
}

/// `−(1 − ε) ln σ(x) − ε ln σ(−x)` and its derivative.
pub(super) fn smoothed(x: f64, epsilon: f64) -> (f64, f64) {
    (
        -(1.0 - epsilon) * log_sigmoid(x) - epsilon * log_sigmoid(-x),
        epsilon * sigmoid(x) - (1.0 - epsilon) * sigmoid(-x),
    )
}

fn hinge(x: f64) -> (f64, f64) {
    if x < 1.0 { (1.0 - x, -1.0) } else { (0.0, 0.0) }
}

/// `(x/β − 1/2β)²`: `x` is `β` times the quantity squared in the paper.
fn ipo(x: f64, beta: f64) -> (f64, f64) {
    let distance = (x - 0.5) / beta;
    (distance * distance, 2.0 * distance / beta)
}

fn robust(x: f64, epsilon: f64) -> (f64, f64) {
    let scale = 1.0 - 2.0 * epsilon;
    (
        (-(1.0 - epsilon) * log_sigmoid(x) + epsilon * log_sigmoid(-x)) / scale,
        (-(1.0 - epsilon) * sigmoid(-x) - epsilon * sigmoid(x)) / scale,
    )
}

/// `KL(Bernoulli(σ(x)) ‖ Bernoulli(σ(y)))` and its derivative in `x`.
///
/// With `p = σ(x)`, the derivative of `p ln(p/q) + (1−p) ln((1−p)/(1−q))` in `p` is `x − y`, and `dp/dx = p (1−p)`.
fn bernoulli_kl(x: f64, y: f64) -> (f64, f64) {
    let (p, q) = (sigmoid(x), sigmoid(-x));
    let value = p * (log_sigmoid(x) - log_sigmoid(y)) + q * (log_sigmoid(-x) - log_sigmoid(-y));
    (value, p * q * (x - y))
}

/// RPO: KL between the Bernoulli distributions of the implicit reward gap `βΔ` and of the given gap `η r`.
fn rpo(loss: PreferenceLoss, pair: &Pair, options: &LossOptions) -> PairLoss {
    let given = options.gt_reward_scale * pair.margin;
    let implicit = LossOptions { divergence: super::FDivergence::ReverseKl, ..*options };
    scored(pair, ONE, &implicit, |x| {
        if loss == PreferenceLoss::RpoFwdKl {
            bernoulli_kl(x, given)
        } else {
            // The first argument is constant, so only the cross-entropy depends on `x`.
            (bernoulli_kl(given, x).0, sigmoid(x) - sigmoid(given))
        }
    })
}

/// `−ln σ(c − δ) − ln σ(δ − r)` for rewards `c` and `r`.
fn classified(beta: f64, chosen: f64, rejected: f64, shift: f64) -> PairLoss {
    let (win, up) = softplus(shift - chosen);
    of_rewards(beta, (win, -up), softplus(rejected - shift))
}

/// `A (1 − m) + E m` with `A = −ln σ(x)`, `E = e^−x`, `m = σ(x/τ)`.
///
/// `E m` is computed as one exponential, so very negative `x` does not give `∞ · 0`.
fn discopop(x: f64, tau: f64) -> (f64, f64) {
    let (modulation, rest) = (sigmoid(x / tau), sigmoid(-x / tau));
    let (logistic, logistic_slope) = (-log_sigmoid(x), -sigmoid(-x));
    let exponential = (log_sigmoid(x / tau) - x).exp();
    let value = logistic * rest + exponential;
    let slope = logistic_slope * rest - logistic * modulation * rest / tau
        + exponential * (rest / tau - 1.0);
    (value, slope)
}

/// Clamp for mean log-probabilities near 0, where the odds would be infinite.
const CERTAIN: f64 = -1e-7;

/// `ln(p/(1−p))` for `p = e^a`, and its derivative `1/(1−p)` in `a`.
fn log_odds(a: f64) -> (f64, f64) {
    let held = a.min(CERTAIN);
    let missing = -held.exp_m1();
    let log_missing =
        if held > -std::f64::consts::LN_2 { missing.ln() } else { (-held.exp()).ln_1p() };
    (held - log_missing, if a > CERTAIN { 0.0 } else { 1.0 / missing })
}

fn orpo(pair: &Pair, beta: f64) -> PairLoss {
    let (chosen, up) = log_odds(pair.policy.chosen / pair.lengths.chosen);
    let (rejected, down) = log_odds(pair.policy.rejected / pair.lengths.rejected);
    let (value, slope) = softplus(rejected - chosen);
    PairLoss {
        loss: beta * value,
        d_chosen: -beta * slope * up / pair.lengths.chosen,
        d_rejected: beta * slope * down / pair.lengths.rejected,
    }
}
