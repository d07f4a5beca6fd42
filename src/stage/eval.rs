//! Held-out measures of a policy: accuracy, reward, distance from a reference, length, and what choosing among K
//! answers by the reward model would give.

use serde::{Deserialize, Serialize};

use super::generation::{self, mean};
use super::{Metrics, StageContext, training};
use crate::error::{Context, Error, Result};
use crate::generate::engine::{Answer, Finish};
use crate::generate::local::{LocalModel, answer_logprobs};
use crate::generate::teacher::{Asked, Teacher};
use crate::model::Transformer;
use crate::recipe::plan;
use crate::score::Panel;
use crate::score::candidates::Candidates;

/// One prompt's answers and measures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The prompt with its judged answers.
    #[serde(flatten)]
    pub row: Candidates,
    /// The reward model's score of each answer; empty where there is none.
    pub rewards: Vec<f64>,
    /// Σ log p(policy) − log p(reference) over all tokens of all answers; 0 where there is no reference.
    pub kl_sum: f64,
}

/// Answers and judges the held-out prompts. Input: a checkpoint, rows, a reference. Output: `data.jsonl`.
pub fn run(context: &StageContext<'_>, spec: &plan::Eval) -> Result<Metrics> {
    let policy = generation::load(context, &spec.model_name_or_path, spec.sampling.dtype)?;
    let panel = Panel::new(&spec.scorers, &context.device)?;
    let rows = generation::rows(context, &spec.datasets)?;
    let reference = reference(context, spec, &policy)?;

    let measured = generation::once_each(context, rows.len(), |left, keep| {
        let asked = generation::questions(&rows, left)?;
        policy.answer(&asked, &spec.sampling, &mut |place, answers| {
            let (asked, row) = (&asked[place], &rows[left[place]]);
            let drawn = (answers.as_slice(), "eval");
            let (row, verdicts) = generation::candidates(&panel, asked, row, drawn, &[])?;
            let rewards = verdicts.iter().filter_map(|verdict| verdict.reward).collect();
            let kl_sum = reference
                .as_ref()
                .map_or(Ok(0.0), |reference| kl(&policy, reference, asked, &answers))?;
            keep(left[place], Measured { row, rewards, kl_sum })
        })
    })?;

    generation::write_rows(context, "data.jsonl", &measured)?;
    generation::close_ledger(context)?;
    Ok(measures(&measured, reference.is_some()))
}

/// Loads the reference, which must read the policy's tokens.
fn reference(
    context: &StageContext<'_>,
    spec: &plan::Eval,
    policy: &LocalModel,
) -> Result<Option<Transformer>> {
    let name = &spec.reference;
    if name.is_empty() {
        return Ok(None);
    }
    let checkpoint = training::load(context, name, "")?;
    if checkpoint.tokenizer().at(name)?.vocab_size() != policy.tokenizer().vocab_size() {
        return Err(Error::run("the reference has another vocabulary than the policy").at(name));
    }
    let checkpoint = checkpoint.computed_in(spec.sampling.dtype)?;
    Ok(Some(Transformer::new(&checkpoint.config, &checkpoint.weights)?))
}

/// Σ log p(policy) − log p(reference) over the tokens of the policy's own answers: an unbiased estimate of the KL
/// divergence where the answers were drawn at temperature 1.
fn kl(
    policy: &LocalModel,
    reference: &Transformer,
    asked: &Asked,
    answers: &[Answer],
) -> Result<f64> {
    let ids: Vec<&[u32]> = answers.iter().map(|answer| answer.ids.as_slice()).collect();
    let logprobs = answer_logprobs(reference, &policy.prompt_ids(asked)?, &ids)?;
    let pairs = answers.iter().flat_map(|answer| &answer.logprobs).zip(logprobs.iter().flatten());
    Ok(pairs.map(|(policy, reference)| f64::from(*policy) - f64::from(*reference)).sum())
}

/// The numbers of a whole evaluation.
fn measures(measured: &[Measured], has_reference: bool) -> Metrics {
    let all = || measured.iter().flat_map(|one| &one.row.candidates);
    let tokens: f64 = all().map(|candidate| candidate.tokens as f64).sum();
    let kl_sum: f64 = measured.iter().map(|one| one.kl_sum).sum();
    let of_prompt =
        |one: &Measured| mean(one.row.candidates.iter().filter_map(|c| c.passed).map(as_number));
    let accuracy = mean(measured.iter().filter_map(of_prompt));
    let mut numbers = vec![
        ("prompts", Some(measured.len() as f64)),
        ("mean_length", mean(all().map(|candidate| candidate.tokens as f64))),
        ("cut_off", mean(all().map(|candidate| as_number(candidate.finish == Finish::Length)))),
        ("accuracy", accuracy),
        ("reward", mean(measured.iter().flat_map(|one| one.rewards.iter().copied()))),
        ("kl", has_reference.then(|| kl_sum / tokens.max(1.0))),
    ];
    if let Some(accuracy) = accuracy {
        let (low, high) = wilson(accuracy, measured.len());
        numbers.extend([("accuracy_low", Some(low)), ("accuracy_high", Some(high))]);
        numbers.extend(best_of_k(measured));
    }
    numbers.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
}

fn as_number(yes: bool) -> f64 {
    f64::from(u8::from(yes))
}

/// Accuracy of the answer that the reward model likes best, of a random one, and of the best there is; nothing where
/// a prompt has one answer or no reward.
fn best_of_k(measured: &[Measured]) -> Vec<(&'static str, Option<f64>)> {
    let (mut chosen, mut random, mut oracle) = (Vec::new(), Vec::new(), Vec::new());
    for one in measured {
        let passed: Vec<f64> =
            one.row.candidates.iter().map(|c| as_number(c.passed == Some(true))).collect();
        if passed.len() < 2 || one.rewards.len() != passed.len() {
            return Vec::new();
        }
        let best = (1..passed.len()).fold(0, |best, index| {
            if one.rewards[index] > one.rewards[best] { index } else { best }
        });
        chosen.push(passed[best]);
        oracle.push(passed.iter().copied().fold(0.0, f64::max));
        random.extend(mean(passed));
    }
    vec![
        ("best_of_k_accuracy", mean(chosen)),
        ("random_of_k_accuracy", mean(random)),
        ("oracle_of_k_accuracy", mean(oracle)),
    ]
}

/// The 95 % interval of a share of `count` trials (Wilson, 1927). Answers to one prompt count as one trial.
fn wilson(share: f64, count: usize) -> (f64, f64) {
    const Z: f64 = 1.959_963_984_540_054;
    if count == 0 {
        return (0.0, 1.0);
    }
    let n = count as f64;
    let middle = share + Z * Z / (2.0 * n);
    let spread = Z * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + Z * Z / n;
    (((middle - spread) / scale).max(0.0), ((middle + spread) / scale).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_wilsons() {
        // 8 of 10: 0.4902 to 0.9433 (Newcombe 1998's method 3, any statistics package).
        let (low, high) = wilson(0.8, 10);
        assert!((low - 0.4902).abs() < 1e-4 && (high - 0.9433).abs() < 1e-4, "{low} {high}");
        assert!(wilson(1.0, 5).1 <= 1.0 && wilson(0.0, 5).0 >= 0.0);
    }
}
