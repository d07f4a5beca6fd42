//! A model whose weights move: named variables, and a transformer that reads them.

use std::collections::BTreeMap;

use candle_core::Var;

use crate::error::Result;
use crate::model::transformer::Transformer;
use crate::model::{Config, Weights};

/// A model in training. The weights are f32 masters; the transformer shares their storage.
#[derive(Debug)]
pub struct Learner {
    params: BTreeMap<String, Var>,
    model: Transformer,
}

impl Learner {
    /// Takes a copy of `weights`, all of them trained.
    ///
    /// # Errors
    /// Names a tensor that is missing.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        Self::with_frozen(config, weights, |_| false)
    }

    /// Takes a copy of `weights`; those whose name is `frozen` keep their bits and cost no gradient work.
    pub fn with_frozen(
        config: &Config,
        weights: &Weights,
        frozen: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let mut params = BTreeMap::new();
        let mut tensors = Weights::new();
        for (name, tensor) in weights {
            if frozen(name) {
                tensors.insert(name.clone(), tensor.detach());
                continue;
            }
            let var = Var::from_tensor(tensor)?;
            tensors.insert(name.clone(), var.as_tensor().clone());
            params.insert(name.clone(), var);
        }
        Ok(Self { params, model: Transformer::new(config, &tensors)? })
    }

    /// The model as it is now.
    pub fn model(&self) -> &Transformer {
        &self.model
    }

    /// Trained variables, in name order.
    pub fn params(&self) -> &BTreeMap<String, Var> {
        &self.params
    }

    /// Trained weights as plain tensors that share storage with the variables.
    pub fn weights(&self) -> Weights {
        self.params.iter().map(|(name, var)| (name.clone(), var.as_tensor().detach())).collect()
    }

    /// Overwrites trained weights.
    ///
    /// # Errors
    /// Names a tensor that is missing or has another shape.
    pub fn set(&self, weights: &Weights) -> Result<()> {
        use crate::error::{Context, Error};
        for (name, var) in &self.params {
            let tensor = weights
                .get(name)
                .ok_or_else(|| Error::run("missing from the saved weights").at(name))?;
            // A checkpoint of this very model may alias the variable's storage.
            var.set(&tensor.copy()?).at(name)?;
        }
        Ok(())
    }
}
