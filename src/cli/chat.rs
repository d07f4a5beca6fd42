//! `arriero chat`: talk to a model.

use clap::Args;

use crate::error::{Error, Result};

#[derive(Debug, Args)]
pub(super) struct ChatArgs {
    /// A checkpoint directory, a .gguf file, or a hub id
    model: String,
    /// Sampling settings: temperature=0.7 max_new_tokens=256
    #[arg(value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

/// Answers lines from standard input until it ends.
pub(super) fn run(args: &ChatArgs) -> Result<()> {
    Err(Error::run(format!("chat with {} {:?} is not built yet", args.model, args.settings)))
}
