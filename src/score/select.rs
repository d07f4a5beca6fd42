//! Rejection sampling's choice: the best candidates become training rows, best and worst become pairs.
//!
//! Pure functions over rows. A candidate that was cut off by length or that a verifier refused is never preferred.
//! Equal scores are settled by the order in which the candidates were drawn.

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::candidates::{Candidate, Candidates};
use crate::data::record::Message;
use crate::generate::engine::Finish;

/// What to choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// A training row needs at least this score.
    pub min_score: f64,
    /// A pair needs at least this distance between its scores; never 0.
    pub min_margin: f64,
    /// Best candidates a prompt that become training rows.
    pub best_of: usize,
    /// Pairs a prompt: best with worst, second best with second worst, …
    pub pairs_per_prompt: usize,
}

impl Default for Rules {
    fn default() -> Self {
        Self { min_score: f64::MIN, min_margin: 0.0, best_of: 1, pairs_per_prompt: 1 }
    }
}

/// A training row: `messages`, and where it comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SftRow {
    /// The conversation with the chosen answer.
    pub messages: Vec<Message>,
    /// Tool descriptions for the chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Value>,
    /// The right answer; empty where the row has none.
    pub answer: String,
    /// The chosen candidate's weighted score.
    pub score: f64,
    /// Its scores by judge.
    pub scores: IndexMap<String, f64>,
    /// Who drew it.
    pub origin: String,
    /// Every candidate's weighted score, in the order of `candidate_origins`.
    pub candidate_scores: Vec<f64>,
    /// Who drew each candidate.
    pub candidate_origins: Vec<String>,
}

/// A preference pair with message lists, as TRL reads it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairRow {
    /// What was asked.
    pub prompt: Vec<Message>,
    /// The better answer.
    pub chosen: Vec<Message>,
    /// The worse answer.
    pub rejected: Vec<Message>,
    /// Tool descriptions for the chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Value>,
    /// The right answer; empty where the row has none.
    pub answer: String,
    /// Weighted score of the better answer.
    pub score_chosen: f64,
    /// Weighted score of the worse answer.
    pub score_rejected: f64,
    /// The better answer's scores by judge.
    pub scores_chosen: IndexMap<String, f64>,
    /// The worse answer's scores by judge.
    pub scores_rejected: IndexMap<String, f64>,
    /// Who drew the better answer.
    pub origin_chosen: String,
    /// Who drew the worse answer.
    pub origin_rejected: String,
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
    /// Pairs, widest first.
    pub pairs: Vec<PairRow>,
    /// Whether and why.
    pub outcome: Outcome,
}

/// Chooses for one prompt.
pub fn select(row: &Candidates, rules: &Rules) -> Selection {
    let ranked = ranked(&row.candidates);
    let preferable: Vec<&Candidate> = ranked.iter().copied().filter(|c| may_win(c)).collect();
    let sft = preferable
        .iter()
        .filter(|candidate| candidate.score >= rules.min_score)
        .take(rules.best_of)
        .map(|candidate| sft_row(row, candidate))
        .collect();
    let pairs: Vec<PairRow> = preferable
        .iter()
        .zip(ranked.iter().rev())
        .take(rules.pairs_per_prompt)
        .take_while(|(best, worst)| {
            let margin = best.score - worst.score;
            margin > 0.0 && margin >= rules.min_margin
        })
        .map(|(best, worst)| pair_row(row, best, worst))
        .collect();
    let outcome = if !pairs.is_empty() {
        Outcome::Paired
    } else if preferable.is_empty() {
        Outcome::AllFailed
    } else if ranked.len() < 2 {
        Outcome::Identical
    } else {
        Outcome::TooClose
    };
    Selection { sft, pairs, outcome }
}

/// Whether a candidate may be preferred to another.
fn may_win(candidate: &Candidate) -> bool {
    candidate.finish == Finish::Stop && candidate.passed != Some(false)
}

/// Different texts, best first, of equal scores the first drawn. Of equal texts one that may win, then the best scored,
/// then the first drawn: an answer that was cut off must not hide the same answer finished.
fn ranked(candidates: &[Candidate]) -> Vec<&Candidate> {
    let mut kept: IndexMap<&str, (usize, &Candidate)> = IndexMap::new();
    for (drawn, candidate) in candidates.iter().enumerate() {
        let known = kept.entry(candidate.text.trim()).or_insert((drawn, candidate));
        let better = may_win(candidate)
            .cmp(&may_win(known.1))
            .then(candidate.score.total_cmp(&known.1.score));
        if better.is_gt() {
            *known = (drawn, candidate);
        }
    }
    let mut ranked: Vec<(usize, &Candidate)> = kept.into_values().collect();
    ranked.sort_by(|a, b| b.1.score.total_cmp(&a.1.score).then(a.0.cmp(&b.0)));
    ranked.into_iter().map(|(_, candidate)| candidate).collect()
}

fn assistant(candidate: &Candidate) -> Message {
    Message::new("assistant", candidate.text.as_str())
}

fn sft_row(row: &Candidates, chosen: &Candidate) -> SftRow {
    let mut messages = row.prompt.clone();
    messages.push(assistant(chosen));
    SftRow {
        messages,
        tools: row.tools.clone(),
        answer: row.answer.clone(),
        score: chosen.score,
        scores: chosen.scores.clone(),
        origin: chosen.origin.clone(),
        candidate_scores: row.candidates.iter().map(|candidate| candidate.score).collect(),
        candidate_origins: row.candidates.iter().map(|c| c.origin.clone()).collect(),
    }
}

