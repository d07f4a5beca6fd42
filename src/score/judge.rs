//! LLM as a judge: reads the question and one or two answers, and returns its verdict as JSON.
//!
//! Three forms: a rubric score from 1 to 10; the two binary criteria of Llama 3's code filtering (section 4.3.1); and
//! pairwise comparisons, each in both orders, since judges favour the first position (Zheng et al., 2023, section 3.4).
//! The judge is any [`Teacher`]: a server or an in-process model.

use candle_core::Device;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{OnError, Question, Score, Scorer, ScorerSpec};
use crate::data::record::Message;
use crate::error::{Context, Error, Result, start_of};
use crate::generate::local::LocalModel;
use crate::generate::openai::spec::ServerSpec;
use crate::generate::openai::{Account, Server};
use crate::generate::sampling::{Sampling, WeightFormat};
use crate::generate::teacher::{Asked, Teacher, TeacherSpec};
use crate::model::checkpoint::{Checkpoint, LoadOptions};
use crate::report::record::Events;
use crate::store;

/// Attempts per verdict.
const TRIES: u64 = 3;
/// Temperature when votes should differ, or when asking again.
const WARM: f64 = 0.7;
/// Up to this many answers are compared pairwise, more only with the first.
const ROUND_ROBIN: usize = 8;

/// The judge's question.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// A score from 1 to 10, averaged over the votes.
    #[default]
    Rubric,
    /// Which of two answers is better; the score is the fraction of comparisons won, a tie counting half.
    Pairwise,
    /// Whether code is correct and well written; 1 if most votes agree to both, otherwise 0.
    Code,
}

/// A judge with its settings.
pub struct Judge<'a> {
    teacher: Box<dyn Teacher + 'a>,
    /// Whether the teacher is remote.
    waits: bool,
    form: Form,
    rubric: String,
    sampling: Sampling,
    on_error: OnError,
}

/// A judge's votes on one text.
#[derive(Clone, Debug, Default)]
struct Votes {
    /// Verdicts with reasons.
    cast: Vec<(f64, String)>,
    /// The first reply without a verdict.
    unread: Option<String>,
    /// Whether the server refused the question.
    refused: bool,
}

impl Votes {
    /// Why there is no verdict, if there is none.
    fn missing(&self) -> Option<String> {
        if !self.cast.is_empty() {
            return None;
        }
        if self.refused {
            return Some("too long for the judge, or refused by its server".to_owned());
        }
        let said = start_of(self.unread.as_deref().unwrap_or_default(), 160);
        Some(format!(
            "the judge gave no verdict that can be read in {TRIES} tries; it said `{said}`"
        ))
    }
}

const RUBRIC: &str = "How helpful, correct, relevant and clear is the answer?";
const PAIRWISE: &str =
    "Which answer is more helpful, correct, relevant and clear? Length alone is no merit.";
const CODE: &str = "Correctness: does the code do what was asked, without errors? Style: is it readable, idiomatic and documented where that helps?";

