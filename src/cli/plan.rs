//! `arriero plan`: the plan as JSON.

use super::{RecipeArgs, output, recipes};
use crate::error::Result;

/// Prints the plan.
pub(super) fn run(args: &RecipeArgs) -> Result<()> {
    let (_, resolved) = recipes::resolved(args)?;
    output::line(&serde_json::to_string_pretty(&resolved.plan)?);
    Ok(())
}
