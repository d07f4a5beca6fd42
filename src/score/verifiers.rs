//! Checks of answers against the row's own `answer`: 1 for right, 0 for wrong.

use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

use super::{Question, Score, Scorer, ScorerSpec};
use crate::error::{Error, Result};

/// The checks there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// The answer, but for case, surrounding space and a final full stop.
    #[serde(alias = "exact_answer", alias = "exact_match")]
    Exact,
    /// The last number of the text, whatever its notation.
    #[serde(alias = "math", alias = "gsm8k")]
    Number,
    /// A pattern occurs.
    Regex,
    /// The number of characters lies within bounds.
    Length,
    /// All given strings occur, whatever their case.
    Contains,
}

impl Check {
    /// The check's name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Number => "number",
            Self::Regex => "regex",
            Self::Length => "length",
            Self::Contains => "contains",
        }
    }
}

/// One check with its settings.
#[derive(Clone, Debug)]
pub struct Verifier {
    check: Check,
    pattern: Option<Regex>,
    values: Vec<String>,
    min: usize,
    max: usize,
}

impl Verifier {
    /// Compiles the check.
    ///
    /// # Errors
    /// A pattern that is missing or does not compile; bounds that nothing fits.
    pub fn new(check: Check, spec: &ScorerSpec) -> Result<Self> {
        if check == Check::Regex && spec.pattern.is_none() {
            return Err(Error::usage("the verifier `regex` needs a `pattern`"));
        }
        if spec.min > spec.max {
            let (min, max) = (spec.min, spec.max);
            return Err(Error::usage(format!("`min` is {min}, more than `max`, which is {max}")));
        }
        let pattern = spec.pattern.as_deref().map(|pattern| {
            RegexBuilder::new(pattern).multi_line(true).build().map_err(|error| {
                Error::usage(format!("`pattern` is no regular expression: {error}"))
            })
        });
        let values = spec.values.iter().map(|value| value.to_lowercase()).collect();
        Ok(Self { check, pattern: pattern.transpose()?, values, min: spec.min, max: spec.max })
    }

    /// The part of the text that the pattern points at: its first group, or the whole match. The last match counts,
    /// as people conclude at the end. Without a pattern, all of the text.
    fn part<'a>(&self, text: &'a str) -> Option<&'a str> {
        let Some(pattern) = &self.pattern else { return Some(text) };
        let found = pattern.captures_iter(text).last()?;
        found.get(1).or_else(|| found.get(0)).map(|part| part.as_str())
    }

    fn verify(&self, text: &str, answer: Option<&str>) -> Result<Score> {
        match self.check {
            Check::Exact => {
                let expected = normalised(needed(answer)?);
                let found = self.part(text).map(normalised);
                Ok(judged(found.as_ref() == Some(&expected), &found.unwrap_or_default()))
            }
            Check::Number => {
                let answer = needed(answer)?;
                let expected = last_number(answer).ok_or_else(|| {
                    Error::run(format!("the answer `{answer}` holds no number"))
                        .hint("use verifier = \"exact\" for answers in words")
                })?;
                let found = self.part(text).and_then(last_number);
                let right = found.is_some_and(|found| same_number(found, expected));
                Ok(judged(right, &found.map_or_else(|| "no number".to_owned(), |x| x.to_string())))
            }
            Check::Regex => {
                let found = self.pattern.as_ref().and_then(|pattern| pattern.find(text));
                Ok(judged(found.is_some(), found.map_or("no match", |found| found.as_str())))
            }
            Check::Length => {
                let length = text.chars().count();
                let fits = (self.min..=self.max).contains(&length);
                Ok(judged(fits, &format!("{length} characters")))
            }
            Check::Contains => {
                let text = text.to_lowercase();
                let expected = match self.values.as_slice() {
                    [] => &[needed(answer)?.trim().to_lowercase()],
                    values => values,
                };
                let missing = expected.iter().find(|value| !text.contains(value.as_str()));
                let why = missing.map_or_else(String::new, |value| format!("no `{value}`"));
                Ok(judged(missing.is_none(), &why))
            }
        }
    }
}

impl Scorer for Verifier {
    fn score(&self, question: &Question<'_>, answers: &[&str]) -> Result<Vec<Score>> {
        answers.iter().map(|text| self.verify(text, question.answer)).collect()
    }

    fn verifies(&self) -> bool {
        true
    }
}

fn judged(right: bool, why: &str) -> Score {
    Score { value: f64::from(u8::from(right)), why: why.to_owned() }
}

fn needed(answer: Option<&str>) -> Result<&str> {
    answer.ok_or_else(|| {
        Error::run("the row has no `answer` to check against")
            .hint("map its column, e.g. columns = {answer = \"solution\"}, or use another scorer")
    })
}

/// Lower case, single spaces, no space around, no full stop at the end.
fn normalised(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let text = words.join(" ").to_lowercase();
    text.strip_suffix('.').unwrap_or(&text).trim_end().to_owned()
}

