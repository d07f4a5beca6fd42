//! The rows that `sample` writes and `select` reads: a prompt with its scored candidates.

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::is_unjudged;
use super::sandbox::Streams;
use crate::data::record::Message;
use crate::generate::engine::Finish;

/// One prompt with everything that was drawn for it. All rows have the same columns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidates {
    /// What was asked, without a system message that only steered the drawing.
    pub prompt: Vec<Message>,
    /// The right answer; empty where the row has none.
    #[serde(default)]
    pub answer: String,
    /// Tool descriptions for the chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Value>,
    /// In the order in which they were drawn, earlier rounds' best last.
    pub candidates: Vec<Candidate>,
    /// Whether nothing was drawn: the prompt is too long for the model, and the recipe skips such prompts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unanswered: bool,
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
    /// What its program wrote, where one was run: `stdout` and `stderr`.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub streams: Option<Streams>,
}

/// The origin of an answer that came with its row.
pub const REFERENCE: &str = "reference";

impl Candidate {
    /// Whether it may be preferred to another: it is finished, and no verifier refused it.
    pub fn may_win(&self) -> bool {
        self.finish == Finish::Stop && self.passed != Some(false)
    }

    /// Whether some judge could not judge it: that one says why, and gives no score.
    pub fn is_unjudged(&self) -> bool {
        is_unjudged(&self.scores, &self.why)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_one_that_may_win_and_old_rows_still_read() {
        // As rows were written before they said what scores rest on.
        let row = |parts: &[(&str, f64, &str)]| -> Candidates {
            let candidates: Vec<Value> = parts
                .iter()
                .map(|(text, score, finish)| {
                    serde_json::json!({
                        "text": text, "tokens": 2, "finish": finish, "logprob_sum": -1.0,
                        "scores": {"judge": score}, "score": score, "passed": null, "origin": "round 1/0",
                    })
                })
                .collect();
            let row = serde_json::json!({"prompt": [{"role": "user", "content": "q"}], "candidates": candidates});
            serde_json::from_value(row).unwrap()
        };
        let best = |parts| row(parts).best().map(|one| one.text.clone());
        let cut = [("cut", 3.0, "length"), ("b", 1.0, "stop"), ("c", 1.0, "stop")];
        assert_eq!(best(&cut).as_deref(), Some("b"));
        assert_eq!(best(&cut[..1]).as_deref(), Some("cut"));
        assert_eq!(best(&[]), None);
        let text = serde_json::to_string(&row(&cut)).unwrap();
        assert!(["why", "stdout", "unanswered"].iter().all(|key| !text.contains(key)), "{text}");
        assert_eq!(serde_json::from_str::<Candidates>(&text).unwrap(), row(&cut));
    }
}
