//! Saves a complete Hugging Face directory that transformers loads to the same values.
//!
//! Weights go into `model.safetensors`, or above a size limit into shards with an index. The directory gets its final
//! name only after every file is complete and synced.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::{Map, Value, json};

use super::checkpoint::{Checkpoint, INDEX, SINGLE, check_vocabulary};
use super::config::{Architecture, Config, one_or_list};
use super::{Weights, params, tensor_file};
use crate::data::tokenizer::{ChatTokenizer, TokenizerSettings};
use crate::error::{Context, Error, Result};
use crate::store::{self, AtomicDir};

/// Options for writing weights.
#[derive(Clone, Copy, Debug)]
pub struct SaveOptions {
    /// Storage dtype: f32, f16 or bf16.
    pub dtype: DType,
    /// Largest size of a weight file in bytes; larger models are sharded.
    pub shard_bytes: usize,
}

impl SaveOptions {
    /// With the usual limit of 5 GB per file.
    pub fn new(dtype: DType) -> Self {
        Self { dtype, shard_bytes: 5_000_000_000 }
    }
}

impl Checkpoint {
    /// Saves everything to the new directory `dir`.
    ///
    /// # Errors
    /// `dir` exists and is not empty, weights that do not match the configuration or are non-finite, I/O errors.
    /// Nothing is left behind on error.
    pub fn save(&self, dir: &Path, options: &SaveOptions) -> Result<()> {
        if !store::entries(dir)?.is_empty() {
            return Err(Error::run("the directory is not empty")
                .at(dir.display())
                .hint("give a new directory for the checkpoint"));
        }
        let building = AtomicDir::create(dir)?;
        self.write_into(building.path(), options)?;
        store::move_into_place(building.path(), dir)
    }

    /// Writes the files into a directory that the caller makes atomic, such as a stage's output.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn write_into(&self, dir: &Path, options: &SaveOptions) -> Result<()> {
        params::check(&self.config, &self.weights)?;
        write_weights(dir, &self.weights, options)?;
        self.write_beside(dir, options.dtype)
    }

    /// Writes all files except the weights, which are stored in `dtype`.
    pub(crate) fn write_beside(&self, dir: &Path, dtype: DType) -> Result<()> {
        let mut config = self.config.clone();
        config.dtype = dtype;
        if config.architecture != Architecture::CausalLm {
            config.pad_token_id = Some(self.reward_pad()?);
        }
        self.write_tokenizer(dir, &config)?;
        if config.architecture == Architecture::CausalLm {
            let text = generation_config(&config, &self.ends());
            store::write_atomic(&dir.join("generation_config.json"), text.as_bytes())?;
        }
        store::write_atomic(&dir.join("config.json"), config.to_json().as_bytes())
    }
}

impl Checkpoint {
    /// The padding id to save a reward model with.
    ///
    /// transformers scores a row at its last non-padding token, so no row may end with the padding id: models that pad
    /// with their end-of-turn token get another one. It is the first of: the padding token of the model or tokenizer, a
    /// special token named after padding, any special token not used in the chat template; excluding tokens that end a
    /// row.
    ///
    /// # Errors
    /// There is no such token.
    pub fn reward_pad(&self) -> Result<u32> {
        let ends = self.ends();
        let set = [self.config.pad_token_id, self.tokenizer.as_ref().and_then(ChatTokenizer::pad)];
        let unused = self.tokenizer.as_ref().map(unused_specials).unwrap_or_default();
        let candidates = set.into_iter().flatten().chain(unused);
        let fits = |id: &u32| !ends.contains(id) && (*id as usize) < self.config.vocab_size;
        candidates.into_iter().find(fits).ok_or_else(|| {
            Error::run("no token can serve as padding: every special token may end a row")
                .hint("add a padding token to the tokenizer and resize the embedding")
        })
    }

