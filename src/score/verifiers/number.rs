//! `number`: the last number of the text, in any notation.

use std::str::FromStr;

use super::{Part, Rule, judged, needed};
use crate::error::{Error, Result};
use crate::score::{Question, Score, ScorerSpec};

/// The last number of the text equals that of the row's answer.
pub(super) struct Number(Part);

impl Number {
    pub(super) fn new(spec: &ScorerSpec) -> Result<Self> {
        Part::new(spec).map(Self)
    }
}

impl Rule for Number {
    fn verify(&self, question: &Question<'_>, text: &str) -> Result<Score> {
        let answer = needed(question)?;
        let expected = last(answer).ok_or_else(|| {
            Error::run(format!("the answer `{answer}` holds no number"))
                .hint("use verifier = \"exact\" for answers in words")
        })?;
        let found = self.0.of(text).and_then(last);
        let right = found.is_some_and(|found| found.is(expected));
        Ok(judged(right, found.map_or_else(|| "no number".to_owned(), |found| found.to_string())))
    }
}

/// A number as it was read.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Read {
    value: f64,
    /// All digits of one that is written as digits alone: of the value there are no more than fifteen.
    digits: Option<i128>,
}

impl Read {
    /// Whole numbers are equal exactly; others but for rounding in the sixth digit.
    fn is(self, expected: Self) -> bool {
        if let (Some(found), Some(expected)) = (self.digits, expected.digits) {
            return found == expected;
        }
        let (found, expected) = (self.value, expected.value);
        let rounding = if found.fract() == 0.0 && expected.fract() == 0.0 {
            0.0
        } else {
            1e-6 * expected.abs().max(1.0)
        };
        (found - expected).abs() <= rounding
    }
}

impl std::fmt::Display for Read {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.digits {
            Some(digits) => digits.fmt(f),
            None => self.value.fmt(f),
        }
    }
}

/// The last number of a text: handles signs, thousands separators, decimals and exponents; `3/4` is a quotient. A full
/// stop at the end of a sentence is not part of it.
pub fn last_number(text: &str) -> Option<f64> {
    last(text).map(|read| read.value)
}

fn last(text: &str) -> Option<Read> {
    // The typographic minus, and the dash used for it.
    let text = &text.replace(['−', '–'], "-");
    let bytes = text.as_bytes();
    let mut end = bytes.iter().rposition(u8::is_ascii_digit)? + 1;
    let mut start = number_start(bytes, end);
    let mut value: f64 = parse(&text[start..end])?;
    let mut digits: Option<i128> = parse(&text[start..end]);
    // An exponent: what was read are its digits.
    if let Some(base_end) = exponent_base(bytes, start) {
        let base_start = number_start(bytes, base_end);
        if let Some(number) = parse(&text[base_start..end]) {
            (value, digits, start) = (number, None, base_start);
        }
    }
    if start > 1 && bytes[start - 1] == b'/' && bytes[start - 2].is_ascii_digit() {
        end = start - 1;
        let above = number_start(bytes, end);
        // Dates and paths have more than one slash.
        if above == 0 || bytes[above - 1] != b'/' {
            value = parse::<f64>(&text[above..end])? / value;
            (digits, start) = (None, above);
        }
    }
    let signed = start > 0
        && bytes[start - 1] == b'-'
        && (start < 2 || !(bytes[start - 2].is_ascii_alphanumeric() || bytes[start - 2] == b')'));
    Some(if signed {
        Read { value: -value, digits: digits.map(|all| -all) }
    } else {
        Read { value, digits }
    })
}

/// Start of the digits, commas and decimal point that end at `end`.
fn number_start(bytes: &[u8], end: usize) -> usize {
    let mut start = end;
    let mut point = false;
    while start > 0 {
        match bytes[start - 1] {
            b'0'..=b'9' => {}
            b'.' if !point && bytes.get(start).is_some_and(u8::is_ascii_digit) => point = true,
            // Thousands separator: three digits follow.
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

/// End of the base of `…e<start>` or `…e-<start>`.
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

fn parse<T: FromStr>(digits: &str) -> Option<T> {
    digits.replace(',', "").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::super::testing::check;
    use super::*;

    #[test]
    fn number_compares_the_last_number_in_any_notation() {
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
    fn whole_numbers_match_exactly_and_decimals_up_to_rounding() {
        let spec = r#"{"verifier": "number"}"#;
        for (answer, cases) in [
            ("1000000", [("1000001", false), ("1,000,000.0", true), ("1e6", true)]),
            ("5,600,000", [("5600005", false), ("5600000.", true), ("$11200000/2", true)]),
            ("5600005", [("5.600005e6", true), ("5600004.0", false), ("-5600005", false)]),
            ("0", [("-0", true), ("1", false), ("0.00", true)]),
            // Where neighbours are the same floating-point number.
            (
                "9007199254740993",
                [
                    ("9007199254740992", false),
                    ("9,007,199,254,740,993", true),
                    ("-9007199254740993", false),
                ],
            ),
            // More digits than are kept.
            (
                "1000000000000000000000000000000000000000000",
                [
                    ("1000000000000000000000000000000000000000000", true),
                    ("1e42", true),
                    ("1e41", false),
                ],
            ),
            ("3.1415927", [("3.141592", true), ("3.14158", false), ("355/113", true)]),
            ("0.3333333", [("1/3", true), ("0.3333", false), ("1", false)]),
            ("3", [("2.9999999", true), ("2.9999", false), ("3.0000001", true)]),
        ] {
            check(spec, Some(answer), &cases);
        }
    }

    #[test]
    fn numbers_are_read_in_common_notations() {
        for (text, value) in [
            ("3.", Some(3.0)),
            ("1,2,3", Some(3.0)),
            ("12,345,678", Some(12_345_678.0)),
            ("on 1/2/2024", Some(2024.0)),
            ("1e-3", Some(0.001)),
            ("the result is −5", Some(-5.0)),
            ("–0.5", Some(-0.5)),
            ("pages 3–7", Some(7.0)),
            ("x2", Some(2.0)),
            ("é5é", Some(5.0)),
            ("…", None),
        ] {
            assert_eq!(last_number(text), value, "{text}");
        }
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(32))]
        #[test]
        fn finding_the_last_number_never_panics(text in "[-+0-9.,/e a-zé]{0,24}") {
            let _ = last_number(&text);
        }

        #[test]
        fn printed_number_round_trips(value in -1e6_f64..1e6) {
            let text = format!("the answer is {value:.3}");
            let expected: f64 = format!("{value:.3}").parse().unwrap();
            proptest::prop_assert!((last_number(&text).unwrap() - expected).abs() < 1e-9);
        }
    }
}
