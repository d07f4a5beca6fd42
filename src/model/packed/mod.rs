//! Quantised frozen projections (QLoRA; Dettmers et al., 2023): 4-bit NormalFloat with double quantisation, and a GGUF
//! file's blocks as stored.
//!
//! A quantised matrix is never trained. It is dequantised only for the duration of a product, so at most one projection
//! is dense at a time, and forward and backward are exactly the products with the dequantised values: unlike Candle's
//! `QMatMul`, which passes no gradient.

mod blocks;
mod nf4;

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

pub use blocks::BlockType;
use nf4::Nf4;

use super::source::Source;
use super::{Weights, gguf, lora};
use crate::error::{Error, Result};
use crate::ops::cpu::blocks::BlockMatrix;
use crate::ops::cpu::{self, Element};
use crate::ops::unpack::{OnGpu, Parts, Unpack};

/// Blocks per task: fixed, so that results do not depend on the number of threads.
const TASK: usize = 256;

/// Quantisation of frozen projections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// Dense, in the compute dtype.
    #[default]
    None,
    /// NF4 with double quantisation: 4.13 bits per weight.
    Nf4,
    /// The blocks of the model's GGUF file: Q4_0, Q4_1 or Q8_0.
    Gguf,
}

impl Quantization {
    /// Name in recipes and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Nf4 => "nf4",
            Self::Gguf => "gguf",
        }
    }

    /// Bytes per weight, if not dense. For GGUF, whose types are unknown here, Q4_1 is assumed.
    pub fn bytes(self) -> Option<f64> {
        match self {
            Self::None => None,
            Self::Nf4 => Some(0.5 + 1.0 / 64.0 + 4.0 / (64.0 * 256.0)),
            Self::Gguf => Some(BlockType::Q4_1.bytes() as f64 / blocks::LEN as f64),
        }
    }
}

/// Quantised projections by the names of their weights.
pub type PackedWeights = BTreeMap<String, Arc<Packed>>;

/// Removes the projections from a model's weights one by one and quantises them, except those of the modules `in_full`,
/// which will be trained. `source`: the model's source; a GGUF file's blocks are kept.
///
/// # Errors
/// `gguf` for a model from another source, or with unsupported block types.
pub fn pack(
    weights: &mut Weights,
    kind: Quantization,
    source: &Source,
    in_full: &[String],
) -> Result<PackedWeights> {
    let is_frozen = |name: &&String| lora::is_projection(name) && !lora::trains(in_full, name);
    let names: Vec<String> = weights.keys().filter(is_frozen).cloned().collect();
    match (kind, source) {
        (Quantization::None, _) => Ok(PackedWeights::new()),
        (Quantization::Nf4, _) => names
            .into_iter()
            .filter_map(|name| weights.remove_entry(&name))
            .map(|(name, weight)| Ok((name, Arc::new(Packed::nf4(&weight)?))))
            .collect(),
        (Quantization::Gguf, source) => {
            let packed = of_file(source, in_full)?;
            weights.retain(|name, _| !packed.contains_key(name));
            Ok(packed)
        }
    }
}

/// A GGUF file's projections as stored, except those of the modules `in_full`.
///
/// # Errors
/// A model that is not a GGUF file, or has unsupported block types.
pub(super) fn of_file(source: &Source, in_full: &[String]) -> Result<PackedWeights> {
    match source {
        Source::Gguf(path) => {
            let mut packed = gguf::packed(path)?;
            packed.retain(|name, _| !lora::trains(in_full, name));
            Ok(packed)
        }
        Source::Directory(path) => {
            Err(Error::usage("`quantization` is gguf, the model is a directory")
                .at(path.display())
                .hint("give a .gguf file, or quantization = \"nf4\""))
        }
    }
}

/// Quantises a matrix to blocks as llama.cpp does, for integer products.
///
/// # Errors
/// As [`Packed::rounded`].
pub fn block_matrix(weight: &Tensor, kind: BlockType) -> Result<BlockMatrix> {
    Packed::rounded(weight, kind)?.block_matrix()
}

/// A quantised matrix `[O, I]`, row-major.
#[derive(Debug)]
pub struct Packed {
    rows: usize,
    cols: usize,
    form: Form,
    on_gpu: OnGpu,
}

#[derive(Debug)]
enum Form {
    Nf4(Nf4),
    Blocks(BlockType, Vec<u8>),
}

impl Packed {
    /// Quantises a matrix to NF4.
    ///
    /// # Errors
    /// A tensor that is not a matrix or not f32.
    pub fn nf4(weight: &Tensor) -> Result<Self> {
        let (rows, cols) = weight.dims2()?;
        let weight = weight.to_device(&Device::Cpu)?.contiguous()?;
        let form = Form::Nf4(cpu::with_slice(&weight, Nf4::pack)?);
        Ok(Self { rows, cols, form, on_gpu: OnGpu::default() })
    }

