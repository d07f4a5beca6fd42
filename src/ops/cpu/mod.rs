//! CPU kernels: rayon over rows, vector code chosen at run time. With `cuda`, the only place for `unsafe`.

pub mod alloc;
pub mod attention;
#[cfg(all(test, unix))]
mod guard;
#[cfg(all(test, unix))]
mod guard_tests;
pub mod isa;
mod kernel;
pub mod matmul;
mod pack;
pub mod peak;
pub mod rows;
pub mod simd;
mod vector;

use candle_core::{CpuStorage, Layout, Storage, Tensor};

/// The elements of a contiguous f32 storage.
///
/// # Errors
/// Another dtype, or a layout with gaps: callers make tensors contiguous first.
pub fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let data = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => candle_core::bail!(
            "a cpu kernel was given a strided tensor of shape {:?}",
            layout.shape()
        ),
    }
}

/// Calls `read` with the elements of a contiguous f32 CPU tensor, without copying them.
pub fn with_slice<R>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> R) -> candle_core::Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(read(slice(storage, layout)?)),
        _ => candle_core::bail!(
            "a cpu kernel was given a tensor on {:?}",
            tensor.device().location()
        ),
    }
}

/// The elements of a contiguous f32 storage, for writing.
///
/// # Errors
/// As for [`slice`].
pub fn slice_mut<'a>(
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((start, end))) => Ok(&mut data[start..end]),
        _ => candle_core::bail!("a cpu kernel was given a tensor that is not contiguous f32"),
    }
}
