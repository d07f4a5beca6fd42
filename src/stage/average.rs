//! Merges several checkpoints (Llama 3, section 4.1.5): weighted mean, spherical interpolation of two, task arithmetic,
//! and the greedy soup. Weights stay on disk; only the soup loads a model, to evaluate it.

use std::path::Path;

use super::training::{self, load};
use super::{Metrics, StageContext, reward};
use crate::data::examples::Examples;
use crate::data::prepare::{PairOptions, Rule};
use crate::error::{Error, Result};
use crate::loss::Objective;
use crate::loss::sft::Sft;
use crate::model::average::{self, Output, Shares};
use crate::model::lora::{self, peft::AdapterConfig};
use crate::model::on_disk::OnDisk;
use crate::model::{Architecture, Config, Transformer, labels};
use crate::recipe::plan::{self, AverageMethod, Head, SoupMetric};
use crate::store;
use crate::train::step;

/// Tokens per micro-batch when evaluating a soup: the training default.
const EVAL_TOKENS: usize = 4096;

/// Averages tensor by tensor in f32. Input: checkpoints of the same shape and vocabulary. Output: `checkpoint/`.
pub fn run(context: &StageContext<'_>, spec: &plan::Average) -> Result<Metrics> {
    let of_adapters = check_kinds(spec)?;
    let count = spec.models.len();
    let mut metrics = Metrics::from([("models".to_owned(), count as f64)]);
    let weights = if spec.weights.is_empty() { vec![1.0; count] } else { spec.weights.clone() };
    let dir = context.dir.join("checkpoint");
    let method = match spec.method {
        AverageMethod::Mean if of_adapters => AverageMethod::Cat,
        AverageMethod::Mean => AverageMethod::Linear,
        written => written,
    };
    match method {
        AverageMethod::Mean | AverageMethod::Linear => {
            if of_adapters {
                context.events.note(
                    "method = \"linear\" takes the mean of the adapters' factors, which is not that of what they stand for: \
                     leave `method` out for that",
                );
            }
            mean(context, spec, (&dir, &spec.models), &Shares::Fixed(shares(&weights)))?;
        }
        AverageMethod::Slerp => {
            mean(context, spec, (&dir, &spec.models), &Shares::Spherical(spec.t))?;
        }
        AverageMethod::TaskArithmetic => {
            let mut weights: Vec<f64> = weights.iter().map(|w| spec.lambda * w).collect();
            if of_adapters {
                join(spec, (&dir, &spec.models), &weights)?;
            } else {
                weights.push(1.0 - weights.iter().sum::<f64>());
                let models = [spec.models.as_slice(), std::slice::from_ref(&spec.base_model)];
                mean(context, spec, (&dir, &models.concat()), &Shares::Fixed(weights))?;
            }
        }
        AverageMethod::Cat | AverageMethod::Svd => {
            join(spec, (&dir, &spec.models), &shares(&weights))?;
        }
        AverageMethod::GreedySoup => {
            let soup = Soup::new(context, spec, of_adapters)?;
            let cooked = soup.cook()?;
            metrics.insert("ingredients".to_owned(), cooked.kept.len() as f64);
            let metric = soup.metric_name();
            metrics.insert(format!("eval_{metric}"), cooked.value);
            metrics.insert(format!("best_single_eval_{metric}"), cooked.best_single);
            soup.write_mean(&dir, &cooked.kept)?;
        }
    }
    Ok(metrics)
}

/// Whether the models are adapters.
///
/// # Errors
/// A method that does not apply to them.
fn check_kinds(spec: &plan::Average) -> Result<bool> {
    let mut adapters = Vec::new();
    for name in &spec.models {
        adapters.extend(lora::load::directory(name)?);
    }
    let of_adapters = adapters.len() == spec.models.len();
    let (first, here) = (&spec.models[0], Path::new("."));
    match spec.method {
        AverageMethod::Cat | AverageMethod::Svd if !of_adapters => {
            Err(Error::usage("`method` is for adapters, these are whole models")
                .at(first)
                .hint("`linear` is the mean of models"))
        }
        AverageMethod::Slerp if of_adapters => Err(Error::usage(
            "an adapter: an arc between factors is none between the matrices that they stand for",
        )
        .at(first)
        .hint("merge the adapters into their model first, or take `cat`")),
        AverageMethod::TaskArithmetic if of_adapters => {
            let (_, base) = lora::load::peek(&adapters[0])?;
            let [base, named] = [&base, &spec.base_model].map(|name| average::place(name, here));
            if base == named {
                return Ok(true);
            }
            Err(Error::usage(format!("`base_model` is {named}, the adapters' is {base}"))
                .hint("differences from another model are those of whole models: merge first"))
        }
        _ => Ok(of_adapters),
    }
}

/// Types only change what is saved, never the model's meaning, so this is a note and not an error.
fn note_types(context: &StageContext<'_>, models: &[OnDisk]) {
    let types: Vec<&str> = models.iter().map(|model| model.dtype().as_str()).collect();
    if types.iter().any(|dtype| *dtype != types[0]) {
        let types = types.join(", ");
        context.events.note(&format!("the models are stored as {types}; sums are f32"));
    }
}

