//! A model whose weights move: named parameters, and a transformer that reads them.

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::error::{Context, Error, Result};
use crate::model::transformer::Transformer;
use crate::model::{Config, Precision, Weights};
use crate::optim::Param;

/// A model in training. The weights are f32 masters; the transformer shares their storage, or that of their bf16
/// copies.
#[derive(Debug)]
pub struct Learner {
    params: BTreeMap<String, Param>,
    model: Transformer,
}

impl Learner {
    /// Takes a copy of `weights`, all of them trained, computing in f32.
    ///
    /// # Errors
    /// Names a tensor that is missing.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        Self::with(config, weights.clone(), Precision::F32, |_| false)
    }

    /// Takes a copy of `weights`, one tensor after the other, so that the given ones are freed on the way where nobody
    /// else holds them. Matrices are computed with in `dtype`. Parameters whose name is `frozen` keep their bits and cost
    /// no gradient work.
    ///
    /// # Errors
    /// Names a tensor that is missing.
    pub fn with(
        config: &Config,
        weights: Weights,
        dtype: Precision,
        frozen: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let mut trained = BTreeMap::new();
        let mut tensors = Weights::new();
        for (name, tensor) in weights {
            dtype.check_device(tensor.device())?;
            let dtype = dtype.of(&name, &tensor);
            if frozen(&name) {
                tensors.insert(name, tensor.detach().to_dtype(dtype)?);
                continue;
            }
            let param = Param::computed_in(&tensor, dtype)?;
            tensors.insert(name.clone(), param.computed().clone());
            trained.insert(name, param);
        }
        Ok(Self { params: trained, model: Transformer::new(config, &tensors)? })
    }

    /// The model as it is now.
    pub fn model(&self) -> &Transformer {
        &self.model
    }

    /// Bytes of trained masters and their copies.
    pub fn bytes(&self) -> u64 {
        let size = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        let bytes = |param: &Param| {
            let copy = param.copy.as_ref().map_or(0, |copy| size(copy));
            (size(&param.master) + copy) as u64
        };
        self.params.values().map(bytes).sum()
    }

    /// Trained parameters, in name order.
    pub fn params(&self) -> &BTreeMap<String, Param> {
        &self.params
    }

    /// Trained masters as plain tensors that share storage with the variables.
    pub fn weights(&self) -> Weights {
        let master = |param: &Param| param.master.as_tensor().detach();
        self.params.iter().map(|(name, param)| (name.clone(), master(param))).collect()
    }

    /// Overwrites trained weights.
    ///
    /// # Errors
    /// Names a tensor that is missing or has another shape.
    pub fn set(&self, weights: &Weights) -> Result<()> {
        for (name, param) in &self.params {
            let tensor = weights
                .get(name)
                .ok_or_else(|| Error::run("missing from the saved weights").at(name))?;
            // A checkpoint of this very model may alias the variable's storage.
            param.set(&tensor.copy()?).at(name)?;
        }
        Ok(())
    }
}
