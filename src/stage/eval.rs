//! Held-out evaluation of a policy: accuracy, reward, KL to a reference, length, and the result of choosing among K
//! answers by the reward model.

use serde::{Deserialize, Serialize};

use super::generation::{self, Pace, lowest, mean};
use super::{Metrics, StageContext, training};
use crate::error::{Context, Error, Result};
use crate::generate::engine::{Answer, Finish};
use crate::generate::local::{LocalModel, answer_logprobs};
use crate::generate::sampling::WeightFormat;
use crate::generate::teacher::{Asked, Teacher};
use crate::model::bases::{Bases, Form, Model};
use crate::model::{Precision, Transformer};
use crate::recipe::plan;
use crate::report::candidates as page;
use crate::score::candidates::{Candidate, Candidates};
use crate::score::curve::{Curve, Drawn};
use crate::score::statistics::Estimate;
use crate::score::{Panel, Verdict};

/// One prompt's answers and measurements.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The prompt with its judged answers.
    #[serde(flatten)]
    pub row: Candidates,
    /// The reward model's score of each answer, `None` if it could not be scored; empty without a reward model.
    pub rewards: Vec<Option<f64>>,
    /// Σ log p(policy) − log p(reference) over all tokens of all answers, in nats; 0 without a reference.
    pub kl_sum: f64,
}

/// Answers and scores the held-out prompts. Input: a checkpoint, rows, a reference. Output: `data.jsonl`; for people
/// `candidates.html` and `curve.json`.
pub fn run(context: &StageContext<'_>, spec: &plan::Eval) -> Result<Metrics> {
    let rows = generation::rows(context, &spec.datasets, &spec.scorers)?;
    // Adapters of one base share it: reference and reward models permanently, the policy while it is loaded.
    let bases = Bases::default();
    let form = Form::dense(&context.device, Precision::F32);
    let read = bases.model(&spec.model_name_or_path, &form)?;
    let panel = Panel::among(&spec.scorers, &context.device, &bases, context.events)?;
    let reference = reference(spec, (&bases, &form), &read)?;
    let rescored = match (&reference, spec.sampling.quantization) {
        (Some(_), format) if format != WeightFormat::None => Some(read.transformer()?),
        _ => None,
    };
    let policy = generation::written_by(context, (&spec.model_name_or_path, read), &spec.sampling)?;

    let mut pace = Pace::start();
    let measured = generation::once_each(context, rows.len(), |left, keep| {
        let asked = generation::questions(&rows, left)?;
        let judge = |place: usize, answers: &[Answer]| {
            let (asked, row) = (&asked[place], &rows[left[place]]);
            let judged = generation::candidates(&panel, asked, row, (answers, "eval"), &[])?;
            Ok((judged, answers.to_vec()))
        };
        let asks = (&policy as &dyn Teacher, asked.as_slice(), &spec.sampling);
        generation::answer_and_judge(asks, &panel, &judge, &mut |place, (judged, answers)| {
            pace.add(answers.len(), answers.iter().map(|answer| answer.tokens).sum());
            let (row, verdicts) = judged;
            let judged =
                |one: &Verdict| one.reward.map(|reward| (!one.is_unjudged()).then_some(reward));
            let rewards = verdicts.iter().filter_map(judged).collect();
            let kl_sum = reference.as_ref().map_or(Ok(0.0), |reference| {
                kl((&policy, rescored.as_ref()), reference, &asked[place], &answers)
            })?;
            keep(left[place], Measured { row, rewards, kl_sum })
        })
    });
    let measured = generation::accounted(&context.dir, &panel, measured)?;

    generation::write_rows(context, "data.jsonl", &measured)?;
    page::write(&context.dir, measured.iter().map(|one| &one.row))?;
    let curve = if panel.is_empty() { None } else { curve(&measured, panel.verifies()) };
    let mut metrics = measures(&measured, reference.is_some(), panel.verifies());
    let skipped = rows.iter().zip(&measured).filter(|(_, one)| one.row.unanswered);
    generation::name_skipped(context, &mut metrics, skipped.map(|(row, _)| row));
    metrics.extend(generation::write_curve(context, curve.as_ref())?);
    metrics.extend(curve.as_ref().map(best_of_k).unwrap_or_default());
    metrics.extend(pace.metrics());
    Ok(metrics)
}

