//! Text in, trees of tokens out: readers, chat templates, masks, packing. Knows no tensors.

pub mod forest;
mod jsonl;
mod marks;
pub mod mismatch;
pub mod mix;
mod parquet;
pub(crate) mod paths;
pub mod prepare;
pub mod preview;
pub mod read;
pub mod record;
pub mod render;
pub mod template;
pub mod tokenizer;
mod tokenizer_files;
mod train_tokenizer;
pub mod tree;

pub use train_tokenizer::train_tokenizer;

#[cfg(test)]
mod tests;
