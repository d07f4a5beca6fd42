//! What a training stage begins with: a whole checkpoint, or a base that is held as it will stay while adapters are
//! trained beside it.

use std::sync::Arc;

use candle_core::Device;

use super::adapt::Adapt;
use crate::error::Result;
use crate::model::bases::{Base, Bases, Form};
use crate::model::checkpoint::{Checkpoint, LoadOptions};
use crate::model::lora::Init;

/// A training stage's start.
pub struct Start {
    /// Configuration, tokenizer, and the weights that are not packed.
    pub checkpoint: Checkpoint,
    /// The base, where it has the form in which it stays. While it is held here, a reference beside it shares it.
    pub(super) base: Option<Arc<Base>>,
}

impl From<Checkpoint> for Start {
    fn from(checkpoint: Checkpoint) -> Self {
        Self { checkpoint, base: None }
    }
}

impl Adapt<'_> {
    /// How the base lies in memory.
    pub fn form(&self, device: &Device) -> Form {
        Form {
            device: device.clone(),
            dtype: self.dtype,
            quantization: self.lora.quantization,
            in_full: self.lora.lora_modules_to_save.clone(),
        }
    }

    /// Loads the start. Where adapters are trained, each tensor is rounded or packed before the next is read, so that the
    /// model never lies in memory in f32; PiSSA alone takes its factors from the whole.
    ///
    /// # Errors
    /// All of [`Checkpoint::load`], and a model that cannot be packed as asked.
    pub fn start(&self, bases: &Bases, device: &Device) -> Result<Start> {
        if !self.lora.use_peft || self.lora.init_lora_weights == Init::Pissa {
            return Ok(Checkpoint::load(self.base, device, &LoadOptions::default())?.into());
        }
        let base = bases.base(self.base, &self.form(device))?;
        Ok(Start { checkpoint: base.checkpoint(), base: Some(base) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Precision;
    use crate::model::lora::Lora;
    use crate::model::packed::Quantization;

    #[test]
    fn a_reference_shares_the_base_that_a_stage_begins_with() {
        for quantization in [Quantization::None, Quantization::Nf4] {
            let lora = Lora { use_peft: true, quantization, ..Lora::default() };
            let base = "data/tiny/student";
            let adapt =
                Adapt { lora: &lora, base, dtype: Precision::Bf16, offloaded: false, seed: 1 };
            let bases = Bases::default();
            let start = adapt.start(&bases, &Device::Cpu).unwrap();
            let reference = bases.model(base, &adapt.form(&Device::Cpu)).unwrap();
            assert_eq!(bases.reads(), 1);
            let trainee = adapt.trainee(start).unwrap();
            let tensors = trainee.learner.tensors();
            for (name, tensor) in &reference.tensors.weights {
                assert_eq!(tensors.weights[name].id(), tensor.id(), "{name}");
            }
            for (name, packed) in &reference.tensors.packed {
                assert!(Arc::ptr_eq(&tensors.packed[name], packed), "{name}");
            }
        }
    }
}
