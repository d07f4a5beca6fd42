//! Text from models: sampling settings, the sampler, batched generation with a key/value cache, teachers.
//!
//! Knows nothing of stages or scores, and of files only the ledger of a server's answers.

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
