//! From files of rows to a file of examples: rows are read in batches; rendered, tokenized, masked and truncated on all
//! cores; and written in row order. Memory holds one batch, and each example's location: 24 bytes per row.
//! [`stream`](super::stream) uses the same batches without a file.

use std::io::Write;
use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::mix::Share;
use super::paths;
use super::prepare::{Outcome, PrepareReport, Rule, Skipped, check_positions};
use super::read::{ReadOptions, Reader};
use super::record::Row;
use super::stored::{Place, Writer};
use super::tokenizer::ChatTokenizer;
use super::tree::Tree;
use crate::error::{Context, Error, Result};
use crate::store;

/// Raised when equal rows and settings give different examples than before.
const VERSION: u32 = 2;

/// One of the datasets to join.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Source {
    /// A file, a directory of files or a glob.
    pub path: String,
    /// How to read it.
    pub read: ReadOptions,
    /// Maximum number of rows, from the start; 0 means all. The others are still read and must be readable.
    pub limit: usize,
    /// Fraction to use (see [`Share`]).
    pub fraction: f64,
}

impl Source {
    /// The rows up to the limit, in batches, with those that could not be read.
    fn batches(&self) -> Result<impl Iterator<Item = Result<super::read::Dataset>>> {
        let mut left = if self.limit > 0 { self.limit } else { usize::MAX };
        Ok(Reader::open(&self.path, &self.read)?.map(move |batch| {
            let mut batch = batch?;
            batch.rows.truncate(left);
            left -= batch.rows.len();
            Ok(batch)
        }))
    }

    /// Number of rows up to the limit.
    ///
    /// # Errors
    /// As [`Reader`].
    pub fn count(&self) -> Result<usize> {
        self.batches()?.try_fold(0, |count, batch| Ok(count + batch?.rows.len()))
    }

    /// Refuses a name in `columns` that none of the first rows has. Other problems with them are reported later.
    fn check_columns(&self) -> Result<()> {
        let Ok(mut reader) = Reader::open(&self.path, &self.read) else { return Ok(()) };
        match reader.next() {
            Some(Ok(_)) => reader.check_columns(),
            _ => Ok(()),
        }
    }

    /// The share of this source, number `index` in the list.
    pub(super) fn share(&self, index: usize, seed: u64) -> Result<Share> {
        // Only drawing a subset requires the number of rows in advance.
        let parted = self.fraction.is_finite() && self.fraction.fract() > 0.0;
        Share::new(if parted { self.count()? } else { 0 }, self.fraction, index, seed)
    }
}

/// The first `count` rows used from the sources, each once.
///
/// # Errors
/// As [`Pipeline::write`].
pub fn first_rows(sources: &[Source], seed: u64, count: usize) -> Result<Vec<Row>> {
    let mut found = Vec::new();
    for (index, source) in sources.iter().enumerate() {
        if found.len() == count {
            break;
        }
        let share = source.share(index, seed)?;
        let mut number = 0;
        for batch in source.batches()? {
            for row in batch?.rows {
                if share.times(number) > 0 && found.len() < count {
                    found.push(row);
                }
                number += 1;
            }
            if found.len() == count {
                break;
            }
        }
    }
    Ok(found)
}

/// All inputs that examples depend on.
pub struct Pipeline {
    /// The datasets, joined in this order.
    pub sources: Vec<Source>,
    /// How their rows become trees.
    pub rule: Rule,
    /// Tokenizer and chat template.
    pub tokenizer: ChatTokenizer,
    /// Seed for drawing subsets of rows.
    pub seed: u64,
    /// Longest sequence that the model's positions allow.
    pub positions: usize,
}

/// Called with the number of finished rows; an error stops the work.
pub type Watch<'a> = dyn FnMut(usize) -> Result<()> + 'a;

/// Destination of the trees and their accounting.
struct Out<'a> {
    writer: Writer<'a>,
    report: PrepareReport,
    watch: &'a mut Watch<'a>,
}

/// A row's number within the source, location and outcome.
type RowOutcome = (usize, String, Result<Outcome>);

/// A batch of rows of one source.
pub(super) struct Batch {
    /// Number of rows read.
    pub(super) rows: usize,
    /// Locations and reasons of those that could not be read.
    pub(super) unread: Vec<(String, String)>,
    /// Outcomes of the rows that are used.
    pub(super) outcomes: Vec<RowOutcome>,
}

/// The rows of one source that became trees.
struct Taken {
    share: Share,
    /// Example number of its first row.
    first: usize,
    /// Number of rows in one pass, whatever their outcome.
    rows: usize,
    /// Number within the source, and tree, in row order.
    trees: Vec<(usize, Place)>,
}

impl Taken {
    /// Examples in the order of the joined rows, with their index in it.
    fn examples(&self) -> impl Iterator<Item = (Place, usize)> {
        let whole = (0..self.share.whole).flat_map(move |pass| {
            let first = self.first + pass * self.rows;
            self.trees.iter().map(move |(row, place)| (*place, first + row))
        });
        let first = self.first + self.share.whole * self.rows;
        let part = self.share.part.iter().enumerate().filter_map(move |(rank, row)| {
            let found = self.trees.binary_search_by_key(row, |(row, _)| *row).ok()?;
            Some((self.trees[found].1, first + rank))
        });
        whole.chain(part)
    }
}

