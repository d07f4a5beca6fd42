//! Text from models: sampling settings, the sampler, batched generation with a key/value cache, teachers.
//!
//! Knows nothing of stages, scores or files.

mod attend;
pub mod cache;
pub mod decode;
pub mod engine;
pub mod grammar;
pub mod local;
mod parts;
pub mod plain;
pub mod sampler;
pub mod sampling;
mod stop;

#[cfg(test)]
mod tests;
