//! Judges of answers: verifiers that check them, reward models that score them, language models as judges; and
//! selection from their scores.

pub mod candidates;
pub mod curve;
pub mod judge;
mod panel;
pub mod reward_model;
pub mod sandbox;
pub mod select;
pub mod statistics;
pub mod verifiers;

use std::collections::BTreeMap;
use std::fmt;

use candle_core::Device;
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::data::record::Message;
use crate::error::{Context, Error, Result};
use crate::generate::openai::Account;
use crate::generate::teacher::TeacherSpec;
use crate::model::bases::Bases;
use crate::report::record::Events;
use judge::{Form, Judge};
pub use panel::{Panel, Verdict};
use reward_model::{Reading, RewardModel, StepAggregation};
use sandbox::Streams;
use verifiers::{Check, Unit, Verifier};

/// One scorer in a recipe: a verifier, reward model or language model, and its weight in the total score.
///
/// ```
/// use arriero::score::ScorerSpec;
/// let spec: ScorerSpec = serde_json::from_str(r#"{"verifier": "length", "max": 80, "weight": 0.5}"#)?;
/// assert_eq!(spec.label(), "length");
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScorerSpec {
    /// The check to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verifier: Option<Check>,
    /// A reward model's checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward_model: Option<String>,
    /// A language model, given like `teacher`: a checkpoint or a server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judge: Option<TeacherSpec>,
    /// `judge`: question form: `rubric`, `pairwise` or `code`.
    #[serde(default)]
    pub form: Form,
    /// `judge`: criteria; each form has a default text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rubric: Option<String>,
    /// `judge`: number of votes per answer or pair.
    #[serde(default = "once")]
    pub votes: usize,
    /// `judge`: sampling temperature; by default 0 with one vote, 0.7 with several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// `judge`: most tokens in a verdict, including its reason.
    #[serde(default = "verdict_tokens")]
    pub max_tokens: usize,
    /// `judge` and `reward_model`: handling of an answer that cannot be judged.
    #[serde(default)]
    pub on_error: OnError,
    /// Weights of a rating model's attributes, by name: `{helpfulness = 1, verbosity = -0.2}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attribute_weights: BTreeMap<String, f64>,
    /// Aggregation of a step-judging model's outputs: `min`, `last` or `product`.
    #[serde(default)]
    pub step_aggregation: StepAggregation,
    /// Name of the score in the rows; by default the verifier's name, `reward` or `judge`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Weight in the total score.
    #[serde(default = "one")]
    pub weight: f64,
    /// Penalty per token or character of an answer, subtracted before weighting. It does not affect whether a verifier
    /// accepts an answer.
    #[serde(default)]
    pub length_penalty: f64,
    /// Unit of `length_penalty`.
    #[serde(default)]
    pub length_unit: LengthUnit,
    /// `regex`: must match somewhere in the answer. `format`: must match the whole answer. `exact`, `number`, `math`
    /// and `choice`: where in the answer to look, the first group or the whole match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// `contains`: strings that must all occur; defaults to the row's `answer`. `language`: codes of accepted
    /// languages; defaults to the row's `language`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
    /// `length`: minimum, in units.
    #[serde(default)]
    pub min: usize,
    /// `length`: maximum, in units.
    #[serde(default = "unlimited")]
    pub max: usize,
    /// `length`: unit, `characters`, `words` or `tokens`.
    #[serde(default)]
    pub unit: Unit,
    /// `length` in tokens: a checkpoint whose tokenizer to use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// `repetition`: n-gram length in words; default 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ngram: Option<usize>,
    /// `repetition`: largest allowed fraction of repeated n-grams; default 0.2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_share: Option<f64>,
    /// `json_schema`: the schema; defaults to the row's `schema`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<Value>,
    /// `ifeval`: ignore an extra first or last line, and asterisks.
    #[serde(default)]
    pub loose: bool,
    /// `code`: time limit of a program in seconds; default 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<f64>,
    /// `code`: memory limit of a program in MiB; default 1024.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u64>,
    /// `code`: run programs unisolated if there is no sandbox.
    #[serde(default)]
    pub allow_unsandboxed: bool,
}

/// Unit of a length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LengthUnit {
    /// Tokens of the sampling model, including the end-of-turn token.
    #[default]
    Tokens,
    /// Characters; the same for every model.
    Characters,
}

