//! The linear layer beside a frozen matrix that is not held densely (QLoRA; Dettmers et al., 2023): it is unpacked for the
//! moment of each product, forward and backward, and no graph keeps the dense form.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Storage, Tensor};

use super::cpu::blocks::Bits;
use super::linear::product;

/// A matrix `[O, I]` that becomes dense where it is asked to.
pub trait Unpack: Debug + Send + Sync {
    /// `(O, I)`.
    fn shape(&self) -> (usize, usize);

    /// The dense matrix on `device`, in `dtype`.
    ///
    /// # Errors
    /// The device's.
    fn tensor(&self, device: &Device, dtype: DType) -> Result<Tensor>;
}

/// What a packed matrix consists of.
#[derive(Clone, Copy, Debug)]
pub enum Parts<'a> {
    /// 4-bit NormalFloat with double quantisation.
    Nf4 {
        /// Two numbers a byte, the first in the high half.
        levels: &'a [u8],
        /// One a 64 numbers.
        scales: &'a [u8],
        /// One a 256 scales.
        scale_of_scales: &'a [f32],
        /// What is added to each scale.
        offset: f32,
        /// What a byte of `scales` means, and what a level means.
        tables: (&'a [f32; 256], &'a [f32; 16]),
    },
    /// Blocks of llama.cpp: 32 numbers with a scale, and a minimum or none, both in half precision.
    Blocks {
        /// Block after block.
        bytes: &'a [u8],
        /// Bits of a number.
        bits: Bits,
        /// Whether blocks have a minimum.
        minimum: bool,
    },
}

/// What a GPU holds of a packed matrix once it was asked for it; nothing in a build without the feature `cuda`.
#[derive(Debug, Default)]
pub struct OnGpu {
    #[cfg(feature = "cuda")]
    resident: std::sync::OnceLock<super::cuda::launch::unpack::Resident>,
}

impl OnGpu {
    /// Sends the parts of a matrix `[O, I]` to a GPU, if they are on none yet; nothing where `device` is none.
    ///
    /// # Errors
    /// The device's.
    pub fn place(
        &self,
        (shape, parts): ((usize, usize), Parts<'_>),
        device: &Device,
    ) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let (Device::Cuda(device), None) = (device, self.resident.get()) {
            let resident = super::cuda::launch::unpack::Resident::new(parts, shape, device)?;
            // Another thread may have been as quick: one of the two is let go.
            let _ = self.resident.set(resident);
        }
        let _ = (shape, parts, device);
        Ok(())
    }

    /// The dense matrix by a kernel; none where `device` is no GPU. The parts go there the first time.
    ///
    /// # Errors
    /// The device's; another GPU than the first time.
    pub fn dense(
        &self,
        whole: ((usize, usize), Parts<'_>),
        device: &Device,
        dtype: DType,
    ) -> Result<Option<Tensor>> {
        self.place(whole, device)?;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = device {
            return self.resident.get().map(|resident| resident.dense(device, dtype)).transpose();
        }
        let _ = dtype;
        Ok(None)
    }
}

/// `x · Wᵀ`, computed in `dtype`; the result is in the type of `x`, which alone has a gradient.
///
/// # Shapes
/// - `x`: `[T, I]`, `weight`: `[O, I]`  →  `[T, O]`
pub fn linear(x: &Tensor, weight: Arc<dyn Unpack>, dtype: DType) -> Result<Tensor> {
    let ((_, inner), (_, expected)) = (x.dims2()?, weight.shape());
    if inner != expected {
        let shape = weight.shape();
        candle_core::bail!("a linear layer of {shape:?} was given rows of width {inner}");
    }
    x.to_dtype(dtype)?.contiguous()?.apply_op1(Linear { weight })?.to_dtype(x.dtype())
}

/// The plain form: the graph keeps the dense matrix.
///
/// # Errors
/// The device's.
pub fn plain(x: &Tensor, weight: &dyn Unpack, dtype: DType) -> Result<Tensor> {
    let weight = weight.tensor(x.device(), dtype)?;
    x.to_dtype(dtype)?.matmul(&weight.t()?)?.to_dtype(x.dtype())
}

struct Linear {
    weight: Arc<dyn Unpack>,
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "linear-packed"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let weight = self.weight.tensor(&Device::Cpu, x.dtype())?;
        match &*weight.storage_and_layout().0 {
            Storage::Cpu(dense) => product((x, layout), (dense, weight.layout())),
            _ => candle_core::bail!("a matrix for the CPU was unpacked elsewhere"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let device = Device::Cuda(x.device().clone());
        let weight = self.weight.tensor(&device, x.dtype())?;
        match &*weight.storage_and_layout().0 {
            Storage::Cuda(dense) => product((x, layout), (dense, weight.layout())),
            _ => candle_core::bail!("a matrix for a GPU was unpacked elsewhere"),
        }
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, d_y: &Tensor) -> Result<Option<Tensor>> {
        let weight = self.weight.tensor(d_y.device(), d_y.dtype())?;
        Ok(Some(d_y.contiguous()?.matmul(&weight)?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::linear::tests::{gradients_agree, random};
    use super::*;

    /// Dense all the time, which an op does not know.
    #[derive(Debug)]
    struct Held(Tensor);

    impl Unpack for Held {
        fn shape(&self) -> (usize, usize) {
            (self.0.dims()[0], self.0.dims()[1])
        }

        fn tensor(&self, device: &Device, dtype: DType) -> Result<Tensor> {
            self.0.to_device(device)?.to_dtype(dtype)
        }
    }

    #[test]
    fn both_forms_agree_at_odd_shapes() {
        for (t, i, o) in [(1, 1, 1), (3, 5, 7), (17, 33, 9)] {
            let weight = Arc::new(Held(random(2, (o, i))));
            gradients_agree(
                &[random(1, (t, i))],
                |x| linear(&x[0], weight.clone(), DType::F32),
                |x| plain(&x[0], &*weight, DType::F32),
            );
        }
    }

    #[test]
    fn rows_of_another_width_are_refused() {
        let weight = Arc::new(Held(random(2, (5, 4))));
        let error = linear(&random(1, (2, 3)), weight, DType::F32).unwrap_err().to_string();
        assert!(error.contains("(5, 4) was given rows of width 3"), "{error}");
    }
}
