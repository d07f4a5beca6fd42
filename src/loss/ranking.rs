//! How ranked responses are compared: as pairs, or as a whole list.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Which comparisons are made of responses ranked best first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ranking {
    /// Every pair, equally weighted: a list of `n` counts as `n (n − 1) / 2` pairs.
    #[default]
    AllPairs,
    /// Neighbouring responses: a list of `n` counts as `n − 1` pairs.
    Adjacent,
    /// The probability of the whole order (Plackett, 1975; DPO, appendix A.3): every list has the same weight.
    PlackettLuce,
}

impl Ranking {
    /// Index pairs (better, worse) among `count` responses ranked best first. For Plackett-Luce, all pairs: they are
    /// used for metrics only.
    ///
    /// ```
    /// use arriero::loss::ranking::Ranking;
    /// assert_eq!(Ranking::AllPairs.pairs(3), [(0, 1), (0, 2), (1, 2)]);
    /// assert_eq!(Ranking::Adjacent.pairs(3), [(0, 1), (1, 2)]);
    /// ```
    pub fn pairs(self, count: usize) -> Vec<(usize, usize)> {
        let worse = |better: usize| match self {
            Self::Adjacent => better + 1..count.min(better + 2),
            Self::AllPairs | Self::PlackettLuce => better + 1..count,
        };
        (0..count).flat_map(|better| worse(better).map(move |worse| (better, worse))).collect()
    }

    /// Index pairs (better, worse) among responses with the given ranks, smallest (best) first. Tied responses are not
    /// compared; "adjacent" compares responses of consecutive distinct ranks.
    ///
    /// # Errors
    /// Ties in a Plackett-Luce list, which needs a strict order.
    ///
    /// ```
    /// use arriero::loss::ranking::Ranking;
    /// let pairs = |ranking: Ranking, ranks: &[f64]| ranking.pairs_of(ranks).unwrap();
    /// assert_eq!(pairs(Ranking::AllPairs, &[0.0, 0.0, 1.0]), [(0, 2), (1, 2)]);
    /// assert_eq!(pairs(Ranking::Adjacent, &[0.0, 1.0, 1.0, 5.0]), [(0, 1), (0, 2), (1, 3), (2, 3)]);
    /// assert!(Ranking::PlackettLuce.pairs_of(&[0.0, 0.0, 1.0]).is_err());
    /// ```
    pub fn pairs_of(self, ranks: &[f64]) -> Result<Vec<(usize, usize)>> {
        // Dense rank of each response.
        let mut steps = vec![0; ranks.len()];
        for at in 1..ranks.len() {
            steps[at] = steps[at - 1] + usize::from(ranks[at] > ranks[at - 1]);
        }
        let mut pairs = Self::AllPairs.pairs(ranks.len());
        let all = pairs.len();
        pairs.retain(|&(better, worse)| match self {
            Self::Adjacent => steps[better] + 1 == steps[worse],
            Self::AllPairs | Self::PlackettLuce => steps[better] < steps[worse],
        });
        if self == Self::PlackettLuce && pairs.len() < all {
            return Err(Error::run("equal `ranks` with ranking = \"plackett_luce\"").hint(
                "the probability of an order needs one; rank by \"all_pairs\" or \"adjacent\"",
            ));
        }
        Ok(pairs)
    }
}

/// Plackett-Luce: `−ln P` of the given order, `Σ_k ln Σ_{j ≥ k} exp(s_j) − s_k`, and its gradient with respect to each
/// score. With two responses it equals Bradley-Terry.
///
/// ```
/// use arriero::loss::ranking::plackett_luce;
/// let (loss, slopes) = plackett_luce(&[1.0, 1.0, 1.0]);
/// assert!((loss - 6_f64.ln()).abs() < 1e-15); // 3! orders, all alike
/// assert!((slopes[0] - (1.0 / 3.0 - 1.0)).abs() < 1e-15);
/// ```
pub fn plackett_luce(scores: &[f64]) -> (f64, Vec<f64>) {
    let mut loss = 0.0;
    let mut slopes = vec![0.0; scores.len()];
    for place in 0..scores.len().saturating_sub(1) {
        let left = &scores[place..];
        let top = left.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = left.iter().map(|score| (score - top).exp()).sum();
        loss += top + sum.ln() - left[0];
        for (slope, score) in slopes[place..].iter_mut().zip(left) {
            *slope += (score - top).exp() / sum;
        }
        slopes[place] -= 1.0;
    }
    (loss, slopes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::reward::bradley_terry;

    #[test]
    fn two_responses_reduce_to_bradley_terry_even_at_extreme_scores() {
        for [better, worse] in [[0.3, -0.5], [0.0, 900.0], [900.0, 0.0]] {
            let (loss, slopes) = plackett_luce(&[better, worse]);
            let (expected, slope) = bradley_terry(better - worse);
            assert!((loss - expected).abs() < 1e-12 && (slopes[0] - slope).abs() < 1e-12);
            assert!((slopes[0] + slopes[1]).abs() < 1e-15);
        }
    }

    #[test]
    fn order_probabilities_sum_to_one_and_slopes_match_finite_differences() {
        let scores = [0.4, -1.1, 2.0];
        let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
        let loss = |order: [usize; 3]| plackett_luce(&order.map(|at| scores[at])).0;
        let total: f64 = orders.iter().map(|order| (-loss(*order)).exp()).sum();
        assert!((total - 1.0).abs() < 1e-14, "{total}");
        let (_, slopes) = plackett_luce(&scores);
        for at in 0..3 {
            let moved = |h: f64| {
                let mut scores = scores;
                scores[at] += h;
                plackett_luce(&scores).0
            };
            assert!(((moved(1e-5) - moved(-1e-5)) / 2e-5 - slopes[at]).abs() < 1e-9);
        }
    }
}