/// Loads the reference, whose tokens must match the policy's.
fn reference(
    spec: &plan::Eval,
    (bases, form): (&Bases, &Form),
    policy: &Model,
) -> Result<Option<Transformer>> {
    let name = &spec.reference;
    if name.is_empty() {
        return Ok(None);
    }
    let read = bases.model(name, form)?;
    training::check_writes(name, &read.config)?;
    let own = policy.tokenizer().at(&spec.model_name_or_path)?;
    if read.tokenizer().at(name)?.vocab_size() != own.vocab_size() {
        return Err(Error::run("the reference has another vocabulary than the policy").at(name));
    }
    if spec.sampling.dtype == Precision::F32 {
        return Ok(Some(read.transformer()?));
    }
    // Rounded like the policy: after merging an adapter.
    let checkpoint = read.checkpoint()?.computed_in(spec.sampling.dtype)?;
    Ok(Some(Transformer::new(&checkpoint.config, &checkpoint.weights)?))
}

/// Σ log p(policy) − log p(reference) over the tokens of the policy's own answers, in nats: an unbiased estimate of the
/// KL divergence if the answers were sampled at temperature 1. A policy that generates with quantized weights is
/// `rescored` with its original ones.
fn kl(
    (policy, rescored): (&LocalModel, Option<&Transformer>),
    reference: &Transformer,
    asked: &Asked,
    answers: &[Answer],
) -> Result<f64> {
    // The prompt may have been skipped because no model could read it.
    if answers.is_empty() {
        return Ok(0.0);
    }
    let ids: Vec<&[u32]> = answers.iter().map(|answer| answer.ids.as_slice()).collect();
    let prompt = policy.prompt_ids(asked)?;
    let expected = answer_logprobs(reference, &prompt, &ids)?;
    let own = match rescored {
        Some(policy) => answer_logprobs(policy, &prompt, &ids)?,
        None => answers.iter().map(|answer| answer.logprobs.clone()).collect(),
    };
    let pairs = own.iter().flatten().zip(expected.iter().flatten());
    Ok(pairs.map(|(policy, reference)| f64::from(*policy) - f64::from(*reference)).sum())
}

/// Metrics of a whole evaluation. `verified`: scored by verifiers.
fn measures(measured: &[Measured], has_reference: bool, verified: bool) -> Metrics {
    let all = || measured.iter().flat_map(|one| &one.row.candidates);
    let tokens: f64 = all().map(|candidate| candidate.tokens as f64).sum();
    let kl_sum: f64 = measured.iter().map(|one| one.kl_sum).sum();
    let unjudged = all().filter(|candidate| candidate.is_unjudged()).count();
    let passed = |candidate: &Candidate| candidate.passed.filter(|_| verified).map(as_number);
    let of_prompt = |one: &Measured| mean(one.row.candidates.iter().filter_map(passed));
    let shares: Vec<f64> = measured.iter().filter_map(of_prompt).collect();
    let accuracy = mean(shares.iter().copied());
    let mut numbers = vec![
        ("prompts", Some(measured.len() as f64)),
        ("mean_length", mean(all().map(|candidate| candidate.tokens as f64))),
        ("cut_off", mean(all().map(|candidate| as_number(candidate.finish == Finish::Length)))),
        ("accuracy", accuracy),
        ("unjudged", (unjudged > 0).then_some(unjudged as f64)),
        ("reward", mean(measured.iter().flat_map(|one| one.rewards.iter().copied().flatten()))),
        ("kl", has_reference.then(|| kl_sum / tokens.max(1.0))),
    ];
    if let Some(accuracy) = accuracy {
        // All answers to one prompt count as one trial.
        let Estimate { low, high, .. } = Estimate::share(accuracy, shares.len());
        numbers.extend([("accuracy_low", Some(low)), ("accuracy_high", Some(high))]);
    }
    numbers.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
}

fn as_number(yes: bool) -> f64 {
    f64::from(u8::from(yes))
}

/// Best of k by the reward model, or by the weighted score if only verifiers score.
fn curve(measured: &[Measured], verified: bool) -> Option<Curve> {
    let rewarded = measured.iter().all(|one| one.rewards.len() == one.row.candidates.len());
    // Answers that could not be scored are never chosen.
    let lowest = lowest(measured.iter().flat_map(|one| one.rewards.iter().copied().flatten()));
    let drawn = |one: &Measured| {
        let candidates = one.row.candidates.iter().enumerate();
        let drawn = candidates.map(|(at, candidate)| Drawn {
            score: if rewarded { one.rewards[at].unwrap_or(lowest) } else { candidate.score },
            passed: candidate.passed.filter(|_| verified),
        });
        drawn.collect::<Vec<_>>()
    };
    let answered = measured.iter().filter(|one| !one.row.unanswered);
    let prompts: Vec<_> = answered.map(drawn).collect();
    Curve::of(&prompts, if rewarded { "reward" } else { "score" })
}

