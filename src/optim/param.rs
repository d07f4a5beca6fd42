//! A trained parameter.

use candle_core::{DType, Device, Tensor, Var};

use crate::error::Result;

/// The f32 master that the optimizer moves and, where the model computes in bf16, the copy that it computes with.
#[derive(Clone, Debug)]
pub struct Param {
    /// f32.
    pub master: Var,
    /// Always the rounded master: in bf16, or where the master waits in host memory. Rounded to nearest, unless the
    /// optimizer rounds by chance.
    pub copy: Option<Var>,
    /// What the learning rate is multiplied with: 1 but for the factors of LoRA+.
    pub lr_scale: f64,
    /// The master is in host memory, see [`offloaded`](Self::offloaded).
    pub offloaded: bool,
}

impl Param {
    /// A parameter that is computed with as it is. The values are copied.
    ///
    /// # Errors
    /// The device's.
    pub fn new(start: &Tensor) -> Result<Self> {
        Ok(Self { master: Var::from_tensor(start)?, copy: None, lr_scale: 1.0, offloaded: false })
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
        Ok(Self { master, copy, lr_scale: 1.0, offloaded: false })
    }

    /// The same with its master in host memory, where the optimizer then moves it. What the model computes with stays
    /// where it is.
    ///
    /// # Errors
    /// The device's.
    pub fn offloaded(self) -> Result<Self> {
        let master = Var::from_tensor(&self.master.as_tensor().detach().to_device(&Device::Cpu)?)?;
        let copy = Some(self.copy.unwrap_or(self.master));
        Ok(Self { master, copy, lr_scale: self.lr_scale, offloaded: true })
    }

    /// A parameter of its own with the same values.
    ///
    /// # Errors
    /// The device's.
    pub fn twin(&self) -> Result<Self> {
        let copy = |var: &Var| Var::from_tensor(&var.as_tensor().detach());
        let twin = self.copy.as_ref().map(copy).transpose()?;
        Ok(Self { master: copy(&self.master)?, copy: twin, ..*self })
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
        self.master.set(&value.to_device(self.master.device())?)?;
        self.send(value)
    }

    /// Brings the copy up to a value of the master.
    ///
    /// # Errors
    /// Another shape; the device's.
    pub(crate) fn send(&self, value: &Tensor) -> Result<()> {
        match &self.copy {
            Some(copy) => Ok(copy.set(&value.to_dtype(copy.dtype())?.to_device(copy.device())?)?),
            None => Ok(()),
        }
    }
}
