//! What a model computes with, as commands that are given no recipe name it.

use clap::ValueEnum;

use crate::model::Precision;

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
