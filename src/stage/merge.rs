//! `arriero merge`: an adapter becomes part of its base, and success is reported after the numbers agree.

use std::path::PathBuf;

use candle_core::Device;
use serde::Serialize;

use crate::data::forest::Forest;
use crate::data::tree::{Role, Tree};
use crate::error::{Error, Result};
use crate::model::checkpoint::{Checkpoint, LoadOptions};
use crate::model::export::{Difference, Encoding, Format, check_new, export};
use crate::model::lora::{self, peft};
use crate::model::save::SaveOptions;
use crate::model::{Precision, Tensors, Transformer};
use crate::rng::Stream;
use crate::train::Learner;

/// What to merge.
#[derive(Clone, Debug)]
pub struct Merge {
    /// The adapter's directory.
    pub adapter: PathBuf,
    /// The base, where it is not the one that the adapter names.
    pub base: Option<String>,
    /// The new checkpoint's directory.
    pub out: PathBuf,
    /// How its weights are stored.
    pub encoding: Encoding,
}

/// What was found on the way.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Merged {
    /// Adapted projections.
    pub modules: usize,
    /// The largest difference between an output of the base with its adapter beside it and of the merged model.
    pub max_difference: f64,
    /// How far the merged model is from itself as it was written and read again.
    pub stored: Difference,
}

/// Tokens of the sequence on which the two are compared.
const TOKENS: usize = 64;
/// The share of the largest output by which the merged model may differ: sums in another order, no more.
const BOUND: f64 = 1e-4;

/// Merges, compares, writes, reads back and compares again.
///
/// # Errors
/// `out` is there; an adapter of another base; outputs that differ by more than rounding. Nothing is left behind then.
pub fn merge(work: &Merge) -> Result<Merged> {
    check_new(&work.out)?;
    let saved = peft::read(&work.adapter, &Device::Cpu)?;
    let base = match &work.base {
        Some(base) => base.clone(),
        None => lora::load::base_of(&work.adapter, &saved.config)?,
    };
    let base = Checkpoint::load(&base, &Device::Cpu, &LoadOptions::default())?;
    let start = base.clone().prepare_for(&saved, &work.adapter)?;
    let (tensors, attached) = (Tensors::dense(start.weights), saved.attached());
    let live = Learner::adapted(&start.config, tensors, &attached, Precision::F32, |_| false)?;
    let expected = outputs(live.model())?;
    drop(live);

    let modules = saved.adapters.len();
    let merged = base.with_adapter(&saved, &work.adapter)?;
    let found = outputs(&Transformer::new(&merged.config, &merged.weights)?)?;
    let apart = |(a, b): (&f32, &f32)| f64::from((a - b).abs());
    let max_difference = expected.iter().zip(&found).map(apart).fold(0.0, f64::max);
    let largest = expected.iter().fold(0.0, |max: f64, x| max.max(f64::from(x.abs())));
    if max_difference.is_nan() || max_difference > BOUND * largest {
        return Err(Error::run(format!(
            "merged, outputs differ by up to {max_difference:.2e} from the base with its adapter, whose largest is {largest:.2}"
        ))
        .at(work.adapter.display())
        .hint("nothing was written"));
    }
    let format = Format::Safetensors(SaveOptions::new(merged.config.dtype).shard_bytes);
    let stored = export(merged, &work.out, format, work.encoding)?;
    Ok(Merged { modules, max_difference, stored })
}

/// Logits, or scores, of every token of a fixed sequence.
fn outputs(model: &Transformer) -> Result<Vec<f32>> {
    let ids = Stream::new(1, "merge").permutation(0, model.config().vocab_size);
    let ids: Vec<u32> = ids.into_iter().cycle().take(TOKENS).map(|id| id as u32).collect();
    let forest = Forest::pack(&[Tree::sequence(ids, vec![Role::Content; TOKENS], 0)])?;
    let outputs = crate::ops::linear(&model.hidden(&forest)?, &model.head().detach(), None)?;
    Ok(outputs.flatten_all()?.to_vec1::<f32>()?)
}
