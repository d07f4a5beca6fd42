//! llama.cpp's GGUF files: weights, configuration, tokenizer and chat template in one file.
//!
//! Weights are dequantised to f32, and get Hugging Face's names and row order ([`gguf_layout`](super::gguf_layout)).
//! Architectures other than `llama` and `qwen2` are refused by name.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{DType, Device, Tensor};
use serde_json::Map;

use super::config::{Architecture, Config, Family};
use super::gguf_layout::{
    ROPE_FACTORS, half_split, half_split_rows, hugging_face_name, rotary_heads,
};
use super::lora;
use super::packed::{BlockType, Packed, PackedWeights};
use super::rope::{Llama3Scaling, Rope};
use super::tensor_file::{self, Mapped};
use super::{Weights, params};
use crate::error::{Context, Error, Result};

/// An open GGUF file: its metadata, with tensors read on demand.
pub(super) struct Gguf {
    mapped: Mapped,
    content: Content,
}

impl Gguf {
    /// Opens the file and reads its metadata.
    ///
    /// # Errors
    /// Not a GGUF file, or a truncated one.
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

    /// An integer under `key`.
    pub(super) fn number(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Value::I32(n) => u64::try_from(*n).ok(),
            Value::I64(n) => u64::try_from(*n).ok(),
            value => value.to_u64().ok(),
        }
    }

    /// A string under `key`.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        Some(self.get(key)?.to_string().ok()?.as_str())
    }

    /// A list under `key`; empty if absent.
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

    /// The configuration described by metadata and tensors.
    ///
    /// # Errors
    /// An unsupported architecture or feature; missing keys.
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

    /// All ids that end a text, turn or message.
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
        if !self.content.tensor_infos.contains_key(ROPE_FACTORS) {
            return Ok(plain);
        }
        let factors = self.tensor(ROPE_FACTORS, &Device::Cpu)?.to_vec1::<f32>()?;
        let context = format!("{arch}.rope.scaling.original_context_length");
        recognise_scaling(plain, &factors, head_dim, self.number(&context))
    }

    /// One tensor, dequantised to f32.
    fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        let mut reader = Cursor::new(self.mapped.bytes());
        let quantised = self.content.tensor(&mut reader, name, device)?;
        Ok(quantised.dequantize(device)?.to_dtype(DType::F32)?)
    }

    /// The projections as stored, under the Hugging Face names of their weights. Rows of q and k are reordered to
    /// half-split block by block, without requantisation.
    ///
    /// # Errors
    /// A projection with an unsupported block type.
    pub(super) fn packed(&self, config: &Config) -> Result<PackedWeights> {
        let mut packed = PackedWeights::new();
        for (name, info) in &self.content.tensor_infos {
            let Some(renamed) = hugging_face_name(name).filter(|name| lora::is_projection(name))
            else {
                continue;
            };
            let kind = BlockType::of(info.ggml_dtype).ok_or_else(|| {
                Error::usage(format!(
                    "`{name}` is {:?}, expected Q4_0, Q4_1 or Q8_0",
                    info.ggml_dtype
                ))
                .at("`quantization` = \"gguf\"")
                .hint("take a file in one of these types, or quantization = \"nf4\"")
            })?;
            let shape = info.shape.dims2()?;
            let row = kind.row_bytes(shape.1);
            let start = (self.content.tensor_data_offset + info.offset) as usize;
            let bytes = &self.mapped.bytes()[start..][..shape.0 * row];
            let rows = match rotary_heads(&renamed, config) {
                Some(_) => half_split_rows(bytes, row, config.head_dim),
                None => bytes.to_vec(),
            };
            packed.insert(renamed, Arc::new(Packed::blocks(kind, shape, rows)?));
        }
        Ok(packed)
    }

    /// Parameters by Hugging Face name, with their names and shapes in the file.
    ///
    /// # Errors
    /// A tensor that does not belong to this kind of model.
    pub(super) fn parameters(&self) -> Result<BTreeMap<String, (&str, &[usize])>> {
        let infos = self.content.tensor_infos.iter().filter(|(name, _)| *name != ROPE_FACTORS);
        let renamed = infos.map(|(name, info)| {
            let renamed = hugging_face_name(name)
                .ok_or_else(|| Error::run(format!("unexpected tensor `{name}`")))?;
            Ok((renamed, (name.as_str(), info.shape.dims())))
        });
        renamed.collect()
    }

    /// One parameter in f32, with rows in Hugging Face's order.
    ///
    /// # Errors
    /// Names the tensor: damaged, or with non-finite values.
    pub(super) fn parameter(
        &self,
        config: &Config,
        (renamed, name): (&str, &str),
    ) -> Result<Tensor> {
        let read = || {
            let tensor = self.tensor(name, &Device::Cpu)?;
            tensor_file::check_finite(&tensor.flatten_all()?.to_vec1::<f32>()?)?;
            match rotary_heads(renamed, config) {
                Some(heads) => half_split(&tensor, heads, config.head_dim),
                None => Ok(tensor),
            }
        };
        read().at(format!("tensor `{name}`"))
    }

    /// All weights under their Hugging Face names, f32, checked against `config`.
    ///
    /// # Errors
    /// Missing, unexpected or wrongly shaped tensors; non-finite values.
    pub(super) fn weights(&self, config: &Config, device: &Device) -> Result<Weights> {
        let mut weights = Weights::new();
        for (renamed, (name, _)) in self.parameters()? {
            let tensor = self.parameter(config, (&renamed, name))?.to_device(device)?;
            weights.insert(renamed, tensor);
        }
        params::check(config, &weights)?;
        Ok(weights)
    }
}

/// A file's projections as stored, see [`Gguf::packed`].
///
/// # Errors
/// As [`Gguf::open`], and unsupported block types.
pub(super) fn packed(path: &Path) -> Result<PackedWeights> {
    let gguf = Gguf::open(path)?;
    let read = || gguf.packed(&gguf.config()?);
    read().at(path.display())
}

/// An alignment of zero would cause a division by zero in the reader.
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

/// An f32 as its shortest decimal: 1e-5 instead of 0.000009999999747378752.
fn short(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}

/// Finds the Llama 3.1 scaling that gives these frequency factors.
///
/// The file stores only the factors, `[head_dim / 2]`: plain over scaled frequency. All published models use the same
/// bands, so the few candidates are tried; anything else is refused.
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
