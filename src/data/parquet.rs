//! Parquet files, row by row.

use std::path::Path;

use parquet::file::reader::{FileReader, SerializedFileReader};

use super::read::Raw;
use crate::error::{Context, Error, Result};

/// The rows of one file; rows count from one.
pub(super) fn values(file: &Path) -> Result<Vec<Raw>> {
    let open = || -> Result<Vec<Raw>> {
        let reader = SerializedFileReader::new(std::fs::File::open(file)?)?;
        let mut rows = Vec::new();
        for (index, row) in reader.get_row_iter(None)?.enumerate() {
            let place = format!("{}: row {}", file.display(), index + 1);
            rows.push((place, row.map(|row| row.to_json_value()).map_err(Error::from)));
        }
        Ok(rows)
    };
    open().at(file.display()).hint("expected a complete Parquet file")
}
