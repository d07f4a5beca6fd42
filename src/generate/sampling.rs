//! Sampling keys of every generating stage, named as in Hugging Face and OpenAI.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::Precision;
use crate::model::packed::BlockType;

/// Sampling keys, resolved: every field holds the value in use.
///
/// ```
/// use arriero::generate::sampling::Sampling;
/// let sampling: Sampling = serde_json::from_str(r#"{"temperature": 0.6, "max_tokens": 32, "stop": "\n\n"}"#)?;
/// assert_eq!((sampling.max_new_tokens, sampling.stop.len(), sampling.top_p), (32, 1, 1.0));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sampling {
    /// Divides the logits; 0 means greedy decoding.
    pub temperature: f64,
    /// Nucleus sampling: keeps the fewest likeliest tokens whose total probability reaches this; 1 keeps all.
    pub top_p: f64,
    /// Keeps this many of the likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps tokens with at least this fraction of the likeliest token's probability; 0 keeps all.
    pub min_p: f64,
    /// Divides positive and multiplies negative logits of tokens already in the prompt or answer; 1 disables it (CTRL,
    /// Keskar et al. 2019, section 4.1).
    pub repetition_penalty: f64,
    /// Most tokens in an answer, including the end-of-turn token.
    #[serde(alias = "max_tokens", alias = "max_completion_tokens")]
    pub max_new_tokens: usize,
    /// An answer ends before the first occurrence of any of these strings.
    #[serde(alias = "stop_strings", deserialize_with = "one_or_many")]
    pub stop: Vec<String>,
    /// Seed of the draws. Equal seeds give equal answers, independent of batching.
    pub seed: u64,
    /// Number of answers per prompt.
    #[serde(alias = "n", alias = "num_return_sequences")]
    pub num_samples: usize,
    /// Compute dtype: `f32` or `bf16`.
    #[serde(alias = "torch_dtype")]
    pub dtype: Precision,
    /// Storage format of the model's matrices during generation.
    pub quantization: WeightFormat,
    /// Prompt lookup: speculates this many tokens from what followed the newest ones earlier in prompt and answer; 0
    /// disables it. Speculation changes speed, never the answer.
    pub prompt_lookup_num_tokens: usize,
    /// A small draft model with the same vocabulary; empty for none.
    #[serde(alias = "draft_model", alias = "speculative_model")]
    pub assistant_model: String,
    /// How many tokens the draft model proposes.
    #[serde(alias = "num_speculative_tokens")]
    pub num_assistant_tokens: usize,
    /// Leave a prompt unanswered instead of ending the stage if it leaves no position for an answer or a server refuses
    /// it.
    pub skip_refused: bool,
}

/// Storage format of matrices during generation. Blocks of few bits are read faster and multiplied as integers;
/// log-probabilities are then those of the quantised model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightFormat {
    /// In the compute dtype.
    #[default]
    None,
    /// 8 bits, with a scale per 32 values.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// 4 bits, with a scale per 32 values; embedding and head keep 8.
    #[serde(rename = "q4_0")]
    Q4_0,
    /// 4 bits, with a scale and a minimum per 32 values; embedding and head keep 8. Lossless for a GGUF file of this
    /// type made by plain rounding.
    #[serde(rename = "q4_1")]
    Q4_1,
}

impl WeightFormat {
    /// The block type, if quantised.
    pub fn block_type(self) -> Option<BlockType> {
        match self {
            Self::None => None,
            Self::Q8_0 => Some(BlockType::Q8_0),
            Self::Q4_0 => Some(BlockType::Q4_0),
            Self::Q4_1 => Some(BlockType::Q4_1),
        }
    }
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            max_new_tokens: 256,
            stop: Vec::new(),
            seed: 0,
            num_samples: 1,
            dtype: Precision::F32,
            quantization: WeightFormat::None,
            prompt_lookup_num_tokens: 0,
            assistant_model: String::new(),
            num_assistant_tokens: 4,
            skip_refused: false,
        }
    }
}

impl Sampling {
    /// Greedy decoding, one answer per prompt.
    pub fn greedy(max_new_tokens: usize) -> Self {
        Self { temperature: 0.0, max_new_tokens, ..Self::default() }
    }

    /// Rejects invalid values.
    ///
    /// # Errors
    /// Names the key, its value and the expected range.
    pub fn check(&self) -> Result<()> {
        let refuse = |key: &str, value: f64, expected: &str| {
            Err(Error::usage(format!("`{key}` is {value}, expected {expected}")))
        };
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            return refuse("temperature", self.temperature, "0 or more");
        }
        if self.top_p.is_nan() || self.top_p <= 0.0 || self.top_p > 1.0 {
            return refuse("top_p", self.top_p, "more than 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return refuse("min_p", self.min_p, "0 to 1");
        }
        if !self.repetition_penalty.is_finite() || self.repetition_penalty <= 0.0 {
            return refuse("repetition_penalty", self.repetition_penalty, "more than 0");
        }
        // Beyond any sensible value: room for all samples of a prompt is allocated at once.
        for (key, value, most, expected) in [
            ("max_new_tokens", self.max_new_tokens, 1 << 24, "1 to 16777216"),
            ("num_samples", self.num_samples, 1 << 16, "1 to 65536"),
            ("num_assistant_tokens", self.num_assistant_tokens, 1 << 16, "1 to 65536"),
        ] {
            if !(1..=most).contains(&value) {
                return refuse(key, value as f64, expected);
            }
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::usage("`stop` has an empty string, which would end every answer"));
        }
        if self.prompt_lookup_num_tokens > 0 && !self.assistant_model.is_empty() {
            return Err(Error::usage("`prompt_lookup_num_tokens` with `assistant_model`")
                .hint("set only one of them"));
        }
        if self.quantization != WeightFormat::None && self.dtype != Precision::F32 {
            return Err(Error::usage("`quantization` with another `dtype` than f32")
                .hint("blocks of few bits have a type of their own; leave `dtype` out"));
        }
        self.dtype.check_compute()
    }
}

/// Accepts a single string in place of a list, as OpenAI's API does.
pub(crate) fn one_or_many<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(stop) => vec![stop],
        OneOrMany::Many(stops) => stops,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_sampling_values_are_refused_by_name() {
        let bad = [
            (Sampling { temperature: -1.0, ..Sampling::default() }, "temperature"),
            (Sampling { temperature: f64::NAN, ..Sampling::default() }, "temperature"),
            (Sampling { top_p: 0.0, ..Sampling::default() }, "top_p"),
            (Sampling { min_p: 1.5, ..Sampling::default() }, "min_p"),
            (Sampling { repetition_penalty: 0.0, ..Sampling::default() }, "repetition_penalty"),
            (Sampling { max_new_tokens: 0, ..Sampling::default() }, "max_new_tokens"),
            (Sampling { num_samples: 0, ..Sampling::default() }, "num_samples"),
            (Sampling { num_samples: 1 << 40, ..Sampling::default() }, "num_samples"),
            (Sampling { max_new_tokens: usize::MAX, ..Sampling::default() }, "max_new_tokens"),
            (Sampling { stop: vec![String::new()], ..Sampling::default() }, "stop"),
            (
                Sampling {
                    quantization: WeightFormat::Q8_0,
                    dtype: Precision::Bf16,
                    ..Sampling::default()
                },
                "quantization",
            ),
        ];
        for (sampling, key) in bad {
            assert!(sampling.check().unwrap_err().to_string().starts_with(&format!("`{key}`")));
        }
        Sampling::default().check().unwrap();
        Sampling::greedy(8).check().unwrap();
    }
}
