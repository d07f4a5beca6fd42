//! The names that a dataset has for columns (`columns = {prompt = "question"}`), held against the rows: a name that no row
//! has would be ignored, and what is read in its place is another column.

use std::collections::BTreeSet;

use indexmap::IndexMap;
use serde_json::Value;

use crate::error::{Error, Result, did_you_mean};

/// Names of columns that rows have, kept for the message: enough for any table, few where each row has keys of its own.
const KEPT: usize = 64;

/// The names that no row has had so far.
pub(crate) struct Unseen {
    /// Canonical name → its name in the rows.
    names: IndexMap<String, String>,
    found: BTreeSet<String>,
}

impl Unseen {
    /// Before the first row.
    pub(crate) fn new(names: &IndexMap<String, String>) -> Self {
        Self { names: names.clone(), found: BTreeSet::new() }
    }

    /// Whether every name has been seen: then further rows need not be looked at.
    pub(crate) fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Takes note of a row's columns. A column that is null is there: Parquet gives every row every column.
    pub(crate) fn see<'a>(&mut self, columns: impl IntoIterator<Item = &'a String>) {
        if self.is_empty() {
            return;
        }
        for column in columns {
            self.names.retain(|_, name| name != column);
            if self.found.len() < KEPT {
                self.found.insert(column.clone());
            }
        }
    }

    /// To be called after the last of `rows`, which are named as "no row" is.
    ///
    /// # Errors
    /// The first name that no row has had, with the columns that there are.
    pub(crate) fn check(&self, rows: &str) -> Result<()> {
        let Some((canonical, name)) = self.names.first() else { return Ok(()) };
        let found: Vec<&str> = self.found.iter().map(String::as_str).collect();
        let error = Error::run(format!(
            "column `{name}` (for `{canonical}`) is in {rows}; found: {}",
            found.join(", ")
        ));
        Err(match did_you_mean(name, found) {
            Some(near) => error.hint(format!("did you mean `{near}`?")),
            None => error.hint("name a column that the rows have, or leave the name out"),
        })
    }
}

/// The names of a row's columns.
pub(super) fn names(row: &Value) -> Vec<String> {
    row.as_object().map_or_else(Vec::new, |columns| columns.keys().cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_no_row_has_is_refused_with_those_that_there_are() {
        let names = [("answer", "gold_answer"), ("prompt", "question")];
        let names = names.map(|(to, from)| (to.to_owned(), from.to_owned())).into();
        let mut unseen = Unseen::new(&names);
        unseen.see(&["answer".to_owned(), "gold_answers".to_owned()]);
        unseen.see(&["question".to_owned()]);
        assert!(!unseen.is_empty());
        assert_eq!(
            format!("{:?}", unseen.check("no row").unwrap_err()),
            "column `gold_answer` (for `answer`) is in no row; found: answer, gold_answers, question (hint: did you mean `gold_answers`?)"
        );
        unseen.see(&["gold_answer".to_owned()]);
        assert!(unseen.is_empty());
        unseen.check("no row").unwrap();
    }
}
