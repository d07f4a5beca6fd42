//! Safetensors files: read through a memory map into f32 tensors, written one tensor or piece at a time.
//!
//! Reading checks for errors that would later only show up as a strange loss: a truncated file, and non-finite values.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use super::Weights;
use crate::error::{Context, Error, Result};

/// A memory-mapped safetensors file whose header has not been checked.
pub(super) struct Mapped {
    map: Mmap,
}

impl Mapped {
    /// Maps the file.
    ///
    /// # Errors
    /// The file cannot be opened; the error names it.
    #[expect(unsafe_code, reason = "mapping a file is unsafe where another process truncates it")]
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).at(path.display())?;
        if file.metadata().at(path.display())?.len() == 0 {
            return Err(Error::run("the file is empty").at(path.display()));
        }
        // SAFETY: the map is read-only and private to this process, and checkpoints are replaced by
        // a rename, never rewritten in place.
        let map = unsafe { Mmap::map(&file) }.at(path.display())?;
        Ok(Self { map })
    }

    /// The whole file.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The file's header, checked against its length.
    ///
    /// # Errors
    /// A broken header, or a truncated file.
    pub(super) fn tensors(&self, path: &Path) -> Result<SafeTensors<'_>> {
        SafeTensors::deserialize(&self.map).map_err(|error| {
            Error::run(format!("not a whole safetensors file: {error}"))
                .because(error)
                .at(path.display())
                .hint("the file is truncated or damaged: copy or download it again")
        })
    }
}

/// Reads the named tensors of an open file as f32.
///
/// # Errors
/// A dtype other than f32, f16 or bf16, or a non-finite value: names file and tensor.
pub(super) fn read_tensors(
    path: &Path,
    tensors: &SafeTensors<'_>,
    names: &[&str],
    device: &Device,
) -> Result<Weights> {
    let read = |name: &&str| -> Result<(String, Tensor)> {
        let place = || format!("{}: tensor `{name}`", path.display());
        let view = tensors.tensor(name).map_err(Error::from).at(place())?;
        let values = to_f32(view.dtype(), view.data()).at(place())?;
        check_finite(&values).at(place())?;
        Ok(((*name).to_owned(), Tensor::from_vec(values, view.shape(), &Device::Cpu).at(place())?))
    };
    // The thread that computes with them sends them, since on a GPU each thread has its own stream. A few at a time, as
    // the host needs room for the pending ones.
    let at_once = if device.is_cpu() { names.len() } else { rayon::current_num_threads() };
    let mut weights = Weights::default();
    for names in names.chunks(at_once.max(1)) {
        for (name, tensor) in names.par_iter().map(read).collect::<Result<Vec<_>>>()? {
            let tensor = tensor.to_device(device)?;
            weights.insert(name, tensor);
        }
    }
    Ok(weights)
}

/// Reads every tensor of a safetensors file as f32, `name -> tensor`.
///
/// # Errors
/// As for a checkpoint's files: unreadable, truncated, of an unknown dtype, or non-finite.
pub fn read(path: &Path, device: &Device) -> Result<Weights> {
    let mapped = Mapped::open(path)?;
    let tensors = mapped.tensors(path)?;
    read_tensors(path, &tensors, &tensors.names(), device)
}

/// The metadata of a safetensors file.
///
/// # Errors
/// As [`read`].
pub(super) fn metadata(path: &Path) -> Result<HashMap<String, String>> {
    let mapped = Mapped::open(path)?;
    let (_, header) = SafeTensors::read_metadata(mapped.bytes()).at(path.display())?;
    Ok(header.metadata().clone().unwrap_or_default())
}

/// Stored values as f32.
///
/// # Errors
/// A dtype other than f32, f16 or bf16.
pub(super) fn to_f32(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>> {
    let halves = bytes.as_chunks().0.iter();
    match dtype {
        Dtype::F32 => {
            Ok(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
        }
        Dtype::F16 => Ok(halves.map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect()),
        Dtype::BF16 => Ok(halves.map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect()),
        other => Err(Error::run(format!("type {other:?}, expected F32, F16 or BF16"))
            .hint("quantised weights are not supported; load the original checkpoint")),
    }
}

/// A non-finite weight would spread to every output of the model, so it is reported here.
pub(super) fn check_finite(values: &[f32]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => {
            let count = values.iter().filter(|value| !value.is_finite()).count();
            Err(Error::run(format!(
                "{count} of {} weights are not finite, the first ({}) at index {index}",
                values.len(),
                values[index]
            ))
            .hint("the checkpoint is damaged or its training diverged; use an earlier one"))
        }
    }
}

/// Writes tensors as one safetensors file in `dtype` (f32, f16 or bf16), in name order.
///
/// # Errors
/// Another `dtype`, or an I/O error of the writer.
pub fn write(out: &mut dyn Write, weights: &BTreeMap<&str, &Tensor>, dtype: DType) -> Result<()> {
    write_with(out, weights, dtype, &[])
}

/// As [`write`], with metadata.
///
/// # Errors
/// As [`write`].
pub fn write_with(
    out: &mut dyn Write,
    weights: &BTreeMap<&str, &Tensor>,
    dtype: DType,
    texts: &[(&str, String)],
) -> Result<()> {
    let shapes = weights.iter().map(|(name, tensor)| (*name, tensor.dims()));
    write_header(out, shapes, dtype, texts)?;
    for (name, tensor) in weights {
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        out.write_all(&to_bytes(&values, dtype).at(format!("tensor `{name}`"))?)?;
    }
    Ok(())
}

/// Writes the header of a safetensors file of these tensors; their data must follow in this order.
///
/// # Errors
/// A `dtype` other than f32, f16 or bf16, or an I/O error of the writer.
pub(super) fn write_header<'a>(
    out: &mut dyn Write,
    tensors: impl Iterator<Item = (&'a str, &'a [usize])>,
    dtype: DType,
    texts: &[(&str, String)],
) -> Result<()> {
    let kind = match dtype {
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        other => {
            return Err(Error::usage(format!("cannot store weights as {}", other.as_str()))
                .hint("use float32, float16 or bfloat16"));
        }
    };
    let mut header = Map::new();
    // transformers refuses a file whose metadata does not name a framework format.
    let mut metadata = json!({"format": "pt"});
    for (key, text) in texts {
        metadata[key] = json!(text);
    }
    header.insert("__metadata__".to_owned(), metadata);
    let mut offset = 0;
    for (name, shape) in tensors {
        let end = offset + shape.iter().product::<usize>() * dtype.size_in_bytes();
        let entry = json!({"dtype": kind, "shape": shape, "data_offsets": [offset, end]});
        header.insert(name.to_owned(), entry);
        offset = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' '); // data is 8-byte aligned
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    Ok(())
}

/// Values in the storage dtype. Rejects values that are non-finite or overflow it, which would silently destroy the
/// model.
pub(super) fn to_bytes(values: &[f32], dtype: DType) -> Result<Vec<u8>> {
    check_finite(values)?;
    Ok(match dtype {
        DType::BF16 => {
            values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect()
        }
        DType::F16 => {
            check_f16(values)?;
            values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect()
        }
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    })
}

/// Rejects values that overflow f16.
pub(super) fn check_f16(values: &[f32]) -> Result<()> {
    /// Midpoint between the largest f16 and the next step: rounds to infinity.
    const INFINITE: f32 = 65_520.0;
    match values.iter().find(|value| value.abs() >= INFINITE) {
        None => Ok(()),
        Some(large) => Err(Error::run(format!("weight {large} is beyond what float16 holds"))
            .hint("store as bfloat16 or float32")),
    }
}
