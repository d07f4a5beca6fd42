//! The shape of a Llama-family model, read from and written to Hugging Face's `config.json`.
//!
//! Both generations of keys are read (`rope_theta`/`rope_scaling`/`torch_dtype` and `rope_parameters`/`dtype`), and
//! both are written, for transformers 4 and 5. Unsupported keys that change the mathematics are refused by name
//! ([`refusals`](super::refusals)); any other key is preserved.

use candle_core::DType;
use serde_json::{Map, Value, json};

use super::rope::Rope;
use super::{labels, refusals};
use crate::error::{Context, Error, Result};

/// The Hugging Face model family; the mathematics differ only in biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `model_type = "llama"`: Llama 1 to 3, SmolLM2, TinyLlama and others.
    Llama,
    /// `model_type = "qwen2"`: Qwen2 and Qwen2.5, with a bias on the q, k and v projections.
    Qwen2,
}

impl Family {
    /// Prefix of its class names in transformers.
    fn class_prefix(self) -> &'static str {
        match self {
            Self::Llama => "Llama",
            Self::Qwen2 => "Qwen2",
        }
    }

    /// The value of `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
        }
    }
}

/// The head on top of the transformer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// A language model: the vocabulary projection `lm_head.weight`, or the tied embedding.
    CausalLm,
    /// A reward model: `score.weight` `[L, D]`, no vocabulary projection.
    SequenceClassification,
    /// A process reward model, read at the end of each step: `score.weight` `[L, D]` and `score.bias` `[L]`.
    TokenClassification,
}

/// The configuration of one model. Sizes are named as in `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Llama or Qwen2.
    pub family: Family,
    /// Language model or reward model.
    pub architecture: Architecture,
    /// Names of the score head's `L` outputs; empty for a language model.
    pub labels: Vec<String>,
    /// Number of embedding rows, `V`.
    pub vocab_size: usize,
    /// Width of the residual stream, `D`.
    pub hidden_size: usize,
    /// Hidden size of the SwiGLU layer, `F`.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads, `H`.
    pub num_attention_heads: usize,
    /// Number of key/value heads, `G`; divides [`num_attention_heads`](Self::num_attention_heads).
    pub num_key_value_heads: usize,
    /// Head dimension, `E`; even. Not always `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// Maximum sequence length, in tokens.
    pub max_position_embeddings: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// RoPE configuration.
    pub rope: Rope,
    /// Whether the embedding doubles as vocabulary projection.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// Whether the attention output projection has a bias (Llama's `attention_bias`).
    pub output_bias: bool,
    /// Standard deviation of random initialisation.
    pub initializer_range: f64,
    /// Begin-of-sequence id.
    pub bos_token_id: Option<u32>,
    /// All ids that end a response; `eos_token_id` may be one id or a list.
    pub eos_token_ids: Vec<u32>,
    /// Padding id.
    pub pad_token_id: Option<u32>,
    /// Storage dtype of the weights on disk.
    pub dtype: DType,
    /// Other keys, which do not matter here, in file order.
    pub other: Map<String, Value>,
}

