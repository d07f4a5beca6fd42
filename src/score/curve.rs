//! Best-of-k curves for every k: exact expectations over all subsets, without resampling.
//!
//! `pass@k` is the unbiased estimate of Chen et al. (2021). The best-of-k expectation weighs each answer by the
//! fraction of size-k subsets in which it ranks first. Each point also bounds the divergence of that choice from the
//! policy: KL ≤ ln k − (k − 1) / k (Beirami et al. 2024; equality if no two answers tie).

use serde::{Deserialize, Serialize};

use super::statistics::{Distribution, Estimate};

/// Name of the curve's file in a stage's directory.
pub const CURVE: &str = "curve.json";

/// One answer to a prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// Selection score; higher is better.
    pub score: f64,
    /// Whether the verifiers accept it; `None` without verifiers.
    pub passed: Option<bool>,
}

/// The curve at one k.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Number of answers to choose from.
    pub k: usize,
    /// Upper bound on KL(best-of-k ‖ policy), in nats.
    pub kl_bound: f64,
    /// Expected score of the chosen answer.
    pub score: Estimate,
    /// Fraction of prompts whose chosen answer is right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<Estimate>,
    /// Fraction of prompts with a right answer among the k: the accuracy of a perfect choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pass_at_k: Option<Estimate>,
}

/// `curve.json`: best of k over all prompts, and the score distribution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// Selection criterion: `reward` or `score`.
    pub choice: String,
    /// Number of prompts.
    pub prompts: usize,
    /// Fewest answers of any prompt.
    pub samples: usize,
    /// k = 1, 2, 4, … and `samples`.
    pub points: Vec<Point>,
    /// Distribution of all answers' scores.
    pub scores: Distribution,
}

impl Curve {
    /// The curve over these prompts' answers, equally weighted; `None` if a prompt has no answers.
    pub fn of(prompts: &[Vec<Drawn>], choice: &str) -> Option<Self> {
        let samples = prompts.iter().map(Vec::len).min()?;
        let scores = prompts.iter().flatten().map(|drawn| drawn.score).collect();
        let mut ks: Vec<usize> =
            std::iter::successors(Some(1), |k| Some(k * 2)).take_while(|k| *k < samples).collect();
        ks.push(samples);
        let points = ks.into_iter().map(|k| point(prompts, k)).collect::<Option<Vec<_>>>()?;
        let scores = Distribution::of(scores)?;
        Some(Self { choice: choice.to_owned(), prompts: prompts.len(), samples, points, scores })
    }

    /// The point with the largest k.
    pub fn last(&self) -> Option<&Point> {
        self.points.last()
    }
}

fn point(prompts: &[Vec<Drawn>], k: usize) -> Option<Point> {
    let of_each = |value: &dyn Fn(&Drawn) -> f64| -> Vec<f64> {
        prompts.iter().map(|drawn| best_of_k(drawn, k, value)).collect()
    };
    let share = |values: Vec<f64>| {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        // Rounding may push sums of exact fractions above 1.
        Estimate::share(mean.clamp(0.0, 1.0), values.len())
    };
    let verified = prompts.iter().flatten().all(|drawn| drawn.passed.is_some());
    let passes = |drawn: &Vec<Drawn>| {
        pass_at_k(drawn.len(), drawn.iter().filter(|one| one.passed == Some(true)).count(), k)
    };
    Some(Point {
        k,
        kl_bound: kl_bound(k),
        score: Estimate::of_mean(&of_each(&|drawn| drawn.score))?,
        accuracy: verified
            .then(|| share(of_each(&|drawn| f64::from(u8::from(drawn.passed == Some(true)))))),
        pass_at_k: verified.then(|| share(prompts.iter().map(passes).collect())),
    })
}

/// Probability that at least one of k answers is right, given `right` of `n` (Chen et al., 2021, eq. 1):
/// `1 − C(n − right, k) / C(n, k)`. `k` is at most `n`.
///
/// ```
/// use arriero::score::curve::pass_at_k;
/// // Of the 6 pairs of 4 answers one holds neither of the 2 right ones.
/// assert!((pass_at_k(4, 2, 2) - 5.0 / 6.0).abs() < 1e-12);
/// assert_eq!((pass_at_k(4, 0, 4), pass_at_k(4, 1, 4)), (0.0, 1.0));
/// ```
pub fn pass_at_k(n: usize, right: usize, k: usize) -> f64 {
    if n - right < k {
        return 1.0;
    }
    // A product of factors below 1; the binomials would overflow.
    let none: f64 = (n - right + 1..=n).map(|i| 1.0 - k as f64 / i as f64).product();
    1.0 - none
}

