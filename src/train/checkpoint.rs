//! Checkpoints within a stage: a complete Hugging Face directory or a peft adapter, whose f32 weights are the masters,
//! plus the optimizer state, the weight average if there is one, and the cursor. Written to a temporary directory and
//! renamed, so a killed write leaves nothing that would be read.

use std::path::{Path, PathBuf};

use candle_core::{DType, safetensors};
use serde::{Deserialize, Serialize};

use super::watchdog::Watch;
use super::{Ema, Learner};
use crate::data::stream::Cursor;
use crate::error::{Context, Result};
use crate::optim::adamw::AdamW;
use crate::report::record::Metrics;
use crate::store;

const OPTIMIZER: &str = "optimizer.safetensors";
const AVERAGE: &str = "ema.safetensors";
const STATE: &str = "trainer_state.json";

/// Training progress. Together with the weights and the optimizer state it determines the rest of a run: the order of a
/// set of examples is a function of the seed and the step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps taken.
    pub step: usize,
    /// Tokens processed.
    pub tokens: u64,
    /// Metrics of the first step.
    pub first: Metrics,
    /// Metrics of the last step.
    pub last: Metrics,
    /// Metrics of the last evaluation.
    pub eval: Metrics,
    /// The lowest evaluation loss.
    pub best: Option<f64>,
    /// Evaluations since the lowest loss.
    #[serde(default)]
    pub evals_since_best: usize,
    /// Steps with a clipped gradient.
    #[serde(default)]
    pub clipped: usize,
    /// State of the watchdog.
    #[serde(default)]
    pub watch: Watch,
    /// Position in a stream of examples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<Cursor>,
}

/// A checkpoint on disk.
#[derive(Debug)]
pub struct Saved {
    dir: PathBuf,
}

impl Saved {
    /// Writes `dir/step-NNNNNN/` atomically.
    pub fn write(
        dir: &Path,
        (learner, ema): (&Learner, Option<&Ema>),
        adamw: &AdamW,
        state: &State,
        save: &dyn Fn(&Learner, &Path) -> Result<()>,
    ) -> Result<()> {
        store::create_dir(dir)?;
        let target = store::AtomicDir::create(&dir.join(format!("step-{:06}", state.step)))?;
        save(learner, target.path())?;
        write_tensors(&adamw.export(), &target.path().join(OPTIMIZER))?;
        if let Some(ema) = ema {
            write_tensors(&ema.learner().weights(), &target.path().join(AVERAGE))?;
        }
        store::write_json(&target.path().join(STATE), state)?;
        target.commit(state)
    }

    /// The newest complete checkpoint, after removing half-written ones.
    pub fn newest(dir: &Path) -> Result<Option<Self>> {
        if !dir.is_dir() {
            return Ok(None);
        }
        store::remove_partials(dir)?;
        Ok(Self::all(dir)?.pop())
    }

    fn all(dir: &Path) -> Result<Vec<Self>> {
        let mut steps: Vec<PathBuf> = store::entries(dir)?
            .into_iter()
            .filter(|path| {
                path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step-"))
            })
            .filter(|path| path.join(store::MANIFEST).is_file())
            .collect();
        steps.sort();
        Ok(steps.into_iter().map(|dir| Self { dir }).collect())
    }

    /// Its directory.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Restores the weights, their average and the optimizer.
    pub fn load(
        &self,
        (learner, ema): (&Learner, Option<&Ema>),
        adamw: &mut AdamW,
    ) -> Result<State> {
        let state: State = store::read_json(&self.dir.join(STATE))?;
        learner.set(&learner.read(&self.dir)?).at(self.dir.display())?;
        let path = self.dir.join(OPTIMIZER);
        let moments = safetensors::load(&path, learner.master_device()).at(path.display())?;
        adamw.import(state.step as u64, moments.into_iter().collect())?;
        adamw.round_again(learner.params()).at(self.dir.display())?;
        if let Some(ema) = ema {
            load_tensors(&self.dir.join(AVERAGE), ema.learner())?;
        }
        Ok(state)
    }

    /// Deletes all but the newest `keep` checkpoints.
    pub fn prune(dir: &Path, keep: usize) -> Result<()> {
        let all = Self::all(dir)?;
        let surplus = all.len().saturating_sub(keep.max(1));
        all[..surplus].iter().try_for_each(|saved| store::remove(&saved.dir))
    }

    /// Saves the current weights as the best so far.
    pub fn write_best(dir: &Path, learner: &Learner) -> Result<()> {
        write_tensors(&learner.weights(), &dir.join("best.safetensors"))
    }

    /// Restores the best weights.
    pub fn load_best(dir: &Path, learner: &Learner) -> Result<()> {
        load_tensors(&dir.join("best.safetensors"), learner)
    }
}

fn load_tensors(path: &Path, learner: &Learner) -> Result<()> {
    let tensors = safetensors::load(path, learner.model().device()).at(path.display())?;
    learner.set(&tensors.into_iter().collect()).at(path.display())
}

pub(super) fn write_tensors(tensors: &crate::model::Weights, path: &Path) -> Result<()> {
    let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    store::write_atomic_with(path, |out| {
        crate::model::tensor_file::write(out, &tensors, DType::F32)
    })
}
