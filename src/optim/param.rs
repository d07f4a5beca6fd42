//! A trained parameter.

use candle_core::{DType, Device, Tensor, Var};

use crate::error::Result;

/// The f32 master updated by the optimizer and, if the model computes in bf16, the copy it computes with.
#[derive(Clone, Debug)]
pub struct Param {
    /// Master weights, f32.
    pub master: Var,
    /// The rounded master, kept in sync; present for bf16, or if the master is in host memory. Rounded to nearest,
    /// unless the optimizer rounds stochastically.
    pub copy: Option<Var>,
    /// Learning-rate multiplier; 1 except for LoRA+ factors.
    pub lr_scale: f64,
    /// Whether the master is in host memory, see [`offloaded`](Self::offloaded).
    pub offloaded: bool,
}

impl Param {
    /// A parameter whose master is used in computation. The values are copied.
    ///
    /// # Errors
    /// A device error.
    pub fn new(start: &Tensor) -> Result<Self> {
        Ok(Self { master: Var::from_tensor(start)?, copy: None, lr_scale: 1.0, offloaded: false })
    }

    /// A parameter with compute dtype `dtype`.
    ///
    /// # Errors
    /// A device error.
    pub fn computed_in(start: &Tensor, dtype: DType) -> Result<Self> {
        let master = Var::from_tensor(start)?;
        let copy = match dtype {
            DType::F32 => None,
            _ => Some(Var::from_tensor(&master.to_dtype(dtype)?)?),
        };
        Ok(Self { master, copy, lr_scale: 1.0, offloaded: false })
    }

    /// Moves the master to host memory, where the optimizer then updates it. The copy used by the model stays on its
    /// device.
    ///
    /// # Errors
    /// A device error.
    pub fn offloaded(self) -> Result<Self> {
        let master = Var::from_tensor(&self.master.as_tensor().detach().to_device(&Device::Cpu)?)?;
        let copy = Some(self.copy.unwrap_or(self.master));
        Ok(Self { master, copy, lr_scale: self.lr_scale, offloaded: true })
    }

    /// An independent parameter with the same values.
    ///
    /// # Errors
    /// A device error.
    pub fn twin(&self) -> Result<Self> {
        let copy = |var: &Var| Var::from_tensor(&var.as_tensor().detach());
        let twin = self.copy.as_ref().map(copy).transpose()?;
        Ok(Self { master: copy(&self.master)?, copy: twin, ..*self })
    }

    /// The tensor the model computes with.
    pub fn computed(&self) -> &Tensor {
        self.copy.as_ref().unwrap_or(&self.master).as_tensor()
    }

    /// Overwrites master and copy.
    ///
    /// # Errors
    /// A shape mismatch.
    pub fn set(&self, value: &Tensor) -> Result<()> {
        self.master.set(&value.to_device(self.master.device())?)?;
        self.send(value)
    }

    /// Updates the copy from a value of the master.
    ///
    /// # Errors
    /// A shape mismatch; a device error.
    pub(crate) fn send(&self, value: &Tensor) -> Result<()> {
        match &self.copy {
            Some(copy) => Ok(copy.set(&value.to_dtype(copy.dtype())?.to_device(copy.device())?)?),
            None => Ok(()),
        }
    }
}
