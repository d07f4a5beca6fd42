//! Reward models: Bradley-Terry on the scores of ranked responses (Llama 2, equation 1, without the margin that
//! Llama 3 dropped; Llama 3, section 4.1.2).

use super::{Mean, Objective, Reading, Readout, StepTotals, Weighed, log_sigmoid, sigmoid};
use crate::data::forest::Forest;
use crate::error::{Error, Result};

/// `−ln σ(better − worse)` and its slope with respect to `better`; the slope of `worse` is the opposite.
///
/// ```
/// use arriero::loss::reward::bradley_terry;
/// let (loss, slope) = bradley_terry(1.0, 1.0);
/// assert_eq!((loss, slope), (std::f64::consts::LN_2, -0.5));
/// ```
pub fn bradley_terry(better: f64, worse: f64) -> (f64, f64) {
    let margin = better - worse;
    (-log_sigmoid(margin), -sigmoid(-margin))
}

/// The reward objective: each tree's leaves are ranked responses, best first; every pair of them counts once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reward {
    /// Weight of `(better + worse)²`, which keeps scores around zero (Eisenstein et al., 2023); 0 is off.
    pub center_coefficient: f64,
}

impl Reward {
    /// Leaf indices of each tree.
    fn ranks(forest: &Forest) -> Vec<Vec<usize>> {
        let mut ranks = vec![Vec::new(); forest.trees()];
        for (leaf, place) in forest.leaves.iter().enumerate() {
            ranks[place.tree].push(leaf);
        }
        ranks
    }

    fn pairs(ranks: &[usize]) -> impl Iterator<Item = (usize, usize)> + '_ {
        ranks.iter().enumerate().flat_map(move |(place, &better)| {
            ranks[place + 1..].iter().map(move |&worse| (better, worse))
        })
    }
}

impl Objective for Reward {
    fn readout(&self) -> Readout {
        Readout::Scores
    }

    fn terms(&self) -> Vec<(&'static str, f64)> {
        vec![("bradley_terry", 1.0), ("center", self.center_coefficient)]
    }

    fn counts(&self, forest: &Forest) -> Vec<f64> {
        let pairs: usize = Self::ranks(forest).iter().map(|ranks| Self::pairs(ranks).count()).sum();
        vec![pairs as f64; 2]
    }

    fn weigh(&self, forest: &Forest, reading: Reading<'_>, totals: &StepTotals) -> Result<Weighed> {
        let scores = reading.values;
        let mut d_values = vec![0.0_f64; scores.len()];
        let (mut loss, mut center, mut right, mut margins, mut pairs) = (0.0, 0.0, 0.0, 0.0, 0.0);
        let (mut best, mut worst) = (0.0, 0.0);
        for (ranks, source) in Self::ranks(forest).iter().zip(&forest.sources) {
            if ranks.len() < 2 {
                return Err(
                    Error::run("expected two or more ranked responses").at(format!("row {source}"))
                );
            }
            for (better, worse) in Self::pairs(ranks) {
                let (high, low) = (f64::from(scores[better]), f64::from(scores[worse]));
                let (value, slope) = bradley_terry(high, low);
                let pull = self.center_coefficient * 2.0 * (high + low);
                d_values[better] += (slope + pull) / totals.counts[0];
                d_values[worse] += (pull - slope) / totals.counts[0];
                loss += value;
                center += (high + low).powi(2);
                right += f64::from(u8::from(high > low));
                margins += high - low;
                pairs += 1.0;
                best += high;
                worst += low;
            }
        }
        let mean = |name, sum| Mean { name, sum, count: pairs };
        Ok(Weighed {
            d_values: d_values.into_iter().map(|d| d as f32).collect(),
            sums: vec![loss, center],
            metrics: vec![
                mean("accuracy", right),
                mean("margin", margins),
                mean("rewards/chosen", best),
                mean("rewards/rejected", worst),
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tree::{Role, Tree};

    fn forest(siblings: &[usize]) -> Forest {
        let response = || (vec![7, 2], vec![Role::Content; 2]);
        let trees: Vec<Tree> = siblings
            .iter()
            .enumerate()
            .map(|(row, &n)| Tree::siblings(vec![1, 5], (0..n).map(|_| response()).collect(), row))
            .collect();
        Forest::pack(&trees).unwrap()
    }

    #[test]
    fn three_ranked_responses_make_three_pairs_and_the_gradient_is_the_slope() {
        let forest = forest(&[3, 2]);
        let reward = Reward { center_coefficient: 0.01 };
        let totals = StepTotals { counts: reward.counts(&forest), statistics: Vec::new() };
        assert_eq!(totals.counts, [4.0, 4.0]);
        let scores = [0.3_f32, -0.5, 1.2, 0.0, 0.25];
        let loss = |scores: &[f32]| {
            let weighed = reward.weigh(&forest, scores.into(), &totals).unwrap();
            weighed.sums[0] / 4.0 + 0.01 * weighed.sums[1] / 4.0
        };
        let weighed = reward.weigh(&forest, scores.as_slice().into(), &totals).unwrap();
        for i in 0..scores.len() {
            let moved = |h: f32| {
                let mut scores = scores;
                scores[i] += h;
                loss(&scores)
            };
            let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            assert!((slope - f64::from(weighed.d_values[i])).abs() < 1e-4, "{i}");
        }
    }

    #[test]
    fn a_lone_response_is_refused() {
        let forest = forest(&[1]);
        let totals = StepTotals { counts: vec![1.0, 1.0], statistics: Vec::new() };
        let error = Reward::default().weigh(&forest, [0.0].as_slice().into(), &totals).unwrap_err();
        assert_eq!(error.to_string(), "row 0: expected two or more ranked responses");
    }
}
