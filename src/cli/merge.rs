//! `arriero merge`: makes an adapter part of its base model.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::output;
use crate::error::Result;
use crate::model::Precision;
use crate::stage::merge::{self, Merge};

#[derive(Debug, Args)]
pub(super) struct MergeArgs {
    /// The adapter: a directory with adapter_config.json and adapter_model.safetensors
    adapter: PathBuf,
    /// The new directory for the merged model
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The base model, instead of the one that the adapter names
    #[arg(long, value_name = "MODEL")]
    base: Option<String>,
    /// How weights are stored
    #[arg(long, default_value = "f32")]
    dtype: StoredType,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum StoredType {
    F32,
    Bf16,
    F16,
}

/// Merges and says how far the numbers moved.
pub(super) fn run(args: MergeArgs) -> Result<()> {
    let dtype = match args.dtype {
        StoredType::F32 => Precision::F32,
        StoredType::Bf16 => Precision::Bf16,
        StoredType::F16 => Precision::F16,
    };
    let work = Merge { adapter: args.adapter, base: args.base, out: args.out, dtype };
    let report = merge::merge(&work)?;
    if args.json {
        output::line(&serde_json::to_string(&report)?);
    } else {
        output::line(&merge::summary(&report, &work.out));
    }
    Ok(())
}
