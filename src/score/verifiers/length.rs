//! `length`: characters, words or tokens within bounds.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Rule, judged};
use crate::data::tokenizer::ChatTokenizer;
use crate::error::{Context, Error, Result};
use crate::score::{Question, Score, ScorerSpec};

/// Unit of length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Unicode characters.
    #[default]
    Characters,
    /// Whitespace-separated words.
    Words,
    /// Tokens of the scorer's `tokenizer`.
    Tokens,
}

/// Compares a length with its bounds.
pub(super) struct Length {
    unit: Unit,
    tokenizer: Option<ChatTokenizer>,
    min: usize,
    max: usize,
}

/// Rejects bounds that nothing or everything satisfies, tokens without a tokenizer, and a tokenizer with another unit.
pub(super) fn check(spec: &ScorerSpec) -> Result<()> {
    let (min, max) = (spec.min, spec.max);
    if min > max {
        return Err(Error::usage(format!("`min` is {min}, more than `max`, which is {max}")));
    }
    match (spec.unit, &spec.tokenizer) {
        (Unit::Tokens, None) => {
            Err(Error::usage("`unit` is tokens, and no `tokenizer` counts them")
                .hint("name the directory of a checkpoint: tokenizer = \"models/student\""))
        }
        (Unit::Characters | Unit::Words, Some(_)) => {
            Err(Error::usage("`tokenizer` without unit = \"tokens\""))
        }
        _ if min == 0 && max == usize::MAX => {
            Err(Error::usage("the verifier `length` needs a `min` or a `max`"))
        }
        _ => Ok(()),
    }
}

impl Length {
    pub(super) fn new(spec: &ScorerSpec) -> Result<Self> {
        check(spec)?;
        let load = |path: &String| ChatTokenizer::from_dir(Path::new(path)).at(path);
        let tokenizer = spec.tokenizer.as_ref().map(load).transpose()?;
        Ok(Self { unit: spec.unit, tokenizer, min: spec.min, max: spec.max })
    }
}

impl Rule for Length {
    fn verify(&self, _: &Question<'_>, text: &str) -> Result<Score> {
        let (length, unit) = match (self.unit, &self.tokenizer) {
            (Unit::Tokens, Some(tokenizer)) => (tokenizer.encode(text).len(), "tokens"),
            (Unit::Words, _) => (text.split_whitespace().count(), "words"),
            _ => (text.chars().count(), "characters"),
        };
        Ok(judged((self.min..=self.max).contains(&length), format!("{length} {unit}")))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::check;
    use crate::score::ScorerSpec;

    #[test]
    fn bounds_that_accept_every_answer_are_refused() {
        for spec in
            [r#"{"verifier": "length"}"#, r#"{"verifier": "length", "min": 0, "unit": "words"}"#]
        {
            let spec: ScorerSpec = serde_json::from_str(spec).unwrap();
            let error = spec.check().unwrap_err().to_string();
            assert_eq!(error, "the verifier `length` needs a `min` or a `max`");
        }
    }

    #[test]
    fn each_length_unit_is_counted() {
        let spec = r#"{"verifier": "length", "min": 2, "max": 3}"#;
        check(spec, None, &[("é", false), ("éé", true), ("abcd", false)]);
        let spec = r#"{"verifier": "length", "min": 2, "max": 3, "unit": "words"}"#;
        check(spec, None, &[("one", false), ("one  two\nthree", true), ("a b c d", false)]);
        let tokenizer = concat!(env!("CARGO_MANIFEST_DIR"), "/data/tiny/student");
        let spec = format!(
            r#"{{"verifier": "length", "min": 1, "max": 20, "unit": "tokens", "tokenizer": "{tokenizer}"}}"#
        );
        check(&spec, None, &[("", false), ("12 + 4", true), (&"12 + 4 ".repeat(30), false)]);
    }
}
