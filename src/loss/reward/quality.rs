//! Held-out metrics of a reward model beyond means: accuracy by pair difficulty, calibration, and correlation of score
//! with length.

use crate::loss::sigmoid;

/// One evaluation record.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Observation {
    /// A response's score and its length in tokens.
    Score {
        /// The score.
        score: f64,
        /// Trained tokens.
        length: f64,
    },
    /// Two responses to one prompt.
    Pair {
        /// The better one's score less the other's.
        gap: f64,
        /// The row's margin, if given.
        margin: Option<f64>,
    },
    /// One attribute rating of a response.
    Rating {
        /// Attribute index.
        attribute: usize,
        /// The score.
        predicted: f64,
        /// The row's rating.
        given: f64,
        /// Trained tokens of the response.
        length: f64,
    },
    /// A response or step that is right or wrong.
    Truth {
        /// Predicted log odds of right.
        odds: f64,
        /// The row's label.
        right: bool,
    },
}

/// Number of bins of a calibration curve.
const BINS: usize = 10;
/// With more distinct margins than this, pairs are split into quartiles instead.
const LEVELS: usize = 6;

/// All metrics by name. `attributes` names the indices in [`Observation::Rating`].
pub(super) fn summarize(observations: &[Observation], attributes: &[String]) -> Vec<(String, f64)> {
    let (mut scores, mut pairs, mut truths) = (Vec::new(), Vec::new(), Vec::new());
    let mut ratings = vec![Vec::new(); attributes.len()];
    let mut lengths = ratings.clone();
    for seen in observations {
        match *seen {
            Observation::Score { score, length } => scores.push((score, length)),
            Observation::Pair { gap, margin } => pairs.push((gap, margin)),
            Observation::Rating { attribute, predicted, given, length } => {
                ratings[attribute].push((predicted, given));
                lengths[attribute].push((predicted, length));
            }
            Observation::Truth { odds, right } => truths.push((odds, right)),
        }
    }
    let mut numbers = Vec::new();
    let mut put = |name: &str, value: f64| numbers.push((name.to_owned(), value));
    if let Some(r) = pearson(&scores) {
        put("length/pearson", r);
    }
    if let Some(r) = pearson(&as_ranks(&scores)) {
        put("length/spearman", r);
    }
    for (attribute, points) in attributes.iter().zip(&lengths) {
        if let Some(r) = pearson(points) {
            put(&format!("length/pearson/{attribute}"), r);
        }
        if let Some(r) = pearson(&as_ranks(points)) {
            put(&format!("length/spearman/{attribute}"), r);
        }
    }
    for (attribute, seen) in attributes.iter().zip(&ratings).filter(|(_, seen)| !seen.is_empty()) {
        let square = |(predicted, given): &(f64, f64)| (predicted - given).powi(2);
        put(&format!("mse/{attribute}"), mean(seen.iter().map(square)));
        if let Some(r) = pearson(seen) {
            put(&format!("pearson/{attribute}"), r);
        }
    }
    by_level(&pairs, &mut put);
    // Pair order is not a prediction; the higher-scored response is, with probability of at least 0.5.
    let likelier: Vec<(f64, bool)> =
        pairs.iter().map(|(gap, _)| (sigmoid(gap.abs()), *gap > 0.0)).collect();
    calibration(&likelier, 0.5, &mut put);
    let right: Vec<(f64, bool)> =
        truths.iter().map(|(odds, right)| (sigmoid(*odds), *right)).collect();
    calibration(&right, 0.0, &mut put);
    if !truths.is_empty() {
        put("base_rate", mean(truths.iter().map(|(_, right)| f64::from(u8::from(*right)))));
    }
    numbers
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1) as f64;
    values.sum::<f64>() / count
}

