//! Host computations on device values, in the middle of the device's work.

use candle_core::{DType, Result, Tensor, bail};

/// Computes as many values as it is given. Runs on any thread and must not call a device.
pub type Compute = Box<dyn FnOnce(&[f32]) -> Vec<f32> + Send>;

/// A tensor of the shape of `x` computed by `compute` from its values, without a graph. On a GPU this does not block:
/// the driver calls the host once the values are available.
///
/// # Errors
/// `x` is not f32, or `compute` returns another number of values; on a GPU, which cannot report the latter, the result
/// is NaN.
pub fn by_host(x: &Tensor, compute: Compute) -> Result<Tensor> {
    if x.dtype() != DType::F32 {
        bail!("numbers by the host of {:?}, expected f32", x.dtype());
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::cuda::launch::by_host::of_tensor(x, compute);
    }
    let (values, count) = (x.detach().flatten_all()?.to_vec1::<f32>()?, x.elem_count());
    let made = compute(&values);
    if made.len() != count {
        bail!("{} numbers were made of {count}", made.len());
    }
    Tensor::from_vec(made, x.shape(), x.device())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn host_function_sees_values_in_element_order() {
        let x = Tensor::new(&[[1.0_f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        let running = |values: &[f32]| -> Vec<f32> {
            let mut sum = 0.0;
            values
                .iter()
                .map(|value| {
                    sum += value;
                    sum
                })
                .collect()
        };
        let made = by_host(&x.t().unwrap(), Box::new(running)).unwrap();
        assert_eq!(made.to_vec2::<f32>().unwrap(), [[1.0, 4.0], [6.0, 10.0]]);
    }

    #[test]
    fn changed_number_of_values_is_refused() {
        let x = Tensor::new(&[1.0_f32, 2.0], &Device::Cpu).unwrap();
        let error = by_host(&x, Box::new(|values| values[1..].to_vec())).unwrap_err();
        assert!(error.to_string().contains("1 numbers were made of 2"), "{error}");
    }
}
