//! `repetition`: rejects text that repeats itself.

use std::collections::HashSet;

use super::{Rule, judged};
use crate::error::{Error, Result};
use crate::score::{Question, Score, ScorerSpec};

/// The fraction of word n-grams that occurred earlier in the text.
pub(super) struct Repetition {
    ngram: usize,
    max_share: f64,
}

impl Repetition {
    pub(super) fn new(spec: &ScorerSpec) -> Result<Self> {
        let ngram = spec.ngram.unwrap_or(3);
        if ngram == 0 {
            return Err(Error::usage("`ngram` is 0, expected 1 or more words"));
        }
        let max_share = spec.max_share.unwrap_or(0.2);
        if !(0.0..=1.0).contains(&max_share) {
            return Err(Error::usage(format!("`max_share` is {max_share}, expected 0 to 1")));
        }
        Ok(Self { ngram, max_share })
    }
}

/// Fraction of repeated n-grams of `ngram` words, ignoring case; 0 if there are none.
fn share(text: &str, ngram: usize) -> f64 {
    let text = text.to_lowercase();
    let words: Vec<&str> = text.split_whitespace().collect();
    let (mut all, mut seen) = (0_usize, HashSet::new());
    for sequence in words.windows(ngram) {
        all += 1;
        seen.insert(sequence);
    }
    if all == 0 { 0.0 } else { (all - seen.len()) as f64 / all as f64 }
}

impl Rule for Repetition {
    fn verify(&self, _: &Question<'_>, text: &str) -> Result<Score> {
        let share = share(text, self.ngram);
        let why = format!("{:.0} % of the {}-grams are repeated", 100.0 * share, self.ngram);
        Ok(judged(share <= self.max_share, why))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::check;
    use super::share;

    #[test]
    fn repeated_word_sequences_are_counted() {
        // Bigrams ab bc ca ab bc: 3 of 5 are new.
        assert!((share("a b c A b c", 2) - 0.4).abs() < 1e-12);
        assert!(share("a b", 3).abs() < 1e-12 && share("", 1).abs() < 1e-12);
        let cases =
            [("one two three four five", true), (&"I like tea. ".repeat(9), false), ("", true)];
        check(r#"{"verifier": "repetition"}"#, None, &cases);
        let spec = r#"{"verifier": "repetition", "ngram": 1, "max_share": 0.5}"#;
        check(spec, None, &[("a a", true), ("a a a", false)]);
    }
}
