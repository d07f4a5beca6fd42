//! All judges of a stage as one: scheduling, and combining their scores.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::thread;

use candle_core::Device;
use indexmap::IndexMap;
use serde_json::Value;

use super::sandbox::Streams;
use super::{LengthUnit, Question, Score, Scorer, ScorerSpec, is_unjudged};
use crate::error::{Context, Error, Result};
use crate::generate::openai::Account;
use crate::model::bases::Bases;
use crate::report::record::{Events, Silent};

/// Concurrent questions if a judge is a server.
const ASKED_AT_ONCE: usize = 64;

/// All judges of a stage.
pub struct Panel<'a> {
    judges: Vec<Member<'a>>,
    /// Held by a judge that computes locally, so that only one at a time uses the memory and cores.
    computing: Mutex<()>,
}

struct Member<'a> {
    label: String,
    weight: f64,
    length_penalty: f64,
    length_unit: LengthUnit,
    scorer: Box<dyn Scorer + 'a>,
}

/// The judges' combined verdict on one answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdict {
    /// Each judge's score by name, before any `length_penalty`. A judge that could not judge has none.
    pub scores: IndexMap<String, f64>,
    /// Explanation of each score, if the judge gives one.
    pub why: IndexMap<String, String>,
    /// Output of the answer's program, the first time one was run.
    pub streams: Option<Streams>,
    /// Weighted sum of the scores minus their length penalties.
    pub score: f64,
    /// Whether every verifier accepts it; `None` without verifiers. An answer that some judge could not judge does not
    /// pass.
    pub passed: Option<bool>,
    /// Weighted sum over the judges that are not verifiers, minus their length penalties; `None` without such judges.
    pub reward: Option<f64>,
}

impl Verdict {
    /// Whether some judge could not judge the answer, and so has a reason but no score.
    pub fn is_unjudged(&self) -> bool {
        is_unjudged(&self.scores, &self.why)
    }

    /// The explanations as one text, prefixed by the judge's name if there are several.
    pub fn explanation(&self) -> String {
        match self.why.values().next() {
            Some(why) if self.why.len() == 1 && self.scores.len() <= 1 => why.clone(),
            _ => {
                let parts = self.why.iter().map(|(label, why)| format!("{label}: {why}"));
                parts.collect::<Vec<_>>().join("; ")
            }
        }
    }
}

impl<'a> Panel<'a> {
    /// Builds the judges of a recipe's `scorers`, without events from servers and without interrupts: for tests and
    /// tools.
    ///
    /// # Errors
    /// A judge that cannot be built, identified by its index; duplicate names.
    pub fn new(specs: &[Value], device: &Device) -> Result<Self> {
        Self::among(specs, device, &Bases::default(), &Silent)
    }

    /// As [`new`](Self::new), sharing adapter bases with the other models of `bases`. Messages about servers go to
    /// `events`, which also reports interrupts.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn among(
        specs: &[Value],
        device: &Device,
        bases: &Bases,
        events: &'a dyn Events,
    ) -> Result<Self> {
        let mut judges: Vec<Member<'a>> = Vec::new();
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
            judges.push(Member {
                label,
                weight: spec.weight,
                length_penalty: spec.length_penalty,
                length_unit: spec.length_unit,
                scorer,
            });
        }
        Ok(Self { judges, computing: Mutex::new(()) })
    }

    /// Identity and usage of the judges that are servers, by name.
    pub fn served_by(&self) -> BTreeMap<String, Account> {
        let served = |judge: &Member<'_>| Some((judge.label.clone(), judge.scorer.served_by()?));
        self.judges.iter().filter_map(served).collect()
    }

    /// Whether there are no judges.
    pub fn is_empty(&self) -> bool {
        self.judges.is_empty()
    }

    /// Whether a judge is a verifier, which may read all columns of a row.
    pub fn verifies(&self) -> bool {
        self.judges.iter().any(|judge| judge.scorer.verifies())
    }

    /// Whether no judge needs much time or memory, so that many questions can be judged in parallel.
    pub fn is_light(&self) -> bool {
        self.judges.iter().all(|judge| judge.scorer.is_light())
    }

    /// Whether a judge mostly waits, for a server or for programs, and all judges accept calls from other threads.
    pub fn waits(&self) -> bool {
        self.any(|scorer| scorer.waits() || scorer.runs_programs())
            && !self.any(|scorer| scorer.on_gpu())
    }

    /// How many questions to ask at once if the panel [waits](Self::waits): one per core for programs, since no more
    /// run at once, so that an interrupt waits for few of them.
    pub fn at_once(&self) -> usize {
        if self.any(|scorer| scorer.waits()) {
            return ASKED_AT_ONCE;
        }
        thread::available_parallelism().map_or(1, usize::from)
    }

    fn any(&self, is: fn(&dyn Scorer) -> bool) -> bool {
        self.judges.iter().any(|judge| is(&*judge.scorer))
    }

    /// Every judge's score of every answer. `tokens`: the answers' lengths.
    ///
    /// # Errors
    /// A judge's error, with its name.
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