/// Handling of an answer that cannot be judged: too long for the judge, refused by its server, or without a parseable
/// verdict. An unavailable judge is always an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// The stage fails.
    #[default]
    Error,
    /// The answer fails, with the reason recorded.
    Fail,
}

impl OnError {
    /// Adds a hint about `on_error` to an error, unless that is already set.
    fn hinted<T>(self, result: Result<T>) -> Result<T> {
        match self {
            Self::Error => result.hint(LET_FAIL),
            Self::Fail => result,
        }
    }
}

/// Hint for errors that may concern a single answer.
const LET_FAIL: &str =
    "on_error = \"fail\" in the scorer lets an answer that cannot be judged fail, and goes on";

fn one() -> f64 {
    1.0
}

/// Most votes per answer.
const MOST_VOTES: usize = 1000;

fn once() -> usize {
    1
}

fn verdict_tokens() -> usize {
    512
}

fn unlimited() -> usize {
    usize::MAX
}

impl ScorerSpec {
    /// A verifier with default settings.
    pub fn verifier(check: Check) -> Self {
        Self {
            verifier: Some(check),
            reward_model: None,
            judge: None,
            form: Form::default(),
            rubric: None,
            votes: once(),
            temperature: None,
            max_tokens: verdict_tokens(),
            on_error: OnError::default(),
            attribute_weights: BTreeMap::new(),
            step_aggregation: StepAggregation::default(),
            name: None,
            weight: 1.0,
            length_penalty: 0.0,
            length_unit: LengthUnit::default(),
            pattern: None,
            values: Vec::new(),
            min: 0,
            max: usize::MAX,
            unit: Unit::Characters,
            tokenizer: None,
            ngram: None,
            max_share: None,
            schema: None,
            loose: false,
            timeout_s: None,
            memory_mb: None,
            allow_unsandboxed: false,
        }
    }

    /// Name of the score in the rows.
    pub fn label(&self) -> &str {
        match (&self.name, self.verifier) {
            (Some(name), _) => name,
            (None, Some(check)) => check.name(),
            (None, None) if self.judge.is_some() => "judge",
            (None, None) => "reward",
        }
    }

    /// Rejects a scorer without exactly one judge, or with settings that the judge cannot use.
    ///
    /// # Errors
    /// Names the problem.
    pub fn check(&self) -> Result<()> {
        if !self.weight.is_finite() {
            let weight = self.weight;
            return Err(Error::usage(format!("`weight` is {weight}, expected a number")));
        }
        if !self.length_penalty.is_finite() {
            let penalty = self.length_penalty;
            return Err(Error::usage(format!("`length_penalty` is {penalty}, expected a number")));
        }
        if let Some((name, weight)) = self.attribute_weights.iter().find(|(_, w)| !w.is_finite()) {
            return Err(Error::usage(format!(
                "`attribute_weights.{name}` is {weight}, expected a number"
            )));
        }
        let reads_model =
            !self.attribute_weights.is_empty() || self.step_aggregation != StepAggregation::Min;
        if reads_model && self.reward_model.is_none() {
            return Err(Error::usage("`attribute_weights` or `step_aggregation` without a model")
                .hint("they say how a `reward_model` is read"));
        }
        self.check_judge()?;
        match (self.verifier, &self.reward_model) {
            (None, None) if self.judge.is_some() => Ok(()),
            (_, _) if self.judge.is_some() => {
                Err(Error::usage("a scorer names `judge` and another one")
                    .hint("make two scorers of it, each with its weight"))
            }
            (Some(check), None) => Verifier::check(check, self),
            (None, Some(_)) => Ok(()),
            (None, None) => Err(Error::usage(
                "a scorer names neither `verifier` nor `reward_model` nor `judge`",
            )
            .hint("write {verifier = \"exact\"} or {reward_model = \"@reward\"}")),
            (Some(_), Some(_)) => {
                Err(Error::usage("a scorer names both `verifier` and `reward_model`")
                    .hint("make two scorers of it, each with its weight"))
            }
        }
    }