/// Accuracy per distinct margin; per quartile of the margin if there are many; or per quartile of the predicted gap
/// (smallest first) if rows have no margins.
fn by_level(pairs: &[(f64, Option<f64>)], put: &mut impl FnMut(&str, f64)) {
    let labelled = !pairs.is_empty() && pairs.iter().all(|(_, margin)| margin.is_some());
    let clear =
        |&(gap, margin): &(f64, Option<f64>)| margin.filter(|_| labelled).unwrap_or(gap.abs());
    let mut sorted = pairs.to_vec();
    sorted.sort_by(|a, b| clear(a).total_cmp(&clear(b)));
    let right = |part: &[(f64, Option<f64>)]| {
        mean(part.iter().map(|(gap, _)| f64::from(u8::from(*gap > 0.0))))
    };
    let levels: Vec<_> = sorted.chunk_by(|a, b| clear(a).total_cmp(&clear(b)).is_eq()).collect();
    if labelled && levels.len() <= LEVELS {
        for part in levels {
            put(&format!("accuracy/margin={}", clear(&part[0])), right(part));
        }
    } else if sorted.len() >= 4 {
        let what = if labelled { "margin" } else { "gap" };
        for quarter in 0..4 {
            let part = &sorted[quarter * sorted.len() / 4..(quarter + 1) * sorted.len() / 4];
            put(&format!("accuracy/{what}-q{}", quarter + 1), right(part));
        }
    }
}

/// Calibration curve over equal bins from `lowest` to 1 (mean predicted probability against observed frequency), and
/// the expected calibration error (Naeini et al., 2015).
fn calibration(predictions: &[(f64, bool)], lowest: f64, put: &mut impl FnMut(&str, f64)) {
    if predictions.is_empty() {
        return;
    }
    let width = (1.0 - lowest) / BINS as f64;
    let mut bins = vec![Vec::new(); BINS];
    for &(probability, true_) in predictions {
        let bin = ((probability - lowest) / width) as usize;
        bins[bin.min(BINS - 1)].push((probability, f64::from(u8::from(true_))));
    }
    let mut distance = 0.0;
    for (at, bin) in bins.iter().enumerate().filter(|(_, bin)| !bin.is_empty()) {
        let low = lowest + at as f64 * width;
        let name = |what: &str| format!("calibration/{low:.2}-{:.2}/{what}", low + width);
        let (predicted, right) =
            (mean(bin.iter().map(|(p, _)| *p)), mean(bin.iter().map(|(_, right)| *right)));
        put(&name("count"), bin.len() as f64);
        put(&name("predicted"), predicted);
        put(&name("right"), right);
        distance += bin.len() as f64 * (predicted - right).abs();
    }
    put("calibration_error", distance / predictions.len() as f64);
}

/// Pearson correlation; `None` if either side is constant.
fn pearson(points: &[(f64, f64)]) -> Option<f64> {
    let (x, y) = (mean(points.iter().map(|p| p.0)), mean(points.iter().map(|p| p.1)));
    let (mut both, mut of_x, mut of_y) = (0.0, 0.0, 0.0);
    for (a, b) in points {
        both += (a - x) * (b - y);
        of_x += (a - x).powi(2);
        of_y += (b - y).powi(2);
    }
    (of_x > 0.0 && of_y > 0.0).then(|| both / (of_x * of_y).sqrt())
}

