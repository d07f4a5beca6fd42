//! Compares whole models on a device with values that transformers, TRL and peft computed with PyTorch: logits, and the
//! loss and gradients of one step of SFT (full and with adapters), of DPO and of a reward model. Added to the ops by
//! `arriero doctor --device cuda:0 --check --goldens DIR`.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::check::{Checked, compared};
use crate::data::forest::Forest;
use crate::data::tree::{Role, Tree};
use crate::error::{Context, Error, Result};
use crate::loss::preference::Preference;
use crate::loss::reward::Reward;
use crate::loss::sft::Sft;
use crate::loss::{Objective, Readout};
use crate::model::checkpoint::Checkpoint;
use crate::model::gradients::{Gradients, square_sum};
use crate::model::lora::peft;
use crate::model::{Precision, Tensors, Transformer, Weights};
use crate::store;
use crate::train::learner::Learner;
use crate::train::step::{self, StepOptions, StepReport};

/// Llama models of different shapes, by file name.
const VARIANTS: [&str; 3] = ["tied", "untied", "llama3rope"];
/// The label of an untrained token.
const IGNORED: i64 = -100;
/// Bound for logits and gradients, relative to the largest value: a different order of summation in two blocks.
const KIND: (&str, f64) = ("f32", 1e-4);
/// Relative bound for the loss.
const LOSS_BOUND: f64 = 1e-5;

/// peft adapters, by file name.
const ADAPTERS: [&str; 2] = ["qv_r4_a8", "all_r3_a12_rslora"];

/// The fields read from the goldens of a step.
#[derive(Deserialize)]
struct Step {
    loss: f64,
    #[serde(default)]
    grad_norms: BTreeMap<String, f64>,
}

/// The fields read from TRL's goldens.
#[derive(Deserialize)]
struct Golden {
    #[serde(alias = "policy", default)]
    model: String,
    #[serde(default)]
    reference: String,
    #[serde(default)]
    pairs: Vec<Pair>,
    cases: BTreeMap<String, Step>,
}

#[derive(Deserialize)]
struct Pair {
    #[serde(rename = "prompt_ids", default)]
    prompt: Vec<u32>,
    #[serde(rename = "chosen_ids")]
    chosen: Vec<u32>,
    #[serde(rename = "rejected_ids")]
    rejected: Vec<u32>,
}

impl Golden {
    fn read(folder: &Path, file: &str) -> Result<Self> {
        store::read_json(&folder.join(file))
    }

    fn trees(&self) -> Vec<Tree> {
        let side = |ids: &Vec<u32>| (ids.clone(), vec![Role::Content; ids.len()]);
        let tree = |(row, pair): (usize, &Pair)| {
            let responses = vec![side(&pair.chosen), side(&pair.rejected)];
            Tree::siblings(pair.prompt.clone(), responses, row)
        };
        self.pairs.iter().enumerate().map(tree).collect()
    }

    fn case(&self, name: &str) -> Result<&Step> {
        self.cases.get(name).ok_or_else(|| Error::run(format!("no case `{name}`")))
    }
}

/// Runs every model in f32.
///
/// # Errors
/// Missing files; a device error.
pub fn run(device: &Device, folder: &Path) -> Result<Vec<Checked>> {
    let mut all = Vec::new();
    for variant in VARIANTS {
        let dir = folder.join(format!("model_{variant}"));
        let checkpoint = Checkpoint::load_dir(&dir, device)?;
        all.extend(logits(&checkpoint, folder, variant)?);
        all.extend(step_of(&checkpoint, folder, variant)?);
    }
    all.extend(dpo(device, folder)?);
    all.extend(reward(device, folder)?);
    for case in ADAPTERS {
        all.extend(adapters(device, folder, case)?);
    }
    Ok(all)
}

fn tensors(folder: &Path, name: &str) -> Result<Weights> {
    // Ids and masks are integers, which no model file contains.
    let path = folder.join(name);
    let found = candle_core::safetensors::load(&path, &Device::Cpu).map_err(Error::from);
    Ok(found.at(path.display())?.into_iter().collect())
}

fn get<'a>(tensors: &'a Weights, name: &str) -> Result<&'a Tensor> {
    tensors.get(name).ok_or_else(|| Error::run(format!("missing tensor `{name}`")))
}

