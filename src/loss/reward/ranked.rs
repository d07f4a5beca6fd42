//! Reward losses on ranked responses: Bradley-Terry on pairs (Llama 2, equations 1 and 2; Llama 3, section 4.1.2,
//! without the margin), or Plackett-Luce on the whole list.

use super::bradley_terry;
use super::quality::{self, Observation};
use crate::data::forest::{End, Forest};
use crate::error::{Error, Result};
use crate::loss::ranking::{Ranking, plackett_luce};
use crate::loss::{Mean, Objective, Reading, Readout, StepTotals, Weighed};
use crate::ops::head::{self, MarginLoss, PairTerm, Pairs};

/// Objective over ranked responses. A tree's ends are the responses, best first or ordered by the ranks in their labels
/// (see [`Lesson::Ranked`](crate::data::lessons::Lesson)).
#[derive(Clone, Copy, Debug, Default)]
pub struct Reward {
    /// Pairs, neighbours or whole lists.
    pub ranking: Ranking,
    /// Subtract the row's margin from a pair's score gap (Llama 2, equation 2).
    pub use_margin: bool,
    /// Weight of `(better + worse)²`, which keeps scores near zero (Eisenstein et al., 2023); 0 disables it.
    pub center_coefficient: f64,
}

/// Two ends; the first is the better one.
struct Pair<'a> {
    row: usize,
    better: usize,
    worse: usize,
    ends: (&'a End, &'a End),
}

impl Pair<'_> {
    /// The row's margin, if given.
    fn margin(&self) -> Option<f64> {
        Some(level(self.ends.0)? - level(self.ends.1)?)
    }
}

/// Ends per tree, best first.
fn ranks(forest: &Forest) -> Vec<Vec<usize>> {
    let mut ranks = vec![Vec::new(); forest.trees()];
    for (at, end) in forest.ends.iter().enumerate() {
        ranks[end.tree].push(at);
    }
    for ends in &mut ranks {
        // Stable sort: without labels the original order is kept.
        let rank = |at: &usize| rank(&forest.ends[*at]).unwrap_or_default();
        ends.sort_by(|a, b| rank(a).total_cmp(&rank(b)));
    }
    ranks
}

/// The rank in an end's label.
fn rank(end: &End) -> Option<f64> {
    end.label.first().copied().flatten()
}

/// The level in an end's label, if the row has margins.
fn level(end: &End) -> Option<f64> {
    end.label.get(1).copied().flatten()
}

