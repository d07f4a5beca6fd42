//! The plan: what will run, in order, with every value resolved. Pure and printable; the run's `plan.json` and the hash
//! that decides on reuse are derived from it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::data::pipeline::Source;
use crate::data::prepare::OnBadRow;
use crate::data::read::{Format, ReadOptions};
use crate::error::{Context, Error, Result};
use crate::generate::sampling::Sampling;
use crate::generate::teacher::TeacherSpec;
use crate::model::lora::Lora;
use crate::score::ScorerSpec;
use crate::train::Settings;

pub use super::average::{Average, AverageMethod, SoupMetric};
pub use super::dpo::{Dpo, Preset};
pub use super::rejection::{Condition, Policy, Sample, Select};
pub use super::reward::{Head, Reward};
pub use super::sft::Sft;

/// A whole run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// The recipe's name.
    pub name: String,
    /// Seed of all randomness.
    pub seed: u64,
    /// Number of times the list of stages runs.
    pub rounds: u32,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// The run directory.
    pub output_dir: PathBuf,
    /// The stages of all rounds, in execution order.
    pub steps: Vec<Step>,
}

/// One stage of one round.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// Name of its directory under `stages/`: number, stage name, and `-r2` and so on from the second round.
    pub id: String,
    /// The stage's name in the recipe.
    pub name: String,
    /// The round, counted from 1.
    pub round: u32,
    /// Seed of this stage in this round, derived from the run's.
    pub seed: u64,
    /// What to do.
    #[serde(flatten)]
    pub spec: Spec,
}

/// What a stage does, with all its settings. Paths and hub ids only: all references are resolved.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Spec {
    /// A teacher answers prompts.
    Synth(Synth),
    /// Supervised fine-tuning.
    Sft(Sft),
    /// Reward-model training.
    Reward(Reward),
    /// K scored candidates per prompt.
    Sample(Sample),
    /// Good candidates as training rows, better and worse ones as preference pairs.
    Select(Select),
    /// Preference optimization: DPO and variants.
    Dpo(Dpo),
    /// Merges several checkpoints into one.
    Average(Average),
    /// Held-out evaluation.
    Eval(Eval),
}

/// The stage kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// See [`Spec::Synth`].
    Synth,
    /// See [`Spec::Sft`].
    Sft,
    /// See [`Spec::Reward`].
    Reward,
    /// See [`Spec::Sample`].
    Sample,
    /// See [`Spec::Select`].
    Select,
    /// See [`Spec::Dpo`].
    Dpo,
    /// See [`Spec::Average`].
    Average,
    /// See [`Spec::Eval`].
    Eval,
}

/// An output with a fixed name in a stage's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its name in references: `"@select.pairs"`.
    pub name: &'static str,
    /// The file or directory.
    pub path: &'static str,
    /// Whether `"@name"` alone refers to it.
    pub main: bool,
}

const CHECKPOINT: Output = Output { name: "checkpoint", path: "checkpoint", main: true };
const DATA: Output = Output { name: "data", path: "data.jsonl", main: true };

impl Kind {
    /// Every kind, in pipeline order.
    pub const ALL: [Self; 8] = [
        Self::Synth,
        Self::Sft,
        Self::Reward,
        Self::Sample,
        Self::Select,
        Self::Dpo,
        Self::Average,
        Self::Eval,
    ];

    /// The kind's name in recipes and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Synth => "synth",
            Self::Sft => "sft",
            Self::Reward => "reward",
            Self::Sample => "sample",
            Self::Select => "select",
            Self::Dpo => "dpo",
            Self::Average => "average",
            Self::Eval => "eval",
        }
    }

    /// The outputs of a finished stage of this kind.
    pub fn outputs(self) -> &'static [Output] {
        match self {
            Self::Synth | Self::Sample | Self::Eval => &[DATA],
            Self::Sft | Self::Reward | Self::Dpo | Self::Average => &[CHECKPOINT],
            Self::Select => &[
                Output { name: "sft", path: "sft.jsonl", main: false },
                Output { name: "pairs", path: "pairs.jsonl", main: false },
            ],
        }
    }

    /// Version of the kind's semantics. Raise it when equal inputs give different results than before: finished work of
    /// an older version is then not reused.
    pub fn version(self) -> u32 {
        match self {
            // 3: responses without text are not selected.
            Self::Select => 3,
            // 4: measures the first ingredient of a soup as written, leaves out models whose output is not finite, and names
            // the base of adapters by a lasting path.
            Self::Average => 4,
            // 5: no part of a word is taken as the prompt that responses share; a message's `training` may be 0 or 1; `sft`
            // refuses empty turns among others.
            Self::Sft | Self::Dpo => 5,
            // 6: the shared prompt as in `dpo` 5. `synth` 5: verifiers compare whole numbers exactly and call the tests that a
            // row only defines.
            Self::Synth | Self::Reward => 6,
            // 7: the shared prompt as in `dpo` 5. 6: verifiers as in `synth` 5. 5: reward models that learned from text are
            // queried with text.
            Self::Sample | Self::Eval => 7,
        }
    }
}

