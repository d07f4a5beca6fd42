//! The base model and the adapters loaded beside it. Adapters may be loaded and unloaded while the server runs; answers
//! in progress keep theirs.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use super::fields::Fields;
use super::problem::Problem;
use super::served::{Served, now};
use crate::data::tokenizer::ChatTokenizer;
use crate::error::{Context, Error, Result};
use crate::generate::adaptation::Adaptation;
use crate::model::Weights;
use crate::model::lora::peft::{self, BaseId};
use crate::model::packed::Quantization;
use crate::ops::cuda::device;
use crate::store::sha256_path;

/// What a request's `model` refers to.
pub(super) struct Voice {
    /// Name reported in answers.
    pub(super) name: String,
    /// Identifies the weights behind an answer.
    pub(super) fingerprint: String,
    pub(super) adapter: Option<Loaded>,
}

/// An adapter.
pub(super) struct Loaded {
    pub(super) adaptation: Arc<Adaptation>,
    /// The adapter's own tokenizer, whose chat template may differ from the model's.
    tokenizer: Option<ChatTokenizer>,
    path: String,
    created: u64,
    /// Further information.
    note: Option<String>,
}

/// The base that adapters apply to.
pub(super) struct Base {
    /// In the compute dtype, neither quantised nor packed.
    pub(super) weights: Weights,
    /// The fingerprints that its adapters record.
    pub(super) id: BaseId,
}

impl Base {
    /// Device of the weights, if any.
    fn device(&self) -> Option<&Device> {
        self.weights.values().next().map(Tensor::device)
    }
}

/// The loaded adapters, in loading order.
pub(super) struct Voices {
    /// `None` once adapters can no longer be loaded.
    base: Option<Base>,
    all: RwLock<Vec<Arc<Voice>>>,
    /// Whether requests may load and unload adapters.
    by_request: bool,
}

impl Voices {
    /// No adapters.
    pub(super) fn new(base: Option<Base>, by_request: bool) -> Self {
        Self { base, all: RwLock::default(), by_request }
    }

    /// Whether adapters can be loaded.
    pub(super) fn is_open(&self) -> bool {
        self.base.is_some()
    }

    /// Drops the base's weights: no further adapter can be loaded.
    pub(super) fn close(&mut self) {
        self.base = None;
    }

