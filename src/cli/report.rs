//! `arriero report`: writes the reports of a run.

use std::path::PathBuf;

use clap::Args;

use super::output;
use crate::error::Result;

#[derive(Debug, Args)]
pub(super) struct ReportArgs {
    /// A run directory
    run: PathBuf,
}

/// Writes both reports and prints the headline metrics.
pub(super) fn run(args: &ReportArgs) -> Result<()> {
    let table = crate::report::write(&args.run)?;
    if !table.is_empty() {
        output::line(table.trim_end());
    }
    output::note(&format!("wrote {0}/report.md and {0}/report.html", args.run.display()));
    Ok(())
}
