//! Initialisation of adapters.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use nalgebra::DMatrix;
use rand::Rng;

use super::{A, B, Init, Lora, MAGNITUDE, parameter, unknown};
use crate::error::{Error, Result};
use crate::model::matrix::Matrix;
use crate::model::{Config, Tensors, Weights};
use crate::rng::Stream;

/// Trainable tensors beside a model, before the first step.
#[derive(Clone, Debug, Default)]
pub struct Attached {
    /// Factors and magnitudes by parameter name, f32.
    pub factors: Weights,
    /// Scale of each module's product of factors.
    pub scales: BTreeMap<String, f64>,
    /// See [`Lora::loraplus_lr_ratio`].
    pub lr_ratio: f64,
    /// See [`Lora::lora_dropout`].
    pub dropout: f64,
}

/// Creates a model's adapters. `weights` are in f32; with PiSSA the part taken over by the factors is subtracted from
/// them.
///
/// # Errors
/// A rank larger than a matrix; no module to adapt.
pub fn attach(lora: &Lora, config: &Config, weights: &mut Weights, seed: u64) -> Result<Attached> {
    let mut attached = Attached::empty(lora);
    for module in modules(lora, config)? {
        let name = format!("{module}.weight");
        let weight = weights.get(&name).ok_or_else(|| unknown(&module))?.clone();
        let device = weight.device().clone();
        let rest = attached.add((lora, &module), &Matrix::Dense(weight), &device, seed)?;
        weights.extend(rest.map(|rest| (name, rest)));
    }
    Ok(attached)
}

/// As [`attach`], beside a model whose projections may already be quantised or rounded, which PiSSA does not support.
///
/// # Errors
/// As [`attach`].
pub fn attach_beside(
    lora: &Lora,
    config: &Config,
    (tensors, device): (&Tensors, &Device),
    seed: u64,
) -> Result<Attached> {
    if lora.init_lora_weights == Init::Pissa {
        return Err(Error::usage("`init_lora_weights` is pissa with rounded weights"));
    }
    let mut attached = Attached::empty(lora);
    for module in modules(lora, config)? {
        let weight = tensors.matrix(&module)?;
        attached.add((lora, &module), &weight, device, seed)?;
    }
    Ok(attached)
}

fn modules(lora: &Lora, config: &Config) -> Result<Vec<String>> {
    let modules = lora.modules(config)?;
    if modules.is_empty() {
        return Err(
            Error::usage("`lora_target_modules` is empty").hint("for example \"all-linear\"")
        );
    }
    Ok(modules)
}

impl Attached {
    fn empty(lora: &Lora) -> Self {
        Self { lr_ratio: lora.loraplus_lr_ratio, dropout: lora.lora_dropout, ..Self::default() }
    }

    /// Creates one module's adapter. Returns the remaining weight if the factors take over a part of it.
    fn add(
        &mut self,
        (lora, module): (&Lora, &str),
        weight: &Matrix,
        device: &Device,
        seed: u64,
    ) -> Result<Option<Tensor>> {
        let (outer, inner) = weight.shape();
        if lora.lora_r > outer.min(inner) {
            return Err(Error::usage(format!(
                "`lora_r` is {}, `{module}` is a matrix of {outer} by {inner}",
                lora.lora_r
            ))
            .hint(format!("at most {} adds anything", outer.min(inner))));
        }
        let stream = Stream::new(seed, &format!("lora/{module}"));
        let scale = lora.scale(lora.lora_r);
        let (a, b, rest) = match lora.init_lora_weights {
            Init::Default | Init::Gaussian => {
                let a = random(lora, inner, &stream, device)?;
                (a, Tensor::zeros((outer, lora.lora_r), DType::F32, device)?, None)
            }
            Init::Pissa => {
                let weight = weight.tensor(device, DType::F32)?;
                let [a, b] = principal(&weight, lora.lora_r, &stream)?;
                let (a, b) = ((a / scale.sqrt())?, (b / scale.sqrt())?);
                let rest = (&weight - (b.matmul(&a)? * scale)?)?;
                (a, b, Some(rest))
            }
        };
        if lora.use_dora {
            // Norms of the weights used in computation, so that the factors start at 1.
            let norms: Vec<f32> =
                weight.row_squares()?.iter().map(|square| square.sqrt() as f32).collect();
            let magnitude = Tensor::from_vec(norms, outer, device)?;
            self.factors.insert(parameter(module, MAGNITUDE), magnitude);
        }
        self.factors.insert(parameter(module, A), a);
        self.factors.insert(parameter(module, B), b);
        self.scales.insert(module.to_owned(), scale);
        Ok(rest)
    }
}

