//! Models that share a base. A base is loaded once for as long as it is in use, and each adapter adds only its own
//! factors: a policy, its reference and its reward model then take the memory of one model. A generating policy needs a
//! second copy, since its matrices are repacked.
//!
//! Nothing here is trained. A base is identified by path and modification times, so a rewritten one is reloaded.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use candle_core::{Device, DeviceLocation, Tensor};

use super::checkpoint::{self, Checkpoint};
use super::lora::load::{base_of, is_adapter};
use super::lora::peft::{self, BaseId, Fingerprint, Saved};
use super::lora::{self, Adapter, Adapters};
use super::one_by_one;
use super::packed::{self, Packed, Quantization};
use super::source::{self, Source};
use super::{Config, Precision, Tensors, Transformer, Weights, params};
use crate::data::tokenizer::ChatTokenizer;
use crate::error::{Context, Error, Result};
use crate::ops::cuda::device::out_of_memory;
use crate::store;

/// Storage form of a base.
#[derive(Clone, Debug)]
pub struct Form {
    /// Device.
    pub device: Device,
    /// Compute dtype of products.
    pub dtype: Precision,
    /// Quantisation of its projections.
    pub quantization: Quantization,
    /// Modules that stay in f32, because they will be fully trained.
    pub in_full: Vec<String>,
}

impl Form {
    /// Dense, in `dtype`.
    pub fn dense(device: &Device, dtype: Precision) -> Self {
        let quantization = Quantization::None;
        Self { device: device.clone(), dtype, quantization, in_full: Vec::new() }
    }
}

/// A base in memory.
pub struct Base {
    /// Its shape.
    pub config: Config,
    /// Its tensors, without adapters.
    pub tensors: Tensors,
    /// Its tokenizer.
    pub tokenizer: Option<ChatTokenizer>,
    /// The fingerprints that its adapters record.
    pub id: BaseId,
}

/// A model: a base, with or without an adapter.
pub struct Model {
    /// Its shape, including any head defined by the adapter.
    pub config: Config,
    /// The base's tensors, shared, and the adapter's own.
    pub tensors: Tensors,
    /// The adapter's tokenizer, or the base's.
    pub tokenizer: Option<ChatTokenizer>,
    /// Kept so that others can share it.
    pub base: Arc<Base>,
}

/// The bases in memory.
#[derive(Default)]
pub struct Bases(Mutex<Known>);

#[derive(Default)]
struct Known {
    bases: Vec<(Key, Weak<Base>)>,
    reads: usize,
}

#[derive(Clone, PartialEq)]
struct Key {
    /// Paths, sizes and modification times.
    identity: String,
    place: DeviceLocation,
    dtype: Precision,
    quantization: Quantization,
    in_full: Vec<String>,
}

impl Bases {
    /// Loads a model as a base: an adapter directory is merged into its own base first.
    ///
    /// # Errors
    /// As [`Checkpoint::load`], and a model that does not support this form.
    pub fn base(&self, name: &str, form: &Form) -> Result<Arc<Base>> {
        let source = source::resolve(name, None)?;
        let key = Key {
            identity: identity(&source)?,
            place: form.device.location(),
            dtype: form.dtype,
            quantization: form.quantization,
            in_full: form.in_full.clone(),
        };
        // Locked while the base is read, so that concurrent callers do not both read it.
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.bases.retain(|(_, base)| base.strong_count() > 0);
        let found = known.bases.iter().find(|(other, _)| *other == key);
        if let Some(base) = found.and_then(|(_, base)| base.upgrade()) {
            return Ok(base);
        }
        known.reads += 1;
        let base = Arc::new(Base::read(&source, form)?);
        known.bases.push((key, Arc::downgrade(&base)));
        Ok(base)
    }

