//! The rows that `sample` writes and `select` reads: a prompt with its scored candidates.

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::data::record::Message;
use crate::generate::engine::Finish;

/// One prompt with everything that was drawn for it. All rows have the same columns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidates {
    /// What was asked.
    pub prompt: Vec<Message>,
    /// The right answer; empty where the row has none.
    #[serde(default)]
    pub answer: String,
    /// Tool descriptions for the chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Value>,
    /// In the order in which they were drawn, earlier rounds' best last.
    pub candidates: Vec<Candidate>,
}

/// One candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// The text, without end-of-turn token.
    pub text: String,
    /// Number of tokens drawn, the end-of-turn token included.
    pub tokens: usize,
    /// Why it ended.
    pub finish: Finish,
    /// Log-probability under the model that drew it, in nats.
    pub logprob_sum: f64,
    /// Every judge's score by its name.
    pub scores: IndexMap<String, f64>,
    /// The weighted sum of the scores.
    pub score: f64,
    /// Whether every verifier accepts it; `None` where none judged.
    pub passed: Option<bool>,
    /// Who drew it: the stage's round, the policy's name where it has one, and the sample's number; or [`REFERENCE`].
    pub origin: String,
    /// What the scores rest on, by judge; those that say something.
    #[serde(default, skip_serializing_if = "IndexMap::is_empty")]
    pub why: IndexMap<String, String>,
}

/// The origin of an answer that came with its row.
pub const REFERENCE: &str = "reference";

impl Candidate {
    /// Whether it may be preferred to another: it is finished, and no verifier refused it.
    pub fn may_win(&self) -> bool {
        self.finish == Finish::Stop && self.passed != Some(false)
    }
}

impl Candidates {
    /// The candidate with the highest score among those that may win, or among all where none may; the first of
    /// equals.
    pub fn best(&self) -> Option<&Candidate> {
        let rank = |one: &Candidate| (one.may_win(), one.score);
        self.candidates
            .iter()
            .reduce(|best, other| if rank(other) > rank(best) { other } else { best })
    }

    /// What two rows must share to be about the same prompt.
    pub fn key(&self) -> String {
        prompt_key(&self.prompt)
    }
}

/// A prompt as text, to find it again in another file.
pub fn prompt_key(prompt: &[Message]) -> String {
    // Messages are JSON already; writing them cannot fail.
    serde_json::to_string(prompt).unwrap_or_default()
}
