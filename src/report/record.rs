//! Events of a running stage ([`Events`]) and the record kept of it ([`StageRecord`]).
//!
//! Imports nothing above the data layer, so that the training loop and the generator can report through it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// Metrics by name, e.g. `loss`, `accuracy`, `reward`, `kl`, `mean_length`.
pub type Metrics = BTreeMap<String, f64>;

/// Receives the progress and metrics of a running stage. Implementations are cheap to call once per step.
pub trait Events: Sync {
    /// `done` of `total` units (steps, prompts, rows) of `what` are finished. A `total` of 0 means unknown.
    fn progress(&self, _what: &str, _done: u64, _total: u64) {}

    /// Metrics of one optimizer step (counted from 1), for `metrics.jsonl` and TensorBoard.
    fn metrics(&self, _step: u64, _values: &Metrics) -> Result<()> {
        Ok(())
    }

    /// The stage resumes after `step`: metrics of later steps, left by a killed process, are dropped.
    fn resume_after(&self, _step: u64) -> Result<()> {
        Ok(())
    }

    /// One line for the user: what was skipped, truncated, resumed.
    fn note(&self, _text: &str) {}

    /// Whether the user asked to stop. A stage then saves what it needs to resume and returns [`Error::interrupted`].
    fn interrupted(&self) -> bool {
        false
    }

    /// Returns [`Error::interrupted`] if the user asked to stop: for stages whose ledger is always up to date.
    fn check_interrupt(&self) -> Result<()> {
        if self.interrupted() { Err(Error::interrupted()) } else { Ok(()) }
    }
}

/// Events that are ignored, for tests and tools.
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
    /// Whether it was reused from an earlier run.
    pub reused: bool,
    /// Its outputs by name.
    pub outputs: BTreeMap<String, PathBuf>,
    /// SHA-256 of the weights it wrote, if any.
    pub weights_sha256: Option<String>,
    /// Its final metrics.
    pub metrics: Metrics,
    /// Seconds of work, summed over all processes that worked on it.
    pub wall_s: f64,
}

/// `manifest.json` of a finished stage: its record and its inputs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Hash of everything that determines the outputs; equal hash, equal work.
    pub inputs_hash: String,
    /// SHA-256 of each input's content, keyed by the path or id that it was read from.
    pub inputs: BTreeMap<String, String>,
    /// The resolved settings.
    pub settings: Value,
    /// Version of the program that wrote it. Informational: not part of the hash.
    pub program: String,
    /// Instruction set of the kernels that computed it. Informational: in f32 all give the same bits.
    #[serde(default)]
    pub isa: String,
    /// The record, with outputs relative to the directory.
    pub record: StageRecord,
}
