//! Weighted sums of adapters of one base by their products, `Σ weight · s·B·A`: peft's `cat` and `svd`. Summing the
//! factors themselves would give a different matrix.

use candle_core::{DType, Tensor};
use indexmap::IndexMap;

use super::init::{matrix, tensor};
use super::peft::{AdapterConfig, BaseRecord, Saved};
use super::{Adapter, Adapters};
use crate::error::{Context, Error, Result};
use crate::model::Weights;

/// The weighted sum of several adapters, given with their names: factors concatenated, with the sum of their ranks, or
/// the best approximation of `rank`. Fully trained parameters are summed with the same weights, which must then add up
/// to 1.
///
/// # Errors
/// Adapters of different bases or modules, or whose sum is not an adapter, such as DoRA's.
pub fn sum(adapters: &[(&str, Saved)], weights: &[f64], rank: Option<usize>) -> Result<Saved> {
    let [(_, first), ..] = adapters else { return Err(Error::usage("no adapters to sum")) };
    adapters.iter().try_for_each(|(name, other)| first.check_sum(other).at(name))?;
    let adapters: Vec<&Saved> = adapters.iter().map(|(_, saved)| saved).collect();
    let mut config = AdapterConfig {
        use_rslora: false,
        rank_pattern: IndexMap::new(),
        alpha_pattern: IndexMap::new(),
        lora_dropout: 0.0,
        ..first.config.clone()
    };
    let mut joined = Adapters::new();
    for module in first.adapters.keys() {
        let parts = adapters.iter().filter_map(|one| one.adapters.get(module)).zip(weights);
        let adapter = join(module, parts, rank)?;
        joined.insert(module.clone(), adapter);
    }
    if !joined.is_empty() {
        // In peft, `layers_to_transform` and `exclude_modules` narrow the targets as first written.
        config.target_modules = joined.keys().cloned().collect();
    }
    config.r = joined.values().map(Adapter::rank).max().unwrap_or(config.r);
    config.lora_alpha = config.r as f64;
    for (module, adapter) in joined.iter().filter(|(_, adapter)| adapter.rank() != config.r) {
        config.rank_pattern.insert(module.clone(), adapter.rank());
        config.alpha_pattern.insert(module.clone(), adapter.rank() as f64);
    }
    let weights = in_full(&adapters, weights)?;
    let base = adapters.iter().find_map(|one| one.base.clone());
    Ok(Saved { config, adapters: joined, weights, base })
}

impl Saved {
    /// Rejects an adapter that cannot be added to this one, or whose sum with it is not an adapter.
    ///
    /// # Errors
    /// As [`sum`].
    pub(in crate::model) fn check_sum(&self, other: &Self) -> Result<()> {
        if [self, other].iter().any(|one| one.config.use_dora) {
            return Err(Error::usage(
                "the sum of DoRA adapters is no adapter: each divides by norms of its own",
            )
            .hint("`arriero merge` them and average the models"));
        }
        BaseRecord::check_same([&self.base, &other.base])?;
        let same = self.adapters.keys().eq(other.adapters.keys())
            && self.weights.keys().eq(other.weights.keys())
            && self.config.task_type == other.config.task_type;
        if !same {
            return Err(Error::usage(
                "adapts other modules than the first adapter, or for another task",
            )
            .hint("adapters of the same targets can be summed"));
        }
        Ok(())
    }
}

impl BaseRecord {
    /// Rejects adapters of different bases, and those that [`check_whole`](Self::check_whole) rejects.
    ///
    /// # Errors
    /// Another base, or the same with another quantisation.
    pub(in crate::model) fn check_same([first, other]: [&Option<Self>; 2]) -> Result<()> {
        Self::check_whole([first, other])?;
        // Merged weights differ between devices.
        let of = |base: &Self| (base.fingerprint.clone(), base.quantization, base.taken);
        match (first, other) {
            (Some(one), Some(two)) if of(one) != of(two) => {
                Err(Error::usage("trained on another base than the first adapter")
                    .hint("adapters of one base, held in one way, can be averaged"))
            }
            _ => Ok(()),
        }
    }
}

/// `Σ w s B A = [B₁ B₂ …] · [w₁s₁A₁; w₂s₂A₂; …]`.
fn join<'a>(
    module: &str,
    parts: impl Iterator<Item = (&'a Adapter, &'a f64)>,
    rank: Option<usize>,
) -> Result<Adapter> {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for (part, weight) in parts {
        a.push((part.a.to_dtype(DType::F32)? * (weight * part.scale))?);
        b.push(part.b.to_dtype(DType::F32)?);
    }
    let (mut a, mut b) = (Tensor::cat(&a, 0)?, Tensor::cat(&b, 1)?);
    if let Some(rank) = rank.filter(|rank| *rank < a.dims()[0]) {
        [a, b] = nearest(&a, &b, rank)?;
    }
    Ok(Adapter { module: module.to_owned(), a, b, scale: 1.0, dora: None })
}

/// Rank-`rank` factors whose product best approximates that of these (Eckart and Young, 1936), without forming it: its
/// singular values are those of a matrix as small as the ranks.
fn nearest(a: &Tensor, b: &Tensor, rank: usize) -> Result<[Tensor; 2]> {
    let wide = |x: &Tensor| matrix(&x.to_dtype(DType::F64)?);
    let (of_b, of_a) = (wide(b)?.qr(), wide(&a.t()?)?.qr());
    let small = (of_b.r() * of_a.r().transpose()).svd(true, true);
    let (Some(u), Some(v)) = (&small.u, &small.v_t) else {
        return Err(Error::run("no singular vectors"));
    };
    let rank = rank.min(small.singular_values.len());
    let left = of_b.q() * u.columns(0, rank);
    let right = v.rows(0, rank) * of_a.q().transpose();
    let roots: Vec<f64> = small.singular_values.iter().take(rank).map(|s| s.sqrt()).collect();
    let roots = Tensor::from_slice(&roots, rank, a.device())?;
    let a = tensor(&right, a.device())?.broadcast_mul(&roots.unsqueeze(1)?)?;
    let b = tensor(&left, b.device())?.broadcast_mul(&roots)?;
    Ok([a.to_dtype(DType::F32)?.contiguous()?, b.to_dtype(DType::F32)?.contiguous()?])
}

fn in_full(adapters: &[&Saved], weights: &[f64]) -> Result<Weights> {
    let mut sums = Weights::new();
    for (one, weight) in adapters.iter().zip(weights) {
        for (name, tensor) in &one.weights {
            let part = (tensor * *weight)?;
            let sum = match sums.get(name) {
                Some(sum) => (sum + part)?,
                None => part,
            };
            sums.insert(name.clone(), sum);
        }
    }
    let total: f64 = weights.iter().sum();
    match sums.keys().next() {
        Some(name) if (total - 1.0).abs() > 1e-9 => Err(Error::usage(format!(
            "`{name}` was trained in full, and the weights sum to {total}"
        ))
        .hint("what is added to the base's is not known: only means of such adapters are")),
        _ => Ok(sums),
    }
}
