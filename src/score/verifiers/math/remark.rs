//! A number followed by a remark: `72 clips (48 + 24)`, `18 dollars per day, which is 9 * 2`.
//!
//! Only certain remarks count: brackets, or one of a few lead-in words. `2 times 21, or 42` has none and is read as
//! usual.

use super::super::pattern;
use super::compare::Answer;
use super::extract::NUMBER;
use super::units::multiplies;

/// Most words in a unit: `dollars per day`, `square feet of carpet`.
const UNIT: usize = 6;
/// Words that modify the preceding number, or lead to the next one.
const NO_UNITS: [&str; 40] = [
    "times",
    "plus",
    "minus",
    "divided",
    "multiplied",
    "over",
    "out",
    "squared",
    "cubed",
    "factorial",
    "x",
    "more",
    "less",
    "fewer",
    "than",
    "to",
    "and",
    "or",
    "but",
    "is",
    "are",
    "dozen",
    "dozens",
    "hundred",
    "thousand",
    "million",
    "billion",
    "trillion",
    "half",
    "halves",
    "third",
    "thirds",
    "quarter",
    "quarters",
    "fourths",
    "fifth",
    "fifths",
    "tenths",
    "so",
    "then",
];

/// The number at the start of a sentence, if followed by a remark.
#[derive(Debug)]
pub(super) struct Leading {
    /// The number with its unit.
    pub(super) text: String,
    /// The number.
    pub(super) number: String,
    /// Whether the remark cannot contain the answer: it derives the number, or negates something.
    pub(super) is_alone: bool,
    /// Whether a word introduces the remark. Brackets may be factors, and text after a semicolon another answer.
    pub(super) is_worded: bool,
}

/// Text after the number and its unit.
struct Remark<'a> {
    text: &'a str,
    is_denial: bool,
    is_worded: bool,
}

/// Finds such a number.
pub(super) fn leading(sentence: &str) -> Option<Leading> {
    let head = pattern!(&format!(
        r"\A[*_\s]*(?i:(?:about|approximately|exactly|only|just|a total of)\s+)?(?:\\\(\s*)?(?P<number>{NUMBER})(?:\$|\s*\\\))?[*_]*"
    ))?;
    let word = pattern!(r"\A[\s*_]*([A-Za-z][A-Za-z'/²³-]*(?:\^\{?[23]\}?)?)[*_]*")?;
    let found = head.captures(sentence)?;
    let number = found.name("number")?.as_str().trim();
    let (mut text, mut rest) = (number.to_owned(), &sentence[found.get(0)?.end()..]);
    for at in 0..=UNIT {
        if let Some(Remark { text: remark, is_denial, is_worded }) = remark(rest) {
            // `72 (or 24)` is not a remark but two alternatives, of which one may be right.
            if remark.split_whitespace().next() == Some("or") {
                return None;
            }
            let is_derived = || Answer::read(remark).equals(&Answer::read(number));
            let is_alone = is_denial || is_derived();
            return Some(Leading { text, number: number.to_owned(), is_alone, is_worded });
        }
        let unit = word.captures(rest)?;
        let lower = unit[1].to_lowercase();
        // `2 of 3` and `2y` are not a number with a unit; `2 cups of flour` is.
        let is_factor = rest.starts_with(&unit[1]) && lower.len() == 1;
        if NO_UNITS.contains(&lower.as_str())
            || multiplies(&lower)
            || at == 0 && (is_factor || lower == "of")
        {
            return None;
        }
        text = format!("{text} {}", &unit[1]);
        rest = &rest[unit.get(0)?.end()..];
    }
    None
}

/// The remark that begins here, without its lead-in.
fn remark(rest: &str) -> Option<Remark<'_>> {
    let opens = pattern!(
        r"(?xi) \A \s* (?: (?P<mark> [(\[—;] ) | ,?\s+ (?:
            (?P<denied> not | rather\ than | instead\ of )
          | which | because | since | as | that\ is | where | given | namely | found | obtained
          | calculated | computed | derived ) \b )
        (?: \s* (?: = | (?: it\ is | is | are | equals | as | by | from | because | since ) \b ) )* \s*"
    )?;
    let found = opens.captures(rest)?;
    let text = rest[found.get(0)?.end()..].trim_end_matches([')', ']', '.', ',', ' ']);
    let (is_denial, is_worded) = (found.name("denied").is_some(), found.name("mark").is_none());
    Some(Remark { text, is_denial, is_worded })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_with_unit_is_separated_from_a_trailing_remark() {
        for (sentence, text, is_alone) in [
            ("72 clips (48 + 24)", "72 clips", true),
            ("72 (48 + 24 = 72)", "72", true),
            ("72 clips (48 in April, 24 in May)", "72 clips", false),
            ("18 dollars per day, which is 9 * 2", "18 dollars per day", true),
            ("**$18** a day because it is 9 * 2", "$18 a day", true),
            ("$18$ dollars, since 9 are sold at 2", "$18 dollars", false),
            ("150 minutes, which is 2.5 hours", "150 minutes", false),
            ("5 cups of flour; 2 are left", "5 cups of flour", false),
            ("5, not 7", "5", true),
            ("12 days not counting 3 at home", "12 days", true),
            ("about 1,200 m^2 (30 * 40)", "1,200 m^2", true),
        ] {
            let found = leading(sentence).unwrap();
            assert_eq!((found.text.as_str(), found.is_alone), (text, is_alone), "{sentence}");
            assert!(found.text.starts_with(&found.number), "{found:?}");
        }
        for sentence in [
            "42",
            "42 apples",
            "not 5 but 7",
            "5, no, 7",
            "5y (as above)",
            "5 or 7",
            "5 apples (or 7)",
            "2 times 21 (42)",
            "5 more than 7 (12)",
            "2 dozen, which is 24",
            "2 of 3 (0.67)",
            "2 sqrt(2)",
            "2sqrt(2)",
            "3 sin(3)",
            "5 ln(5)",
            "2 pi, which is about 6.28",
            "3 hours and 20 minutes (200 minutes)",
            "2/3 + 1 (5/3)",
            "(1, 2)",
            "1, 2",
            "",
        ] {
            assert!(leading(sentence).is_none(), "{sentence}");
        }
    }
}
