//! A training stage's initial model: a full checkpoint, or a base in the form it keeps while adapters are trained on
//! it.

use std::sync::Arc;

use candle_core::Device;

use super::adapt::Adapt;
use crate::error::Result;
use crate::model::bases::{Base, Bases, Form};
use crate::model::checkpoint::{Checkpoint, LoadOptions};
use crate::model::lora::Init;
use crate::model::lora::peft::BaseId;

/// The initial model of a training stage.
pub struct Start {
    /// Configuration, tokenizer, and the unpacked weights.
    pub checkpoint: Checkpoint,
    /// The base, if it is in its final form. While it is held here, a reference can share it.
    pub(super) base: Option<Arc<Base>>,
    /// What adapters of the model record, if that is known already.
    pub(super) id: Option<BaseId>,
}

impl From<Checkpoint> for Start {
    fn from(checkpoint: Checkpoint) -> Self {
        Self { checkpoint, base: None, id: None }
    }
}

impl Adapt<'_> {
    /// Memory form of the base.
    pub fn form(&self, device: &Device) -> Form {
        Form {
            device: device.clone(),
            dtype: self.dtype,
            quantization: self.lora.quantization,
            in_full: self.lora.lora_modules_to_save.clone(),
        }
    }

    /// Loads the initial model. If adapters are trained, each tensor is rounded or packed before the next is read, so
    /// that the model is never in memory in f32; only PiSSA computes its factors from the full weights.
    ///
    /// # Errors
    /// As [`Checkpoint::load`]; a model that cannot be quantized as requested.
    pub fn start(&self, bases: &Bases, device: &Device) -> Result<Start> {
        if !self.lora.use_peft {
            return Ok(Checkpoint::load(self.base, device, &LoadOptions::default())?.into());
        }
        if self.lora.init_lora_weights == Init::Pissa {
            let (checkpoint, id) = Checkpoint::load_with_id(self.base, device)?;
            return Ok(Start { id: Some(id), ..Start::from(checkpoint) });
        }
        let base = bases.base(self.base, &self.form(device))?;
        Ok(Start { checkpoint: base.checkpoint(), base: Some(base), id: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Precision;
    use crate::model::lora::Lora;
    use crate::model::packed::Quantization;

    #[test]
    fn reference_shares_the_base_the_stage_starts_from() {
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
