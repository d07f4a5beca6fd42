//! Unsupported keys of `config.json` that change the mathematics.
//!
//! Ignoring one of them would give a model that runs but is wrong, so each is refused by name unless its value is
//! neutral.

use serde_json::{Map, Value};

use super::config::Family;
use crate::error::{Error, Result};

/// A key and its neutral values.
struct Neutral {
    key: &'static str,
    accepts: fn(&Value) -> bool,
    expected: &'static str,
}

const fn neutral(
    key: &'static str,
    accepts: fn(&Value) -> bool,
    expected: &'static str,
) -> Neutral {
    Neutral { key, accepts, expected }
}

const NEUTRAL: &[Neutral] = &[
    neutral("hidden_act", |v| v == "silu" || v == "swish", "silu"),
    neutral("hidden_activation", |v| v == "silu" || v == "swish", "silu"),
    neutral("mlp_bias", is_false, "false"),
    neutral("pretraining_tp", is_one, "1"),
    neutral("partial_rotary_factor", is_one, "1"),
    neutral("rope_interleaved", is_false, "false"),
    neutral("use_sliding_window", is_false, "false"),
    neutral("layer_types", all_full_attention, "full_attention in every layer"),
    neutral("no_rope_layers", all_rotary, "rotary positions in every layer"),
    neutral("no_rope_layer_interval", is_zero, "none"),
    neutral("use_qk_norm", is_false, "false"),
    neutral("qk_norm", is_false, "false"),
    neutral("qk_layernorm", is_false, "false"),
    neutral("attn_logit_softcapping", is_zero, "none"),
    neutral("final_logit_softcapping", is_zero, "none"),
    neutral("logits_scaling", is_one, "1"),
    neutral("logit_scale", is_one, "1"),
    neutral("embedding_multiplier", is_one, "1"),
    neutral("residual_multiplier", is_one, "1"),
    neutral("scale_emb", is_one, "1"),
    neutral("num_experts", at_most_one, "none"),
    neutral("num_local_experts", at_most_one, "none"),
    neutral("is_causal", |v| v.as_bool() == Some(true), "true"),
    neutral("quantization_config", |_| false, "none: load the unquantised weights"),
];

/// Rejects every key whose value changes the mathematics.
///
/// # Errors
/// The first such key, with its value and the supported value.
pub(super) fn check(family: Family, keys: &Map<String, Value>) -> Result<()> {
    for Neutral { key, accepts, expected } in NEUTRAL {
        let value = keys.get(*key).unwrap_or(&Value::Null);
        if !value.is_null() && !accepts(value) {
            return Err(refuse(key, value, expected));
        }
    }
    check_partial_rotation(keys)?;
    check_attention_multiplier(keys)?;
    // Qwen2 files may set a window that `use_sliding_window = false` disables; in a Llama model it is in effect.
    match keys.get("sliding_window") {
        Some(window) if !window.is_null() && family == Family::Llama => {
            Err(refuse("sliding_window", window, "none"))
        }
        _ => Ok(()),
    }
}

fn refuse(key: &str, value: &Value, expected: &str) -> Error {
    Error::run(format!("`{key}` = {value} is not implemented, expected {expected}"))
        .hint("the key changes what the model computes, so it is not ignored")
}

/// Transformers 5 stores the rotated fraction of a head among the rope parameters.
fn check_partial_rotation(keys: &Map<String, Value>) -> Result<()> {
    let key = "partial_rotary_factor";
    for group in ["rope_parameters", "rope_scaling"] {
        let value = keys.get(group).and_then(|rope| rope.get(key)).unwrap_or(&Value::Null);
        if !value.is_null() && !is_one(value) {
            return Err(refuse(&format!("{group}.{key}"), value, "1"));
        }
    }
    Ok(())
}

/// Granite's scale of attention scores; the usual scale is `1 / √head_dim`.
fn check_attention_multiplier(keys: &Map<String, Value>) -> Result<()> {
    let value = keys.get("attention_multiplier").unwrap_or(&Value::Null);
    if value.is_null() {
        return Ok(());
    }
    let number = |key: &str| keys.get(key).and_then(Value::as_f64);
    let width = number("head_dim")
        .or_else(|| Some(number("hidden_size")? / number("num_attention_heads")?))
        .unwrap_or(f64::NAN);
    let usual = width.powf(-0.5);
    match value.as_f64() {
        Some(scale) if (scale - usual).abs() <= 1e-6 * usual => Ok(()),
        _ => Err(refuse("attention_multiplier", value, "one over the root of head_dim")),
    }
}

fn is_false(value: &Value) -> bool {
    value.as_bool() == Some(false)
}

fn is_one(value: &Value) -> bool {
    value.as_f64().is_some_and(|x| (x - 1.0).abs() < f64::EPSILON)
}

fn is_zero(value: &Value) -> bool {
    value.as_f64().is_some_and(|x| x.abs() < f64::EPSILON) || is_false(value)
}

fn at_most_one(value: &Value) -> bool {
    value.as_u64().is_some_and(|count| count <= 1)
}

fn all_full_attention(value: &Value) -> bool {
    value.as_array().is_some_and(|layers| layers.iter().all(|layer| layer == "full_attention"))
}

/// SmolLM3 marks rotated layers with 1.
fn all_rotary(value: &Value) -> bool {
    value.as_array().is_some_and(|layers| layers.iter().all(is_one))
}
