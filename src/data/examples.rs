//! Training examples by index, stored in memory or in a file.

use super::tree::Tree;
use crate::error::Result;

/// An indexed set of examples. Training requests a step's examples and drops them after the step, so a set in a file
/// (see [`Stored`](super::stored::Stored)) costs no memory. A separate thread does this one step ahead.
pub trait Examples: Sync {
    /// Number of examples.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The example at `index`, which must be less than [`len`](Self::len).
    ///
    /// # Errors
    /// A file that cannot be read or is damaged.
    fn get(&self, index: usize) -> Result<Tree>;

    /// All examples, in order.
    fn trees(&self) -> Box<dyn Iterator<Item = Result<Tree>> + '_> {
        Box::new((0..self.len()).map(|index| self.get(index)))
    }
}

impl Examples for &[Tree] {
    fn len(&self) -> usize {
        <[Tree]>::len(self)
    }

    fn get(&self, index: usize) -> Result<Tree> {
        Ok(self[index].clone())
    }
}

impl Examples for Vec<Tree> {
    fn len(&self) -> usize {
        self.as_slice().len()
    }

    fn get(&self, index: usize) -> Result<Tree> {
        Ok(self[index].clone())
    }
}
