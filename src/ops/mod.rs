//! Differentiable ops over Candle tensors, one file each.
//!
//! Every op has two forms: a *plain* one composed of Candle's own differentiable ops, correct on every device, and a
//! CPU one with its own forward and backward under [`cpu`]; with the feature `cuda` a third, using the kernels under
//! [`cuda`]. The public function selects by device; tests compare the forms with each other, and the backward with
//! finite differences. Candle's `*_no_bwd` ops, which silently end the graph, are not reachable through this module.
//!
//! Shape letters used throughout: `T` tokens of the packed forest, `D` hidden size, `H` query heads, `G` key/value
//! heads, `E` head dimension, `F` MLP hidden size, `V` vocabulary, `N` targets, `S` sequences (leaves).

pub mod attention;
pub mod by_host;
pub mod cached;
pub mod cpu;
pub mod cuda;
pub mod embed;
pub mod head;
pub mod host;
pub mod linear;
pub mod norm;
pub mod residual;
pub mod rope;
pub mod sample;
pub mod swiglu;
pub mod unpack;

pub use attention::{AttentionPlan, attention};
pub use by_host::by_host;
pub use linear::linear;
pub use norm::rms_norm;
pub use residual::residual;
pub use rope::{Rotary, rope};
pub use swiglu::swiglu;