/// Accuracy of the answer ranked first by the reward model, of a random one, and of the best one; empty if a prompt has
/// a single answer or no reward.
fn best_of_k(curve: &Curve) -> Metrics {
    let mut metrics = Metrics::new();
    if curve.choice != "reward" || curve.samples < 2 {
        return metrics;
    }
    let (first, last) = (curve.points.first(), curve.last());
    generation::enter(&mut metrics, "best_of_k_accuracy", last.and_then(|last| last.accuracy));
    for (name, share) in [
        ("random_of_k_accuracy", first.and_then(|first| first.pass_at_k)),
        ("oracle_of_k_accuracy", last.and_then(|last| last.pass_at_k)),
    ] {
        metrics.extend(share.map(|share| (name.to_owned(), share.mean)));
    }
    metrics
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use serde_json::json;

    use super::*;
    use crate::model::lora::Lora;
    use crate::report::record::Silent;
    use crate::score::reward_model::{Reading, RewardModel};
    use crate::stage::merge::tests::adapter;

    const BASE: &str = "data/tiny/student";

    /// Rewards may all be negative: an answer without one is not the best.
    #[test]
    fn unjudged_answer_has_no_reward_and_is_never_chosen() {
        let candidate = |at: usize, reward: Option<f64>| Candidate {
            text: at.to_string(),
            tokens: 1,
            finish: Finish::Stop,
            logprob_sum: -1.0,
            scores: reward.map(|reward| ("reward".to_owned(), reward)).into_iter().collect(),
            score: reward.unwrap_or(0.0),
            passed: reward.is_none().then_some(false),
            origin: String::new(),
            why: [("reward".to_owned(), "too long".to_owned())]
                .into_iter()
                .take(usize::from(reward.is_none()))
                .collect(),
            streams: None,
        };
        let rewards = vec![Some(-1.0), None, Some(-3.0)];
        let row = Candidates {
            prompt: Vec::new(),
            answer: String::new(),
            tools: None,
            candidates: rewards.iter().enumerate().map(|(at, one)| candidate(at, *one)).collect(),
            unanswered: false,
        };
        let measured = [Measured { row, rewards, kl_sum: 0.0 }];
        let metrics = measures(&measured, false, false);
        assert!(
            (metrics["reward"] + 2.0).abs() < 1e-12 && (metrics["unjudged"] - 1.0).abs() < 1e-12
        );
        let curve = curve(&measured, false).unwrap();
        let best = curve.points.last().unwrap();
        assert!(best.k == 3 && (best.score.mean + 1.0).abs() < 1e-12, "{best:?}");
    }

    /// Loaded as in [`run`], and as `sample` loads its policies and scorers.
    #[test]
    fn policy_reference_and_judge_adapters_share_one_base_in_memory() {
        let home = tempfile::tempdir().unwrap();
        let lora = Lora { use_peft: true, lora_r: 4, ..Lora::default() };
        let [policy, other, judge] =
            ["policy", "other", "judge"].map(|name| home.path().join(name));
        adapter(&policy, (BASE, &lora), 1, Ok);
        adapter(&other, (BASE, &lora), 2, Ok);
        adapter(&judge, (BASE, &lora), 3, |base| base.into_reward_model(3));
        let [policy, other, judge] = [policy, other, judge].map(|dir| dir.display().to_string());
        let bases = Bases::default();
        let form = Form::dense(&Device::Cpu, Precision::F32);
        let read = bases.model(&policy, &form).unwrap();
        let scorers = [json!({"reward_model": judge})];
        let panel = Panel::among(&scorers, &Device::Cpu, &bases, &Silent).unwrap();
        let spec = plan::Eval { reference: other, ..plan::Eval::default() };
        let spec = plan::Eval { model_name_or_path: policy, ..spec };
        let other = reference(&spec, (&bases, &form), &read).unwrap().unwrap();
        let scorer =
            RewardModel::load_among(&bases, &judge, &Device::Cpu, &Reading::default()).unwrap();
        assert_eq!(bases.reads(), 1);
        assert!(!panel.is_empty());
        let own = &read.base.tensors.weights;
        // The student's head is tied to its embedding.
        assert_eq!(other.head().id(), own[crate::model::params::EMBEDDING].id());
        for (name, tensor) in own {
            assert_eq!(read.tensors.weights[name].id(), tensor.id(), "{name}");
            assert_eq!(scorer.made_of().tensors.weights[name].id(), tensor.id(), "{name}");
        }
        assert!(scorer.made_of().own().contains_key(crate::model::params::SCORE));
        let judged = plan::Eval { reference: judge, ..spec };
        let error = reference(&judged, (&bases, &form), &read).err().unwrap().to_string();
        assert!(error.contains("judge: a reward model (SequenceClassification"), "{error}");
    }
}