impl<'a> Judge<'a> {
    /// The judge of a scorer. A local model is loaded onto `device`; a server is not contacted yet, and messages about
    /// it go to `events`.
    ///
    /// # Errors
    /// A loading error; a missing API key.
    pub fn load(
        spec: &ScorerSpec,
        judge: &TeacherSpec,
        device: &Device,
        events: &'a dyn Events,
    ) -> Result<Self> {
        let teacher: Box<dyn Teacher + 'a> = match judge {
            TeacherSpec::Local(path) => {
                let checkpoint = Checkpoint::load(path, device, &LoadOptions::default())?;
                Box::new(LocalModel::held(checkpoint, WeightFormat::None).at(path)?)
            }
            TeacherSpec::Server(server) => {
                let skip_refused = spec.on_error == OnError::Fail;
                let server = ServerSpec { skip_refused, ..(**server).clone() };
                Box::new(Server::new(&server, None, events)?)
            }
        };
        Ok(Self::new(teacher, spec))
    }

    /// A judge backed by `teacher`, with the settings of `spec`.
    pub fn new(teacher: Box<dyn Teacher + 'a>, spec: &ScorerSpec) -> Self {
        let preset = match spec.form {
            Form::Rubric => RUBRIC,
            Form::Pairwise => PAIRWISE,
            Form::Code => CODE,
        };
        let usual = if spec.votes > 1 { WARM } else { 0.0 };
        let sampling = Sampling {
            temperature: spec.temperature.unwrap_or(usual),
            max_new_tokens: spec.max_tokens,
            num_samples: spec.votes,
            skip_refused: spec.on_error == OnError::Fail,
            ..Sampling::default()
        };
        let rubric = spec.rubric.clone().unwrap_or_else(|| preset.to_owned());
        let waits = matches!(spec.judge, Some(TeacherSpec::Server(_)));
        Self { teacher, waits, form: spec.form, rubric, sampling, on_error: spec.on_error }
    }

    /// One score per answer; `read` turns a verdict into a number.
    fn alone(
        &self,
        question: &Question<'_>,
        answers: &[&str],
        read: fn(&Value) -> Option<f64>,
    ) -> Result<Vec<Score>> {
        let asked: Vec<String> =
            answers.iter().map(|answer| shown(question, &[("Answer", answer)])).collect();
        let votes = self.votes(question.place, &asked, read)?;
        Ok(votes.into_iter().map(|votes| self.summed(&votes)).collect())
    }

    /// The score from the votes on one answer.
    fn summed(&self, votes: &Votes) -> Score {
        if let Some(why) = votes.missing() {
            return Score::unjudged(why);
        }
        let votes = &votes.cast;
        let mean = votes.iter().map(|(vote, _)| vote).sum::<f64>() / votes.len() as f64;
        let value = if self.form == Form::Code { f64::from(u8::from(mean > 0.5)) } else { mean };
        let reason = votes.first().map_or("", |(_, reason)| reason);
        let why = format!("{mean:.2} of {} votes: {reason}", votes.len());
        Score { value, why, ..Score::default() }
    }

    /// The fraction of comparisons each answer wins. A failed comparison counts for neither side.
    fn compared(&self, question: &Question<'_>, answers: &[&str]) -> Result<Vec<Score>> {
        let pairs = pairs(answers.len());
        let asked: Vec<String> = pairs
            .iter()
            .flat_map(|&(one, other)| [(one, other), (other, one)])
            .map(|(a, b)| shown(question, &[("Answer A", answers[a]), ("Answer B", answers[b])]))
            .collect();
        let votes = self.votes(question.place, &asked, winner)?;
        let mut points = vec![0.0; answers.len()];
        let mut games = vec![0.0; answers.len()];
        let mut missing = vec![None; answers.len()];
        for (&(one, other), orders) in pairs.iter().zip(votes.chunks(2)) {
            let [straight, swapped] = orders else { continue };
            if let Some(why) = straight.missing().or_else(|| swapped.missing()) {
                missing[one] = Some(why.clone());
                missing[other] = Some(why);
            }
            for ((first, _), (second, _)) in straight.cast.iter().zip(&swapped.cast) {
                let point = agreed(*first, 1.0 - second);
                points[one] += point;
                points[other] += 1.0 - point;
                games[one] += 1.0;
                games[other] += 1.0;
            }
        }
        let score = |((points, games), missing): ((f64, f64), Option<String>)| match missing {
            Some(why) if games <= 0.0 => Score::unjudged(why),
            _ => Score {
                // Without opponents an answer neither wins nor loses.
                value: if games > 0.0 { points / games } else { 0.5 },
                why: format!("{points} of {games} comparisons"),
                ..Score::default()
            },
        };
        Ok(points.into_iter().zip(games).zip(missing).map(score).collect())
    }

    /// Collects one verdict per vote on each text. Unparseable replies are retried; if retries fail, it is an error, or
    /// no votes where the recipe allows failures.
    fn votes(
        &self,
        place: &str,
        texts: &[String],
        read: fn(&Value) -> Option<f64>,
    ) -> Result<Vec<Votes>> {
        let wanted = self.sampling.num_samples;
        let mut votes = vec![Votes::default(); texts.len()];
        for tried in 0..TRIES {
            let is_open = |votes: &Votes| votes.cast.len() < wanted && !votes.refused;
            let open: Vec<usize> = (0..texts.len()).filter(|&at| is_open(&votes[at])).collect();
            if open.is_empty() {
                break;
            }
            let asked: Vec<Asked> =
                open.iter().map(|&at| self.asked(place, &texts[at], tried)).collect();
            let mut sampling = self.sampling.clone();
            if tried > 0 {
                sampling.temperature = sampling.temperature.max(WARM);
            }
            let heard = self.teacher.answer(&asked, &sampling, &mut |at, answers| {
                let votes = &mut votes[open[at]];
                votes.refused = answers.is_empty();
                for answer in answers {
                    let verdict = first_object(&answer.text);
                    match verdict.as_ref().and_then(|said| Some((read(said)?, reason(said)))) {
                        Some(vote) if votes.cast.len() < wanted => votes.cast.push(vote),
                        Some(_) => {}
                        None => {
                            votes.unread.get_or_insert(answer.text);
                        }
                    }
                }
                Ok(())
            });
            self.on_error.hinted(heard)?;
        }
        match votes.iter().find_map(Votes::missing) {
            Some(why) if self.on_error == OnError::Error => Err(Error::run(why).hint(
                "raise `max_tokens` if it was cut off, name a model that can answer in JSON, or let such answers fail with on_error = \"fail\" in the scorer",
            )),
            _ => Ok(votes),
        }
    }

    fn asked(&self, place: &str, text: &str, tried: u64) -> Asked {
        let system = format!("{}\n\n{}", self.rubric, self.form.instruction());
        // The seed depends only on what is judged.
        let digest = store::sha256_bytes(format!("{tried}/{system}/{text}").as_bytes());
        Asked {
            index: u64::from_str_radix(&digest[..15], 16).unwrap_or_default(),
            place: place.to_owned(),
            messages: vec![Message::new("system", system), Message::new("user", text)],
            // A weak model constrained by the schema may never end its reason. Not sent to servers, since not all of
            // them support `maxLength`.
            schema: Some(
                self.form.schema((!self.waits).then_some(self.sampling.max_new_tokens / 2)),
            ),
            ..Asked::default()
        }
    }
}