/// Weights scaled to sum to one.
fn shares(weights: &[f64]) -> Vec<f64> {
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

/// Writes the sum of adapters as one adapter.
fn join(spec: &plan::Average, (dir, names): (&Path, &[String]), weights: &[f64]) -> Result<()> {
    let rank = match (spec.method, spec.svd_rank) {
        (AverageMethod::Svd, 0) => match lora::load::directory(&names[0])? {
            Some(first) => Some(AdapterConfig::read(&first)?.r),
            None => None,
        },
        (AverageMethod::Svd, rank) => Some(rank),
        _ => None,
    };
    store::remove(dir)?;
    let dtype = spec.save_dtype.map(crate::model::Precision::dtype);
    average::write_sum(dir, names, (weights, rank), dtype)
}

/// Writes the average of models, or of adapters' factors.
fn mean(
    context: &StageContext<'_>,
    spec: &plan::Average,
    (dir, names): (&Path, &[String]),
    shares: &Shares,
) -> Result<()> {
    let models = average::open(names)?;
    note_types(context, &models);
    write(context, spec, (dir, &models), shares)
}

fn write(
    context: &StageContext<'_>,
    spec: &plan::Average,
    (dir, models): (&Path, &[OnDisk]),
    shares: &Shares,
) -> Result<()> {
    let output = Output {
        dtype: spec.save_dtype.map(crate::model::Precision::dtype),
        shard_bytes: spec.shard_bytes()?,
    };
    let (mut done, total) = (0, models[0].shapes().count() as u64);
    let mut watch = |_: &str| {
        done += 1;
        context.events.progress("tensors", done, total);
        context.events.check_interrupt()
    };
    store::remove(dir)?;
    average::write(dir, models, shares, output, &mut watch)
}

/// Greedy soup (Wortsman et al., 2022, recipe 1). A candidate is measured as it would be saved: written, loaded and
/// evaluated. One whose output is not finite is left out.
struct Soup<'a> {
    context: &'a StageContext<'a>,
    spec: &'a plan::Average,
    of_adapters: bool,
    objective: Box<dyn Objective>,
    held_out: Box<dyn Examples>,
}

struct Cooked {
    kept: Vec<String>,
    value: f64,
    best_single: f64,
}

impl<'a> Soup<'a> {
    fn new(
        context: &'a StageContext<'a>,
        spec: &'a plan::Average,
        of_adapters: bool,
    ) -> Result<Self> {
        // Check all models before evaluating the first. A single adapter is left unchanged.
        match (of_adapters, spec.models.len()) {
            (false, _) => note_types(context, &average::open(&spec.models)?),
            (true, 1) => {}
            (true, _) => average::check_sum(&spec.models)?,
        }
        let start = load(context, &spec.models[0], &spec.chat_template)?;
        let (rule, objective) = measure(spec, &start.config, context.seed)?;
        let held_out = training::examples(context, &start, &spec.eval_datasets, &rule)?;
        Ok(Self { context, spec, of_adapters, objective, held_out })
    }

    fn cook(&self) -> Result<Cooked> {
        let metric = self.metric_name();
        let mut sorted = Vec::new();
        for name in &self.spec.models {
            let value = self.value(name)?;
            self.context.events.note(&format!("{name}: eval_{metric} {}", shown(value)));
            sorted.extend(value.map(|value| (value, name)));
        }
        // Ties keep the given order.
        sorted.sort_by(|(one, _), (other, _)| self.cost(*one).total_cmp(&self.cost(*other)));
        let best_single = sorted.first().ok_or_else(|| self.nothing_to_keep())?.0;
        let (mut kept, mut value) = (Vec::new(), best_single);
        for (alone, name) in sorted {
            kept.push(name.clone());
            let is_first = kept.len() == 1;
            let with = if is_first && !self.is_rounded(name)? {
                Some(alone)
            } else {
                self.value_of_mean(&kept)?
            };
            let better = with.filter(|with| is_first || self.cost(*with) <= self.cost(value));
            let verdict = if better.is_some() { "kept" } else { "left out" };
            let note = format!("soup with {name}: eval_{metric} {}, {verdict}", shown(with));
            self.context.events.note(&note);
            match better {
                Some(better) => value = better,
                None => _ = kept.pop(),
            }
        }
        if kept.is_empty() {
            return Err(self.nothing_to_keep());
        }
        Ok(Cooked { kept, value, best_single })
    }

    fn nothing_to_keep(&self) -> Error {
        let (count, metric) = (self.spec.models.len(), self.metric_name());
        Error::run(format!(
            "`models`: eval_{metric} is not finite for any of the {count}, expected one at least that can be measured"
        ))
        .hint("they have diverged: take earlier checkpoints, or look for a bad row in `eval_datasets`")
    }

    /// Whether a model alone is written in another dtype than it has.
    fn is_rounded(&self, name: &str) -> Result<bool> {
        let Some(dtype) = self.spec.save_dtype else { return Ok(false) };
        Ok(OnDisk::open(name)?.dtype() != dtype.dtype())
    }

