//! Tensors offloaded to host memory until needed again.

use candle_core::{Device, Result, Shape, Tensor};

#[cfg(feature = "cuda")]
use super::cuda::launch::{
    host::{self, Waiting},
    tensor,
};

/// Creates a device tensor from host values, without synchronising with a GPU.
///
/// # Errors
/// A number of values that does not match the shape; a device error.
pub fn sent(values: Vec<f32>, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    #[cfg(feature = "cuda")]
    if let Ok(cuda) = device.as_cuda_device()
        && !values.is_empty()
        && values.len() == shape.elem_count()
    {
        return Ok(tensor(cuda, host::sent(cuda, &values)?, shape));
    }
    Tensor::from_vec(values, shape, device)
}

/// A tensor offloaded to free its device memory. It is restored bit for bit.
#[derive(Debug)]
pub struct HostCopy {
    device: Device,
    form: Form,
}

#[derive(Debug)]
enum Form {
    Plain(Tensor),
    /// In page-locked memory, copied by the GPU asynchronously.
    #[cfg(feature = "cuda")]
    Locked(Waiting),
}

impl HostCopy {
    /// Copies a tensor. Its storage may be reused afterwards.
    ///
    /// # Errors
    /// A device error.
    pub fn of(x: &Tensor) -> Result<Self> {
        let device = x.device().clone();
        #[cfg(feature = "cuda")]
        if device.is_cuda() && x.dtype() == candle_core::DType::F32 {
            return Ok(Self { device, form: Form::Locked(Waiting::new(x)?) });
        }
        let x = x.detach();
        let host = if device.is_cpu() { x.copy()? } else { x.to_device(&Device::Cpu)? };
        Ok(Self { device, form: Form::Plain(host) })
    }

    /// Copies it back to its device.
    ///
    /// # Errors
    /// A device error.
    pub fn back(self) -> Result<Tensor> {
        match self.form {
            Form::Plain(host) => host.to_device(&self.device),
            #[cfg(feature = "cuda")]
            Form::Locked(waiting) => waiting.back(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_copy_is_unaffected_by_later_writes_to_the_tensor() {
        let var = candle_core::Var::new(&[[1.5_f32, -0.0], [f32::MIN_POSITIVE, 3.0]], &Device::Cpu);
        let var = var.unwrap();
        let copy = HostCopy::of(&var.t().unwrap()).unwrap();
        var.set(&var.zeros_like().unwrap()).unwrap();
        let back = copy.back().unwrap().to_vec2::<f32>().unwrap();
        let bits: Vec<Vec<u32>> =
            back.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect();
        let expected = [[1.5_f32, f32::MIN_POSITIVE], [-0.0, 3.0]];
        assert_eq!(bits, expected.map(|row| row.map(f32::to_bits).to_vec()));
    }
}
