//! The linear layer: `y = x · Wᵀ (+ b)`.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};

use super::cpu::{
    self, Element,
    matmul::{Mat, Threads, matmul},
};

/// `x · Wᵀ`, plus the bias if given. An untrained weight costs no gradient work. If dtypes differ, the product is
/// computed in the weight's, and the result has that of `x`.
///
/// # Shapes
/// - `x`: `[T, I]`, `weight`: `[O, I]`, `bias`: `[O]`  →  `[T, O]`
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (_, inner) = x.dims2()?;
    let (_, expected) = weight.dims2()?;
    if inner != expected {
        candle_core::bail!(
            "a linear layer of {:?} was given rows of width {inner}",
            weight.shape()
        );
    }
    let y = if weight.dtype() != x.dtype() {
        elsewhere(&x.to_dtype(weight.dtype())?, weight)?.to_dtype(x.dtype())?
    } else if x.device().is_cpu() && x.dtype() == DType::F32 {
        let op = Linear { trained: weight.track_op() };
        x.contiguous()?.apply_op2(&weight.contiguous()?, op)?
    } else {
        elsewhere(x, weight)?
    };
    match bias {
        Some(bias) => with_bias(&y, bias),
        None => Ok(y),
    }
}

/// `y + b` in the dtype of `y`, summed in that of the bias. Shapes: `[T, O]`, `[O]` -> `[T, O]`.
pub(crate) fn with_bias(y: &Tensor, bias: &Tensor) -> Result<Tensor> {
    y.to_dtype(bias.dtype())?.broadcast_add(bias)?.to_dtype(y.dtype())
}

/// Cases without a CPU kernel.
fn elsewhere(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::cuda::launch::linear::on_cuda(x, weight);
    }
    plain(x, weight)
}

/// `x · Wᵀ` of storages on one device, by Candle's matmul there.
pub(in crate::ops) fn product<S: BackendStorage>(
    (x, layout): (&S, &Layout),
    (weight, of_weight): (&S, &Layout),
) -> Result<(S, Shape)> {
    let (rows, inner) = layout.shape().dims2()?;
    let turned = of_weight.transpose(0, 1)?;
    let outer = turned.dims()[1];
    let y = x.matmul(weight, (1, rows, outer, inner), layout, &turned)?;
    Ok((y, (rows, outer).into()))
}

/// The plain form.
pub fn plain(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)
}

