//! `number`: the last number of the text, whatever its notation.

use super::{Part, Rule, judged, needed};
use crate::error::{Error, Result};
use crate::score::{Question, Score, ScorerSpec};

/// The last number of the text is the last of the row's answer.
pub(super) struct Number(Part);

impl Number {
    pub(super) fn new(spec: &ScorerSpec) -> Result<Self> {
        Part::new(spec).map(Self)
    }
}

impl Rule for Number {
    fn verify(&self, question: &Question<'_>, text: &str) -> Result<Score> {
        let answer = needed(question)?;
        let expected = last_number(answer).ok_or_else(|| {
            Error::run(format!("the answer `{answer}` holds no number"))
                .hint("use verifier = \"exact\" for answers in words")
        })?;
        let found = self.0.of(text).and_then(last_number);
        let right = found.is_some_and(|found| same_number(found, expected));
        Ok(judged(right, found.map_or_else(|| "no number".to_owned(), |x| x.to_string())))
    }
}

/// The last number of a text: signs, thousands' commas, decimals and exponents understood; `3/4` counts as a
/// quotient. A full stop at the end of a sentence is none of its digits.
pub fn last_number(text: &str) -> Option<f64> {
    // A minus as typesetters write it, and the dash that stands for one.
    let text = &text.replace(['−', '–'], "-");
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
    use super::super::testing::check;
    use super::*;

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
