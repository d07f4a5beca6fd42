//! A trained parameter.

use candle_core::{DType, Tensor, Var};

use crate::error::Result;

/// The f32 master that the optimizer moves and, where the model computes in bf16, the copy that it computes with.
#[derive(Clone, Debug)]
pub struct Param {
    /// f32.
    pub master: Var,
    /// bf16, always the rounded master.
    pub copy: Option<Var>,
    /// What the learning rate is multiplied with: 1 but for the factors of LoRA+.
    pub lr_scale: f64,
}

impl Param {
    /// A parameter that is computed with as it is. The values are copied.
    ///
    /// # Errors
    /// The device's.
    pub fn new(start: &Tensor) -> Result<Self> {
        Ok(Self { master: Var::from_tensor(start)?, copy: None, lr_scale: 1.0 })
    }

    /// A parameter that is computed with in `dtype`.
    ///
    /// # Errors
    /// The device's.
    pub fn computed_in(start: &Tensor, dtype: DType) -> Result<Self> {
        let master = Var::from_tensor(start)?;
        let copy = match dtype {
            DType::F32 => None,
            _ => Some(Var::from_tensor(&master.to_dtype(dtype)?)?),
        };
        Ok(Self { master, copy, lr_scale: 1.0 })
    }

    /// A parameter of its own with the same values.
    ///
    /// # Errors
    /// The device's.
    pub fn twin(&self) -> Result<Self> {
        let copy = |var: &Var| Var::from_tensor(&var.as_tensor().detach());
        let twin = self.copy.as_ref().map(copy).transpose()?;
        Ok(Self { master: copy(&self.master)?, copy: twin, lr_scale: self.lr_scale })
    }

    /// What the model computes with.
    pub fn computed(&self) -> &Tensor {
        self.copy.as_ref().unwrap_or(&self.master).as_tensor()
    }

    /// Overwrites master and copy.
    ///
    /// # Errors
    /// Another shape.
    pub fn set(&self, value: &Tensor) -> Result<()> {
        self.master.set(value)?;
        match &self.copy {
            Some(copy) => Ok(copy.set(&value.to_dtype(copy.dtype())?)?),
            None => Ok(()),
        }
    }
}
