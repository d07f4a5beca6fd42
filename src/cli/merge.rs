//! `arriero merge`: merges an adapter into its base model.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::output;
use crate::error::Result;
use crate::model::export::Encoding;
use crate::model::run_dir;
use crate::stage::merge::{self, Merge, Merged};

#[derive(Debug, Args)]
pub(super) struct MergeArgs {
    /// The adapter: a directory with adapter_config.json and adapter_model.safetensors, or the stage or run that
    /// trained it
    adapter: PathBuf,
    /// The new directory for the merged model
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The base model, instead of the one named by the adapter
    #[arg(long, value_name = "MODEL")]
    base: Option<String>,
    /// Element type of the stored weights
    #[arg(long, default_value = "f32")]
    dtype: StoredType,
    /// Merge into the base's own weights although the adapter was trained on quantized ones, and report the deviation
    /// from the trained model
    #[arg(long)]
    dense_base: bool,
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

/// Merges, and reports how much the outputs changed.
pub(super) fn run(args: MergeArgs) -> Result<()> {
    let encoding = match args.dtype {
        StoredType::F32 => Encoding::F32,
        StoredType::Bf16 => Encoding::Bf16,
        StoredType::F16 => Encoding::F16,
    };
    let MergeArgs { adapter, out, base, json, dense_base, .. } = args;
    let adapter = run_dir::model(&adapter)?;
    let work = Merge { adapter, base, out, encoding, dense_base };
    let merged = merge::merge(&work)?;
    output::line(&if json { serde_json::to_string(&merged)? } else { told(&work, &merged) });
    Ok(())
}

fn told(work: &Merge, merged: &Merged) -> String {
    let beside = match (merged.trained_beside, work.dense_base) {
        ("none", _) => String::new(),
        (packed, false) => {
            format!(" (into the {packed} weights that it was trained on, unpacked)")
        }
        (packed, true) => format!(
            " (into the base's own weights: outputs differ by at most {:.1e} from those beside the {packed} weights of training)",
            merged.from_trained
        ),
    };
    format!(
        "{} adapters merged into {}{beside}: outputs differ by at most {:.1e}, and by {:.1e} more as stored in {}",
        merged.modules,
        work.out.display(),
        merged.max_difference,
        merged.stored.max_logit_difference,
        work.encoding.name()
    )
}
