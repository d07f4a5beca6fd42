//! Whole optimizer steps of a small model on a device, with every option that settings offer, compared with the
//! plainest step on the CPU: all at once, in f32, without recomputation or offloading.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::check::{Checked, compared, home};
use crate::data::tree::{Role, Tree};
use crate::error::Result;
use crate::loss::Objective;
use crate::loss::preference::{Preference, PreferenceLoss};
use crate::loss::reward::Reward;
use crate::loss::sft::{Sft, TokenLoss};
use crate::model::lora::{self, Lora};
use crate::model::packed::{self, BlockType, Packed, PackedWeights, Quantization};
use crate::model::source::Source;
use crate::model::{Config, Precision, Tensors, Weights, init};
use crate::optim::adamw::{AdamW, Hyper, is_decayed};
use crate::train::step::StepOptions;
use crate::train::update::{Pace, update};
use crate::train::{Held, Learner, Recompute, anchor};

/// Number of steps: the second starts from the first's result.
const STEPS: usize = 2;
const VOCAB: usize = 211;
/// Relative error bounds: sums over two blocks in a different order, and in bf16 their rounding.
const BOUNDS: [(&str, f64); 2] = [("f32", 1e-4), ("bf16", 6e-2)];

/// The training task.
#[derive(Clone, Copy, PartialEq)]
enum Task {
    Sft,
    Dpo,
    Reward,
    /// SFT whose slopes depend on the head's readings.
    Dft,
    Asft,
    Eaft,
    /// Pair losses weighed on the host, one of them coupled over the whole step.
    Weighed,
}

/// One configuration of a step.
pub(super) struct Way {
    pub(super) name: &'static str,
    task: Task,
    /// Quantization of the frozen base, if adapters are trained.
    adapters: Option<Quantization>,
    dtype: Precision,
    max_grad_norm: f64,
    /// How it differs from the plainest step.
    change: fn(StepOptions) -> StepOptions,
}

/// All configurations.
pub(super) fn ways() -> Vec<Way> {
    const SFT: Way = Way {
        name: "plain",
        task: Task::Sft,
        adapters: None,
        dtype: Precision::F32,
        max_grad_norm: 0.0,
        change: |options| options,
    };
    const PARTS: fn(StepOptions) -> StepOptions =
        |options| StepOptions { max_tokens: 64, ..options };
    const OFFLOAD: fn(StepOptions) -> StepOptions =
        |options| StepOptions { optimizer_offload: true, ..options };
    const IN_BACKWARD: fn(StepOptions) -> StepOptions =
        |options| StepOptions { optimizer_in_backward: true, ..options };
    const WAITING: fn(StepOptions) -> StepOptions =
        |options| StepOptions { recompute: Recompute::Block, activation_offload: true, ..options };
    let (dpo, reward) = (Task::Dpo, Task::Reward);
    vec![
        SFT,
        Way { name: "bf16", dtype: Precision::Bf16, ..SFT },
        Way { name: "several micro-batches", change: PARTS, ..SFT },
        Way { name: "clipped", max_grad_norm: 0.05, ..SFT },
        Way { name: "optimizer_in_backward", change: IN_BACKWARD, ..SFT },
        Way { name: "optimizer_offload", change: OFFLOAD, max_grad_norm: 0.05, ..SFT },
        Way { name: "optimizer_offload bf16", change: OFFLOAD, dtype: Precision::Bf16, ..SFT },
        Way { name: "activation_offload", change: WAITING, ..SFT },
        Way { name: "adapters", adapters: Some(Quantization::None), ..SFT },
        Way { name: "adapters beside nf4", adapters: Some(Quantization::Nf4), ..SFT },
        Way {
            name: "adapters beside nf4 bf16",
            adapters: Some(Quantization::Nf4),
            dtype: Precision::Bf16,
            ..SFT
        },
        Way { name: "adapters beside q4_1", adapters: Some(Quantization::Gguf), ..SFT },
        Way { name: "dpo", task: dpo, change: PARTS, ..SFT },
        Way { name: "dpo bf16", task: dpo, change: PARTS, dtype: Precision::Bf16, ..SFT },
        Way { name: "dft", task: Task::Dft, change: PARTS, ..SFT },
        Way { name: "asft", task: Task::Asft, change: PARTS, ..SFT },
        Way { name: "eaft", task: Task::Eaft, change: PARTS, ..SFT },
        Way { name: "dpo by the host", task: Task::Weighed, change: PARTS, ..SFT },
        Way { name: "reward", task: reward, change: PARTS, ..SFT },
        Way { name: "reward bf16", task: reward, dtype: Precision::Bf16, ..SFT },
    ]
}

