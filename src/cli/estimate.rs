//! Steps and memory of a training stage, from the configuration and the data alone; reads no weights.

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::model::checkpoint::peek;
use crate::model::config::Config;
use crate::model::lora::Lora;
use crate::model::params::count;
use crate::model::run_dir;
use crate::recipe::{Plan, Spec};
use crate::train::Settings;
use crate::train::memory::{Adapted, Footprint};

/// The reference of a training stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reference {
    /// None, or the initial policy, which is evaluated in place before the first step.
    None,
    /// A second model, read before training.
    Other,
    /// A reference that follows the policy.
    Follows,
    /// A frozen copy of the initial policy, kept beside it.
    Frozen,
}

impl Reference {
    pub(super) fn of(spec: &Spec) -> Self {
        match spec {
            Spec::Dpo(spec) if spec.needs_reference() && spec.sync_ref_model => Self::Follows,
            Spec::Dpo(spec) if spec.other_reference().is_some() => Self::Other,
            Spec::Sft(spec) if spec.loss().needs_reference() => Self::Frozen,
            _ => Self::None,
        }
    }
}

/// Peak memory of a training stage for a micro-batch of `settings.max_tokens_per_micro_batch` tokens: during a step, or
/// before, while a second model is read as the reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub(super) struct Peak {
    /// Bytes on the compute device.
    pub(super) device: u64,
    /// Bytes in host memory, if the device is a GPU.
    pub(super) host: u64,
    /// A lower bound: more activations may be kept if there is room.
    pub(super) least: bool,
}

impl Peak {
    /// Peak of a step on a GPU or on the CPU.
    ///
    /// # Errors
    /// Recomputation by memory when the available memory is unknown.
    pub(super) fn of(
        config: &Config,
        (settings, lora): (&Settings, &Lora),
        reference: Reference,
        gpu: bool,
    ) -> Result<Self> {
        let mut options = settings.planned_options(gpu)?;
        options.follows = reference == Reference::Follows;
        options.anchored = reference == Reference::Frozen;
        if lora.use_peft {
            options.adapted = Some(Adapted::new(config, lora, settings.dtype)?);
        }
        let tokens = options.max_tokens;
        let (footprint, keep) =
            (Footprint::new(config, &options, tokens), options.keep(config, tokens));
        let step = footprint.bytes(keep);
        let device = match reference {
            Reference::Other => step.max(reading(config, settings, lora)? + footprint.pass()),
            Reference::None | Reference::Follows | Reference::Frozen => step,
        };
        Ok(Self {
            device,
            host: footprint.host_bytes(keep),
            least: options.recompute != settings.gradient_checkpointing,
        })
    }

    /// The peak as text, for people.
    pub(super) fn told(self, gpu: bool) -> String {
        let how = if self.least { "at least" } else { "about" };
        let whose = if gpu { " of the GPU's memory" } else { "" };
        let host = match self.host {
            0 => String::new(),
            host => format!(" and {} of the host's", bytes(host)),
        };
        format!("{how} {}{whose}{host} at the peak", bytes(self.device))
    }
}

/// Bytes of the initial model and the reference while the reference is read. Less if the two share a base.
fn reading(config: &Config, settings: &Settings, lora: &Lora) -> Result<u64> {
    let form = Lora { use_peft: true, ..lora.clone() };
    let held = Adapted::new(config, &form, settings.dtype)?.frozen;
    // The initial model is kept meanwhile: in its own format under adapters, else in f32.
    let start = if lora.use_peft { held } else { 4 * count(config) as u64 };
    Ok(start + held)
}

/// The directory or GGUF file that a stage's first model comes from: outputs of stages that have not run yet are traced
/// back to their origin.
pub(super) fn origin(plan: &Plan, model: &str) -> Option<PathBuf> {
    let mut model = model;
    for _ in 0..=plan.steps.len() {
        let path = Path::new(model);
        let is_gguf = path.extension().is_some_and(|ending| ending == "gguf");
        if is_gguf && path.is_file() {
            return Some(path.to_path_buf());
        }
        if let Some(found) = run_dir::model(path).ok().filter(|found| run_dir::is_model(found)) {
            return Some(found);
        }
        let step = plan
            .steps
            .iter()
            .find(|step| path.starts_with(plan.output_dir.join("stages").join(&step.id)))?;
        model = match &step.spec {
            Spec::Sft(spec) => &spec.model_name_or_path,
            Spec::Reward(spec) => &spec.model_name_or_path,
            Spec::Dpo(spec) => &spec.model_name_or_path,
            Spec::Average(spec) => spec.models.first()?,
            Spec::Synth(_) | Spec::Sample(_) | Spec::Select(_) | Spec::Eval(_) => return None,
        };
    }
    None
}

