//! Seeded random initialisation of a model from its configuration.

use candle_core::{Device, Tensor};

use super::config::Config;
use super::{Weights, params};
use crate::error::Result;
use crate::rng::Stream;

/// Random weights as Hugging Face initialises them: matrices normal with deviation
/// `initializer_range`, norms one, biases zero. Equal seeds give equal bits on every machine.
///
/// # Errors
/// A device that is out of memory.
pub fn random(config: &Config, seed: u64, device: &Device) -> Result<Weights> {
    params::shapes(config)
        .into_iter()
        .map(|(name, shape)| {
            let tensor = tensor(config, &name, &shape, seed, device)?;
            Ok((name, tensor))
        })
        .collect()
}

/// One tensor of [`random`]. Each has a stream of its own, named after it: a model with one block
/// more has the same numbers in all the others.
pub(super) fn tensor(
    config: &Config,
    name: &str,
    shape: &[usize],
    seed: u64,
    device: &Device,
) -> Result<Tensor> {
    let count = shape.iter().product();
    let values = if name.ends_with("norm.weight") {
        vec![1.0; count]
    } else if name.ends_with(".bias") {
        vec![0.0; count]
    } else {
        let stream = Stream::new(seed, &format!("init/{name}"));
        stream.normal(0, count, config.initializer_range as f32)
    };
    Ok(Tensor::from_vec(values, shape, device)?)
}