/// `x · Wᵀ + b` on slices of the weight's dtype, summed in f32; `x` is `[T, I]`, the bias is f32.
pub(crate) fn forward<E: Element>(
    x: &[E],
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Vec<f32>> {
    let (outer, inner) = weight.dims2()?;
    let x = Mat::new(x, x.len() / inner, inner);
    let mut y = cpu::with_slice(weight, |weight| {
        matmul(x, Mat::new(weight, outer, inner).t(), Threads::All)
    })?;
    if let Some(bias) = bias {
        add_bias(&mut y, bias)?;
    }
    Ok(y)
}

/// Adds a bias `[O]` to each of the rows `[T, O]`.
pub(crate) fn add_bias(y: &mut [f32], bias: &Tensor) -> Result<()> {
    cpu::with_slice(bias, |bias: &[f32]| {
        y.chunks_exact_mut(bias.len()).for_each(|y| cpu::simd::axpy(y, 1.0, bias));
    })
}

struct Linear {
    trained: bool,
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (t, inner) = x_layout.shape().dims2()?;
        let (outer, _) = weight_layout.shape().dims2()?;
        let x = Mat::<f32>::new(cpu::slice(x, x_layout)?, t, inner);
        let weight = Mat::new(cpu::slice(weight, weight_layout)?, outer, inner);
        Ok((CpuStorage::F32(matmul(x, weight.t(), Threads::All)), (t, outer).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        d_y: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let d_y = d_y.contiguous()?;
        let (t, outer) = d_y.dims2()?;
        let inner = x.dim(1)?;
        let device = x.device();
        let d_x = cpu::with_slice::<f32, _>(&d_y, |d_y| {
            cpu::with_slice(weight, |weight| {
                matmul(Mat::new(d_y, t, outer), Mat::new(weight, outer, inner), Threads::All)
            })
        })??;
        let d_weight = if self.trained {
            let d_weight = cpu::with_slice::<f32, _>(&d_y, |d_y| {
                cpu::with_slice(x, |x| {
                    matmul(Mat::new(d_y, t, outer).t(), Mat::new(x, t, inner), Threads::All)
                })
            })??;
            Some(Tensor::from_vec(d_weight, (outer, inner), device)?)
        } else {
            None
        };
        Ok((Some(Tensor::from_vec(d_x, (t, inner), device)?), d_weight))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::rng::Stream;
    use candle_core::{Device, Var};

    /// Reproducible normal values.
    pub(crate) fn random(index: u64, shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        let values = Stream::new(1, "test").normal(index, shape.elem_count(), 1.0);
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    type Op<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

    /// Value and gradients of `Σ f(x) · c` for a fixed random `c`.
    fn run(inputs: &[Tensor], f: Op<'_>) -> (Tensor, Vec<Tensor>) {
        let vars: Vec<Var> = inputs.iter().map(|input| Var::from_tensor(input).unwrap()).collect();
        let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let out = f(&tensors).unwrap();
        let weights = random(99, out.shape()).to_dtype(out.dtype()).unwrap();
        let grads = (&out * weights).unwrap().sum_all().unwrap().backward().unwrap();
        let grads = vars.iter().map(|var| grads.get(var).expect("no gradient").clone()).collect();
        (out, grads)
    }

    pub(crate) fn distance(a: &Tensor, b: &Tensor) -> f64 {
        let norm = |x: Tensor| -> f64 {
            let x = x.to_dtype(DType::F64).unwrap();
            x.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
        };
        let b = b.to_dtype(a.dtype()).unwrap();
        norm((a - &b).unwrap()) / norm(b).max(1e-30)
    }

    /// The op and its plain form agree in value and in every gradient, and the plain form's gradient matches finite
    /// differences.
    pub(crate) fn gradients_agree(
        inputs: &[Tensor],
        op: impl Fn(&[Tensor]) -> Result<Tensor>,
        plain: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) {
        let (out, grads) = run(inputs, &op);
        let (plain_out, plain_grads) = run(inputs, &plain);
        assert!(
            distance(&out, &plain_out) < 2e-6,
            "values differ by {}",
            distance(&out, &plain_out)
        );
        for (index, (grad, plain)) in grads.iter().zip(&plain_grads).enumerate() {
            let distance = distance(grad, plain);
            assert!(distance < 1e-5, "gradient {index} differs by {distance}");
        }
        finite_differences(inputs, &op, &grads);
    }

    /// Central differences of `Σ f(x) · c` along one random direction per input, in f32 with a wide step.
    fn finite_differences(inputs: &[Tensor], f: Op<'_>, grads: &[Tensor]) {
        let value = |inputs: &[Tensor]| -> f64 {
            let out = f(inputs).unwrap().to_dtype(DType::F64).unwrap();
            let weights = random(99, out.shape()).to_dtype(DType::F64).unwrap();
            (out * weights).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
        };
        for index in 0..inputs.len() {
            let direction = random(200 + index as u64, inputs[index].shape());
            let at = |step: f64| {
                let mut moved = inputs.to_vec();
                moved[index] = (&moved[index] + (&direction * step).unwrap()).unwrap();
                value(&moved)
            };
            let step = 1e-2;
            // Fourth-order central difference.
            let slope =
                (8.0 * (at(step) - at(-step)) - (at(2.0 * step) - at(-2.0 * step))) / (12.0 * step);
            let inner = (&grads[index] * &direction).unwrap().to_dtype(DType::F64).unwrap();
            let inner = inner.sum_all().unwrap().to_scalar::<f64>().unwrap();
            let size = inner.abs().max(1.0);
            assert!(
                (slope - inner).abs() / size < 5e-3,
                "input {index}: slope {slope}, gradient {inner}"
            );
        }
    }

    #[test]
    fn both_forms_agree_at_odd_shapes() {
        for (t, i, o) in [(1, 1, 1), (3, 5, 7), (17, 33, 9), (64, 48, 130)] {
            gradients_agree(
                &[random(1, (t, i)), random(2, (o, i))],
                |x| linear(&x[0], &x[1], None),
                |x| plain(&x[0], &x[1]),
            );
        }
    }

    #[test]
    fn a_frozen_weight_gets_no_gradient() {
        let x = Var::from_tensor(&random(1, (3, 4))).unwrap();
        let weight = random(2, (5, 4));
        let grads = linear(&x, &weight, None).unwrap().sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&x).is_some() && grads.get(&weight).is_none());
    }
}
