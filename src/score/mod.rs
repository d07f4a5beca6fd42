//! Who judges answers: verifiers that check them, reward models that rank them, language models that give their
//! opinion, and the selection made of it.

pub mod candidates;
pub mod curve;
pub mod judge;
pub mod reward_model;
pub mod sandbox;
pub mod select;
pub mod statistics;
pub mod verifiers;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::Device;
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::data::record::Message;
use crate::error::{Context, Error, Result};
use crate::generate::openai::Account;
use crate::generate::teacher::TeacherSpec;
use crate::model::bases::Bases;
use crate::report::record::{Events, Silent};
use judge::{Form, Judge};
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
                .hint("an answer that is not judged has no score: leave it out"));
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

/// All judges of a stage.
pub struct Panel<'a> {
    judges: Vec<Seat<'a>>,
    /// Held by a judge that computes: one alone has all the memory and all cores, whoever else waits for servers.
    computing: Mutex<()>,
}

struct Seat<'a> {
    label: String,
    weight: f64,
    length_penalty: f64,
    length_unit: LengthUnit,
    scorer: Box<dyn Scorer + 'a>,
}

/// What the judges say of one answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdict {
    /// Every judge's score by its name, before any `length_penalty`.
    pub scores: IndexMap<String, f64>,
    /// What each score rests on, where the judge says so.
    pub why: IndexMap<String, String>,
    /// What the answer's program wrote, the first time that one was run.
    pub streams: Option<Streams>,
    /// The weighted sum of the scores less their length penalties.
    pub score: f64,
    /// Whether every verifier accepts it; `None` where no judge verifies.
    pub passed: Option<bool>,
    /// What the judges that do not verify say together, weighted, less their length penalties; `None` where there are
    /// none.
    pub reward: Option<f64>,
}

impl Verdict {
    /// What the scores rest on, as one text: each judge by its name where there are several.
    pub fn explanation(&self) -> String {
        match self.why.values().next() {
            Some(why) if self.scores.len() == 1 => why.clone(),
            _ => {
                let parts = self.why.iter().map(|(label, why)| format!("{label}: {why}"));
                parts.collect::<Vec<_>>().join("; ")
            }
        }
    }
}

impl<'a> Panel<'a> {
    /// Builds the judges of a recipe's `scorers`. Nobody hears what servers among them do, and nobody can interrupt them:
    /// for tests and tools.
    ///
    /// # Errors
    /// A judge that cannot be built, by its place in the list; two of one name.
    pub fn new(specs: &[Value], device: &Device) -> Result<Self> {
        Self::among(specs, device, &Bases::default(), &Silent)
    }

    /// The same, sharing the bases of adapters with the other models of `bases`; what there is to say of servers goes to
    /// `events`, and whether the user asked to stop comes from there.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn among(
        specs: &[Value],
        device: &Device,
        bases: &Bases,
        events: &'a dyn Events,
    ) -> Result<Self> {
        let mut judges: Vec<Seat<'a>> = Vec::new();
        for (index, spec) in specs.iter().enumerate() {
            let place = || format!("scorers[{index}]");
            let spec: ScorerSpec = serde_path_to_error::deserialize(spec)
                .map_err(|error| Error::usage(error.inner()).at(place()))?;
            let label = spec.label().to_owned();
            if judges.iter().any(|judge| judge.label == label) {
                return Err(Error::usage(format!("two scorers are called `{label}`"))
                    .at(place())
                    .hint("give one of them another `name`"));
            }
            let scorer = spec.build(device, bases, events).at(place())?;
            judges.push(Seat {
                label,
                weight: spec.weight,
                length_penalty: spec.length_penalty,
                length_unit: spec.length_unit,
                scorer,
            });
        }
        Ok(Self { judges, computing: Mutex::new(()) })
    }

    /// Who judged and what it cost, of the judges that are servers, by their names.
    pub fn served_by(&self) -> BTreeMap<String, Account> {
        let served = |judge: &Seat<'_>| Some((judge.label.clone(), judge.scorer.served_by()?));
        self.judges.iter().filter_map(served).collect()
    }

    /// Whether nobody judges.
    pub fn is_empty(&self) -> bool {
        self.judges.is_empty()
    }

    /// Whether a judge is a verifier, which may look at all columns of a row.
    pub fn verifies(&self) -> bool {
        self.judges.iter().any(|judge| judge.scorer.verifies())
    }

    /// Whether no judge takes much time or memory, so that many questions may be judged side by side.
    pub fn is_light(&self) -> bool {
        self.judges.iter().all(|judge| judge.scorer.is_light())
    }

    /// Whether a judge mostly waits for somebody else, and other threads may ask all of them.
    pub fn waits(&self) -> bool {
        let any = |is: fn(&dyn Scorer) -> bool| self.judges.iter().any(|judge| is(&*judge.scorer));
        any(|scorer| scorer.waits()) && !any(|scorer| scorer.on_gpu())
    }

    /// Every judge's word on every answer. `tokens` are the answers' lengths.
    ///
    /// # Errors
    /// A judge's error, by its name.
    pub fn judge(
        &self,
        question: &Question<'_>,
        answers: &[&str],
        tokens: &[usize],
    ) -> Result<Vec<Verdict>> {
        let mut verdicts = vec![Verdict::default(); answers.len()];
        for judge in &self.judges {
            let place = || format!("{}: scorer `{}`", question.place, judge.label);
            let computes = !judge.scorer.waits() && !judge.scorer.is_light();
            let alone =
                computes.then(|| self.computing.lock().unwrap_or_else(PoisonError::into_inner));
            let scores = judge.scorer.score(question, answers).at(place())?;
            drop(alone);
            for (index, (verdict, score)) in verdicts.iter_mut().zip(scores).enumerate() {
                if !score.value.is_finite() {
                    let value = score.value;
                    return Err(Error::run(format!("a score of {value}"))
                        .at(place())
                        .hint("the reward model has diverged; lower its learning rate"));
                }
                let length = match judge.length_unit {
                    LengthUnit::Tokens => tokens.get(index).copied().unwrap_or_default(),
                    LengthUnit::Characters => answers[index].chars().count(),
                };
                judge.enter(verdict, score, length);
            }
        }
        Ok(verdicts)
    }
}

