//! A teacher answers prompts (Llama 3, section 4.2.3), for the student to imitate.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::generation::{self, mean};
use super::{Metrics, StageContext};
use crate::data::record::{Message, Row};
use crate::error::{Error, Result};
use crate::generate::engine::{Answer, Finish};
use crate::generate::teacher::Asked;
use crate::model::bases::Bases;
use crate::recipe::plan;
use crate::score::Panel;

/// One conversation with a teacher's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Taught {
    /// The prompt and the teacher's answer.
    pub messages: Vec<Message>,
    /// Tool descriptions for the chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Value>,
    /// The right answer; empty if the prompt's row has none.
    pub answer: String,
    /// Its origin.
    pub meta: Meta,
}

/// Origin of a taught conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// The prompt's file and line.
    pub source: String,
    /// Index of the sample.
    pub sample: usize,
    /// Weighted sum of the scores.
    pub score: f64,
    /// Number of tokens of the answer.
    pub tokens: usize,
    /// Log-probability of the answer under a server's model, in nats, if it was requested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprob_sum: Option<f64>,
}

/// The result for one prompt.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Kept {
    taught: Vec<Taught>,
    /// Answers that a scorer could not judge.
    unjudged: usize,
    /// Whether the teacher could not be asked and the recipe skips such prompts.
    skipped: bool,
}

/// Lets the teacher answer every prompt and keeps the answers that the scorers accept. Input: a checkpoint and prompts.
/// Output: `data.jsonl`.
pub fn run(context: &StageContext<'_>, spec: &plan::Synth) -> Result<Metrics> {
    let rows = generation::rows(context, &spec.datasets, &spec.scorers)?;
    let teacher = generation::teacher(context, &spec.teacher, &spec.sampling)?;
    let panel = Panel::among(&spec.scorers, &context.device, &Bases::default(), context.events)?;

    let kept = generation::once_each(context, rows.len(), |left, keep| {
        let asked = generation::questions(&rows, left)?;
        generation::answer_and_judge(
            (&teacher, &asked, &spec.sampling),
            &panel,
            &|place, answers| {
                accepted(&panel, &asked[place], &rows[left[place]], answers, spec.min_score)
            },
            &mut |place, kept| keep(left[place], kept),
        )
    });
    let kept: Vec<Kept> = generation::accounted(&context.dir, &panel, kept)?;

    let mut metrics = Metrics::from([("prompts".to_owned(), rows.len() as f64)]);
    let skipped = rows.iter().zip(&kept).filter(|(_, kept)| kept.skipped);
    generation::name_skipped(context, &mut metrics, skipped.map(|(row, _)| row));
    let asked = kept.iter().filter(|kept| !kept.skipped).count();
    let unjudged: usize = kept.iter().map(|kept| kept.unjudged).sum();
    let taught: Vec<Taught> = kept.into_iter().flat_map(|kept| kept.taught).collect();
    if taught.is_empty() {
        return Err(Error::run(format!("none of the answers to {} prompts was kept", rows.len()))
            .hint("raise max_new_tokens if answers are cut off, lower min_score, or check the verifier"));
    }
    generation::write_rows(context, "data.jsonl", &taught)?;
    teacher.write_account(context)?;
    let drawn = asked * spec.sampling.num_samples;
    let length = mean(taught.iter().map(|row| row.meta.tokens as f64));
    let numbers = [
        ("rows", Some(taught.len() as f64)),
        ("kept", Some(taught.len() as f64 / drawn as f64)),
        ("mean_length", length),
        ("unjudged", (unjudged > 0).then_some(unjudged as f64)),
    ];
    metrics.extend(numbers.into_iter().filter_map(|(name, n)| Some((name.to_owned(), n?))));
    Ok(metrics)
}

/// The complete, distinct, accepted answers to one prompt.
fn accepted(
    panel: &Panel<'_>,
    asked: &Asked,
    row: &Row,
    answers: &[Answer],
    min_score: f64,
) -> Result<Kept> {
    if answers.is_empty() {
        return Ok(Kept { skipped: true, ..Kept::default() });
    }
    let texts: Vec<&str> = answers.iter().map(|answer| answer.text.as_str()).collect();
    let tokens: Vec<usize> = answers.iter().map(|answer| answer.tokens).collect();
    let verdicts = generation::judge(panel, asked, row, (&texts, &tokens))?;
    let unjudged = verdicts.iter().filter(|verdict| verdict.is_unjudged()).count();
    let mut kept: Vec<Taught> = Vec::new();
    for (sample, (answer, verdict)) in answers.iter().zip(verdicts).enumerate() {
        let right =
            verdict.passed != Some(false) && (panel.is_empty() || verdict.score >= min_score);
        let mut messages = asked.messages.clone();
        let mut said = Message::new("assistant", answer.text.as_str());
        said.fields_mut().extend(answer.fields.clone());
        messages.push(said);
        let is_new = kept.iter().all(|kept| kept.messages != messages);
        if right && is_new && answer.finish == Finish::Stop {
            kept.push(Taught {
                messages,
                tools: asked.tools.clone(),
                answer: row.answer().unwrap_or_default(),
                meta: Meta {
                    source: row.place.clone(),
                    sample,
                    score: verdict.score,
                    tokens: answer.tokens,
                    logprob_sum: server_logprob_sum(answer),
                },
            });
        }
    }
    Ok(Kept { taught: kept, unjudged, skipped: false })
}

/// The answer's log-probability as reported by a server. A local model can be asked again at any time, so its rows do
/// not carry it.
fn server_logprob_sum(answer: &Answer) -> Option<f64> {
    let from_server = answer.sample_logprobs.is_empty() && !answer.logprobs.is_empty();
    from_server.then(|| answer.logprob_sum())
}
