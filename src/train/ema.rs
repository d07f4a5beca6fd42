//! An exponential moving average of the trained weights (Polyak averaging), in f32: `e ← decay · e + (1 − decay) · w`
//! after each optimizer step, starting from the initial weights.
//!
//! The average is what gets evaluated and saved; training never sees it.

use rayon::prelude::*;

use super::{Learner, Settings};
use crate::error::{Context, Result};
use crate::ops::cpu;
use crate::optim::Param;

const CHUNK: usize = 1 << 16;

/// The averaged weights, as a separate model that no optimizer updates.
#[derive(Debug)]
pub struct Ema {
    decay: f32,
    average: Learner,
}

impl Ema {
    /// Starts an average at the learner's weights, if the settings ask for one.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(learner: &Learner, settings: &Settings) -> Result<Option<Self>> {
        if settings.ema_decay <= 0.0 {
            return Ok(None);
        }
        Ok(Some(Self { decay: settings.ema_decay as f32, average: learner.twin()? }))
    }

    /// The averaged model.
    pub fn learner(&self) -> &Learner {
        &self.average
    }

    /// Moves the average towards the learner's weights.
    ///
    /// # Errors
    /// Names a parameter that could not be read or written.
    pub fn update(&self, learner: &Learner) -> Result<()> {
        let pairs = self.average.params().iter().zip(learner.params().values());
        pairs.into_iter().try_for_each(|((name, average), param)| self.mix(average, param).at(name))
    }

    fn mix(&self, average: &Param, param: &Param) -> Result<()> {
        let (keep, take) = (self.decay, 1.0 - self.decay);
        if !average.master.device().is_cpu() {
            let kept = (average.master.as_tensor().detach() * f64::from(keep))?;
            return average.set(&(kept + (param.master.as_tensor().detach() * f64::from(take))?)?);
        }
        cpu::with_slice_mut(&average.master, |average: &mut [f32]| {
            cpu::with_slice(&param.master, |param: &[f32]| {
                let chunks = average.par_chunks_mut(CHUNK).zip(param.par_chunks(CHUNK));
                chunks.for_each(|(average, param)| {
                    let pairs = average.iter_mut().zip(param);
                    pairs.for_each(|(average, param)| *average = keep * *average + take * param);
                });
            })
        })??;
        average.send(&average.master)
    }
}
