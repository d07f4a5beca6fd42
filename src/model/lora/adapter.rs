//! A low-rank adapter beside a frozen projection: `y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ` (Hu et al., 2022, equation 3), and its
//! weight-decomposed form (DoRA; Liu et al., 2024, equation 5).

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::dropout::{Masks, module_key};
use crate::error::{Error, Result};
use crate::model::gradients::Gradients;
use crate::model::matrix::Matrix;
use crate::ops::cpu::matmul::{Mat, Threads, matmul, matmul_into};
use crate::ops::cpu::{self, Element};
use crate::ops::{linear, residual};

/// The adapter of one projection `[O, I]`. Cheap to clone: tensors are shared.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// The projection's name, such as `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// `A`, `[r, I]`.
    pub a: Tensor,
    /// `B`, `[O, r]`.
    pub b: Tensor,
    /// Scale of the product of factors: `alpha / r`, or `alpha / √r` (rsLoRA; Kalajdzievski, 2023).
    pub scale: f64,
    /// DoRA's parameters, if used.
    pub dora: Option<Dora>,
}

/// Outputs per task: whole cache lines, and enough tasks for the narrowest projection of a small model.
const OUTPUTS: usize = 64;

/// DoRA's additions to an adapter.
#[derive(Clone, Debug)]
pub struct Dora {
    /// The magnitude of each output, `[O]`, f32.
    pub magnitude: Tensor,
    /// `‖W_o‖²` of each row of the frozen projection.
    pub squares: Arc<[f64]>,
}

/// DoRA's factor of each output, and the row norm of `W + s·B·A` it divides by.
struct Decomposed {
    factors: Vec<f32>,
    norms: Vec<f32>,
}

impl Adapter {
    /// Rank, `r`.
    pub fn rank(&self) -> usize {
        self.a.dims()[0]
    }

    /// Parameters by name, in name order.
    pub fn tensors(&self) -> impl Iterator<Item = (String, &Tensor)> {
        let magnitude = self.dora.iter().map(|dora| (self.name(MAGNITUDE), &dora.magnitude));
        [(self.name(A), &self.a), (self.name(B), &self.b)].into_iter().chain(magnitude)
    }

    fn name(&self, part: &str) -> String {
        parameter(&self.module, part)
    }

    /// The adapter ready for computation beside a frozen `weight`: factors in `dtype`, DoRA with the weight's norms.
    ///
    /// # Errors
    /// A device error.
    pub(crate) fn beside(self, weight: &Matrix, dtype: DType) -> Result<Self> {
        let placed = |dora: Dora| Ok::<_, Error>(Dora { squares: weight.row_squares()?, ..dora });
        let dora = self.dora.map(placed).transpose()?;
        let cast = |factor: Tensor| factor.to_dtype(dtype)?.contiguous();
        Ok(Self { a: cast(self.a)?, b: cast(self.b)?, dora, ..self })
    }

    /// Rejects factors that do not fit a projection of this shape.
    ///
    /// # Errors
    /// Names the module and the shapes.
    pub(super) fn check(&self, weight: &[usize]) -> Result<()> {
        let (outer, inner) = (self.b.dims()[0], self.a.dims()[1]);
        let magnitudes = self.dora.as_ref().map(|dora| dora.magnitude.elem_count());
        let fits = weight == [outer, inner] && magnitudes.is_none_or(|count| count == outer);
        if fits && self.b.dims()[1] == self.rank() {
            return Ok(());
        }
        let (a, b) = (self.a.dims(), self.b.dims());
        Err(Error::run(format!("factors {b:?} and {a:?} for a projection {weight:?}"))
            .at(format!("`{}`", self.module))
            .hint("the adapter was trained on another model"))
    }