fn pair_row(row: &Candidates, chosen: &Candidate, rejected: &Candidate) -> PairRow {
    PairRow {
        prompt: row.prompt.clone(),
        chosen: vec![assistant(chosen)],
        rejected: vec![assistant(rejected)],
        tools: row.tools.clone(),
        answer: row.answer.clone(),
        score_chosen: chosen.score,
        score_rejected: rejected.score,
        scores_chosen: chosen.scores.clone(),
        scores_rejected: rejected.scores.clone(),
        origin_chosen: chosen.origin.clone(),
        origin_rejected: rejected.origin.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidate(index: usize, text: &str, score: f64, passed: Option<bool>) -> Candidate {
        Candidate {
            text: text.to_owned(),
            tokens: 3,
            finish: Finish::Stop,
            logprob_sum: -1.0,
            scores: IndexMap::from([("judge".to_owned(), score)]),
            score,
            passed,
            origin: format!("r1/{index}"),
        }
    }

    fn group(parts: &[(&str, f64, Option<bool>)]) -> Candidates {
        let candidates = parts
            .iter()
            .enumerate()
            .map(|(i, &(text, score, passed))| candidate(i, text, score, passed));
        Candidates {
            prompt: vec![Message::new("user", "2+2?")],
            answer: "4".to_owned(),
            tools: None,
            candidates: candidates.collect(),
        }
    }

    #[test]
    fn best_and_worst_become_a_pair_with_scores_and_origins() {
        let row = group(&[("b", 0.5, None), ("a", 0.9, None), ("c", 0.1, None)]);
        let chosen = select(&row, &Rules::default());
        assert_eq!(chosen.outcome, Outcome::Paired);
        let pair = serde_json::to_value(&chosen.pairs[0]).unwrap();
        let expected = serde_json::json!({
            "prompt": [{"role": "user", "content": "2+2?"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "c"}],
            "answer": "4",
            "score_chosen": 0.9,
            "score_rejected": 0.1,
            "scores_chosen": {"judge": 0.9},
            "scores_rejected": {"judge": 0.1},
            "origin_chosen": "r1/1",
            "origin_rejected": "r1/2",
        });
        assert_eq!(pair, expected);
        assert_eq!(chosen.sft[0].messages[1].text(), "a");
        assert_eq!(chosen.sft[0].candidate_scores, [0.5, 0.9, 0.1]);
    }

    #[test]
    fn groups_that_teach_nothing_give_no_pair() {
        let rules = Rules { min_margin: 0.3, ..Rules::default() };
        let outcome = |row: &Candidates| select(row, &rules).outcome;
        assert_eq!(outcome(&group(&[("a", 1.0, None), (" a", 1.0, None)])), Outcome::Identical);
        let failed = [("a", 0.0, Some(false)), ("b", 0.7, Some(false))];
        assert_eq!(outcome(&group(&failed)), Outcome::AllFailed);
        assert!(select(&group(&failed), &rules).sft.is_empty());
        assert_eq!(outcome(&group(&[("a", 0.9, None), ("b", 0.7, None)])), Outcome::TooClose);
        let equal = group(&[("a", 1.0, Some(true)), ("b", 1.0, Some(true))]);
        assert_eq!(select(&equal, &Rules::default()).outcome, Outcome::TooClose);
        assert_eq!(select(&equal, &Rules::default()).sft[0].origin, "r1/0");
    }

    #[test]
    fn what_was_cut_off_or_refused_can_only_lose() {
        let mut row = group(&[("long", 0.9, None), ("b", 0.5, None)]);
        row.candidates[0].finish = Finish::Length;
        let chosen = select(&row, &Rules::default());
        assert_eq!((chosen.sft[0].messages[1].text().as_str(), chosen.pairs.len()), ("b", 0));
        let row = group(&[
            ("wrong", 2.0, Some(false)),
            ("ok", 1.5, Some(true)),
            ("bad", 0.0, Some(false)),
        ]);
        let pair = &select(&row, &Rules::default()).pairs[0];
        assert_eq!((pair.score_chosen, pair.score_rejected), (1.5, 0.0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn a_selection_never_pairs_equals_and_never_prefers_the_worse(
            parts in prop::collection::vec(("[ab]{1,2}", 0_u8..4, prop::option::of(any::<bool>())), 0..8),
            min_margin in 0_u8..3,
            pairs_per_prompt in 1_usize..4,
            best_of in 1_usize..4,
        ) {
            let parts: Vec<(&str, f64, Option<bool>)> =
                parts.iter().map(|(text, score, passed)| (text.as_str(), f64::from(*score), *passed)).collect();
            let row = group(&parts);
            let rules = Rules { min_score: 1.0, min_margin: f64::from(min_margin), best_of, pairs_per_prompt };
            let chosen = select(&row, &rules);
            prop_assert_eq!(&chosen, &select(&row, &rules));
            prop_assert!(chosen.pairs.len() <= pairs_per_prompt && chosen.sft.len() <= best_of);
            for pair in &chosen.pairs {
                prop_assert_ne!(pair.chosen[0].text(), pair.rejected[0].text());
                prop_assert!(pair.score_chosen > pair.score_rejected);
                prop_assert!(pair.score_chosen - pair.score_rejected >= rules.min_margin);
            }
            for pair in chosen.sft.windows(2) {
                prop_assert!(pair[0].score >= pair[1].score && pair[0].origin != pair[1].origin);
            }
            prop_assert!(chosen.sft.iter().all(|row| row.score >= rules.min_score));
            let best = row.candidates.iter().filter(|c| may_win(c)).map(|c| c.score).fold(f64::MIN, f64::max);
            if let Some(first) = chosen.sft.first() {
                prop_assert!(first.score >= best);
            }
            prop_assert_eq!(chosen.pairs.is_empty(), chosen.outcome != Outcome::Paired);
        }
    }
}
