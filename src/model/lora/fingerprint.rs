//! What tells one base from another: its weights, or for a base that is itself an adapter, what it was made of.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::peft;
use crate::error::Result;
use crate::model::{Weights, params};
use crate::store;

/// The fingerprints of a base.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BaseId {
    /// The one that its adapters record.
    pub fingerprint: String,
    /// The one that adapters of earlier versions recorded, where it is another.
    pub former: Option<String>,
}

impl BaseId {
    /// Of a base with this [`fingerprint`], and no other.
    pub fn new(fingerprint: String) -> Self {
        Self { fingerprint, former: None }
    }

    /// Of the model that the adapter in `dir` makes of `base`: a hash of the base's fingerprint and of the adapter's
    /// files. Merged weights have other last bits on a GPU than on a CPU; their [`fingerprint`], `merged`, is what earlier
    /// versions recorded.
    ///
    /// # Errors
    /// Missing or damaged files.
    pub(in crate::model) fn of_adapter(base: &Self, dir: &Path, merged: String) -> Result<Self> {
        let mut config: Map<String, Value> = store::read_json(&dir.join(peft::CONFIG))?;
        // A base is the same one wherever it lies.
        config.shift_remove(peft::BASE_NAME);
        let config = Value::Object(config);
        let weights = store::sha256_file(&dir.join(peft::WEIGHTS))?;
        let parts = format!("{} {weights} {config}", base.fingerprint);
        Ok(Self { fingerprint: store::sha256_bytes(parts.as_bytes()), former: Some(merged) })
    }

    /// Whether an adapter with this record was trained on the base.
    pub(super) fn is(&self, recorded: &str) -> bool {
        self.fingerprint == recorded || self.former.as_deref() == Some(recorded)
    }
}

/// A short hash that identifies a model's weights: names, shapes, and evenly spaced values of each tensor.
///
/// # Errors
/// A device error.
pub fn fingerprint(weights: &Weights) -> Result<String> {
    let mut fingerprint = Fingerprint::default();
    weights.iter().try_for_each(|(name, tensor)| fingerprint.add(name, tensor))?;
    Ok(fingerprint.finish())
}

/// As [`fingerprint`], for tensors added one at a time, in any order.
#[derive(Debug, Default)]
pub(crate) struct Fingerprint(BTreeMap<String, String>);

impl Fingerprint {
    /// Adds one tensor, read as f32.
    ///
    /// # Errors
    /// A device error.
    pub(crate) fn add(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        const SAMPLES: usize = 64;
        // A reward model's head differs from its base's.
        if [params::HEAD, params::SCORE, params::SCORE_BIAS].contains(&name) {
            return Ok(());
        }
        let count = tensor.elem_count();
        let ids: Vec<u32> =
            (0..SAMPLES.min(count)).map(|i| (i * count / SAMPLES.min(count)) as u32).collect();
        let ids = Tensor::new(ids, tensor.device())?;
        let samples = tensor.flatten_all()?.index_select(&ids, 0)?.to_dtype(DType::F32)?;
        let (shape, samples) = (tensor.dims(), samples.to_vec1::<f32>()?);
        self.0.insert(name.to_owned(), format!("{name} {shape:?} {samples:?}\n"));
        Ok(())
    }

    /// The hash.
    pub(crate) fn finish(self) -> String {
        let mut hasher = Sha256::new();
        self.0.values().for_each(|line| hasher.update(line));
        store::hex(&hasher.finalize())
    }
}