/// Expected `value` of the best-scored of k answers drawn from `drawn` without replacement; k is at most their number.
/// Ties are equally likely to be chosen.
///
/// ```
/// use arriero::score::curve::{Drawn, best_of_k};
/// let drawn = [3.0, 1.0, 2.0].map(|score| Drawn { score, passed: None });
/// // Best of 2: 3 in two of the three pairs, 2 in the third.
/// assert!((best_of_k(&drawn, 2, &|one| one.score) - 8.0 / 3.0).abs() < 1e-12);
/// ```
pub fn best_of_k(drawn: &[Drawn], k: usize, value: &dyn Fn(&Drawn) -> f64) -> f64 {
    let n = drawn.len();
    let mut ranked: Vec<&Drawn> = drawn.iter().collect();
    ranked.sort_by(|a, b| b.score.total_cmp(&a.score));
    // Fraction of subsets in which the answer of this rank is the best: C(n − rank, k − 1) / C(n, k), rank from 1.
    let mut share = k as f64 / n as f64;
    let mut expected = 0.0;
    let mut rank = 1;
    for equals in ranked.chunk_by(|a, b| a.score.total_cmp(&b.score).is_eq()) {
        let mut of_group = 0.0;
        for _ in equals {
            of_group += share;
            let left = (n + 1).saturating_sub(rank + k) as f64;
            share = if rank < n { share * left / (n - rank) as f64 } else { 0.0 };
            rank += 1;
        }
        let mean = equals.iter().map(|one| value(one)).sum::<f64>() / equals.len() as f64;
        expected += of_group * mean;
    }
    expected
}

/// `ln k − (k − 1) / k`, in nats.
pub fn kl_bound(k: usize) -> f64 {
    let k = k as f64;
    k.ln() - (k - 1.0) / k
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// By enumerating all subsets of size k, with ties shared equally.
    fn by_enumeration(drawn: &[Drawn], k: usize) -> (f64, f64, f64) {
        let (mut score, mut right, mut any, mut subsets) = (0.0, 0.0, 0.0, 0.0);
        for mask in 0_u32..1 << drawn.len() {
            if mask.count_ones() as usize != k {
                continue;
            }
            let subset: Vec<&Drawn> =
                (0..drawn.len()).filter(|i| mask >> i & 1 == 1).map(|i| &drawn[i]).collect();
            let best = subset.iter().map(|one| one.score).fold(f64::MIN, f64::max);
            let tied: Vec<_> = subset.iter().filter(|one| one.score >= best).collect();
            let passed = tied.iter().filter(|one| one.passed == Some(true)).count();
            score += best;
            right += passed as f64 / tied.len() as f64;
            any += f64::from(u8::from(subset.iter().any(|one| one.passed == Some(true))));
            subsets += 1.0;
        }
        (score / subsets, right / subsets, any / subsets)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn expectations_match_enumeration_of_all_subsets(
            parts in prop::collection::vec((0_u8..5, any::<bool>()), 1..8),
            k in 1_usize..8,
        ) {
            let k = k.min(parts.len());
            let drawn: Vec<Drawn> = parts
                .iter()
                .map(|&(score, passed)| Drawn { score: f64::from(score), passed: Some(passed) })
                .collect();
            let (score, right, any) = by_enumeration(&drawn, k);
            let passed = |one: &Drawn| f64::from(u8::from(one.passed == Some(true)));
            prop_assert!((best_of_k(&drawn, k, &|one| one.score) - score).abs() < 1e-9);
            prop_assert!((best_of_k(&drawn, k, &passed) - right).abs() < 1e-9);
            let count = drawn.iter().filter(|one| one.passed == Some(true)).count();
            prop_assert!((pass_at_k(drawn.len(), count, k) - any).abs() < 1e-9);
        }
    }

    #[test]
    fn curve_ends_at_the_smallest_answer_count_and_grows_with_k() {
        let prompt = |n: u32| -> Vec<Drawn> {
            (0..n).map(|i| Drawn { score: f64::from(i), passed: Some(i == 0) }).collect()
        };
        let curve = Curve::of(&[prompt(6), prompt(8)], "reward").unwrap();
        let ks: Vec<usize> = curve.points.iter().map(|point| point.k).collect();
        assert_eq!((ks, curve.samples, curve.prompts), (vec![1, 2, 4, 6], 6, 2));
        assert!(curve.points.windows(2).all(|two| two[0].score.mean < two[1].score.mean));
        assert_eq!(curve.points[0].kl_bound.to_bits(), 0.0_f64.to_bits());
        let last = curve.last().unwrap();
        // The worst-scored answer is the right one: it is never chosen from more than one answer.
        assert!(last.accuracy.unwrap().mean < 1e-12 && last.pass_at_k.unwrap().mean > 0.8);
        assert_eq!(curve.scores.count, 14);
        assert!(Curve::of(&[], "score").is_none() && Curve::of(&[vec![]], "score").is_none());
        let unjudged = vec![Drawn { score: 1.0, passed: None }];
        assert_eq!(Curve::of(&[unjudged], "score").unwrap().points[0].accuracy, None);
    }

    #[test]
    fn large_answer_counts_do_not_overflow() {
        assert!((pass_at_k(100_000, 10, 1000) - 0.0956).abs() < 1e-3);
        let drawn: Vec<Drawn> =
            (0..5000).map(|i| Drawn { score: f64::from(i), passed: None }).collect();
        assert!((best_of_k(&drawn, 4999, &|one| one.score) - 4998.9998).abs() < 1e-6);
    }
}