impl Form {
    /// Text appended to every rubric.
    fn instruction(self) -> &'static str {
        match self {
            Self::Rubric => {
                "You judge an assistant's answer. Reply with one JSON object and nothing else: {\"reason\": \"one or two sentences\", \"score\": N}, where N is a whole number from 1 (useless) to 10 (could not be better)."
            }
            Self::Pairwise => {
                "You compare two answers of assistants. The order in which they stand must not matter. Reply with one JSON object and nothing else: {\"reason\": \"one or two sentences\", \"winner\": \"A\", \"B\" or \"tie\"}."
            }
            Self::Code => {
                "You review an assistant's code. Reply with one JSON object and nothing else: {\"reason\": \"one or two sentences\", \"correctness\": 0 or 1, \"style\": 0 or 1}."
            }
        }
    }

    /// The verdict's schema, with a reason of at most `longest` characters. The reason comes first, so the verdict is
    /// conditioned on it.
    fn schema(self, longest: Option<usize>) -> Value {
        let object = |properties: Value, required: &[&str]| {
            json!({
                "type": "object", "properties": properties, "required": required,
                "additionalProperties": false,
            })
        };
        let (mut text, bit) =
            (json!({"type": "string"}), json!({"type": "integer", "enum": [0, 1]}));
        if let Some(longest) = longest {
            text["maxLength"] = json!(longest);
        }
        match self {
            Self::Rubric => object(
                json!({"reason": text, "score": {"type": "integer", "minimum": 1, "maximum": 10}}),
                &["reason", "score"],
            ),
            Self::Pairwise => object(
                json!({"reason": text, "winner": {"type": "string", "enum": ["A", "B", "tie"]}}),
                &["reason", "winner"],
            ),
            Self::Code => object(
                json!({"reason": text, "correctness": bit, "style": bit}),
                &["reason", "correctness", "style"],
            ),
        }
    }
}

impl Scorer for Judge<'_> {
    fn score(&self, question: &Question<'_>, answers: &[&str]) -> Result<Vec<Score>> {
        match self.form {
            Form::Rubric => self.alone(question, answers, points),
            Form::Code => self.alone(question, answers, both),
            Form::Pairwise => self.compared(question, answers),
        }
    }

    fn verifies(&self) -> bool {
        self.form == Form::Code
    }

    fn waits(&self) -> bool {
        self.waits
    }

    fn on_gpu(&self) -> bool {
        self.teacher.on_gpu()
    }

    fn served_by(&self) -> Option<Account> {
        self.teacher.served_by()
    }
}

