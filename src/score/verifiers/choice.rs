//! `choice`: the letter of a multiple-choice answer.

use super::{Part, Rule, after_thoughts, judged, needed, pattern};
use crate::error::{Error, Result};
use crate::score::{Question, Score, ScorerSpec};

/// The text's final letter is the row's.
pub(super) struct Choice(Part);

impl Choice {
    pub(super) fn new(spec: &ScorerSpec) -> Result<Self> {
        Part::new(spec).map(Self)
    }
}

impl Rule for Choice {
    fn verify(&self, question: &Question<'_>, text: &str) -> Result<Score> {
        let answer = needed(question)?;
        let expected = letter(answer).ok_or_else(|| {
            Error::run(format!("the answer `{answer}` names no choice"))
                .hint("it should be a letter, as in `B`, `(B)` or `B. Paris`")
        })?;
        let found = self.0.of(after_thoughts(text)).and_then(letter);
        let why = found.map_or_else(|| "no choice".to_owned(), String::from);
        Ok(judged(found == Some(expected), why))
    }
}

/// The chosen letter, A to Z. In order of precedence: boxed; stated to be the answer, or to be right; chosen; a named
/// option; the whole text, or its start followed by punctuation; the last letter in brackets or bold; the last
/// standalone letter, or for a letter that is an English word, one at the end of a sentence.
fn letter(text: &str) -> Option<char> {
    let text = text.trim();
    let last = |pattern: Option<&'static regex::Regex>| {
        let found = pattern?.captures_iter(text).last()?;
        found.get(1)?.as_str().chars().next()
    };
    let boxed = || last(pattern!(r"\\boxed\{\s*(?:\\\w+\{)?\s*\(?([A-Za-z])(?:\s*\}|\)|[.:]\s)"));
    // Upper case if another word may follow, so that `the answer is a matter of …` gives no letter.
    let called = || {
        last(pattern!(
            r"(?i:\b(?:answer|choice|option)\b[\s*_]*(?:is|(?:would|must|should|has to|will|can only) be|=|:)[*_]*[\s:]*(?:(?:the\s+)?(?:option|choice)\s+)?)(?:[*_($\[]|\\\()*([A-Z])(?:[*_)$\].,:;]|\\\)|\s|$)"
        ))
    };
    let called_small = || {
        last(pattern!(
            r"(?i:\banswer\b(?:\s+is)?[\s:]*)[*_($\[]*([a-z])(?:[*_)$\]]*[.,]?\s*$|[)\]])"
        ))
    };
    let stated = || {
        last(pattern!(
            r"(?:^|[\s*_(])([A-Z])[*_)]* (?i:is|would be|must be|has to be) (?i:the )?(?i:correct|right|best|answer)\b"
        ))
    };
    // A letter that is also a word must end its sentence.
    let picked = || {
        last(pattern!(
            r"(?i:\b(?:choose|chose|pick|picked|select|selected|go with|going with)\b\s+(?:the\s+)?(?:(?:option|choice|answer)\s+)?)[*_($\[]*([B-HJ-Z]\b|[AI](?:[*_)$\].,:;]|\s*$))"
        ))
    };
    // After the stated answer, since explanations name the other options too.
    let named = || {
        last(pattern!(
            r"(?i:\b(?:answer|choice|option)\b\s*)(?:[*_($\[]|\\\()*([A-Z])(?:[*_)$\].,:;]|\\\)|\s|$)"
        ))
    };
    let first = || {
        let found = pattern!(r"^[*_(\[]*([A-Za-z])(?:[*_)\]]*$|[*_]*[.):\]][*_]*(?:\s|$))")?
            .captures(text)?;
        found.get(1)?.as_str().chars().next()
    };
    let marked = || last(pattern!(r"(?:\(|\[|\*\*)([A-Z])(?:\)|\]|\*\*|[.):]\s)"));
    let alone =
        || last(pattern!(r"(?:^|[\s:])([B-HJ-Z](?:[.,:)]?(?:\s|$))|[AI](?:[.,:)]?\s*$|[.)]\s))"));
    let found = boxed()
        .or_else(called)
        .or_else(called_small)
        .or_else(stated)
        .or_else(picked)
        .or_else(named);
    found.or_else(first).or_else(marked).or_else(alone).map(|letter| letter.to_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use super::super::testing::check;
    use super::letter;

    #[test]
    fn letter_is_found_in_common_phrasings() {
        let right = [
            "B",
            "b",
            "(B)",
            "B.",
            "B) Paris",
            "**B**",
            "**B. Paris**",
            "The answer is B.",
            "the answer is (b)",
            "Answer: B",
            "answer: b",
            "**Answer:** B",
            "The correct answer is **B**, as in Rome.",
            "\\boxed{B}",
            "$\\boxed{\\text{B}}$",
            "A is wrong, C too. So I choose (B).",
            "First A seems right, but it is B",
            "<think>A? C?</think>\nB",
            "The answer is option B",
            "Not A. The answer is: $B$",
            "B: Paris",
        ];
        let wrong = [
            "A",
            "",
            "A dog",
            "The answer is a matter of taste",
            "The answer is C, not B.",
            "I do not know",
        ];
        let cases: Vec<(&str, bool)> =
            right.iter().map(|t| (*t, true)).chain(wrong.iter().map(|t| (*t, false))).collect();
        check(r#"{"verifier": "choice"}"#, Some("(B) Paris"), &cases);
    }

    #[test]
    fn options_named_in_an_explanation_are_not_the_answer() {
        let of_b = [
            ("The answer is B. Option A is incorrect because Paris lies north of it.", true),
            ("The answer is option B. Option C: wrong.", true),
            ("**Answer:** B\n\nOption A is too small, option C too large.", true),
            ("the answer is (b). Option A is wrong.", true),
            ("The correct option is B; option A is not.", true),
            ("I pick option B", true),
            ("Option B (see the answers)", true),
            ("The answer is A. Option B is incorrect.", false),
        ];
        check(r#"{"verifier": "choice"}"#, Some("B"), &of_b);
        let of_c = [("The correct answer is (C). Option D: wrong.", true), ("Option D", false)];
        check(r#"{"verifier": "choice"}"#, Some("C"), &of_c);
    }

    /// Letters that are also words are recognised in the same sentences as others; otherwise right answers would count
    /// less for them.
    #[test]
    fn every_letter_is_found_in_the_same_sentences() {
        for letter in ["A", "B", "I"] {
            let sentences = [
                "X is the correct answer.",
                "I think X is right, since it rains.",
                "I choose X.",
                "I would go with option X.",
                "It is X",
                "It is X.",
                "It must be X. The others are far off.",
                "The answer must be X.",
                "\\boxed{\\mathrm{X}}",
                "\\boxed{X. Paris}",
                "\\boxed{\\text{X) Paris}}",
                "\\boxed{(X) Paris}",
            ];
            let cases = sentences.map(|sentence| sentence.replace('X', letter));
            let cases: Vec<(&str, bool)> = cases.iter().map(|text| (text.as_str(), true)).collect();
            check(r#"{"verifier": "choice"}"#, Some(letter), &cases);
        }
        let words = ["I choose a dog", "A cat is the best answer there is", "\\boxed{a dog}"];
        check(r#"{"verifier": "choice"}"#, Some("A"), &words.map(|text| (text, false)));
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
        #[test]
        fn finding_the_letter_never_panics(text in "[A-Ca-c (){}\\\\.:*é]{0,24}") {
            let _ = letter(&text);
        }
    }
}
