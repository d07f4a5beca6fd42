//! Compute and storage types as named by commands that take no recipe.

use clap::ValueEnum;

use crate::generate::sampling::WeightFormat;
use crate::model::Precision;

/// Storage of the matrices of a generating model.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Held {
    /// In the compute type
    None,
    /// 8 bits
    #[value(name = "q8_0")]
    Q8_0,
    /// 4 bits, with a scale per 32 weights
    #[value(name = "q4_0")]
    Q4_0,
    /// 4 bits, with a scale and a minimum per 32 weights
    #[value(name = "q4_1")]
    Q4_1,
}

impl From<Held> for WeightFormat {
    fn from(held: Held) -> Self {
        match held {
            Held::None => Self::None,
            Held::Q8_0 => Self::Q8_0,
            Held::Q4_0 => Self::Q4_0,
            Held::Q4_1 => Self::Q4_1,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Dtype {
    /// 32-bit floats
    F32,
    /// bfloat16
    Bf16,
}

impl From<Dtype> for Precision {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}