    fn metric_name(&self) -> &'static str {
        match self.spec.metric_for_best_model {
            SoupMetric::Loss => "loss",
            SoupMetric::Accuracy => "accuracy",
        }
    }

    /// The value, negated if higher is better.
    fn cost(&self, value: f64) -> f64 {
        match self.spec.metric_for_best_model {
            SoupMetric::Loss => value,
            SoupMetric::Accuracy => -value,
        }
    }

    fn value_of_mean(&self, names: &[String]) -> Result<Option<f64>> {
        let dir = self.context.dir.join("checkpoint"); // the final one replaces it
        self.write_mean(&dir, names)?;
        self.value(&dir.display().to_string())
    }

    fn write_mean(&self, dir: &Path, names: &[String]) -> Result<()> {
        let equal = shares(&vec![1.0; names.len()]);
        // A single adapter keeps its factors, rank and scale, whatever its kind.
        if self.of_adapters && names.len() > 1 {
            return join(self.spec, (dir, names), &equal);
        }
        let models = average::open(names)?;
        write(self.context, self.spec, (dir, &models), &Shares::Fixed(equal))
    }

    /// The criterion, over the held-out rows; `None` if it is not finite.
    fn value(&self, model: &str) -> Result<Option<f64>> {
        self.context.events.check_interrupt()?;
        match self.measured(model) {
            Ok(value) => Ok(value.is_finite().then_some(value)),
            Err(error) if step::is_not_finite(&error) => Ok(None),
            Err(error) => Err(error.at(model)),
        }
    }

    fn measured(&self, model: &str) -> Result<f64> {
        let checkpoint = load(self.context, model, "")?;
        let model = Transformer::new(&checkpoint.config, &checkpoint.weights)?;
        let (objective, held_out) = (self.objective.as_ref(), self.held_out.as_ref());
        let report = step::evaluate(&model, objective, held_out, EVAL_TOKENS)?;
        match self.spec.metric_for_best_model {
            SoupMetric::Loss => Ok(report.loss),
            SoupMetric::Accuracy => report.metrics.get("accuracy").copied().ok_or_else(|| {
                Error::usage("`metric_for_best_model` is accuracy, which is not measured of these")
                    .hint("reward models that compare or judge have one; take `loss`")
            }),
        }
    }
}

fn shown(value: Option<f64>) -> String {
    value.map_or_else(|| "not finite".to_owned(), |value| format!("{value:.4}"))
}

/// How held-out rows are read and evaluated: as in `sft`, or as in `reward` for a model with its head.
fn measure(spec: &plan::Average, model: &Config, seed: u64) -> Result<(Rule, Box<dyn Objective>)> {
    let head = match (model.architecture, model.labels.len()) {
        (Architecture::CausalLm, _) => {
            return Ok((Rule::Sft(spec.data.clone()), Box::new(Sft::default())));
        }
        (Architecture::TokenClassification, _) => Head::Process,
        (Architecture::SequenceClassification, outputs) => match spec.head {
            Head::Process => return Err(wrong_head(spec.head, "judges no steps")),
            Head::BradleyTerry | Head::Outcome if outputs != 1 => {
                return Err(wrong_head(spec.head, &format!("has {outputs} outputs")));
            }
            head => head,
        },
    };
    let data = spec.data.clone();
    let reward = plan::Reward {
        head,
        data: PairOptions {
            max_length: data.max_length,
            truncation: data.truncation,
            parse_special_in_content: data.parse_special_in_content,
            on_bad_row: data.on_bad_row,
            chat_template_kwargs: data.chat_template_kwargs,
        },
        attributes: model.labels.clone(),
        step_separator: labels::step_separator(model).to_owned(),
        ..plan::Reward::default()
    };
    Ok((reward.rule(seed), reward::objective(&reward)))
}

