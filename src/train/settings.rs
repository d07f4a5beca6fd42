//! How to train: the keys that every training stage shares, named as in Hugging Face's `TrainingArguments`.

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::memory::{Recompute, available, parse_bytes};
use super::noise::Noise;
use super::step::StepOptions;
use super::watchdog::Watchdog;
use crate::error::{Error, Result};
use crate::model::Precision;
use crate::ops::cuda::device::facts;
use crate::optim::adamw::{AdamW, Hyper, is_decayed};
use crate::optim::schedule::Schedule;

/// Training keys, resolved: every field has a value that is used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a key of a recipe, named by others")]
pub struct Settings {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Shape of the learning rate after warm-up.
    pub lr_scheduler_type: Schedule,
    /// Share of all steps that warm up linearly. Ignored where `warmup_steps` is set.
    pub warmup_ratio: f64,
    /// Steps that warm up linearly; 0 leaves it to `warmup_ratio`.
    pub warmup_steps: usize,
    /// Decoupled weight decay of matrices. Norm weights and biases are never decayed (Hugging Face grouping).
    pub weight_decay: f64,
    /// AdamW's first-moment decay.
    pub adam_beta1: f64,
    /// AdamW's second-moment decay.
    pub adam_beta2: f64,
    /// AdamW's epsilon.
    pub adam_epsilon: f64,
    /// Round the bf16 copies that products compute with up or down by chance, so that on average they are their f32 masters.
    /// Needs `dtype = "bf16"`. Masters are f32 with it or without and lose nothing: what goes is the bias of the copies alone,
    /// for a noise that changes with each step. Draws follow from the stage's seed, the step and the element. Evaluations
    /// round to nearest, as whoever reads a checkpoint does.
    pub stochastic_rounding: bool,
    /// Clip the global gradient norm to this; 0 turns clipping off.
    pub max_grad_norm: f64,
    /// Passes over the data. Ignored where `max_steps` is set.
    pub num_train_epochs: f64,
    /// Optimizer steps; 0 leaves it to `num_train_epochs`.
    pub max_steps: usize,
    /// Examples in a micro-batch as other trainers count them. Only its product with
    /// `gradient_accumulation_steps`, the examples an optimizer step, changes the result.
    pub per_device_train_batch_size: usize,
    /// See `per_device_train_batch_size`.
    pub gradient_accumulation_steps: usize,
    /// Token budget that cuts a step's examples into packed micro-batches. Changes memory, never the result.
    pub max_tokens_per_micro_batch: usize,
    /// Which blocks run again in the backward pass instead of keeping their activations: `"none"` or false, `"block"` or
    /// true, `"auto"` by `memory_budget`. Changes memory and speed, never the result.
    pub gradient_checkpointing: Recompute,
    /// Bytes that `gradient_checkpointing = "auto"` may fill, such as `"6GiB"`; empty: nine tenths of what is free.
    pub memory_budget: String,
    /// Update a block's weights as soon as its gradient is there, and free it: gradients of one block exist at a time.
    /// For steps of one micro-batch without clipping (`max_grad_norm = 0`).
    pub optimizer_in_backward: bool,
    /// Masters and AdamW's moments are in host memory and move there: of a trained parameter the GPU holds what it computes
    /// with. Changes nothing on the CPU.
    pub optimizer_offload: bool,
    /// Inputs of blocks that `gradient_checkpointing` runs again wait in host memory. Changes nothing on the CPU.
    pub activation_offload: bool,
    /// NEFTune: uniform noise within `±alpha / sqrt(L D)` on the embedded tokens while training, with `L` the row's tokens and
    /// `D` the width; 0 is off, the paper takes 5 to 15.
    pub neftune_noise_alpha: f64,
    /// Evaluate every so many steps; 0 evaluates at the end only.
    pub eval_steps: usize,
    /// Write a checkpoint every so many steps; 0 writes none before the end.
    pub save_steps: usize,
    /// Keep this many checkpoints; older ones are deleted after a newer one is whole.
    pub save_total_limit: usize,
    /// Log every so many steps.
    pub logging_steps: usize,
    /// Finish with the weights of the best evaluation rather than the last.
    pub load_best_model_at_end: bool,
    /// Stop after so many evaluations in a row without a new lowest loss; 0 never does. Needs `eval_steps`.
    pub early_stopping_patience: usize,
    /// What to do when a preference loss makes the chosen responses unlikely, by 1 nat a token: `"warn"`, `"stop"` or
    /// `"off"`.
    pub watchdog: Watchdog,
    /// What products compute with: `f32`, or `bf16` with f32 masters, sums, norms and softmax.
    pub dtype: Precision,
    /// Element type of the saved weights.
    pub save_dtype: Precision,
    /// Evaluate and save an exponential moving average of the weights, which keeps this much of itself at each step: 0.999
    /// averages about the last 1000 steps; 0 keeps none.
    pub ema_decay: f64,
    /// Prompts of the held-out set to answer at each evaluation, for people to read.
    pub eval_samples: usize,
    /// Shuffle the examples anew each epoch.
    pub shuffle: bool,
    /// Read and prepare the training data while training goes on, instead of all of it beforehand. Needs `max_steps`.
    pub streaming: bool,
    /// How many examples of a stream are held and drawn from at random.
    pub shuffle_buffer_size: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            learning_rate: 1e-5,
            lr_scheduler_type: Schedule::Cosine,
            warmup_ratio: 0.03,
            warmup_steps: 0,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            stochastic_rounding: false,
            max_grad_norm: 1.0,
            num_train_epochs: 1.0,
            max_steps: 0,
            per_device_train_batch_size: 8,
            gradient_accumulation_steps: 1,
            max_tokens_per_micro_batch: 4096,
            gradient_checkpointing: Recompute::None,
            memory_budget: String::new(),
            optimizer_in_backward: false,
            optimizer_offload: false,
            activation_offload: false,
            neftune_noise_alpha: 0.0,
            eval_steps: 0,
            save_steps: 0,
            save_total_limit: 2,
            logging_steps: 1,
            load_best_model_at_end: false,
            early_stopping_patience: 0,
            watchdog: Watchdog::Warn,
            dtype: Precision::F32,
            save_dtype: Precision::F32,
            ema_decay: 0.0,
            eval_samples: 0,
            shuffle: true,
            streaming: false,
            shuffle_buffer_size: 10_000,
        }
    }
}

