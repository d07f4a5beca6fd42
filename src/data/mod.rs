//! Text in, trees of tokens out: readers, chat templates, masks, packing. Knows no tensors.

pub mod forest;
pub mod tree;
