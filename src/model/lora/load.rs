//! Loading an adapter directory as a checkpoint: its base is loaded, and the adapter merged into it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};

use super::is_projection;
use super::peft::{self, AdapterConfig, BaseId, Saved};
use crate::data::tokenizer::ChatTokenizer;
use crate::error::{Context, Error, Result};
use crate::model::checkpoint::{Checkpoint, INDEX, SINGLE, is_same, load_config};
use crate::model::packed::{Packed, Quantization};
use crate::model::source::{self, Source};
use crate::model::{Architecture, Config, Tensors, Weights, labels, params};
use crate::store;

/// Whether a directory holds an adapter without weights of its own.
pub fn is_adapter(dir: &Path) -> bool {
    dir.join(peft::CONFIG).is_file() && !dir.join(SINGLE).exists() && !dir.join(INDEX).exists()
}

/// The directory of an adapter, if `name` is one.
///
/// # Errors
/// No such model.
pub fn directory(name: &str) -> Result<Option<PathBuf>> {
    match source::resolve(name, None)? {
        Source::Directory(dir) if is_adapter(&dir) => Ok(Some(dir)),
        _ => Ok(None),
    }
}

/// The base named by an adapter: a path relative to the current or the adapter's directory, or a hub id.
///
/// # Errors
/// No base is named.
pub fn base_of(dir: &Path, config: &AdapterConfig) -> Result<String> {
    let Some(base) = config.base_model_name_or_path.as_deref().filter(|base| !base.is_empty())
    else {
        return Err(Error::run("`base_model_name_or_path` is missing")
            .at(dir.join(peft::CONFIG).display())
            .hint("write the base model's path there, or give it to `arriero merge` with --base"));
    };
    let beside: PathBuf = dir.join(base);
    let is_itself = |path: &Path| {
        path.canonicalize().is_ok_and(|path| dir.canonicalize().is_ok_and(|dir| path == dir))
    };
    if is_itself(Path::new(base)) || is_itself(&beside) {
        return Err(Error::run("`base_model_name_or_path` is the adapter itself")
            .at(dir.join(peft::CONFIG).display()));
    }
    let here = Path::new(base).exists();
    Ok(if !here && beside.exists() { beside.display().to_string() } else { base.to_owned() })
}

impl Saved {
    /// Base and adapter beside each other as in training. `weights`: those of [`Checkpoint::prepare_for`]. GGUF blocks
    /// stay dequantised, which is bit-identical.
    ///
    /// # Errors
    /// A module the base does not have; a device error.
    pub fn beside(&self, weights: Weights) -> Result<Tensors> {
        let mut tensors = Tensors::dense(weights);
        let taken = self.base.as_ref().map_or(0, |base| base.taken);
        for (module, adapter) in &self.adapters {
            let (adapter, of_weight) = adapter.cut(taken)?;
            if let (Some(part), Some(weight)) =
                (of_weight, tensors.weights.get_mut(&format!("{module}.weight")))
            {
                *weight = (&*weight + part.delta()?)?;
            }
            tensors.adapters.insert(module.clone(), adapter);
        }
        if self.quantization() == Quantization::Nf4 {
            let dense = std::mem::take(&mut tensors.weights);
            for (name, weight) in dense {
                if is_projection(&name) && !self.weights.contains_key(&name) {
                    tensors.packed.insert(name, Arc::new(Packed::nf4(&weight)?));
                } else {
                    tensors.weights.insert(name, weight);
                }
            }
        }
        let alone = std::mem::take(&mut tensors.adapters);
        for (module, adapter) in alone {
            let adapter = adapter.beside(&tensors.matrix(&module)?, DType::F32)?;
            tensors.adapters.insert(module, adapter);
        }
        Ok(tensors)
    }
}

