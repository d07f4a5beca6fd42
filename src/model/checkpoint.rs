//! Checkpoints: Hugging Face directories, loaded and saved as a whole.
//!
//! Loading rejects broken models: missing, unexpected or wrongly shaped tensors, truncated files, non-finite weights,
//! and a tokenizer with ids beyond the embedding.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::Value;

use super::config::{Config, ids_of};
use super::gguf::Gguf;
use super::lora::{self, load::is_adapter};
use super::source::{self, Source};
use super::tensor_file::{self, Mapped};
use super::{Precision, Weights, gguf_tokenizer, params};
use crate::data::tokenizer::ChatTokenizer;
use crate::error::{Context, Error, Result};
use crate::ops::cuda::device::out_of_memory;
use crate::store;

/// The file of an unsharded checkpoint.
pub(super) const SINGLE: &str = "model.safetensors";
/// The index of a sharded checkpoint.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// A model in memory: the contents of a Hugging Face directory.
#[derive(Clone)]
pub struct Checkpoint {
    /// The model's shape and special ids.
    pub config: Config,
    /// Exactly the parameters in [`params::shapes`].
    pub weights: Weights,
    /// The tokenizer with its chat template, if any.
    pub tokenizer: Option<ChatTokenizer>,
}

/// Loading options.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// Branch, tag or commit of a hub repository; default `main`.
    pub revision: Option<String>,
}

impl Checkpoint {
    /// Loads a directory, a GGUF file or a hub repository (see [`source::resolve`]), in f32.
    ///
    /// # Errors
    /// No such model, an unsupported one, or damaged files.
    pub fn load(name_or_path: &str, device: &Device, options: &LoadOptions) -> Result<Self> {
        match source::resolve(name_or_path, options.revision.as_deref())? {
            Source::Directory(dir) => Self::load_dir(&dir, device),
            Source::Gguf(path) => Self::load_gguf(&path, device),
        }
    }

    /// The same model with another compute dtype.
    ///
    /// # Errors
    /// An unsupported compute dtype, in general or on this device.
    pub fn computed_in(self, precision: Precision) -> Result<Self> {
        Ok(Self { weights: precision.cast(self.weights)?, ..self })
    }

    /// The same model on a device; tensors already there are shared, not copied.
    ///
    /// # Errors
    /// A device error.
    pub fn on(self, device: &Device) -> Result<Self> {
        let moved = |(name, tensor): (String, Tensor)| Ok((name, tensor.to_device(device)?));
        Ok(Self { weights: self.weights.into_iter().map(moved).collect::<Result<_>>()?, ..self })
    }

    /// Reads a Hugging Face directory, or a peft adapter directory, which is merged into its base.
    ///
    /// # Errors
    /// As [`load_config`] and [`load_weights`]; a tokenizer that is broken or has ids beyond the embedding.
    pub fn load_dir(dir: &Path, device: &Device) -> Result<Self> {
        if is_adapter(dir) {
            return Self::load_adapter(dir, device);
        }
        let config = load_config(dir)?;
        let tokenizer = ChatTokenizer::in_dir(dir)?;
        check_vocabulary(&config, tokenizer.as_ref()).at(dir.display())?;
        let weights =
            load_weights(dir, &config, device).map_err(|error| unloaded(error, &config))?;
        Ok(Self { config, weights, tokenizer })
    }