impl Way {
    /// Compares the losses, the gradient norms, and the total change of all parameters.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn check(&self, device: &Device) -> Result<Vec<Checked>> {
        let plainest = Self { dtype: Precision::F32, change: |options| options, ..*self };
        let (expected, found) = (plainest.results(&Device::Cpu)?, self.results(device)?);
        let bound = BOUNDS[usize::from(self.dtype == Precision::Bf16)];
        let op = format!("step {}", self.name);
        let pairs = ["losses", "norms", "moves"].iter().zip(expected.iter().zip(&found));
        pairs.map(|(what, pair)| Ok(compared((&op, what), bound, pair)?)).collect()
    }

    fn results(&self, device: &Device) -> Result<[Tensor; 3]> {
        let options = StepOptions {
            dtype: self.dtype,
            gpu: !device.is_cpu(),
            ..(self.change)(StepOptions::new(1 << 20))
        };
        let learner = self.learner(device, options.optimizer_offload)?;
        let start = positions(&learner)?;
        // With such a large eps, updates are proportional to the gradient, so signs near 0 do not matter.
        let hyper =
            Hyper { beta1: 0.9, beta2: 0.95, eps: 1.0, weight_decay: 0.0, decayed: is_decayed };
        let (objective, trees) = (self.objective(&learner)?, self.trees());
        let (trees, mut adamw): (Vec<&Tree>, _) = (trees.iter().collect(), AdamW::new(hyper));
        let pace = Pace { lr: 0.3, max_grad_norm: self.max_grad_norm };
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        for _ in 0..STEPS {
            let what = (objective.as_ref(), trees.as_slice());
            let (report, norm) = update(&learner, what, options, &mut adamw, pace)?;
            losses.push(report.loss as f32);
            norms.push(norm as f32);
        }
        let column = |values: Vec<f32>| Tensor::from_vec(values, STEPS, &Device::Cpu);
        Ok([column(losses)?, column(norms)?, (positions(&learner)? - start)?])
    }

    fn learner(&self, device: &Device, offloaded: bool) -> Result<Learner> {
        let config = self.config()?;
        let start = init::random(&config, 3, &Device::Cpu)?.into_iter();
        let start = start.map(|(name, tensor)| Ok((name, tensor.to_device(device)?)));
        let mut start: Weights = start.collect::<Result<_>>()?;
        let held = Held { dtype: self.dtype, offloaded };
        let Some(quantization) = self.adapters else {
            return Learner::with(&config, start, held, |_| false);
        };
        let attached = lora::attach(&Lora::default(), &config, &mut start, 5)?;
        let packed = packed(&mut start, quantization)?;
        let start = Tensors { packed, ..Tensors::dense(start) };
        Learner::adapted(&config, start, &attached, held, |_| false)
    }

    /// Head width 32, two query heads per key head.
    fn config(&self) -> Result<Config> {
        let architecture = if self.task == Task::Reward {
            "LlamaForSequenceClassification"
        } else {
            "LlamaForCausalLM"
        };
        Config::from_json(&format!(
            r#"{{"model_type": "llama", "architectures": ["{architecture}"], "num_labels": 1, "hidden_size": 64,
            "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1,
            "vocab_size": {VOCAB}, "tie_word_embeddings": false, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
            "hidden_act": "silu"}}"#
        ))
    }

    fn objective(&self, learner: &Learner) -> Result<Box<dyn Objective>> {
        // Different from the policy's own, so that margins are not 0.
        let reference = (0..3).map(|row| (row, vec![-70.0 - row as f64, -64.0]));
        let reference: BTreeMap<_, _> = reference.collect();
        Ok(match self.task {
            Task::Sft => Box::new(Sft::default()),
            Task::Dft => Box::new(Sft { loss: TokenLoss::Dft, ..Sft::default() }),
            Task::Asft => {
                let reference = Some(anchor(learner)?);
                Box::new(Sft {
                    loss: TokenLoss::Asft,
                    asft_alpha: 2.0,
                    reference,
                    ..Sft::default()
                })
            }
            Task::Eaft => Box::new(Sft { loss: TokenLoss::Eaft, ..Sft::default() }),
            Task::Reward => Box::new(Reward::default()),
            Task::Dpo => Box::new(Preference { reference, ..Preference::default() }),
            Task::Weighed => {
                use PreferenceLoss::{Aot, Bco, NcaPair};
                let losses = vec![(NcaPair, 1.0), (Bco, 0.5), (Aot, 0.5)];
                let base = Preference::default();
                Box::new(Preference { losses, weighting: true, reference, ..base })
            }
        })
    }

    /// Three rows, of which no two fit in a micro-batch of 64 tokens.
    fn trees(&self) -> Vec<Tree> {
        let tokens = |len: usize, step: usize| -> Vec<u32> {
            (0..len).map(|at| (at * step % VOCAB) as u32).collect()
        };
        let content = |len, step| (tokens(len, step), vec![Role::Content; len]);
        let tree = |row: usize| {
            let (first, second) = (content(17 + 9 * row, 7 + row), content(12, 29 + row));
            match self.task {
                Task::Sft | Task::Dft | Task::Asft | Task::Eaft => {
                    Tree::sequence(tokens(33 + 5 * row, 11), vec![Role::Content; 33 + 5 * row], row)
                }
                _ => Tree::siblings(tokens(21, 13 + row), vec![first, second], row),
            }
        };
        (0..3).map(tree).collect()
    }
}

