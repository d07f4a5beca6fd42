//! `arriero bench`: how fast a model trains and samples on this machine.

use clap::{Args, ValueEnum};
use serde_json::json;

use super::dtype::Dtype;
use super::output;
use crate::bench::ceiling::{self, Ceiling};
use crate::bench::{self, Figures, Method, Options, prepare};
use crate::error::{Error, Result};
use crate::generate::sampling::WeightFormat;
use crate::model::lora::Lora;
use crate::model::packed::Quantization;
use crate::ops::cpu::isa::Isa;
use crate::stage::{device, memory};

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// What to measure
    method: MethodName,
    /// A checkpoint directory, a .gguf file, or a hub id
    #[arg(long)]
    model: String,
    /// Rows, pairs or samples per step
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Device: cpu, or cuda:0
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Tokens per sequence, prompt included
    #[arg(long, default_value_t = 512)]
    seq: usize,
    /// Tokens of the prompt shared by a pair's sides or by the samples
    #[arg(long, default_value_t = 128)]
    prompt: usize,
    /// `sft` on rows of 60 to 400 tokens with a masked prompt, instead of --seq tokens
    #[arg(long)]
    chat: bool,
    /// Compute type
    #[arg(long, default_value = "f32")]
    dtype: Dtype,
    /// Steps to take the median of, after one warm-up step
    #[arg(long, default_value_t = 6)]
    steps: usize,
    /// Recompute blocks in the backward pass
    #[arg(long)]
    recompute: bool,
    /// Recompute as many blocks as this memory budget requires, such as 5GiB
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "",
        hide_default_value = true,
        conflicts_with = "recompute"
    )]
    memory_budget: String,
    /// The dataset for `prepare`
    #[arg(long, required_if_eq("method", "prepare"))]
    data: Option<String>,
    /// Train adapters of this rank on the frozen model
    #[arg(long, value_name = "RANK")]
    lora: Option<usize>,
    /// Storage of the frozen projections of --lora (nf4, gguf), or of the matrices of `generate` (q8_0, q4_0, q4_1)
    #[arg(long, default_value = "none")]
    quantization: QuantizationName,
    /// Prompts to sample at once, with --batch answers each
    #[arg(long, default_value_t = 1)]
    prompts: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum MethodName {
    /// Training steps on dense rows
    Sft,
    /// Training steps on pairs with a shared prompt
    Dpo,
    /// Training steps of a reward model on the same pairs
    Reward,
    /// Samples of one prompt
    Generate,
    /// A reward model's scores of several responses to one prompt
    Score,
    /// The vocabulary head alone, forward and backward
    Head,
    /// One block's attention alone, forward and backward
    Attention,
    /// The matrix products of an SFT step alone, next to the step
    Ceiling,
    /// How fast rows of --data are turned into training examples
    Prepare,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum QuantizationName {
    None,
    Nf4,
    Gguf,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "q4_1")]
    Q4_1,
}

impl QuantizationName {
    /// For frozen projections.
    fn frozen(self) -> Quantization {
        match self {
            Self::Nf4 => Quantization::Nf4,
            Self::Gguf => Quantization::Gguf,
            _ => Quantization::None,
        }
    }

    /// For a generating model.
    fn writing(self) -> WeightFormat {
        match self {
            Self::Q8_0 => WeightFormat::Q8_0,
            Self::Q4_0 => WeightFormat::Q4_0,
            Self::Q4_1 => WeightFormat::Q4_1,
            Self::None | Self::Nf4 | Self::Gguf => WeightFormat::None,
        }
    }
}

