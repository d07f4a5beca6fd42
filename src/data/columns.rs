//! Checks a dataset's column names (`columns = {prompt = "question"}`) against the rows: a name that no row has would
//! be ignored, and another column would be read in its place.

use std::collections::BTreeSet;

use indexmap::IndexMap;
use serde_json::Value;

use crate::error::{Error, Result, did_you_mean};

/// Number of column names kept for the message: enough for any table, few if each row has keys of its own.
const KEPT: usize = 64;

/// Column names that no row has had so far.
pub(crate) struct Unseen {
    /// Canonical name → its name in the rows.
    names: IndexMap<String, String>,
    found: BTreeSet<String>,
}

impl Unseen {
    /// The state before the first row.
    pub(crate) fn new(names: &IndexMap<String, String>) -> Self {
        Self { names: names.clone(), found: BTreeSet::new() }
    }

    /// Whether every name has been seen, so that further rows need no check.
    pub(crate) fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Records a row's columns. A null column counts as present: Parquet gives every row every column.
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

    /// Call after the last row. `rows` is the subject of the error message, such as "no row".
    ///
    /// # Errors
    /// The first name that no row has, with the columns that exist.
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

/// Names of a row's columns.
pub(super) fn names(row: &Value) -> Vec<String> {
    row.as_object().map_or_else(Vec::new, |columns| columns.keys().cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn column_in_no_row_is_refused_with_the_columns_found() {
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
