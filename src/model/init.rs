//! Seeded random initialisation of a model from its configuration.

use candle_core::{Device, Tensor};

use super::config::Config;
use super::{Weights, params};
use crate::error::Result;
use crate::rng::Stream;

/// Random weights initialised as in Hugging Face: matrices normal with standard deviation `initializer_range`, norms
/// one, biases zero. Equal seeds give bit-identical weights on every machine.
///
/// # Errors
/// Out of device memory.
pub fn random(config: &Config, seed: u64, device: &Device) -> Result<Weights> {
    params::shapes(config)
        .into_iter()
        .map(|(name, shape)| {
            let tensor = tensor(config, &name, &shape, seed, device)?;
            Ok((name, tensor))
        })
        .collect()
}

/// One tensor of [`random`]. Each has its own stream, keyed by its name, so a model with one more block has the same
/// values in all others.
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
    } else if name.rsplit('.').next() == Some("bias") {
        vec![0.0; count]
    } else {
        let stream = Stream::new(seed, &format!("init/{name}"));
        stream.normal(0, count, config.initializer_range as f32)
    };
    Ok(Tensor::from_vec(values, shape, device)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(layers: usize) -> Config {
        let text = serde_json::json!({
            "model_type": "qwen2", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "initializer_range": 0.05,
        });
        Config::from_json(&text.to_string()).unwrap()
    }

    fn values(weights: &Weights, name: &str) -> Vec<f32> {
        weights[name].flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn matrices_are_normal_norms_one_and_biases_zero() {
        let config = config(2);
        let weights = random(&config, 7, &Device::Cpu).unwrap();
        params::check(&config, &weights).unwrap();
        let embedding = values(&weights, params::EMBEDDING);
        let mean_square = embedding.iter().map(|x| x * x).sum::<f32>() / embedding.len() as f32;
        assert!((mean_square.sqrt() - 0.05).abs() < 0.003, "{}", mean_square.sqrt());
        assert!(values(&weights, params::FINAL_NORM).iter().all(|x| x.to_bits() == 1f32.to_bits()));
        let bias = values(&weights, "model.layers.0.self_attn.q_proj.bias");
        assert!(bias.iter().all(|x| x.to_bits() == 0));
    }

    #[test]
    fn initial_weights_depend_on_the_seed_and_the_tensor_name() {
        let two = random(&config(2), 7, &Device::Cpu).unwrap();
        let three = random(&config(3), 7, &Device::Cpu).unwrap();
        let other = random(&config(2), 8, &Device::Cpu).unwrap();
        let name = "model.layers.1.mlp.up_proj.weight";
        assert_eq!(values(&two, name), values(&three, name));
        assert_ne!(values(&two, name), values(&other, name));
        assert_ne!(values(&two, name), values(&two, "model.layers.0.mlp.up_proj.weight"));
    }
}
