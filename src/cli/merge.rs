//! `arriero merge`: makes an adapter part of its base model.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::output;
use crate::error::Result;
use crate::model::export::Encoding;
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
    let encoding = match args.dtype {
        StoredType::F32 => Encoding::F32,
        StoredType::Bf16 => Encoding::Bf16,
        StoredType::F16 => Encoding::F16,
    };
    let MergeArgs { adapter, out, base, json, .. } = args;
    let work = Merge { adapter, base, out, encoding };
    let merged = merge::merge(&work)?;
    output::line(&if json {
        serde_json::to_string(&merged)?
    } else {
        format!(
            "{} adapters merged into {}: outputs differ by at most {:.1e}, and by {:.1e} more as stored in {}",
            merged.modules,
            work.out.display(),
            merged.max_difference,
            merged.stored.max_logit_difference,
            encoding.name()
        )
    });
    Ok(())
}