impl Settings {
    /// Examples an optimizer step.
    pub fn examples_per_step(&self) -> usize {
        self.per_device_train_batch_size * self.gradient_accumulation_steps
    }

    /// How a step is computed on a device. `held`: bytes of the step's memory that are taken already, such as the masters.
    ///
    /// # Errors
    /// Recomputation by memory where neither `memory_budget` nor what is free is known.
    pub fn step_options(&self, held: u64, device: &Device) -> Result<StepOptions> {
        Ok(StepOptions { budget: self.budget(held, device)?, ..self.options(!device.is_cpu()) })
    }

    /// The same for an estimate, where nobody opens a GPU. How many blocks `"auto"` keeps there is not known without
    /// `memory_budget`: none is the least that it needs.
    ///
    /// # Errors
    /// On the CPU as [`step_options`](Self::step_options).
    pub fn planned_options(&self, gpu: bool) -> Result<StepOptions> {
        let options = self.options(gpu);
        if gpu && options.recompute == Recompute::Auto && self.memory_budget.is_empty() {
            return Ok(StepOptions { recompute: Recompute::Block, ..options });
        }
        Ok(StepOptions { budget: self.budget(0, &Device::Cpu)?, ..options })
    }

    fn options(&self, gpu: bool) -> StepOptions {
        StepOptions {
            max_tokens: self.max_tokens_per_micro_batch,
            recompute: self.gradient_checkpointing,
            budget: u64::MAX,
            dtype: self.dtype,
            adapted: None,
            dropout: None,
            optimizer_in_backward: self.optimizer_in_backward,
            optimizer_offload: self.optimizer_offload && gpu,
            activation_offload: self.activation_offload && gpu,
            averages: self.ema_decay > 0.0,
            follows: false,
            noise: None,
            gpu,
        }
    }

