//! A reference that follows the policy: TR-DPO (Gorbatovski et al., 2024, equations 3 and 4).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::safetensors;

use super::Learner;
use super::checkpoint::write_tensors;
use super::step;
use crate::data::forest::Forest;
use crate::error::{Context, Error, Result};
use crate::loss::Readout;
use crate::loss::preference::LiveReference;
use crate::model::transformer::Transformer;
use crate::model::{Config, Precision, Weights};
use crate::store::sha256_bytes;

const FILE: &str = "reference.safetensors";

/// When and how far a reference follows the policy. Named as in TRL.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// `α`: the reference becomes `α · policy + (1 − α) · reference`; 1 replaces it.
    pub mixup_alpha: f64,
    /// Sync after every this many optimizer steps.
    pub sync_steps: usize,
}

/// The current reference, shared with the losses that query it.
#[derive(Clone, Debug)]
pub struct Follower {
    pace: Pace,
    now: Arc<Mutex<Now>>,
}

#[derive(Debug)]
struct Now {
    /// The reference's parameters in f32, so that small steps towards the policy are not lost.
    reference: Learner,
    /// The same storage, without autograd graphs.
    model: Transformer,
    /// Log-probabilities per forest of this step, cached: a loss that couples the step asks once for its statistics and
    /// again for its slopes.
    said: BTreeMap<String, Vec<f32>>,
}

impl Follower {
    /// Starts at `masters`, computing in `dtype`.
    ///
    /// # Errors
    /// Names a missing tensor.
    pub fn new(config: &Config, masters: Weights, dtype: Precision, pace: Pace) -> Result<Self> {
        Self::of(Learner::with(config, masters, dtype, |_| false)?, pace)
    }

    /// Starts at the weights of a model in training. Frozen weights are shared: with adapters, the reference is a
    /// second set of factors on the same base.
    ///
    /// # Errors
    /// A device error.
    pub fn beside(policy: &Learner, pace: Pace) -> Result<Self> {
        Self::of(policy.twin()?, pace)
    }

    fn of(reference: Learner, pace: Pace) -> Result<Self> {
        let model = Transformer::of(reference.model().config(), &reference.tensors().detached())?;
        let now = Now { reference, model, said: BTreeMap::new() };
        Ok(Self { pace, now: Arc::new(Mutex::new(now)) })
    }

    /// Bytes taken in addition to the policy.
    pub fn bytes(&self) -> u64 {
        self.lock().reference.trained_bytes()
    }

    /// A note if the reference does not follow within a run of `steps` steps.
    pub fn without_effect(&self, steps: usize) -> Option<String> {
        let every = self.pace.sync_steps;
        (every > steps).then(|| {
            format!(
                "the reference never follows the policy: `ref_model_sync_steps` is {every}, and the run ends after step \
                 {steps}"
            )
        })
    }

    /// The reference as the losses query it.
    pub fn live(&self) -> LiveReference {
        let follower = self.clone();
        LiveReference::new(move |forest: &Forest| follower.ask(forest))
    }

    fn ask(&self, forest: &Forest) -> Result<Vec<f32>> {
        let mut now = self.lock();
        let Forest { tokens, spans, targets, .. } = forest;
        let key = sha256_bytes(format!("{tokens:?} {spans:?} {targets:?}").as_bytes());
        if let Some(said) = now.said.get(&key) {
            return Ok(said.clone());
        }
        let said = step::read(&now.model, Readout::Logps, forest)?;
        now.said.insert(key, said.clone());
        Ok(said)
    }

    /// Follows the policy after optimizer step number `step`, if a sync is due. For adapters, `A`, `B` and the
    /// magnitudes are mixed like any other parameters; only at `α` = 1 does that mix their product in the same way.
    pub(super) fn after_step(&self, policy: &Learner, step: usize) -> Result<()> {
        let mut now = self.lock();
        now.said.clear();
        if !step.is_multiple_of(self.pace.sync_steps) {
            return Ok(());
        }
        let alpha = self.pace.mixup_alpha;
        let policy = policy.weights();
        for (name, own) in now.reference.params() {
            let policy = policy.get(name);
            let policy =
                policy.ok_or_else(|| Error::run("missing from the policy").at(name.as_str()))?;
            let policy = policy.to_device(own.master.device())?;
            let mixed = if alpha < 1.0 {
                let own = own.master.as_tensor().detach();
                ((own * (1.0 - alpha))? + (policy * alpha)?)?
            } else {
                // The policy's storage keeps changing.
                policy.copy()?
            };
            own.set(&mixed).at(name)?;
        }
        Ok(())
    }