/// Replaces both sides by their ranks, ties averaged. The Pearson correlation of the result is Spearman's.
fn as_ranks(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let ranks = |value: fn(&(f64, f64)) -> f64| {
        let mut sorted: Vec<f64> = points.iter().map(value).collect();
        sorted.sort_by(f64::total_cmp);
        let rank = |x: f64| {
            let low = sorted.partition_point(|other| *other < x);
            let high = sorted.partition_point(|other| *other <= x);
            f64::midpoint(low as f64, high as f64)
        };
        points.iter().map(|point| rank(value(point))).collect::<Vec<f64>>()
    };
    ranks(|p| p.0).into_iter().zip(ranks(|p| p.1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(observations: &[Observation], expected: &[(&str, f64)]) {
        let names = ["helpful".to_owned()];
        let found = summarize(
            observations,
            &names[..usize::from(expected.iter().any(|(n, _)| n.contains("helpful")))],
        );
        let shown: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(shown, expected.iter().map(|(name, _)| *name).collect::<Vec<_>>());
        for ((name, value), (_, expected)) in found.iter().zip(expected) {
            assert!((value - expected).abs() < 1e-9, "{name}: {value}, expected {expected}");
        }
    }

    /// Four pairs predicted with probability ¾, three of them right.
    #[test]
    fn pair_accuracy_is_grouped_by_margin_and_confidence() {
        let odds = 3_f64.ln();
        let pair = |gap: f64, margin: f64| Observation::Pair { gap, margin: Some(margin) };
        let pairs = [pair(odds, 3.0), pair(odds, 1.0), pair(-odds, 1.0), pair(odds, 3.0)];
        check(
            &pairs,
            &[
                ("accuracy/margin=1", 0.5),
                ("accuracy/margin=3", 1.0),
                ("calibration/0.75-0.80/count", 4.0),
                ("calibration/0.75-0.80/predicted", 0.75),
                ("calibration/0.75-0.80/right", 0.75),
                ("calibration_error", 0.0),
            ],
        );
    }

    #[test]
    fn without_margins_accuracy_is_grouped_by_quarters_of_the_gap() {
        let gaps = [0.1, -0.2, -1.0, 1.5, 4.0, 5.0, 90.0, 100.0];
        let pairs = gaps.map(|gap| Observation::Pair { gap, margin: None });
        let found = summarize(&pairs, &[]);
        let quarters: Vec<f64> = found[..4].iter().map(|(_, value)| *value).collect();
        assert_eq!(found[0].0, "accuracy/gap-q1");
        assert_eq!(quarters, [0.5, 0.5, 1.0, 1.0]);
        let (name, certain) = &found[found.len() - 3];
        assert_eq!((name.as_str(), *certain), ("calibration/0.95-1.00/predicted", *certain));
        assert!(*certain > 0.99);
    }

    /// One confident mistake and one confident hit in the outer bins.
    #[test]
    fn predictions_of_labels_are_binned_from_zero_to_one() {
        let truth = |odds: f64, right: bool| Observation::Truth { odds, right };
        check(
            &[truth(-800.0, true), truth(800.0, true)],
            &[
                ("calibration/0.00-0.10/count", 1.0),
                ("calibration/0.00-0.10/predicted", 0.0),
                ("calibration/0.00-0.10/right", 1.0),
                ("calibration/0.90-1.00/count", 1.0),
                ("calibration/0.90-1.00/predicted", 1.0),
                ("calibration/0.90-1.00/right", 1.0),
                ("calibration_error", 0.5),
                ("base_rate", 1.0),
            ],
        );
    }

    /// A monotone curve: rank correlation is 1, Pearson's is not. Two equal lengths share rank 1.5.
    #[test]
    fn length_correlations_cover_both_values_and_ranks() {
        let points = [(1.0, 1.0), (2.0, 1.0), (3.0, 4.0)];
        let seen = points.map(|(score, length)| Observation::Score { score, length });
        let r = 0.75_f64.sqrt();
        check(&seen, &[("length/pearson", r), ("length/spearman", r)]);
        let rating = |predicted: f64, given: f64, length: f64| Observation::Rating {
            attribute: 0,
            predicted,
            given,
            length,
        };
        check(
            &[rating(1.0, 2.0, 9.0), rating(2.0, 4.0, 7.0)],
            &[
                ("length/pearson/helpful", -1.0),
                ("length/spearman/helpful", -1.0),
                ("mse/helpful", 2.5),
                ("pearson/helpful", 1.0),
            ],
        );
        let flat =
            [(1.0, 5.0), (2.0, 5.0)].map(|(score, length)| Observation::Score { score, length });
        check(&flat, &[]);
    }
}
