//! CPU kernels: rayon over rows, vector code dispatched at run time. With `cuda`, the only place for `unsafe`.

pub mod adamw;
pub mod alloc;
pub mod attention;
pub mod awake;
pub mod blocks;
mod board;
pub mod element;
#[cfg(target_arch = "x86_64")]
mod few;
#[cfg(all(test, unix))]
pub(in crate::ops) mod guard;
#[cfg(all(test, unix))]
mod guard_tests;
pub mod isa;
mod kernel;
pub mod matmul;
mod pack;
pub mod packed;
pub mod peak;
pub mod rows;
mod shuffle;
pub mod simd;
mod vector;

use std::cell::Cell;
use std::marker::PhantomData;

use candle_core::{CpuStorage, InplaceOp1, Layout, Storage, Tensor};

pub use element::Element;

/// The elements of a contiguous storage.
///
/// # Errors
/// Another dtype, or a non-contiguous layout; callers make tensors contiguous first.
pub fn slice<'a, E: Element>(
    storage: &'a CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a [E]> {
    let data = storage.as_slice::<E>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => candle_core::bail!(
            "a cpu kernel was given a strided tensor of shape {:?}",
            layout.shape()
        ),
    }
}

/// Calls `read` with the elements of a contiguous CPU tensor, without copying them.
pub fn with_slice<E: Element, R>(
    tensor: &Tensor,
    read: impl FnOnce(&[E]) -> R,
) -> candle_core::Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(read(slice(storage, layout)?)),
        _ => candle_core::bail!(
            "a cpu kernel was given a tensor on {:?}",
            tensor.device().location()
        ),
    }
}

/// Calls `write` with the elements of a contiguous CPU tensor; visible to all tensors that share its storage.
///
/// # Errors
/// Another dtype or device, or a non-contiguous layout.
pub fn with_slice_mut<E: Element, R>(
    tensor: &Tensor,
    write: impl FnOnce(&mut [E]) -> R,
) -> candle_core::Result<R> {
    let op = Write { once: Cell::new(Some(write)), result: Cell::new(None), elements: PhantomData };
    tensor.inplace_op1(&op)?;
    match op.result.take() {
        Some(result) => Ok(result),
        None => candle_core::bail!("a cpu kernel was given a tensor elsewhere"),
    }
}

/// Candle only gives write access to a storage through an op; this one runs once.
struct Write<F, R, E> {
    once: Cell<Option<F>>,
    result: Cell<Option<R>>,
    elements: PhantomData<E>,
}

impl<E: Element, R, F: FnOnce(&mut [E]) -> R> InplaceOp1 for Write<F, R, E> {
    fn name(&self) -> &'static str {
        "write"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        match (E::in_storage(storage), layout.contiguous_offsets(), self.once.take()) {
            (Some(data), Some((start, end)), Some(write)) => {
                self.result.set(Some(write(&mut data[start..end])));
                Ok(())
            }
            _ => candle_core::bail!(
                "a cpu kernel was given a tensor that is not contiguous {:?}",
                E::DTYPE
            ),
        }
    }
}
