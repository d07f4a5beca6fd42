//! Gradients of a step by parameter name, summed over its micro-batches.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Shape, Tensor};
use rayon::prelude::*;

use crate::error::Result;
use crate::ops::cpu::Element;
use crate::ops::cpu::matmul::{Mat, Threads, matmul, matmul_into};
use crate::ops::{cpu, embed::embed_grad, residual};

/// Elements per partial sum: fixed, so that sums do not depend on the number of threads.
const CHUNK: usize = 1 << 16;

/// Sums of gradients, in name order.
#[derive(Debug)]
pub struct Gradients {
    sums: BTreeMap<String, Tensor>,
    device: Device,
}

impl Gradients {
    /// No gradients yet.
    pub fn new(device: &Device) -> Self {
        Self { sums: BTreeMap::new(), device: device.clone() }
    }

    /// Adds to a parameter's sum, in f32. The first gradient is stored without a copy.
    ///
    /// # Errors
    /// A shape mismatch; a device error.
    pub fn add(&mut self, name: &str, grad: &Tensor) -> Result<()> {
        if let Some(sum) = self.sums.get(name) {
            return Ok(residual::accumulate(sum, grad)?);
        }
        let grad = grad.to_dtype(DType::F32)?.contiguous()?.detach();
        self.sums.insert(name.to_owned(), grad);
        Ok(())
    }

    /// Adds the product `a · b` to a parameter's sum, on the CPU.
    pub fn add_product<E: Element>(
        &mut self,
        name: &str,
        a: Mat<'_, E>,
        b: Mat<'_, E>,
    ) -> Result<()> {
        if let Some(sum) = self.sums.get(name) {
            return Ok(cpu::with_slice_mut(sum, |sum| matmul_into(sum, a, b, true, Threads::All))?);
        }
        let product = matmul(a, b, Threads::All);
        let sum = Tensor::from_vec(product, (a.rows(), b.cols()), &self.device)?;
        self.sums.insert(name.to_owned(), sum);
        Ok(())
    }

    /// Adds row `t` of `d_x` `[T, D]` to row `rows[t]` of the parameter's sum.
    pub fn add_rows(
        &mut self,
        name: &str,
        shape: &Shape,
        rows: &[u32],
        d_x: &Tensor,
    ) -> Result<()> {
        let sum = match self.sums.remove(name) {
            Some(sum) => sum,
            None => Tensor::zeros(shape, d_x.dtype(), &self.device)?,
        };
        self.sums.insert(name.to_owned(), embed_grad(sum, rows, &d_x.detach())?);
        Ok(())
    }

    /// Removes the sums whose names begin with `prefix`, in name order.
    pub fn take(&mut self, prefix: &str) -> Vec<(String, Tensor)> {
        let starts = |(name, _): &(&String, &mut Tensor)| name.starts_with(prefix);
        let names: Vec<String> = self
            .sums
            .range_mut(prefix.to_owned()..)
            .take_while(starts)
            .map(|(name, _)| name.clone())
            .collect();
        names.into_iter().filter_map(|name| self.sums.remove_entry(&name)).collect()
    }

    /// The sum of one parameter.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.sums.get(name)
    }

    /// All sums, in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.sums.iter().map(|(name, grad)| (name.as_str(), grad))
    }

    /// The first non-finite element in name order: its parameter, and its index.
    ///
    /// # Errors
    /// A device error.
    pub fn first_not_finite(&self) -> Result<Option<(&str, usize)>> {
        for (name, grad) in self.iter() {
            if let Some(index) = first_not_finite(grad)? {
                return Ok(Some((name, index)));
            }
        }
        Ok(None)
    }

    /// Euclidean norm over all parameters, accumulated in f64 in a fixed order.
    pub fn norm(&self) -> Result<f64> {
        let mut sum = 0.0;
        for grad in self.sums.values() {
            sum += square_sum(grad)?;
        }
        Ok(sum.sqrt())
    }
}

/// The first non-finite element of a tensor.
fn first_not_finite(tensor: &Tensor) -> Result<Option<usize>> {
    #[cfg(feature = "cuda")]
    if tensor.device().is_cuda() {
        return Ok(crate::ops::cuda::launch::optimizer::first_not_finite(tensor)?);
    }
    let values = tensor.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.iter().position(|value| !value.is_finite()))
}

/// Sum of squares of a tensor, in f64.
pub fn square_sum(tensor: &Tensor) -> Result<f64> {
    #[cfg(feature = "cuda")]
    if tensor.device().is_cuda() {
        return Ok(crate::ops::cuda::launch::optimizer::square_sum(tensor)?);
    }
    if !tensor.device().is_cpu() {
        return Ok(f64::from(
            tensor.sqr()?.sum_all()?.to_dtype(candle_core::DType::F32)?.to_scalar::<f32>()?,
        ));
    }
    let partials = cpu::with_slice::<f32, _>(tensor, |values| {
        values
            .par_chunks(CHUNK)
            .map(|chunk| chunk.iter().map(|&x| f64::from(x) * f64::from(x)).sum())
            .collect::<Vec<f64>>()
    })?;
    Ok(partials.iter().sum())
}