    /// Quantises a matrix to blocks as llama.cpp does.
    ///
    /// # Errors
    /// A tensor that is not a matrix, rows that are not a whole number of blocks, a device error.
    pub fn rounded(weight: &Tensor, kind: BlockType) -> Result<Self> {
        let shape = weight.dims2()?;
        if !shape.1.is_multiple_of(blocks::LEN) {
            return Err(Error::usage(format!(
                "rows of {} weights, {kind:?} has blocks of {}",
                shape.1,
                blocks::LEN
            ))
            .hint("quantization = \"none\""));
        }
        let weight = weight.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let rounded = QTensor::quantize(&weight, kind.dtype())?;
        Self::blocks(kind, shape, rounded.data()?.into_owned())
    }

    /// Wraps the blocks of a GGUF file, whose rows are whole numbers of blocks.
    ///
    /// # Errors
    /// A byte count that does not match the shape; rows that end within a block.
    pub fn blocks(kind: BlockType, shape: (usize, usize), bytes: Vec<u8>) -> Result<Self> {
        let (rows, cols) = shape;
        let expected = rows * (cols / blocks::LEN) * kind.bytes();
        if !cols.is_multiple_of(blocks::LEN) || bytes.len() != expected {
            return Err(Error::run(format!(
                "{} bytes of {kind:?} for shape [{rows}, {cols}], expected {expected}",
                bytes.len()
            )));
        }
        Ok(Self { rows, cols, form: Form::Blocks(kind, bytes), on_gpu: OnGpu::default() })
    }

    /// `(O, I)`.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        match &self.form {
            Form::Nf4(nf4) => nf4.bytes(),
            Form::Blocks(_, bytes) => bytes.len(),
        }
    }

    /// All values, row-major.
    pub fn unpack<E: Element>(&self) -> Vec<E> {
        let len = match &self.form {
            Form::Nf4(_) => nf4::LEN,
            Form::Blocks(..) => blocks::LEN,
        };
        let mut out = vec![E::default(); self.rows * self.cols];
        out.par_chunks_mut(TASK * len).enumerate().for_each(|(task, out)| {
            let mut numbers = [0.0; nf4::LEN];
            for (index, out) in out.chunks_mut(len).enumerate() {
                let numbers = &mut numbers[..out.len()];
                self.unpack_block(task * TASK + index, numbers);
                E::round_into(out, numbers);
            }
        });
        out
    }

    fn unpack_block(&self, index: usize, out: &mut [f32]) {
        match &self.form {
            Form::Nf4(nf4) => nf4.unpack(index, out),
            Form::Blocks(kind, bytes) => {
                let size = kind.bytes();
                kind.unpack(&bytes[index * size..][..size], out);
            }
        }
    }

    /// The same matrix for integer products.
    ///
    /// # Errors
    /// NF4, whose values are not integer multiples of a scale.
    pub fn block_matrix(&self) -> Result<BlockMatrix> {
        let Form::Blocks(kind, bytes) = &self.form else {
            return Err(Error::usage("NF4 has no products of integers"));
        };
        let (size, blocks) = (kind.bytes(), self.cols / blocks::LEN);
        Ok(BlockMatrix::new((self.rows, self.cols), kind.bits(), |row, index| {
            kind.block(&bytes[(row * blocks + index) * size..][..size])
        }))
    }

    /// Sends the blocks to the device where the matrix will be used, if that is a GPU.
    ///
    /// # Errors
    /// A device error.
    pub fn place(&self, device: &Device) -> Result<()> {
        Ok(self.on_gpu.place((self.shape(), self.parts()), device)?)
    }

    fn parts(&self) -> Parts<'_> {
        match &self.form {
            Form::Nf4(nf4) => nf4.parts(),
            Form::Blocks(kind, bytes) => {
                Parts::Blocks { bytes, bits: kind.bits(), minimum: kind.has_minimum() }
            }
        }
    }
}

impl Unpack for Packed {
    fn shape(&self) -> (usize, usize) {
        self.shape()
    }

    fn tensor(&self, device: &Device, dtype: DType) -> candle_core::Result<Tensor> {
        let whole = (self.shape(), self.parts());
        if let Some(dense) = self.on_gpu.dense(whole, device, dtype)? {
            return Ok(dense);
        }
        let dense = Tensor::from_vec(self.unpack::<f32>(), self.shape(), &Device::Cpu)?;
        dense.to_dtype(dtype)?.to_device(device)
    }
}
