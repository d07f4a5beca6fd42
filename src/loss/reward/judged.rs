//! Reward losses against absolute labels: attribute ratings, or right/wrong.

use super::bradley_terry;
use super::quality::{self, Observation};
use crate::data::forest::{End, Forest};
use crate::error::{Error, Result};
use crate::loss::{Mean, Objective, Reading, Readout, StepTotals, Weighed, sigmoid};

/// Regression on attribute ratings, one head output per attribute: mean squared error over the ratings present
/// (HelpSteer, Wang et al., 2023).
#[derive(Clone, Debug, Default)]
pub struct Regression {
    /// Attribute names, in the order of the head's outputs.
    pub attributes: Vec<String>,
}

impl Regression {
    /// (score index, attribute index, rating) of every rating present.
    fn given<'a>(&self, forest: &'a Forest) -> impl Iterator<Item = (usize, usize, f64)> + 'a {
        let width = self.attributes.len();
        forest.ends.iter().enumerate().flat_map(move |(at, end)| {
            let ratings = end.label.iter().take(width).enumerate();
            ratings.filter_map(move |(attribute, rating)| {
                Some((at * width + attribute, attribute, (*rating)?))
            })
        })
    }
}

impl Objective for Regression {
    fn readout(&self) -> Readout {
        Readout::Scores
    }

    fn terms(&self) -> Vec<(&'static str, f64)> {
        vec![("mse", 1.0)]
    }

    fn counts(&self, forest: &Forest) -> Vec<f64> {
        vec![self.given(forest).count() as f64]
    }

    fn for_forest(&self, _: &Forest) -> Result<Box<dyn Objective>> {
        Ok(Box::new(self.clone()))
    }

    fn weigh(&self, forest: &Forest, reading: Reading<'_>, totals: &StepTotals) -> Result<Weighed> {
        let scores = reading.values;
        let (mut d_values, mut sum, mut absolute) = (vec![0.0_f32; scores.len()], 0.0, 0.0);
        for (output, _, rating) in self.given(forest) {
            let error = f64::from(scores[output]) - rating;
            sum += error * error;
            absolute += error.abs();
            d_values[output] = (2.0 * error / totals.counts[0]) as f32;
        }
        let count = self.given(forest).count() as f64;
        let metrics = vec![Mean { name: "mae", sum: absolute, count }];
        Ok(Weighed { d_values, sums: vec![sum], metrics })
    }

    fn observe(&self, forest: &Forest, scores: &[f32]) -> Vec<Observation> {
        let width = self.attributes.len();
        let rating = |(output, attribute, given): (usize, usize, f64)| Observation::Rating {
            attribute,
            predicted: f64::from(scores[output]),
            given,
            length: forest.ends[output / width].length as f64,
        };
        self.given(forest).map(rating).collect()
    }

    fn summarize(&self, observations: &[Observation]) -> Vec<(String, f64)> {
        quality::summarize(observations, &self.attributes)
    }
}

/// Right/wrong classification at the end of a response (outcome reward, Cobbe et al., 2021) or of each step (process
/// reward, Lightman et al., 2023; TRL's `PRMTrainer`): mean cross-entropy over the labelled ends.
#[derive(Clone, Copy, Debug)]
pub struct Correctness {
    /// Number of head outputs: 1, the log odds of right; or 2, logits for wrong and right.
    pub outputs: usize,
}

impl Correctness {
    /// Log odds of right at each end, from `scores` of shape `[ends, outputs]`.
    ///
    /// ```
    /// use arriero::loss::reward::Correctness;
    /// assert_eq!(Correctness { outputs: 2 }.log_odds(&[0.5, 2.0, 1.0, -1.0]), [1.5, -2.0]);
    /// ```
    pub fn log_odds(self, scores: &[f32]) -> Vec<f64> {
        let of_end = |scores: &[f32]| match scores {
            [wrong, right] => f64::from(*right) - f64::from(*wrong),
            other => other.iter().copied().map(f64::from).sum(),
        };
        scores.chunks(self.outputs).map(of_end).collect()
    }
}

/// The row's label: right or wrong.
fn truth(end: &End) -> Option<bool> {
    end.label.first().copied().flatten().map(|label| label > 0.5)
}

impl Objective for Correctness {
    fn readout(&self) -> Readout {
        Readout::Scores
    }

    fn terms(&self) -> Vec<(&'static str, f64)> {
        vec![("cross_entropy", 1.0)]
    }

    fn counts(&self, forest: &Forest) -> Vec<f64> {
        vec![forest.ends.len() as f64]
    }

    fn for_forest(&self, _: &Forest) -> Result<Box<dyn Objective>> {
        Ok(Box::new(*self))
    }

