//! Rows written by `sample` and read by `select`: a prompt with its scored candidates.

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::is_unjudged;
use super::sandbox::Streams;
use crate::data::record::Message;
use crate::generate::engine::Finish;

/// One prompt with all its samples. All rows have the same columns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidates {
    /// The prompt, without a system message used only for sampling.
    pub prompt: Vec<Message>,
    /// The reference answer; empty if the row has none.
    #[serde(default)]
    pub answer: String,
    /// Tool descriptions for the chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Value>,
    /// In sampling order; the best of earlier rounds come last.
    pub candidates: Vec<Candidate>,
    /// Whether nothing was sampled: the prompt is too long for the model, and the recipe skips such prompts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unanswered: bool,
}

/// One candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// The text, without the end-of-turn token.
    pub text: String,
    /// Number of sampled tokens, including the end-of-turn token.
    pub tokens: usize,
    /// Why it ended.
    pub finish: Finish,
    /// Log-probability under the sampling model, in nats.
    pub logprob_sum: f64,
    /// Each judge's score by name.
    pub scores: IndexMap<String, f64>,
    /// The weighted sum of the scores.
    pub score: f64,
    /// Whether every verifier accepts it; `None` without verifiers.
    pub passed: Option<bool>,
    /// Source: the stage's round, the policy's name if it has one, and the sample number; or [`REFERENCE`].
    pub origin: String,
    /// Explanations of the scores by judge, if given.
    #[serde(default, skip_serializing_if = "IndexMap::is_empty")]
    pub why: IndexMap<String, String>,
    /// Output of its program, if one was run: `stdout` and `stderr`.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub streams: Option<Streams>,
}

/// Origin of an answer that came with its row.
pub const REFERENCE: &str = "reference";

impl Candidate {
    /// Whether it may be preferred over others: finished, and not rejected by a verifier.
    pub fn may_win(&self) -> bool {
        self.finish == Finish::Stop && self.passed != Some(false)
    }

    /// Whether some judge could not judge it, and so has a reason but no score.
    pub fn is_unjudged(&self) -> bool {
        is_unjudged(&self.scores, &self.why)
    }
}

impl Candidates {
    /// The candidate with the highest score among those that may win, otherwise among all; the first on ties.
    pub fn best(&self) -> Option<&Candidate> {
        let rank = |one: &Candidate| (one.may_win(), one.score);
        self.candidates
            .iter()
            .reduce(|best, other| if rank(other) > rank(best) { other } else { best })
    }

    /// Key that identifies rows about the same prompt.
    pub fn key(&self) -> String {
        prompt_key(&self.prompt)
    }
}

/// A prompt as a string key, to find it in another file.
pub fn prompt_key(prompt: &[Message]) -> String {
    // Messages come from JSON; serialising them cannot fail.
    serde_json::to_string(prompt).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_prefers_candidates_that_may_win_and_old_rows_still_parse() {
        // Rows in the format before explanations were added.
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
