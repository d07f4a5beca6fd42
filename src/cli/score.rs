//! `arriero score`: judges the completions in a file.

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
    /// The rows: `prompt`, `completion` or `completions`, and what the judge needs, as `answer`
    #[arg(long, value_name = "FILE")]
    data: String,
    /// The file to write: the same rows with `score` and `why`
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Which column is read as which, for example prompt=question; may be given several times
    #[arg(long, value_name = "NAME=COLUMN")]
    column: Vec<String>,
    /// Where a reward model computes
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Who judges. One of them.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Judges {
    /// A verifier: math, number, exact, choice, regex, format, contains, length, repetition, language, json_schema,
    /// ifeval or code (docs/verifiers.md)
    #[arg(long, value_name = "NAME")]
    verifier: Option<String>,
    /// A reward model: a checkpoint's directory or a hub id
    #[arg(long, value_name = "DIR")]
    reward_model: Option<String>,
    /// One or several judges with all their settings, as JSON: '[{"verifier": "length", "max": 80, "weight": 0.5}]'
    #[arg(long, value_name = "JSON")]
    scorers: Option<String>,
}

/// Judges and says how it went.
pub(super) fn run(args: ScoreArgs) -> Result<()> {
    let scorers = scorers(&args.judges)?;
    let columns =
        args.column.iter().map(|pair| column(pair)).collect::<Result<IndexMap<_, _>>>()?;
    let work =
        Scoring { data: args.data, out: args.out, scorers, columns, device: device(&args.device)? };
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

fn scorers(judges: &Judges) -> Result<Vec<Value>> {
    let one = match judges {
        Judges { scorers: Some(text), .. } => return score::scorers(text),
        Judges { verifier: Some(name), .. } => json!({"verifier": name}),
        Judges { reward_model, .. } => json!({"reward_model": reward_model}),
    };
    score::scorers(&one.to_string())
}

fn column(pair: &str) -> Result<(String, String)> {
    let (name, column) = pair.split_once('=').ok_or_else(|| {
        Error::usage(format!("`--column {pair}`: expected NAME=COLUMN"))
            .hint("for example --column prompt=question")
    })?;
    Ok((name.to_owned(), column.to_owned()))
}
