//! What a stage says while it runs ([`Events`]) and what is kept of it ([`StageRecord`]).
//!
//! Imports nothing above the data layer, so that the training loop and the generator can report through it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// Numbers by name, e.g. `loss`, `accuracy`, `reward`, `kl`, `mean_length`.
pub type Metrics = BTreeMap<String, f64>;

/// Where a running stage sends its progress and its numbers. Implementations are cheap to call once a step.
pub trait Events: Sync {
    /// `done` of `total` units (steps, prompts, rows) of `what` are finished. `total` 0 means unknown.
    fn progress(&self, _what: &str, _done: u64, _total: u64) {}

    /// Numbers of one optimizer step (counted from 1), to `metrics.jsonl` and TensorBoard.
    fn metrics(&self, _step: u64, _values: &Metrics) -> Result<()> {
        Ok(())
    }

    /// The stage continues after `step`: numbers of later steps, which a killed process left, are dropped.
    fn resume_after(&self, _step: u64) -> Result<()> {
        Ok(())
    }

    /// One line for the user: what was skipped, truncated, resumed.
    fn note(&self, _text: &str) {}

    /// Whether the user asked to stop. A stage then saves what it needs to continue and returns
    /// [`Error::interrupted`].
    fn interrupted(&self) -> bool {
        false
    }

    /// Returns [`Error::interrupted`] where the user asked to stop: for stages whose ledger is always up to date.
    fn check_interrupt(&self) -> Result<()> {
        if self.interrupted() { Err(Error::interrupted()) } else { Ok(()) }
    }
}

/// Events that nobody listens to, for tests and tools.
///
/// ```
/// use arriero::report::record::{Events, Silent};
/// assert!(!Silent.interrupted());
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Events for Silent {}

/// One finished stage of one round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageRecord {
    /// The stage's name in the recipe.
    pub name: String,
    /// Its kind: `sft`, `sample`, …
    pub kind: String,
    /// The round, counted from 1.
    pub round: u32,
    /// Whether an earlier run's work was taken over.
    pub reused: bool,
    /// Its outputs by name.
    pub outputs: BTreeMap<String, PathBuf>,
    /// SHA-256 of the weights it wrote, where it wrote any.
    pub weights_sha256: Option<String>,
    /// Its final numbers.
    pub metrics: Metrics,
    /// Seconds that the work took, over all processes that worked on it.
    pub wall_s: f64,
}

/// `manifest.json` of a finished stage: what it is, and what made it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Hash of everything that decides the outputs; equal hash, equal work.
    pub inputs_hash: String,
    /// SHA-256 of each input's content, by the path or id that it was read from.
    pub inputs: BTreeMap<String, String>,
    /// The resolved settings.
    pub settings: Value,
    /// Version of the program that wrote it. For people: not part of the hash.
    pub program: String,
    /// The instruction set of the kernels that made it. For people: in f32 all give the same bits.
    #[serde(default)]
    pub isa: String,
    /// The record, with outputs relative to the directory.
    pub record: StageRecord,
}
