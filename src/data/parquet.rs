//! Parquet files, row by row; one row group is open at a time and decoded in steps.

use std::path::Path;

use parquet::file::reader::SerializedFileReader;

use super::read::{Content, Raw, RawRows};
use crate::error::{Context, Result};

const HINT: &str = "expected a complete Parquet file";

/// The rows of one file, counted from 1. A row that cannot be decoded ends the file: nothing after it can be trusted.
pub(super) fn rows(file: &Path) -> Result<RawRows> {
    let open = || -> Result<_> {
        Ok(SerializedFileReader::new(std::fs::File::open(file)?)?.into_iter().with_batch_size(1024))
    };
    let rows = open().at(file.display()).hint(HINT)?;
    let name = file.display().to_string();
    Ok(Box::new(rows.enumerate().map(move |(index, row)| {
        let place = format!("{name}: row {}", index + 1);
        let row = row.at(&place).hint(HINT)?;
        Ok(Raw { place, content: Content::Value(row.to_json_value()) })
    })))
}