    fn write_tokenizer(&self, dir: &Path, config: &Config) -> Result<()> {
        let Some(tokenizer) = &self.tokenizer else { return Ok(()) };
        check_vocabulary(config, Some(tokenizer))?;
        if config.architecture == Architecture::CausalLm {
            return tokenizer.save(dir);
        }
        // Rows must be padded with the model's padding id.
        let settings = tokenizer.settings().clone();
        let settings = TokenizerSettings { pad: config.pad_token_id, ..settings };
        ChatTokenizer::new(tokenizer.inner().clone(), settings)?.save(dir)
    }
}

/// Special tokens that neither begin a text nor occur in the chat template; padding tokens first.
fn unused_specials(tokenizer: &ChatTokenizer) -> Vec<u32> {
    let template = tokenizer.settings().chat_template.clone().unwrap_or_default();
    let mut unused: Vec<(bool, u32)> = tokenizer
        .inner()
        .get_added_tokens_decoder()
        .into_iter()
        .filter(|(id, token)| {
            token.special && Some(*id) != tokenizer.bos() && !template.contains(&token.content)
        })
        .map(|(id, token)| (!token.content.to_lowercase().contains("pad"), id))
        .collect();
    unused.sort_unstable(); // the map is unordered
    unused.into_iter().map(|(_, id)| id).collect()
}

/// `generation_config.json`, so that other programs stop at the same ids.
fn generation_config(config: &Config, ends: &[u32]) -> String {
    let keys = json!({
        "bos_token_id": config.bos_token_id,
        "eos_token_id": one_or_list(ends),
        "pad_token_id": config.pad_token_id,
    });
    format!("{keys:#}\n")
}

/// Writes the weights of a Hugging Face directory, sharded above the size limit.
///
/// # Errors
/// Non-finite weights, an unknown storage dtype, I/O errors.
pub fn write_weights(dir: &Path, weights: &Weights, options: &SaveOptions) -> Result<()> {
    let size = |tensor: &Tensor| tensor.elem_count() * options.dtype.size_in_bytes();
    let sizes = weights.iter().map(|(name, tensor)| (name.as_str(), size(tensor)));
    let files = shards(sizes, options.shard_bytes);
    for (file, names) in &files {
        let tensors = names.iter().map(|name| (name.as_str(), &weights[name])).collect();
        write_file(&dir.join(file), &tensors, options.dtype)?;
    }
    write_index(dir, &files, weights.values().map(size).sum())
}

/// Checkpoint files, with the tensors of each.
pub(super) type Files = Vec<(String, Vec<String>)>;

/// Consecutive groups of at most `limit` bytes; a larger tensor gets its own file.
pub(super) fn shards<'a>(tensors: impl Iterator<Item = (&'a str, usize)>, limit: usize) -> Files {
    let mut groups = vec![Vec::new()];
    let mut filled = 0;
    for (name, size) in tensors {
        if filled > 0 && filled + size > limit {
            groups.push(Vec::new());
            filled = 0;
        }
        filled += size;
        if let Some(last) = groups.last_mut() {
            last.push(name.to_owned());
        }
    }
    let count = groups.len();
    let name = |index: usize| match count {
        1 => SINGLE.to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    };
    groups.into_iter().enumerate().map(|(index, group)| (name(index), group)).collect()
}

/// Writes the index, if there are several files.
pub(super) fn write_index(dir: &Path, files: &Files, total_bytes: usize) -> Result<()> {
    if files.len() < 2 {
        return Ok(());
    }
    let places = files.iter().flat_map(|(file, names)| {
        names.iter().map(|name| (name.clone(), Value::String(file.clone())))
    });
    let map: Map<String, Value> = places.collect();
    let index = json!({"metadata": {"total_size": total_bytes}, "weight_map": map});
    store::write_atomic(&dir.join(INDEX), format!("{index:#}\n").as_bytes())
}

fn write_file(path: &Path, tensors: &BTreeMap<&str, &Tensor>, dtype: DType) -> Result<()> {
    let written = store::write_atomic_with(path, |out| {
        tensor_file::write(out as &mut dyn Write, tensors, dtype)
    });
    written.at(path.display())
}
