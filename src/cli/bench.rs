//! `arriero bench`: how fast this machine trains and samples with a model.

use clap::{Args, ValueEnum};
use serde_json::json;

use super::{doctor, output};
use crate::error::Result;
use crate::ops::cpu::isa::Isa;
use crate::stage::bench::{self, Method, Options};
use crate::stage::bench_prepare;

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// What to measure
    method: MethodName,
    /// A checkpoint directory, a .gguf file, or a hub id
    #[arg(long)]
    model: String,
    /// Rows, pairs or samples a step
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens of a sequence, prompt included
    #[arg(long, default_value_t = 512)]
    seq: usize,
    /// Tokens of the prompt that a pair's sides or the samples share
    #[arg(long, default_value_t = 128)]
    prompt: usize,
    /// Steps to take the median of, after one that is not counted
    #[arg(long, default_value_t = 6)]
    steps: usize,
    /// Recompute blocks in the backward pass
    #[arg(long)]
    recompute: bool,
    /// The dataset to prepare, for `prepare`
    #[arg(long, required_if_eq("method", "prepare"))]
    data: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum MethodName {
    Sft,
    Dpo,
    Reward,
    Generate,
    Prepare,
}

/// Measures and prints.
pub(super) fn run(args: &BenchArgs) -> Result<()> {
    let method = match args.method {
        MethodName::Prepare => return prepare(args),
        MethodName::Sft => Method::Sft,
        MethodName::Dpo => Method::Dpo,
        MethodName::Reward => Method::Reward,
        MethodName::Generate => Method::Generate,
    };
    let options = Options {
        model: args.model.clone(),
        batch: args.batch,
        seq: args.seq,
        prompt: args.prompt,
        steps: args.steps,
        recompute: args.recompute,
    };
    let figures = bench::run(method, &options)?;
    let peak = doctor::peak_rss_bytes();
    if args.json {
        let mut object = serde_json::to_value(&figures)?;
        object["peak_rss_bytes"] = json!(peak);
        object["isa"] = json!(Isa::current().name());
        object["threads"] = json!(rayon::current_num_threads());
        output::line(&object.to_string());
        return Ok(());
    }
    let pairs =
        figures.pairs_per_s.map_or_else(String::new, |pairs| format!(", {pairs:.3} pairs/s"));
    output::line(&format!(
        "{:.1} tokens/s{pairs}, {:.3} s a step, peak {:.2} GiB, {} kernels on {} threads",
        figures.tokens_per_s,
        figures.step_s,
        peak as f64 / f64::from(1 << 30),
        Isa::current().name(),
        rayon::current_num_threads()
    ));
    Ok(())
}

/// Measures how a dataset is prepared for training.
fn prepare(args: &BenchArgs) -> Result<()> {
    let figures = bench_prepare::run(&args.model, args.data.as_deref().unwrap_or_default())?;
    let peak = doctor::peak_rss_bytes();
    if args.json {
        let mut object = serde_json::to_value(&figures)?;
        object["peak_rss_bytes"] = json!(peak);
        object["threads"] = json!(rayon::current_num_threads());
        output::line(&object.to_string());
        return Ok(());
    }
    output::line(&format!(
        "{} rows, {} tokens in {:.1} s: {:.0} rows/s on {} threads, peak {:.0} MiB; file of {:.0} MiB, {:.0} examples/s \
         read back",
        figures.rows,
        figures.tokens,
        figures.prepare_s,
        figures.rows_per_s,
        rayon::current_num_threads(),
        peak as f64 / f64::from(1 << 20),
        figures.bytes as f64 / f64::from(1 << 20),
        figures.reads_per_s
    ));
    Ok(())
}
