//! A checkpoint for other programs: a GGUF file for llama.cpp, or a Hugging Face directory in another type.
//!
//! What was written is read back and compared with the model in memory before it gets its name: the same tokens, and
//! logits that are equal in f32 and within a stated bound otherwise.

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

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One file for llama.cpp.
    Gguf,
    /// A Hugging Face directory, in files of at most so many bytes.
    Safetensors(usize),
}

/// How numbers are stored. In quantised files norms and biases stay f32; the embedding and the head, which suffer most,
/// are `Q8_0` at least; matrices whose rows are no multiple of 32 are f16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// 32 bits.
    F32,
    /// 16 bits, IEEE.
    F16,
    /// 16 bits, bfloat.
    Bf16,
    /// Blocks of 32 numbers of 8 bits with a scale.
    Q8_0,
    /// Blocks of 32 numbers of 4 bits with a scale.
    Q4_0,
    /// Blocks of 32 numbers of 4 bits with a scale and a minimum.
    Q4_1,
}

impl Encoding {
    /// The encoding of a stored type.
    pub fn of(dtype: DType) -> Self {
        match dtype {
            DType::F16 => Self::F16,
            DType::BF16 => Self::Bf16,
            _ => Self::F32,
        }
    }

    /// Its name in file names and on the command line.
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

    /// The type of a safetensors file.
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

    /// The largest mean divergence from the model in memory that is let through, in nats a token. Rounding stays far
    /// below; rows in a wrong order, or a scale that is off, do not.
    fn most_divergence(self) -> f64 {
        match self {
            Self::F32 => 0.0,
            Self::F16 => 1e-3,
            Self::Bf16 | Self::Q8_0 => 0.05,
            Self::Q4_0 | Self::Q4_1 => 1.0,
        }
    }
}

/// How far what was written is from the model in memory.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Difference {
    /// Of any logit (or score, of a reward model).
    pub max_logit_difference: f64,
    /// `KL(memory ‖ file)` in nats a token, on average; 0 for reward models.
    pub kl: f64,
    /// Over how many tokens.
    pub tokens: usize,
}

/// Refuses a place that is taken.
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

/// Writes `checkpoint` to the new file or directory `to`, reads it back and compares. The model's weights are freed on
/// the way.
///
/// # Errors
/// `to` exists; a reward model, or a tokenizer that is not byte-level BPE, for GGUF; weights that the encoding cannot
/// hold; a file that reads back differently. Nothing is left behind then.
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
