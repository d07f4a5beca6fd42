//! Log-probabilities of the frozen reference: computed once, cached on disk, and checked for gaps.
//!
//! One value per leaf: the chosen response, the rejected one, and responses to other prompts.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, safetensors};
use sha2::{Digest, Sha256};

use super::Settings;
use super::memory::{Adapted, full_in_pass};
use super::order::Order;
use crate::data::examples::Examples;
use crate::data::forest::{Forest, micro_batches};
use crate::data::tree::Tree;
use crate::error::{Context, Error, Result};
use crate::loss::Readout;
use crate::loss::preference::Summing;
use crate::model::params::count;
use crate::model::transformer::Transformer;
use crate::report::record::Events;
use crate::store;
use crate::train::step::{self, StepOptions};

/// A request for the reference's log-probabilities of a set of pairs.
pub struct Request<'a> {
    /// The frozen model.
    pub model: &'a Transformer,
    /// SHA-256 of its weights.
    pub weights_hash: &'a str,
    /// The pairs.
    pub pairs: &'a dyn Examples,
    /// How the pairs will be packed. Computed in exactly the micro-batches of the first epoch, a reference equal to the
    /// policy gives equal bits, so every margin of the first step is exactly 0.
    pub order: &'a Order,
    /// Training settings.
    pub settings: &'a Settings,
    /// Directory of the cache.
    pub dir: &'a Path,
    /// Progress.
    pub events: &'a dyn Events,
}

/// Log-probabilities of each row's leaves, in tree order.
pub type Logps = BTreeMap<usize, Vec<f64>>;

/// Reads the cache, or computes and writes it. Keyed by tree row.
///
/// # Errors
/// A cached or computed value that is missing or not finite, named by row.
pub fn reference_logps(request: &Request<'_>, summing: Summing) -> Result<Logps> {
    let name = format!("reference-{}.safetensors", &key(request, summing)?[..16]);
    let path = request.dir.join(name);
    if path.is_file() {
        return read(&path, request.pairs);
    }
    // Fill with NaN first, so that a response that no micro-batch visited cannot pass for a number.
    let mut table: Logps = leaves(request.pairs)?
        .into_iter()
        .map(|(source, leaves)| (source, vec![f64::NAN; leaves]))
        .collect();
    let steps = request.order.steps_per_epoch();
    for step_index in 0..steps {
        request.events.check_interrupt()?;
        let trees = request.order.trees(step_index, request.pairs)?;
        for range in micro_batches(&trees, request.settings.max_tokens_per_micro_batch) {
            let forest = Forest::pack(&trees[range])?;
            let logps = step::read(request.model, Readout::Logps, &forest)
                .map_err(|error| full(error, request))?;
            table.extend(summing.table(&forest, &logps));
        }
        request.events.progress("reference", step_index as u64 + 1, steps as u64);
    }
    check(&table)?;
    let values: Vec<f64> = table.values().flatten().copied().collect();
    let len = values.len();
    let tensor = Tensor::from_vec(values, len, &Device::Cpu)?;
    store::write_atomic(&path, &::safetensors::serialize([("logps", &tensor)], None)?)?;
    Ok(table)
}

/// Out-of-memory error. Nothing of the reference is trained.
fn full(error: Error, request: &Request<'_>) -> Error {
    let (config, settings) = (request.model.config(), request.settings);
    let size = settings.dtype.dtype().size_in_bytes() as u64;
    let adapted = Adapted { trained: 0, frozen: count(config) as u64 * size, head: false };
    let options = StepOptions {
        adapted: Some(adapted),
        dtype: settings.dtype,
        gpu: true,
        ..StepOptions::new(settings.max_tokens_per_micro_batch)
    };
    full_in_pass(error, "in the reference's forward pass", (config, &options))
}

/// Cache key: everything the values depend on.
fn key(request: &Request<'_>, summing: Summing) -> Result<String> {
    let mut hasher = Sha256::new();
    hasher.update(request.weights_hash);
    hasher.update(format!("{:?}", (summing, request.settings.dtype)));
    hasher.update(request.settings.max_tokens_per_micro_batch.to_le_bytes());
    for step_index in 0..request.order.steps_per_epoch() {
        for tree in request.order.trees(step_index, request.pairs)? {
            hasher.update(format!("{tree:?}"));
        }
    }
    Ok(store::hex(&hasher.finalize()))
}

/// Number of leaves of each row's tree.
fn leaves(pairs: &dyn Examples) -> Result<BTreeMap<usize, usize>> {
    let of = |tree: Result<Tree>| -> Result<(usize, usize)> {
        let tree = tree?;
        Ok((tree.source, tree.leaves().len()))
    };
    pairs.trees().map(of).collect()
}

fn read(path: &Path, pairs: &dyn Examples) -> Result<Logps> {
    let tensors = safetensors::load(path, &Device::Cpu).at(path.display())?;
    let leaves = leaves(pairs)?;
    let expected: usize = leaves.values().sum();
    let values = tensors
        .get("logps")
        .filter(|tensor| tensor.dims() == [expected] && tensor.dtype() == DType::F64)
        .ok_or_else(|| {
            Error::run("not a cache of reference log-probabilities")
                .at(path.display())
                .hint("delete it")
        })?
        .to_vec1::<f64>()?;
    let mut values = values.into_iter();
    let table = leaves
        .into_iter()
        .map(|(row, count)| (row, values.by_ref().take(count).collect()))
        .collect();
    check(&table).at(path.display()).hint("delete it")?;
    Ok(table)
}

fn check(table: &Logps) -> Result<()> {
    match table.iter().find(|(_, logps)| !logps.iter().all(|logp| logp.is_finite())) {
        Some((row, logps)) => Err(Error::run(format!(
            "reference log-probabilities are {logps:?}, expected finite numbers"
        ))
        .at(format!("row {row}"))),
        None => Ok(()),
    }
}