impl Pipeline {
    /// SHA-256 of everything that the examples depend on, including the contents of the files.
    ///
    /// # Errors
    /// A file that is missing or cannot be read.
    pub fn hash(&self) -> Result<[u8; 32]> {
        let files = |source: &Source| -> Result<Vec<(String, String)>> {
            let files = paths::files(&source.path, source.read.split.as_deref())?;
            files
                .par_iter()
                .map(|file| Ok((file.display().to_string(), store::sha256_file(file)?)))
                .collect()
        };
        let all = json!({
            "version": VERSION,
            "program": env!("CARGO_PKG_VERSION"),
            "sources": self.sources,
            "files": self.sources.iter().map(files).collect::<Result<Vec<_>>>()?,
            "rule": self.rule,
            "tokenizer": self.tokenizer.hash(),
            "seed": self.seed,
            "positions": self.positions,
        });
        Ok(Sha256::digest(all.to_string()).into())
    }

    /// Prepares all rows and writes them as a file of [`Stored`](super::stored::Stored) examples. `watch` gets the
    /// number of finished rows after each batch and may stop the work.
    ///
    /// # Errors
    /// With `on_bad_row = "error"`, the first row, in file order, that cannot be read or used; a row longer than the
    /// model's positions; no usable row; a full disk.
    pub fn write(
        &self,
        out: &mut dyn Write,
        (path, hash): (&Path, &[u8; 32]),
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        let writer = Writer::new(out, path, hash)?;
        let mut out = Out { writer, report: PrepareReport::default(), watch };
        let mut taken = Vec::new();
        for (index, source) in self.sources.iter().enumerate() {
            taken.push(self.source(index, source, &mut out)?);
        }
        let Out { writer, report, .. } = out;
        if report.rows == 0 {
            let paths: Vec<&str> = self.sources.iter().map(|source| source.path.as_str()).collect();
            return Err(Error::run("no rows")
                .at(paths.join(", "))
                .hint("raise `fraction`, or look at the file"));
        }
        if taken.iter().all(|taken| taken.examples().next().is_none()) {
            return Err(report.nothing());
        }
        writer.finish(taken.iter().flat_map(Taken::examples), &report)
    }

    /// Prepares source number `index`.
    fn source(&self, index: usize, source: &Source, out: &mut Out<'_>) -> Result<Taken> {
        let Out { writer, report, watch } = out;
        let share = source.share(index, self.seed)?;
        let mut taken = Taken { share, first: report.rows, rows: 0, trees: Vec::new() };
        let mut unread = Skipped::default();
        for batch in self.batches(source, &taken.share)? {
            let batch = batch?;
            taken.rows += batch.rows;
            for (place, why) in batch.unread {
                unread.add(&place, why, 1);
            }
            for outcome in batch.outcomes {
                let number = outcome.0;
                if let Some(tree) = self.tree(outcome, taken.share.times(number), report)? {
                    taken.trees.push((number, writer.tree(&tree)?));
                }
            }
            watch(taken.first + taken.rows)?;
        }
        if unread.count > 0 {
            report.unread.push((source.path.clone(), unread));
        }
        report.rows += taken.share.whole * taken.rows + taken.share.part.len();
        Ok(taken)
    }

    /// The rows of a source in batches, with the outcomes of those that are used.
    pub(super) fn batches(
        &self,
        source: &Source,
        share: &Share,
    ) -> Result<impl Iterator<Item = Result<Batch>>> {
        let mut first = 0;
        Ok(source.batches()?.map(move |batch| {
            let batch = batch?;
            let rows = batch.rows.len();
            let outcomes = batch
                .rows
                .into_par_iter()
                .enumerate()
                .map(|(index, row)| (first + index, row))
                .filter(|(number, _)| share.times(*number) > 0)
                .map(|(number, row)| {
                    let outcome = self.rule.tree(number, &row, &self.tokenizer);
                    (number, row.place, outcome)
                })
                .collect();
            first += rows;
            Ok(Batch { rows, unread: batch.skipped, outcomes })
        }))
    }

    /// The tree of a row that is used `times` times, if it has one.
    pub(super) fn tree(
        &self,
        (_, place, outcome): RowOutcome,
        times: usize,
        report: &mut PrepareReport,
    ) -> Result<Option<Tree>> {
        let tree = report.count(&place, outcome, self.rule.on_bad_row(), times)?;
        if let Some(tree) = &tree {
            check_positions(tree, self.positions).at(&place)?;
        }
        Ok(tree)
    }

    /// Refuses sources that use a subset, which requires the number of rows. A stream may end before its files do, so
    /// column names are checked against their first rows.
    pub(super) fn check_streamable(&self) -> Result<()> {
        for (index, source) in self.sources.iter().enumerate() {
            let fraction = source.fraction;
            if fraction.fract() > 0.0 || !(1.0..).contains(&fraction) {
                return Err(Error::usage(format!(
                    "datasets[{index}]: fraction = {fraction}, expected a whole number, 1 or more"
                ))
                .hint("a stream does not know how many rows there are; use `limit`, or leave `streaming` out"));
            }
            source.check_columns()?;
        }
        Ok(())
    }
}
