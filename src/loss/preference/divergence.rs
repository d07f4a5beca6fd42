//! f-divergences in place of the reverse KL (Wang et al., 2023): the score is `f'(π/π_ref)`, up to a constant that
//! cancels between the two sides.

use serde::{Deserialize, Serialize};

use crate::loss::{log_sigmoid, sigmoid};

/// The divergence that turns a log-ratio `r = ln(π/π_ref)` into a score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FDivergence {
    /// `r`: standard DPO.
    #[default]
    ReverseKl,
    /// `1 − e^−r`.
    ForwardKl,
    /// Jensen-Shannon: `ln 2 + ln σ(r)`.
    #[serde(alias = "js")]
    JsDivergence,
    /// `(e^{(α−1) r} − 1) / (α − 1)`; `α = 1` is the reverse KL.
    #[serde(alias = "alpha")]
    AlphaDivergence,
}

/// Largest exponent; beyond it the score is constant, as in TRL, and its derivative is 0.
const LARGEST: f64 = 80.0;

impl FDivergence {
    /// Score of a log-ratio and its derivative; `alpha` is the coefficient of [`Self::AlphaDivergence`].
    ///
    /// ```
    /// use arriero::loss::preference::FDivergence;
    /// assert_eq!(FDivergence::ReverseKl.score(-3.0, 1.0), (-3.0, 1.0));
    /// assert_eq!(FDivergence::ForwardKl.score(0.0, 1.0), (0.0, 1.0));
    /// assert_eq!(FDivergence::AlphaDivergence.score(0.0, 2.0), (0.0, 1.0));
    /// ```
    pub fn score(self, log_ratio: f64, alpha: f64) -> (f64, f64) {
        match self {
            Self::ReverseKl => (log_ratio, 1.0),
            Self::ForwardKl => power(-1.0, log_ratio),
            Self::JsDivergence => {
                (std::f64::consts::LN_2 + log_sigmoid(log_ratio), sigmoid(-log_ratio))
            }
            // Near 1 the quotient is dominated by rounding.
            Self::AlphaDivergence if (alpha - 1.0).abs() < 1e-6 => (log_ratio, 1.0),
            Self::AlphaDivergence => power(alpha - 1.0, log_ratio),
        }
    }
}

/// `(e^{c r} − 1) / c` and its derivative `e^{c r}`.
fn power(c: f64, log_ratio: f64) -> (f64, f64) {
    let exponent = c * log_ratio;
    let held = exponent.min(LARGEST);
    let slope = if exponent > LARGEST { 0.0 } else { held.exp() };
    (held.exp_m1() / c, slope)
}