/// The last number of a text: signs, thousands' commas, decimals and exponents understood; `3/4` counts as a
/// quotient. A full stop at the end of a sentence is none of its digits.
pub fn last_number(text: &str) -> Option<f64> {
    let bytes = text.as_bytes();
    let mut end = bytes.iter().rposition(u8::is_ascii_digit)? + 1;
    let mut start = number_start(bytes, end);
    let mut value = parse(&text[start..end])?;
    // An exponent: what was read are its digits.
    if let Some(base_end) = exponent_base(bytes, start) {
        let base_start = number_start(bytes, base_end);
        if let Some(number) = parse(&text[base_start..end]) {
            (value, start) = (number, base_start);
        }
    }
    if start > 1 && bytes[start - 1] == b'/' && bytes[start - 2].is_ascii_digit() {
        end = start - 1;
        let above = number_start(bytes, end);
        // A date or a path has more than one slash.
        if above == 0 || bytes[above - 1] != b'/' {
            value = parse(&text[above..end])? / value;
            start = above;
        }
    }
    let signed = start > 0
        && bytes[start - 1] == b'-'
        && (start < 2 || !(bytes[start - 2].is_ascii_alphanumeric() || bytes[start - 2] == b')'));
    Some(if signed { -value } else { value })
}

/// Where the digits, commas and decimal point that end at `end` begin.
fn number_start(bytes: &[u8], end: usize) -> usize {
    let mut start = end;
    let mut point = false;
    while start > 0 {
        match bytes[start - 1] {
            b'0'..=b'9' => {}
            b'.' if !point && bytes.get(start).is_some_and(u8::is_ascii_digit) => point = true,
            // Thousands: three digits follow.
            b',' if start >= 2
                && bytes[start - 2].is_ascii_digit()
                && bytes[start..end].iter().take_while(|byte| byte.is_ascii_digit()).count()
                    == 3 => {}
            _ => break,
        }
        start -= 1;
    }
    start
}

/// Where the base of `…e<start>` or `…e-<start>` ends.
fn exponent_base(bytes: &[u8], start: usize) -> Option<usize> {
    let before_sign = match bytes.get(start.checked_sub(1)?)? {
        b'+' | b'-' => start - 1,
        _ => start,
    };
    let base_end = before_sign.checked_sub(1)?;
    let is_exponent = matches!(bytes[base_end], b'e' | b'E')
        && base_end > 0
        && bytes[base_end - 1].is_ascii_digit();
    is_exponent.then_some(base_end)
}

fn parse(digits: &str) -> Option<f64> {
    digits.replace(',', "").parse().ok()
}

/// Equal but for rounding in the sixth digit.
fn same_number(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= 1e-6 * expected.abs().max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(spec: &str, answer: Option<&str>, cases: &[(&str, bool)]) {
        let spec: ScorerSpec = serde_json::from_str(spec).unwrap();
        let verifier = Verifier::new(spec.verifier.unwrap(), &spec).unwrap();
        let question = Question { place: "", prompt: &[], tools: None, answer };
        for (text, right) in cases {
            let score = verifier.score(&question, &[text]).unwrap().remove(0);
            assert_eq!(score.value > 0.5, *right, "{text}: {}", score.why);
        }
    }

    #[test]
    fn exact_forgives_case_space_and_a_full_stop() {
        let cases = [("Paris", true), ("  the  paris", false), (" PARIS. ", true), ("", false)];
        check(r#"{"verifier": "exact"}"#, Some("paris"), &cases);
        let spec = r#"{"verifier": "exact", "pattern": "answer: (.*)$"}"#;
        let cases = [("so\nanswer: b\nanswer: Paris\n", true), ("Paris", false)];
        check(spec, Some("Paris"), &cases);
    }

    #[test]
    fn number_takes_the_last_one_in_any_notation() {
        let cases = [
            ("1,234", true),
            ("first 5, so it is $1,234.00.", true),
            ("1234 apples", true),
            ("1.234e3", true),
            ("= 2468/2", true),
            ("-1234", false),
            ("1234 or 5", false),
            ("none", false),
            ("7-1234", true),
        ];
        check(r#"{"verifier": "number"}"#, Some("#### 1234"), &cases);
        check(r#"{"verifier": "number"}"#, Some("-0.5"), &[("-.5", true), ("it is -1/2.", true)]);
    }

    #[test]
    fn numbers_are_read_as_people_write_them() {
        for (text, value) in [
            ("3.", Some(3.0)),
            ("1,2,3", Some(3.0)),
            ("12,345,678", Some(12_345_678.0)),
            ("on 1/2/2024", Some(2024.0)),
            ("1e-3", Some(0.001)),
            ("x2", Some(2.0)),
            ("é5é", Some(5.0)),
            ("…", None),
        ] {
            assert_eq!(last_number(text), value, "{text}");
        }
    }

    #[test]
    fn regex_length_and_contains_look_at_the_text_alone() {
        check(
            r#"{"verifier": "regex", "pattern": "^a+$"}"#,
            None,
            &[("b\naa", true), ("ab", false)],
        );
        check(
            r#"{"verifier": "length", "min": 2, "max": 3}"#,
            None,
            &[("é", false), ("éé", true), ("abcd", false)],
        );
        let spec = r#"{"verifier": "contains", "values": ["Red", "blue"]}"#;
        check(spec, None, &[("BLUE and red", true), ("red", false)]);
        check(
            r#"{"verifier": "contains"}"#,
            Some("Paris"),
            &[("It is paris!", true), ("no", false)],
        );
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(32))]
        #[test]
        fn any_text_has_a_last_number_or_none(text in "[-+0-9.,/e a-zé]{0,24}") {
            let _ = last_number(&text);
        }

        #[test]
        fn a_printed_number_is_read_back(value in -1e6_f64..1e6) {
            let text = format!("the answer is {value:.3}");
            let expected: f64 = format!("{value:.3}").parse().unwrap();
            proptest::prop_assert!(same_number(last_number(&text).unwrap(), expected));
        }
    }
}
