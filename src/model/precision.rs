//! The compute dtype of a model.

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::{Weights, params::SCORE};
use crate::error::{Error, Result};
use crate::ops::cuda::device::has_bf16;

/// A floating-point format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit.
    #[default]
    #[serde(alias = "float32")]
    F32,
    /// bfloat16.
    #[serde(alias = "bfloat16")]
    Bf16,
    /// IEEE half.
    #[serde(alias = "float16")]
    F16,
}

impl Precision {
    /// Candle's dtype.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }

    /// Rejects formats that are not supported for computation. (They may be used for saving.)
    ///
    /// # Errors
    /// Names the key and the supported values.
    pub fn check_compute(self) -> Result<()> {
        match self {
            Self::F32 | Self::Bf16 => Ok(()),
            Self::F16 => Err(Error::usage("`dtype` is f16, expected f32 or bf16")
                .hint("sums of f16 overflow; bf16 has the range of f32")),
        }
    }

    /// Compute dtype of a parameter: this format for matrices; f32 for norms, biases and the score head, which are
    /// small and sensitive.
    pub fn of(self, name: &str, tensor: &Tensor) -> DType {
        if tensor.rank() == 2 && name != SCORE { self.dtype() } else { DType::F32 }
    }

    /// Casts weights to their compute dtypes, see [`of`](Self::of). Each tensor is freed in turn if nothing else owns
    /// it; one that already has its dtype is shared, not copied.
    ///
    /// # Errors
    /// An unsupported compute dtype, in general or on this device.
    pub fn cast(self, weights: Weights) -> Result<Weights> {
        let cast = |(name, tensor): (String, Tensor)| {
            self.check_device(tensor.device())?;
            let cast = tensor.to_dtype(self.of(&name, &tensor))?;
            Ok((name, cast))
        };
        weights.into_iter().map(cast).collect()
    }

    /// # Errors
    /// A format that is not supported on this device.
    pub(crate) fn check_device(self, device: &Device) -> Result<()> {
        self.check_compute()?;
        if self == Self::F32 || device.is_cpu() || has_bf16(device) {
            return Ok(());
        }
        Err(Error::usage("`dtype` is bf16, which this device does not compute with").hint(
            "set dtype = \"f32\" or device = \"cpu\"; GPUs have it from an A100 or an RTX 30 on",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_are_rounded_and_norms_and_score_heads_are_not() {
        let tensor = |shape: &[usize]| Tensor::full(1.000_1_f32, shape, &Device::Cpu).unwrap();
        let weights = Weights::from([
            ("a.weight".to_owned(), tensor(&[2, 3])),
            ("norm.weight".to_owned(), tensor(&[3])),
            (SCORE.to_owned(), tensor(&[1, 3])),
        ]);
        let cast = Precision::Bf16.cast(weights.clone()).unwrap();
        let types: Vec<DType> = cast.values().map(Tensor::dtype).collect();
        assert_eq!(types, [DType::BF16, DType::F32, DType::F32]);
        assert!(Precision::F16.cast(weights).unwrap_err().to_string().contains("`dtype` is f16"));
    }
}
