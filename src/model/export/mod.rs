//! Exports a checkpoint for other programs: a GGUF file for llama.cpp, or a Hugging Face directory in another dtype.
//!
//! The output is read back and compared with the in-memory model before it gets its final name: same tokens, and logits
//! equal in f32 or otherwise within a stated bound.

mod check;
mod gguf;
mod gguf_vocabulary;
#[cfg(test)]
mod tests;

use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device};
use serde::Serialize;

use super::checkpoint::Checkpoint;
use super::save::SaveOptions;
use crate::error::{Error, Result};
use crate::store::{self, AtomicDir};
use check::Reading;

/// Output format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One file for llama.cpp.
    Gguf,
    /// A Hugging Face directory, in files of at most this many bytes.
    Safetensors(usize),
}

/// Storage format of values. In quantised files norms and biases stay f32; embedding and head, the most sensitive, are
/// at least `Q8_0`; matrices whose row length is not a multiple of 32 are f16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// 32 bits.
    F32,
    /// 16 bits, IEEE.
    F16,
    /// 16 bits, bfloat.
    Bf16,
    /// Blocks of 32 8-bit values with a scale.
    Q8_0,
    /// Blocks of 32 4-bit values with a scale.
    Q4_0,
    /// Blocks of 32 4-bit values with a scale and a minimum.
    Q4_1,
}

impl Encoding {
    /// The encoding of a stored dtype.
    pub fn of(dtype: DType) -> Self {
        match dtype {
            DType::F16 => Self::F16,
            DType::BF16 => Self::Bf16,
            _ => Self::F32,
        }
    }

    /// Name in file names and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
        }
    }

    /// Dtype in a safetensors file.
    fn dtype(self) -> Result<DType> {
        match self {
            Self::F32 => Ok(DType::F32),
            Self::F16 => Ok(DType::F16),
            Self::Bf16 => Ok(DType::BF16),
            quantised => Err(Error::usage(format!(
                "safetensors in {}, expected f32, f16 or bf16",
                quantised.name()
            ))
            .hint("quantised weights need --format gguf")),
        }
    }

    fn ggml(self) -> GgmlDType {
        match self {
            Self::F32 => GgmlDType::F32,
            Self::F16 => GgmlDType::F16,
            Self::Bf16 => GgmlDType::BF16,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4_1 => GgmlDType::Q4_1,
        }
    }

    /// Largest accepted mean KL divergence from the in-memory model, in nats per token. Rounding stays far below it;
    /// misordered rows or a wrong scale do not.
    fn most_divergence(self) -> f64 {
        match self {
            Self::F32 => 0.0,
            Self::F16 => 1e-3,
            Self::Bf16 | Self::Q8_0 => 0.05,
            Self::Q4_0 | Self::Q4_1 => 1.0,
        }
    }
}

/// Difference between the written and the in-memory model.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Difference {
    /// Maximum over all logits (scores, for a reward model).
    pub max_logit_difference: f64,
    /// Mean `KL(memory ‖ file)`, in nats per token; 0 for reward models.
    pub kl: f64,
    /// Number of tokens compared.
    pub tokens: usize,
}

/// Rejects an existing path.
///
/// # Errors
/// `to` exists.
pub fn check_new(to: &Path) -> Result<()> {
    if to.exists() {
        return Err(Error::usage("exists already")
            .at(to.display())
            .hint("give the name of a new file or directory"));
    }
    Ok(())
}

/// Writes `checkpoint` to the new file or directory `to`, reads it back and compares. Frees the model's weights on the
/// way.
///
/// # Errors
/// `to` exists; a reward model, or a tokenizer that is not byte-level BPE, for GGUF; weights the encoding cannot
/// represent; a file that reads back differently. Nothing is left behind on error.
pub fn export(
    checkpoint: Checkpoint,
    to: &Path,
    format: Format,
    encoding: Encoding,
) -> Result<Difference> {
    check_new(to)?;
    let live = Reading::of(&checkpoint)?;
    let building = AtomicDir::create(to)?;
    let (written, back) = match format {
        Format::Safetensors(shard_bytes) => {
            let options = SaveOptions { dtype: encoding.dtype()?, shard_bytes };
            let dir = building.path().join("checkpoint");
            store::create_dir(&dir)?;
            checkpoint.write_into(&dir, &options)?;
            drop(checkpoint);
            let back = Checkpoint::load_dir(&dir, &Device::Cpu)?;
            (dir, back)
        }
        Format::Gguf => {
            let path = building.path().join("model.gguf");
            let name = to.file_stem().unwrap_or_default().to_string_lossy();
            gguf::write(checkpoint, &path, (&name, encoding))?;
            let back = Checkpoint::load_gguf(&path, &Device::Cpu)?;
            (path, back)
        }
    };
    let difference = live.compare(&back, encoding)?;
    store::move_into_place(&written, to)?;
    Ok(difference)
}
