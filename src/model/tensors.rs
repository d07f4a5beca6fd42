//! All tensors of a transformer.

use candle_core::{DType, Device, DeviceLocation, Tensor};

use super::lora::{self, Adapter, Adapters};
use super::matrix::Matrix;
use super::packed::PackedWeights;
use super::{Precision, Weights};
use crate::error::{Error, Result};
use crate::ops::unpack::Unpack;

/// Dense weights, quantised projections, and adapters. Cheap to clone: everything is shared.
#[derive(Clone, Debug, Default)]
pub struct Tensors {
    /// Every unquantised parameter.
    pub weights: Weights,
    /// Quantised frozen projections.
    pub packed: PackedWeights,
    /// Adapters of projections.
    pub adapters: Adapters,
}

impl Tensors {
    /// Dense weights only.
    pub fn dense(weights: Weights) -> Self {
        Self { weights, ..Self::default() }
    }

    /// The same storage without variables, so that computations keep no graph.
    #[must_use]
    pub fn detached(&self) -> Self {
        let mut tensors = self.clone();
        tensors.trainable().for_each(|tensor| *tensor = tensor.detach());
        tensors
    }

    /// The same values without variables: those in training are copied, all others shared.
    ///
    /// # Errors
    /// A device error.
    pub fn frozen_copy(&self) -> Result<Self> {
        let mut tensors = self.clone();
        for tensor in tensors.trainable() {
            // A frozen one keeps its identity.
            if tensor.is_variable() {
                *tensor = tensor.copy()?.detach();
            }
        }
        Ok(tensors)
    }

    /// What may be a variable: dense weights and the adapters' parts.
    fn trainable(&mut self) -> impl Iterator<Item = &mut Tensor> {
        let adapters = self.adapters.values_mut().flat_map(|Adapter { a, b, dora, .. }| {
            [a, b].into_iter().chain(dora.as_mut().map(|dora| &mut dora.magnitude))
        });
        self.weights.values_mut().chain(adapters)
    }

    /// A dense weight.
    ///
    /// # Errors
    /// Names the missing tensor.
    pub(super) fn get(&self, name: &str) -> Result<Tensor> {
        let tensor = self.weights.get(name).cloned();
        tensor.ok_or_else(|| Error::run("missing from the weights").at(name))
    }

    /// # Errors
    /// Names two tensors on different devices.
    pub(super) fn check_one_device(&self) -> Result<()> {
        let adapters = self.adapters.values().flat_map(Adapter::tensors);
        let place = |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.device().location());
        one_place(
            self.weights
                .iter()
                .map(place)
                .chain(adapters.map(|(name, tensor)| place((&name, tensor)))),
        )
    }

    /// A projection's weight, by module name.
    ///
    /// # Errors
    /// Names the missing tensor.
    pub fn matrix(&self, module: &str) -> Result<Matrix> {
        let name = format!("{module}.weight");
        match self.packed.get(&name) {
            Some(packed) => Ok(Matrix::Packed(packed.clone())),
            None => Ok(Matrix::Dense(self.get(&name)?)),
        }
    }

    /// The equivalent dense model in f32: quantised projections dequantised, adapters merged.
    ///
    /// # Errors
    /// A device error; an adapter that does not fit.
    pub fn merged(&self) -> Result<Weights> {
        self.merged_in(Precision::F32)
    }

    /// As [`merged`](Self::merged), then rounded tensor by tensor to the [compute dtype](Precision::of): at most one
    /// tensor is f32 at a time.
    ///
    /// # Errors
    /// As [`merged`](Self::merged).
    pub fn merged_in(&self, dtype: Precision) -> Result<Weights> {
        let device = self.weights.values().next().map_or(Device::Cpu, |x| x.device().clone());
        let dense =
            self.weights.iter().map(|(name, tensor)| (name, tensor.detach().to_dtype(DType::F32)));
        let packed =
            self.packed.iter().map(|(name, packed)| (name, packed.tensor(&device, DType::F32)));
        let mut left: Adapters = self.adapters.clone();
        let mut weights = Weights::new();
        for (name, tensor) in dense.chain(packed) {
            let mut tensor = tensor?;
            if let Some(adapter) =
                name.strip_suffix(".weight").and_then(|module| left.remove(module))
            {
                tensor = adapter.merged(&tensor)?;
            }
            weights.insert(name.clone(), tensor.to_dtype(dtype.of(name, &tensor))?);
        }
        match left.keys().next() {
            Some(module) => Err(lora::unknown(module)),
            None => Ok(weights),
        }
    }

    /// Trained tensors whose names begin with `prefix`, in name order.
    pub(super) fn trained(&self, prefix: &str) -> Vec<(String, Tensor)> {
        let weights = self.weights.range(prefix.to_owned()..);
        let weights = weights
            .take_while(|(name, _)| name.starts_with(prefix))
            .map(|(name, tensor)| (name.clone(), tensor));
        let adapters = self.adapters.values().filter(|adapter| adapter.module.starts_with(prefix));
        let all = weights.chain(adapters.flat_map(Adapter::tensors));
        let mut trained: Vec<(String, Tensor)> = all
            .filter(|(_, tensor)| tensor.is_variable())
            .map(|(name, tensor)| (name, tensor.clone()))
            .collect();
        trained.sort_by(|(a, _), (b, _)| a.cmp(b));
        trained
    }
}

/// # Errors
/// Names the first item on a device other than the first one's.
fn one_place(mut things: impl Iterator<Item = (String, DeviceLocation)>) -> Result<()> {
    let Some((first, place)) = things.next() else { return Ok(()) };
    let Some((other, elsewhere)) = things.find(|(_, found)| *found != place) else { return Ok(()) };
    let name = |place| match place {
        DeviceLocation::Cpu => "cpu".to_owned(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    };
    Err(Error::run(format!("{first} is on {}, {other} on {}", name(place), name(elsewhere)))
        .hint("a model lies on one device: load all of it with the same `device`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_of_devices_is_refused() {
        let cpu = |name: &str| (name.to_owned(), DeviceLocation::Cpu);
        let gpu = |name: &str, gpu_id| (name.to_owned(), DeviceLocation::Cuda { gpu_id });
        assert!(one_place([cpu("a"), cpu("b")].into_iter()).is_ok());
        assert!(one_place(std::iter::empty()).is_ok());
        let error = one_place([cpu("a"), cpu("b"), gpu("c", 1)].into_iter()).unwrap_err();
        assert_eq!(error.to_string(), "a is on cpu, c on cuda:1");
        assert!(one_place([gpu("a", 0), gpu("b", 1)].into_iter()).is_err());
    }
}
