//! `arriero merge`: an adapter becomes part of its base, and success is reported after the numbers agree.

use std::path::{Path, PathBuf};

use candle_core::Device;
use serde::Serialize;

use crate::data::forest::Forest;
use crate::data::tree::{Role, Tree};
use crate::error::{Error, Result};
use crate::model::checkpoint::{Checkpoint, LoadOptions};
use crate::model::lora::{self, peft};
use crate::model::save::SaveOptions;
use crate::model::{Precision, Tensors, Transformer};
use crate::rng::Stream;
use crate::store;
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
    pub dtype: Precision,
}

/// What was found on the way.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Merged {
    /// Adapted projections.
    pub modules: usize,
    /// The largest difference between an output of the base with its adapter and of the merged model.
    pub max_difference: f64,
    /// The same for the model as it was written and read again.
    pub max_difference_stored: f64,
    /// The largest magnitude of an output.
    pub largest: f64,
}

/// Tokens of the sequence on which both are compared.
const TOKENS: usize = 64;
/// The share of the largest output by which the merged model may differ in f32.
const BOUND: f64 = 1e-4;

/// Merges, writes, reads back and compares.
///
/// # Errors
/// An adapter of another base; outputs that differ by more than rounding, in which case nothing is left behind.
pub fn merge(work: &Merge) -> Result<Merged> {
    if !store::entries(&work.out)?.is_empty() {
        return Err(Error::run("the directory is not empty")
            .at(work.out.display())
            .hint("give a new directory for the merged model"));
    }
    let saved = peft::read(&work.adapter, &Device::Cpu)?;
    let base = match &work.base {
        Some(base) => base.clone(),
        None => lora::load::base_of(&work.adapter, &saved.config)?,
    };
    let base = Checkpoint::load(&base, &Device::Cpu, &LoadOptions::default())?;
    let start = base.clone().prepare_for(&saved)?;
    let tensors = Tensors::dense(start.weights);
    let live =
        Learner::adapted(&start.config, tensors, &saved.attached(), Precision::F32, |_| false)?;
    let expected = outputs(live.model())?;
    let modules = saved.adapters.len();
    let merged = base.with_adapter(saved, &work.adapter)?;
    let found = outputs(&Transformer::new(&merged.config, &merged.weights)?)?;

    let building = store::AtomicDir::create(&work.out)?;
    merged.write_into(building.path(), &SaveOptions::new(work.dtype.dtype()))?;
    let stored = Checkpoint::load_dir(building.path(), &Device::Cpu)?;
    let stored = outputs(&Transformer::new(&stored.config, &stored.weights)?)?;
    let largest = expected.iter().fold(0.0, |max: f64, x| max.max(f64::from(x.abs())));
    let report = Merged {
        modules,
        max_difference: difference(&expected, &found),
        max_difference_stored: difference(&expected, &stored),
        largest,
    };
    // Two bytes a weight keep 8 to 11 bits of each; f32 keeps all.
    let stored_bound = if work.dtype == Precision::F32 { BOUND } else { 0.1 };
    if report.max_difference > BOUND * largest
        || report.max_difference_stored > stored_bound * largest
    {
        return Err(Error::run(format!(
            "outputs differ by {:.2e} before and {:.2e} after writing, the largest is {largest:.2}",
            report.max_difference, report.max_difference_stored
        ))
        .at(work.out.display())
        .hint("nothing was written; try dtype f32"));
    }
    store::move_into_place(building.path(), &work.out)?;
    Ok(report)
}

/// Logits, or scores, of every token of a fixed sequence.
fn outputs(model: &Transformer) -> Result<Vec<f32>> {
    let vocab = model.config().vocab_size;
    let ids = Stream::new(1, "merge").permutation(0, vocab);
    let ids: Vec<u32> = ids.into_iter().cycle().take(TOKENS).map(|id| id as u32).collect();
    let forest = Forest::pack(&[Tree::sequence(ids, vec![Role::Content; TOKENS], 0)])?;
    let outputs = crate::ops::linear(&model.hidden(&forest)?, &model.head().detach(), None)?;
    Ok(outputs.flatten_all()?.to_vec1::<f32>()?)
}

fn difference(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max)
}

/// The last line of the command.
pub fn summary(report: &Merged, out: &Path) -> String {
    format!(
        "{} adapters merged into {}: outputs differ by at most {:.1e}, as stored by {:.1e}, of {:.1}",
        report.modules,
        out.display(),
        report.max_difference,
        report.max_difference_stored,
        report.largest
    )
}