impl Config {
    /// Whether embedding and vocabulary projection are one tensor; false for a reward model, which has no such
    /// projection.
    pub fn is_tied(&self) -> bool {
        self.architecture == Architecture::CausalLm && self.tie_word_embeddings
    }

    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// Broken JSON, a missing or mistyped key, inconsistent sizes, a model type other than llama or qwen2, and every
    /// key that [`refusals`](super::refusals) rejects.
    pub fn from_json(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text).hint("the file must be one JSON object")?;
        let Value::Object(keys) = value else {
            return Err(Error::run("not a JSON object"));
        };
        Self::from_keys(keys)
    }

    fn from_keys(keys: Map<String, Value>) -> Result<Self> {
        let mut keys = Keys(keys);
        let family = family(&mut keys)?;
        refusals::check(family, &keys.0)?;
        for key in ["hidden_act", "mlp_bias"] {
            keys.0.shift_remove(key); // checked to be neutral, and always written
        }
        let architecture = architecture(family, &mut keys)?;
        let hidden_size = keys.size("hidden_size")?;
        let num_attention_heads = keys.size("num_attention_heads")?;
        // Llama's `attention_bias` adds a bias to all four projections; Qwen2 always has three.
        let attention_bias = keys.boolean("attention_bias")?.unwrap_or(false);
        let config = Self {
            family,
            architecture,
            labels: labels::read(architecture, &mut keys)?,
            vocab_size: keys.size("vocab_size")?,
            intermediate_size: keys.size("intermediate_size")?,
            num_hidden_layers: keys.size("num_hidden_layers")?,
            num_key_value_heads: keys
                .optional_size("num_key_value_heads")?
                .unwrap_or(num_attention_heads),
            head_dim: keys.optional_size("head_dim")?.unwrap_or(hidden_size / num_attention_heads),
            max_position_embeddings: keys.optional_size("max_position_embeddings")?.unwrap_or(2048),
            rms_norm_eps: keys.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope: Rope::from_keys(&mut keys.0)?,
            tie_word_embeddings: keys.boolean("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: attention_bias || family == Family::Qwen2,
            output_bias: attention_bias && family == Family::Llama,
            initializer_range: keys.number("initializer_range")?.unwrap_or(0.02),
            bos_token_id: keys.ids("bos_token_id")?.first().copied(),
            eos_token_ids: keys.ids("eos_token_id")?,
            pad_token_id: keys.ids("pad_token_id")?.first().copied(),
            dtype: dtype(&mut keys),
            hidden_size,
            num_attention_heads,
            other: keys.0,
        };
        config.check_sizes()?;
        Ok(config)
    }

    pub(super) fn check_sizes(&self) -> Result<()> {
        let (heads, groups) = (self.num_attention_heads, self.num_key_value_heads);
        if heads % groups != 0 {
            return Err(Error::run(format!(
                "num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
            )));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return Err(Error::run(format!(
                "head_dim {}, expected an even number above zero for rotary positions",
                self.head_dim
            )));
        }
        let special = self.bos_token_id.iter().chain(&self.eos_token_ids);
        for id in special.chain(&self.pad_token_id) {
            if *id as usize >= self.vocab_size {
                return Err(Error::run(format!(
                    "special token id {id}, expected below vocab_size {}",
                    self.vocab_size
                )));
            }
        }
        Ok(())
    }

    /// A `config.json` that both transformers 4 and 5 read.
    pub fn to_json(&self) -> String {
        let mut keys = Map::new();
        let suffix = match self.architecture {
            Architecture::CausalLm => "ForCausalLM",
            Architecture::SequenceClassification => "ForSequenceClassification",
            Architecture::TokenClassification => "ForTokenClassification",
        };
        let prefix = self.family.class_prefix();
        let mut put = |key: &str, value: Value| {
            keys.insert(key.to_owned(), value);
        };
        put("architectures", json!([format!("{prefix}{suffix}")]));
        put("model_type", json!(self.family.model_type()));
        put("vocab_size", json!(self.vocab_size));
        put("hidden_size", json!(self.hidden_size));
        put("intermediate_size", json!(self.intermediate_size));
        put("num_hidden_layers", json!(self.num_hidden_layers));
        put("num_attention_heads", json!(self.num_attention_heads));
        put("num_key_value_heads", json!(self.num_key_value_heads));
        put("head_dim", json!(self.head_dim));
        put("hidden_act", json!("silu"));
        put("max_position_embeddings", json!(self.max_position_embeddings));
        put("rms_norm_eps", json!(self.rms_norm_eps));
        put("tie_word_embeddings", json!(self.tie_word_embeddings));
        if self.family == Family::Llama {
            put("attention_bias", json!(self.qkv_bias));
            put("mlp_bias", json!(false));
        }
        put("initializer_range", json!(self.initializer_range));
        put("bos_token_id", json!(self.bos_token_id));
        put("eos_token_id", one_or_list(&self.eos_token_ids));
        put("pad_token_id", json!(self.pad_token_id));
        labels::write(&self.labels, &mut put);
        put("torch_dtype", json!(dtype_name(self.dtype)));
        put("dtype", json!(dtype_name(self.dtype)));
        self.rope.to_keys(&mut keys);
        for (key, value) in &self.other {
            keys.entry(key).or_insert_with(|| value.clone());
        }
        let mut text = format!("{:#}", Value::Object(keys));
        text.push('\n');
        text
    }

    /// Number of query heads per key/value head.
    pub fn group_size(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }
}

