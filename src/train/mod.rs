//! The one training step, the loop around it, and its checkpoints. Knows no methods: an `Objective` says what a
//! log-probability is worth.

pub mod settings;

pub use settings::{Precision, Settings};
