//! `arriero export`: writes a checkpoint for other programs.

use std::path::{Path, PathBuf};

use candle_core::Device;
use clap::{Args, ValueEnum};
use serde_json::json;

use super::{estimate, output};
use crate::error::{Error, Result};
use crate::model::Architecture;
use crate::model::checkpoint::{Checkpoint, LoadOptions, peek};
use crate::model::export::{Difference, Encoding, Format, check_new, export};
use crate::model::run_dir;
use crate::stage::memory;
use crate::store;
use crate::train::memory::parse_bytes;

#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// A checkpoint directory, a stage or run directory (its last language model), a .gguf file, or a hub id
    checkpoint: String,
    /// The new file or directory
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// Output format; by default from the extension of --out
    #[arg(long)]
    format: Option<FormatName>,
    /// Element type; by default that of the checkpoint
    #[arg(long)]
    dtype: Option<DtypeName>,
    /// Size above which a directory's weights are split into several files
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    max_shard_size: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FormatName {
    /// One file for llama.cpp
    Gguf,
    /// A Hugging Face directory
    Safetensors,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DtypeName {
    /// 32 bits
    F32,
    /// 16 bits, IEEE
    F16,
    /// 16 bits, bfloat
    Bf16,
    /// 8 bits in blocks of 32, GGUF only
    #[value(name = "q8_0")]
    Q8_0,
    /// 4 bits in blocks of 32, GGUF only
    #[value(name = "q4_0")]
    Q4_0,
    /// 4 bits in blocks of 32 with a minimum, GGUF only
    #[value(name = "q4_1")]
    Q4_1,
}

impl DtypeName {
    fn encoding(self) -> Encoding {
        match self {
            Self::F32 => Encoding::F32,
            Self::F16 => Encoding::F16,
            Self::Bf16 => Encoding::Bf16,
            Self::Q8_0 => Encoding::Q8_0,
            Self::Q4_0 => Encoding::Q4_0,
            Self::Q4_1 => Encoding::Q4_1,
        }
    }
}

/// Exports, and prints how much the written model deviates from the original.
pub(super) fn run(args: &ExportArgs) -> Result<()> {
    let is_gguf = args.out.extension().is_some_and(|ending| ending == "gguf");
    let format = match args.format {
        Some(FormatName::Gguf) => Format::Gguf,
        None if is_gguf => Format::Gguf,
        _ => Format::Safetensors(parse_bytes("--max-shard-size", &args.max_shard_size)? as usize),
    };
    check_new(&args.out)?;
    let source = source(&args.checkpoint)?;
    let checkpoint = Checkpoint::load(&source, &Device::Cpu, &LoadOptions::default())?;
    let stored = Encoding::of(checkpoint.config.dtype);
    let encoding = args.dtype.map_or(stored, DtypeName::encoding);
    let difference = export(checkpoint, &args.out, format, encoding)?;
    let size = size(&args.out)?;
    let out = args.out.display();
    if args.json {
        output::line(&summary(args, (&source, size), encoding, &difference).to_string());
        return Ok(());
    }
    let Difference { max_logit_difference, kl, tokens } = difference;
    output::line(&format!(
        "{out}: {source} as {}, {}; read back, over {tokens} tokens: logits differ by at most {max_logit_difference:.3e}, \
         KL {kl:.3e}",
        encoding.name(),
        estimate::bytes(size)
    ));
    Ok(())
}

fn summary(
    args: &ExportArgs,
    (source, size): (&str, u64),
    encoding: Encoding,
    difference: &Difference,
) -> serde_json::Value {
    json!({
        "out": args.out,
        "source": source,
        "dtype": encoding.name(),
        "bytes": size,
        "max_logit_difference": difference.max_logit_difference,
        "kl": difference.kl,
        "tokens": difference.tokens,
        "peak_rss_bytes": memory::peak_bytes().unwrap_or(0),
    })
}

fn size(path: &Path) -> Result<u64> {
    let files = if path.is_dir() { store::files_under(path)? } else { vec![path.to_path_buf()] };
    let sizes = files.iter().map(|path| std::fs::metadata(path).map(|data| data.len()));
    Ok(sizes.sum::<std::io::Result<u64>>()?)
}

/// The model that `text` refers to: for a run its last language model, for a stage its checkpoint.
fn source(text: &str) -> Result<String> {
    let path = Path::new(text);
    if let Some(checkpoint) = run_dir::of_stage(path) {
        return Ok(checkpoint.display().to_string());
    }
    if !run_dir::is_run(path) {
        return Ok(text.to_owned());
    }
    for checkpoint in run_dir::of_run(path)?.iter().rev() {
        if peek(checkpoint)?.0.architecture == Architecture::CausalLm {
            return Ok(checkpoint.display().to_string());
        }
    }
    Err(Error::usage("no finished stage of this run has made a language model")
        .at(text)
        .hint("give the directory of a checkpoint"))
}