impl Spec {
    /// The kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Synth(_) => Kind::Synth,
            Self::Sft(_) => Kind::Sft,
            Self::Reward(_) => Kind::Reward,
            Self::Sample(_) => Kind::Sample,
            Self::Select(_) => Kind::Select,
            Self::Dpo(_) => Kind::Dpo,
            Self::Average(_) => Kind::Average,
            Self::Eval(_) => Kind::Eval,
        }
    }

    /// The model that a policy trained by this stage starts from.
    pub(super) fn policy(&self) -> Option<&str> {
        match self {
            Self::Sft(spec) => Some(&spec.model_name_or_path),
            Self::Dpo(spec) => Some(&spec.model_name_or_path),
            _ => None,
        }
    }

    /// Unusual settings, and settings without effect, which may come from `[defaults]` for another stage.
    pub(super) fn notes(&self) -> Vec<String> {
        let (train, held_out, mut notes) = match self {
            Self::Sft(spec) => (&spec.train, &spec.eval_datasets, Vec::new()),
            Self::Reward(spec) => (&spec.train, &spec.eval_datasets, Vec::new()),
            Self::Dpo(spec) => (&spec.train, &spec.eval_datasets, spec.notes()),
            _ => return Vec::new(),
        };
        let (samples, best) = (train.eval_samples > 0, train.load_best_model_at_end);
        let (writes, evaluates) = (matches!(self, Self::Sft(_)), !held_out.is_empty());
        let without_effect = [
            (
                samples && !writes,
                "`eval_samples` has no effect: only `sft` stages write answers while they train",
            ),
            (
                samples && writes && !evaluates,
                "`eval_samples` has no effect: without `eval_datasets` there are no prompts",
            ),
            (
                train.eval_steps > 0 && !evaluates,
                "`eval_steps` has no effect: without `eval_datasets` nothing is evaluated",
            ),
            (
                best && !evaluates,
                "`load_best_model_at_end` has no effect: without `eval_datasets` no weights are the best",
            ),
            (
                best && evaluates && train.eval_steps == 0,
                "`load_best_model_at_end` has no effect: without `eval_steps` the end is all that is evaluated",
            ),
        ];
        let written = without_effect.iter().filter(|(is_so, _)| *is_so);
        notes.extend(written.map(|(_, note)| (*note).to_owned()));
        notes
    }

    /// Refuses invalid settings.
    ///
    /// # Errors
    /// Names the key, its value and what was expected.
    pub fn check(&self) -> Result<()> {
        let (models, datasets): (&[(&str, &String)], Option<&[Dataset]>) = match self {
            Self::Synth(spec) => {
                spec.check()?;
                (&[], Some(&spec.datasets))
            }
            Self::Sft(spec) => {
                check_training(&spec.train, &spec.lora, &spec.eval_datasets)?;
                if spec.random_init && spec.lora.use_peft {
                    return Err(Error::usage("`random_init` with `use_peft`").hint(
                        "adapters add to what a model has learned: leave one of the two out",
                    ));
                }
                spec.loss().check()?;
                if spec.train.streaming && !spec.row_weight_column.is_empty() {
                    return Err(Error::usage("`streaming` with `row_weight_column`")
                        .hint("weights are read before training begins: leave `streaming` out"));
                }
                (&[("model_name_or_path", &spec.model_name_or_path)], Some(&spec.datasets))
            }
            Self::Reward(spec) => {
                check_training(&spec.train, &spec.lora, &spec.eval_datasets)?;
                spec.check()?;
                (&[("model_name_or_path", &spec.model_name_or_path)], Some(&spec.datasets))
            }
            Self::Sample(spec) => {
                check_scorers(&spec.scorers)?;
                spec.check()?;
                (&[("model_name_or_path", &spec.model_name_or_path)], Some(&spec.datasets))
            }
            Self::Select(spec) => (&[], spec.rules(0).map(|_| Some(spec.datasets.as_slice()))?),
            Self::Dpo(spec) => {
                check_training(&spec.train, &spec.lora, &spec.eval_datasets)?;
                spec.check()?;
                (&[("model_name_or_path", &spec.model_name_or_path)], Some(&spec.datasets))
            }
            Self::Average(spec) => {
                spec.check()?;
                (&[], None)
            }
            Self::Eval(spec) => {
                check_scorers(&spec.scorers)?;
                spec.sampling.check()?;
                (&[("model_name_or_path", &spec.model_name_or_path)], Some(&spec.datasets))
            }
        };
        for (key, model) in models {
            if model.is_empty() {
                return Err(missing_model(key));
            }
        }
        if datasets.is_some_and(<[_]>::is_empty) {
            return Err(Error::usage("`datasets` is missing or matches nothing")
                .hint("a file, a hub id, or \"@stage\"; every reference with `?` may be absent"));
        }
        Ok(())
    }
}

