//! GGUF files of llama.cpp: one file with weights, configuration, tokenizer and chat template.
//!
//! Weights are dequantised to f32 and renamed to Hugging Face's names. Files of arch `llama` keep the
//! rows of q and k in the order of interleaved rotary pairs; they are put back into half-split order.
//! Architectures other than `llama` and `qwen2` are refused by name.

use std::io::Cursor;
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{DType, Device, Tensor};
use serde_json::Map;

use super::config::{Architecture, Config, Family};
use super::rope::{Llama3Scaling, Rope};
use super::tensor_file::{self, Mapped};
use super::{Weights, params};
use crate::error::{Context, Error, Result};

/// An open GGUF file: its metadata, and its tensors on demand.
pub(super) struct Gguf {
    mapped: Mapped,
    content: Content,
}

impl Gguf {
    /// Opens the file and reads its metadata.
    ///
    /// # Errors
    /// Not a GGUF file, or one that ends before its header or its tensors do.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mapped = Mapped::open(path)?;
        check_alignment(mapped.bytes()).at(path.display())?;
        let content = Content::read(&mut Cursor::new(mapped.bytes()))
            .at(path.display())
            .hint("the file is not GGUF, or truncated: copy or download it again")?;
        let gguf = Self { mapped, content };
        gguf.check_length().at(path.display())?;
        Ok(gguf)
    }

    fn check_length(&self) -> Result<()> {
        let length = self.mapped.bytes().len() as u128;
        for (name, info) in &self.content.tensor_infos {
            let blocks = info.shape.elem_count() / info.ggml_dtype.block_size();
            let size = blocks as u128 * info.ggml_dtype.type_size() as u128;
            let end = u128::from(self.content.tensor_data_offset) + u128::from(info.offset) + size;
            if end > length {
                return Err(Error::run(format!(
                    "truncated: tensor `{name}` ends at byte {end}, the file at {length}"
                ))
                .hint("copy or download the file again"));
            }
        }
        Ok(())
    }

    /// A metadata value.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    /// A whole number under `key`.
    pub(super) fn number(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Value::I32(n) => u64::try_from(*n).ok(),
            Value::I64(n) => u64::try_from(*n).ok(),
            value => value.to_u64().ok(),
        }
    }

    /// A text under `key`.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        Some(self.get(key)?.to_string().ok()?.as_str())
    }

    /// A list under `key`, empty where it is absent.
    pub(super) fn list(&self, key: &str) -> &[Value] {
        self.get(key).and_then(|value| value.to_vec().ok()).map_or(&[], Vec::as_slice)
    }

    fn float(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            Value::F32(x) => Some(f64::from(*x)),
            Value::F64(x) => Some(*x),
            _ => self.number(key).map(|n| n as f64),
        }
    }

    /// The configuration that the metadata and the tensors describe.
    ///
    /// # Errors
    /// An architecture or a feature that is not implemented, missing keys.
    pub(super) fn config(&self) -> Result<Config> {
        let arch = self.text("general.architecture").unwrap_or_default();
        let family = match arch {
            "llama" => Family::Llama,
            "qwen2" => Family::Qwen2,
            other => {
                return Err(Error::run(format!("GGUF architecture `{other}` is not supported"))
                    .hint("supported architectures: llama, qwen2"));
            }
        };
        self.check_features(arch)?;
        let key = |name: &str| format!("{arch}.{name}");
        let size = |name: &str| {
            let number = self.number(&key(name)).filter(|n| (1..=1 << 31).contains(n));
            number.map(|n| n as usize).ok_or_else(|| {
                Error::run(format!("`{}` is missing or not a number above zero", key(name)))
            })
        };
        let hidden_size = size("embedding_length")?;
        let heads = size("attention.head_count")?;
        let head_dim = size("attention.key_length").unwrap_or(hidden_size / heads);
        let info = |name: &str| self.content.tensor_infos.get(name);
        let embedding = info("token_embd.weight")
            .ok_or_else(|| Error::run("missing tensor `token_embd.weight`"))?;
        let (vocab_size, _) = embedding.shape.dims2()?;
        let config = Config {
            family,
            architecture: Architecture::CausalLm,
            vocab_size,
            hidden_size,
            intermediate_size: size("feed_forward_length")?,
            num_hidden_layers: size("block_count")?,
            num_attention_heads: heads,
            num_key_value_heads: size("attention.head_count_kv").unwrap_or(heads),
            head_dim,
            max_position_embeddings: size("context_length")?,
            rms_norm_eps: self
                .float(&key("attention.layer_norm_rms_epsilon"))
                .map(short)
                .ok_or_else(|| Error::run("missing the epsilon of the norms"))?,
            rope: self.rope(arch, head_dim)?,
            tie_word_embeddings: info("output.weight").is_none(),
            qkv_bias: info("blk.0.attn_q.bias").is_some() || family == Family::Qwen2,
            output_bias: info("blk.0.attn_output.bias").is_some(),
            initializer_range: 0.02,
            bos_token_id: self.token_id("bos_token_id"),
            eos_token_ids: self.end_ids(),
            pad_token_id: self.token_id("padding_token_id"),
            dtype: DType::F32,
            labels: Vec::new(),
            other: Map::new(),
        };
        config.check_sizes()?;
        Ok(config)
    }

    /// The special token id under `tokenizer.ggml.<name>`.
    pub(super) fn token_id(&self, name: &str) -> Option<u32> {
        u32::try_from(self.number(&format!("tokenizer.ggml.{name}"))?).ok()
    }

    /// Every id that ends a text, a turn or a message.
    pub(super) fn end_ids(&self) -> Vec<u32> {
        let mut ids = Vec::new();
        for name in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            ids.extend(self.token_id(name).filter(|id| !ids.contains(id)));
        }
        ids
    }

    fn check_features(&self, arch: &str) -> Result<()> {
        let neutral = [
            ("expert_count", 0.0),
            ("logit_scale", 1.0),
            ("residual_scale", 1.0),
            ("embedding_scale", 1.0),
            ("attention.sliding_window", 0.0),
            ("attention.clamp_kqv", 0.0),
            ("attn_logit_softcapping", 0.0),
            ("final_logit_softcapping", 0.0),
        ];
        for (name, neutral) in neutral {
            let key = format!("{arch}.{name}");
            if let Some(value) = self.float(&key)
                && (value - neutral).abs() > f64::EPSILON
            {
                return Err(Error::run(format!("`{key}` = {value} is not implemented"))
                    .hint("the key changes what the model computes, so it is not ignored"));
            }
        }
        match self.text(&format!("{arch}.rope.scaling.type")) {
            None | Some("none" | "") => Ok(()),
            Some(other) => Err(Error::run(format!("rope scaling `{other}` is not implemented"))
                .hint("supported: none, and Llama 3.1's factors in rope_freqs.weight")),
        }
    }

    fn rope(&self, arch: &str, head_dim: usize) -> Result<Rope> {
        if let Some(rotated) = self.number(&format!("{arch}.rope.dimension_count"))
            && rotated != head_dim as u64
        {
            return Err(Error::run(format!(
                "{rotated} of {head_dim} channels of a head rotate, expected all"
            )));
        }
        let theta = self.float(&format!("{arch}.rope.freq_base")).map_or(10_000.0, short);
        let plain = Rope::plain(theta);
        if !self.content.tensor_infos.contains_key("rope_freqs.weight") {
            return Ok(plain);
        }
        let factors = self.tensor("rope_freqs.weight", &Device::Cpu)?.to_vec1::<f32>()?;
        let context = format!("{arch}.rope.scaling.original_context_length");
        recognise_scaling(plain, &factors, head_dim, self.number(&context))
    }

    /// One tensor, dequantised to f32.
    fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        let mut reader = Cursor::new(self.mapped.bytes());
        let quantised = self.content.tensor(&mut reader, name, device)?;
        Ok(quantised.dequantize(device)?.to_dtype(DType::F32)?)
    }

    /// All weights under their Hugging Face names, f32, checked against `config`.
    ///
    /// # Errors
    /// Missing, unexpected or wrongly shaped tensors, numbers that are not finite.
    pub(super) fn weights(&self, config: &Config, device: &Device) -> Result<Weights> {
        let mut weights = Weights::new();
        for name in self.content.tensor_infos.keys() {
            if name == "rope_freqs.weight" {
                continue;
            }
            let place = || format!("tensor `{name}`");
            let renamed = hugging_face_name(name)
                .ok_or_else(|| Error::run(format!("unexpected tensor `{name}`")))?;
            let tensor = self.tensor(name, &Device::Cpu).at(place())?;
            tensor_file::check_finite(&tensor.flatten_all()?.to_vec1::<f32>()?).at(place())?;
            let tensor = match rotary_heads(&renamed, config) {
                Some(heads) if config.family == Family::Llama => {
                    half_split(&tensor, heads, config.head_dim).at(place())?
                }
                _ => tensor,
            };
            weights.insert(renamed, tensor.to_device(device)?);
        }
        params::check(config, &weights)?;
        Ok(weights)
    }
}