impl Member<'_> {
    /// Adds one score to the verdict on an answer of that length.
    fn enter(&self, verdict: &mut Verdict, score: Score, length: usize) {
        if score.unjudged {
            // It adds nothing to the sums, and no score to the row.
            verdict.passed = Some(false);
            if !self.scorer.verifies() {
                verdict.reward.get_or_insert(0.0);
            }
            verdict.why.insert(self.label.clone(), score.why);
            return;
        }
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
    fn scores_are_weighted_and_every_verifier_must_agree() {
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
    fn length_penalty_lowers_the_score_but_not_the_verdict() {
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
    fn invalid_scorer_specs_are_refused_with_their_index() {
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
            (json!({"verifier": "exact", "on_error": "fail"}), "no key `on_error`"),
            (json!({"judge": "x", "on_error": "fial"}), "expected `error` or `fail`"),
            (
                json!({"judge": {"base_url": "http://a", "model": "m", "skip_refused": true}}),
                "`skip_refused` of a judge",
            ),
        ] {
            let error = panel(&[spec]).err().unwrap().to_string();
            assert!(error.starts_with("scorers[0]: ") && error.contains(part), "{error}");
        }
        let twice = [json!({"verifier": "exact"}), json!({"verifier": "exact"})];
        assert!(panel(&twice).err().unwrap().to_string().contains("two scorers"));
    }

    #[test]
    fn only_verifiers_that_run_programs_wait() {
        let code = json!({"verifier": "code", "allow_unsandboxed": true});
        let waits = |specs: &[Value]| {
            let panel = panel(specs).unwrap();
            (panel.waits(), panel.is_light(), panel.verifies())
        };
        assert_eq!(waits(&[json!({"verifier": "exact"}), code]), (true, true, true));
        assert_eq!(waits(&[json!({"verifier": "exact"})]), (false, true, true));
    }

    /// A judge that can only judge short answers.
    struct Shortsighted(bool);

    impl Scorer for Shortsighted {
        fn score(&self, _: &Question<'_>, answers: &[&str]) -> Result<Vec<Score>> {
            let score = |text: &&str| match text.len() {
                ..4 => Score { value: 1.0, why: "short".to_owned(), ..Score::default() },
                _ => Score::unjudged("too long"),
            };
            Ok(answers.iter().map(score).collect())
        }

        fn verifies(&self) -> bool {
            self.0
        }
    }

    #[test]
    fn unjudged_answer_does_not_pass_and_has_no_score_of_that_judge() {
        for verifies in [false, true] {
            let member = Member {
                label: "judge".to_owned(),
                weight: 2.0,
                length_penalty: 0.5,
                length_unit: LengthUnit::Characters,
                scorer: Box::new(Shortsighted(verifies)),
            };
            let mut panel = panel(&[json!({"verifier": "contains", "values": ["o"]})]).unwrap();
            panel.judges.push(member);
            let question =
                Question { place: "p:1", prompt: &[], tools: None, answer: None, extra: None };
            let verdicts = panel.judge(&question, &["no", "all or nothing"], &[]).unwrap();
            let brief: Vec<_> = verdicts.iter().map(|v| (v.score, v.passed, v.reward)).collect();
            // 1 + 2 · (1 − 0.5 · 2); and 1 alone.
            let reward = (!verifies).then_some(0.0);
            assert_eq!(brief, [(1.0, Some(true), reward), (1.0, Some(false), reward)]);
            assert_eq!(verdicts[0].scores.len(), 2);
            assert_eq!(verdicts[1].scores.keys().collect::<Vec<_>>(), ["contains"]);
            assert_eq!(verdicts[1].why["judge"], "not judged: too long");
        }
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