/// `eos_token_id` in Hugging Face's form: null, one id, or a list.
pub(super) fn one_or_list(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    }
}

/// One id, a list of ids, or null.
pub(super) fn ids_of(value: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Null => Some(Vec::new()),
        Value::Array(list) => list.iter().map(id).collect(),
        // Llama 1 conversions write -1 for "no padding token".
        Value::Number(number) if number.as_i64().is_some_and(|id| id < 0) => Some(Vec::new()),
        other => Some(vec![id(other)?]),
    }
}

fn family(keys: &mut Keys) -> Result<Family> {
    match keys.text("model_type")?.as_deref() {
        Some("llama") => Ok(Family::Llama),
        Some("qwen2") => Ok(Family::Qwen2),
        Some(other) => Err(Error::run(format!("model_type `{other}` is not supported"))
            .hint("supported model types: llama, qwen2")),
        None => Err(Error::run("missing key `model_type`")
            .hint("supported model types: llama, qwen2; is this a Hugging Face config.json?")),
    }
}

fn architecture(family: Family, keys: &mut Keys) -> Result<Architecture> {
    let names = keys.0.shift_remove("architectures").unwrap_or(Value::Null);
    let name = match &names {
        Value::Null => None,
        Value::Array(list) => list.first().and_then(Value::as_str),
        _ => return Err(Keys::wrong("architectures", &names, "a list of names")),
    };
    let Some(name) = name else { return Ok(Architecture::CausalLm) };
    match name.strip_prefix(family.class_prefix()) {
        Some("ForCausalLM") => Ok(Architecture::CausalLm),
        Some("ForSequenceClassification") => Ok(Architecture::SequenceClassification),
        Some("ForTokenClassification") => Ok(Architecture::TokenClassification),
        _ => Err(Error::run(format!(
            "architecture `{name}` is not supported for model_type `{}`",
            family.model_type()
        ))
        .hint(
            "supported: ForCausalLM, ForSequenceClassification and ForTokenClassification of Llama and Qwen2",
        )),
    }
}

/// The storage dtype; it does not affect computation, so an unknown one is treated as f32.
fn dtype(keys: &mut Keys) -> DType {
    let old = keys.0.shift_remove("torch_dtype");
    let new = keys.0.shift_remove("dtype");
    match new.or(old).as_ref().and_then(Value::as_str) {
        Some("bfloat16") => DType::BF16,
        Some("float16") => DType::F16,
        _ => DType::F32,
    }
}

/// The name of a storage dtype in `config.json`.
pub(super) fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
}

/// The unread keys of a `config.json`.
pub(super) struct Keys(pub(super) Map<String, Value>);

impl Keys {
    pub(super) fn wrong(key: &str, value: &Value, expected: &str) -> Error {
        Error::run(format!("`{key}` is {value}, expected {expected}"))
    }

