//! The names and shapes of a model's parameters, as Hugging Face stores them.

use std::collections::BTreeMap;

use super::Weights;
use super::config::{Architecture, Config};
use crate::error::{Error, Result, did_you_mean};

/// The embedding, `[V, D]`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The norm after the last block, `[D]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// The vocabulary projection of an untied language model, `[V, D]`.
pub const HEAD: &str = "lm_head.weight";
/// The score head of a reward model, `[L, D]`.
pub const SCORE: &str = "score.weight";
/// The bias of a process reward model's head, `[L]`.
pub const SCORE_BIAS: &str = "score.bias";

/// All parameters of the model with their shapes. A tied head is not a separate parameter.
///
/// Projections are stored as `[out, in]`.
pub fn shapes(config: &Config) -> BTreeMap<String, Vec<usize>> {
    let hidden = config.hidden_size;
    let mut shapes = BTreeMap::new();
    let mut put = |name: &str, shape: &[usize]| {
        shapes.insert(name.to_owned(), shape.to_vec());
    };
    put(EMBEDDING, &[config.vocab_size, hidden]);
    put(FINAL_NORM, &[hidden]);
    match config.architecture {
        Architecture::CausalLm if !config.tie_word_embeddings => {
            put(HEAD, &[config.vocab_size, hidden]);
        }
        Architecture::CausalLm => {}
        Architecture::SequenceClassification => put(SCORE, &[config.labels.len(), hidden]),
        Architecture::TokenClassification => {
            put(SCORE, &[config.labels.len(), hidden]);
            put(SCORE_BIAS, &[config.labels.len()]);
        }
    }
    for layer in 0..config.num_hidden_layers {
        for (name, shape) in layer_shapes(config) {
            put(&format!("model.layers.{layer}.{name}"), &shape);
        }
    }
    shapes
}

fn layer_shapes(config: &Config) -> Vec<(&'static str, Vec<usize>)> {
    let hidden = config.hidden_size;
    let queries = config.num_attention_heads * config.head_dim;
    let keys = config.num_key_value_heads * config.head_dim;
    let inner = config.intermediate_size;
    let mut shapes = vec![
        ("input_layernorm.weight", vec![hidden]),
        ("self_attn.q_proj.weight", vec![queries, hidden]),
        ("self_attn.k_proj.weight", vec![keys, hidden]),
        ("self_attn.v_proj.weight", vec![keys, hidden]),
        ("self_attn.o_proj.weight", vec![hidden, queries]),
        ("post_attention_layernorm.weight", vec![hidden]),
        ("mlp.gate_proj.weight", vec![inner, hidden]),
        ("mlp.up_proj.weight", vec![inner, hidden]),
        ("mlp.down_proj.weight", vec![hidden, inner]),
    ];
    if config.qkv_bias {
        shapes.push(("self_attn.q_proj.bias", vec![queries]));
        shapes.push(("self_attn.k_proj.bias", vec![keys]));
        shapes.push(("self_attn.v_proj.bias", vec![keys]));
    }
    if config.output_bias {
        shapes.push(("self_attn.o_proj.bias", vec![hidden]));
    }
    shapes
}

/// Number of trainable values in a model of this shape.
pub fn count(config: &Config) -> usize {
    shapes(config).values().map(|shape| shape.iter().product::<usize>()).sum()
}

/// Checks that the weights are exactly the configuration's parameters.
///
/// # Errors
/// Names the first missing, unexpected or wrongly shaped tensor, with the number of further ones.
pub fn check(config: &Config, weights: &Weights) -> Result<()> {
    check_shapes(config, weights.iter().map(|(name, tensor)| (name.as_str(), tensor.dims())))
}

/// As [`check`], from names and shapes alone.
pub(super) fn check_shapes<'a>(
    config: &Config,
    found: impl Iterator<Item = (&'a str, &'a [usize])>,
) -> Result<()> {
    let found: BTreeMap<&str, &[usize]> = found.collect();
    let expected = shapes(config);
    let unexpected: Vec<&str> =
        found.keys().copied().filter(|name| !expected.contains_key(*name)).collect();
    let missing: Vec<&str> =
        expected.keys().map(String::as_str).filter(|name| !found.contains_key(name)).collect();
    if let Some(first) = missing.first() {
        let error = Error::run(format!("missing tensor `{first}`{}", others(missing.len())));
        return Err(match did_you_mean(first, unexpected.iter().copied()) {
            Some(near) => error.hint(format!("the file has `{near}`, which is not expected")),
            None => error.hint("config.json asks for it; is the file of another model?"),
        });
    }
    if let Some(first) = unexpected.first() {
        return Err(Error::run(format!("unexpected tensor `{first}`{}", others(unexpected.len())))
            .hint("config.json does not ask for it; is the file of another model?"));
    }
    for (name, shape) in &expected {
        if found.get(name.as_str()).is_some_and(|found| found != shape) {
            let found = found.get(name.as_str()).copied().unwrap_or_default();
            return Err(wrong_shape(name, found, shape));
        }
    }
    Ok(())
}

/// Error for a tensor with a shape other than the configuration's.
pub(super) fn wrong_shape(name: &str, found: &[usize], expected: &[usize]) -> Error {
    Error::run(format!("tensor `{name}` has shape {found:?}, expected {expected:?}"))
        .hint("config.json gives the expected shape; are both of the same model?")
}

fn others(count: usize) -> String {
    if count > 1 { format!(" (and {} more)", count - 1) } else { String::new() }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A Llama with this hidden size, number of layers, MLP size and number of query heads; other values are SmolLM2's
    /// if the head is tied, Llama 3's if not.
    pub(crate) fn llama([h, layers, f, heads]: [usize; 4], tied: bool) -> Config {
        let (shared, vocab) = if tied { (3, 49152) } else { (8, 128_256) };
        Config::from_json(&format!(
            r#"{{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": {h},
            "num_hidden_layers": {layers}, "intermediate_size": {f}, "num_attention_heads": {heads},
            "num_key_value_heads": {shared}, "vocab_size": {vocab}, "tie_word_embeddings": {tied}, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192, "rope_theta": 10000.0, "hidden_act": "silu"}}"#,
        ))
        .unwrap()
    }

    /// SmolLM2-135M's shape.
    pub(crate) fn smollm2() -> Config {
        llama([576, 30, 1536, 9], true)
    }

    #[test]
    fn parameter_counts_equal_the_published_ones() {
        assert_eq!(count(&llama([4096, 32, 14336, 32], false)), 8_030_261_248);
        assert_eq!(count(&llama([8192, 80, 28672, 64], false)), 70_553_706_496);
        assert_eq!(count(&smollm2()), 134_515_008);
    }
}
