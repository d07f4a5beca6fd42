//! Output rows of a selection.

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::data::record::Message;
use crate::score::candidates::{Candidate, Candidates};

/// An SFT row: `messages`, and their provenance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SftRow {
    /// The conversation with the chosen answer.
    pub messages: Vec<Message>,
    /// Tool descriptions for the chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Value>,
    /// The reference answer; empty if the row has none.
    pub answer: String,
    /// The chosen candidate's weighted score.
    pub score: f64,
    /// Its scores by judge.
    pub scores: IndexMap<String, f64>,
    /// Source of the candidate.
    pub origin: String,
    /// Every candidate's weighted score, in the order of `candidate_origins`.
    pub candidate_scores: Vec<f64>,
    /// Source of each candidate.
    pub candidate_origins: Vec<String>,
    /// Fraction of votes for the answer, if chosen by majority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agreement: Option<f64>,
}

/// A preference pair with message lists, in TRL's format.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairRow {
    /// The prompt.
    pub prompt: Vec<Message>,
    /// The better answer.
    pub chosen: Vec<Message>,
    /// The worse answer.
    pub rejected: Vec<Message>,
    /// Tool descriptions for the chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Value>,
    /// The reference answer; empty if the row has none.
    pub answer: String,
    /// Weighted score of the better answer.
    pub score_chosen: f64,
    /// Weighted score of the worse answer.
    pub score_rejected: f64,
    /// The better answer's scores by judge.
    pub scores_chosen: IndexMap<String, f64>,
    /// The worse answer's scores by judge.
    pub scores_rejected: IndexMap<String, f64>,
    /// Source of the better answer.
    pub origin_chosen: String,
    /// Source of the worse answer.
    pub origin_rejected: String,
}

fn assistant(candidate: &Candidate) -> Message {
    Message::new("assistant", candidate.text.as_str())
}

/// The SFT row of a chosen candidate.
pub(super) fn sft_row(row: &Candidates, chosen: &Candidate, agreement: Option<f64>) -> SftRow {
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
        agreement,
    }
}

/// The preference row of two candidates.
pub(super) fn pair_row(row: &Candidates, chosen: &Candidate, rejected: &Candidate) -> PairRow {
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
