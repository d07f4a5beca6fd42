//! Selection for rejection sampling: good candidates become SFT rows, better/worse ones preference pairs.
//!
//! Pure functions over rows. A candidate truncated by length or rejected by a verifier is never preferred. Ties are
//! broken by sampling order, or by a draw from the stage's seed.

mod majority;
mod pairs;
mod quantile;
mod rows;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use super::candidates::{Candidate, Candidates};
use crate::error::{Error, Result};
use crate::rng::Stream;
pub use majority::AnswerReader;
pub use rows::{PairRow, SftRow};

/// Which candidates form pairs. The better one must be eligible to win (finished, not rejected by a verifier), and
/// scores must differ by at least `min_margin`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PairStrategy {
    /// Best with worst, second best with second worst, …
    #[default]
    #[serde(alias = "max_min")]
    BestWorst,
    /// The best with randomly drawn lower ones (Tulu 3).
    #[serde(alias = "max_random")]
    BestRandom,
    /// The best with the second best, then with the third, …
    #[serde(alias = "max_max")]
    BestSecond,
    /// The pairs with the largest margins, over all candidates.
    MaxMinMargin,
    /// Every pair, regardless of `pairs_per_prompt`.
    AllAboveMargin,
}

/// Which candidates become SFT rows, among those eligible to win with at least `min_score`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SftStrategy {
    /// The best of each prompt.
    #[default]
    BestOf,
    /// The best of those with the most frequent final answer (self-consistency, Wang et al. 2022).
    #[serde(alias = "majority_vote", alias = "self_consistency")]
    Majority,
    /// The top fraction of all candidates over all prompts.
    TopQuantile,
}

/// Selection rules.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Pairing strategy.
    pub pairs: PairStrategy,
    /// SFT row strategy.
    pub sft: SftStrategy,
    /// Minimum score of an SFT row.
    pub min_score: f64,
    /// Minimum score difference of a pair; never 0.
    pub min_margin: f64,
    /// Number of best candidates per prompt that become SFT rows; unlimited for `TopQuantile`.
    pub best_of: usize,
    /// Pairs per prompt.
    pub pairs_per_prompt: usize,
    /// `TopQuantile`: fraction of all distinct candidates to keep.
    pub top_quantile: f64,
    /// `Majority`: minimum fraction of votes for an answer.
    pub min_agreement: f64,
    /// `Majority`: how to find the final answer.
    pub answers: AnswerReader,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            pairs: PairStrategy::default(),
            sft: SftStrategy::default(),
            min_score: f64::MIN,
            min_margin: 0.0,
            best_of: 1,
            pairs_per_prompt: 1,
            top_quantile: 0.1,
            min_agreement: 0.0,
            answers: AnswerReader::default(),
            seed: 0,
        }
    }
}

impl Rules {
    /// Rejects values that select nothing, and those that the chosen strategy ignores.
    ///
    /// # Errors
    /// Names the key, its value and the expected range.
    pub fn check(&self) -> Result<()> {
        let unused = |key: &str, strategy: &str| {
            Err(Error::usage(format!("`{key}` without `sft_strategy = \"{strategy}\"`"))
                .hint("nothing else looks at it: leave one of the two out, or choose so"))
        };
        if !(self.top_quantile > 0.0 && self.top_quantile <= 1.0) {
            let share = self.top_quantile;
            return Err(Error::usage(format!(
                "`top_quantile` is {share}, expected more than 0 and at most 1"
            ))
            .hint("0.1 keeps the best tenth"));
        }
        if !(0.0..=1.0).contains(&self.min_agreement) {
            let share = self.min_agreement;
            return Err(Error::usage(format!("`min_agreement` is {share}, expected 0 to 1")));
        }
        if !self.min_margin.is_finite() || self.min_margin < 0.0 {
            let margin = self.min_margin;
            return Err(Error::usage(format!("`min_margin` is {margin}, expected 0 or more")));
        }
        if self.sft != SftStrategy::Majority {
            if self.min_agreement > 0.0 {
                return unused("min_agreement", "majority");
            }
            if !self.answers.is_default() {
                return unused("answer_pattern", "majority");
            }
        }
        Ok(())
    }
}