fn wrong_head(head: Head, found: &str) -> Error {
    Error::usage(format!("`head` is {}, the first model {found}", head.name()))
        .hint("one of bradley_terry, regression, process, outcome, as in its `reward` stage")
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};
    use serde_json::json;

    use super::*;
    use crate::data::record::Message;
    use crate::model::checkpoint::Checkpoint;
    use crate::model::lora::{Lora, peft};
    use crate::model::params::{FINAL_NORM, SCORE};
    use crate::model::save::SaveOptions;
    use crate::model::{Precision, Weights};
    use crate::ops::linear::tests::random;
    use crate::recipe::plan::{Average, Dataset};
    use crate::report::record::Silent;
    use crate::score::reward_model::{Reading, RewardModel};
    use crate::score::{Question, Scorer};
    use crate::stage::merge::tests::adapter;

    const TEACHER: &str = "data/tiny/teacher";

    /// The teacher with noise of this size added to its weights.
    fn noisy(dir: &Path, size: f64, seed: u64) -> String {
        let mut checkpoint = Checkpoint::load_dir(TEACHER.as_ref(), &Device::Cpu).unwrap();
        let noise = crate::model::init::random(&checkpoint.config, seed, &Device::Cpu).unwrap();
        let add = |(name, tensor): (String, Tensor)| {
            let noisy = (&tensor + (&noise[&name] * size).unwrap()).unwrap();
            (name, noisy)
        };
        checkpoint.weights = checkpoint.weights.into_iter().map(add).collect();
        checkpoint.save(dir, &SaveOptions::new(DType::F32)).unwrap();
        dir.display().to_string()
    }

    fn average(dir: &Path, spec: &Average) -> Result<(Metrics, Weights)> {
        store::create_dir(dir)?;
        let events = &Silent;
        let context =
            StageContext { dir: dir.to_path_buf(), round: 1, seed: 3, device: Device::Cpu, events };
        let metrics = run(&context, spec)?;
        let saved = Checkpoint::load_dir(&dir.join("checkpoint"), &Device::Cpu)?;
        assert!(saved.tokenizer.is_some());
        Ok((metrics, saved.weights))
    }

    /// Asserts that `Σ share · model` was saved.
    #[track_caller]
    fn assert_saved(models: &[&str], shares: &[f64], saved: &Weights) {
        let load = |name: &&str| Checkpoint::load_dir(name.as_ref(), &Device::Cpu).unwrap().weights;
        let models: Vec<Weights> = models.iter().map(load).collect();
        for (name, saved) in saved {
            let mut rest = saved.clone();
            for (model, share) in models.iter().zip(shares) {
                rest = (rest - (&model[name] * *share).unwrap()).unwrap();
            }
            let off = rest.abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            let off = off.to_scalar::<f32>().unwrap();
            assert!(off < 1e-6, "{name}: {off}");
        }
    }

    #[test]
    fn means_and_differences_from_a_base_are_weighted() {
        let home = tempfile::tempdir().unwrap();
        let [a, b] = [1, 2].map(|seed| noisy(&home.path().join(seed.to_string()), 0.1, seed));
        let linear = Average {
            models: vec![a.clone(), b.clone()],
            weights: vec![3.0, 1.0],
            ..Average::default()
        };
        let (_, saved) = average(&home.path().join("linear"), &linear).unwrap();
        assert_saved(&[&a, &b], &[0.75, 0.25], &saved);
        let tasks = Average {
            method: AverageMethod::TaskArithmetic,
            weights: vec![1.0, 0.5],
            lambda: 0.5,
            base_model: TEACHER.to_owned(),
            save_dtype: Some(Precision::F32),
            ..linear.clone()
        };
        // teacher + 0.5 (a − teacher) + 0.25 (b − teacher)
        let (_, saved) = average(&home.path().join("tasks"), &tasks).unwrap();
        assert_saved(&[&a, &b, TEACHER], &[0.5, 0.25, 0.25], &saved);

        let reward = home.path().join("reward");
        let start = Checkpoint::load_dir(TEACHER.as_ref(), &Device::Cpu).unwrap();
        let saved = start.into_reward_model(1).unwrap();
        saved.save(&reward, &SaveOptions::new(DType::F32)).unwrap();
        let strangers = Average { models: vec![a, reward.display().to_string()], ..linear };
        let error = average(&home.path().join("x"), &strangers).unwrap_err().to_string();
        assert!(error.contains("reward: `architectures` is SequenceClassification"), "{error}");
    }

    #[test]
    fn a_greedy_soup_keeps_the_models_that_help() {
        let home = tempfile::tempdir().unwrap();
        let rows = "{\"prompt\": \"Rosa has 9 eggs. Tom has twice as many. How many eggs does Tom have?\", \"completion\": \"9 + 9 = 18. Tom has 18 eggs.\"}\n";
        let held_out = home.path().join("rows.jsonl");
        store::write_atomic(&held_out, rows.as_bytes()).unwrap();
        // Averaging halves the variance of independent noise; the ruined model would spoil it.
        let [a, ruined, b] = [(0.3, 1), (3.0, 2), (0.3, 3)]
            .map(|(size, seed)| noisy(&home.path().join(seed.to_string()), size, seed));
        let spec = Average {
            method: AverageMethod::GreedySoup,
            models: vec![a.clone(), ruined, b.clone()],
            eval_datasets: vec![Dataset {
                path: held_out.display().to_string(),
                ..Dataset::default()
            }],
            ..Average::default()
        };
        let (metrics, saved) = average(&home.path().join("soup"), &spec).unwrap();
        assert_eq!(metrics["ingredients"].to_bits(), 2.0_f64.to_bits(), "{metrics:?}");
        assert!(metrics["eval_loss"] < metrics["best_single_eval_loss"], "{metrics:?}");
        assert_saved(&[&a, &b], &[0.5, 0.5], &saved);
    }

    #[test]
    fn a_greedy_soup_leaves_out_what_has_diverged_and_measures_what_it_writes() {
        let home = tempfile::tempdir().unwrap();
        let rows = "{\"prompt\": \"Rosa has 9 eggs. How many eggs does Rosa have?\", \"completion\": \"Rosa has 9 eggs.\"}\n";
        let held_out = home.path().join("rows.jsonl");
        store::write_atomic(&held_out, rows.as_bytes()).unwrap();
        let good = noisy(&home.path().join("good"), 0.3, 1);
        // Finite weights, and outputs that are not.
        let diverged = home.path().join("diverged");
        let mut teacher = Checkpoint::load_dir(TEACHER.as_ref(), &Device::Cpu).unwrap();
        let norm = Tensor::full(3e38_f32, teacher.config.hidden_size, &Device::Cpu).unwrap();
        teacher.weights.insert(FINAL_NORM.to_owned(), norm);
        teacher.save(&diverged, &SaveOptions::new(DType::F32)).unwrap();
        let diverged = diverged.display().to_string();

        let path = held_out.display().to_string();
        let spec = |models: &[&String]| Average {
            method: AverageMethod::GreedySoup,
            models: models.iter().map(|model| (*model).clone()).collect(),
            eval_datasets: vec![Dataset { path: path.clone(), ..Dataset::default() }],
            ..Average::default()
        };
        let run = |name: &str, spec: &Average| average(&home.path().join(name), spec);
        let (metrics, saved) = run("soup", &spec(&[&diverged, &good])).unwrap();
        assert_eq!(metrics["ingredients"].to_bits(), 1.0_f64.to_bits(), "{metrics:?}");
        assert_saved(&[&good], &[1.0], &saved);
        let error = run("none", &spec(&[&diverged])).unwrap_err().to_string();
        assert!(error.starts_with("`models`: eval_loss is not finite for any of the 1"), "{error}");
        // Any other error is one, and says whose it is.
        let by_accuracy = Average { metric_for_best_model: SoupMetric::Accuracy, ..spec(&[&good]) };
        let error = run("accuracy", &by_accuracy).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{good}: `metric_for_best_model` is")), "{error}");

        // Rounded, it has another loss, which is that of what was written.
        let rounded = Average { save_dtype: Some(Precision::Bf16), ..spec(&[&good]) };
        let (metrics, _) = run("rounded", &rounded).unwrap();
        let bits = |metrics: &Metrics, name: &str| metrics[name].to_bits();
        assert_ne!(bits(&metrics, "eval_loss"), bits(&metrics, "best_single_eval_loss"));
        let written = home.path().join("rounded/checkpoint").display().to_string();
        let (again, _) = run("again", &spec(&[&written])).unwrap();
        assert_eq!(bits(&again, "eval_loss"), bits(&metrics, "eval_loss"));
    }

    /// Adapters of different ranks and scales are averaged as if merged.
    #[test]
    fn adapters_are_averaged_as_if_merged() {
        const BASE: &str = "data/tiny/student";
        let home = tempfile::tempdir().unwrap();
        let plain = Lora { use_peft: true, lora_r: 4, ..Lora::default() };
        let other = Lora { lora_r: 3, lora_alpha: 5.0, use_rslora: true, ..plain.clone() };
        let dora = Lora { use_dora: true, ..plain.clone() };
        let [a, b, dora] =
            [("a", plain, 1), ("b", other, 2), ("dora", dora, 3)].map(|(name, lora, seed)| {
                let dir = home.path().join(name);
                adapter(&dir, (BASE, &lora), seed, Ok);
                dir.display().to_string()
            });
        let of = |method, models: [&String; 2]| Average {
            method,
            models: models.map(Clone::clone).to_vec(),
            weights: vec![3.0, 1.0],
            lambda: 0.5,
            base_model: BASE.to_owned(),
            ..Average::default()
        };
        let run = |name: &str, spec: Average| average(&home.path().join(name), &spec);
        let rank = |name: &str| {
            let dir = home.path().join(name).join("checkpoint");
            AdapterConfig::read(&dir).unwrap().r
        };
        let (_, saved) = run("cat", of(AverageMethod::Cat, [&a, &b])).unwrap();
        assert_saved(&[&a, &b], &[0.75, 0.25], &saved);
        assert_eq!(rank("cat"), 7);
        let (_, unwritten) = run("mean", of(AverageMethod::default(), [&a, &b])).unwrap();
        assert_saved(&[&a, &b], &[0.75, 0.25], &unwritten);
        // The sum of the ranks loses nothing; the first one's rank does.
        let whole = Average { svd_rank: 7, ..of(AverageMethod::Svd, [&a, &b]) };
        let (_, saved) = run("whole", whole).unwrap();
        assert_saved(&[&a, &b], &[0.75, 0.25], &saved);
        let (_, nearest) = run("nearest", of(AverageMethod::Svd, [&a, &b])).unwrap();
        assert_eq!(rank("nearest"), 4);
        let name = "model.layers.0.mlp.up_proj.weight";
        let lost = (&nearest[name] - &saved[name]).unwrap().abs().unwrap().max_all().unwrap();
        assert!(lost.to_scalar::<f32>().unwrap() > 1e-4, "{lost}");
        // base + 1.5 (a − base) + 0.5 (b − base)
        let (_, saved) = run("tasks", of(AverageMethod::TaskArithmetic, [&a, &b])).unwrap();
        assert_saved(&[&a, &b, BASE], &[1.5, 0.5, -1.0], &saved);

        let refused = |spec: Average, expected: &str| {
            let error = run("refused", spec).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        let slerp = Average { weights: Vec::new(), ..of(AverageMethod::Slerp, [&a, &b]) };
        refused(slerp, "an arc between factors");
        refused(
            of(AverageMethod::Cat, [&a, &dora]),
            "dora: the sum of DoRA adapters is no adapter",
        );
        let strange = Average {
            base_model: TEACHER.to_owned(),
            ..of(AverageMethod::TaskArithmetic, [&a, &b])
        };
        refused(strange, "`base_model` is ");
        let models = [TEACHER.to_owned(), TEACHER.to_owned()];
        refused(of(AverageMethod::Cat, [&models[0], &models[1]]), "these are whole models");
        refused(of(AverageMethod::Linear, [&a, &b]), "in the first adapter");
    }

    /// A base has many paths, and adapters written by peft know nothing else about it.
    #[test]
    fn adapter_bases_are_compared_by_resolved_path() {
        const BASE: &str = "data/tiny/student";
        let home = tempfile::tempdir().unwrap();
        let lora = Lora { use_peft: true, lora_r: 4, ..Lora::default() };
        let [a, b] = [("a", 1), ("b", 2)].map(|(name, seed)| {
            let dir = home.path().join(name);
            adapter(&dir, (BASE, &lora), seed, Ok);
            dir.display().to_string()
        });
        let link = home.path().join("link");
        std::os::unix::fs::symlink(std::path::absolute(BASE).unwrap(), &link).unwrap();
        let paths = [format!("{BASE}/"), link.display().to_string()];
        let run = |method, base_model: &str| {
            let models = vec![a.clone(), b.clone()];
            let base_model = base_model.to_owned();
            let spec = Average { models, method, base_model, ..Average::default() };
            average(&home.path().join("out"), &spec)
        };
        for base_model in &paths {
            // base + (a − base) + (b − base)
            let (_, saved) = run(AverageMethod::TaskArithmetic, base_model).unwrap();
            assert_saved(&[&a, &b, BASE], &[1.0, 1.0, -1.0], &saved);
        }
        let of_peft = |dir: &str, base: &str| {
            let saved = peft::read(dir.as_ref(), &Device::Cpu).unwrap();
            let base_model_name_or_path = Some(base.to_owned());
            let config = AdapterConfig { base_model_name_or_path, ..saved.config.clone() };
            peft::write(dir.as_ref(), &config, &saved.into_trained(), None).unwrap();
        };
        of_peft(&a, &paths[0]);
        of_peft(&b, &paths[1]);
        let (_, saved) = run(AverageMethod::Cat, "").unwrap();
        assert_saved(&[&a, &b], &[0.5, 0.5], &saved);
        of_peft(&b, "org/other");
        for method in [AverageMethod::Cat, AverageMethod::Linear] {
            let error = run(method, "").unwrap_err().to_string();
            let expected = "b: `base_model_name_or_path` is org/other, in the first adapter /";
            assert!(error.contains(expected), "{error}");
        }
    }

    /// A model that rates by these labels, or judges steps if they are the step labels. `format` is its prompt format, or its
    /// step separator.
    fn headed(base: Checkpoint, (labels, format): (&[&str], &str)) -> Result<Checkpoint> {
        let (architecture, key) = if *labels == labels::STEP {
            (Architecture::TokenClassification, labels::STEP_SEPARATOR)
        } else {
            (Architecture::SequenceClassification, labels::PROMPT_FORMAT)
        };
        let mut model = base.into_scorer(architecture, labels, 1)?;
        model.config.other.insert(key.to_owned(), json!(format));
        Ok(model)
    }

    /// The mean of helpfulness and verbosity is neither, and a judge of lines knows nothing of other steps.
    #[test]
    fn heads_with_different_output_meanings_are_refused() {
        const BASE: &str = "data/tiny/student";
        let lora = Lora { use_peft: true, lora_r: 4, ..Lora::default() };
        let (rates, turned): ([&str; 2], [&str; 2]) = (["help", "verb"], ["verb", "help"]);
        for (heads, expected) in [
            (
                [(rates, ""), (turned, "")],
                r#"1: `id2label` is ["verb", "help"], in the first one ["help", "verb"]"#,
            ),
            (
                [(labels::STEP, "\n"), (labels::STEP, " ки")],
                r#"1: `step_separator` is " ки", in the first one "\n""#,
            ),
            (
                [(rates, ""), (rates, labels::PLAIN_TEXT)],
                "1: `prompt_format` is text, in the first one messages",
            ),
        ] {
            let home = tempfile::tempdir().unwrap();
            let named = |kind: &str| [0, 1].map(|at| home.path().join(kind).join(at.to_string()));
            let (models, adapters) = (named("models"), named("adapters"));
            for (at, (names, separator)) in heads.iter().enumerate() {
                let head = |base| headed(base, (names.as_slice(), separator));
                let base = Checkpoint::load_dir(BASE.as_ref(), &Device::Cpu).unwrap();
                head(base).unwrap().save(&models[at], &SaveOptions::new(DType::F32)).unwrap();
                adapter(&adapters[at], (BASE, &lora), at as u64, head);
            }
            for (method, pair) in [
                (AverageMethod::Linear, &models),
                (AverageMethod::Linear, &adapters),
                (AverageMethod::Cat, &adapters),
            ] {
                let models = pair.each_ref().map(|dir| dir.display().to_string()).to_vec();
                let spec = Average { models, method, ..Average::default() };
                let error = average(&home.path().join("out"), &spec).unwrap_err().to_string();
                assert!(error.contains(expected), "{method:?}: {error}");
            }
        }
    }

    /// Two adapters that cancel out leave the teacher, which is right; one that ruins it is left out.
    #[test]
    fn greedy_soup_of_adapters_sums_helpful_ones_and_copies_a_lone_one() {
        let home = tempfile::tempdir().unwrap();
        let says = |role: &str, text: &str| serde_json::json!([{"role": role, "content": text}]);
        let rows = serde_json::json!({
            "prompt": says("user", "Rosa has 9 eggs. Tom has twice as many. How many eggs does Tom have?"),
            "completion": says("assistant", "9 + 9 = 18. Tom has 18 eggs."),
        })
        .to_string();
        let held_out = home.path().join("rows.jsonl");
        store::write_atomic(&held_out, rows.as_bytes()).unwrap();
        let plain = Lora { use_peft: true, lora_r: 4, lora_alpha: 16.0, ..Lora::default() };
        let ruinous = Lora { lora_alpha: 3200.0, ..plain.clone() };
        let dora = Lora { use_dora: true, ..plain.clone() };
        let made = |name: &str, lora: &Lora, seed: u64| {
            let dir = home.path().join(name);
            adapter(&dir, (TEACHER, lora), seed, Ok);
            dir.display().to_string()
        };
        let [a, b] = ["a", "b"].map(|name| made(name, &plain, 1));
        let (ruined, dora) = (made("ruined", &ruinous, 2), made("dora", &dora, 3));
        let saved = peft::read(b.as_ref(), &Device::Cpu).unwrap();
        let (config, base) = (saved.config.clone(), saved.base.clone());
        let turn = |(name, tensor): (String, Tensor)| {
            let sign = if name.contains(lora::B) { -1.0 } else { 1.0 };
            (name, (tensor * sign).unwrap())
        };
        let turned: Weights = saved.into_trained().into_iter().map(turn).collect();
        peft::write(b.as_ref(), &config, &turned, base.as_ref()).unwrap();

        let soup = |name: &str, models: &[&String], path: &Path| {
            let spec = Average {
                method: AverageMethod::GreedySoup,
                models: models.iter().map(|model| (*model).clone()).collect(),
                eval_datasets: vec![Dataset {
                    path: path.display().to_string(),
                    ..Dataset::default()
                }],
                ..Average::default()
            };
            average(&home.path().join(name), &spec)
        };
        let kept =
            |name: &str| AdapterConfig::read(&home.path().join(name).join("checkpoint")).unwrap();
        let (metrics, saved) = soup("soup", &[&a, &ruined, &b], &held_out).unwrap();
        assert_eq!(metrics["ingredients"].to_bits(), 2.0_f64.to_bits(), "{metrics:?}");
        assert!(metrics["eval_loss"] < metrics["best_single_eval_loss"], "{metrics:?}");
        assert_saved(&[&a, &b], &[0.5, 0.5], &saved);
        assert_eq!(kept("soup").r, 8);

        let (metrics, saved) = soup("alone", &[&ruined, &a], &held_out).unwrap();
        assert_eq!(metrics["ingredients"].to_bits(), 1.0_f64.to_bits(), "{metrics:?}");
        assert_saved(&[&a], &[1.0], &saved);
        assert_eq!(kept("alone").lora_alpha.to_bits(), 16.0_f64.to_bits());
        let (_, saved) = soup("dora", &[&dora], &held_out).unwrap();
        assert_saved(&[&dora], &[1.0], &saved);
        assert!(kept("dora").use_dora);
        // The check comes before any evaluation: the rows do not exist.
        let error = soup("both", &[&a, &dora], &home.path().join("nowhere.jsonl")).unwrap_err();
        assert!(error.to_string().contains("dora: the sum of DoRA adapters"), "{error}");
    }

    #[test]
    fn mean_of_adapters_has_the_requested_type() {
        let home = tempfile::tempdir().unwrap();
        let lora = Lora { use_peft: true, lora_r: 4, ..Lora::default() };
        let models = [1, 2].map(|seed| {
            let dir = home.path().join(seed.to_string());
            adapter(&dir, ("data/tiny/student", &lora), seed, Ok);
            dir.display().to_string()
        });
        let dtype = Some(crate::model::Precision::Bf16);
        let spec = Average { models: models.to_vec(), save_dtype: dtype, ..Average::default() };
        average(&home.path().join("mean"), &spec).unwrap();
        let saved = OnDisk::open(&home.path().join("mean/checkpoint").display().to_string());
        assert_eq!(saved.unwrap().dtype(), candle_core::DType::BF16);
    }

    /// Their heads are averaged too, and keep the names of their outputs.
    #[test]
    fn averaged_rating_adapters_average_heads_and_keep_output_names() {
        let home = tempfile::tempdir().unwrap();
        let lora = Lora { use_peft: true, lora_r: 4, ..Lora::default() };
        let attributes = ["help", "length"].map(str::to_owned);
        let models = [1, 2].map(|seed| {
            let dir = home.path().join(seed.to_string());
            adapter(&dir, ("data/tiny/student", &lora), seed, |base| {
                base.into_scorer(Architecture::SequenceClassification, &attributes, seed)
            });
            dir.display().to_string()
        });
        for method in [AverageMethod::Linear, AverageMethod::Cat] {
            let spec = Average { method, models: models.to_vec(), ..Average::default() };
            let dir = home.path().join(format!("{method:?}"));
            let (_, saved) = average(&dir, &spec).unwrap();
            let saved = Weights::from([(SCORE.to_owned(), saved[SCORE].clone())]);
            assert_saved(&[&models[0], &models[1]], &[0.5, 0.5], &saved);
            let loaded = Checkpoint::load_dir(&dir.join("checkpoint"), &Device::Cpu).unwrap();
            assert_eq!(loaded.config.labels, attributes, "{method:?}");
        }
    }

    /// Pairs ordered by the teacher's own score: models near it get all right, a sign-flipped one gets none.
    #[test]
    fn greedy_soup_of_reward_models_selects_by_accuracy_or_loss() {
        let home = tempfile::tempdir().unwrap();
        let scorer = || {
            let teacher = Checkpoint::load_dir(TEACHER.as_ref(), &Device::Cpu).unwrap();
            teacher.into_reward_model(1).unwrap()
        };
        let saved = |name: &str, seed: u64, factor: f64| {
            let mut model = scorer();
            for (at, (name, tensor)) in model.weights.iter_mut().enumerate() {
                let size = if name == SCORE { 1e-4 } else { 1e-3 };
                let noise = random(100 * seed + at as u64, tensor.shape());
                *tensor =
                    (&*tensor + (noise * (size * f64::from(u8::from(seed > 0)))).unwrap()).unwrap();
            }
            let score = model.weights.get_mut(SCORE).unwrap();
            *score = (&*score * (40.0 * factor)).unwrap();
            let dir = home.path().join(name);
            model.save(&dir, &SaveOptions::new(DType::F32)).unwrap();
            dir.display().to_string()
        };
        let own = saved("own", 0, 1.0);
        let model = RewardModel::load(&own, &Device::Cpu, &Reading::default()).unwrap();
        let prompt = [Message::new("user", "How many?")];
        let question =
            Question { place: "q:1", prompt: &prompt, tools: None, answer: None, extra: None };
        let answers: Vec<String> = (1..=8).map(|n| format!("{n} apples")).collect();
        let texts: Vec<&str> = answers.iter().map(String::as_str).collect();
        let scores = model.score(&question, &texts).unwrap();
        let mut ranked: Vec<(f64, &str)> =
            scores.iter().map(|score| score.value).zip(texts).collect();
        ranked.sort_by(|(one, _), (other, _)| one.total_cmp(other));
        let rows = (0..4).map(|at| {
            let (worse, better) = (ranked[at].1, ranked[at + 4].1);
            json!({"prompt": "How many?", "chosen": better, "rejected": worse}).to_string()
        });
        let held_out = home.path().join("rows.jsonl");
        store::write_atomic(&held_out, rows.collect::<Vec<_>>().join("\n").as_bytes()).unwrap();

        let models = vec![saved("a", 1, 1.0), saved("turned", 2, -4.0), saved("b", 3, 1.0)];
        for metric_for_best_model in [SoupMetric::Accuracy, SoupMetric::Loss] {
            let path = held_out.display().to_string();
            let spec = Average {
                method: AverageMethod::GreedySoup,
                models: models.clone(),
                eval_datasets: vec![Dataset { path, ..Dataset::default() }],
                metric_for_best_model,
                ..Average::default()
            };
            let (metrics, saved) = average(&home.path().join("soup"), &spec).unwrap();
            if metric_for_best_model == SoupMetric::Accuracy {
                assert_eq!(metrics["eval_accuracy"].to_bits(), 1.0_f64.to_bits(), "{metrics:?}");
                assert_eq!(metrics["ingredients"].to_bits(), 2.0_f64.to_bits(), "{metrics:?}");
                assert_saved(&[&models[0], &models[2]], &[0.5, 0.5], &saved);
                let steps = Average { head: Head::Process, ..spec };
                let error = average(&home.path().join("soup"), &steps).unwrap_err().to_string();
                assert!(error.starts_with("`head` is process, the first model"), "{error}");
            } else {
                assert!(metrics["ingredients"] < 3.0, "{metrics:?}");
                assert!(metrics["eval_loss"] <= metrics["best_single_eval_loss"], "{metrics:?}");
                assert!(metrics["eval_loss"] < 0.69, "{metrics:?}");
            }
        }
    }
}