    /// Reads a GGUF file: weights, configuration, tokenizer and chat template.
    ///
    /// # Errors
    /// An unsupported architecture, tokenizer or feature; damaged files.
    pub fn load_gguf(path: &Path, device: &Device) -> Result<Self> {
        let gguf = Gguf::open(path)?;
        let read = || {
            let config = gguf.config()?;
            let tokenizer = gguf_tokenizer::chat_tokenizer(&gguf)?;
            check_vocabulary(&config, Some(&tokenizer))?;
            let weights =
                gguf.weights(&config, device).map_err(|error| unloaded(error, &config))?;
            Ok::<_, Error>(Self { config, weights, tokenizer: Some(tokenizer) })
        };
        read().at(path.display())
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// The checkpoint has no tokenizer.
    pub fn tokenizer(&self) -> Result<&ChatTokenizer> {
        self.tokenizer.as_ref().ok_or_else(no_tokenizer)
    }

    /// All ids that end a response: the model's and the tokenizer's.
    pub fn ends(&self) -> Vec<u32> {
        let mut ends = self.config.eos_token_ids.clone();
        for id in self.tokenizer.iter().flat_map(ChatTokenizer::ends) {
            if !ends.contains(id) {
                ends.push(*id);
            }
        }
        ends
    }
}

/// Adds memory usage to an out-of-memory error of loading weights.
fn unloaded(error: Error, config: &Config) -> Error {
    let parts = [("weights in f32", 4 * params::count(config) as u64)];
    let ways = "use_peft = true, which reads a base rounded or packed, a smaller model, or device = \"cpu\"";
    out_of_memory(error, "while a model was read", parts, ways)
}

/// Configuration and tokenizer of a local model: a directory or a GGUF file. Reads no weights.
///
/// # Errors
/// Missing, damaged or unsupported files.
pub fn peek(path: &Path) -> Result<(Config, Option<ChatTokenizer>)> {
    if path.is_dir() {
        if is_adapter(path) {
            let (adapter, base) = lora::load::peek(path)?;
            let base = match source::resolve(&base, None)? {
                Source::Directory(path) | Source::Gguf(path) => path,
            };
            let (config, tokenizer) = peek(&base)?;
            let config = lora::load::config_beside(config, &adapter, path)?;
            return Ok((config, ChatTokenizer::in_dir(path)?.or(tokenizer)));
        }
        return Ok((load_config(path)?, ChatTokenizer::in_dir(path)?));
    }
    let gguf = Gguf::open(path)?;
    let read = || Ok::<_, Error>((gguf.config()?, Some(gguf_tokenizer::chat_tokenizer(&gguf)?)));
    read().at(path.display())
}

/// An id without an embedding row would only fail once a text contains its token.
pub(super) fn check_vocabulary(config: &Config, tokenizer: Option<&ChatTokenizer>) -> Result<()> {
    let ids = tokenizer.map_or(0, ChatTokenizer::vocab_size);
    if ids <= config.vocab_size {
        return Ok(());
    }
    Err(Error::run(format!(
        "the tokenizer has ids up to {}, the model's vocabulary only {} rows",
        ids - 1,
        config.vocab_size
    ))
    .hint(
        "the tokenizer is of another model, or has added tokens and the embedding needs resizing",
    ))
}

/// Reads the `config.json` of a Hugging Face directory. End-of-response ids in `generation_config.json` are added: many
/// models list the end of a turn only there.
///
/// # Errors
/// A missing file, and all of [`Config::from_json`].
pub fn load_config(dir: &Path) -> Result<Config> {
    let path = dir.join("config.json");
    let text = store::read_text(&path)?;
    let mut config = Config::from_json(&text).at(path.display())?;
    let path = dir.join("generation_config.json");
    if path.exists() {
        let value: Value = serde_json::from_str(&store::read_text(&path)?).at(path.display())?;
        let ends = value.get("eos_token_id").and_then(ids_of).unwrap_or_default();
        for id in ends {
            if !config.eos_token_ids.contains(&id) && (id as usize) < config.vocab_size {
                config.eos_token_ids.push(id);
            }
        }
    }
    Ok(config)
}

/// Reads the weights of a Hugging Face directory, single or sharded, as f32 on `device`, and checks
/// them against `config`.
///
/// # Errors
/// No weights in the directory, a truncated file, missing, unexpected or wrongly shaped tensors, non-finite values, a
/// tied head that differs from the embedding. Each error names its file.
pub fn load_weights(dir: &Path, config: &Config, device: &Device) -> Result<Weights> {
    let mut weights = Weights::new();
    let files = weight_files(dir)?;
    let place = if files.contains_key(SINGLE) { SINGLE } else { INDEX };
    let place = dir.join(place);
    for (file, listed) in files {
        let path = dir.join(file);
        let mapped = Mapped::open(&path).hint("the checkpoint's index names this file")?;
        let tensors = mapped.tensors(&path)?;
        check_file(config, &tensors, &listed).at(path.display())?;
        let names: Vec<&str> =
            tensors.names().into_iter().filter(|name| !is_derived(name)).collect();
        let read = tensor_file::read_tensors(&path, &tensors, &names, device)?;
        for (name, tensor) in read {
            if weights.insert(name.clone(), tensor).is_some() {
                return Err(in_two_files(&name).at(path.display()));
            }
        }
    }
    drop_tied_head(config, &mut weights).at(place.display())?;
    params::check(config, &weights).at(place.display())?;
    Ok(weights)
}

/// A directory's weight files, with the tensors that the index assigns to each.
pub(super) fn weight_files(dir: &Path) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let index = dir.join(INDEX);
    if index.exists() {
        read_index(&index)
    } else if dir.join(SINGLE).exists() {
        Ok(BTreeMap::from([(SINGLE.to_owned(), BTreeSet::new())]))
    } else {
        Err(no_weights(dir))
    }
}

