//! Text generation: sampling settings, the sampler, batched generation with a KV cache, teachers.
//!
//! Does not depend on stages or scores; the only files it knows are ledgers of server answers.

pub mod adaptation;
mod attend;
pub mod cache;
pub mod decode;
pub mod engine;
pub mod grammar;
pub mod local;
pub mod openai;
mod parts;
pub mod plain;
pub mod sampler;
pub mod sampling;
mod states;
mod stop;
pub mod teacher;

#[cfg(test)]
mod adaptation_tests;
#[cfg(test)]
mod guesses_tests;
#[cfg(test)]
mod plain_tests;
#[cfg(test)]
mod requests_tests;
#[cfg(test)]
mod tests;
