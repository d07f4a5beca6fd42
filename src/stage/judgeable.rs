//! Whether rows have what the verifiers read, such as `answer`: found before a model is loaded or asked, as an answer that
//! is drawn first and cannot be judged then is work lost.

use rayon::prelude::*;
use serde_json::Value;

use crate::data::record::Row;
use crate::error::{Context, Result};
use crate::score::verifiers::{self, Check, Verifier};
use crate::score::{Question, Scorer, ScorerSpec};

/// A text that any verifier can judge, and none likes. Not the empty one, of which some do not look at the row.
const TEXT: &str = ".";

/// The verifiers among some scorers that read more of a row than its prompt.
pub struct Readers(Vec<(String, Reader)>);

enum Reader {
    /// Judges in no time.
    Rule(Verifier),
    /// `code`, whose programs are not run for this.
    Tests,
}

impl Readers {
    /// Those among `scorers`, as in a recipe.
    ///
    /// # Errors
    /// A scorer that a recipe would refuse.
    pub fn among(scorers: &[Value]) -> Result<Self> {
        let mut readers = Vec::new();
        for scorer in scorers {
            let spec: ScorerSpec = serde_json::from_value(scorer.clone())?;
            let reader = match spec.verifier {
                Some(Check::Code) => Reader::Tests,
                // They look at the text alone, one of them by a tokenizer that would have to be read.
                None | Some(Check::Regex | Check::Format | Check::Length | Check::Repetition) => {
                    continue;
                }
                Some(check) => Reader::Rule(Verifier::new(check, &spec)?),
            };
            readers.push((spec.label().to_owned(), reader));
        }
        Ok(Self(readers))
    }

    /// Refuses a row that one of them could not judge any answer of.
    ///
    /// # Errors
    /// What the row lacks, by the row's place and the scorer's name.
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

    /// The same of prompts' rows: the first of them that is refused.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn check_rows(&self, rows: &[Row]) -> Result<()> {
        let check = |row: &Row| {
            let answer = row.answer();
            // Nobody here reads the prompt itself.
            let question = Question {
                place: &row.place,
                prompt: &[],
                tools: None,
                answer: answer.as_deref(),
                extra: Some(&row.extra),
            };
            self.check(&question).err()
        };
        // The first in the order of the rows, whichever core finds one first.
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
        // What is given in the scorer is not asked of the rows.
        let alone = [
            json!({"verifier": "contains", "values": ["4"]}),
            json!({"verifier": "length", "max": 9, "unit": "tokens", "tokenizer": "not/read/here"}),
            json!({"reward_model": "not/read/either"}),
        ];
        Readers::among(&alone).unwrap().check_rows(&[row(1, &json!({}))]).unwrap();
    }
}
