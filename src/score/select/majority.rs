//! The most frequent final answer among candidates (self-consistency, Wang et al. 2022).

use indexmap::IndexMap;

use super::rows::{SftRow, sft_row};
use super::{Candidate, Candidates, Rules};
use crate::error::Result;
use crate::generate::engine::Finish;
use crate::score::verifiers::{Part, last_number};

/// Extracts the final answer from a text.
#[derive(Clone, Debug, Default)]
pub struct AnswerReader {
    part: Part,
}

impl AnswerReader {
    /// Reads the last match of `pattern`: its first group, or the whole match. An empty pattern takes the last
    /// `\boxed{…}`, otherwise the last number.
    ///
    /// # Errors
    /// An invalid regular expression.
    pub fn new(pattern: &str) -> Result<Self> {
        if pattern.is_empty() {
            return Ok(Self::default());
        }
        Ok(Self { part: Part::at(Some(pattern), "answer_pattern")? })
    }

    /// Whether no pattern is set.
    pub fn is_default(&self) -> bool {
        self.part.is_all()
    }

    /// The final answer in canonical form, so that equal answers are equal strings; `None` if there is none.
    ///
    /// ```
    /// use arriero::score::select::AnswerReader;
    /// let read = |text| AnswerReader::default().read(text);
    /// assert_eq!(read("3 and 4 make 7.0, so \\boxed{7}."), Some("7".to_owned()));
    /// assert_eq!((read("1,000 eggs"), read("none")), (Some("1000".to_owned()), None));
    /// ```
    pub fn read(&self, text: &str) -> Option<String> {
        let part = match (self.part.is_all(), boxed(text)) {
            (false, _) => self.part.of(text)?,
            (true, Some(inner)) => inner,
            (true, None) => return last_number(text).map(canonical),
        };
        let words = part.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
        // A number in another notation is the same answer; words around it make it a different one.
        let is_number = words.chars().all(|c| c.is_ascii_digit() || "+-.,/$% ".contains(c));
        let number = is_number.then(|| last_number(&words)).flatten();
        Some(number.map_or(words, canonical)).filter(|answer| !answer.is_empty())
    }
}

/// Nine significant digits, so that rounding does not separate equal answers.
fn canonical(number: f64) -> String {
    let rounded: f64 = format!("{number:.8e}").parse().unwrap_or(number);
    if rounded == 0.0 { "0".to_owned() } else { rounded.to_string() }
}

/// Content of the last closed `\boxed{…}`.
fn boxed(text: &str) -> Option<&str> {
    const OPENING: &str = "\\boxed{";
    let inner = &text[text.rfind(OPENING)? + OPENING.len()..];
    let mut depth = 1_usize;
    for (at, c) in inner.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(&inner[..at]);
        }
    }
    None
}

/// The best `best_of` eligible candidates with the majority answer. Every finished candidate with an answer has one
/// vote, duplicates included. On equal votes the answer with the better best candidate wins.
pub(super) fn rows<'a>(
    row: &Candidates,
    eligible: impl Iterator<Item = &'a Candidate>,
    rules: &Rules,
) -> Vec<SftRow> {
    let mut votes: IndexMap<String, (usize, f64)> = IndexMap::new();
    for candidate in row.candidates.iter().filter(|one| one.finish == Finish::Stop) {
        if let Some(answer) = rules.answers.read(&candidate.text) {
            let (count, best) = votes.entry(answer).or_insert((0, f64::MIN));
            (*count, *best) = (*count + 1, best.max(candidate.score));
        }
    }
    let all: usize = votes.values().map(|(count, _)| count).sum();
    let first_of_most = |best: (String, (usize, f64)), other: (String, (usize, f64))| {
        let order = best.1.0.cmp(&other.1.0).then(best.1.1.total_cmp(&other.1.1));
        if order.is_lt() { other } else { best }
    };
    let Some((answer, (count, _))) = votes.into_iter().reduce(first_of_most) else {
        return Vec::new();
    };
    let agreement = count as f64 / all as f64;
    if agreement < rules.min_agreement {
        return Vec::new();
    }
    eligible
        .filter(|candidate| rules.answers.read(&candidate.text).as_ref() == Some(&answer))
        .take(rules.best_of)
        .map(|candidate| sft_row(row, candidate, Some(agreement)))
        .collect()
}
