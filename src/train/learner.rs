//! A trainable model: named parameters, and a transformer that reads them.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::error::{Context, Error, Result};
use crate::model::checkpoint::load_weights;
use crate::model::lora::{A, Adapter, Attached, B, Dora, Dropout, MAGNITUDE, parameter, peft};
use crate::model::transformer::Transformer;
use crate::model::{Config, Precision, Tensors, Weights, params};
use crate::ops::cuda::device::out_of_memory;
use crate::optim::Param;
use crate::train::memory::Adapted;

/// How a model in training is stored.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// Compute type of the matrices.
    pub dtype: Precision,
    /// Masters and optimizer moments live in host memory.
    pub offloaded: bool,
}

impl From<Precision> for Held {
    fn from(dtype: Precision) -> Self {
        Self { dtype, offloaded: false }
    }
}

impl Held {
    fn param(self, start: &Tensor, dtype: DType) -> Result<Param> {
        let param = Param::computed_in(start, dtype)?;
        if self.offloaded { param.offloaded() } else { Ok(param) }
    }

    /// An error from copying weights. If a GPU is full, the message says what was to be stored there.
    fn unfit(self, error: Error, config: &Config) -> Error {
        let count = params::count(config) as u64;
        let copies = if self.dtype == Precision::F32 { 0 } else { 2 * count };
        let masters = if self.offloaded { 0 } else { 4 * count };
        let parts = [("masters in f32", masters), ("copies in bf16", copies)];
        let ways = "optimizer_offload = true, use_peft = true, or a smaller model";
        out_of_memory(error, "while a model was made ready to train", parts, ways)
    }
}

/// A model in training. The weights are f32 masters; the transformer shares their storage or that of their bf16 copies.
#[derive(Debug)]
pub struct Learner {
    params: BTreeMap<String, Param>,
    tensors: Tensors,
    model: Transformer,
    /// Dropout rate on the adapters' inputs in training.
    dropout: f64,
}

impl Learner {
    /// Copies `weights`, all of them trained, computing in f32.
    ///
    /// # Errors
    /// Names a missing tensor.
    pub fn new(config: &Config, weights: &Weights) -> Result<Self> {
        Self::with(config, weights.clone(), Precision::F32, |_| false)
    }

    /// Copies `weights` one tensor at a time, so that the originals are freed along the way unless something else holds
    /// them. Parameters whose name is `frozen` keep their bits and cost no gradient work.
    ///
    /// # Errors
    /// Names a missing tensor.
    pub fn with(
        config: &Config,
        weights: Weights,
        held: impl Into<Held>,
        frozen: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        Self::of(config, Tensors::dense(weights), held.into(), frozen)
    }

    fn of(
        config: &Config,
        start: Tensors,
        held: Held,
        frozen: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let mut params = BTreeMap::new();
        let mut tensors = Tensors { weights: Weights::new(), ..start };
        for (name, tensor) in start.weights {
            held.dtype.check_device(tensor.device())?;
            let dtype = held.dtype.of(&name, &tensor);
            if frozen(&name) {
                tensors.weights.insert(name, tensor.detach().to_dtype(dtype)?);
                continue;
            }
            let param = held.param(&tensor, dtype).map_err(|error| held.unfit(error, config))?;
            tensors.weights.insert(name.clone(), param.computed().clone());
            params.insert(name, param);
        }
        Ok(Self { params, model: Transformer::of(config, &tensors)?, tensors, dropout: 0.0 })
    }

    /// Trains adapters on a model whose own parameters are frozen, except those that `trained` names.
    ///
    /// # Errors
    /// Names a missing tensor.
    pub fn adapted(
        config: &Config,
        start: Tensors,
        attached: &Attached,
        held: impl Into<Held>,
        trained: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let held = held.into();
        let dtype = held.dtype.dtype();
        let mut learner = Self::of(config, start, held, |name| !trained(name))?;
        for (module, &scale) in &attached.scales {
            let mut param = |part: &str, dtype: DType| -> Result<Tensor> {
                let name = parameter(module, part);
                let start = attached.factors.get(&name);
                let start =
                    start.ok_or_else(|| Error::run("missing from the adapter").at(&name))?;
                let mut param = held.param(start, dtype)?;
                if part == B && attached.lr_ratio > 0.0 {
                    param.lr_scale = attached.lr_ratio;
                }
                let computed = param.computed().clone();
                learner.params.insert(name, param);
                Ok(computed)
            };
            let (a, b) = (param(A, dtype)?, param(B, dtype)?);
            let dora = if attached.factors.contains_key(&parameter(module, MAGNITUDE)) {
                let magnitude = param(MAGNITUDE, DType::F32)?;
                Some(Dora { magnitude, squares: learner.tensors.matrix(module)?.row_squares()? })
            } else {
                None
            };
            let adapter = Adapter { module: module.clone(), a, b, scale, dora };
            learner.tensors.adapters.insert(module.clone(), adapter);
        }
        learner.dropout = attached.dropout;
        learner.model = Transformer::of(config, &learner.tensors)?;
        // Place them now, so that a query for free memory already accounts for them.
        for packed in learner.tensors.packed.values() {
            packed.place(learner.model.device())?;
        }
        Ok(learner)
    }

