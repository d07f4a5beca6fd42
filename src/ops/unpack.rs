//! The linear layer with a frozen quantised matrix (QLoRA; Dettmers et al., 2023): it is dequantised for each product,
//! forward and backward, and no graph keeps the dense form.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Storage, Tensor};

use super::cpu::blocks::Bits;
use super::linear::product;

/// A matrix `[O, I]` that is dequantised on request.
pub trait Unpack: Debug + Send + Sync {
    /// `(O, I)`.
    fn shape(&self) -> (usize, usize);

    /// The dense matrix on `device`, in `dtype`.
    ///
    /// # Errors
    /// A device error.
    fn tensor(&self, device: &Device, dtype: DType) -> Result<Tensor>;
}

/// Contents of a quantised matrix.
#[derive(Clone, Copy, Debug)]
pub enum Parts<'a> {
    /// 4-bit NormalFloat with double quantisation.
    Nf4 {
        /// Two values per byte, the first in the high nibble.
        levels: &'a [u8],
        /// One per 64 values.
        scales: &'a [u8],
        /// One per 256 scales.
        scale_of_scales: &'a [f32],
        /// Added to each scale.
        offset: f32,
        /// Values of the codes in `scales`, and of the levels.
        tables: (&'a [f32; 256], &'a [f32; 16]),
    },
    /// llama.cpp's blocks: 32 values with a scale and optionally a minimum, both in half precision.
    Blocks {
        /// The blocks, contiguous.
        bytes: &'a [u8],
        /// Bits per value.
        bits: Bits,
        /// Whether blocks have a minimum.
        minimum: bool,
    },
}

/// A GPU's copy of a quantised matrix, made on first use; empty in a build without the feature `cuda`.
#[derive(Debug, Default)]
pub struct OnGpu {
    #[cfg(feature = "cuda")]
    resident: std::sync::OnceLock<super::cuda::launch::unpack::Resident>,
}

impl OnGpu {
    /// Uploads a matrix `[O, I]` to a GPU, unless it is already on one; a no-op if `device` is not a GPU.
    ///
    /// # Errors
    /// A device error.
    pub fn place(
        &self,
        (shape, parts): ((usize, usize), Parts<'_>),
        device: &Device,
    ) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let (Device::Cuda(device), None) = (device, self.resident.get()) {
            let resident = super::cuda::launch::unpack::Resident::new(parts, shape, device)?;
            // Another thread may have done the same meanwhile; one of the two copies is dropped.
            let _ = self.resident.set(resident);
        }
        let _ = (shape, parts, device);
        Ok(())
    }

    /// Dequantises with a kernel; `None` if `device` is not a GPU. Uploads the parts on first use.
    ///
    /// # Errors
    /// A device error; a different GPU than on first use.
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

/// `x · Wᵀ`, computed in `dtype`; the result has the dtype of `x`. Only `x` has a gradient.
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
/// A device error.
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

    /// Always dense, unknown to the op.
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
    fn rows_of_the_wrong_width_are_refused() {
        let weight = Arc::new(Held(random(2, (5, 4))));
        let error = linear(&random(1, (2, 3)), weight, DType::F32).unwrap_err().to_string();
        assert!(error.contains("(5, 4) was given rows of width 3"), "{error}");
    }
}