impl Seat<'_> {
    /// Enters one score into the verdict on an answer of that length.
    fn enter(&self, verdict: &mut Verdict, score: Score, length: usize) {
        let weighted = self.weight * (score.value - self.length_penalty * length as f64);
        verdict.score += weighted;
        if self.scorer.verifies() {
            verdict.passed = Some(verdict.passed.unwrap_or(true) && score.value >= 1.0);
        } else {
            verdict.reward = Some(verdict.reward.unwrap_or(0.0) + weighted);
        }
        verdict.scores.insert(self.label.clone(), score.value);
        verdict.streams = verdict.streams.take().or(score.streams);
        if !score.why.is_empty() {
            verdict.why.insert(self.label.clone(), score.why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn panel(specs: &[Value]) -> Result<Panel<'static>> {
        Panel::new(specs, &Device::Cpu)
    }

    #[test]
    fn scores_are_weighed_and_every_verifier_must_agree() {
        let panel = panel(&[
            json!({"verifier": "exact"}),
            json!({"verifier": "length", "max": 3, "weight": 0.5}),
        ])
        .unwrap();
        let question =
            Question { place: "p:1", prompt: &[], tools: None, answer: Some("paris"), extra: None };
        let verdicts = panel.judge(&question, &["Paris", "no", "Paris."], &[]).unwrap();
        let brief: Vec<_> = verdicts.iter().map(|v| (v.score, v.passed)).collect();
        assert_eq!(brief, [(1.0, Some(false)), (0.5, Some(false)), (1.0, Some(false))]);
        assert_eq!(verdicts[0].scores.keys().collect::<Vec<_>>(), ["exact", "length"]);
    }

    #[test]
    fn length_takes_off_the_weighted_score_and_never_decides_what_is_right() {
        let panel = panel(&[
            json!({"verifier": "exact", "length_penalty": 0.25, "weight": 2.0}),
            json!({"verifier": "contains", "length_penalty": 0.01, "length_unit": "characters"}),
        ])
        .unwrap();
        let question =
            Question { place: "p:1", prompt: &[], tools: None, answer: Some("no"), extra: None };
        let verdict = panel.judge(&question, &["no"], &[3]).unwrap().remove(0);
        // 2 · (1 − 0.25 · 3) + (1 − 0.01 · 2).
        assert!((verdict.score - 1.48).abs() < 1e-12, "{verdict:?}");
        assert_eq!(
            (verdict.passed, verdict.scores["exact"].to_bits()),
            (Some(true), 1.0_f64.to_bits())
        );
        assert_eq!(verdict.why["exact"], "no");
    }

    #[test]
    fn a_spec_that_cannot_judge_is_refused_with_its_place() {
        for (spec, part) in [
            (json!({}), "neither"),
            (json!({"verifier": "exact", "reward_model": "x"}), "both"),
            (json!({"verifier": "regex"}), "pattern"),
            (json!({"verifier": "regex", "pattern": "("}), "("),
            (json!({"verifier": "exakt"}), "exakt"),
            (json!({"verifier": "exact", "wieght": 2}), "wieght"),
            (json!({"verifier": "exact", "max": 2}), "no key `max`"),
            (json!({"verifier": "code", "timeout_s": 0}), "timeout_s"),
            (json!({"verifier": "length", "min": 5, "max": 4}), "min"),
            (json!({"verifier": "exact", "step_aggregation": "last"}), "without a model"),
            (json!({"reward_model": "x", "step_aggregation": "mean"}), "mean"),
            (json!({"judge": "x", "verifier": "exact"}), "another one"),
            (json!({"judge": {"base_url": "http://a", "modle": "m"}}), "modle"),
            (json!({"judge": {"base_url": "http://a"}}), "`model` is missing"),
            (json!({"judge": "x", "votes": 0}), "`votes` is 0"),
            (json!({"judge": "x", "votes": u64::MAX}), "expected 1 to 1000"),
            (json!({"judge": "x", "max_tokens": u64::MAX}), "expected 1 to 1048576"),
            (json!({"judge": "x", "form": "rubrik"}), "rubrik"),
            (json!({"verifier": "exact", "rubric": "x"}), "without `judge`"),
        ] {
            let error = panel(&[spec]).err().unwrap().to_string();
            assert!(error.starts_with("scorers[0]: ") && error.contains(part), "{error}");
        }
        let twice = [json!({"verifier": "exact"}), json!({"verifier": "exact"})];
        assert!(panel(&twice).err().unwrap().to_string().contains("two scorers"));
    }

    #[test]
    fn a_row_without_an_answer_is_named() {
        let panel = panel(&[json!({"verifier": "number"})]).unwrap();
        let question =
            Question { place: "p:7", prompt: &[], tools: None, answer: None, extra: None };
        let error = panel.judge(&question, &["4"], &[]).unwrap_err().to_string();
        assert!(error.starts_with("p:7: scorer `number`: "), "{error}");
    }
}
