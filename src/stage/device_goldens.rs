//! Whole models on a device held against numbers that transformers and PyTorch computed: logits, and the loss of a step of
//! SFT with the gradient of every parameter. What `arriero doctor --device cuda:0 --check --goldens DIR` adds to the ops.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::device_check::{Checked, compared};
use crate::data::forest::Forest;
use crate::data::tree::{Role, Tree};
use crate::error::{Context, Error, Result};
use crate::loss::sft::Sft;
use crate::model::checkpoint::Checkpoint;
use crate::model::{Transformer, Weights};
use crate::store;
use crate::train::learner::Learner;
use crate::train::step::{self, StepOptions};

/// Llama models of different shapes, by the names of their files.
const VARIANTS: [&str; 3] = ["tied", "untied", "llama3rope"];
/// The label of a token that is not trained.
const IGNORED: i64 = -100;
/// Logits and gradients: what two blocks add up in another order, over the largest number.
const KIND: (&str, f64) = ("f32", 1e-4);
/// Of the loss, relatively.
const LOSS_BOUND: f64 = 1e-5;

/// What is read of a variant's numbers.
#[derive(Deserialize)]
struct Step {
    loss: f64,
}

/// Runs every model in f32.
///
/// # Errors
/// Files that are missing; the device's.
pub fn run(device: &Device, folder: &Path) -> Result<Vec<Checked>> {
    let mut all = Vec::new();
    for variant in VARIANTS {
        let dir = folder.join(format!("model_{variant}"));
        let checkpoint = Checkpoint::load_dir(&dir, device)?;
        all.extend(logits(&checkpoint, folder, variant)?);
        all.extend(step_of(&checkpoint, folder, variant)?);
    }
    Ok(all)
}

fn tensors(folder: &Path, name: &str) -> Result<Weights> {
    // Ids and masks are whole numbers, which no model's file has.
    let path = folder.join(name);
    let found = candle_core::safetensors::load(&path, &Device::Cpu).map_err(Error::from);
    Ok(found.at(path.display())?.into_iter().collect())
}

fn get<'a>(tensors: &'a Weights, name: &str) -> Result<&'a Tensor> {
    tensors.get(name).ok_or_else(|| Error::run(format!("missing tensor `{name}`")))
}

/// Rows of a padded batch as trees of one segment.
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

/// Loss and gradients of one batch.
fn step_of(checkpoint: &Checkpoint, folder: &Path, variant: &str) -> Result<Vec<Checked>> {
    let file = "b_sft_batches.safetensors";
    let batch = tensors(folder, file)?;
    let named = |name: &str| get(&batch, name).at(file);
    let trees = rows(named("input_ids0")?, named("attention_mask0")?, Some(named("labels0")?))?;
    let learner = Learner::new(&checkpoint.config, &checkpoint.weights)?;
    let trees: Vec<&Tree> = trees.iter().collect();
    let (grads, report) =
        step::gradients(&learner, &Sft::default(), &trees, StepOptions::new(1 << 20))?;
    let path = folder.join(format!("b_sft_{variant}.json"));
    let Step { loss } = store::read_json(&path)?;
    let op = format!("{variant}, step");
    let mut all = vec![Checked {
        op: op.clone(),
        dtype: "f32",
        what: "loss".to_owned(),
        error: (report.loss - loss).abs() / loss.abs(),
        bound: LOSS_BOUND,
    }];
    let file = format!("b_sft_grads_{variant}.safetensors");
    for (name, expected) in tensors(folder, &file)? {
        let found = grads.get(&name).ok_or_else(|| Error::run(format!("no gradient of {name}")));
        let found = found.at(&file)?.to_device(&Device::Cpu)?;
        all.push(compared((&op, &name), KIND, (&expected, &found))?);
    }
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
        let wrong: Vec<_> = all.iter().filter(|one| !one.agrees()).collect();
        assert!(wrong.is_empty(), "{wrong:?}");
    }

    #[test]
    fn another_models_numbers_do_not_agree_and_missing_files_are_named() {
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