    /// Writes the reference into a checkpoint's directory.
    ///
    /// # Errors
    /// A file system error.
    pub fn save(&self, dir: &Path) -> Result<()> {
        write_tensors(&self.lock().reference.weights(), &dir.join(FILE))
    }

    /// Restores the reference from a checkpoint.
    pub(super) fn load(&self, dir: &Path) -> Result<()> {
        let path = dir.join(FILE);
        let mut now = self.lock();
        let weights = safetensors::load(&path, now.model.device()).at(path.display())?;
        now.said.clear();
        now.reference.set(&weights.into_iter().collect()).at(path.display())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Now> {
        // A panic elsewhere leaves complete weights behind.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::data::tree::{Role, Tree};
    use crate::model::Tensors;
    use crate::model::checkpoint::Checkpoint;
    use crate::model::lora::{Lora, attach_beside};
    use crate::model::params::EMBEDDING;

    const PACE: Pace = Pace { mixup_alpha: 0.25, sync_steps: 2 };

    fn policy() -> Learner {
        let start = Checkpoint::load_dir("data/tiny/student".as_ref(), &Device::Cpu).unwrap();
        let tensors = Tensors::dense(start.weights);
        let lora = Lora { lora_r: 4, use_dora: true, ..Lora::default() };
        let attached = attach_beside(&lora, &start.config, (&tensors, &Device::Cpu), 1).unwrap();
        Learner::adapted(&start.config, tensors, &attached, Precision::F32, |_| false).unwrap()
    }

    fn forest() -> Forest {
        let tree = Tree::sequence((5..25).collect(), vec![Role::Content; 20], 0);
        Forest::pack(&[tree]).unwrap()
    }

    #[test]
    fn adapter_reference_shares_the_base_and_follows_with_its_factors() {
        let policy = policy();
        let follower = Follower::beside(&policy, PACE).unwrap();
        {
            let now = follower.lock();
            let own = |learner: &Learner| learner.tensors().weights[EMBEDDING].id();
            assert_eq!(own(&now.reference), own(&policy));
        }
        // Less than a third of the total, although the base is tiny here.
        assert_eq!(follower.bytes(), policy.trained_bytes());
        assert!(policy.trained_bytes() < policy.bytes() / 3);

        let first = follower.ask(&forest()).unwrap();
        assert_eq!(first, step::read(policy.model(), Readout::Logps, &forest()).unwrap());
        let start: Weights = policy
            .weights()
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.copy().unwrap()))
            .collect();
        let moved: Weights =
            start.iter().map(|(name, tensor)| (name.clone(), (tensor + 0.02).unwrap())).collect();
        policy.set(&moved).unwrap();
        follower.after_step(&policy, 1).unwrap();
        assert_eq!(follower.ask(&forest()).unwrap(), first);
        follower.after_step(&policy, 2).unwrap();
        let numbers =
            |tensor: &candle_core::Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (name, now) in follower.lock().reference.weights() {
            for (now, start) in numbers(&now).iter().zip(numbers(&start[&name])) {
                assert!((now - start - 0.005).abs() < 1e-6, "{name}: {now} {start}");
            }
        }
        let second = follower.ask(&forest()).unwrap();
        assert_ne!(second, first);
        assert_ne!(second, step::read(policy.model(), Readout::Logps, &forest()).unwrap());
        let replaced = Follower::beside(&policy, Pace { mixup_alpha: 1.0, ..PACE }).unwrap();
        replaced.after_step(&policy, 2).unwrap();
        let expected = step::read(policy.model(), Readout::Logps, &forest()).unwrap();
        assert_eq!(replaced.ask(&forest()).unwrap(), expected);
    }

    #[test]
    fn a_reference_that_never_follows_is_noted() {
        let follower = Follower::beside(&policy(), PACE).unwrap();
        assert_eq!(follower.without_effect(2), None);
        assert_eq!(
            follower.without_effect(1).unwrap(),
            "the reference never follows the policy: `ref_model_sync_steps` is 2, and the run ends after step 1"
        );
    }

    #[test]
    fn forest_is_read_once_per_step() {
        let policy = policy();
        let follower = Follower::beside(&policy, PACE).unwrap();
        let said = follower.ask(&forest()).unwrap();
        // The cached values are returned.
        follower.lock().said.values_mut().for_each(|said| said[0] = 7.0);
        assert_eq!(follower.ask(&forest()).unwrap()[0].to_bits(), 7.0_f32.to_bits());
        let tree = Tree::sequence((6..26).collect(), vec![Role::Content; 20], 0);
        let other = follower.ask(&Forest::pack(&[tree]).unwrap()).unwrap();
        assert_ne!(other, said);
        follower.after_step(&policy, 1).unwrap();
        assert_eq!(follower.ask(&forest()).unwrap(), said);
    }
}
