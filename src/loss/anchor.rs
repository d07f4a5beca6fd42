//! A frozen model that a loss keeps the policy close to, evaluated for every micro-batch.

use std::fmt;
use std::sync::Arc;

use crate::data::forest::Forest;
use crate::error::Result;
use crate::ops::head::Anchor;

type Ask = dyn Fn(&Forest) -> Result<Anchor> + Send + Sync;

/// Source of the frozen model's hidden states and head for a forest's rows.
#[derive(Clone)]
pub struct LiveAnchor {
    ask: Arc<Ask>,
    bytes: u64,
}

impl LiveAnchor {
    /// Wraps `ask`, which returns an anchor without slopes. `bytes`: what the model takes in addition to the policy.
    pub fn new(
        bytes: u64,
        ask: impl Fn(&Forest) -> Result<Anchor> + Send + Sync + 'static,
    ) -> Self {
        Self { ask: Arc::new(ask), bytes }
    }

    /// The anchor of a forest, with these slopes of its divergences.
    ///
    /// # Errors
    /// The model's.
    pub fn of(&self, forest: &Forest, slopes: Vec<f32>) -> Result<Anchor> {
        Ok(Anchor { slopes, ..(self.ask)(forest)? })
    }

    /// Bytes that the model takes in addition to the policy.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl fmt::Debug for LiveAnchor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveAnchor").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}