/// The question with answers, as shown to the judge.
fn shown(question: &Question<'_>, answers: &[(&str, &str)]) -> String {
    let mut parts = Vec::new();
    for message in question.prompt {
        parts.push(format!("[{}]\n{}", message.role(), message.text()));
    }
    if let Some(answer) = question.answer.filter(|answer| !answer.is_empty()) {
        parts.push(format!("[Reference answer]\n{answer}"));
    }
    for (name, answer) in answers {
        parts.push(format!("[{name}]\n{answer}\n[End of {name}]"));
    }
    parts.join("\n\n")
}

/// The comparisons: all pairs, or all with the first if there are many answers.
fn pairs(count: usize) -> Vec<(usize, usize)> {
    let firsts = if count > ROUND_ROBIN { 1 } else { count };
    (0..firsts).flat_map(|one| (one + 1..count).map(move |other| (one, other))).collect()
}

/// Combines both orders of a comparison: the common verdict, or a tie.
fn agreed(straight: f64, swapped: f64) -> f64 {
    if (straight - swapped).abs() < 0.25 { straight } else { 0.5 }
}

fn points(verdict: &Value) -> Option<f64> {
    let score = number(verdict.get("score")?)?;
    (1.0..=10.0).contains(&score).then_some(score)
}

fn both(verdict: &Value) -> Option<f64> {
    let bit = |key: &str| match verdict.get(key)? {
        Value::Bool(yes) => Some(*yes),
        value => [0.0, 1.0].iter().position(|bit| Some(*bit) == number(value)).map(|at| at == 1),
    };
    Some(f64::from(u8::from(bit("correctness")? && bit("style")?)))
}

/// 1 if A wins, 0 if B does.
fn winner(verdict: &Value) -> Option<f64> {
    match verdict.get("winner")?.as_str()?.trim().to_ascii_lowercase().as_str() {
        "a" | "answer a" => Some(1.0),
        "b" | "answer b" => Some(0.0),
        "tie" => Some(0.5),
        _ => None,
    }
}

/// A number, possibly quoted.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.trim().parse().ok())
}

fn reason(verdict: &Value) -> String {
    start_of(verdict.get("reason").and_then(Value::as_str).unwrap_or_default(), 200)
}

