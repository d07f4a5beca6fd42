//! A language model as a GGUF file, with the metadata and tensors required by llama.cpp.

use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::Encoding;
use super::gguf_vocabulary;
use crate::error::{Context, Error, Result};
use crate::model::checkpoint::Checkpoint;
use crate::model::config::{Architecture, Config};
use crate::model::gguf_layout::{ROPE_FACTORS, gguf_name, interleaved, rotary_heads};
use crate::model::params::{EMBEDDING, HEAD};
use crate::model::tensor_file;
use crate::store;

/// Keys with their values, in the order of the file.
pub(super) type Metadata = Vec<(String, Value)>;

/// Writes the file. Each weight is freed once written.
pub(super) fn write(
    checkpoint: Checkpoint,
    path: &Path,
    (name, encoding): (&str, Encoding),
) -> Result<()> {
    let config = &checkpoint.config;
    if config.architecture != Architecture::CausalLm {
        return Err(Error::usage("a reward model, for which llama.cpp has no form")
            .hint("export it with --format safetensors"));
    }
    let mut metadata = metadata(config, name, encoding);
    metadata.extend(gguf_vocabulary::metadata(&checkpoint)?);
    let mut tensors = Vec::new();
    if let Some(factors) = config.rope.factors(config.head_dim) {
        let factors = Tensor::new(factors, &Device::Cpu)?;
        tensors.push((ROPE_FACTORS.to_owned(), QTensor::quantize(&factors, GgmlDType::F32)?));
    }
    for (name, tensor) in checkpoint.weights {
        let place = || format!("tensor `{name}`");
        let renamed =
            gguf_name(&name).ok_or_else(|| Error::run("GGUF has no name for it").at(place()))?;
        tensors.push((renamed, stored(config, &name, &tensor, encoding).at(place())?));
    }
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    store::write_atomic_with(path, |out| Ok(gguf_file::write(out, &metadata, &tensors)?))
}

/// A parameter in its file form: rows in the file's order, in the encoding or the closest supported one.
fn stored(config: &Config, name: &str, tensor: &Tensor, encoding: Encoding) -> Result<QTensor> {
    let tensor = match rotary_heads(name, config) {
        Some(heads) => interleaved(tensor, heads, config.head_dim)?,
        None => tensor.clone(),
    };
    let dtype = encoding_of(name, tensor.dims(), encoding);
    if dtype == GgmlDType::F16 {
        tensor_file::check_f16(&tensor.flatten_all()?.to_vec1::<f32>()?)?;
    }
    Ok(QTensor::quantize(&tensor.to_device(&Device::Cpu)?, dtype)?)
}

fn encoding_of(name: &str, shape: &[usize], encoding: Encoding) -> GgmlDType {
    let &[_, row] = shape else { return GgmlDType::F32 };
    let wanted = match encoding {
        Encoding::Q4_0 | Encoding::Q4_1 if name == EMBEDDING || name == HEAD => GgmlDType::Q8_0,
        encoding => encoding.ggml(),
    };
    if row.is_multiple_of(wanted.block_size()) { wanted } else { GgmlDType::F16 }
}

fn metadata(config: &Config, name: &str, encoding: Encoding) -> Metadata {
    let arch = config.family.model_type();
    let size = |size: usize| Value::U32(size as u32);
    // llama.cpp's ids for files that are mostly of one type.
    let file_type = match encoding {
        Encoding::F32 => 0,
        Encoding::F16 => 1,
        Encoding::Q4_0 => 2,
        Encoding::Q4_1 => 3,
        Encoding::Q8_0 => 7,
        Encoding::Bf16 => 32,
    };
    let mut metadata = vec![
        ("general.architecture".to_owned(), Value::String(arch.to_owned())),
        ("general.name".to_owned(), Value::String(name.to_owned())),
        ("general.file_type".to_owned(), Value::U32(file_type)),
        ("general.quantization_version".to_owned(), Value::U32(2)),
    ];
    let mut put = |key: &str, value: Value| metadata.push((format!("{arch}.{key}"), value));
    put("block_count", size(config.num_hidden_layers));
    put("context_length", size(config.max_position_embeddings));
    put("embedding_length", size(config.hidden_size));
    put("feed_forward_length", size(config.intermediate_size));
    put("attention.head_count", size(config.num_attention_heads));
    put("attention.head_count_kv", size(config.num_key_value_heads));
    put("attention.key_length", size(config.head_dim));
    put("attention.value_length", size(config.head_dim));
    put("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32));
    put("rope.dimension_count", size(config.head_dim));
    put("rope.freq_base", Value::F32(config.rope.theta as f32));
    if let Some(scaling) = config.rope.scaling {
        let context = size(scaling.original_max_position_embeddings);
        put("rope.scaling.original_context_length", context);
    }
    put("vocab_size", size(config.vocab_size));
    metadata
}