    fn check_judge(&self) -> Result<()> {
        let Some(judge) = &self.judge else {
            if self.rubric.is_some() || self.votes != 1 || self.form != Form::default() {
                return Err(Error::usage("`rubric`, `form` or `votes` without `judge`")
                    .hint("they say what a language model is asked"));
            }
            return Ok(());
        };
        let votes = ("votes", self.votes, MOST_VOTES);
        for (key, value, most) in [votes, ("max_tokens", self.max_tokens, 1 << 20)] {
            if !(1..=most).contains(&value) {
                return Err(Error::usage(format!("`{key}` is {value}, expected 1 to {most}")));
            }
        }
        if let Some(warm) = self.temperature.filter(|warm| !(0.0..=10.0).contains(warm)) {
            return Err(Error::usage(format!("`temperature` is {warm}, expected 0 to 10")));
        }
        if judge.is_empty() {
            return Err(Error::usage("`judge` is empty")
                .hint("a directory, a hub id, or {base_url = …, model = …}"));
        }
        if matches!(judge, TeacherSpec::Server(server) if server.skip_refused) {
            return Err(Error::usage("`skip_refused` of a judge")
                .hint("beside `judge`, on_error = \"fail\" lets an answer that is refused fail"));
        }
        judge.check().at("`judge`")
    }

    /// Builds the judge. Models are loaded onto `device`; reward models that are adapters share the bases in `bases`.
    /// Messages about servers go to `events`.
    ///
    /// # Errors
    /// As [`check`](Self::check), and loading errors.
    pub fn build<'a>(
        &self,
        device: &Device,
        bases: &Bases,
        events: &'a dyn Events,
    ) -> Result<Box<dyn Scorer + 'a>> {
        self.check()?;
        if let Some(judge) = &self.judge {
            return Ok(Box::new(Judge::load(self, judge, device, events)?));
        }
        Ok(match (self.verifier, &self.reward_model) {
            (Some(check), _) => Box::new(Verifier::new(check, self)?),
            (None, Some(path)) => {
                let reading = Reading {
                    attribute_weights: self.attribute_weights.clone(),
                    step_aggregation: self.step_aggregation,
                    on_error: self.on_error,
                };
                Box::new(RewardModel::load_among(bases, path, device, &reading)?)
            }
            (None, None) => return Err(Error::usage("a scorer without a judge")),
        })
    }
}

/// A prompt with the answers to judge.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// Identifies the row in errors.
    pub place: &'a str,
    /// The prompt.
    pub prompt: &'a [Message],
    /// Tool descriptions for the chat template.
    pub tools: Option<&'a Value>,
    /// The reference answer, if the row has one.
    pub answer: Option<&'a str>,
    /// The row's further columns, if available.
    pub extra: Option<&'a Map<String, Value>>,
}

/// One judge's score of an answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Higher is better. Verifiers give 1 or 0.
    pub value: f64,
    /// Human-readable explanation.
    pub why: String,
    /// Output of the answer's program, if one was run.
    pub streams: Option<Streams>,
    /// Whether it could not be judged, in which case `why` has the reason and the answer does not pass.
    #[serde(default)]
    pub unjudged: bool,
}

/// Whether a judge gives a reason but no score, meaning that it could not judge.
fn is_unjudged(scores: &IndexMap<String, f64>, why: &IndexMap<String, String>) -> bool {
    why.keys().any(|judge| !scores.contains_key(judge))
}

impl Score {
    /// The score of an answer that could not be judged, if that is not an error.
    pub fn unjudged(why: impl fmt::Display) -> Self {
        Self { why: format!("not judged: {why}"), unjudged: true, ..Self::default() }
    }
}

/// Judges answers; may be called from several threads at once.
pub trait Scorer: Send + Sync {
    /// One score per answer, depending only on the question and that answer. Exceptions: a comparing judge reads the
    /// other answers too, and a reward model truncates a long prompt to fit its longest answer.
    ///
    /// # Errors
    /// The row lacks something the judge needs.
    fn score(&self, question: &Question<'_>, answers: &[&str]) -> Result<Vec<Score>>;

    /// Whether a score below 1 means a wrong answer.
    fn verifies(&self) -> bool;

    /// Whether it mostly waits for an external service, so that many prompts may be judged at once.
    fn waits(&self) -> bool {
        false
    }

    /// Whether it runs programs and waits for them, so that generation need not wait. At most one program per core runs
    /// at a time, however many prompts are judged.
    fn runs_programs(&self) -> bool {
        false
    }

    /// Whether it needs little time and memory, so that many can run in parallel.
    fn is_light(&self) -> bool {
        false
    }

    /// As for a [`Teacher`](crate::generate::teacher::Teacher): one thread must do all GPU work.
    fn on_gpu(&self) -> bool {
        false
    }

    /// As for a [`Teacher`](crate::generate::teacher::Teacher): identity and usage of the server, if it is one.
    fn served_by(&self) -> Option<Account> {
        None
    }
}

#[cfg(test)]
mod judge_tests;