    /// Dropout for the step with 0-based index `step`; `None` at rate 0.
    pub fn dropout(&self, seed: u64, step: usize) -> Option<Dropout> {
        (self.dropout > 0.0).then_some(Dropout { rate: self.dropout, seed, step })
    }

    /// The same model with its own copy of the trained parameters; frozen ones are shared.
    ///
    /// # Errors
    /// A device error.
    pub fn twin(&self) -> Result<Self> {
        let params = self.params.iter().map(|(name, param)| Ok((name.clone(), param.twin()?)));
        let params: BTreeMap<String, Param> = params.collect::<Result<_>>()?;
        let own = |name: &str, tensor: &Tensor| match params.get(name) {
            Some(param) => param.computed().clone(),
            None => tensor.clone(),
        };
        let mut tensors = self.tensors.clone();
        tensors.weights.iter_mut().for_each(|(name, tensor)| *tensor = own(name, tensor));
        for (module, adapter) in &mut tensors.adapters {
            adapter.a = own(&parameter(module, A), &adapter.a);
            adapter.b = own(&parameter(module, B), &adapter.b);
            if let Some(dora) = &mut adapter.dora {
                dora.magnitude = own(&parameter(module, MAGNITUDE), &dora.magnitude);
            }
        }
        let model = Transformer::of(self.model.config(), &tensors)?;
        Ok(Self { params, tensors, model, dropout: self.dropout })
    }

    /// All tensors of the model.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// Reads the trained parameters from a directory: an adapter's, or a full checkpoint's.
    ///
    /// # Errors
    /// Files that are missing, damaged, or from another model.
    pub fn read(&self, dir: &Path) -> Result<Weights> {
        if self.tensors.adapters.is_empty() {
            return load_weights(dir, self.model.config(), self.model.device());
        }
        Ok(peft::read(dir, self.model.device())?.into_trained())
    }

    /// The current model.
    pub fn model(&self) -> &Transformer {
        &self.model
    }

    /// Whether the masters are in host memory, see [`Held`].
    pub fn is_offloaded(&self) -> bool {
        self.params.values().any(|param| param.offloaded)
    }

    /// Whether any trained parameter is computed in bf16.
    pub fn rounds(&self) -> bool {
        self.params.values().any(|param| param.computed().dtype() == DType::BF16)
    }

    /// Rounds all bf16 copies to nearest.
    ///
    /// # Errors
    /// A device error.
    pub fn round_to_nearest(&self) -> Result<()> {
        self.params.values().try_for_each(|param| param.send(&param.master))
    }

    /// The device of the masters and the optimizer moments.
    pub fn master_device(&self) -> &Device {
        self.params.values().next().map_or(self.model.device(), |param| param.master.device())
    }

    /// The compute type.
    pub fn dtype(&self) -> Precision {
        match self.model.dtype() {
            DType::BF16 => Precision::Bf16,
            _ => Precision::F32,
        }
    }

    /// Bytes on the model's device: trained masters, their copies, and frozen weights.
    pub fn bytes(&self) -> u64 {
        self.trained_bytes() + self.frozen_bytes()
    }

    /// Bytes on the model's device: trained masters and their copies.
    pub fn trained_bytes(&self) -> u64 {
        let bytes = |param: &Param| {
            let copy = param.copy.as_ref().map_or(0, |copy| size(copy));
            if param.offloaded { copy } else { size(&param.master) + copy }
        };
        self.params.values().map(bytes).sum()
    }

    fn frozen_bytes(&self) -> u64 {
        let Tensors { weights, packed, .. } = &self.tensors;
        let frozen = weights.values().filter(|tensor| !tensor.is_variable());
        let packed: usize = packed.values().map(|packed| packed.bytes()).sum();
        frozen.map(size).sum::<u64>() + packed as u64
    }

    /// Sizes, if adapters are trained.
    pub fn adapted_sizes(&self) -> Option<Adapted> {
        let trained = self.params.values().map(|param| param.master.elem_count() as u64).sum();
        let head = self.model.head().is_variable();
        let element = self.model.dtype().size_in_bytes();
        let dense = self.tensors.packed.values().map(|packed| {
            let (outer, inner) = packed.shape();
            (outer * inner * element) as u64
        });
        let frozen = self.frozen_bytes() + dense.max().unwrap_or(0);
        let sizes = Adapted { trained, frozen, head };
        (!self.tensors.adapters.is_empty()).then_some(sizes)
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
    /// Names a tensor that is missing or has the wrong shape.
    pub fn set(&self, weights: &Weights) -> Result<()> {
        for (name, param) in &self.params {
            let tensor = weights
                .get(name)
                .ok_or_else(|| Error::run("missing from the saved weights").at(name))?;
            // A checkpoint of this same model may alias the variable's storage.
            param.set(&tensor.copy()?).at(name)?;
        }
        Ok(())
    }
}

fn size(tensor: &Tensor) -> u64 {
    (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64
}
