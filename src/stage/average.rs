//! Weighted mean of checkpoints (Llama 3, section 4.1.5).

use super::{Metrics, StageContext};
use crate::error::{Context, Error, Result};
use crate::model::checkpoint::{Checkpoint, LoadOptions};
use crate::model::save::SaveOptions;
use crate::recipe::plan;
use crate::store;

/// Averages tensor by tensor in f32. Input: checkpoints of one shape and tokenizer. Output: `checkpoint/`.
pub fn run(context: &StageContext<'_>, spec: &plan::Average) -> Result<Metrics> {
    let weights = shares(&spec.weights, spec.models.len())?;
    let load = |name: &str| {
        context.events.check_interrupt()?;
        Checkpoint::load(name, &context.device, &LoadOptions::default()).at(name)
    };
    let (Some(first), rest) = (spec.models.first(), spec.models.iter().skip(1)) else {
        return Err(Error::usage("`models` is empty, expected at least one checkpoint"));
    };
    let mut mean = load(first)?;
    for tensor in mean.weights.values_mut() {
        *tensor = (&*tensor * weights[0])?;
    }
    for (name, share) in rest.zip(&weights[1..]) {
        let other = load(name)?;
        same_kind(&mean, &other).at(name)?;
        for (sum, tensor) in mean.weights.values_mut().zip(other.weights.values()) {
            *sum = (&*sum + (tensor * *share)?)?;
        }
    }
    let target = context.dir.join("checkpoint");
    store::remove(&target)?;
    let dtype = mean.config.dtype;
    mean.save(&target, &SaveOptions::new(dtype))?;
    Ok(Metrics::from([("models".to_owned(), spec.models.len() as f64)]))
}

/// The weights, scaled to sum to one; equal ones where none are given.
fn shares(weights: &[f64], models: usize) -> Result<Vec<f64>> {
    if weights.is_empty() {
        return Ok(vec![1.0 / models.max(1) as f64; models]);
    }
    let sum: f64 = weights.iter().sum();
    let usable = weights.iter().all(|weight| weight.is_finite()) && sum > 0.0;
    if weights.len() != models || !usable {
        return Err(Error::usage(format!(
            "`weights` is {weights:?}, expected one number for each of {models} models, with a sum above 0"
        )));
    }
    Ok(weights.iter().map(|weight| weight / sum).collect())
}

/// Refuses models whose mean has no meaning.
fn same_kind(one: &Checkpoint, other: &Checkpoint) -> Result<()> {
    let first = one.weights.iter().map(|(name, tensor)| (name, tensor.dims()));
    let second = other.weights.iter().map(|(name, tensor)| (name, tensor.dims()));
    if !first.clone().eq(second.clone()) {
        let differs = first.zip(second).find(|(one, other)| one != other);
        let what = differs.map_or_else(
            || "has another number of tensors".to_owned(),
            |(one, other)| {
                format!(
                    "has `{}` {:?} where the first has `{}` {:?}",
                    other.0, other.1, one.0, one.1
                )
            },
        );
        return Err(Error::run(what).hint("only checkpoints of one shape can be averaged"));
    }
    if one.config.rope != other.config.rope {
        return Err(Error::run("has other rotary frequencies than the first"));
    }
    let hash = |checkpoint: &Checkpoint| {
        checkpoint.tokenizer.as_ref().map(|tokenizer| tokenizer.hash().to_owned())
    };
    if hash(one) != hash(other) {
        return Err(Error::run("has another tokenizer than the first")
            .hint("the same token must mean the same in all checkpoints"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_sum_to_one() {
        assert_eq!(shares(&[], 4).unwrap(), [0.25; 4]);
        assert_eq!(shares(&[3.0, 1.0], 2).unwrap(), [0.75, 0.25]);
        assert!(shares(&[1.0], 2).is_err());
        assert!(shares(&[1.0, -1.0], 2).is_err());
    }
}
