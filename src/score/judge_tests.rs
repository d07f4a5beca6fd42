//! Judges that fail on some answers.

use serde_json::{Value, json};

use super::judge::Judge;
use super::{Question, Score, Scorer, ScorerSpec};
use crate::data::record::Message;
use crate::error::Result;
use crate::generate::engine::Answer;
use crate::generate::sampling::Sampling;
use crate::generate::teacher::{Asked, Teacher};

/// Prefers answer A if both are short; returns nothing parseable for odd ones, and refuses long ones if it may.
struct Fussy;

impl Teacher for Fussy {
    fn answer(
        &self,
        asked: &[Asked],
        sampling: &Sampling,
        done: &mut dyn FnMut(usize, Vec<Answer>) -> Result<()>,
    ) -> Result<()> {
        for (place, asked) in asked.iter().enumerate() {
            let text = asked.messages[1].text();
            if sampling.skip_refused && text.contains("long") {
                done(place, Vec::new())?;
                continue;
            }
            let verdict = json!({"score": 7, "winner": "A"}).to_string();
            let text = if text.contains("odd") { "Who knows?".to_owned() } else { verdict };
            done(place, vec![Answer::said(&text)])?;
        }
        Ok(())
    }
}

fn judged(mut spec: Value, answers: &[&str]) -> Result<Vec<Score>> {
    spec["judge"] = json!("unused");
    let spec: ScorerSpec = serde_json::from_value(spec).unwrap();
    let prompt = [Message::new("user", "how?")];
    let question =
        Question { place: "p:1", prompt: &prompt, tools: None, answer: None, extra: None };
    Judge::new(Box::new(Fussy), &spec).score(&question, answers)
}

fn unjudged(scores: &[Score]) -> Vec<bool> {
    scores.iter().map(|score| score.unjudged).collect()
}

#[test]
fn answer_without_a_verdict_fails_alone_with_on_error_fail() {
    let answers = ["fine", "odd", "long"];
    let error = format!("{:?}", judged(json!({}), &answers).unwrap_err());
    assert!(
        error.contains("said `Who knows?`") && error.contains("on_error = \"fail\""),
        "{error}"
    );
    let scores = judged(json!({"on_error": "fail"}), &answers).unwrap();
    assert_eq!(unjudged(&scores), [false, true, true]);
    assert!(scores[0].value > 6.9 && scores[1].why.ends_with("said `Who knows?`"), "{scores:?}");
    assert_eq!(scores[2].why, "not judged: too long for the judge, or refused by its server");
}

#[test]
fn failed_comparisons_count_for_neither_answer() {
    let pairwise = json!({"form": "pairwise", "on_error": "fail"});
    let scores = judged(pairwise.clone(), &["fine", "odd", "good", "long"]).unwrap();
    assert_eq!(unjudged(&scores), [false, true, false, true]);
    // The two compared answers tie: each won when placed first.
    assert!([0, 2].iter().all(|&at| (scores[at].value - 0.5).abs() < 1e-12), "{scores:?}");
    assert_eq!(scores[0].why, "0.5 of 1 comparisons");
    assert_eq!(unjudged(&judged(pairwise.clone(), &["fine", "odd"]).unwrap()), [true, true]);
    assert_eq!(unjudged(&judged(pairwise, &["odd"]).unwrap()), [false]);
}