/// The first JSON object in a text, skipping reasoning before it.
fn first_object(text: &str) -> Option<Value> {
    let said = text.rsplit_once("</think>").map_or(text, |(_, said)| said);
    said.match_indices('{').find_map(|(at, _)| {
        let mut values = serde_json::Deserializer::from_str(&said[at..]).into_iter::<Value>();
        values.next()?.ok().filter(Value::is_object)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::engine::Answer;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A teacher whose replies are a function of the user's text and the call number.
    struct Parrot {
        says: fn(&str, usize) -> String,
        calls: Arc<AtomicUsize>,
    }

    impl Teacher for Parrot {
        fn answer(
            &self,
            asked: &[Asked],
            sampling: &Sampling,
            done: &mut dyn FnMut(usize, Vec<Answer>) -> Result<()>,
        ) -> Result<()> {
            for (place, asked) in asked.iter().enumerate() {
                let answers = (0..sampling.num_samples).map(|_| {
                    let call = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
                    Answer::said(&(self.says)(&asked.messages[1].text(), call))
                });
                done(place, answers.collect())?;
            }
            Ok(())
        }
    }

    /// Scores by a judge that replies with `says`, and its number of calls.
    fn judged(
        spec: Value,
        says: fn(&str, usize) -> String,
        answers: &[&str],
    ) -> (Result<Vec<f64>>, usize) {
        let mut spec = spec;
        spec["judge"] = json!("unused");
        let spec: ScorerSpec = serde_json::from_value(spec).unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let judge = Judge::new(Box::new(Parrot { says, calls: calls.clone() }), &spec);
        let prompt = [Message::new("user", "how?")];
        let question =
            Question { place: "p:1", prompt: &prompt, tools: None, answer: None, extra: None };
        let scores = judge.score(&question, answers);
        let calls = calls.load(Ordering::Relaxed);
        (scores.map(|scores| scores.into_iter().map(|score| score.value).collect()), calls)
    }

    #[test]
    fn a_rubric_averages_votes_and_reads_json_in_prose() {
        let says = |_: &str, call: usize| match call {
            1 => "{\"score\": 4, \"reason\": \"so so\"}".to_owned(),
            2 => "<think>{\"score\": 1}</think>Sure! {not json} {\"score\": \"8\"} done".to_owned(),
            _ => "{\"score\": 6}".to_owned(),
        };
        let (scores, calls) = judged(json!({"votes": 3}), says, &["x"]);
        assert_eq!((scores.unwrap(), calls), (vec![6.0], 3));
    }

    #[test]
    fn unreadable_verdict_is_retried_then_reported_with_its_text() {
        let late = |_: &str, call: usize| match call {
            1 => "I would say it is rather good.".to_owned(),
            2 => "{\"score\": 11}".to_owned(),
            _ => "{\"score\": 10}".to_owned(),
        };
        assert_eq!(judged(json!({}), late, &["x"]).0.unwrap(), [10.0]);
        let prose = |_: &str, _: usize| "What a fine\nanswer this is!".to_owned();
        let (error, calls) = judged(json!({}), prose, &["x"]);
        assert_eq!(
            error.unwrap_err().to_string(),
            "the judge gave no verdict that can be read in 3 tries; it said `What a fine answer this is!`"
        );
        assert_eq!(calls, 3);
    }

    #[test]
    fn pairs_are_compared_in_both_orders_and_position_bias_gives_ties() {
        // The better answer is the longer one: 3 beats 2 beats 1.
        let fair = |text: &str, _: usize| {
            let part = |name: &str| {
                let start = text.find(&format!("[{name}]")).unwrap();
                text.find(&format!("[End of {name}]")).unwrap() - start
            };
            let winner = if part("Answer A") > part("Answer B") { "A" } else { "B" };
            json!({"reason": "", "winner": winner}).to_string()
        };
        let pairwise = json!({"form": "pairwise"});
        let (scores, calls) = judged(pairwise.clone(), fair, &["a", "aaa", "aa"]);
        assert_eq!((scores.unwrap(), calls), (vec![0.0, 1.0, 0.5], 6));
        let first = |_: &str, _: usize| "{\"winner\": \"A\"}".to_owned();
        assert_eq!(judged(pairwise.clone(), first, &["a", "b"]).0.unwrap(), [0.5, 0.5]);
        let (alone, calls) = judged(pairwise.clone(), first, &["a"]);
        assert_eq!((alone.unwrap(), calls), (vec![0.5], 0));
        // Ten answers: nine comparisons with the first, not forty-five.
        let (scores, calls) = judged(pairwise, first, &["a"; 10]);
        assert_eq!((scores.unwrap(), calls), (vec![0.5; 10], 18));
    }

    /// A tiny untrained model still gives verdicts when constrained by the schema.
    #[test]
    fn local_judge_is_constrained_to_the_schema() {
        let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/data/tiny/student");
        let mut checkpoint = Checkpoint::load(tiny, &Device::Cpu, &LoadOptions::default()).unwrap();
        // The rubric is longer than the model's maximum positions.
        checkpoint.config.max_position_embeddings = 2048;
        let spec = json!({"judge": tiny, "votes": 2, "max_tokens": 120});
        let judge = |form: &str, answers: &[&str]| {
            let mut spec = spec.clone();
            spec["form"] = json!(form);
            let spec: ScorerSpec = serde_json::from_value(spec).unwrap();
            let model = LocalModel::new(&checkpoint).unwrap();
            let judge = Judge::new(Box::new(model), &spec);
            let prompt = [Message::new("user", "1 + 1?")];
            let question =
                Question { place: "p:1", prompt: &prompt, tools: None, answer: None, extra: None };
            judge.score(&question, answers).unwrap()
        };
        let score = judge("rubric", &["2"]).remove(0);
        // Mean of two votes from 1 to 10: a multiple of one half.
        let twice = 2.0 * score.value;
        assert!((2.0..=20.0).contains(&twice) && twice.fract() == 0.0, "{score:?}");
        assert!(score.why.contains(" of 2 votes: "), "{score:?}");
        let scores = judge("pairwise", &["2", "3"]);
        assert!((scores[0].value + scores[1].value - 1.0).abs() < 1e-12, "{scores:?}");
        assert!(scores[0].why.ends_with(" of 2 comparisons"), "{scores:?}");
    }

    #[test]
    fn code_passes_only_with_both_criteria() {
        let says = |text: &str, _: usize| {
            let style = i32::from(!text.contains("ugly"));
            json!({"reason": "", "correctness": 1, "style": style}).to_string()
        };
        let code = json!({"form": "code"});
        assert_eq!(judged(code, says, &["nice", "ugly"]).0.unwrap(), [1.0, 0.0]);
    }
}