/// Measures and prints the results.
pub(super) fn run(args: &BenchArgs) -> Result<()> {
    let options = Options {
        model: args.model.clone(),
        device: device::open(&args.device)?,
        batch: args.batch,
        seq: args.seq,
        prompt: args.prompt,
        chat: args.chat,
        steps: args.steps,
        recompute: args.recompute,
        memory_budget: args.memory_budget.clone(),
        dtype: args.dtype.into(),
        lora: Lora {
            use_peft: args.lora.is_some(),
            lora_r: args.lora.unwrap_or(1),
            quantization: args.quantization.frozen(),
            ..Lora::default()
        },
        prompts: args.prompts,
        weights: args.quantization.writing(),
    };
    if options.lora.quantization != Quantization::None && args.lora.is_none() {
        return Err(Error::usage("--quantization nf4 or gguf without --lora")
            .hint("packed projections are frozen; give --lora 16"));
    }
    let method = match args.method {
        MethodName::Sft => Method::Sft,
        MethodName::Dpo => Method::Dpo,
        MethodName::Reward => Method::Reward,
        MethodName::Generate => Method::Generate,
        MethodName::Score => Method::Score,
        MethodName::Head => Method::Head,
        MethodName::Attention => Method::Attention,
        MethodName::Prepare => return prepare(args),
        MethodName::Ceiling => {
            let ceiling = ceiling::run(&options)?;
            print(args, serde_json::to_value(&ceiling)?, &ceiling_text(&ceiling));
            return Ok(());
        }
    };
    let figures = bench::run(method, &options)?;
    print(args, serde_json::to_value(&figures)?, &figures_text(&figures));
    Ok(())
}

/// Prints one line of JSON, or the text and the measurement setup.
fn print(args: &BenchArgs, mut object: serde_json::Value, text: &str) {
    let peak = memory::peak_bytes();
    let (isa, threads) = (Isa::current().name(), rayon::current_num_threads());
    if args.json {
        object["peak_rss_bytes"] = json!(peak);
        object["isa"] = json!(isa);
        object["threads"] = json!(threads);
        output::line(&object.to_string());
        return;
    }
    let peak = peak.map_or_else(|| "unknown".to_owned(), gib);
    output::line(&format!("{text}, peak {peak}, {isa} kernels on {threads} threads"));
}

fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

fn figures_text(figures: &Figures) -> String {
    let pairs =
        figures.pairs_per_s.map_or_else(String::new, |pairs| format!(", {pairs:.3} pairs/s"));
    let extra = figures
        .extra_peak_bytes
        .map_or_else(String::new, |bytes| format!(", {} above the start", gib(bytes)));
    let read = (figures.weights_read_per_s.zip(figures.memory_read_per_s))
        .zip(figures.memory_read_share)
        .map_or_else(String::new, |((weights, memory), share)| {
            let (weights, memory, share) = (weights / 1e9, memory / 1e9, 100.0 * share);
            format!(", weights read at {weights:.1} of {memory:.1} GB/s ({share:.0} %)")
        });
    let (rate, step) = (figures.tokens_per_s, figures.step_s);
    format!("{rate:.1} tokens/s{pairs}, {step:.3} s a step{extra}{read}")
}

/// A table of the shapes, followed by the step.
fn ceiling_text(ceiling: &Ceiling) -> String {
    let rows = ceiling.products.iter().map(|product| {
        let layout = json!(product.layout);
        format!(
            "{:>7.1} GFLOP/s  {:>5} x  {}x{}x{} {}{}  {}\n",
            product.gflops,
            product.count,
            product.m,
            product.n,
            product.k,
            layout.as_str().unwrap_or_default(),
            if product.add { "+" } else { " " },
            product.name,
        )
    });
    format!(
        "{}{:.1} % of a step is products: {:.3} of {:.3} s; {:.1} GFLOP/s a step, {:.1} between registers",
        rows.collect::<String>(),
        100.0 * ceiling.share,
        ceiling.products_s,
        ceiling.step_s,
        ceiling.gflops,
        ceiling.register_peak_gflops,
    )
}

/// Measures how fast a dataset is prepared for training.
fn prepare(args: &BenchArgs) -> Result<()> {
    let figures = prepare::run(&args.model, args.data.as_deref().unwrap_or_default())?;
    let text = format!(
        "{} rows, {} tokens in {:.1} s: {:.0} rows/s; file of {:.0} MiB, {:.0} examples/s read back",
        figures.rows,
        figures.tokens,
        figures.prepare_s,
        figures.rows_per_s,
        figures.bytes as f64 / f64::from(1 << 20),
        figures.reads_per_s
    );
    print(args, serde_json::to_value(&figures)?, &text);
    Ok(())
}