    fn take<T>(
        &mut self,
        key: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.0.shift_remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match read(&value) {
                Some(read) => Ok(Some(read)),
                None => Err(Self::wrong(key, &value, expected)),
            },
        }
    }

    pub(super) fn optional_size(&mut self, key: &str) -> Result<Option<usize>> {
        // The limit keeps products of sizes from overflowing on malicious files.
        let read = |value: &Value| value.as_u64().filter(|n| (1..=1 << 31).contains(n));
        Ok(self.take(key, "a whole number from 1 to 2^31", read)?.map(|n| n as usize))
    }

    fn size(&mut self, key: &str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| Error::run(format!("missing key `{key}`")))
    }

    fn number(&mut self, key: &str) -> Result<Option<f64>> {
        let read = |value: &Value| value.as_f64().filter(|x| x.is_finite() && *x >= 0.0);
        self.take(key, "a number of at least zero", read)
    }

    fn boolean(&mut self, key: &str) -> Result<Option<bool>> {
        self.take(key, "true or false", Value::as_bool)
    }

    fn text(&mut self, key: &str) -> Result<Option<String>> {
        self.take(key, "a text", |value| value.as_str().map(str::to_owned))
    }

    fn ids(&mut self, key: &str) -> Result<Vec<u32>> {
        Ok(self.take(key, "a token id or a list of token ids", ids_of)?.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small Llama `config.json` with some keys replaced; `null` is written, not removed.
    fn with(changes: &[(&str, Value)]) -> Result<Config> {
        let mut keys = json!({
            "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_theta": 10000.0, "eos_token_id": 2, "architectures": ["LlamaForCausalLM"],
        });
        for (key, value) in changes {
            keys[*key] = value.clone();
        }
        Config::from_json(&keys.to_string())
    }

    #[track_caller]
    fn refused(changes: &[(&str, Value)], expected: &str) {
        let error = with(changes).expect_err("must be refused").to_string();
        assert!(error.contains(expected), "`{error}` does not say `{expected}`");
    }

    #[test]
    fn keys_that_change_the_mathematics_are_refused_by_name() {
        let rope = |kind: &str| json!({"rope_type": kind, "factor": 4.0});
        for kind in ["yarn", "linear", "dynamic", "longrope"] {
            refused(&[("rope_scaling", rope(kind))], &format!("rope type `{kind}`"));
            refused(&[("rope_parameters", rope(kind))], &format!("rope type `{kind}`"));
            refused(&[("rope_scaling", json!({"type": kind, "factor": 2}))], kind);
        }
        let cases = [
            ("hidden_act", json!("gelu")),
            ("mlp_bias", json!(true)),
            ("pretraining_tp", json!(2)),
            ("partial_rotary_factor", json!(0.5)),
            ("use_sliding_window", json!(true)),
            ("sliding_window", json!(4096)),
            ("layer_types", json!(["full_attention", "sliding_attention"])),
            ("no_rope_layers", json!([1, 0])),
            ("attention_multiplier", json!(0.01)),
            ("logits_scaling", json!(8.0)),
            ("embedding_multiplier", json!(12.0)),
            ("residual_multiplier", json!(0.2)),
            ("final_logit_softcapping", json!(30.0)),
            ("num_local_experts", json!(8)),
            ("quantization_config", json!({"bits": 4})),
        ];
        for (key, value) in cases {
            refused(&[(key, value)], key);
        }
        let partial = json!({"rope_type": "default", "partial_rotary_factor": 0.25});
        refused(&[("rope_parameters", partial)], "rope_parameters.partial_rotary_factor");
    }

    #[test]
    fn neutral_values_of_the_same_keys_are_accepted() {
        let changes = [
            ("hidden_act", json!("silu")),
            ("mlp_bias", json!(false)),
            ("pretraining_tp", json!(1)),
            ("partial_rotary_factor", json!(1.0)),
            ("use_sliding_window", json!(false)),
            ("sliding_window", Value::Null),
            ("layer_types", json!(["full_attention", "full_attention"])),
            ("attention_multiplier", json!(0.5)),
            ("logits_scaling", json!(1)),
            ("num_local_experts", json!(0)),
            ("quantization_config", Value::Null),
        ];
        with(&changes).unwrap();
        let qwen = [
            ("model_type", json!("qwen2")),
            ("architectures", json!(["Qwen2ForCausalLM"])),
            ("sliding_window", json!(4096)),
            ("use_sliding_window", json!(false)),
        ];
        with(&qwen).unwrap();
    }

    #[test]
    fn unknown_models_and_wrong_sizes_are_refused() {
        refused(&[("model_type", json!("mistral"))], "model_type `mistral`");
        refused(&[("model_type", Value::Null)], "model_type");
        refused(&[("architectures", json!(["LlamaForQuestionAnswering"]))], "QuestionAnsw");
        refused(&[("num_key_value_heads", json!(3))], "not a multiple");
        refused(&[("head_dim", json!(3))], "head_dim 3");
        refused(&[("hidden_size", json!(0))], "hidden_size");
        refused(&[("hidden_size", json!("big"))], "hidden_size");
        refused(&[("vocab_size", Value::Null)], "missing key `vocab_size`");
        refused(&[("pad_token_id", json!(32))], "special token id 32");
        let classifier = ("architectures", json!(["LlamaForSequenceClassification"]));
        let two = json!({"0": "no", "1": "yes"});
        let counted = [classifier.clone(), ("num_labels", json!(3)), ("id2label", two)];
        refused(&counted, "num_labels is 3, id2label has 2 names");
        let gap = json!({"0": "no", "2": "yes"});
        refused(&[classifier.clone(), ("id2label", gap)], "no name for \"1\"");
        refused(&[classifier, ("id2label", json!(["no"]))], "id2label");
        assert!(Config::from_json("[1]").is_err());
        assert!(Config::from_json("{").is_err());
    }

    #[test]
    fn old_and_new_rope_keys_are_equivalent() {
        let scaling = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        });
        let old = with(&[("rope_theta", json!(5e5)), ("rope_scaling", scaling.clone())]).unwrap();
        let mut new = scaling;
        new["rope_theta"] = json!(5e5);
        let new = [("rope_theta", Value::Null), ("rope_parameters", new)];
        assert_eq!(with(&new).unwrap().rope, old.rope);
        assert!(old.rope.scaling.is_some());
        let other = json!({"rope_type": "default", "rope_theta": 5e5});
        refused(&[("rope_parameters", other)], "disagree");
    }

    #[test]
    fn config_round_trips_through_json() {
        let scaling = json!({
            "type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
            "original_max_position_embeddings": 64,
        });
        let rated = json!({"0": "helpfulness", "1": "verbosity"});
        let cases: [&[(&str, Value)]; 7] = [
            &[],
            &[("rope_scaling", scaling), ("eos_token_id", json!([2, 5])), ("head_dim", json!(8))],
            &[("attention_bias", json!(true)), ("torch_dtype", json!("bfloat16"))],
            &[("model_type", json!("qwen2")), ("architectures", json!(["Qwen2ForCausalLM"]))],
            &[("architectures", json!(["LlamaForSequenceClassification"])), ("my_key", json!([1]))],
            &[("architectures", json!(["LlamaForSequenceClassification"])), ("id2label", rated)],
            &[("architectures", json!(["LlamaForTokenClassification"])), ("num_labels", json!(2))],
        ];
        for changes in cases {
            let config = with(changes).unwrap();
            assert_eq!(Config::from_json(&config.to_json()).unwrap(), config);
        }
        let config = with(&[("my_key", json!({"a": 1}))]).unwrap();
        assert!(config.to_json().contains("my_key"));
    }

    #[test]
    fn biases_follow_the_model_family() {
        let biases = |changes: &[(&str, Value)]| {
            let config = with(changes).unwrap();
            (config.qkv_bias, config.output_bias)
        };
        assert_eq!(biases(&[]), (false, false));
        assert_eq!(biases(&[("attention_bias", json!(true))]), (true, true));
        let qwen = [("model_type", json!("qwen2")), ("architectures", json!(["Qwen2ForCausalLM"]))];
        assert_eq!(biases(&qwen), (true, false));
    }
}