impl Reward {
    /// The pairs to compare.
    ///
    /// # Errors
    /// Ties in a Plackett-Luce list, which needs a strict order.
    fn compared<'a>(&self, forest: &'a Forest, ranks: &[Vec<usize>]) -> Result<Vec<Pair<'a>>> {
        let mut pairs = Vec::new();
        for (ends, &row) in ranks.iter().zip(&forest.sources) {
            let given: Option<Vec<f64>> = ends.iter().map(|&end| rank(&forest.ends[end])).collect();
            let places = match given {
                Some(ranks) => {
                    self.ranking.pairs_of(&ranks).map_err(|error| error.at(format!("row {row}")))?
                }
                None => self.ranking.pairs(ends.len()),
            };
            pairs.extend(places.into_iter().map(|(better, worse)| {
                let (better, worse) = (ends[better], ends[worse]);
                Pair { row, better, worse, ends: (&forest.ends[better], &forest.ends[worse]) }
            }));
        }
        Ok(pairs)
    }

    fn margin(&self, pair: &Pair<'_>) -> Result<f64> {
        if !self.use_margin {
            return Ok(0.0);
        }
        pair.margin().ok_or_else(|| Error::run("no margin").at(format!("row {}", pair.row)))
    }

    /// Accumulates the main term's gradient, divided by its count; returns the term's sum.
    fn main(
        &self,
        (ranks, pairs): (&[Vec<usize>], &[Pair<'_>]),
        scores: &[f32],
        count: f64,
        d_values: &mut [f64],
    ) -> Result<f64> {
        let mut sum = 0.0;
        if self.ranking == Ranking::PlackettLuce {
            for ends in ranks {
                let list: Vec<f64> = ends.iter().map(|&end| f64::from(scores[end])).collect();
                let (loss, slopes) = plackett_luce(&list);
                sum += loss;
                ends.iter().zip(slopes).for_each(|(&end, slope)| d_values[end] += slope / count);
            }
            return Ok(sum);
        }
        for pair in pairs {
            let gap = f64::from(scores[pair.better]) - f64::from(scores[pair.worse]);
            let (loss, slope) = bradley_terry(gap - self.margin(pair)?);
            sum += loss;
            d_values[pair.better] += slope / count;
            d_values[pair.worse] -= slope / count;
        }
        Ok(sum)
    }
}

impl Objective for Reward {
    fn readout(&self) -> Readout {
        Readout::Scores
    }

    fn terms(&self) -> Vec<(&'static str, f64)> {
        let main = match self.ranking {
            Ranking::AllPairs | Ranking::Adjacent => "bradley_terry",
            Ranking::PlackettLuce => "plackett_luce",
        };
        vec![(main, 1.0), ("center", self.center_coefficient)]
    }

    fn counts(&self, forest: &Forest) -> Vec<f64> {
        // An invalid list is reported by `weigh`, not here.
        let pairs = self.compared(forest, &ranks(forest)).map_or(0, |pairs| pairs.len()) as f64;
        let lists = forest.trees() as f64;
        vec![if self.ranking == Ranking::PlackettLuce { lists } else { pairs }, pairs]
    }

    /// `None` if the loss is not a function of pair margins, or if [`weigh`](Objective::weigh) must report an error.
    /// Each score is a sequence of one target, its level (if any) the reference.
    fn pairs(&self, forest: &Forest, totals: &StepTotals) -> Result<Option<Pairs>> {
        let ranks = ranks(forest);
        if self.ranking == Ranking::PlackettLuce
            || self.center_coefficient > 0.0
            || ranks.iter().any(|ends| ends.len() < 2)
        {
            return Ok(None);
        }
        let count = forest.ends.len();
        let references = if self.use_margin {
            forest.ends.iter().map(level).collect()
        } else {
            Some(vec![0.0; count])
        };
        let Some(references) = references else { return Ok(None) };
        let compared = self.compared(forest, &ranks)?;
        let term = PairTerm {
            loss: MarginLoss::Sigmoid(0.0),
            beta: 1.0,
            offset: 0.0,
            referenced: self.use_margin,
            by_length: false,
            scale: 1.0 / totals.counts[0],
        };
        Ok(Some(Pairs {
            sequences: (0..count as u32).collect(),
            weights: vec![1.0; count],
            addends: vec![0.0; count],
            references,
            lengths: vec![1.0; count],
            pairs: compared.iter().map(|pair| [pair.better as u32, pair.worse as u32]).collect(),
            starts: head::starts(compared.iter().map(|pair| pair.ends.0.tree), forest.trees()),
            terms: vec![term],
        }))
    }

    fn for_forest(&self, _: &Forest) -> Result<Box<dyn Objective>> {
        Ok(Box::new(*self))
    }

    fn weigh(&self, forest: &Forest, reading: Reading<'_>, totals: &StepTotals) -> Result<Weighed> {
        let scores = reading.values;
        let ranks = ranks(forest);
        if let Some(tree) = ranks.iter().position(|ends| ends.len() < 2) {
            return Err(Error::run("expected two or more ranked responses")
                .at(format!("row {}", forest.sources[tree])));
        }
        let pairs = self.compared(forest, &ranks)?;
        let mut d_values = vec![0.0_f64; scores.len()];
        let main = self.main((&ranks, &pairs), scores, totals.counts[0], &mut d_values)?;
        let (mut center, mut right, mut best, mut worst) = (0.0, 0.0, 0.0, 0.0);
        for pair in &pairs {
            let (high, low) = (f64::from(scores[pair.better]), f64::from(scores[pair.worse]));
            let pull = self.center_coefficient * 2.0 * (high + low) / totals.counts[1];
            d_values[pair.better] += pull;
            d_values[pair.worse] += pull;
            center += (high + low).powi(2);
            right += f64::from(u8::from(high > low));
            best += high;
            worst += low;
        }
        let mean = |name, sum| Mean { name, sum, count: pairs.len() as f64 };
        Ok(Weighed {
            d_values: d_values.into_iter().map(|d| d as f32).collect(),
            sums: vec![main, center],
            metrics: vec![
                mean("accuracy", right),
                mean("margin", best - worst),
                mean("rewards/chosen", best),
                mean("rewards/rejected", worst),
            ],
        })
    }

    fn observe(&self, forest: &Forest, scores: &[f32]) -> Vec<Observation> {
        let score = |at: usize| f64::from(scores[at]);
        let responses = forest.ends.iter().enumerate();
        let responses = responses
            .map(|(at, end)| Observation::Score { score: score(at), length: end.length as f64 });
        let pairs = self.compared(forest, &ranks(forest)).unwrap_or_default();
        let pairs = pairs.into_iter().map(|pair| {
            let gap = score(pair.better) - score(pair.worse);
            Observation::Pair { gap, margin: pair.margin() }
        });
        responses.chain(pairs).collect()
    }

    fn summarize(&self, observations: &[Observation]) -> Vec<(String, f64)> {
        quality::summarize(observations, &[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tree::{Role, Tree};
    use crate::loss::log_sigmoid;

    fn response() -> (Vec<u32>, Vec<Role>) {
        (vec![7, 2], vec![Role::Content; 2])
    }

    fn tree(responses: usize, row: usize) -> Tree {
        Tree::siblings(vec![1, 5], (0..responses).map(|_| response()).collect(), row)
    }

    fn forest(siblings: &[usize]) -> Forest {
        let trees: Vec<Tree> = siblings.iter().enumerate().map(|(row, &n)| tree(n, row)).collect();
        Forest::pack(&trees).unwrap()
    }

    fn totals(reward: Reward, forest: &Forest) -> StepTotals {
        StepTotals { counts: reward.counts(forest), statistics: Vec::new() }
    }

    /// Levels 3, 1, 1 for ranks 0, 1, 2, stored in the order 2, 0, 1.
    fn shuffled() -> Forest {
        let label = |rank: f64, level: f64| vec![Some(rank), Some(level)];
        let labels = vec![label(2.0, 1.0), label(0.0, 3.0), label(1.0, 1.0)];
        let chain = Tree::chain(vec![1], vec![response(), response(), response()], 0);
        Forest::pack(&[chain.labelled(labels)]).unwrap()
    }

    /// Gradients computed on the GPU alone match the host's.
    #[test]
    fn slopes_by_margin_match_those_of_the_loss() {
        let scores = [0.5_f32, -1.0, 0.25, 2.0, 1.5, -0.75];
        for (forest, use_margin) in
            [(shuffled(), false), (shuffled(), true), (forest(&[2, 4]), false)]
        {
            for ranking in [Ranking::AllPairs, Ranking::Adjacent] {
                let reward = Reward { ranking, use_margin, ..Reward::default() };
                let (totals, scores) = (totals(reward, &forest), &scores[..forest.ends.len()]);
                let pairs = Objective::pairs(&reward, &forest, &totals).unwrap().unwrap();
                let reading = Reading { values: scores, rows: &[] };
                let expected = reward.weigh(&forest, reading, &totals).unwrap().d_values;
                for (found, expected) in pairs.slopes(scores).iter().zip(&expected) {
                    assert!((found - expected).abs() <= 1e-7, "{found} {expected}");
                }
            }
        }
        // Cases left to the host.
        let none = |reward: Reward, forest: &Forest| {
            let totals = StepTotals { counts: vec![1.0, 1.0], statistics: Vec::new() };
            Objective::pairs(&reward, forest, &totals).unwrap().is_none()
        };
        let plain = Reward::default();
        assert!(none(Reward { center_coefficient: 0.1, ..plain }, &forest(&[2])));
        assert!(none(Reward { ranking: Ranking::PlackettLuce, ..plain }, &forest(&[2])));
        assert!(
            none(Reward { use_margin: true, ..plain }, &forest(&[2])) && none(plain, &forest(&[1]))
        );
    }

    #[test]
    fn responses_of_equal_rank_are_not_compared() {
        let label = |rank: f64| vec![Some(rank), None];
        let tree = tree(3, 4).labelled(vec![label(1.0), label(1.0), label(2.0)]);
        let forest = Forest::pack(&[tree]).unwrap();
        let scores = [0.5_f32, -1.0, 0.25];
        let reading = Reading { values: &scores, rows: &[] };
        for ranking in [Ranking::AllPairs, Ranking::Adjacent] {
            let reward = Reward { ranking, ..Reward::default() };
            assert_eq!(reward.counts(&forest), [2.0, 2.0]);
            let weighed = reward.weigh(&forest, reading, &totals(reward, &forest)).unwrap();
            let expected = -log_sigmoid(0.25) - log_sigmoid(-1.25);
            assert!((weighed.sums[0] - expected).abs() < 1e-9, "{ranking:?}: {:?}", weighed.sums);
            let slopes = &weighed.d_values;
            assert!(slopes[0] < 0.0 && slopes[1] < slopes[0] && slopes[2] > 0.0, "{slopes:?}");
            assert!(slopes.iter().sum::<f32>().abs() < 1e-6, "{slopes:?}");
        }
        let reward = Reward { ranking: Ranking::PlackettLuce, ..Reward::default() };
        let error = reward.weigh(&forest, reading, &totals(reward, &forest)).unwrap_err();
        let expected = "row 4: equal `ranks` with ranking = \"plackett_luce\"";
        assert!(error.to_string().starts_with(expected), "{error}");
    }

    #[test]
    fn gradients_match_finite_differences_of_the_loss() {
        use Ranking::{Adjacent, AllPairs, PlackettLuce};
        for (ranking, counts) in
            [(AllPairs, [4.0, 4.0]), (Adjacent, [3.0, 3.0]), (PlackettLuce, [2.0, 4.0])]
        {
            let forest = forest(&[3, 2]);
            let reward = Reward { ranking, center_coefficient: 0.01, use_margin: false };
            let totals = totals(reward, &forest);
            assert_eq!(totals.counts, counts);
            let scores = [0.3_f32, -0.5, 1.2, 0.0, 0.25];
            let loss = |scores: &[f32]| {
                let weighed = reward.weigh(&forest, scores.into(), &totals).unwrap();
                weighed.sums[0] / counts[0] + 0.01 * weighed.sums[1] / counts[1]
            };
            let weighed = reward.weigh(&forest, scores.as_slice().into(), &totals).unwrap();
            for i in 0..scores.len() {
                let moved = |h: f32| {
                    let mut scores = scores;
                    scores[i] += h;
                    loss(&scores)
                };
                let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                assert!((slope - f64::from(weighed.d_values[i])).abs() < 1e-4, "{ranking:?} {i}");
            }
        }
    }

    /// Scores 1, 2.5, 1.25 for ranks 2, 0, 1: gaps 1.25, 1.5 and 0.25 with margins 2, 2 and 0.
    #[test]
    fn shuffled_list_is_compared_by_rank_with_margins_from_its_levels() {
        let (forest, scores) = (shuffled(), [1.0_f32, 2.5, 1.25]);
        let reward = Reward { use_margin: true, ..Reward::default() };
        let weighed =
            reward.weigh(&forest, scores.as_slice().into(), &totals(reward, &forest)).unwrap();
        let expected = -log_sigmoid(1.25 - 2.0) - log_sigmoid(1.5 - 2.0) - log_sigmoid(0.25);
        assert!((weighed.sums[0] - expected).abs() < 1e-12, "{}", weighed.sums[0]);
        assert_eq!(weighed.metrics[0].sum.to_bits(), 3.0_f64.to_bits());
        let margins = reward.observe(&forest, &scores).into_iter().filter_map(|seen| match seen {
            Observation::Pair { gap, margin } => Some((gap, margin)),
            _ => None,
        });
        let expected = [(1.25, Some(2.0)), (1.5, Some(2.0)), (0.25, Some(0.0))];
        assert_eq!(margins.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_lone_response_and_a_missing_margin_are_refused_with_their_row() {
        let refused = |forest: &Forest, reward: Reward, scores: &[f32]| {
            let totals = StepTotals { counts: vec![1.0, 1.0], statistics: Vec::new() };
            reward.weigh(forest, scores.into(), &totals).unwrap_err().to_string()
        };
        let lone = refused(&forest(&[1]), Reward::default(), &[0.0]);
        assert_eq!(lone, "row 0: expected two or more ranked responses");
        let reward = Reward { use_margin: true, ..Reward::default() };
        assert_eq!(refused(&forest(&[2]), reward, &[0.0, 1.0]), "row 0: no margin");
    }
}