    fn budget(&self, held: u64, device: &Device) -> Result<u64> {
        if self.gradient_checkpointing != Recompute::Auto {
            return Ok(u64::MAX);
        }
        if !self.memory_budget.is_empty() {
            return parse_bytes("memory_budget", &self.memory_budget);
        }
        let free = match facts(device)? {
            Some(gpu) => Some(gpu.free),
            None => available(),
        };
        free.map(|free| (free + held) / 10 * 9).ok_or_else(|| {
            Error::usage("how much memory is free is not known on this system")
                .hint("set memory_budget, for example \"6GiB\"")
        })
    }

    /// The noise of a step, after `step` others.
    pub fn noise(&self, seed: u64, step: usize) -> Option<Noise> {
        let alpha = self.neftune_noise_alpha;
        (alpha > 0.0).then_some(Noise { alpha, seed, step })
    }

    /// AdamW's constants.
    pub fn hyper(&self) -> Hyper {
        Hyper {
            beta1: self.adam_beta1,
            beta2: self.adam_beta2,
            eps: self.adam_epsilon,
            weight_decay: self.weight_decay,
            decayed: is_decayed,
        }
    }

    /// The optimizer of a stage with this seed, before its first step.
    pub fn optimizer(&self, seed: u64) -> AdamW {
        AdamW::new(self.hyper()).rounding_by_chance(self.stochastic_rounding.then_some(seed))
    }

    /// Optimizer steps for `examples` training examples. The last, partial step counts.
    pub fn total_steps(&self, examples: usize) -> usize {
        if self.max_steps > 0 {
            return self.max_steps;
        }
        let steps_per_epoch = examples.div_ceil(self.examples_per_step());
        ((steps_per_epoch as f64) * self.num_train_epochs).ceil() as usize
    }

    /// Warm-up steps of a run of `total` steps.
    pub fn warmup(&self, total: usize) -> usize {
        match self.warmup_steps {
            0 => (self.warmup_ratio * total as f64).ceil() as usize,
            steps => steps,
        }
    }

