//! `arriero run`, and one command per stage kind, which runs a one-stage recipe.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use serde_json::{Value, json};

use super::{RecipeArgs, interrupt, output, recipes};
use crate::error::Result;
use crate::recipe::{Plan, RecipeFile, resolve};
use crate::report::progress::Progress;
use crate::report::record::StageRecord;
use crate::stage::{self, memory};

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Print one line of JSON at the end: stages, seconds, peak memory
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct StageArgs {
    /// Settings, as in a recipe: model_name_or_path=… datasets=… learning_rate=1e-5
    #[arg(value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// The run directory
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print one line of JSON at the end: stages, seconds, peak memory
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct AverageArgs {
    /// Checkpoints, hub ids, GGUF files or PEFT adapters, and settings: method=slerp t=0.3 weights=[2,1] save_dtype=bf16
    #[arg(value_name = "MODEL|KEY=VALUE", required = true)]
    words: Vec<String>,
    /// The run directory; the result is its stages/01-average/checkpoint
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print one line of JSON at the end: stages, seconds, peak memory
    #[arg(long)]
    json: bool,
}

/// Whether a word sets a key; a path such as `runs/lr=1e-4` does not.
fn is_setting(word: &str) -> bool {
    let key = word.split_once('=').map(|(key, _)| key);
    key.is_some_and(|key| {
        !key.is_empty() && key.chars().all(|c| c.is_ascii_lowercase() || c == '_')
    })
}

/// Runs an `average` stage: words that are not settings are models.
pub(super) fn average(args: AverageArgs) -> Result<()> {
    let (mut settings, models): (Vec<String>, Vec<String>) =
        args.words.into_iter().partition(|word| is_setting(word));
    if !models.is_empty() {
        settings.push(format!("models={}", json!(models)));
    }
    stage("average", &StageArgs { settings, out: args.out, json: args.json })
}

/// Runs a recipe.
pub(super) fn run(args: &RunArgs) -> Result<()> {
    let (mut file, resolved) = recipes::resolved(&args.recipe)?;
    if !args.recipe.overrides.is_empty() {
        let changes = as_comments(&args.recipe.overrides);
        file.text =
            format!("{}\n\n# Changed on the command line:\n{changes}", file.text.trim_end());
    }
    execute(&file, &resolved.plan, args.json)
}

/// Runs one stage without a recipe.
pub(super) fn stage(kind: &str, args: &StageArgs) -> Result<()> {
    let mut file = RecipeFile::of_one_stage(kind);
    file.apply(&args.settings)?;
    let resolved = resolve(&file, args.out.as_deref())?;
    for note in &resolved.notes {
        output::note(&format!("note: {note}"));
    }
    file.text = format!("# arriero {kind}\n{}", as_comments(&args.settings));
    execute(&file, &resolved.plan, args.json)
}

/// Arguments as comments for the recipe that is kept with the run, because the text alone is not all that was run.
fn as_comments(arguments: &[String]) -> String {
    let lines = arguments.iter().flat_map(|argument| argument.lines());
    lines.fold(String::new(), |text, line| format!("{text}# {line}\n"))
}

fn execute(file: &RecipeFile, plan: &Plan, json: bool) -> Result<()> {
    let started = Instant::now();
    let progress = Progress::new(plan.steps.len(), interrupt::listen()?);
    let records = stage::rounds::run_plan(plan, &file.text, &progress, &stage::run_stage)?;
    let table = crate::report::write(&plan.output_dir)?;
    if !table.is_empty() {
        output::line(table.trim_end());
    }
    output::note(&format!("{0}: report.md, report.html, stages/", plan.output_dir.display()));
    if json {
        output::line(&summary(&records, started.elapsed().as_secs_f64()).to_string());
    }
    Ok(())
}

fn summary(records: &[StageRecord], wall_s: f64) -> Value {
    let stages: Vec<Value> = records
        .iter()
        .map(|record| {
            json!({
                "name": record.name,
                "kind": record.kind,
                "round": record.round,
                "reused": record.reused,
                "weights_sha256": record.weights_sha256,
                "metrics": record.metrics,
            })
        })
        .collect();
    json!({"stages": stages, "wall_s": wall_s, "peak_rss_bytes": memory::peak_bytes().unwrap_or(0)})
}
