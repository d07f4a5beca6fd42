//! A linear layer of a block: weight, optional bias, and optional adapter beside a frozen weight.

use candle_core::{DType, Tensor};

use super::gradients::Gradients;
use super::lora::{Adapter, Masks};
use super::matrix::Matrix;
use crate::error::Result;
use crate::ops::cpu::matmul::{Mat, Threads, matmul, matmul_into};
use crate::ops::cpu::{self, Element};
use crate::ops::linear;

/// A weight matrix `[O, I]` with an optional bias `[O]`.
#[derive(Clone, Debug)]
pub struct Projection {
    /// Parameter name of the weight.
    pub name: String,
    /// `[O, I]`.
    pub weight: Matrix,
    /// `[O]`.
    pub bias: Option<Tensor>,
    /// The adapter trained on the weight.
    pub adapter: Option<Adapter>,
}

impl Projection {
    /// Parameter name of the bias.
    pub fn bias_name(&self) -> String {
        format!("{}.bias", self.name.trim_end_matches(".weight"))
    }

    /// `x · Wᵀ + b` plus the adapter's output, as a graph of ops. Shapes: `[T, I] -> [T, O]`.
    ///
    /// # Errors
    /// A device error.
    pub fn forward(
        &self,
        x: &Tensor,
        masks: Option<&Masks>,
        dtype: DType,
    ) -> candle_core::Result<Tensor> {
        let mut y = self.weight.linear(x, dtype)?;
        if let Some(adapter) = &self.adapter {
            y = adapter.graph((x, masks), &y, (&self.weight, dtype))?;
        }
        match &self.bias {
            Some(bias) => linear::with_bias(&y, bias),
            None => Ok(y),
        }
    }

    /// As [`forward`](Self::forward), on CPU slices, summed in f32.
    pub(super) fn apply<E: Element>(&self, x: &[E], masks: Option<&Masks>) -> Result<Vec<f32>> {
        let rows = self.input(x);
        let mut y = self.weight.with(|weight| matmul(rows, weight.t(), Threads::All))?;
        if let Some(adapter) = &self.adapter {
            adapter.forward((x, masks), &mut y, &self.weight)?;
        }
        if let Some(bias) = &self.bias {
            linear::add_bias(&mut y, bias)?;
        }
        Ok(y)
    }

    /// Backward: from the gradient of the output `[T, O]` to those of trained tensors; adds the input's to `d_x`
    /// `[T, I]`, which may be empty.
    pub(super) fn backward<E: Element>(
        &self,
        (x, masks): (&[E], Option<&Masks>),
        d_y: &[E],
        d_x: &mut Vec<f32>,
        grads: &mut Gradients,
    ) -> Result<()> {
        self.bias_backward(d_y, grads)?;
        let through = match &self.adapter {
            Some(adapter) => adapter.through_magnitude((x, masks, &self.weight), d_y, grads)?,
            None => None,
        };
        let (rows, d_y) = (self.input(x), through.as_deref().unwrap_or(d_y));
        let d_y = Mat::new(d_y, rows.rows(), self.weight.shape().0);
        if self.weight.is_trained() {
            grads.add_product(&self.name, d_y.t(), rows)?;
        }
        self.weight.with(|weight| {
            if d_x.is_empty() {
                *d_x = matmul(d_y, weight, Threads::All);
            } else {
                matmul_into(d_x, d_y, weight, true, Threads::All);
            }
        })?;
        match &self.adapter {
            Some(adapter) => adapter.backward((x, masks, d_y), d_x, grads),
            None => Ok(()),
        }
    }

    fn input<'a, E: Element>(&self, x: &'a [E]) -> Mat<'a, E> {
        let width = self.weight.shape().1;
        Mat::new(x, x.len() / width, width)
    }

    fn bias_backward<E: Element>(&self, d_y: &[E], grads: &mut Gradients) -> Result<()> {
        let Some(bias) = self.bias.as_ref().filter(|bias| bias.is_variable()) else {
            return Ok(());
        };
        let mut sum = vec![0.0; self.weight.shape().0];
        let mut scratch = Vec::new();
        for d_y in d_y.chunks_exact(sum.len()) {
            cpu::simd::axpy(&mut sum, 1.0, E::widen(d_y, &mut scratch));
        }
        grads.add(&self.bias_name(), &Tensor::from_vec(sum, bias.shape(), bias.device())?)
    }
}
