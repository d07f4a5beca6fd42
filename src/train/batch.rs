//! The part of an optimizer step that is known before the model computes anything: examples packed into micro-batches,
//! and the layout that all blocks share. Built on the host, so a thread can run ahead (see [`feed`](super::feed)).

use std::borrow::Borrow;

use crate::data::forest::{Forest, micro_batches};
use crate::data::tree::Tree;
use crate::error::Result;
use crate::model::block::Layout;
use crate::model::transformer::Transformer;

/// One micro-batch, ready to compute.
#[derive(Debug)]
pub struct MicroBatch {
    /// The packed examples.
    pub forest: Forest,
    /// Positions, and which tokens attend to which.
    pub layout: Layout,
}

impl Borrow<Forest> for MicroBatch {
    fn borrow(&self) -> &Forest {
        &self.forest
    }
}

/// The micro-batches of one step.
#[derive(Debug)]
pub struct Batch {
    /// Rows of the step's examples, in order.
    pub rows: Vec<usize>,
    /// In the order of computation.
    pub parts: Vec<MicroBatch>,
}

impl Batch {
    /// Packs `trees` for `model` within a token budget. For a GPU, the layout data to upload is staged in page-locked
    /// memory.
    ///
    /// # Errors
    /// A tree that breaks its invariants; a sequence longer than the model's positions; a device error.
    pub fn new<T: Borrow<Tree>>(
        model: &Transformer,
        trees: &[T],
        max_tokens: usize,
    ) -> Result<Self> {
        let part = |range: std::ops::Range<usize>| {
            let forest = Forest::pack(trees[range].iter().map(Borrow::borrow))?;
            let layout = model.layout(&forest)?;
            #[cfg(feature = "cuda")]
            layout.stage(model.config(), model.device())?;
            Ok(MicroBatch { forest, layout })
        };
        let parts = micro_batches(trees, max_tokens).into_iter().map(part);
        let rows = trees.iter().map(|tree| tree.borrow().source).collect();
        Ok(Self { parts: parts.collect::<Result<_>>()?, rows })
    }

    /// Number of tokens, shared ones counted once.
    pub fn tokens(&self) -> usize {
        self.parts.iter().map(|part| part.forest.len()).sum()
    }
}