    /// Splits off the last `count` ranks; returns the rest, and an adapter of the split-off ranks if there are any.
    ///
    /// # Errors
    /// No ranks would remain.
    pub(super) fn cut(&self, count: usize) -> Result<(Self, Option<Self>)> {
        if count == 0 {
            return Ok((self.clone(), None));
        }
        if count >= self.rank() {
            let rank = self.rank();
            let error = Error::run(format!("{count} of {rank} ranks stand for the base's weights"));
            return Err(error.at(format!("`{}`", self.module)).hint("the adapter is damaged"));
        }
        let ranks = |start, count| -> Result<Self> {
            let a = self.a.narrow(0, start, count)?;
            let b = self.b.narrow(1, start, count)?.contiguous()?;
            Ok(Self { a, b, ..self.clone() })
        };
        let left = self.rank() - count;
        Ok((ranks(0, left)?, Some(ranks(left, count)?)))
    }

    /// `s · B · A`, `[O, I]` in f32.
    pub(super) fn delta(&self) -> candle_core::Result<Tensor> {
        let [a, b] = [&self.a, &self.b].map(|factor| factor.detach().to_dtype(DType::F32));
        b?.matmul(&a?)? * self.scale
    }

    /// The merged matrix of projection and adapter, `[O, I]` in f32.
    ///
    /// # Errors
    /// A device error.
    pub fn merged(&self, weight: &Tensor) -> Result<Tensor> {
        let merged = (weight.to_dtype(DType::F32)? + self.delta()?)?;
        match &self.dora {
            Some(Dora { magnitude, .. }) => {
                let norms = merged.sqr()?.sum(1)?.sqrt()?;
                Ok(merged.broadcast_mul(&(magnitude.detach() / norms)?.unsqueeze(1)?)?)
            }
            None => Ok(merged),
        }
    }

    /// Adds the adapter's output to `y`, the projection's product. Shapes: `x` `[T, I]`, `y` `[T, O]`.
    pub(crate) fn forward<E: Element>(
        &self,
        (x, masks): (&[E], Option<&Masks>),
        y: &mut [f32],
        weight: &Matrix,
    ) -> Result<()> {
        let factors = self.factors::<E>(weight)?;
        self.add(&self.read(x, masks), y, factors.as_deref())
    }

    /// As [`forward`](Self::forward), with given DoRA factors, which are constant outside training.
    pub(crate) fn add<E: Element>(
        &self,
        x: &[E],
        y: &mut [f32],
        factors: Option<&[f32]>,
    ) -> Result<()> {
        self.add_low_rank(self.rows(x), y)?;
        if let Some(factors) = factors {
            y.par_chunks_exact_mut(factors.len()).for_each(|y| multiply(y, factors));
        }
        Ok(())
    }

    /// DoRA's factor of each output, `[O]`; `None` without DoRA.
    pub(crate) fn factors<E: Element>(&self, weight: &Matrix) -> Result<Option<Vec<f32>>> {
        Ok(self.decomposed::<E>(weight)?.map(|decomposed| decomposed.factors))
    }

    /// `y += s · x · Aᵀ · Bᵀ`.
    fn add_low_rank<E: Element>(&self, x: Mat<'_, E>, y: &mut [f32]) -> Result<()> {
        let inner = self.inner(x)?;
        let inner = Mat::new(&inner, self.rank(), x.rows());
        self.with_b::<E, _>(|b| matmul_into(y, inner.t(), b.t(), true, Threads::All))
    }

