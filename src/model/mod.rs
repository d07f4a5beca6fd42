//! Llama-family models: configuration, named weights, loading and saving, and the forward pass.
//!
//! Weights are a plain ordered map from Hugging Face names to f32 tensors; [`params`] lists the names and shapes of a
//! configuration. Nothing here depends on losses or training.

use std::collections::BTreeMap;

use candle_core::Tensor;

pub mod average;
pub mod backward;
pub mod bases;
pub mod block;
mod block_cpu;
pub mod checkpoint;
pub mod config;
pub mod export;
mod gguf;
mod gguf_layout;
mod gguf_tokenizer;
pub mod gradients;
pub mod heads;
pub mod hub;
pub mod init;
pub mod labels;
pub mod lora;
pub mod matrix;
pub mod on_disk;
mod one_by_one;
pub mod packed;
pub mod params;
mod precision;
pub mod projection;
mod refusals;
mod resize;
pub mod rope;
pub mod run_dir;
pub mod save;
pub mod source;
pub mod tensor_file;
mod tensors;
pub mod transformer;

pub use config::{Architecture, Config, Family};
pub use gradients::Gradients;
pub use precision::Precision;
pub use tensors::Tensors;
pub use transformer::Transformer;

/// The weights of one model under their Hugging Face names, on one device: f32, or as cast by [`Precision::cast`].
///
/// Ordered, so that sums over parameters and the optimizer state always use the same order.
pub type Weights = BTreeMap<String, Tensor>;
