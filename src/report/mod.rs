//! Reports for people and for programs, built from records on disk, never from live state.

pub mod candidates;
pub mod curve;
pub mod html;
pub mod markdown;
pub mod metrics;
pub mod progress;
pub mod quality;
pub mod record;
pub mod summary;

use std::path::Path;

use crate::error::Result;
use crate::store;

/// Writes `report.md` and `report.html` into a run directory and returns the headline table.
pub fn write(run: &Path) -> Result<String> {
    let summary = summary::Summary::read(run)?;
    store::write_atomic(&run.join("report.md"), markdown::render(&summary).as_bytes())?;
    store::write_atomic(&run.join("report.html"), html::render(&summary).as_bytes())?;
    Ok(markdown::headline(&summary))
}