    /// All loaded adapters.
    pub(super) fn all(&self) -> Vec<Arc<Voice>> {
        self.all.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn find(&self, name: &str) -> Option<Arc<Voice>> {
        self.all().into_iter().find(|voice| voice.name == name)
    }

    /// Adds an adapter.
    ///
    /// # Errors
    /// A name already in use.
    fn add(&self, voice: Voice) -> Result<(), Problem> {
        let mut all = self.all.write().unwrap_or_else(PoisonError::into_inner);
        if all.iter().any(|known| known.name == voice.name) {
            return Err(taken(&voice.name));
        }
        all.push(Arc::new(voice));
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<(), Problem> {
        let mut all = self.all.write().unwrap_or_else(PoisonError::into_inner);
        let Some(place) = all.iter().position(|voice| voice.name == name) else {
            let known: Vec<String> = all.iter().map(|voice| voice.name.clone()).collect();
            return Err(Problem::no_model(name, &known).on("lora_name"));
        };
        // GPU memory may be freed here.
        if let Some(home) = self.base.as_ref().and_then(Base::device) {
            let _ = device::bind(home);
        }
        all.remove(place);
        Ok(())
    }
}

impl Voice {
    /// The entry of `/v1/models`.
    pub(super) fn card(&self, served: &Served) -> Value {
        let mut card = served.card(&self.name);
        if let Some(Loaded { path, created, note, .. }) = &self.adapter {
            if let Some(note) = note {
                card["note"] = json!(note);
            }
            card["root"] = json!(path);
            card["parent"] = json!(served.name());
            card["created"] = json!(created);
        }
        card
    }

    /// The tokenizer that renders its conversations.
    pub(super) fn tokenizer<'a>(&'a self, served: &'a Served) -> &'a ChatTokenizer {
        let own = self.adapter.as_ref().and_then(|adapter| adapter.tokenizer.as_ref());
        own.unwrap_or_else(|| served.tokenizer())
    }

    /// The adapter used by the engine.
    pub(super) fn adaptation(&self) -> Option<Arc<Adaptation>> {
        self.adapter.as_ref().map(|adapter| Arc::clone(&adapter.adaptation))
    }
}

impl Served {
    /// Takes the field `model`; by default the base model.
    ///
    /// # Errors
    /// A model that is not served.
    pub(super) fn take_voice(&self, fields: &mut Fields) -> Result<Arc<Voice>, Problem> {
        match fields.take::<String>("model")? {
            Some(name) => self.voice(&name),
            None => Ok(Arc::clone(&self.alone)),
        }
    }

    /// Takes the field `model` of a request that only the base model can answer.
    ///
    /// # Errors
    /// A model that is not served, or an adapter.
    pub(super) fn take_name(&self, fields: &mut Fields) -> Result<(), Problem> {
        let voice = self.take_voice(fields)?;
        if voice.adapter.is_none() {
            return Ok(());
        }
        let message = format!("`model` is the adapter `{}`, expected its base", voice.name);
        Err(Problem::invalid(message).on("model"))
    }

    /// Looks up a name.
    ///
    /// # Errors
    /// Lists the available names.
    pub(super) fn voice(&self, name: &str) -> Result<Arc<Voice>, Problem> {
        if self.names.iter().any(|known| known == name) {
            return Ok(Arc::clone(&self.alone));
        }
        self.voices.find(name).ok_or_else(|| {
            let adapters = self.voices.all();
            let adapters = adapters.iter().map(|voice| voice.name.clone());
            Problem::no_model(name, &self.names.iter().cloned().chain(adapters).collect::<Vec<_>>())
        })
    }

    /// Loads an adapter directory under a name.
    ///
    /// # Errors
    /// A name already in use; a directory without an adapter of this model.
    pub(super) fn load(&self, name: &str, path: &str) -> Result<(), Problem> {
        if self.voice(name).is_ok() {
            return Err(taken(name));
        }
        let adapter = self.read(Path::new(path)).at(path)?;
        let fingerprint = sha256_path(&Path::new(path).join(peft::WEIGHTS))?;
        let fingerprint = format!("{}_{}", self.alone.fingerprint, &fingerprint[..12]);
        self.voices.add(Voice { name: name.to_owned(), fingerprint, adapter: Some(adapter) })
    }

    fn read(&self, path: &Path) -> Result<Loaded> {
        let Some(base) = &self.voices.base else {
            return Err(Error::usage("the base weights of the adapters are gone")
                .hint("start the server with --allow-runtime-lora-updating"));
        };
        // Any error in the directory is the client's to fix.
        let home = base.device().unwrap_or(&Device::Cpu);
        device::bind(home)?;
        let saved = peft::read(path, home).map_err(Error::as_usage)?;
        saved.check_base(&base.id).map_err(Error::as_usage)?;
        let adaptation = self.model.adaptation(&saved, &base.weights).map_err(Error::as_usage)?;
        let tokenizer = ChatTokenizer::in_dir(path).map_err(Error::as_usage)?;
        if tokenizer.as_ref().is_some_and(|own| own.hash() != self.tokenizer().hash()) {
            return Err(Error::usage("the adapter's tokenizer is another than the model's").hint(
                "`arriero merge` makes a model of base and adapter, which can be served alone",
            ));
        }
        // The loading thread is not the computing one, and on a GPU each has its own stream.
        home.synchronize()?;
        let note = (saved.quantization() == Quantization::Nf4).then(|| {
            "trained on NF4 weights and served on the server's own: differs from training by NF4's rounding; \
             `arriero merge` reproduces the trained model"
                .to_owned()
        });
        let path = path.display().to_string();
        Ok(Loaded { adaptation, tokenizer, path, created: now(), note })
    }
}

fn taken(name: &str) -> Problem {
    Problem::invalid(format!("`{name}` is served already")).on("lora_name").code("name_taken")
}

/// `POST /v1/load_lora_adapter`.
///
/// # Errors
/// A server that does not allow it; as [`Served::load`].
pub(super) fn load(served: &Served, body: &[u8]) -> Result<Value, Problem> {
    let mut fields = updating(served, body)?;
    let name: String = fields.need("lora_name")?;
    let path: String = fields.need("lora_path")?;
    fields.finish()?;
    if name.trim().is_empty() {
        return Err(Problem::invalid("`lora_name` is empty").on("lora_name"));
    }
    served.load(&name, &path)?;
    let mut told = json!({"message": format!("loaded `{name}`")});
    if let Some(note) = served.voice(&name)?.adapter.as_ref().and_then(|one| one.note.as_ref()) {
        told["note"] = json!(note);
    }
    Ok(told)
}

/// `POST /v1/unload_lora_adapter`.
///
/// # Errors
/// A server that does not allow it; a name that is not loaded.
pub(super) fn unload(served: &Served, body: &[u8]) -> Result<Value, Problem> {
    let mut fields = updating(served, body)?;
    let name: String = fields.need("lora_name")?;
    fields.finish()?;
    served.voices.remove(&name)?;
    Ok(json!({"message": format!("unloaded `{name}`")}))
}

fn updating(served: &Served, body: &[u8]) -> Result<Fields, Problem> {
    if !served.voices.by_request {
        // A request names a path on this machine, which not every client should be able to do.
        let message = "adapters come at the start only; --allow-runtime-lora-updating lets requests load them";
        return Err(Problem::invalid(message).code("not_allowed"));
    }
    Fields::parse(body)
}
