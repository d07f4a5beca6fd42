//! Steps and memory of a training stage, from the configuration and the data alone: no weights are read.

use std::path::{Path, PathBuf};

use crate::model::checkpoint::peek;
use crate::model::config::Config;
use crate::recipe::{Plan, Spec};
use crate::train::Settings;

/// Parameters of a causal model with this configuration.
///
/// A layer is `2h² + 2h·kv·hd + 3h·f + 2h`; around the layers are the embedding, the head where it is not tied, and
/// the last norm.
pub(super) fn parameters(config: &Config) -> u64 {
    let (h, f) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    );
    let biases = if config.qkv_bias { q + 2 * kv } else { 0 };
    let layer = 2 * h * q + 2 * h * kv + 3 * h * f + 2 * h + biases;
    let tables = if config.tie_word_embeddings { 1 } else { 2 };
    (config.num_hidden_layers * layer + tables * config.vocab_size * h + h) as u64
}

/// Bytes that a training step holds at its peak, in f32: weights, gradients and both moments, then what the backward
/// pass needs of one micro-batch of `settings.max_tokens_per_micro_batch` tokens.
pub(super) fn training_bytes(config: &Config, settings: &Settings) -> u64 {
    const ELEMENT: u64 = 4;
    /// Logits that exist at once in the chunked head.
    const HEAD: u64 = 12 << 20;
    let tokens = settings.max_tokens_per_micro_batch as u64;
    let (h, f) = (config.hidden_size as u64, config.intermediate_size as u64);
    let q = (config.num_attention_heads * config.head_dim) as u64;
    let kv = (config.num_key_value_heads * config.head_dim) as u64;
    // What a block keeps (`model::block_cpu`): queries and what they saw, keys and values, the sum between, gate and up.
    let kept = tokens * (2 * q + 2 * kv + h + 2 * f) * ELEMENT;
    // Norms, the activation and gradients while one block is taken back.
    let working = tokens * (6 * h + 4 * f) * ELEMENT;
    let layers = config.num_hidden_layers as u64;
    let boundaries = (layers + 1) * tokens * h * ELEMENT;
    let blocks = working + if settings.gradient_checkpointing { kept } else { layers * kept };
    let head = 2 * HEAD.min(tokens * config.vocab_size as u64) * ELEMENT;
    parameters(config) * 4 * ELEMENT + boundaries + blocks + head
}

/// The directory or GGUF file from which a stage's first model comes: outputs of stages that have not run yet are
/// followed back to where they start.
pub(super) fn origin(plan: &Plan, model: &str) -> Option<PathBuf> {
    let mut model = model;
    for _ in 0..=plan.steps.len() {
        let path = Path::new(model);
        let is_gguf = path.extension().is_some_and(|ending| ending == "gguf");
        if path.join("config.json").is_file() || is_gguf && path.is_file() {
            return Some(path.to_path_buf());
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

/// The configuration of the model that a stage starts from, where it is on this machine.
pub(super) fn config(plan: &Plan, model: &str) -> Option<Config> {
    Some(peek(&origin(plan, model)?).ok()?.0)
}

/// Bytes for people.
pub(super) fn bytes(count: u64) -> String {
    let gib = count as f64 / f64::from(1 << 30);
    if gib >= 1.0 { format!("{gib:.1} GiB") } else { format!("{:.0} MiB", gib * 1024.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_counts_equal_the_published_ones() {
        let config = |h: usize, layers: usize, f: usize, heads: usize, tied: bool, vocab: usize| {
            Config::from_json(&format!(
                r#"{{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": {h},
                "num_hidden_layers": {layers}, "intermediate_size": {f}, "num_attention_heads": {heads},
                "num_key_value_heads": {}, "vocab_size": {vocab}, "tie_word_embeddings": {tied}, "rms_norm_eps": 1e-5,
                "max_position_embeddings": 8192, "rope_theta": 10000.0, "hidden_act": "silu"}}"#,
                if tied { 3 } else { 8 }
            ))
            .unwrap()
        };
        assert_eq!(parameters(&config(4096, 32, 14336, 32, false, 128_256)), 8_030_261_248);
        assert_eq!(parameters(&config(8192, 80, 28672, 64, false, 128_256)), 70_553_706_496);
        assert_eq!(parameters(&config(576, 30, 1536, 9, true, 49152)), 134_515_008);
    }

    #[test]
    fn recomputation_and_smaller_micro_batches_need_less() {
        let config = Config::from_json(
            r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "num_hidden_layers": 30,
            "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
            "tie_word_embeddings": true, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "hidden_act": "silu"}"#,
        )
        .unwrap();
        let all = Settings::default();
        let less = Settings { gradient_checkpointing: true, ..Settings::default() };
        let least = Settings {
            max_tokens_per_micro_batch: 1024,
            ..Settings { gradient_checkpointing: true, ..Settings::default() }
        };
        let sizes = [&all, &less, &least].map(|settings| training_bytes(&config, settings));
        assert!(sizes.is_sorted_by(|a, b| a > b), "{sizes:?}");
        assert!(sizes[2] > 16 * parameters(&config));
    }
}
