//! Checks a stage's inputs that are already on this machine before anything runs: models (without weights), and the
//! rows of stages that generate and score.

use std::path::{Path, PathBuf};

use candle_core::Device;
use serde_json::Value;

use crate::error::{Context, Result};
use crate::model::checkpoint::peek;
use crate::model::source::{self, Source};
use crate::recipe::plan::Dataset;
use crate::recipe::{Spec, Step};
use crate::report::record::Silent;
use crate::stage::{StageContext, generation};

/// Keys whose text may name a local model.
const MODELS: [&str; 8] = [
    "model_name_or_path",
    "ref_model_name_or_path",
    "reference",
    "models",
    "base_model",
    "teacher",
    "reward_model",
    "assistant_model",
];

/// Checks all inputs. Those that do not exist yet, such as another stage's outputs, are skipped.
///
/// # Errors
/// A model that cannot be read, with its key; a row that cannot be read, or that lacks what a verifier needs.
pub(super) fn check(step: &Step) -> Result<()> {
    let place = |error: crate::Error| error.at(format!("stage `{}`", step.id));
    models(&serde_json::to_value(&step.spec)?).map_err(place)?;
    rows(step).map_err(place)
}

/// Checks the models that `settings` names, at any depth.
fn models(settings: &Value) -> Result<()> {
    match settings {
        Value::Object(settings) => settings.iter().try_for_each(|(key, value)| {
            if MODELS.contains(&key.as_str()) {
                named(value)
                    .into_iter()
                    .try_for_each(|name| model(name).at(format_args!("`{key}`")))?;
            }
            models(value)
        }),
        Value::Array(list) => list.iter().try_for_each(models),
        _ => Ok(()),
    }
}

/// One name, or a list of names.
fn named(value: &Value) -> Vec<&str> {
    match value {
        Value::String(name) => vec![name],
        Value::Array(names) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

fn model(name: &str) -> Result<()> {
    if !Path::new(name).exists() {
        return Ok(());
    }
    let (Source::Directory(path) | Source::Gguf(path)) = source::resolve(name, None)?;
    peek(&path).map(drop)
}

/// Checks the rows used as prompts, with their scorers.
fn rows(step: &Step) -> Result<()> {
    let (datasets, scorers): (&[Dataset], &[Value]) = match &step.spec {
        Spec::Synth(spec) => (&spec.datasets, &spec.scorers),
        Spec::Sample(spec) => (&spec.datasets, &spec.scorers),
        Spec::Eval(spec) => (&spec.datasets, &spec.scorers),
        _ => return Ok(()),
    };
    if !datasets.iter().all(|dataset| Path::new(&dataset.path).exists()) {
        return Ok(());
    }
    let context = StageContext {
        dir: PathBuf::new(),
        round: step.round,
        seed: step.seed,
        device: Device::Cpu,
        events: &Silent,
    };
    generation::rows(&context, datasets, scorers).map(drop)
}
