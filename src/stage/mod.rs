//! The methods, one file each, and the runner that composes them into a run.
//!
//! A stage is a function from its settings and a [`StageContext`] to its final metrics. It writes what its kind
//! promises ([`Kind::outputs`](crate::recipe::Kind::outputs)) into [`StageContext::dir`] and nothing elsewhere. After a
//! kill it is called again with the same directory and resumes from what it finds there; only once it returns does the
//! runner write the manifest and give the directory its final name.

pub mod adapt;
pub mod average;
pub mod device;
pub mod dpo;
pub mod eval;
pub mod generation;
pub mod inputs;
pub mod judgeable;
pub mod memory;
pub mod merge;
pub mod reward;
pub mod rounds;
pub mod run;
pub mod sample;
pub mod score;
pub mod select;
pub mod sft;
pub mod start;
pub mod synth;
pub mod training;

use std::path::PathBuf;

use candle_core::Device;

use crate::error::Result;
use crate::recipe::Spec;
pub use crate::report::record::{Events, Metrics, StageRecord};

/// A stage's inputs besides its settings.
pub struct StageContext<'a> {
    /// Its directory, kept across kills until the stage is finished.
    pub dir: PathBuf,
    /// The round, counted from 1.
    pub round: u32,
    /// Seed of this stage in this round.
    pub seed: u64,
    /// The compute device.
    pub device: Device,
    /// Progress, metrics, and whether the user asked to stop.
    pub events: &'a dyn Events,
}

/// Runs one stage: the only place that maps kinds to functions.
pub fn run_stage(context: &StageContext<'_>, spec: &Spec) -> Result<Metrics> {
    match spec {
        Spec::Sft(spec) => sft::run(context, spec),
        Spec::Reward(spec) => reward::run(context, spec),
        Spec::Dpo(spec) => dpo::run(context, spec),
        Spec::Synth(spec) => synth::run(context, spec),
        Spec::Sample(spec) => sample::run(context, spec),
        Spec::Select(spec) => select::run(context, spec),
        Spec::Average(spec) => average::run(context, spec),
        Spec::Eval(spec) => eval::run(context, spec),
    }
}

#[cfg(test)]
mod generation_tests;
#[cfg(test)]
mod methods_tests;
#[cfg(test)]
mod recipe_tests;
#[cfg(test)]
mod refused_tests;
#[cfg(test)]
mod reward_tests;
