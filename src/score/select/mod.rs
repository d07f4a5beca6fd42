//! Rejection sampling's choice: good candidates become training rows, better and worse ones become pairs.
//!
//! Pure functions over rows. A candidate that was cut off by length or that a verifier refused is never preferred.
//! Equal scores are settled by the order in which the candidates were drawn, or by a draw from the stage's seed.

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

/// Which candidates become pairs. In each pair the better one may win (it is finished and no verifier refused it) and
/// the scores are at least `min_margin` apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PairStrategy {
    /// The best with the worst, the second best with the second worst, …
    #[default]
    #[serde(alias = "max_min")]
    BestWorst,
    /// The best with lower ones drawn at random (Tulu 3).
    #[serde(alias = "max_random")]
    BestRandom,
    /// The best with the next best, then with the one after it, …
    #[serde(alias = "max_max")]
    BestSecond,
    /// The pairs that are furthest apart, whoever is in them.
    MaxMinMargin,
    /// Every pair, whatever `pairs_per_prompt` says.
    AllAboveMargin,
}

/// Which candidates become training rows, among those that may win and have `min_score`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SftStrategy {
    /// The best of each prompt.
    #[default]
    BestOf,
    /// The best of those whose final answer most candidates give (self-consistency, Wang et al. 2022).
    #[serde(alias = "majority_vote", alias = "self_consistency")]
    Majority,
    /// The best share of all candidates of all prompts.
    TopQuantile,
}

/// What to choose.
#[derive(Clone, Debug)]
pub struct Rules {
    /// How pairs are made.
    pub pairs: PairStrategy,
    /// How training rows are chosen.
    pub sft: SftStrategy,
    /// A training row needs at least this score.
    pub min_score: f64,
    /// A pair needs at least this distance between its scores; never 0.
    pub min_margin: f64,
    /// Best candidates a prompt that become training rows; `TopQuantile` takes as many as are among the best.
    pub best_of: usize,
    /// Pairs a prompt.
    pub pairs_per_prompt: usize,
    /// `TopQuantile`: the share of all different candidates that is kept.
    pub top_quantile: f64,
    /// `Majority`: share of the votes that an answer needs.
    pub min_agreement: f64,
    /// `Majority`: where the final answer stands.
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
    /// Refuses values that choose nothing, and those that the chosen strategy would not look at.
    ///
    /// # Errors
    /// Names the key, its value and what was expected.
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

/// Why a prompt gave no pair, or what it gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// At least one pair.
    Paired,
    /// All candidates say the same.
    Identical,
    /// No candidate may be preferred: verifiers refused them, or all were cut off.
    AllFailed,
    /// No two candidates' scores are far enough apart.
    TooClose,
}

/// What was chosen for one prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// Training rows, best first.
    pub sft: Vec<SftRow>,
    /// Pairs, in the order of the strategy.
    pub pairs: Vec<PairRow>,
    /// Whether and why.
    pub outcome: Outcome,
    /// Candidates without a text, which are in neither: no stage would learn from them.
    pub empty: usize,
}

/// Chooses for every prompt, in the order of the prompts.
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

/// Whether a candidate may become a training row.
fn is_eligible(candidate: &Candidate, rules: &Rules) -> bool {
    candidate.may_win() && candidate.score >= rules.min_score
}

/// Whether nothing was said before the turn ended.
fn is_empty(candidate: &Candidate) -> bool {
    candidate.text.trim().is_empty()
}

/// Different texts but for the empty one, best first, of equal scores the first drawn. Of equal texts one that may win, then the best scored,
/// then the first drawn: an answer that was cut off must not hide the same answer finished.
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
