//! Helpers shared by the verifiers' tests.

use serde_json::{Map, Value};

use super::Verifier;
use crate::error::Result;
use crate::score::{Question, Score, Scorer, ScorerSpec};

/// The verifier of a JSON spec.
pub(super) fn verifier(spec: &str) -> Verifier {
    let spec: ScorerSpec = serde_json::from_str(spec).unwrap();
    Verifier::new(spec.verifier.unwrap(), &spec).unwrap()
}

/// One judgement, with the row's further columns.
pub(super) fn score(
    verifier: &Verifier,
    answer: Option<&str>,
    extra: Option<&Map<String, Value>>,
    text: &str,
) -> Result<Score> {
    let question = Question { place: "", prompt: &[], tools: None, answer, extra };
    Ok(verifier.score(&question, &[text])?.remove(0))
}

/// Fails unless every text is judged as expected.
#[track_caller]
pub(super) fn check(spec: &str, answer: Option<&str>, cases: &[(&str, bool)]) {
    let verifier = verifier(spec);
    for (text, right) in cases {
        let score = score(&verifier, answer, None, text).unwrap();
        assert_eq!(score.value > 0.5, *right, "{text}: {}", score.why);
    }
}