    fn weigh(&self, forest: &Forest, reading: Reading<'_>, totals: &StepTotals) -> Result<Weighed> {
        let scores = reading.values;
        let mut d_values = Vec::with_capacity(scores.len());
        let (mut sum, mut hits, mut probability) = (0.0, 0.0, 0.0);
        for (end, odds) in forest.ends.iter().zip(self.log_odds(scores)) {
            let right = truth(end).ok_or_else(|| {
                Error::run("no label").at(format!("row {}", forest.sources[end.tree]))
            })?;
            let sign = if right { 1.0 } else { -1.0 };
            let (loss, slope) = bradley_terry(sign * odds);
            let slope = (sign * slope / totals.counts[0]) as f32;
            if self.outputs == 2 {
                d_values.push(-slope);
            }
            d_values.push(slope);
            sum += loss;
            hits += f64::from(u8::from((odds > 0.0) == right));
            probability += sigmoid(odds);
        }
        let mean = |name, sum| Mean { name, sum, count: forest.ends.len() as f64 };
        let metrics = vec![mean("accuracy", hits), mean("probability", probability)];
        Ok(Weighed { d_values, sums: vec![sum], metrics })
    }

    fn observe(&self, forest: &Forest, scores: &[f32]) -> Vec<Observation> {
        let ends = || forest.ends.iter().zip(self.log_odds(scores));
        let truths =
            ends().filter_map(|(end, odds)| Some(Observation::Truth { odds, right: truth(end)? }));
        // How long a step is says nothing of how long the answer is.
        let answers = ends().filter(|_| self.outputs == 1);
        let scores =
            answers.map(|(end, score)| Observation::Score { score, length: end.length as f64 });
        truths.chain(scores).collect()
    }

    fn summarize(&self, observations: &[Observation]) -> Vec<(String, f64)> {
        quality::summarize(observations, &[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tree::{Label, Role, Tree};

    fn forest(labels: Vec<Label>) -> Forest {
        let part = || (vec![7, 2], vec![Role::Content; 2]);
        let parts = labels.iter().map(|_| part()).collect();
        Forest::pack(&[Tree::chain(vec![1, 5], parts, 4).labelled(labels)]).unwrap()
    }

    /// Checks the loss, and its gradient by finite differences.
    #[track_caller]
    fn check(objective: &dyn Objective, forest: &Forest, scores: &[f32], expected: f64) {
        let totals = StepTotals { counts: objective.counts(forest), statistics: Vec::new() };
        let loss = |scores: &[f32]| {
            objective.weigh(forest, scores.into(), &totals).unwrap().sums[0] / totals.counts[0]
        };
        assert!((loss(scores) - expected).abs() < 1e-7, "{}, expected {expected}", loss(scores));
        let d_values = objective.weigh(forest, scores.into(), &totals).unwrap().d_values;
        assert_eq!(d_values.len(), scores.len());
        for at in 0..scores.len() {
            let moved = |h: f32| {
                let mut scores = scores.to_vec();
                scores[at] += h;
                loss(&scores)
            };
            let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            assert!((slope - f64::from(d_values[at])).abs() < 1e-4, "{at}: {slope} {d_values:?}");
        }
    }

    /// Errors 1, −0.5 and 2 on three ratings; the fourth is missing.
    #[test]
    fn missing_ratings_do_not_contribute() {
        let attributes = ["helpfulness", "verbosity"].map(str::to_owned).to_vec();
        let forest = forest(vec![vec![Some(3.0), Some(2.5)], vec![Some(0.0), None]]);
        let scores = [4.0, 2.0, 2.0, 77.0];
        check(&Regression { attributes }, &forest, &scores, (1.0 + 0.25 + 4.0) / 3.0);
    }

    /// Log odds ln 3 twice: one label right (p = ¾), one wrong (p = ¼).
    #[test]
    fn cross_entropy_is_the_same_for_one_and_two_outputs() {
        let forest = forest(vec![vec![Some(1.0)], vec![Some(0.0)]]);
        let (odds, expected) = (3_f32.ln(), 0.5 * ((4.0_f64 / 3.0).ln() + 4_f64.ln()));
        check(&Correctness { outputs: 1 }, &forest, &[odds, odds], expected);
        check(&Correctness { outputs: 2 }, &forest, &[0.5, 0.5 + odds, -1.0, odds - 1.0], expected);
    }

    #[test]
    fn loss_of_a_certain_mistake_is_finite() {
        let forest = forest(vec![vec![Some(0.0)]]);
        let totals = StepTotals { counts: vec![1.0], statistics: Vec::new() };
        let weighed =
            Correctness { outputs: 1 }.weigh(&forest, [1e4].as_slice().into(), &totals).unwrap();
        assert_eq!((weighed.sums[0], weighed.d_values[0]), (1e4, 1.0));
    }

    #[test]
    fn missing_label_is_refused_with_its_row() {
        let totals = StepTotals { counts: vec![1.0], statistics: Vec::new() };
        let error = Correctness { outputs: 1 }.weigh(
            &forest(vec![vec![None]]),
            [0.0].as_slice().into(),
            &totals,
        );
        assert_eq!(error.unwrap_err().to_string(), "row 4: no label");
    }
}