/// Rows of a padded batch as one-segment trees.
fn rows(ids: &Tensor, mask: &Tensor, labels: Option<&Tensor>) -> Result<Vec<Tree>> {
    let read = |tensor: &Tensor| tensor.to_dtype(DType::I64)?.to_vec2::<i64>();
    let labels = labels.map(read).transpose()?;
    let all = read(ids)?.into_iter().zip(read(mask)?).enumerate();
    let row = |(row, (ids, mask)): (usize, (Vec<i64>, Vec<i64>))| {
        let seen = ids.iter().zip(&mask).filter(|(_, seen)| **seen == 1);
        let tokens: Vec<u32> = seen.map(|(id, _)| *id as u32).collect();
        let is_trained = |at: usize| labels.as_ref().is_none_or(|all| all[row][at] != IGNORED);
        let role = |at| if is_trained(at) { Role::Content } else { Role::Context };
        let roles = (0..tokens.len()).map(role).collect();
        Tree::sequence(tokens, roles, row)
    };
    Ok(all.map(row).collect())
}

/// Logits of every token of every row.
fn logits(checkpoint: &Checkpoint, folder: &Path, variant: &str) -> Result<Vec<Checked>> {
    let file = format!("a_logits_{variant}.safetensors");
    let golden = tensors(folder, &file)?;
    let named = |name: &str| get(&golden, name).at(&file);
    let trees = rows(named("input_ids")?, named("attention_mask")?, None)?;
    let model = Transformer::new(&checkpoint.config, &checkpoint.weights)?;
    let hidden = model.hidden(&Forest::pack(&trees)?)?;
    let found = hidden.matmul(&model.head().t()?)?.to_device(&Device::Cpu)?;
    let expected = named("logits")?;
    let (mut all, mut start) = (Vec::new(), 0);
    for (row, tree) in trees.iter().enumerate() {
        let len = tree.tokens();
        let pair = (&expected.get(row)?.narrow(0, 0, len)?, &found.narrow(0, start, len)?);
        all.push(compared((&format!("{variant}, logits"), &format!("row {row}")), KIND, pair)?);
        start += len;
    }
    Ok(all)
}

/// One step of DPO with the sigmoid loss and shared prompts.
fn dpo(device: &Device, folder: &Path) -> Result<Vec<Checked>> {
    let golden = Golden::read(folder, "c_dpo.json")?;
    let trees = golden.trees();
    let reference = Checkpoint::load_dir(&folder.join(&golden.reference), device)?;
    let reference = Transformer::new(&reference.config, &reference.weights)?;
    let forest = Forest::pack(&trees)?;
    let mut objective = Preference::default();
    let logps = step::read(&reference, Readout::Logps, &forest)?;
    objective.reference = objective.summing.table(&forest, &logps).into_iter().collect();
    let checkpoint = Checkpoint::load_dir(&folder.join(&golden.model), device)?;
    let learner = Learner::new(&checkpoint.config, &checkpoint.weights)?;
    let (grads, report) = taken(&learner, &objective, &trees)?;
    let case = golden.case("sigmoid").at("c_dpo.json")?;
    let mut all = vec![relative(("dpo", "loss"), LOSS_BOUND, (case.loss, report.loss))];
    let file = "c_dpo_sigmoid_grads.safetensors";
    all.extend(gradients("dpo", &grads, (file, &tensors(folder, file)?), &str::to_owned)?);
    Ok(all)
}

/// One step of a reward model: the loss, and the norm of each gradient.
fn reward(device: &Device, folder: &Path) -> Result<Vec<Checked>> {
    let golden = Golden::read(folder, "d_reward.json")?;
    let checkpoint = Checkpoint::load_dir(&folder.join(&golden.model), device)?;
    let learner = Learner::new(&checkpoint.config, &checkpoint.weights)?;
    let (grads, report) = taken(&learner, &Reward::default(), &golden.trees())?;
    let case = golden.case("plain").at("d_reward.json")?;
    let mut all = vec![relative(("reward", "loss"), LOSS_BOUND, (case.loss, report.loss))];
    for (name, &expected) in &case.grad_norms {
        let grad = grads.get(name).ok_or_else(|| Error::run(format!("no gradient of {name}")))?;
        let found = square_sum(&grad.contiguous()?)?.sqrt();
        all.push(relative(("reward", name), KIND.1, (expected, found)));
    }
    Ok(all)
}

