//! Training settings: the keys shared by all training stages, named as in Hugging Face's `TrainingArguments`.

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

/// Training keys, resolved: every field holds the value in use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a key of a recipe, named by others")]
pub struct Settings {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Shape of the learning rate schedule after warm-up.
    pub lr_scheduler_type: Schedule,
    /// Share of all steps used for linear warm-up. Ignored if `warmup_steps` is set.
    pub warmup_ratio: f64,
    /// Number of linear warm-up steps; 0 defers to `warmup_ratio`.
    pub warmup_steps: usize,
    /// Decoupled weight decay of matrices. Norm weights and biases are never decayed (Hugging Face's grouping).
    pub weight_decay: f64,
    /// AdamW's first-moment decay.
    pub adam_beta1: f64,
    /// AdamW's second-moment decay.
    pub adam_beta2: f64,
    /// AdamW's epsilon.
    pub adam_epsilon: f64,
    /// Round the bf16 compute copies stochastically, so that in expectation they equal their f32 masters. Needs
    /// `dtype = "bf16"`. The masters are f32 either way and lose nothing: it only trades the rounding bias of the
    /// copies for noise that changes every step. Draws follow from the stage's seed, the step and the element.
    /// Evaluation rounds to nearest, as does anything that reads a checkpoint.
    pub stochastic_rounding: bool,
    /// Clip the global gradient norm to this; 0 disables clipping.
    pub max_grad_norm: f64,
    /// Passes over the data. Ignored if `max_steps` is set.
    pub num_train_epochs: f64,
    /// Optimizer steps; 0 defers to `num_train_epochs`.
    pub max_steps: usize,
    /// Examples per micro-batch as other trainers count them. Only its product with `gradient_accumulation_steps`, the
    /// examples per optimizer step, affects the result.
    pub per_device_train_batch_size: usize,
    /// See `per_device_train_batch_size`.
    pub gradient_accumulation_steps: usize,
    /// Token budget for packing a step's examples into micro-batches. Affects memory, never the result.
    pub max_tokens_per_micro_batch: usize,
    /// Which blocks are recomputed in the backward pass instead of keeping their activations: `"none"` or false,
    /// `"block"` or true, `"auto"` by `memory_budget`. Affects memory and speed, never the result.
    pub gradient_checkpointing: Recompute,
    /// Bytes that `gradient_checkpointing = "auto"` may use, such as `"6GiB"`; empty: nine tenths of what is free.
    pub memory_budget: String,
    /// Update a block's weights as soon as its gradient is computed, then free the gradient: only one block's gradients
    /// exist at a time. For steps of one micro-batch without clipping (`max_grad_norm = 0`).
    pub optimizer_in_backward: bool,
    /// Keep masters and AdamW's moments in host memory and update them there; the GPU holds only the compute copy of a
    /// trained parameter. No effect on the CPU.
    pub optimizer_offload: bool,
    /// Keep the inputs of blocks that `gradient_checkpointing` recomputes in host memory. No effect on the CPU.
    pub activation_offload: bool,
    /// NEFTune: uniform noise in `±alpha / sqrt(L D)` on the token embeddings during training, with `L` the row's
    /// tokens and `D` the width; 0 is off, the paper uses 5 to 15.
    pub neftune_noise_alpha: f64,
    /// Evaluate every this many steps; 0 evaluates only at the end.
    pub eval_steps: usize,
    /// Write a checkpoint every this many steps; 0 writes none before the end.
    pub save_steps: usize,
    /// Number of checkpoints to keep; older ones are deleted once a newer one is complete.
    pub save_total_limit: usize,
    /// Log every this many steps.
    pub logging_steps: usize,
    /// Finish with the weights of the best evaluation rather than the last.
    pub load_best_model_at_end: bool,
    /// Stop after this many evaluations in a row without a new lowest loss; 0 never stops early. Needs `eval_steps`.
    pub early_stopping_patience: usize,
    /// What to do when preference training lowers the chosen responses' log-probability by 1 nat per token: `"warn"`,
    /// `"stop"` or `"off"`.
    pub watchdog: Watchdog,
    /// Compute type of matrix products: `f32`, or `bf16` with f32 masters, sums, norms and softmax.
    pub dtype: Precision,
    /// Element type of the saved weights.
    pub save_dtype: Precision,
    /// Decay per step of an exponential moving average of the weights, which is then evaluated and saved: 0.999
    /// averages about the last 1000 steps; 0 keeps no average.
    pub ema_decay: f64,
    /// Held-out prompts to answer at each evaluation, for people to read.
    pub eval_samples: usize,
    /// Reshuffle the examples each epoch.
    pub shuffle: bool,
    /// Read and prepare the training data during training instead of all of it beforehand. Needs `max_steps`.
    pub streaming: bool,
    /// Number of examples of a stream held in the shuffle buffer.
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
    /// Examples per optimizer step.
    pub fn examples_per_step(&self) -> usize {
        self.per_device_train_batch_size * self.gradient_accumulation_steps
    }

    /// How a step runs on a device. `held`: bytes of the step's memory that are already allocated, such as the masters.
    ///
    /// # Errors
    /// Recomputation by memory when neither `memory_budget` nor the free memory is known.
    pub fn step_options(&self, held: u64, device: &Device) -> Result<StepOptions> {
        Ok(StepOptions { budget: self.budget(held, device)?, ..self.options(!device.is_cpu()) })
    }

    /// The same for an estimate that opens no GPU. Without `memory_budget`, how many blocks `"auto"` keeps on a GPU is
    /// unknown; none is assumed, the minimum.
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
            anchored: false,
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

    /// NEFTune noise for the step with 0-based index `step`; `None` if off.
    pub fn noise(&self, seed: u64, step: usize) -> Option<Noise> {
        let alpha = self.neftune_noise_alpha;
        (alpha > 0.0).then_some(Noise { alpha, seed, step })
    }

    /// AdamW's hyperparameters.
    pub fn hyper(&self) -> Hyper {
        Hyper {
            beta1: self.adam_beta1,
            beta2: self.adam_beta2,
            eps: self.adam_epsilon,
            weight_decay: self.weight_decay,
            decayed: is_decayed,
        }
    }

    /// A fresh optimizer for a stage with this seed.
    pub fn optimizer(&self, seed: u64) -> AdamW {
        AdamW::new(self.hyper()).rounding_by_chance(self.stochastic_rounding.then_some(seed))
    }

    /// Optimizer steps for `examples` training examples. A partial last step counts.
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

    /// Refuses values that cannot work.
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

    /// Refuses early stopping without evaluations.
    ///
    /// # Errors
    /// `early_stopping_patience` without held-out data.
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

    /// Names the enabled settings that have no effect on the CPU, for people.
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
    fn stream_without_max_steps_is_refused() {
        let streaming = Settings { streaming: true, ..Settings::default() };
        let error = streaming.check().unwrap_err();
        assert!(error.to_string().contains("`max_steps` is 0"), "{error}");
        assert!(error.hint_text().unwrap().contains("set max_steps"), "{error:?}");
        Settings { max_steps: 1, ..streaming }.check().unwrap();
    }
}