    /// The first factor's input: `x`, or in training `x` after dropout.
    fn read<'a, E: Element>(&self, x: &'a [E], masks: Option<&Masks>) -> Cow<'a, [E]> {
        match masks {
            Some(masks) => Cow::Owned(masks.apply(module_key(&self.module), x)),
            None => Cow::Borrowed(x),
        }
    }

    fn rows<'a, E: Element>(&self, x: &'a [E]) -> Mat<'a, E> {
        let inner = self.a.dims()[1];
        Mat::new(x, x.len() / inner, inner)
    }

    /// `s · A · xᵀ`, `[r, T]`: a product with few rows, which reads `x` in place. The transposed form would pack `x`,
    /// which takes longer than the product itself.
    fn inner<E: Element>(&self, x: Mat<'_, E>) -> Result<Vec<E>> {
        let inner = self.with_a::<E, _>(|a| matmul(a, x.t(), Threads::All))?;
        Ok(self.scaled(inner))
    }

    fn scaled<E: Element>(&self, mut values: Vec<f32>) -> Vec<E> {
        cpu::simd::scale(&mut values, self.scale as f32);
        E::rounded(values)
    }

    /// Backward from the product to the factors; adds the input's gradient to `d_x`. Shapes: `x`, `d_x` `[T, I]`, `d_y`
    /// `[T, O]`.
    pub(crate) fn backward<E: Element>(
        &self,
        (x, masks, d_y): (&[E], Option<&Masks>, Mat<'_, E>),
        d_x: &mut [f32],
        grads: &mut Gradients,
    ) -> Result<()> {
        let rank = self.rank();
        let x = self.read(x, masks);
        let x = self.rows(&x);
        let inner = self.inner(x)?;
        grads.add_product(&self.name(B), d_y.t(), Mat::new(&inner, rank, x.rows()).t())?;
        // Transposed like `inner`.
        let d_inner = self.with_b::<E, _>(|b| matmul(b.t(), d_y.t(), Threads::All))?;
        let d_inner = self.scaled(d_inner);
        let d_inner = Mat::new(&d_inner, rank, x.rows());
        grads.add_product(&self.name(A), d_inner, x)?;
        self.with_a::<E, _>(|a| match masks {
            Some(masks) => {
                let d_read = matmul(d_inner.t(), a, Threads::All);
                residual::add(d_x, &masks.apply(module_key(&self.module), &d_read));
            }
            None => matmul_into(d_x, d_inner.t(), a, true, Threads::All),
        })
    }

    /// Backward from the output to the product that DoRA scales, and to the magnitude; `None` without DoRA. The norm in
    /// the denominator is treated as constant, as in the paper (section 4.3) and in peft. Shapes: `x` `[T, I]`, `d_y`
    /// `[T, O]`.
    pub(crate) fn through_magnitude<E: Element>(
        &self,
        (x, masks, weight): (&[E], Option<&Masks>, &Matrix),
        d_y: &[E],
        grads: &mut Gradients,
    ) -> Result<Option<Vec<E>>> {
        let Some(Decomposed { factors, norms }) = self.decomposed::<E>(weight)? else {
            return Ok(None);
        };
        let mut product = weight.with(|weight| matmul(self.rows(x), weight.t(), Threads::All))?;
        self.add_low_rank(self.rows(&self.read(x, masks)), &mut product)?;
        let d_magnitude = d_magnitude(d_y, &product, &norms);
        let mut d_product = d_y.to_vec();
        d_product.par_chunks_exact_mut(norms.len()).for_each_init(Vec::new, |scratch, d_y| {
            let mut d = E::widen(d_y, scratch).to_vec();
            multiply(&mut d, &factors);
            E::round_into(d_y, &d);
        });
        let shape = norms.len();
        let d_magnitude = Tensor::from_vec(d_magnitude, shape, self.a.device())?;
        grads.add(&self.name(MAGNITUDE), &d_magnitude)?;
        Ok(Some(d_product))
    }

    /// Expands `‖W_o + s·B_o·A‖²`, so that the sum of both matrices is never materialised:
    /// `‖W_o‖² + 2s·(W·Aᵀ)_o·B_oᵀ + s²·B_o·(A·Aᵀ)·B_oᵀ`.
    fn decomposed<E: Element>(&self, weight: &Matrix) -> Result<Option<Decomposed>> {
        let Some(Dora { magnitude, squares }) = &self.dora else { return Ok(None) };
        let (scale, rank) = (self.scale, self.rank());
        let (projected, gram) = self.with_a::<E, _>(|a| {
            let projected = weight.with(|weight| matmul(weight, a.t(), Threads::All));
            (projected, matmul(a, a.t(), Threads::All))
        })?;
        let projected = projected?;
        let b = self.b.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let dot = |x: &[f32], y: &[f32]| -> f64 {
            x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
        };
        let norm = |(row, square): (usize, &f64)| {
            let (b, projected) = (&b[row * rank..][..rank], &projected[row * rank..][..rank]);
            let delta: f64 = gram
                .chunks_exact(rank)
                .zip(b)
                .map(|(gram, &b_i)| f64::from(b_i) * dot(gram, b))
                .sum();
            (square + 2.0 * scale * dot(projected, b) + scale * scale * delta).sqrt() as f32
        };
        let norms: Vec<f32> = squares.par_iter().enumerate().map(norm).collect();
        let magnitude = magnitude.to_vec1::<f32>()?;
        let factors = magnitude.iter().zip(&norms).map(|(m, norm)| m / norm).collect();
        Ok(Some(Decomposed { factors, norms }))
    }

    /// As a graph of ops, on any device. `product`: the projection's output without bias.
    ///
    /// # Errors
    /// A device error.
    pub fn graph(
        &self,
        (x, masks): (&Tensor, Option<&Masks>),
        product: &Tensor,
        (weight, dtype): (&Matrix, DType),
    ) -> candle_core::Result<Tensor> {
        let read = match masks {
            Some(masks) => {
                let mask = masks.tensor(module_key(&self.module), x.dim(1)?, x.device())?;
                (x * mask.to_dtype(x.dtype())?)?
            }
            None => x.clone(),
        };
        let low_rank = linear(&linear(&read, &self.a, None)?, &self.b, None)?;
        let y = (product + (low_rank * self.scale)?)?;
        let Some(Dora { magnitude, .. }) = &self.dora else { return Ok(y) };
        let weight = weight.tensor(x.device(), dtype)?;
        let sum = (weight.detach().to_dtype(DType::F32)? + self.delta()?)?;
        let norms = sum.sqr()?.sum(1)?.sqrt()?;
        y.broadcast_mul(&(magnitude / norms)?.to_dtype(y.dtype())?)
    }

    fn with_a<E: Element, R>(&self, read: impl FnOnce(Mat<'_, E>) -> R) -> Result<R> {
        let (rank, inner) = self.a.dims2()?;
        Ok(cpu::with_slice(&self.a, |a| read(Mat::new(a, rank, inner)))?)
    }

    fn with_b<E: Element, R>(&self, read: impl FnOnce(Mat<'_, E>) -> R) -> Result<R> {
        let (outer, rank) = self.b.dims2()?;
        Ok(cpu::with_slice(&self.b, |b| read(Mat::new(b, outer, rank)))?)
    }
}

/// peft's names of the factors and the magnitude.
pub(crate) const A: &str = "lora_A";
pub(crate) const B: &str = "lora_B";
pub(crate) const MAGNITUDE: &str = "lora_magnitude_vector";

/// Parameter name of an adapter's tensor. In peft the magnitude is a plain vector, without `.weight`.
pub(crate) fn parameter(module: &str, part: &str) -> String {
    let ending = if part == MAGNITUDE { "" } else { ".weight" };
    format!("{module}.{part}{ending}")
}

/// `Σ_t d_y · product / norm` of each output, `[O]`. A task handles some of the outputs over all tokens in order, so
/// sums do not depend on the number of threads. Shapes: `d_y`, `product` `[T, O]`.
fn d_magnitude<E: Element>(d_y: &[E], product: &[f32], norms: &[f32]) -> Vec<f32> {
    let mut sums = vec![0.0; norms.len()];
    sums.par_chunks_mut(OUTPUTS).enumerate().for_each_init(Vec::new, |scratch, (task, sums)| {
        let outputs = task * OUTPUTS..task * OUTPUTS + sums.len();
        let rows = d_y.chunks_exact(norms.len()).zip(product.chunks_exact(norms.len()));
        for (d_y, product) in rows {
            let d_y = E::widen(&d_y[outputs.clone()], scratch);
            for ((sum, d), product) in sums.iter_mut().zip(d_y).zip(&product[outputs.clone()]) {
                *sum += d * product;
            }
        }
        sums.iter_mut().zip(&norms[outputs]).for_each(|(sum, norm)| *sum /= norm);
    });
    sums
}

fn multiply(values: &mut [f32], factors: &[f32]) {
    values.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
}