/// `A`, `[r, I]`.
fn random(lora: &Lora, inner: usize, stream: &Stream, device: &Device) -> Result<Tensor> {
    let count = lora.lora_r * inner;
    let values = if lora.init_lora_weights == Init::Gaussian {
        stream.normal(0, count, 1.0 / lora.lora_r as f32)
    } else {
        // PyTorch's kaiming_uniform_ with a = √5.
        let bound = 1.0 / (inner as f32).sqrt();
        let mut rng = stream.at(0, 0);
        (0..count).map(|_| rng.random_range(-bound..bound)).collect()
    };
    Ok(Tensor::from_vec(values, (lora.lora_r, inner), device)?)
}

/// Rounds of power iteration: peft's `pissa_niter_16`.
const ROUNDS: usize = 16;
/// Oversampling columns for convergence.
const SPARE: usize = 8;

/// `√S·Vᵀ` `[r, I]` and `U·√S` `[O, r]` for the `r` largest singular values, by randomised subspace iteration (Halko et
/// al., 2011, algorithm 4.4).
fn principal(weight: &Tensor, rank: usize, stream: &Stream) -> Result<[Tensor; 2]> {
    let (outer, inner) = weight.dims2()?;
    let width = (rank + SPARE).min(outer).min(inner);
    let weight = weight.to_dtype(DType::F64)?;
    let start = stream.normal(1, inner * width, 1.0);
    let start = Tensor::from_vec(start, (inner, width), weight.device())?.to_dtype(DType::F64)?;
    let mut q = orthonormal(&weight.matmul(&start)?)?;
    for _ in 0..ROUNDS {
        let z = orthonormal(&weight.t()?.matmul(&q)?)?;
        q = orthonormal(&weight.matmul(&z)?)?;
    }
    // W ≈ Q·(QᵀW): singular vectors come from the small factor, the left ones multiplied by Q.
    let small = matrix(&q.t()?.matmul(&weight)?)?.svd(true, true);
    let (Some(u), Some(v)) = (&small.u, &small.v_t) else {
        return Err(Error::run("no singular vectors"));
    };
    let roots: Vec<f64> = small.singular_values.iter().take(rank).map(|s| s.sqrt()).collect();
    let roots = Tensor::from_slice(&roots, rank, weight.device())?;
    let a = tensor(&v.rows(0, rank).clone_owned(), weight.device())?;
    let b = q.matmul(&tensor(&u.columns(0, rank).clone_owned(), weight.device())?)?;
    let (a, b) = (a.broadcast_mul(&roots.unsqueeze(1)?)?, b.broadcast_mul(&roots)?);
    let f32 = |x: Tensor| x.to_dtype(DType::F32)?.contiguous();
    Ok([f32(a)?, f32(b)?])
}

/// An orthonormal basis of the columns.
fn orthonormal(x: &Tensor) -> Result<Tensor> {
    tensor(&matrix(x)?.qr().q(), x.device())
}

pub(super) fn matrix(x: &Tensor) -> Result<DMatrix<f64>> {
    let (rows, cols) = x.dims2()?;
    Ok(DMatrix::from_row_slice(rows, cols, &x.flatten_all()?.to_vec1::<f64>()?))
}

pub(super) fn tensor(x: &DMatrix<f64>, device: &Device) -> Result<Tensor> {
    Ok(Tensor::from_vec(x.transpose().as_slice().to_vec(), x.shape(), device)?)
}
