//! Checks of the literal text: `exact`, `regex`, `format`, `contains`.

use regex::Regex;

use super::{Part, Rule, compiled, judged, needed};
use crate::error::{Error, Result};
use crate::score::{Question, Score, ScorerSpec};

/// Equal text, ignoring case, whitespace and a final full stop.
pub(super) struct Exact(Part);

impl Exact {
    pub(super) fn new(spec: &ScorerSpec) -> Result<Self> {
        Part::new(spec).map(Self)
    }
}

impl Rule for Exact {
    fn verify(&self, question: &Question<'_>, text: &str) -> Result<Score> {
        let expected = normalised(needed(question)?);
        let found = self.0.of(text).map(normalised);
        Ok(judged(found.as_ref() == Some(&expected), found.unwrap_or_default()))
    }
}

/// The required pattern of a check.
fn pattern_of(spec: &ScorerSpec, name: &str) -> Result<Regex> {
    let pattern = spec.pattern.as_deref();
    let pattern =
        pattern.ok_or_else(|| Error::usage(format!("the verifier `{name}` needs a `pattern`")))?;
    compiled(pattern, "pattern")
}

/// A pattern matches somewhere.
pub(super) struct Occurs(Regex);

impl Occurs {
    pub(super) fn new(spec: &ScorerSpec) -> Result<Self> {
        pattern_of(spec, "regex").map(Self)
    }
}

impl Rule for Occurs {
    fn verify(&self, _: &Question<'_>, text: &str) -> Result<Score> {
        let found = self.0.find(text);
        Ok(judged(found.is_some(), found.map_or("no match", |found| found.as_str())))
    }
}

/// A pattern matches the whole text.
pub(super) struct Whole(Regex);

impl Whole {
    pub(super) fn new(spec: &ScorerSpec) -> Result<Self> {
        // Compiled separately first, so that errors show the pattern as written.
        let pattern = pattern_of(spec, "format")?;
        compiled(&format!(r"(?s)\A\s*(?:{pattern})\s*\z"), "pattern").map(Self)
    }
}

impl Rule for Whole {
    fn verify(&self, _: &Question<'_>, text: &str) -> Result<Score> {
        let fits = self.0.is_match(text);
        Ok(judged(fits, if fits { "" } else { "not of the form" }))
    }
}

/// All given strings occur.
pub(super) struct Contains(Vec<String>);

impl Contains {
    pub(super) fn new(spec: &ScorerSpec) -> Self {
        Self(spec.values.iter().map(|value| value.to_lowercase()).collect())
    }
}

impl Rule for Contains {
    fn verify(&self, question: &Question<'_>, text: &str) -> Result<Score> {
        let text = text.to_lowercase();
        let expected = match self.0.as_slice() {
            [] => &[needed(question)?.trim().to_lowercase()],
            values => values,
        };
        let missing = expected.iter().find(|value| !text.contains(value.as_str()));
        let why = missing.map_or_else(String::new, |value| format!("no `{value}`"));
        Ok(judged(missing.is_none(), why))
    }
}

/// Lower case, single spaces, trimmed, no final full stop.
fn normalised(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let text = words.join(" ").to_lowercase();
    text.strip_suffix('.').unwrap_or(&text).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::testing::check;

    #[test]
    fn exact_forgives_case_space_and_a_full_stop() {
        let cases = [("Paris", true), ("  the  paris", false), (" PARIS. ", true), ("", false)];
        check(r#"{"verifier": "exact"}"#, Some("paris"), &cases);
        let spec = r#"{"verifier": "exact", "pattern": "answer: (.*)$"}"#;
        let cases = [("so\nanswer: b\nanswer: Paris\n", true), ("Paris", false)];
        check(spec, Some("Paris"), &cases);
    }

    #[test]
    fn regex_and_contains_search_the_whole_text() {
        let spec = r#"{"verifier": "regex", "pattern": "^a+$"}"#;
        check(spec, None, &[("b\naa", true), ("ab", false)]);
        let spec = r#"{"verifier": "contains", "values": ["Red", "blue"]}"#;
        check(spec, None, &[("BLUE and red", true), ("red", false)]);
        let cases = [("It is paris!", true), ("no", false)];
        check(r#"{"verifier": "contains"}"#, Some("Paris"), &cases);
    }

    #[test]
    fn format_must_match_the_whole_answer() {
        let spec =
            r#"{"verifier": "format", "pattern": "<think>.*?</think>\\s*<answer>.*</answer>"}"#;
        let cases = [
            ("<think>a\nb</think>\n<answer>4</answer>\n", true),
            ("So: <think>a</think><answer>4</answer>", false),
            ("<think>a</think><answer>4</answer> done", false),
            ("<answer>4</answer>", false),
        ];
        check(spec, None, &cases);
    }
}