/// A zero alignment would divide by zero in the reader.
fn check_alignment(bytes: &[u8]) -> Result<()> {
    let key = b"general.alignment";
    let header = &bytes[..bytes.len().min(1 << 16)];
    let found = header.windows(key.len()).position(|window| window == key);
    let value = found.and_then(|at| header.get(at + key.len() + 4..at + key.len() + 8));
    if value.is_some_and(|value| value == [0; 4]) {
        return Err(Error::run("general.alignment is 0, expected a power of two"));
    }
    Ok(())
}

/// An f32 as the shortest decimal that means it: 1e-5 and not 0.000009999999747378752.
fn short(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}

/// `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`, and so on.
fn hugging_face_name(name: &str) -> Option<String> {
    let fixed = match name {
        "token_embd.weight" => Some(params::EMBEDDING),
        "output_norm.weight" => Some(params::FINAL_NORM),
        "output.weight" => Some(params::HEAD),
        _ => None,
    };
    if let Some(fixed) = fixed {
        return Some(fixed.to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    let part = match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{part}.{kind}"))
}

/// The number of heads in a tensor whose rows rotate.
fn rotary_heads(name: &str, config: &Config) -> Option<usize> {
    if name.contains(".q_proj.") {
        Some(config.num_attention_heads)
    } else if name.contains(".k_proj.") {
        Some(config.num_key_value_heads)
    } else {
        None
    }
}

/// Rows of each head from (pair, side) order to (side, pair) order; the first dimension is
/// `heads · head_dim`.
fn half_split(tensor: &Tensor, heads: usize, head_dim: usize) -> Result<Tensor> {
    let dims = tensor.dims().to_vec();
    let rest: usize = dims.iter().skip(1).product();
    let pairs = tensor.reshape((heads, head_dim / 2, 2, rest))?;
    Ok(pairs.transpose(1, 2)?.contiguous()?.reshape(dims)?)
}

/// Finds the Llama 3.1 scaling that gives these frequency factors.
///
/// The file keeps only the factors, `[head_dim / 2]`: plain over scaled frequency. All published
/// models use the same bands, so the few candidates are tried; anything else is refused.
fn recognise_scaling(
    plain: Rope,
    factors: &[f32],
    head_dim: usize,
    context: Option<u64>,
) -> Result<Rope> {
    let largest = factors.iter().copied().fold(1.0_f32, f32::max);
    if factors.len() != head_dim / 2 {
        return Err(Error::run(format!(
            "rope_freqs.weight has {} factors, expected {}",
            factors.len(),
            head_dim / 2
        )));
    }
    if factors.iter().all(|factor| (factor - 1.0).abs() < 1e-6) {
        return Ok(plain);
    }
    let contexts = context.into_iter().chain([8192, 4096, 2048, 16384, 32768, 1024, 512, 256, 64]);
    for original in contexts {
        let scaling = Llama3Scaling {
            factor: f64::from(largest),
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: original as usize,
        };
        let candidate = Rope { scaling: Some(scaling), ..plain };
        let plain = plain.inverse_frequencies(head_dim);
        let scaled = candidate.inverse_frequencies(head_dim);
        let mut pairs = plain.iter().zip(&scaled).zip(factors);
        if pairs.all(|((plain, scaled), factor)| (plain / scaled - factor).abs() < 1e-3 * factor) {
            return Ok(candidate);
        }
    }
    Err(Error::run("rope_freqs.weight holds factors that are not Llama 3.1's scaling")
        .hint("load the original Hugging Face checkpoint instead"))
}
