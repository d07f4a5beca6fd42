//! All of an optimizer step that is known before the model has computed anything: its examples packed into micro-batches, and
//! what the blocks share of each. Made on the host, so that a thread may be ahead of the steps (see [`feed`](super::feed)).

use std::borrow::Borrow;

use crate::data::forest::{Forest, micro_batches};
use crate::data::tree::Tree;
use crate::error::Result;
use crate::model::block::Layout;
use crate::model::transformer::Transformer;

/// One micro-batch, ready to be computed.
#[derive(Debug)]
pub struct MicroBatch {
    /// The packed examples.
    pub forest: Forest,
    /// Positions and who sees whom.
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
    /// The rows that its examples come from, in their order.
    pub rows: Vec<usize>,
    /// In the order in which they are computed.
    pub parts: Vec<MicroBatch>,
}

impl Batch {
    /// Packs `trees` for `model` by a token budget. For a GPU, what it is sent of the layouts waits in page-locked memory.
    ///
    /// # Errors
    /// A tree that breaks its invariants; a sequence longer than the model's positions; the device's.
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

    /// Its tokens, shared ones once.
    pub fn tokens(&self) -> usize {
        self.parts.iter().map(|part| part.forest.len()).sum()
    }
}
