//! `arriero score`: scores the completions in a file.

use std::path::PathBuf;

use clap::Args;
use indexmap::IndexMap;
use serde_json::{Value, json};

use super::{interrupt, output};
use crate::error::{Error, Result};
use crate::report::progress::Bar;
use crate::stage::rounds::device;
use crate::stage::score::{self, Scoring};

#[derive(Debug, Args)]
pub(super) struct ScoreArgs {
    #[command(flatten)]
    judges: Judges,
    /// Form of the question to --judge: rubric, pairwise or code
    #[arg(long, value_name = "FORM", requires = "judge")]
    form: Option<String>,
    /// What --judge should consider
    #[arg(long, value_name = "TEXT", requires = "judge")]
    rubric: Option<String>,
    /// Number of times --judge is asked about each answer
    #[arg(long, value_name = "N", requires = "judge")]
    votes: Option<u32>,
    /// The regex that --verifier regex or format matches, or that locates the answer for another verifier
    #[arg(long, value_name = "REGEX", requires = "verifier")]
    pattern: Option<String>,
    /// The rows: `prompt`, `completion` or `completions`, and what the scorer needs, such as `answer`
    #[arg(long, value_name = "FILE")]
    data: String,
    /// The output file: the same rows with `score` and `why`, and `stdout` and `stderr` of executed programs
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Replace the output file if it exists
    #[arg(long)]
    force: bool,
    /// Column mapping, for example prompt=question; may be given several times
    #[arg(long, value_name = "NAME=COLUMN")]
    column: Vec<String>,
    /// Device of a reward model
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// The scorers. Exactly one is given.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Judges {
    /// A verifier: math, number, exact, choice, regex, format, contains, length, repetition, language, json_schema,
    /// ifeval or code (docs/verifiers.md)
    #[arg(long, value_name = "NAME")]
    verifier: Option<String>,
    /// A reward model: a checkpoint directory or a hub id
    #[arg(long, value_name = "DIR")]
    reward_model: Option<String>,
    /// A language model as judge: a checkpoint directory, a hub id, or a server as JSON:
    /// '{"base_url": "http://localhost:8000/v1", "model": "NAME"}' (docs/teachers.md)
    #[arg(long, value_name = "MODEL")]
    judge: Option<String>,
    /// One or more scorers with all their settings, as JSON: '[{"verifier": "length", "max": 80, "weight": 0.5}]'
    #[arg(long, value_name = "JSON")]
    scorers: Option<String>,
}

/// Scores the rows and prints a summary.
pub(super) fn run(args: ScoreArgs) -> Result<()> {
    let scorers = scorers(&args)?;
    let columns =
        args.column.iter().map(|pair| column(pair)).collect::<Result<IndexMap<_, _>>>()?;
    let work = Scoring {
        data: args.data,
        out: args.out,
        replace: args.force,
        scorers,
        columns,
        device: device(&args.device)?,
    };
    let scored = {
        let bar = Bar::new("score", interrupt::listen()?);
        score::score(&work, &bar)?
    };
    if args.json {
        output::line(&serde_json::to_string(&scored)?);
        return Ok(());
    }
    let passed = scored.passed.map_or_else(String::new, |passed| format!(", {passed} passed"));
    output::line(&format!(
        "{}: {} rows, {} completions, mean score {:.4}{passed}",
        work.out.display(),
        scored.rows,
        scored.completions,
        scored.mean_score
    ));
    Ok(())
}

fn scorers(args: &ScoreArgs) -> Result<Vec<Value>> {
    let mut one = match &args.judges {
        Judges { scorers: Some(text), .. } => return score::scorers(text),
        Judges { verifier: Some(name), .. } => json!({"verifier": name}),
        Judges { judge: Some(model), .. } => json!({"judge": judge(model)?}),
        Judges { reward_model, .. } => json!({"reward_model": reward_model}),
    };
    let ScoreArgs { form, rubric, votes, pattern, .. } = args;
    for (key, value) in [
        ("form", form.as_ref().map(|form| json!(form))),
        ("rubric", rubric.as_ref().map(|rubric| json!(rubric))),
        ("votes", votes.map(|votes| json!(votes))),
        ("pattern", pattern.as_ref().map(|pattern| json!(pattern))),
    ] {
        if let Some(value) = value {
            one[key] = value;
        }
    }
    score::scorers(&one.to_string())
}

/// A model name, or the table of a server.
fn judge(text: &str) -> Result<Value> {
    if !text.trim_start().starts_with('{') {
        return Ok(json!(text));
    }
    serde_json::from_str(text)
        .map_err(|error| Error::usage(format!("`--judge` is not valid JSON: {error}")))
}

fn column(pair: &str) -> Result<(String, String)> {
    let (name, column) = pair.split_once('=').ok_or_else(|| {
        Error::usage(format!("`--column {pair}`: expected NAME=COLUMN"))
            .hint("for example --column prompt=question")
    })?;
    Ok((name.to_owned(), column.to_owned()))
}
