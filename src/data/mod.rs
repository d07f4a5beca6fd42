//! Text in, token trees out: readers, chat templates, masks, packing. Knows no tensors.

mod account;
pub(crate) mod columns;
pub mod examples;
pub mod forest;
mod jsonl;
pub mod lessons;
mod marks;
pub mod mismatch;
pub mod mix;
mod parquet;
pub(crate) mod paths;
pub mod pipeline;
pub mod prepare;
pub mod preview;
mod ranks;
pub mod read;
pub mod record;
pub mod render;
mod shared_prompt;
mod siblings;
pub mod stored;
pub mod stream;
pub mod template;
pub mod tokenizer;
mod tokenizer_files;
mod train_tokenizer;
pub mod tree;

pub use train_tokenizer::train_tokenizer;

#[cfg(test)]
mod pipeline_tests;
#[cfg(test)]
mod stream_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod weight_tests;
