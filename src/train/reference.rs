//! Log-probabilities of the frozen reference, computed once, kept on disk, and checked for holes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor, safetensors};
use sha2::{Digest, Sha256};

use super::Settings;
use super::order::Order;
use crate::data::examples::Examples;
use crate::data::forest::{Forest, micro_batches};
use crate::error::{Context, Error, Result};
use crate::loss::Readout;
use crate::loss::preference::{Dpo, PairLogps};
use crate::model::transformer::Transformer;
use crate::report::record::Events;
use crate::store;
use crate::train::step;

/// What the reference says about a set of pairs.
pub struct Request<'a> {
    /// The frozen model.
    pub model: &'a Transformer,
    /// SHA-256 of its weights.
    pub weights_hash: &'a str,
    /// The pairs.
    pub pairs: &'a dyn Examples,
    /// How the pairs will be packed: read in exactly the micro-batches of the first epoch, a reference that equals the
    /// policy gives equal bits, and every margin of the first step is exactly 0.
    pub order: &'a Order,
    /// Training settings.
    pub settings: &'a Settings,
    /// Where the cache lies.
    pub dir: &'a Path,
    /// Progress.
    pub events: &'a dyn Events,
}

/// Reads the cache, or computes and writes it. Keyed by the pairs' rows.
///
/// # Errors
/// A cached or computed value that is missing or not finite, named by its row.
pub fn reference_logps(
    request: &Request<'_>,
    objective: &Dpo,
) -> Result<BTreeMap<usize, PairLogps>> {
    let path =
        request.dir.join(format!("reference-{}.safetensors", &key(request, objective)?[..16]));
    if path.is_file() {
        return read(&path, request.pairs);
    }
    // Filled with NaN first: a pair that no micro-batch visited cannot pass for a number.
    let mut table: BTreeMap<usize, PairLogps> = sources(request.pairs)?
        .into_iter()
        .map(|source| (source, PairLogps { chosen: f64::NAN, rejected: f64::NAN }))
        .collect();
    let steps = request.order.steps_per_epoch();
    for step_index in 0..steps {
        request.events.check_interrupt()?;
        let trees = request.order.trees(step_index, request.pairs)?;
        for range in micro_batches(&trees, request.settings.max_tokens_per_micro_batch) {
            let forest = Forest::pack(&trees[range])?;
            let logps = step::read(request.model, Readout::Logps, &forest)?;
            for (source, pair) in forest.sources.iter().zip(objective.pair_logps(&forest, &logps)?)
            {
                table.insert(*source, pair);
            }
        }
        request.events.progress("reference", step_index as u64 + 1, steps as u64);
    }
    check(&table)?;
    let values: Vec<f64> = table.values().flat_map(|pair| [pair.chosen, pair.rejected]).collect();
    let tensor = Tensor::from_vec(values, (table.len(), 2), &Device::Cpu)?;
    store::write_atomic(&path, &::safetensors::serialize([("logps", &tensor)], None)?)?;
    Ok(table)
}

/// Everything the numbers depend on.
fn key(request: &Request<'_>, objective: &Dpo) -> Result<String> {
    let mut hasher = Sha256::new();
    hasher.update(request.weights_hash);
    hasher.update(format!("{:?}", (objective.mask_formatting_tokens, request.settings.dtype)));
    hasher.update(request.settings.max_tokens_per_micro_batch.to_le_bytes());
    for step_index in 0..request.order.steps_per_epoch() {
        for tree in request.order.trees(step_index, request.pairs)? {
            hasher.update(format!("{tree:?}"));
        }
    }
    Ok(store::hex(&hasher.finalize()))
}

/// The row of each pair.
fn sources(pairs: &dyn Examples) -> Result<BTreeSet<usize>> {
    pairs.trees().map(|tree| Ok(tree?.source)).collect()
}

fn read(path: &Path, pairs: &dyn Examples) -> Result<BTreeMap<usize, PairLogps>> {
    let tensors = safetensors::load(path, &Device::Cpu).at(path.display())?;
    let rows = sources(pairs)?;
    let values = tensors
        .get("logps")
        .filter(|tensor| tensor.dims() == [rows.len(), 2] && tensor.dtype() == DType::F64)
        .ok_or_else(|| {
            Error::run("not a cache of reference log-probabilities")
                .at(path.display())
                .hint("delete it")
        })?
        .to_vec2::<f64>()?;
    let table = rows
        .into_iter()
        .zip(values)
        .map(|(row, pair)| (row, PairLogps { chosen: pair[0], rejected: pair[1] }))
        .collect();
    check(&table).at(path.display()).hint("delete it")?;
    Ok(table)
}

fn check(table: &BTreeMap<usize, PairLogps>) -> Result<()> {
    match table.iter().find(|(_, pair)| !(pair.chosen.is_finite() && pair.rejected.is_finite())) {
        Some((row, pair)) => Err(Error::run(format!("reference log-probabilities are {pair:?}"))
            .at(format!("row {row}"))),
        None => Ok(()),
    }
}
