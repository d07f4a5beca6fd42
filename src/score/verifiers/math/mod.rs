//! `math`: the answer's final number or expression has the same value as the row's.
//!
//! Three steps: `extract` finds the final answer in the text, and `remark` any remark after it; `latex` converts it to
//! plain notation, `units` separates units, and `parse` builds an expression; `compare` and `value` compare the
//! results. Expressions are compared numerically at fixed points, not symbolically: two that agree at all points are
//! taken as equal.

mod compare;
mod extract;
mod latex;
mod parse;
mod remark;
mod units;
mod value;

use super::{Part, Rule, after_thoughts, judged, needed};
use crate::error::{Error, Result};
use crate::score::{Question, Score, ScorerSpec};
use compare::Answer;
use extract::Found;

/// The final answers have equal values.
pub(super) struct Math(Part);

impl Math {
    pub(super) fn new(spec: &ScorerSpec) -> Result<Self> {
        Part::new(spec).map(Self)
    }
}

impl Rule for Math {
    fn verify(&self, question: &Question<'_>, text: &str) -> Result<Score> {
        let answer = needed(question)?;
        let expected = extract::of_reference(answer);
        if expected.trim().is_empty() {
            return Err(Error::run("the row's `answer` is empty"));
        }
        let expected = Answer::read(&expected);
        let text = after_thoughts(text);
        let candidates = if self.0.is_all() {
            extract::of_text(text)
        } else {
            self.0.of(text).map(Found::certain).into_iter().collect()
        };
        for Found { text, is_tentative } in &candidates {
            let answer = Answer::read(text);
            if answer.equals(&expected) {
                return Ok(judged(true, text.trim()));
            }
            // A fully parseable answer stands as it is; falling back to its last number would misread it.
            if answer.is_readable() && !is_tentative {
                return Ok(judged(false, text.trim()));
            }
        }
        Ok(judged(false, candidates.last().map_or("no answer", |found| found.text.trim())))
    }
}

#[cfg(test)]
mod tests;