    /// Loads a model: an adapter is applied beside its base, whose tensors it shares. If it was trained on NF4, the
    /// base is NF4 regardless of `form`; GGUF blocks have the same values as the dense model anyway.
    ///
    /// # Errors
    /// As [`base`](Self::base), and an adapter of another base.
    pub fn model(&self, name: &str, form: &Form) -> Result<Model> {
        let Source::Directory(dir) = source::resolve(name, None)? else {
            return Ok(Model::plain(self.base(name, form)?));
        };
        if !is_adapter(&dir) {
            return Ok(Model::plain(self.base(name, form)?));
        }
        let saved = peft::read(&dir, &form.device)?;
        let mut form = form.clone();
        if let Some(record) =
            saved.base.as_ref().filter(|base| base.quantization == Quantization::Nf4)
        {
            if record.taken > 0 {
                // PiSSA quantised the residual weights, so this adapter has a base of its own.
                form.quantization = Quantization::None;
                return Ok(Model::plain(self.base(name, &form)?));
            }
            form.quantization = record.quantization;
        }
        let base = self
            .base(&base_of(&dir, &saved.config)?, &form)
            .map_err(|error| error.at(format!("base of {}", dir.display())))?;
        Model::beside(base, (saved, &dir), form.dtype)
    }

    /// Number of base loads.
    pub fn reads(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).reads
    }
}

impl Base {
    /// Converts each tensor before the next is read.
    fn read(source: &Source, form: &Form) -> Result<Self> {
        form.dtype.check_device(&form.device)?;
        let (Source::Directory(path) | Source::Gguf(path)) = source;
        let (config, tokenizer) = checkpoint::peek(path)?;
        checkpoint::check_vocabulary(&config, tokenizer.as_ref()).at(path.display())?;
        let mut tensors = Tensors::default();
        if form.quantization == Quantization::Gguf {
            tensors.packed = packed::of_file(source, &form.in_full)?;
        }
        let mut fingerprint = Fingerprint::default();
        let id = one_by_one::each(source, &config, &form.device, &mut |name, tensor| {
            fingerprint.add(name, &tensor)?;
            match form.quantization {
                _ if lora::trains(&form.in_full, name) => {
                    tensors.weights.insert(name.to_owned(), tensor);
                }
                Quantization::Nf4 if lora::is_projection(name) => {
                    tensors.packed.insert(name.to_owned(), Arc::new(Packed::nf4(&tensor)?));
                }
                Quantization::Gguf if lora::is_projection(name) => {}
                _ => {
                    let dtype = form.dtype.of(name, &tensor);
                    tensors.weights.insert(name.to_owned(), tensor.to_dtype(dtype)?);
                }
            }
            Ok(())
        })
        .map_err(|error| unread(error, &config, form))?;
        let id = id.unwrap_or_else(|| BaseId::new(fingerprint.finish()));
        Ok(Self { config, tensors, tokenizer, id })
    }

    /// Configuration, tokenizer and the unquantised weights, shared.
    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint {
            config: self.config.clone(),
            weights: self.tensors.weights.clone(),
            tokenizer: self.tokenizer.clone(),
        }
    }
}

/// Adds memory usage to an out-of-memory error of loading a base.
fn unread(error: Error, config: &Config, form: &Form) -> Error {
    let size = form.quantization.bytes().unwrap_or(form.dtype.dtype().size_in_bytes() as f64);
    let parts = [("its weights", (params::count(config) as f64 * size) as u64)];
    let ways = "dtype = \"bf16\", quantization = \"nf4\" with adapters, a smaller model, or device = \"cpu\"";
    out_of_memory(error, "while a base was read", parts, ways)
}

impl Model {
    fn plain(base: Arc<Base>) -> Self {
        let Base { config, tensors, tokenizer, .. } = &*base;
        let (config, tensors, tokenizer) = (config.clone(), tensors.clone(), tokenizer.clone());
        Self { config, tensors, tokenizer, base }
    }