/// Removes the projections and packs them; the blocks of a GGUF file are made here.
fn packed(weights: &mut Weights, kind: Quantization) -> Result<PackedWeights> {
    if kind != Quantization::Gguf {
        return packed::pack(weights, kind, &Source::Directory(PathBuf::new()), &[]);
    }
    let names: Vec<String> =
        weights.keys().filter(|name| lora::is_projection(name)).cloned().collect();
    let taken = names.into_iter().filter_map(|name| weights.remove_entry(&name));
    taken
        .map(|(name, weight)| Ok((name, Arc::new(Packed::rounded(&weight, BlockType::Q4_1)?))))
        .collect()
}

/// All trained parameters, concatenated.
fn positions(learner: &Learner) -> Result<Tensor> {
    let flat = |master: &Tensor| home(&master.flatten_all()?);
    let all = learner.params().values().map(|param| flat(&param.master));
    let all: Vec<Tensor> = all.collect::<candle_core::Result<_>>()?;
    // An explicit copy, because masters are updated in place.
    Ok(Tensor::cat(&all, 0)?.to_dtype(DType::F32)?.copy()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_take_a_step_gives_the_same_weights() {
        for way in ways() {
            let all = way.check(&Device::Cpu).unwrap();
            assert!(all.len() == 3 && all.iter().all(Checked::agrees), "{all:?}");
        }
    }

    #[test]
    fn clipped_step_does_not_agree_with_an_unclipped_one() {
        let plain = &ways()[0];
        let clipped = ways().into_iter().find(|way| way.name == "clipped").unwrap();
        let (expected, found) = (plain.results(&Device::Cpu), clipped.results(&Device::Cpu));
        let ([_, norms, moves], [_, _, clipped]) = (expected.unwrap(), found.unwrap());
        assert!(norms.min_all().unwrap().to_scalar::<f32>().unwrap() > 0.1, "{norms}");
        let apart = compared(("step", "moves"), BOUNDS[1], (&moves, &clipped)).unwrap();
        assert!(!apart.agrees(), "{apart:?}");
    }
}