/// One SFT step of an adapter written by peft.
fn adapters(device: &Device, folder: &Path, case: &str) -> Result<Vec<Checked>> {
    let base = Checkpoint::load_dir(&folder.join("model_tied"), device)?;
    let saved = peft::read(&folder.join(format!("f_adapter_{case}")), device)?;
    let held = Precision::F32;
    let start = Tensors::dense(base.weights);
    let learner = Learner::adapted(&base.config, start, &saved.attached(), held, |_| false)?;
    let (grads, report) = taken(&learner, &Sft::default(), &sft_rows(folder)?)?;
    let golden = Golden::read(folder, "f_lora.json")?;
    let op = format!("adapters {case}");
    let expected = golden.case(case).at("f_lora.json")?.loss;
    let mut all = vec![relative((&op, "loss"), LOSS_BOUND, (expected, report.loss))];
    let file = format!("f_lora_{case}.safetensors");
    let mut golden = tensors(folder, &file)?;
    golden.remove("logits");
    let ours = |name: &str| {
        let name = name.trim_start_matches("grad.base_model.model.");
        name.replace(".default.weight", ".weight")
    };
    all.extend(gradients(&op, &grads, (&file, &golden), &ours)?);
    Ok(all)
}

fn taken(
    learner: &Learner,
    objective: &dyn Objective,
    trees: &[Tree],
) -> Result<(Gradients, StepReport)> {
    let trees: Vec<&Tree> = trees.iter().collect();
    step::gradients(learner, objective, &trees, StepOptions::new(1 << 20))
}

/// Compares gradients with those of a file, whose names `ours` translates.
fn gradients(
    op: &str,
    grads: &Gradients,
    (file, golden): (&str, &Weights),
    ours: &dyn Fn(&str) -> String,
) -> Result<Vec<Checked>> {
    let one = |(name, expected): (&String, &Tensor)| {
        let name = ours(name);
        let found = grads.get(&name).ok_or_else(|| Error::run(format!("no gradient of {name}")));
        let found = found.at(file)?.to_device(&Device::Cpu)?;
        Ok(compared((op, &name), KIND, (expected, &found))?)
    };
    golden.iter().map(one).collect()
}

fn relative((op, what): (&str, &str), bound: f64, (expected, found): (f64, f64)) -> Checked {
    let error = (found - expected).abs() / expected.abs();
    Checked { op: op.to_owned(), dtype: KIND.0, what: what.to_owned(), error, bound }
}

/// The rows of the SFT batch.
fn sft_rows(folder: &Path) -> Result<Vec<Tree>> {
    let file = "b_sft_batches.safetensors";
    let batch = tensors(folder, file)?;
    let named = |name: &str| get(&batch, name).at(file);
    rows(named("input_ids0")?, named("attention_mask0")?, Some(named("labels0")?))
}

/// Loss and gradients of one batch.
fn step_of(checkpoint: &Checkpoint, folder: &Path, variant: &str) -> Result<Vec<Checked>> {
    let learner = Learner::new(&checkpoint.config, &checkpoint.weights)?;
    let (grads, report) = taken(&learner, &Sft::default(), &sft_rows(folder)?)?;
    let Step { loss, .. } = store::read_json(&folder.join(format!("b_sft_{variant}.json")))?;
    let op = format!("{variant}, step");
    let mut all = vec![relative((&op, "loss"), LOSS_BOUND, (loss, report.loss))];
    let file = format!("b_sft_grads_{variant}.safetensors");
    all.extend(gradients(&op, &grads, (&file, &tensors(folder, &file)?), &str::to_owned)?);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> &'static Path {
        Path::new("tests/fixtures/goldens")
    }

    #[test]
    fn the_cpu_agrees_with_pytorch() {
        let all = run(&Device::Cpu, folder()).unwrap();
        assert!(all.len() > 60, "{}", all.len());
        for variant in VARIANTS {
            for what in ["logits", "step"] {
                assert!(all.iter().any(|one| one.op == format!("{variant}, {what}")));
            }
        }
        for op in ["dpo", "reward", "adapters qv_r4_a8", "adapters all_r3_a12_rslora"] {
            assert!(all.iter().filter(|one| one.op == op).count() > 8, "{op}");
        }
        let wrong: Vec<_> = all.iter().filter(|one| !one.agrees()).collect();
        assert!(wrong.is_empty(), "{wrong:?}");
    }

    #[test]
    fn results_of_another_model_do_not_agree_and_missing_files_are_named() {
        let mut checkpoint =
            Checkpoint::load_dir(&folder().join("model_tied"), &Device::Cpu).unwrap();
        let norm = checkpoint.weights.get_mut(crate::model::params::FINAL_NORM).unwrap();
        *norm = (&*norm * 1.01).unwrap();
        for checked in [logits, step_of] {
            let all = checked(&checkpoint, folder(), "tied").unwrap();
            assert!(all.iter().all(|one| !one.agrees()), "{all:?}");
        }
        let error = run(&Device::Cpu, Path::new("tests/fixtures/tiny")).unwrap_err();
        assert!(error.to_string().contains("model_tied"), "{error}");
    }
}
