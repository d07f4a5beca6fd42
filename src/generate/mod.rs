//! Text from models: sampling settings, the sampler, batched generation with a key/value cache, teachers.
//!
//! Knows nothing of stages, scores or files.

pub mod sampler;
pub mod sampling;
