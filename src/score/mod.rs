//! Who judges answers: verifiers that check them, reward models that rank them, language models that give their
//! opinion, and the selection made of it.

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

/// One judge as a recipe names it: a verifier, a reward model or a language model, and the weight of its score in the sum.
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
    /// Which check to make.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verifier: Option<Check>,
    /// A reward model's checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward_model: Option<String>,
    /// A language model, as `teacher` names one: a checkpoint or a server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judge: Option<TeacherSpec>,
    /// `judge`: what it is asked: `rubric`, `pairwise` or `code`.
    #[serde(default)]
    pub form: Form,
    /// `judge`: what it should look at; each form has a text of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rubric: Option<String>,
    /// `judge`: how often it is asked about each answer or pair.
    #[serde(default = "once")]
    pub votes: usize,
    /// `judge`: how warm it is; 0 with one vote, 0.7 with several where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// `judge`: most tokens of a verdict with its reason.
    #[serde(default = "verdict_tokens")]
    pub max_tokens: usize,
    /// `judge` and `reward_model`: what becomes of an answer that cannot be judged.
    #[serde(default)]
    pub on_error: OnError,
    /// What each attribute of a rating model counts, by name: `{helpfulness = 1, verbosity = -0.2}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attribute_weights: BTreeMap<String, f64>,
    /// How a model that judges steps judges an answer: `min`, `last` or `product`.
    #[serde(default)]
    pub step_aggregation: StepAggregation,
    /// The score's name in the rows; the verifier's name, `reward` or `judge` where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Weight in the sum.
    #[serde(default = "one")]
    pub weight: f64,
    /// What each token of an answer, or each character, takes off the score before it is weighed. Whether a verifier
    /// accepts an answer does not depend on it.
    #[serde(default)]
    pub length_penalty: f64,
    /// What `length_penalty` counts.
    #[serde(default)]
    pub length_unit: LengthUnit,
    /// `regex`: what the answer must match somewhere. `format`: what it must match as a whole. `exact`, `number`, `math`
    /// and `choice`: where in the answer to look, the first group or the whole match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// `contains`: what must occur, all of it; the row's `answer` where empty. `language`: codes of the languages that are
    /// right; the row's `language` where empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
    /// `length`: fewest units.
    #[serde(default)]
    pub min: usize,
    /// `length`: most units.
    #[serde(default = "unlimited")]
    pub max: usize,
    /// `length`: what is counted, `characters`, `words` or `tokens`.
    #[serde(default)]
    pub unit: Unit,
    /// `length` in tokens: a checkpoint whose tokenizer counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// `repetition`: words of a sequence; 3 where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ngram: Option<usize>,
    /// `repetition`: the largest share of sequences that may stand there already; 0.2 where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_share: Option<f64>,
    /// `json_schema`: the schema; the row's `schema` where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<Value>,
    /// `ifeval`: forgive a first or last line too many and asterisks.
    #[serde(default)]
    pub loose: bool,
    /// `code`: seconds that a program may take; 10 where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<f64>,
    /// `code`: mebibytes that a program may take; 1024 where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u64>,
    /// `code`: run programs without walls where there is no sandbox.
    #[serde(default)]
    pub allow_unsandboxed: bool,
}

/// What a length is counted in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LengthUnit {
    /// Tokens of the model that drew the answer, the end-of-turn token included.
    #[default]
    Tokens,
    /// Characters, which are the same for every model.
    Characters,
}

/// What becomes of an answer that cannot be judged: too long for the judge, refused by its server, or never given a verdict
/// that can be read. A judge that is not there at all is an error in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// It ends the work.
    #[default]
    Error,
    /// It does not pass, and says why.
    Fail,
}

impl OnError {
    /// Adds the way out to an error, where nobody has taken it.
    fn hinted<T>(self, result: Result<T>) -> Result<T> {
        match self {
            Self::Error => result.hint(LET_FAIL),
            Self::Fail => result,
        }
    }
}

/// The hint of errors that may be one answer's alone.
const LET_FAIL: &str =
    "on_error = \"fail\" in the scorer lets an answer that cannot be judged fail, and goes on";

fn one() -> f64 {
    1.0
}

/// Most votes of a judge on one answer.
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
    /// A verifier without further settings.
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

    /// The score's name in the rows.
    pub fn label(&self) -> &str {
        match (&self.name, self.verifier) {
            (Some(name), _) => name,
            (None, Some(check)) => check.name(),
            (None, None) if self.judge.is_some() => "judge",
            (None, None) => "reward",
        }
    }

    /// Refuses what names no judge or two, or settings that the judge cannot use.
    ///
    /// # Errors
    /// Says which.
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

    /// Builds the judge. Models are loaded onto `device`; reward models that are adapters share what `bases` has. What
    /// there is to say of a server goes to `events`.
    ///
    /// # Errors
    /// As [`check`](Self::check), and what loading a checkpoint can fail with.
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
    /// Names the row in errors.
    pub place: &'a str,
    /// What was asked.
    pub prompt: &'a [Message],
    /// Tool descriptions for the chat template.
    pub tools: Option<&'a Value>,
    /// The right answer, where the row has one.
    pub answer: Option<&'a str>,
    /// The row's further columns, where it is at hand.
    pub extra: Option<&'a Map<String, Value>>,
}

/// One judgement.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Higher is better. A verifier's is 1 or 0.
    pub value: f64,
    /// What it rests on, for people to read.
    pub why: String,
    /// What the answer's program wrote, where one was run.
    pub streams: Option<Streams>,
    /// Whether nobody could judge it, and `why` says the reason. It does not pass then.
    #[serde(default)]
    pub unjudged: bool,
}

/// Whether some judge says why and gives no score: it could not judge.
fn is_unjudged(scores: &IndexMap<String, f64>, why: &IndexMap<String, String>) -> bool {
    why.keys().any(|judge| !scores.contains_key(judge))
}

impl Score {
    /// Of an answer that could not be judged, where that is no error.
    pub fn unjudged(why: impl fmt::Display) -> Self {
        Self { why: format!("not judged: {why}"), unjudged: true, ..Self::default() }
    }
}

/// Judges answers; several threads may ask it at once.
pub trait Scorer: Send + Sync {
    /// One score an answer, each depending on the question and that answer alone. A judge that compares answers looks at
    /// the others too, and a reward model cuts a prompt that is too long as its longest answer demands.
    ///
    /// # Errors
    /// The row lacks what the judge needs.
    fn score(&self, question: &Question<'_>, answers: &[&str]) -> Result<Vec<Score>>;

    /// Whether a score below 1 means that the answer is wrong.
    fn verifies(&self) -> bool;

    /// Whether it mostly waits for somebody else: then many prompts may be judged at once.
    fn waits(&self) -> bool {
        false
    }

    /// Whether it runs programs, and waits for them: then whoever writes answers need not wait too. As many programs run
    /// at once as there are cores, however many prompts are judged.
    fn runs_programs(&self) -> bool {
        false
    }

    /// Whether it takes little time and memory, so that many may work side by side.
    fn is_light(&self) -> bool {
        false
    }

    /// As of a [`Teacher`](crate::generate::teacher::Teacher): one thread has to do all that computes on a GPU.
    fn on_gpu(&self) -> bool {
        false
    }

    /// As of a [`Teacher`](crate::generate::teacher::Teacher): who judged and what it cost, where that is a server.
    fn served_by(&self) -> Option<Account> {
        None
    }
}

#[cfg(test)]
mod judge_tests;