impl Checkpoint {
    /// Loads a model as [`load`](Self::load) does, with the fingerprints that its adapters record.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_with_id(name: &str, device: &Device) -> Result<(Self, BaseId)> {
        let checkpoint = match source::resolve(name, None)? {
            Source::Directory(dir) if is_adapter(&dir) => {
                return Self::load_adapter_with_id(&dir, device);
            }
            Source::Directory(dir) => Self::load_dir(&dir, device)?,
            Source::Gguf(path) => Self::load_gguf(&path, device)?,
        };
        let id = BaseId::new(peft::fingerprint(&checkpoint.weights)?);
        Ok((checkpoint, id))
    }

    /// Loads the base of an adapter directory and merges the adapter into it, in f32.
    ///
    /// # Errors
    /// As [`peft::read`] and [`Checkpoint::load`]; an adapter of another base.
    pub fn load_adapter(dir: &Path, device: &Device) -> Result<Self> {
        Ok(Self::load_adapter_with_id(dir, device)?.0)
    }

    /// As [`load_adapter`](Self::load_adapter), with the fingerprints of the merged model.
    ///
    /// # Errors
    /// As [`load_adapter`](Self::load_adapter).
    pub(in crate::model) fn load_adapter_with_id(
        dir: &Path,
        device: &Device,
    ) -> Result<(Self, BaseId)> {
        let saved = peft::read(dir, device)?;
        let base = base_of(dir, &saved.config)?;
        let (base, id) = Self::load_with_id(&base, device)
            .map_err(|error| error.at(format!("base of {}", dir.display())))?;
        saved.check_base(&id)?;
        let merged = base.joined(&saved, dir)?;
        let id = BaseId::of_adapter(&id, dir, peft::fingerprint(&merged.weights)?)?;
        Ok((merged, id))
    }

    /// Merges an adapter read from `dir` into its base, of which only the weights are known.
    ///
    /// # Errors
    /// An adapter of a base with other weights or shapes.
    pub fn with_adapter(self, saved: &Saved, dir: &Path) -> Result<Self> {
        saved.check_base(&BaseId::new(peft::fingerprint(&self.weights)?))?;
        self.joined(saved, dir)
    }

    /// Merges an adapter read from `dir` into its base, which [`Saved::check_base`] accepts; its tokenizer, if any,
    /// replaces the base's. If the base was quantised in training, the quantised values are used.
    ///
    /// # Errors
    /// An adapter of a base with other shapes.
    pub fn joined(self, saved: &Saved, dir: &Path) -> Result<Self> {
        let mut checkpoint = self.prepare_for(saved, dir)?;
        checkpoint.weights = saved.beside(checkpoint.weights)?.merged()?;
        checkpoint.tokenizer = ChatTokenizer::in_dir(dir)?.or(checkpoint.tokenizer);
        Ok(checkpoint)
    }

    /// The base in f32 with the fully trained parameters, after checking that the adapter's shapes fit it.
    ///
    /// # Errors
    /// As [`joined`](Self::joined).
    pub fn prepare_for(self, saved: &Saved, dir: &Path) -> Result<Self> {
        let checkpoint = self.with_trained(saved, dir)?;
        let tensors = Tensors::dense(checkpoint.weights.clone());
        super::check_fit(&tensors, &saved.adapters).at(dir.display())?;
        Ok(checkpoint)
    }

    /// The base with the fully trained parameters and the adapter's head. Parameters that the base holds quantised
    /// become dense.
    ///
    /// # Errors
    /// A parameter the base does not have, or of another shape; a reward model without its head.
    pub(in crate::model) fn with_trained(self, saved: &Saved, dir: &Path) -> Result<Self> {
        let mut checkpoint = match saved.config.architecture() {
            Architecture::CausalLm => self.with_head_of(saved)?,
            architecture => self.with_scores_of(saved, architecture, dir)?,
        };
        let shapes = params::shapes(&checkpoint.config);
        for (name, tensor) in &saved.weights {
            if name == params::HEAD && checkpoint.config.is_tied() {
                continue; // the embedding's copy
            }
            let Some(expected) = shapes.get(name) else {
                return Err(Error::run(format!("unexpected tensor `{name}`"))
                    .hint("the base model has no such parameter"));
            };
            if tensor.dims() != expected {
                return Err(params::wrong_shape(name, tensor.dims(), expected));
            }
            checkpoint.weights.insert(name.clone(), tensor.clone());
        }
        Ok(checkpoint)
    }

    /// Unties the head of a tied base if the adapter has changed only one of the two.
    fn with_head_of(mut self, saved: &Saved) -> Result<Self> {
        if !self.config.is_tied() {
            return Ok(self);
        }
        if saved.unties() {
            self.config.tie_word_embeddings = false;
            let head = self.weights.get(params::EMBEDDING).cloned();
            self.weights.extend(head.map(|head| (params::HEAD.to_owned(), head)));
            return Ok(self);
        }
        if let Some(head) = saved.weights.get(params::HEAD) {
            let embedding = saved.weights.get(params::EMBEDDING);
            let is_copy = embedding.map(|embedding| is_same(head, embedding)).transpose()?;
            if is_copy != Some(true) {
                return Err(Error::run(format!(
                    "the adapter's `{}` is not its `{}`, and its base has one tensor for both",
                    params::HEAD,
                    params::EMBEDDING
                ))
                .hint("the adapter says that they are one: is its file whole?"));
            }
        }
        Ok(self)
    }

    fn with_scores_of(self, saved: &Saved, architecture: Architecture, dir: &Path) -> Result<Self> {
        let score = saved.weights.get(params::SCORE).ok_or_else(no_scores)?;
        let Some(Config { architecture, labels, other, .. }) = scorer(dir)? else {
            let labels = unnamed_labels(&self.config, architecture, score.dims());
            return self.into_scorer(architecture, &labels, 0);
        };
        // Output names and step separator are in the adapter's own configuration.
        let mut scorer = self.into_scorer(architecture, &labels, 0)?;
        scorer.config.other = other;
        Ok(scorer)
    }
}

