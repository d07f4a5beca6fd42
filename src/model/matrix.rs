//! A projection's weight in memory.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::packed::Packed;
use crate::error::Result;
use crate::ops::cpu::matmul::Mat;
use crate::ops::cpu::{self, Element};
use crate::ops::linear;
use crate::ops::unpack::{self, Unpack};

/// A matrix `[O, I]`. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Matrix {
    /// Floating point; a variable if trained.
    Dense(Tensor),
    /// Quantised in blocks; never trained.
    Packed(Arc<Packed>),
}

impl Matrix {
    /// `(O, I)`.
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Self::Dense(tensor) => (tensor.dims()[0], tensor.dims()[1]),
            Self::Packed(packed) => packed.shape(),
        }
    }

    /// Whether gradients are required.
    pub fn is_trained(&self) -> bool {
        matches!(self, Self::Dense(tensor) if tensor.is_variable())
    }

    /// Calls `read` with the values, on the CPU.
    ///
    /// # Errors
    /// A dense matrix of another dtype or on another device.
    pub fn with<E: Element, R>(&self, read: impl FnOnce(Mat<'_, E>) -> R) -> Result<R> {
        let (rows, cols) = self.shape();
        match self {
            Self::Dense(tensor) => {
                Ok(cpu::with_slice(tensor, |data| read(Mat::new(data, rows, cols)))?)
            }
            Self::Packed(packed) => Ok(read(Mat::new(&packed.unpack::<E>(), rows, cols))),
        }
    }

    /// Sum of squares of each row, `[O]`.
    ///
    /// # Errors
    /// A device error.
    pub fn row_squares(&self) -> Result<Arc<[f64]>> {
        let dense = self.tensor(&Device::Cpu, DType::F32)?.detach();
        let squares = dense.to_dtype(DType::F64)?.sqr()?.sum(1)?;
        Ok(squares.to_vec1::<f64>()?.into())
    }

    /// `x · Wᵀ` as a graph op; for a quantised matrix, in `dtype`. Shapes: `[T, I] -> [T, O]`.
    ///
    /// # Errors
    /// A device error.
    pub fn linear(&self, x: &Tensor, dtype: DType) -> candle_core::Result<Tensor> {
        match self {
            Self::Dense(weight) => linear(x, weight, None),
            Self::Packed(packed) => unpack::linear(x, packed.clone(), dtype),
        }
    }

    /// The dense tensor: as is, or dequantised on `device` in `dtype`.
    ///
    /// # Errors
    /// A device error.
    pub fn tensor(&self, device: &Device, dtype: DType) -> candle_core::Result<Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor.clone()),
            Self::Packed(packed) => packed.tensor(device, dtype),
        }
    }
}