/// The configuration of a stage's initial model, if it is on this machine.
pub(super) fn config(plan: &Plan, model: &str) -> Option<Config> {
    Some(peek(&origin(plan, model)?).ok()?.0)
}

/// A human-readable number of bytes.
pub(super) fn bytes(count: u64) -> String {
    let gib = count as f64 / f64::from(1 << 30);
    if gib >= 1.0 { format!("{gib:.1} GiB") } else { format!("{:.0} MiB", gib * 1024.0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::packed::Quantization;
    use crate::model::params::tests::smollm2;
    use crate::train::Recompute;

    #[test]
    fn recomputation_and_smaller_micro_batches_lower_the_estimate() {
        let config = smollm2();
        let (all, full) = (Settings::default(), Lora::default());
        let less = Settings { gradient_checkpointing: Recompute::Block, ..Settings::default() };
        let least = Settings { max_tokens_per_micro_batch: 1024, ..less.clone() };
        let of = |settings: &Settings, lora: &Lora, reference| {
            Peak::of(&config, (settings, lora), reference, false).unwrap().device
        };
        let sizes = [&all, &less, &least].map(|settings| of(settings, &full, Reference::None));
        // A reference that follows is a second set of the trained parameters; a fixed one is in memory only before.
        let parameters = count(&config) as u64;
        assert_eq!(of(&least, &full, Reference::Follows), sizes[2] + 4 * parameters);
        assert_eq!(of(&least, &full, Reference::Frozen), sizes[2] + 4 * parameters);
        assert_eq!(of(&least, &full, Reference::Other), sizes[2]);
        let adapters = Lora { use_peft: true, ..Lora::default() };
        let of_adapters = |reference| of(&least, &adapters, reference);
        assert!(of_adapters(Reference::Follows) < of_adapters(Reference::None) + parameters / 4);
        assert!(of_adapters(Reference::Other) > 8 * parameters);
        // Four bits per frozen weight, and optimizer state only for adapters.
        let packed = Lora { use_peft: true, quantization: Quantization::Nf4, ..Lora::default() };
        let frozen = Lora { quantization: Quantization::None, ..packed.clone() };
        let [packed, frozen] = [packed, frozen].map(|lora| of(&least, &lora, Reference::None));
        assert!(packed + 350_000_000 < frozen && frozen + 1_000_000_000 < sizes[2]);
        assert!(sizes.is_sorted_by(|a, b| a > b), "{sizes:?}");
        assert!(sizes[2] > 16 * count(&config) as u64);

        let on_gpu = |settings: &Settings| {
            Peak::of(&config, (settings, &full), Reference::None, true).unwrap()
        };
        // An autograd graph keeps more, and the head's chunks are larger.
        assert!(on_gpu(&all).device > sizes[0] + 400_000_000 && on_gpu(&all).host == 0);
        let away = Settings { optimizer_offload: true, activation_offload: true, ..less.clone() };
        let (with, without) = (on_gpu(&away), on_gpu(&less));
        // Masters and moments are f32; the GPU keeps the weights. All block inputs but two, and the final norm's.
        let (p, input) = (count(&config) as u64, 4096 * 576 * 4);
        assert_eq!(without.device - with.device, 8 * p + 29 * input);
        assert_eq!(with.host, 12 * p + 30 * input);
        assert!(with.told(true).contains(" of the GPU's memory and "), "{}", with.told(true));
        // The GPU's memory size is unknown here.
        let auto = Settings { gradient_checkpointing: Recompute::Auto, ..less.clone() };
        assert_eq!(on_gpu(&auto), Peak { least: true, ..without });
        assert!(on_gpu(&auto).told(true).starts_with("at least "));
        // The CPU has nowhere else to put them.
        assert_eq!(of(&away, &full, Reference::None), of(&less, &full, Reference::None));
    }
}
