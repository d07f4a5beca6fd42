//! Several checkpoints into one (Llama 3, section 4.1.5): the weighted mean, the arc between two, task arithmetic, and
//! the greedy soup. Weights stay on disk; only the soup loads a model, to measure it.

use std::path::Path;

use super::training::{self, load};
use super::{Metrics, StageContext};
use crate::data::examples::Examples;
use crate::data::prepare::Rule;
use crate::error::{Error, Result};
use crate::loss::sft::Sft;
use crate::model::Transformer;
use crate::model::average::{self, Output, Shares};
use crate::model::on_disk::{Kind, OnDisk};
use crate::recipe::plan::{self, AverageMethod};
use crate::store;
use crate::train::step;

/// Tokens of a micro-batch in which a soup is measured: the default of training.
const EVAL_TOKENS: usize = 4096;

/// Averages tensor by tensor in f32. Input: checkpoints of one shape and vocabulary. Output: `checkpoint/`.
pub fn run(context: &StageContext<'_>, spec: &plan::Average) -> Result<Metrics> {
    let mut models = open(spec)?;
    note_types(context, &models);
    let count = spec.models.len();
    let mut metrics = Metrics::from([("models".to_owned(), count as f64)]);
    let weights = if spec.weights.is_empty() { vec![1.0; count] } else { spec.weights.clone() };
    let shares = match spec.method {
        AverageMethod::Linear => Shares::Fixed(shares(&weights)),
        AverageMethod::Slerp => Shares::Spherical(spec.t),
        AverageMethod::TaskArithmetic => {
            let mut shares: Vec<f64> = weights.iter().map(|w| spec.lambda * w).collect();
            shares.push(1.0 - shares.iter().sum::<f64>());
            Shares::Fixed(shares)
        }
        AverageMethod::GreedySoup => {
            let soup = Soup::new(context, spec, models)?.cook()?;
            metrics.insert("ingredients".to_owned(), soup.kept.len() as f64);
            metrics.insert("eval_loss".to_owned(), soup.loss);
            metrics.insert("best_single_eval_loss".to_owned(), soup.best_single);
            models = soup.kept;
            equal(models.len())
        }
    };
    write(context, spec, &context.dir.join("checkpoint"), &models, &shares)?;
    Ok(metrics)
}

/// The models, and after them the base where there is one.
fn open(spec: &plan::Average) -> Result<Vec<OnDisk>> {
    let base = (spec.method == AverageMethod::TaskArithmetic).then_some(&spec.base_model);
    let models = average::open(spec.models.iter().chain(base))?;
    match models.iter().find(|model| matches!(model.kind, Kind::Adapter(_))) {
        Some(adapter) if spec.method != AverageMethod::Linear => {
            Err(Error::usage("an adapter, of which there is only the `linear` average")
                .at(&adapter.name)
                .hint("merge the adapter into its model first"))
        }
        _ => Ok(models),
    }
}

/// Types change what is saved, never what a model means: worth a line, not a refusal.
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

fn equal(models: usize) -> Shares {
    Shares::Fixed(shares(&vec![1.0; models]))
}

fn write(
    context: &StageContext<'_>,
    spec: &plan::Average,
    dir: &Path,
    models: &[OnDisk],
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

/// Wortsman et al. (2022), recipe 1. A candidate is measured as it would be saved: written, loaded and evaluated.
struct Soup<'a> {
    context: &'a StageContext<'a>,
    spec: &'a plan::Average,
    models: Vec<OnDisk>,
    held_out: Box<dyn Examples>,
}

struct Cooked {
    kept: Vec<OnDisk>,
    loss: f64,
    best_single: f64,
}

impl<'a> Soup<'a> {
    fn new(
        context: &'a StageContext<'a>,
        spec: &'a plan::Average,
        models: Vec<OnDisk>,
    ) -> Result<Self> {
        let start = load(context, &spec.models[0], &spec.chat_template)?;
        let rule = Rule::Sft(spec.data.clone());
        let held_out = training::examples(context, &start, &spec.eval_datasets, &rule)?;
        Ok(Self { context, spec, models, held_out })
    }

    fn cook(mut self) -> Result<Cooked> {
        let mut sorted = Vec::new();
        for model in std::mem::take(&mut self.models) {
            let loss = self.loss(&model.name)?;
            self.context.events.note(&format!("{}: eval_loss {loss:.4}", model.name));
            sorted.push((loss, model));
        }
        sorted.sort_by(|(one, _), (other, _)| one.total_cmp(other)); // equal ones stay in the order given
        let best_single = sorted[0].0;
        let (mut kept, mut loss) = (Vec::new(), best_single);
        for (_, model) in sorted {
            let name = model.name.clone();
            kept.push(model);
            let with = if kept.len() == 1 { loss } else { self.loss_of_mean(&kept)? };
            let better = with <= loss;
            let verdict = if better { "kept" } else { "left out" };
            self.context.events.note(&format!("soup with {name}: eval_loss {with:.4}, {verdict}"));
            if better {
                loss = with;
            } else {
                kept.pop();
            }
        }
        Ok(Cooked { kept, loss, best_single })
    }

    fn loss_of_mean(&self, models: &[OnDisk]) -> Result<f64> {
        let dir = self.context.dir.join("checkpoint"); // the final one replaces it
        write(self.context, self.spec, &dir, models, &equal(models.len()))?;
        self.loss(&dir.display().to_string())
    }

    /// The mean loss of a token of the held-out rows.
    fn loss(&self, model: &str) -> Result<f64> {
        self.context.events.check_interrupt()?;
        let checkpoint = load(self.context, model, "")?;
        let model = Transformer::new(&checkpoint.config, &checkpoint.weights)?;
        let held_out = self.held_out.as_ref();
        Ok(step::evaluate(&model, &Sft::default(), held_out, EVAL_TOKENS)?.loss)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::model::checkpoint::Checkpoint;
    use crate::model::save::SaveOptions;
    use crate::model::{Precision, Weights};
    use crate::recipe::plan::{Average, Dataset};
    use crate::report::record::Silent;

    const TEACHER: &str = "data/tiny/teacher";

    /// The teacher with noise of this size on its weights.
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

    /// Fails unless `Σ share · model` is what was saved.
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
        // Independent noise halves in the mean; the ruined model would spoil it.
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
}
