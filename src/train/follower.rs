//! A reference that follows the policy: TR-DPO (Gorbatovski et al., 2024, equations 3 and 4).

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, safetensors};

use super::Learner;
use super::checkpoint::write_tensors;
use super::step;
use crate::data::forest::Forest;
use crate::error::{Context, Result};
use crate::loss::Readout;
use crate::loss::preference::LiveReference;
use crate::model::transformer::Transformer;
use crate::model::{Config, Precision, Weights};

const FILE: &str = "reference.safetensors";

/// When and how far a reference follows. Named as in TRL.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// `α`: the reference becomes `α · policy + (1 − α) · reference`; 1 replaces it.
    pub mixup_alpha: f64,
    /// After every so many optimizer steps.
    pub sync_steps: usize,
}

/// The reference as it stands, shared with those that ask it.
#[derive(Clone, Debug)]
pub struct Follower {
    pace: Pace,
    dtype: Precision,
    config: Config,
    now: Arc<Mutex<Now>>,
}

#[derive(Debug)]
struct Now {
    /// In f32, so that small steps towards the policy are not lost.
    masters: Weights,
    model: Transformer,
}

impl Follower {
    /// Begins at `masters`, computing in `dtype`.
    ///
    /// # Errors
    /// Names a tensor that is missing.
    pub fn new(config: &Config, masters: Weights, dtype: Precision, pace: Pace) -> Result<Self> {
        let masters = masters.into_iter().map(|(name, tensor)| {
            let tensor = tensor.to_dtype(DType::F32)?;
            Ok((name, tensor))
        });
        let masters = masters.collect::<Result<Weights>>()?;
        let model = computed(config, &masters, dtype)?;
        let now = Arc::new(Mutex::new(Now { masters, model }));
        Ok(Self { pace, dtype, config: config.clone(), now })
    }

    /// What the losses ask.
    pub fn live(&self) -> LiveReference {
        let follower = self.clone();
        LiveReference::new(move |forest: &Forest| {
            step::read(&follower.lock().model, Readout::Logps, forest)
        })
    }

    /// Follows the policy after its optimizer step number `step`, where one is due.
    pub(super) fn after_step(&self, policy: &Learner, step: usize) -> Result<()> {
        if !step.is_multiple_of(self.pace.sync_steps) {
            return Ok(());
        }
        let alpha = self.pace.mixup_alpha;
        let (mut masters, device) = {
            let now = self.lock();
            (now.masters.clone(), now.model.device().clone())
        };
        for (name, policy) in policy.weights() {
            let policy = policy.to_device(&device)?;
            let mixed = match masters.get(&name) {
                Some(own) if alpha < 1.0 => ((own * (1.0 - alpha))? + (policy * alpha)?)?,
                // The policy's storage moves on.
                _ => policy.copy()?,
            };
            masters.insert(name, mixed);
        }
        self.set(masters)
    }

    /// Writes the reference into a checkpoint's directory.
    ///
    /// # Errors
    /// The file system's.
    pub fn save(&self, dir: &Path) -> Result<()> {
        write_tensors(&self.lock().masters, &dir.join(FILE))
    }

    /// Goes back to where it stood at a checkpoint.
    pub(super) fn load(&self, dir: &Path) -> Result<()> {
        let path = dir.join(FILE);
        let device = self.lock().model.device().clone();
        let masters = safetensors::load(&path, &device).at(path.display())?;
        self.set(masters.into_iter().collect())
    }

    fn set(&self, masters: Weights) -> Result<()> {
        let model = computed(&self.config, &masters, self.dtype)?;
        *self.lock() = Now { masters, model };
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Now> {
        // A panic elsewhere leaves whole weights behind.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn computed(config: &Config, masters: &Weights, dtype: Precision) -> Result<Transformer> {
    let tensors = masters.iter().map(|(name, tensor)| {
        Ok((name.clone(), tensor.detach().to_dtype(dtype.of(name, tensor))?))
    });
    Transformer::new(config, &tensors.collect::<Result<Weights>>()?)
}
