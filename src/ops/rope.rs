//! Rotary position embedding (Su et al., 2021), half-split form as in Hugging Face's Llama.

use std::sync::Arc;
#[cfg(feature = "cuda")]
use std::sync::{Mutex, PoisonError};

#[cfg(feature = "cuda")]
use candle_core::CudaDevice;
use candle_core::{CpuStorage, CustomOp1, D, DType, Device, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::cpu;
#[cfg(feature = "cuda")]
use super::cuda::launch::{host::Sendable, tensor};

/// Cosines and sines of a forest's positions, shared by all blocks. Shape of each: `[T, E/2]`.
#[derive(Clone, Debug)]
pub struct Rotary {
    cos: Arc<Vec<f32>>,
    sin: Arc<Vec<f32>>,
    half: usize,
    #[cfg(feature = "cuda")]
    on_device: Arc<Mutex<OnDevice>>,
}

/// Cosines and sines on a device.
#[cfg(feature = "cuda")]
#[derive(Debug, Default)]
enum OnDevice {
    #[default]
    Not,
    Sendable([Sendable<f32>; 2]),
    /// On the device they were last requested for, f32.
    There([Tensor; 2]),
}

impl Rotary {
    /// Angles `position · frequency`, rounded to f32 as `transformers` does: at long positions that rounding is part of
    /// the values a model was trained with.
    pub fn new(frequencies: &[f32], positions: &[u32]) -> Self {
        let angles: Vec<f64> = positions
            .iter()
            .flat_map(|&position| {
                frequencies.iter().map(move |frequency| f64::from(position as f32 * frequency))
            })
            .collect();
        Self {
            cos: Arc::new(angles.iter().map(|angle| angle.cos() as f32).collect()),
            sin: Arc::new(angles.iter().map(|angle| angle.sin() as f32).collect()),
            half: frequencies.len(),
            #[cfg(feature = "cuda")]
            on_device: Arc::default(),
        }
    }

    /// Number of tokens, `T`.
    pub fn tokens(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    fn tensors(&self, device: &Device, dtype: DType) -> Result<[Tensor; 2]> {
        let table = |values: &[f32]| {
            Tensor::from_slice(values, (self.tokens(), 1, self.half), device)?.to_dtype(dtype)
        };
        Ok([table(&self.cos)?, table(&self.sin)?])
    }

    /// Cosines and sines on a device, `[T, E/2]`: copied once for all blocks.
    #[cfg(feature = "cuda")]
    fn on(&self, device: &Device) -> Result<[Tensor; 2]> {
        let (mut kept, shape) = (self.kept(), (self.tokens(), self.half));
        let tables = match std::mem::take(&mut *kept) {
            OnDevice::There(tables) if tables[0].device().same_device(device) => tables,
            OnDevice::Sendable(tables) => {
                let (cuda, [cos, sin]) = (device.as_cuda_device()?, tables);
                [tensor(cuda, cos.send(cuda)?, shape), tensor(cuda, sin.send(cuda)?, shape)]
            }
            _ => {
                let table = |values: &[f32]| Tensor::from_slice(values, shape, device);
                [table(&self.cos)?, table(&self.sin)?]
            }
        };
        *kept = OnDevice::There(tables.clone());
        Ok(tables)
    }

    #[cfg(feature = "cuda")]
    fn kept(&self) -> std::sync::MutexGuard<'_, OnDevice> {
        self.on_device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prepares them in page-locked memory, so that uploading them needs no synchronisation.
    ///
    /// # Errors
    /// A driver error.
    #[cfg(feature = "cuda")]
    pub(crate) fn stage(&self, device: &CudaDevice) -> Result<()> {
        let tables = [Sendable::new(device, &self.cos)?, Sendable::new(device, &self.sin)?];
        *self.kept() = OnDevice::Sendable(tables);
        Ok(())
    }
}

/// Rotates each head of each token by its position's angles.
///
/// # Shapes
/// - `x`: `[T, H, E]`  →  `[T, H, E]`
pub fn rope(x: &Tensor, rotary: &Rotary) -> Result<Tensor> {
    check(x, rotary)?;
    if x.device().is_cpu() && x.dtype() == DType::F32 {
        return x.contiguous()?.apply_op1(Rope { rotary: rotary.clone(), sign: 1.0 });
    }
    #[cfg(feature = "cuda")]
    if has_kernel(x) {
        return super::cuda::launch::rope::on_cuda(x, rotary.on(x.device())?);
    }
    plain(x, rotary)
}

/// [`rope`] in place, for memory that a graph would keep although it is not read again. On the CPU it copies.
///
/// On CUDA the storage of `x` must not be read afterwards: intended for the output of a product followed by `reshape`,
/// whose backward passes do not need it.
pub(crate) fn rope_in_place(x: &Tensor, rotary: &Rotary) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if has_kernel(x) {
        check(x, rotary)?;
        return super::cuda::launch::rope::in_place(x, rotary.on(x.device())?);
    }
    rope(x, rotary)
}

fn check(x: &Tensor, rotary: &Rotary) -> Result<()> {
    let (t, _, e) = x.dims3()?;
    if t != rotary.tokens() || e != 2 * rotary.half {
        candle_core::bail!(
            "rope of {} tokens, width {}, got {:?}",
            rotary.tokens(),
            2 * rotary.half,
            x.shape()
        );
    }
    Ok(())
}

#[cfg(feature = "cuda")]
fn has_kernel(x: &Tensor) -> bool {
    x.device().is_cuda() && matches!(x.dtype(), DType::F32 | DType::BF16) && x.elem_count() > 0
}

/// The plain form.
pub fn plain(x: &Tensor, rotary: &Rotary) -> Result<Tensor> {
    let half = rotary.half;
    let [cos, sin] = rotary.tensors(x.device(), x.dtype())?;
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let low = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let high = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[low, high], D::Minus1)
}

/// Rotates every head of `x`, `[T, H, E]`, in place; by the opposite angles if `sign` is -1.
pub(crate) fn rotate(x: &mut [f32], rotary: &Rotary, sign: f32) {
    let half = rotary.half;
    let row = x.len() / rotary.tokens().max(1);
    x.par_chunks_mut(row.max(1)).enumerate().with_min_len(16).for_each(|(token, x)| {
        let cos = &rotary.cos[token * half..][..half];
        let sin = &rotary.sin[token * half..][..half];
        for x in x.chunks_exact_mut(2 * half) {
            let (low, high) = x.split_at_mut(half);
            for i in 0..half {
                let (a, b, sin) = (low[i], high[i], sin[i] * sign);
                low[i] = a * cos[i] - b * sin;
                high[i] = b * cos[i] + a * sin;
            }
        }
    });
}

/// A rotation; its backward is the rotation by the opposite angles.
struct Rope {
    rotary: Rotary,
    sign: f32,
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut out = cpu::slice(x, layout)?.to_vec();
        rotate(&mut out, &self.rotary, self.sign);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, d_y: &Tensor) -> Result<Option<Tensor>> {
        let inverse = Self { rotary: self.rotary.clone(), sign: -self.sign };
        Ok(Some(d_y.contiguous()?.apply_op1(inverse)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear::tests::{gradients_agree, random};

    #[test]
    fn both_forms_agree() {
        let frequencies = [1.0, 0.1, 0.01];
        let rotary = Rotary::new(&frequencies, &[0, 1, 2, 1, 700]);
        gradients_agree(
            &[random(1, (5, 2, 6))],
            |x| rope(&x[0], &rotary),
            |x| plain(&x[0], &rotary),
        );
    }
}
