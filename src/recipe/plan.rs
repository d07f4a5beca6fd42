//! The plan: what will run, in order, with every value decided. Pure and printable; the run's `plan.json` and the
//! hash that decides on reuse are made from it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::data::pipeline::Source;
use crate::data::prepare::{OnBadRow, SftOptions};
use crate::data::read::{Format, ReadOptions};
use crate::error::{Context, Error, Result};
use crate::generate::sampling::Sampling;
use crate::generate::teacher::TeacherSpec;
use crate::loss::sft::{Normalization, TokenLoss};
use crate::model::lora::Lora;
use crate::score::ScorerSpec;
use crate::train::Settings;

pub use super::average::{Average, AverageMethod, SoupMetric};
pub use super::dpo::{Dpo, Preset};
pub use super::rejection::{Condition, Policy, Sample, Select};
pub use super::reward::{Head, Reward};

/// A whole run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// The recipe's name.
    pub name: String,
    /// Seed of everything random.
    pub seed: u64,
    /// How often the list of stages runs.
    pub rounds: u32,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// The run directory.
    pub output_dir: PathBuf,
    /// The stages of all rounds in the order in which they run.
    pub steps: Vec<Step>,
}

/// One stage of one round.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// Name of its directory under `stages/`: number, stage name, and from the second round on `-r2`.
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

/// What a stage does, with all its settings. Paths and hub ids only: no references are left.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Spec {
    /// A teacher answers prompts.
    Synth(Synth),
    /// Supervised fine-tuning.
    Sft(Sft),
    /// Reward-model training.
    Reward(Reward),
    /// K scored candidates a prompt.
    Sample(Sample),
    /// Good candidates as training rows, better and worse ones as pairs.
    Select(Select),
    /// Preference optimization: DPO and its relatives.
    Dpo(Dpo),
    /// Several checkpoints into one.
    Average(Average),
    /// Held-out measures.
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

/// What a stage leaves in its directory under a fixed name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    /// What references call it: `"@select.pairs"`.
    pub name: &'static str,
    /// The file or directory.
    pub path: &'static str,
    /// Whether it is what `"@name"` alone means.
    pub main: bool,
}

const CHECKPOINT: Output = Output { name: "checkpoint", path: "checkpoint", main: true };
const DATA: Output = Output { name: "data", path: "data.jsonl", main: true };

impl Kind {
    /// Every kind, in the order of the method.
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

    /// What a finished stage of this kind has written.
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

    /// Version of what the kind computes. Raise it when equal inputs give other results than before: finished work
    /// of the older version is then not reused.
    pub fn version(self) -> u32 {
        match self {
            // 3: of `sft` rows that weigh nothing are left out and answers that say nothing refused; responses without text are
            // not selected; of `average` heads and bases that do not belong together are refused, and an adapter that stays
            // alone in a soup is copied.
            Self::Sft | Self::Select | Self::Average => 3,
            // 4: of `synth` verifiers read answers otherwise; of `reward` what learned from text says so, and of `dpo` single
            // responses have their loss's weight. 3: responses without text are bad rows.
            Self::Synth | Self::Reward | Self::Dpo => 4,
            // 5: verifiers read answers otherwise, and reward models that learned from text are asked in text. 4: rows have what
            // programs wrote.
            Self::Sample | Self::Eval => 5,
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

    /// What a policy that this stage trains begins with.
    pub(super) fn policy(&self) -> Option<&str> {
        match self {
            Self::Sft(spec) => Some(&spec.model_name_or_path),
            Self::Dpo(spec) => Some(&spec.model_name_or_path),
            _ => None,
        }
    }

    /// What is unusual in these settings, and what of them changes nothing: it may stand in `[defaults]` for another stage.
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

    /// Refuses settings that cannot be acted on.
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
            return Err(Error::usage("`datasets` is missing or leads to nothing")
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

/// Scorers stay as written for the stage, which loads their models; whether they can be built is known here.
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
    /// Which part of a directory or hub dataset.
    pub split: String,
    /// How much of it to use: 0.5 is half, 2 is all of it twice.
    #[serde(alias = "weight")]
    pub fraction: f64,
    /// Which column of the file is read as which: `{prompt = "question"}`.
    pub columns: std::collections::BTreeMap<String, String>,
    /// The format of its rows, where they have columns of several.
    #[serde(rename = "type")]
    pub format: Option<Format>,
    /// At most this many rows, from the start; 0 is all.
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
    /// The dataset as the reader takes it.
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
    /// The teacher: a checkpoint, or a server's table.
    pub teacher: TeacherSpec,
    /// The prompts.
    pub datasets: Vec<Dataset>,
    /// How to sample.
    pub sampling: Sampling,
    /// Only answers that pass all of these are kept (see [`ScorerSpec`]).
    pub scorers: Vec<Value>,
    /// Keep an answer whose score is at least this, where `scorers` are given.
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

/// `sft`: supervised fine-tuning. Writes `checkpoint/`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sft {
    /// The start.
    pub model_name_or_path: String,
    /// What to learn.
    pub datasets: Vec<Dataset>,
    /// What to evaluate on while training; may be empty.
    pub eval_datasets: Vec<Dataset>,
    /// How rows become tokens.
    pub data: SftOptions,
    /// A built-in chat template or a Jinja file, for models that have none; empty keeps the model's own.
    pub chat_template: String,
    /// Special tokens to add to the tokenizer, with rows in the embedding (the mean of the old ones); those that it
    /// has already stay as they are.
    pub added_tokens: Vec<String>,
    /// Begin with random weights: `model_name_or_path` holds a configuration and a tokenizer only.
    pub random_init: bool,
    /// How to train.
    pub train: Settings,
    /// Whether to train adapters instead.
    pub lora: Lora,
    /// What a trained token costs: `nll` or `dft`.
    pub loss_type: TokenLoss,
    /// What a step's sum is divided by: `token`, `row` or `step`.
    pub loss_normalization: Normalization,
    /// Share of each token's probability that is spread evenly over the vocabulary.
    pub label_smoothing: f64,
    /// Coefficient of the squared log-sum-exp of the logits (PaLM); 0 is off.
    pub z_loss_coefficient: f64,
    /// The column with each row's weight, 0 or more; empty weighs all rows the same.
    pub row_weight_column: String,
}

impl Sft {
    /// The loss, without weights of rows.
    pub fn loss(&self) -> crate::loss::sft::Sft {
        crate::loss::sft::Sft {
            loss: self.loss_type,
            normalization: self.loss_normalization,
            label_smoothing: self.label_smoothing,
            z_loss_coefficient: self.z_loss_coefficient,
            ..Default::default()
        }
    }
}

/// `eval`: held-out measures. Writes `data.jsonl` with every answer; its numbers are in the record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Eval {
    /// The policy.
    pub model_name_or_path: String,
    /// Held-out prompts with answers.
    pub datasets: Vec<Dataset>,
    /// How to sample.
    pub sampling: Sampling,
    /// Who judges.
    pub scorers: Vec<Value>,
    /// Model from which KL is measured; empty measures none.
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
