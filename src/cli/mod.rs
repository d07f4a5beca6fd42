//! The command line: one file per command. Knows recipes, runs and reports, but no tensors.
//!
//! A command's result goes to standard output, everything else to standard error. The exit status is 0 on success, 1 if
//! the work failed, 2 if the recipe or the arguments are wrong, 130 after Ctrl-C.

mod bench;
mod chat;
mod doctor;
mod dtype;
mod estimate;
mod export;
mod inputs;
mod interrupt;
mod merge;
mod output;
mod plan;
mod recipes;
mod report;
mod run;
mod score;
mod serve;
mod validate;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Parser, Subcommand};

use crate::error::{Error, Kind, Result};
use crate::ops::cpu::isa::Isa;
use crate::recipe;

/// Post-training for Llama-family models: SFT, reward models, rejection sampling, DPO, from one recipe.
#[derive(Debug, Parser)]
#[command(name = "arriero", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a recipe; an interrupted run resumes
    Run(run::RunArgs),
    /// List the built-in recipes
    Ls,
    /// Copy a recipe for editing
    Cp(recipes::CpArgs),
    /// Check a recipe: types, steps, memory, and a few rows with the trained tokens marked
    Validate(validate::ValidateArgs),
    /// Print what a recipe will do, with every value resolved, as JSON
    Plan(RecipeArgs),
    /// Write report.md and report.html of a run and print its headline metrics
    Report(report::ReportArgs),
    /// Merge an adapter into its base model
    Merge(merge::MergeArgs),
    /// Convert a checkpoint for other programs: GGUF, or safetensors of another type
    Export(export::ExportArgs),
    /// Score the completions in a file: with verifiers or a reward model
    Score(score::ScoreArgs),
    /// Talk to a model
    Chat(chat::ChatArgs),
    /// Serve a model with an OpenAI-compatible API: chat, completions, embeddings, scores
    Serve(serve::ServeArgs),
    /// Show what this machine and this build support
    Doctor(doctor::DoctorArgs),
    /// Measure how fast a model trains and samples on this machine
    Bench(bench::BenchArgs),
    /// Generate answers to prompts with a teacher
    Synth(run::StageArgs),
    /// Fine-tune on demonstrations
    Sft(run::StageArgs),
    /// Train a reward model on preferences
    Reward(run::StageArgs),
    /// Sample and score several answers per prompt
    Sample(run::StageArgs),
    /// Choose training rows and preference pairs from scored answers
    Select(run::StageArgs),
    /// Train on preference pairs with direct preference optimization
    Dpo(run::StageArgs),
    /// Average the weights of checkpoints
    Average(run::AverageArgs),
    /// Evaluate a model on held-out prompts
    Eval(run::StageArgs),
}

/// A recipe and overrides.
#[derive(Debug, Args)]
struct RecipeArgs {
    /// A recipe file, or the name of a built-in recipe (see `arriero ls`)
    recipe: String,
    /// Overrides: key=value, stage.key=value (for example rounds=1 dpo.beta=0.2)
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// The run directory; overrides the recipe's
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Runs the program and returns its exit status.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(mut error) => {
            if let Some(tip) = as_setting(&error) {
                error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
            }
            // Help and version also end up here; clap knows their stream.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    match on_a_worker(|| Isa::from_env().and_then(|_| dispatch(cli.command))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::error(&error);
            ExitCode::from(exit_code(&error))
        }
    }
}

/// The `key=value` form of a setting that was given as an option, `--learning_rate=1e-4`, if the command takes
/// settings.
fn as_setting(error: &clap::Error) -> Option<String> {
    // Not `args`, which panics on arguments that are not UTF-8.
    let mut arguments =
        std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned());
    let command = arguments.next()?;
    let takes_settings = ["run", "plan", "validate"].contains(&command.as_str())
        || recipe::Kind::ALL.iter().any(|kind| kind.name() == command);
    let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    let is_near = error.get(ContextKind::SuggestedArg).is_some();
    if error.kind() != ErrorKind::UnknownArgument || is_near || !takes_settings {
        return None;
    }
    let option = option.split('=').next()?;
    let key = option.strip_prefix("--")?;
    let given = arguments.find(|argument| argument.split('=').next() == Some(option))?;
    let value = match given.split_once('=') {
        Some((_, value)) => Some(value.to_owned()),
        None => arguments.next().filter(|next| !next.starts_with('-')),
    };
    Some(format!("settings have no dashes: {key}={}", value.unwrap_or_else(|| "…".to_owned())))
}

/// Runs the program on one of rayon's own threads. A parallel loop started there begins at once and takes part itself;
/// started from any other thread, it would hand everything over and block, twice per loop.
fn on_a_worker<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    const STACK: usize = 16 << 20;
    // If a pool already exists, its threads serve as well.
    let _ = rayon::ThreadPoolBuilder::new().stack_size(STACK).build_global();
    rayon::scope(|_| work())
}

fn exit_code(error: &Error) -> u8 {
    match error.kind() {
        Kind::Run => 1,
        Kind::Usage => 2,
        Kind::Interrupted => 130,
    }
}

fn dispatch(command: Command) -> Result<()> {
    match command {
        Command::Run(args) => run::run(&args),
        Command::Ls => {
            recipes::ls();
            Ok(())
        }
        Command::Cp(args) => recipes::cp(&args),
        Command::Validate(args) => validate::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Merge(args) => merge::run(args),
        Command::Export(args) => export::run(&args),
        Command::Score(args) => score::run(args),
        Command::Chat(args) => chat::run(&args),
        Command::Serve(args) => serve::run(args),
        Command::Bench(args) => bench::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Synth(args) => run::stage("synth", &args),
        Command::Sft(args) => run::stage("sft", &args),
        Command::Reward(args) => run::stage("reward", &args),
        Command::Sample(args) => run::stage("sample", &args),
        Command::Select(args) => run::stage("select", &args),
        Command::Dpo(args) => run::stage("dpo", &args),
        Command::Average(args) => run::average(args),
        Command::Eval(args) => run::stage("eval", &args),
    }
}