pub(super) fn in_two_files(name: &str) -> Error {
    Error::run(format!("tensor `{name}` is in two files of the checkpoint"))
}

/// Checks names and shapes from the header alone, before gigabytes are read.
pub(super) fn check_file(
    config: &Config,
    tensors: &safetensors::SafeTensors<'_>,
    listed: &BTreeSet<String>,
) -> Result<()> {
    let names = tensors.names();
    if let Some(lost) = listed.iter().find(|name| !names.contains(&name.as_str())) {
        return Err(Error::run(format!("missing tensor `{lost}`, which {INDEX} puts here")));
    }
    let expected = params::shapes(config);
    for (name, view) in tensors.iter() {
        if let Some(expected) = expected.get(name)
            && view.shape() != expected
        {
            return Err(params::wrong_shape(name, view.shape(), expected));
        }
    }
    Ok(())
}

/// Old conversions store the rotary table, which follows from the configuration.
pub(super) fn is_derived(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}

/// Some writers store the tied head again. It is dropped after checking that it is a copy.
fn drop_tied_head(config: &Config, weights: &mut Weights) -> Result<()> {
    if !config.is_tied() {
        return Ok(());
    }
    let Some(head) = weights.remove(params::HEAD) else { return Ok(()) };
    let Some(embedding) = weights.get(params::EMBEDDING) else { return Ok(()) };
    if is_same(&head, embedding)? { Ok(()) } else { Err(not_tied()) }
}

/// Whether two tensors have the same shape and values.
pub(super) fn is_same(a: &Tensor, b: &Tensor) -> Result<bool> {
    if a.dims() != b.dims() {
        return Ok(false);
    }
    Ok(a.ne(b)?.to_dtype(candle_core::DType::F32)?.sum_all()?.to_scalar::<f32>()? < 0.5)
}

/// Error for a stored head that is not the embedding.
pub(super) fn not_tied() -> Error {
    Error::run(format!(
        "`{}` differs from `{}` though tie_word_embeddings is true",
        params::HEAD,
        params::EMBEDDING
    ))
    .hint("set tie_word_embeddings to false in config.json to use both")
}

/// The files of a sharded checkpoint, with their expected tensors.
fn read_index(path: &Path) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let value: Value = serde_json::from_str(&store::read_text(path)?).at(path.display())?;
    let map = value
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| Error::run("missing the object `weight_map`").at(path.display()))?;
    let mut files: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (name, file) in map {
        // A plain file name only: an untrusted index must not reach outside its directory.
        let file = file
            .as_str()
            .filter(|file| Path::new(file).file_name().is_some_and(|name| name == *file))
            .ok_or_else(|| {
                Error::run(format!("`{name}` is in {file}, expected a file name"))
                    .at(path.display())
            })?;
        files.entry(file.to_owned()).or_default().insert(name.clone());
    }
    Ok(files)
}

/// Error for a checkpoint without a tokenizer.
pub(super) fn no_tokenizer() -> Error {
    Error::run("the checkpoint has no tokenizer.json")
        .hint("copy the tokenizer files of its base model beside config.json")
}

fn no_weights(dir: &Path) -> Error {
    let error = Error::run(format!("neither {SINGLE} nor {INDEX} is there")).at(dir.display());
    let others = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"];
    match others.iter().find(|name| dir.join(name).exists()) {
        Some(name) => error.hint(format!("convert {name} to safetensors first")),
        None => error.hint("give a Hugging Face checkpoint directory, a .gguf file or a hub id"),
    }
}