    fn beside(base: Arc<Base>, (saved, dir): (Saved, &Path), dtype: Precision) -> Result<Self> {
        saved.check_base(&base.id)?;
        let Checkpoint { config, weights, tokenizer } =
            base.checkpoint().with_trained(&saved, dir)?;
        let mut tensors = Tensors { weights: dtype.cast(weights)?, ..base.tensors.clone() };
        // Fully trained parameters replace the base's quantised ones.
        tensors.packed.retain(|name, _| !saved.weights.contains_key(name));
        lora::check_fit(&tensors, &saved.adapters).at(dir.display())?;
        let adapters = saved.adapters.into_iter().map(|(module, adapter)| {
            let adapter = adapter.beside(&tensors.matrix(&module)?, dtype.dtype())?;
            Ok((module, adapter))
        });
        let adapters = adapters.collect::<Result<Adapters>>()?;
        let tokenizer = ChatTokenizer::in_dir(dir)?.or(tokenizer);
        Ok(Self { config, tensors: Tensors { adapters, ..tensors }, tokenizer, base })
    }

    /// The runnable model, with adapters beside the projections as in training.
    ///
    /// # Errors
    /// Names the missing tensor.
    pub fn transformer(&self) -> Result<Transformer> {
        Transformer::of(&self.config, &self.tensors)
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// The model has no tokenizer.
    pub fn tokenizer(&self) -> Result<&ChatTokenizer> {
        self.tokenizer.as_ref().ok_or_else(checkpoint::no_tokenizer)
    }

    /// The model as a plain checkpoint: adapted projections are merged, all others shared.
    ///
    /// # Errors
    /// A device error.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        let (config, tokenizer) = (self.config.clone(), self.tokenizer.clone());
        let weights = if self.tensors.adapters.is_empty() && self.tensors.packed.is_empty() {
            self.tensors.weights.clone()
        } else {
            self.tensors.merged()?
        };
        Ok(Checkpoint { config, weights, tokenizer })
    }

    /// Tensors of this model that are not its base's: adapter factors and fully trained parameters.
    pub fn own(&self) -> Weights {
        let is_new = |(name, tensor): &(&String, &Tensor)| {
            self.base.tensors.weights.get(*name).is_none_or(|base| base.id() != tensor.id())
        };
        let own = self.tensors.weights.iter().filter(is_new);
        let mut own: Weights = own.map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
        let factors = self.tensors.adapters.values().flat_map(Adapter::tensors);
        own.extend(factors.map(|(name, tensor)| (name, tensor.clone())));
        own
    }
}

/// Paths, sizes and modification times of a model's files.
fn identity(source: &Source) -> Result<String> {
    let (Source::Directory(path) | Source::Gguf(path)) = source;
    let path = path.canonicalize().at(path.display())?;
    let mut parts = vec![path.display().to_string()];
    let files = if path.is_dir() { store::entries(&path)? } else { vec![path.clone()] };
    for file in files.iter().filter(|file| file.is_file()) {
        let about = file.metadata().at(file.display())?;
        let written = about.modified().at(file.display())?;
        parts.push(format!("{} {} {written:?}", file.display(), about.len()));
    }
    if path.is_dir() && is_adapter(&path) {
        let (_, base) = lora::load::peek(&path)?;
        parts.push(identity(&source::resolve(&base, None)?)?);
    }
    Ok(parts.join("\n"))
}

/// Hash of a model's files, and of its base's if it is an adapter.
///
/// # Errors
/// No such model; unreadable files.
pub fn content(name: &str) -> Result<String> {
    let (Source::Directory(path) | Source::Gguf(path)) = source::resolve(name, None)?;
    let own = store::sha256_path(&path)?;
    if !path.is_dir() || !is_adapter(&path) {
        return Ok(own);
    }
    let (_, base) = lora::load::peek(&path)?;
    Ok(store::sha256_bytes(format!("{own} {}", content(&base)?).as_bytes()))
}

#[cfg(test)]
mod tests;