    /// Refuses values that cannot train.
    ///
    /// # Errors
    /// Names the key, its value and what was expected.
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("learning_rate", self.learning_rate),
            ("adam_epsilon", self.adam_epsilon),
            ("per_device_train_batch_size", self.per_device_train_batch_size as f64),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps as f64),
            ("max_tokens_per_micro_batch", self.max_tokens_per_micro_batch as f64),
            ("logging_steps", self.logging_steps as f64),
            ("num_train_epochs", self.num_train_epochs),
        ];
        for (key, value) in positive {
            if value.is_nan() || value <= 0.0 {
                return Err(Error::usage(format!("`{key}` is {value}, expected more than 0")));
            }
        }
        for (key, value) in [
            ("weight_decay", self.weight_decay),
            ("max_grad_norm", self.max_grad_norm),
            ("neftune_noise_alpha", self.neftune_noise_alpha),
        ] {
            if !value.is_finite() || value < 0.0 {
                return Err(Error::usage(format!("`{key}` is {value}, expected 0 or more")));
            }
        }
        for (key, value) in [
            ("adam_beta1", self.adam_beta1),
            ("adam_beta2", self.adam_beta2),
            ("warmup_ratio", self.warmup_ratio),
            ("ema_decay", self.ema_decay),
        ] {
            if !(0.0..1.0).contains(&value) {
                return Err(Error::usage(format!(
                    "`{key}` is {value}, expected 0 or more and less than 1"
                )));
            }
        }
        if self.early_stopping_patience > 0 && self.eval_steps == 0 {
            return Err(Error::usage(format!(
                "`early_stopping_patience` is {} and `eval_steps` is 0, expected 1 or more",
                self.early_stopping_patience
            ))
            .hint("it counts evaluations: say how often they are"));
        }
        if self.streaming && self.max_steps == 0 {
            return Err(Error::usage(
                "`streaming` is true and `max_steps` is 0, expected 1 or more",
            )
            .hint("a stream does not know how long an epoch is: set max_steps"));
        }
        self.check_memory()?;
        self.dtype.check_compute()?;
        if self.stochastic_rounding && self.dtype != Precision::Bf16 {
            return Err(Error::usage(format!(
                "`stochastic_rounding` is true and `dtype` is {}, expected bf16",
                self.dtype.dtype().as_str()
            ))
            .hint("f32 weights are computed with as they are, and nothing is rounded: set dtype = \"bf16\", or leave it out"));
        }
        Ok(())
    }

    /// Refuses to wait for evaluations that there are not.
    ///
    /// # Errors
    /// `early_stopping_patience` where nothing is held out.
    pub fn check_held_out(&self, is_there: bool) -> Result<()> {
        if self.early_stopping_patience > 0 && !is_there {
            return Err(Error::usage("`early_stopping_patience` without `eval_datasets`")
                .hint("it waits for a lower evaluation loss: name held-out data"));
        }
        Ok(())
    }

    fn check_memory(&self) -> Result<()> {
        if !self.memory_budget.is_empty() {
            parse_bytes("memory_budget", &self.memory_budget)?;
        }
        if self.optimizer_in_backward && self.max_grad_norm > 0.0 {
            return Err(Error::usage(format!(
                "`optimizer_in_backward` with `max_grad_norm` {}: the norm of all gradients is known only after the first \
                 weights have moved",
                self.max_grad_norm
            ))
            .hint("set max_grad_norm = 0, or optimizer_in_backward = false"));
        }
        if self.activation_offload && self.gradient_checkpointing == Recompute::None {
            return Err(Error::usage(
                "`activation_offload` with `gradient_checkpointing` \"none\": no block runs again from its input",
            )
            .hint("set gradient_checkpointing = \"block\" or \"auto\""));
        }
        Ok(())
    }

    /// What of these settings changes nothing on the CPU, for people.
    pub fn without_effect(&self, device: &Device) -> Option<String> {
        let asked = [
            (self.optimizer_offload, "`optimizer_offload`"),
            (self.activation_offload, "`activation_offload`"),
        ];
        let asked: Vec<&str> =
            asked.iter().filter(|(asked, _)| *asked).map(|(_, key)| *key).collect();
        (device.is_cpu() && !asked.is_empty()).then(|| {
            format!(
                "{}: nothing to do on the CPU, whose memory holds everything already",
                asked.join(" and ")
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decay_or_a_norm_below_zero_is_refused() {
        for value in [-100.0, f64::NAN, f64::INFINITY] {
            let decay = Settings { weight_decay: value, ..Settings::default() };
            let norm = Settings { max_grad_norm: value, ..Settings::default() };
            for (settings, key) in [(decay, "weight_decay"), (norm, "max_grad_norm")] {
                let expected = format!("`{key}` is {value}, expected 0 or more");
                assert_eq!(settings.check().unwrap_err().to_string(), expected);
            }
        }
        Settings { weight_decay: 0.0, max_grad_norm: 0.0, ..Settings::default() }.check().unwrap();
    }

    #[test]
    fn a_stream_without_an_end_is_refused() {
        let streaming = Settings { streaming: true, ..Settings::default() };
        let error = streaming.check().unwrap_err();
        assert!(error.to_string().contains("`max_steps` is 0"), "{error}");
        assert!(error.hint_text().unwrap().contains("set max_steps"), "{error:?}");
        Settings { max_steps: 1, ..streaming }.check().unwrap();
    }
}
