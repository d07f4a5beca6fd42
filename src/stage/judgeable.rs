//! Checks that rows have what the verifiers read, such as `answer`, before a model is loaded or queried: answers that
//! cannot be scored after generation are wasted work.

use rayon::prelude::*;
use serde_json::Value;

use crate::data::record::Row;
use crate::error::{Context, Result};
use crate::score::verifiers::{self, Check, Verifier};
use crate::score::{Question, Scorer, ScorerSpec};

/// A text that every verifier can judge and none accepts. Not empty, since some verifiers then ignore the row.
const TEXT: &str = ".";

/// The verifiers among the scorers that read more of a row than its prompt.
pub struct Readers(Vec<(String, Reader)>);

enum Reader {
    /// Judges instantly.
    Rule(Verifier),
    /// `code`, whose programs are not run for this check.
    Tests,
}

impl Readers {
    /// The verifiers among `scorers`, given as in a recipe.
    ///
    /// # Errors
    /// A scorer that a recipe would refuse.
    pub fn among(scorers: &[Value]) -> Result<Self> {
        let mut readers = Vec::new();
        for scorer in scorers {
            let spec: ScorerSpec = serde_json::from_value(scorer.clone())?;
            let reader = match spec.verifier {
                Some(Check::Code) => Reader::Tests,
                // These look only at the text, one of them with a tokenizer that would have to be read.
                None | Some(Check::Regex | Check::Format | Check::Length | Check::Repetition) => {
                    continue;
                }
                Some(check) => Reader::Rule(Verifier::new(check, &spec)?),
            };
            readers.push((spec.label().to_owned(), reader));
        }
        Ok(Self(readers))
    }

    /// Refuses a row for which a verifier could not judge any answer.
    ///
    /// # Errors
    /// What the row lacks, by the row's location and the scorer's name.
    pub fn check(&self, question: &Question<'_>) -> Result<()> {
        for (label, reader) in &self.0 {
            let read = match reader {
                Reader::Rule(verifier) => verifier.score(question, &[TEXT]).map(|_| ()),
                Reader::Tests => verifiers::code_tests(question).map(|_| ()),
            };
            read.at(format_args!("{}: scorer `{label}`", question.place))?;
        }
        Ok(())
    }

    /// Checks the rows of prompts; reports the first that is refused.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn check_rows(&self, rows: &[Row]) -> Result<()> {
        let check = |row: &Row| {
            let answer = row.answer();
            // No verifier here reads the prompt itself.
            let question = Question {
                place: &row.place,
                prompt: &[],
                tools: None,
                answer: answer.as_deref(),
                extra: Some(&row.extra),
            };
            self.check(&question).err()
        };
        // The first in row order, whichever core finds one first.
        rows.par_iter().find_map_first(check).map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::read::{ReadOptions, from_value};

    #[test]
    fn the_first_row_that_a_verifier_cannot_judge_is_named() {
        let row = |number: usize, columns: &Value| {
            let mut row = json!({"prompt": "2+2?"});
            for (name, value) in columns.as_object().unwrap() {
                row[name] = value.clone();
            }
            from_value(row, &format!("p.jsonl:{number}"), &ReadOptions::default()).unwrap()
        };
        for (scorer, good, bad, part) in [
            (json!({"verifier": "number"}), json!({"answer": 4}), json!({}), "no `answer`"),
            (
                json!({"verifier": "number"}),
                json!({"answer": "4"}),
                json!({"answer": "x"}),
                "no number",
            ),
            (
                json!({"verifier": "exact"}),
                json!({"answer": "4"}),
                json!({"answer": ["4"]}),
                "a list",
            ),
            (json!({"verifier": "math"}), json!({"answer": "4"}), json!({}), "no `answer`"),
            (
                json!({"verifier": "choice"}),
                json!({"answer": "B"}),
                json!({"answer": "17"}),
                "no choice",
            ),
            (json!({"verifier": "contains"}), json!({"answer": "4"}), json!({}), "no `answer`"),
            (json!({"verifier": "language"}), json!({"language": "en"}), json!({}), "language"),
            (json!({"verifier": "code"}), json!({"test": "assert True"}), json!({}), "no tests"),
        ] {
            let rows = [row(1, &good), row(2, &good), row(3, &bad), row(4, &bad)];
            let readers = Readers::among(std::slice::from_ref(&scorer)).unwrap();
            readers.check_rows(&rows[..2]).unwrap();
            let error = readers.check_rows(&rows).unwrap_err().to_string();
            let name = scorer["verifier"].as_str().unwrap();
            assert!(error.starts_with(&format!("p.jsonl:3: scorer `{name}`: ")), "{error}");
            assert!(error.contains(part), "{error}");
        }
        // What the scorer itself provides is not required of the rows.
        let alone = [
            json!({"verifier": "contains", "values": ["4"]}),
            json!({"verifier": "length", "max": 9, "unit": "tokens", "tokenizer": "not/read/here"}),
            json!({"reward_model": "not/read/either"}),
        ];
        Readers::among(&alone).unwrap().check_rows(&[row(1, &json!({}))]).unwrap();
    }
}
