//! Accounting of dataset rows: how many were used, truncated and skipped, and why.

use serde::{Deserialize, Serialize};

use super::prepare::{OnBadRow, Outcome};
use super::tree::Tree;
use crate::error::{Error, Result};

/// Skipped rows: their number, and the first of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// How many; a row that is used twice counts twice.
    pub count: usize,
    /// Location and reason of the first [`SHOWN`](Self::SHOWN) skipped rows.
    pub first: Vec<(String, String)>,
}

impl Skipped {
    /// How many are listed.
    pub const SHOWN: usize = 5;

    /// Adds a row that was to be used `times` times.
    pub fn add(&mut self, place: &str, why: String, times: usize) {
        self.count += times;
        if self.first.len() < Self::SHOWN {
            self.first.push((place.to_owned(), why));
        }
    }
}

/// Outcome of preparing a set of rows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareReport {
    /// Rows to be turned into trees; a row that is used twice counts twice.
    pub rows: usize,
    /// Unreadable rows, by the path of their dataset.
    pub unread: Vec<(String, Skipped)>,
    /// Rows skipped because of the settings or `on_bad_row = "skip"`.
    pub skipped: Skipped,
    /// Rows cut to length.
    pub truncated: usize,
    /// Tokens of all trees, shared ones counted once.
    pub tokens: usize,
    /// Trained tokens of all trees.
    pub trained_tokens: usize,
}

impl PrepareReport {
    /// Counts the outcome of a row that is used `times` times; returns its tree, if any.
    pub(super) fn count(
        &mut self,
        place: &str,
        outcome: Result<Outcome>,
        on_bad_row: OnBadRow,
        times: usize,
    ) -> Result<Option<Tree>> {
        match outcome {
            Ok(Outcome::Tree(tree, truncated)) => {
                self.truncated += times * usize::from(truncated);
                self.tokens += times * tree.tokens();
                let roles = tree.segments.iter().flat_map(|segment| &segment.roles);
                self.trained_tokens += times * roles.filter(|role| role.trained()).count();
                return Ok(Some(tree));
            }
            Ok(Outcome::Dropped(why)) => self.skipped.add(place, why, times),
            Err(error) if on_bad_row == OnBadRow::Skip => {
                self.skipped.add(place, error.to_string(), times);
            }
            Err(error) => {
                return Err(error.at(place).hint("on_bad_row = \"skip\" leaves such rows out"));
            }
        }
        Ok(None)
    }

    /// The error if no row is left.
    pub(super) fn nothing(&self) -> Error {
        let error = Error::run(format!("none of {} rows can be used", self.rows));
        match self.skipped.first.first() {
            Some((place, why)) => error.hint(format!("the first, {place}: {why}")),
            None => error.hint("the dataset is empty; check its path, split and filters"),
        }
    }
}