fn no_scores() -> Error {
    Error::run(format!("missing tensor `{}`", params::SCORE))
        .hint("the adapter makes a reward model: its files must hold the score head")
}

/// Output names of a score head if the adapter's configuration lacks them: the base's, or numbered ones.
fn unnamed_labels(base: &Config, architecture: Architecture, score: &[usize]) -> Vec<String> {
    let outputs = score.first().copied().unwrap_or_default();
    if base.architecture == architecture && base.labels.len() == outputs {
        return base.labels.clone();
    }
    labels::of_head(architecture, outputs)
}

/// Configuration of the model that the adapter in `dir` forms with its base.
///
/// # Errors
/// Missing or damaged files; a reward model without its head.
pub(in crate::model) fn config_beside(
    base: Config,
    adapter: &AdapterConfig,
    dir: &Path,
) -> Result<Config> {
    let shapes = peft::shapes(dir)?;
    let architecture = adapter.architecture();
    if architecture == Architecture::CausalLm {
        let record = peft::base(dir)?;
        let unties =
            base.is_tied() && adapter.unties(record.as_ref(), |name| shapes.contains_key(name));
        return Ok(Config { tie_word_embeddings: base.tie_word_embeddings && !unties, ..base });
    }
    if let Some(config) = scorer(dir)? {
        return Ok(config);
    }
    let score = shapes.get(params::SCORE).ok_or_else(no_scores).at(dir.display())?;
    let labels = unnamed_labels(&base, architecture, score);
    Ok(Config { architecture, labels, ..base })
}

/// An adapter's own model configuration, present for reward models.
pub(in crate::model) fn scorer(dir: &Path) -> Result<Option<Config>> {
    dir.join("config.json").is_file().then(|| load_config(dir)).transpose()
}

/// Configuration of the adapter in `dir`, and its base's path.
///
/// # Errors
/// As [`base_of`].
pub fn peek(dir: &Path) -> Result<(AdapterConfig, String)> {
    let config = AdapterConfig::read(dir)?;
    let base = base_of(dir, &config)?;
    Ok((config, base))
}

/// Base path or hub id to store in an adapter's file; absolute if it is on this machine.
///
/// # Errors
/// The current directory is unknown.
pub fn lasting_name(base: &str) -> Result<String> {
    if !Path::new(base).exists() {
        return Ok(base.to_owned());
    }
    let absolute =
        std::path::absolute(base).map_err(|error| store::io_error(Path::new(base), error))?;
    Ok(absolute.display().to_string())
}

/// Base of the adapter in `dir`, as [`lasting_name`] stores it in the file of another adapter; `None` if it names none.
///
/// # Errors
/// As [`base_of`] and [`lasting_name`].
pub fn lasting_base(dir: &Path, config: &AdapterConfig) -> Result<Option<String>> {
    match config.base_model_name_or_path.as_deref() {
        None | Some("") => Ok(None),
        Some(_) => Ok(Some(lasting_name(&base_of(dir, config)?)?)),
    }
}