/// What a prompt yielded, or why it gave no pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// At least one pair.
    Paired,
    /// All candidates have the same text.
    Identical,
    /// No candidate may be preferred: all were rejected by verifiers or truncated.
    AllFailed,
    /// No two scores differ by enough.
    TooClose,
}

/// The selection for one prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// SFT rows, best first.
    pub sft: Vec<SftRow>,
    /// Pairs, in the strategy's order.
    pub pairs: Vec<PairRow>,
    /// The outcome for pairs.
    pub outcome: Outcome,
    /// Number of candidates without text, which are never selected: no stage could learn from them.
    pub empty: usize,
}

/// Selects for every prompt, in order.
pub fn select(prompts: &[Candidates], rules: &Rules) -> Vec<Selection> {
    let ranked: Vec<Vec<&Candidate>> = prompts.iter().map(|row| ranked(&row.candidates)).collect();
    let kept = match rules.sft {
        SftStrategy::TopQuantile => quantile::best(&ranked, rules),
        SftStrategy::BestOf | SftStrategy::Majority => Vec::new(),
    };
    let partners = Stream::new(rules.seed, "select/partners");
    let choose = |(at, row): (usize, &Candidates)| {
        let ranked = &ranked[at];
        let eligible = || ranked.iter().copied().filter(|one| is_eligible(one, rules));
        let sft = match rules.sft {
            SftStrategy::BestOf => {
                eligible().take(rules.best_of).map(|one| rows::sft_row(row, one, None)).collect()
            }
            SftStrategy::Majority => majority::rows(row, eligible(), rules),
            SftStrategy::TopQuantile => {
                eligible().take(kept[at]).map(|one| rows::sft_row(row, one, None)).collect()
            }
        };
        let pairs: Vec<PairRow> = pairs::choose(ranked, rules, &mut partners.at(0, at as u64))
            .into_iter()
            .map(|(better, worse)| rows::pair_row(row, better, worse))
            .collect();
        let outcome = outcome(ranked, pairs.is_empty());
        let empty = row.candidates.iter().filter(|candidate| is_empty(candidate)).count();
        Selection { sft, pairs, outcome, empty }
    };
    prompts.iter().enumerate().map(choose).collect()
}

fn outcome(ranked: &[&Candidate], no_pairs: bool) -> Outcome {
    if !no_pairs {
        Outcome::Paired
    } else if !ranked.iter().any(|candidate| candidate.may_win()) {
        Outcome::AllFailed
    } else if ranked.len() < 2 {
        Outcome::Identical
    } else {
        Outcome::TooClose
    }
}

/// Whether a candidate may become an SFT row.
fn is_eligible(candidate: &Candidate, rules: &Rules) -> bool {
    candidate.may_win() && candidate.score >= rules.min_score
}

/// Whether the answer is empty.
fn is_empty(candidate: &Candidate) -> bool {
    candidate.text.trim().is_empty()
}

/// Distinct non-empty texts, best first, ties in sampling order. Among duplicates, one that may win is kept, then the
/// best scored, then the first sampled: a truncated answer must not hide the same answer finished.
fn ranked(candidates: &[Candidate]) -> Vec<&Candidate> {
    let mut kept: IndexMap<&str, (usize, &Candidate)> = IndexMap::new();
    for (drawn, candidate) in candidates.iter().enumerate().filter(|(_, one)| !is_empty(one)) {
        let known = kept.entry(candidate.text.trim()).or_insert((drawn, candidate));
        let better = candidate
            .may_win()
            .cmp(&known.1.may_win())
            .then(candidate.score.total_cmp(&known.1.score));
        if better.is_gt() {
            *known = (drawn, candidate);
        }
    }
    let mut ranked: Vec<(usize, &Candidate)> = kept.into_values().collect();
    ranked.sort_by(|a, b| b.1.score.total_cmp(&a.1.score).then(a.0.cmp(&b.0)));
    ranked.into_iter().map(|(_, candidate)| candidate).collect()
}

#[cfg(test)]
mod tests;