fn missing_model(key: &str) -> Error {
    Error::usage(format!("`{key}` is missing"))
        .hint("a directory, a .gguf file, a hub id, or \"@stage\"")
}

fn check_training(train: &Settings, lora: &Lora, held_out: &[Dataset]) -> Result<()> {
    train.check()?;
    train.check_held_out(!held_out.is_empty())?;
    lora.check_saved_as(train.save_dtype)
}

/// Scorers stay as written until the stage loads their models; this checks that they can be built.
pub(crate) fn check_scorers(scorers: &[Value]) -> Result<()> {
    for (index, scorer) in scorers.iter().enumerate() {
        let place = format!("`scorers`[{index}]");
        let spec: ScorerSpec = serde_path_to_error::deserialize(scorer)
            .map_err(|error| super::resolve::misread(&error.inner().to_string()).at(&place))?;
        spec.check().at(&place).map_err(Error::as_usage)?;
    }
    Ok(())
}

/// One dataset of a stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dataset {
    /// A file, a directory, or a hub id.
    pub path: String,
    /// Split of a directory or hub dataset.
    pub split: String,
    /// How much of it to use: 0.5 is half, 2 repeats it twice.
    #[serde(alias = "weight")]
    pub fraction: f64,
    /// Renames columns of the file: `{prompt = "question"}`.
    pub columns: std::collections::BTreeMap<String, String>,
    /// The row format, if the rows have columns of several formats.
    #[serde(rename = "type")]
    pub format: Option<Format>,
    /// Maximum number of rows, from the start; 0 means all.
    pub limit: usize,
}

impl Default for Dataset {
    fn default() -> Self {
        Self {
            path: String::new(),
            split: "train".to_owned(),
            fraction: 1.0,
            columns: std::collections::BTreeMap::new(),
            format: None,
            limit: 0,
        }
    }
}

impl Dataset {
    /// The dataset as a reader source.
    pub fn source(&self, on_bad_row: OnBadRow) -> Source {
        let read = ReadOptions {
            columns: self.columns.clone().into_iter().collect(),
            split: Some(self.split.clone()),
            format: self.format,
            on_bad_row,
        };
        Source { path: self.path.clone(), read, limit: self.limit, fraction: self.fraction }
    }
}

/// `synth`: a teacher answers prompts. Writes `data.jsonl`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Synth {
    /// The teacher: a checkpoint, or the table of a server.
    pub teacher: TeacherSpec,
    /// The prompts.
    pub datasets: Vec<Dataset>,
    /// Sampling settings.
    pub sampling: Sampling,
    /// Keep only answers that pass all of these (see [`ScorerSpec`]).
    pub scorers: Vec<Value>,
    /// Keep answers that score at least this, if `scorers` are set.
    pub min_score: f64,
}

impl Synth {
    fn check(&self) -> Result<()> {
        check_scorers(&self.scorers)?;
        self.sampling.check()?;
        if self.teacher.is_empty() {
            return Err(missing_model("teacher"));
        }
        self.teacher.check().at("`teacher`").map_err(Error::as_usage)
    }
}

/// `eval`: held-out evaluation. Writes `data.jsonl` with every answer; the metrics are in the record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Eval {
    /// The policy.
    pub model_name_or_path: String,
    /// Held-out prompts with answers.
    pub datasets: Vec<Dataset>,
    /// Sampling settings.
    pub sampling: Sampling,
    /// The scorers.
    pub scorers: Vec<Value>,
    /// Model to measure KL against; empty measures none.
    pub reference: String,
}

impl Default for Eval {
    fn default() -> Self {
        Self {
            model_name_or_path: String::new(),
            datasets: Vec::new(),
            sampling: Sampling::greedy(Sampling::default().max_new_tokens),
            scorers: Vec::new(),
            reference: String::new(),
        }
    }
}
