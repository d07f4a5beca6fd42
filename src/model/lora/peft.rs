//! peft's adapter files: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use indexmap::IndexMap;
use regex::Regex;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

pub(crate) use super::fingerprint::Fingerprint;
pub use super::fingerprint::{BaseId, fingerprint};
use super::{A, Adapter, Adapters, Attached, B, Dora, MAGNITUDE};
use crate::error::{Context, Error, Result};
use crate::model::packed::Quantization;
use crate::model::tensor_file::{self, Mapped};
use crate::model::{Architecture, Weights, params};
use crate::store;

/// The file that marks a directory as an adapter.
pub const CONFIG: &str = "adapter_config.json";
/// The file with the factors.
pub(crate) const WEIGHTS: &str = "adapter_model.safetensors";
/// The key of the configuration that names the base.
pub(in crate::model) const BASE_NAME: &str = "base_model_name_or_path";
/// peft's prefix for base model names.
const PREFIX: &str = "base_model.model.";

/// The supported fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a key of peft's file")]
pub struct AdapterConfig {
    /// `LORA`.
    pub peft_type: String,
    /// `CAUSAL_LM`; `SEQ_CLS` or `TOKEN_CLS` for a reward model.
    pub task_type: Option<String>,
    /// The adapter's base model: a path or a hub id.
    pub base_model_name_or_path: Option<String>,
    /// The rank.
    pub r: usize,
    /// See [`Lora::lora_alpha`](super::Lora::lora_alpha).
    pub lora_alpha: f64,
    /// See [`Lora::lora_dropout`](super::Lora::lora_dropout).
    pub lora_dropout: f64,
    /// Names of the adapted modules, or a regular expression.
    pub target_modules: Value,
    /// Names of fully trained modules.
    pub modules_to_save: Option<Vec<String>>,
    /// Ranks of modules that deviate from `r`; the first pattern that matches counts.
    pub rank_pattern: IndexMap<String, usize>,
    /// Alphas of modules that deviate from `lora_alpha`, likewise.
    pub alpha_pattern: IndexMap<String, f64>,
    /// See [`Lora::use_rslora`](super::Lora::use_rslora).
    pub use_rslora: bool,
    /// See [`Lora::use_dora`](super::Lora::use_dora).
    pub use_dora: bool,
    /// `none`: biases are not trained.
    pub bias: String,
    /// Whether weights are stored transposed, as in GPT-2.
    pub fan_in_fan_out: bool,
    /// For peft, which then loads without training.
    pub inference_mode: bool,
    /// For peft: the files hold everything it would otherwise initialise. Other programs may store the name of their
    /// initialisation method here.
    #[serde(deserialize_with = "beginning")]
    pub init_lora_weights: bool,
    /// For peft: the head stays tied to the embedding when that is fully trained.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub ensure_weight_tying: bool,
}

/// Fields that, if set, make another function of the same factors, or one with further tensors: such adapters are
/// refused.
const REFUSED: [(&str, &str); 10] = [
    ("alora_invocation_tokens", "the adapter is for a part of each text"),
    ("arrow_config", "the adapter mixes others"),
    ("kasa_config", "a diagonal stands between the factors, and the base was cut"),
    ("layer_replication", "the base's layers are repeated"),
    ("lora_bias", "the factors have a bias"),
    ("monteclora_config", "the factors are drawn at random"),
    ("target_parameters", "parameters that belong to no linear layer are adapted"),
    ("trainable_token_indices", "single rows of the embedding are trained"),
    ("use_bdlora", "the factors are block-diagonal"),
    ("use_qalora", "the first factor reads pooled inputs"),
];

/// peft initialisation methods that leave the base unchanged.
const HARMLESS: [&str; 4] = ["gaussian", "eva", "mica", "orthogonal"];

fn beginning<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::Bool(flag) => Ok(flag),
        Value::Null => Ok(true),
        Value::String(name) if HARMLESS.contains(&name.as_str()) => Ok(true),
        other => Err(D::Error::custom(format!(
            "`init_lora_weights` is {other}: the adapter belongs to a base that this method has changed; \
             save it with peft's `path_initial_model_for_weight_conversion`, or merge it there"
        ))),
    }
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            peft_type: "LORA".to_owned(),
            task_type: None,
            base_model_name_or_path: None,
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: Value::Null,
            modules_to_save: None,
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            use_rslora: false,
            use_dora: false,
            bias: "none".to_owned(),
            fan_in_fan_out: false,
            inference_mode: true,
            init_lora_weights: true,
            ensure_weight_tying: false,
        }
    }
}

impl AdapterConfig {
    /// Reads and checks the file of a directory.
    ///
    /// # Errors
    /// A missing or broken file, or an unsupported kind of adapter.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        let text = store::read_text(&path)?;
        let config: Self = serde_json::from_str(&text).at(path.display())?;
        let written: Map<String, Value> = serde_json::from_str(&text).at(path.display())?;
        let is_set = |key: &str| {
            // peft takes an empty list for none.
            let is_none = |value: &Value| {
                matches!(value, Value::Null | Value::Bool(false))
                    || value.as_array().is_some_and(Vec::is_empty)
            };
            written.get(key).is_some_and(|value| !is_none(value))
        };
        let set = REFUSED.iter().find(|(key, _)| is_set(key));
        let refused = [
            (
                config.peft_type != "LORA",
                format!("`peft_type` is {}, expected LORA", config.peft_type),
            ),
            (config.bias != "none", format!("`bias` is {}, expected none", config.bias)),
            (config.fan_in_fan_out, "`fan_in_fan_out` is true".to_owned()),
            (
                set.is_some(),
                set.map_or_else(String::new, |(key, why)| format!("`{key}` is set: {why}")),
            ),
            (config.r == 0, "`r` is 0, expected 1 or more".to_owned()),
        ];
        match refused.into_iter().find(|(refused, _)| *refused) {
            Some((_, why)) => Err(Error::run(why)
                .at(path.display())
                .hint("LoRA, rsLoRA and DoRA adapters of linear layers are supported")),
            None => Ok(config),
        }
    }

    /// Whether the adapter makes a reward model.
    pub fn architecture(&self) -> Architecture {
        match self.task_type.as_deref() {
            Some("SEQ_CLS") => Architecture::SequenceClassification,
            Some("TOKEN_CLS") => Architecture::TokenClassification,
            _ => Architecture::CausalLm,
        }
    }

    /// Whether the adapter unties embedding and head: peft trains each of them separately unless told to keep them
    /// tied. Adapters that record their base are our own, which always keep them tied.
    pub(super) fn unties(&self, base: Option<&BaseRecord>, holds: impl Fn(&str) -> bool) -> bool {
        let is_apart = !self.ensure_weight_tying && base.is_none();
        is_apart && [params::EMBEDDING, params::HEAD].into_iter().any(holds)
    }

    /// Rank of a module's factors.
    fn rank(&self, module: &str) -> Result<usize> {
        Ok(pattern(&self.rank_pattern, module)?.unwrap_or(self.r))
    }

    /// Scale of a module's product of factors.
    pub(super) fn scale(&self, module: &str) -> Result<f64> {
        let r = self.rank(module)? as f64;
        let alpha = pattern(&self.alpha_pattern, module)?.unwrap_or(self.lora_alpha);
        Ok(alpha / if self.use_rslora { r.sqrt() } else { r })
    }
}

/// Value of the first pattern that matches the end of a module's name, as in peft.
fn pattern<T: Copy>(patterns: &IndexMap<String, T>, module: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        let whole = Regex::new(&format!("^(?:.*\\.)?(?:{pattern})$"))
            .map_err(|error| Error::run(error).at(format!("pattern `{pattern}`")))?;
        if whole.is_match(module) {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// Contents of an adapter's files.
#[derive(Clone, Debug)]
pub struct Saved {
    /// The configuration.
    pub config: AdapterConfig,
    /// Factors and magnitudes.
    pub adapters: Adapters,
    /// Fully trained parameters, under the model's own names.
    pub weights: Weights,
    /// The base it was trained on; unknown for other programs' files.
    pub base: Option<BaseRecord>,
}

/// An adapter's record of the base it was trained on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseRecord {
    /// Its [fingerprint](BaseId) before quantisation.
    pub fingerprint: String,
    /// That of its merged weights, if it is itself an adapter.
    pub merged: Option<String>,
    /// Quantisation of its projections.
    pub quantization: Quantization,
    /// PiSSA: number of trailing ranks that represent, with opposite sign, the part taken out of each weight before
    /// quantisation.
    pub taken: usize,
}

impl BaseRecord {
    /// Record of an unquantised base.
    pub fn dense(fingerprint: &str) -> Self {
        let fingerprint = fingerprint.to_owned();
        Self { fingerprint, merged: None, quantization: Quantization::None, taken: 0 }
    }

    /// Whether this is the record of that base, or of what it was merged from.
    fn is_of(&self, found: &BaseId) -> bool {
        found.is(&self.fingerprint) || self.merged.as_ref().is_some_and(|merged| found.is(merged))
    }

    /// Rejects summing adapters if one was trained on weights that PiSSA reduced before quantisation.
    ///
    /// # Errors
    /// Such an adapter.
    pub(in crate::model) fn check_whole<'a>(
        bases: impl IntoIterator<Item = &'a Option<Self>>,
    ) -> Result<()> {
        if bases.into_iter().flatten().all(|base| base.taken == 0) {
            return Ok(());
        }
        Err(Error::usage("PiSSA on packed weights gives each adapter a base of its own")
            .hint("`arriero merge` them and average the models"))
    }

    /// Metadata of the safetensors file. Omits quantisation if there is none.
    pub(crate) fn texts(&self) -> Vec<(&'static str, String)> {
        let mut texts = vec![(BASE, self.fingerprint.clone())];
        texts.extend(self.merged.iter().map(|merged| (BASE_MERGED, merged.clone())));
        if self.quantization != Quantization::None {
            texts.push((BASE_QUANTIZATION, self.quantization.name().to_owned()));
            texts.push((BASE_TAKEN, self.taken.to_string()));
        }
        texts
    }
}

impl Saved {
    /// The adapters in the form attached to a model for inference or further training.
    pub fn attached(&self) -> Attached {
        let tensors = self.adapters.values().flat_map(Adapter::tensors);
        Attached {
            factors: tensors.map(|(name, tensor)| (name, tensor.clone())).collect(),
            scales: self.adapters.values().map(|a| (a.module.clone(), a.scale)).collect(),
            ..Attached::default()
        }
    }

    /// Whether this adapter unties embedding and head.
    pub(super) fn unties(&self) -> bool {
        self.config.unties(self.base.as_ref(), |name| self.weights.contains_key(name))
    }

    /// Quantisation of the base's projections in training, if recorded.
    pub fn quantization(&self) -> Quantization {
        self.base.as_ref().map_or(Quantization::None, |base| base.quantization)
    }

    /// The same adapter, treated as trained on the base's dense weights.
    #[must_use]
    pub fn of_dense_base(mut self) -> Self {
        let dense = |BaseRecord { fingerprint, merged, .. }| BaseRecord {
            merged,
            ..BaseRecord::dense(&fingerprint)
        };
        self.base = self.base.map(dense);
        self
    }

    /// Rejects a base other than the recorded one, if one is recorded.
    ///
    /// # Errors
    /// Another base.
    pub fn check_base(&self, found: &BaseId) -> Result<()> {
        let Some(expected) = self.base.as_ref().filter(|expected| !expected.is_of(found)) else {
            return Ok(());
        };
        let short = |hash: &str| hash.chars().take(12).collect::<String>();
        Err(Error::run(format!(
            "the base's weights have fingerprint {}, the adapter was trained on {}",
            short(&found.fingerprint),
            short(&expected.fingerprint)
        ))
        .hint("give the exact model that the adapter was trained on"))
    }

    /// All trained tensors, by the model's own names.
    pub fn into_trained(self) -> Weights {
        let mut trained = self.weights;
        for adapter in self.adapters.values() {
            trained.extend(adapter.tensors().map(|(name, tensor)| (name, tensor.clone())));
        }
        trained
    }
}

/// Reads an adapter directory.
///
/// # Errors
/// Missing, damaged or unsupported files; a factor without its counterpart.
pub fn read(dir: &Path, device: &Device) -> Result<Saved> {
    let config = AdapterConfig::read(dir)?;
    let path = dir.join(WEIGHTS);
    let tensors = tensor_file::read(&path, device)?;
    let base = base(dir)?;
    let (mut factors, mut weights) = (Weights::new(), Weights::new());
    for (name, tensor) in tensors {
        let plain = plain(&name).to_owned();
        let is_factor = plain.contains(FACTOR);
        if is_factor { &mut factors } else { &mut weights }.insert(plain, tensor);
    }
    let adapters = assemble(&config, factors).at(path.display())?;
    // peft saves the base's own weight beside the factors of a head or an embedding.
    let is_copy = |name: &str| {
        let of = name.strip_suffix(COPY).filter(|of| adapters.contains_key(*of));
        // Beside a projection it may be a base that was changed.
        of.is_some_and(|of| !super::is_projection(&format!("{of}.weight")))
    };
    weights.retain(|name, _| !is_copy(name));
    Ok(Saved { config, adapters, weights, base })
}

/// Begins the last part of the name of every tensor of an adapter, such as `lora_A` or `lora_embedding_A`.
const FACTOR: &str = ".lora_";
/// Ends the name of a copy of an adapted module's own weight.
const COPY: &str = ".base_layer.weight";

/// A tensor's name in the model itself.
fn plain(name: &str) -> &str {
    name.strip_prefix(PREFIX).unwrap_or(name)
}

/// Names and shapes of an adapter's tensors, by the model's own names. Reads no tensor data.
///
/// # Errors
/// A missing or damaged file.
pub(in crate::model) fn shapes(dir: &Path) -> Result<BTreeMap<String, Vec<usize>>> {
    let path = dir.join(WEIGHTS);
    let mapped = Mapped::open(&path)?;
    let tensors = mapped.tensors(&path)?;
    Ok(tensors.iter().map(|(name, view)| (plain(name).to_owned(), view.shape().to_vec())).collect())
}

fn assemble(config: &AdapterConfig, mut factors: Weights) -> Result<Adapters> {
    let ending = format!(".{A}.weight");
    let modules: Vec<String> =
        factors.keys().filter_map(|name| Some(name.strip_suffix(&ending)?.to_owned())).collect();
    let mut adapters = Adapters::new();
    for module in modules {
        let mut take = |part: &str| {
            let name = super::parameter(&module, part);
            factors.remove(&name).ok_or_else(|| Error::run(format!("missing tensor `{name}`")))
        };
        let (a, b) = (take(A)?, take(B)?);
        let dora = if config.use_dora {
            // The squared row norms are the base's, and are filled in when the adapter is attached.
            Some(Dora { magnitude: take(MAGNITUDE)?.flatten_all()?, squares: [].into() })
        } else {
            None
        };
        if a.rank() != 2 || b.rank() != 2 {
            return Err(Error::run(format!(
                "factors {:?} and {:?} are no matrices",
                b.dims(),
                a.dims()
            ))
            .at(format!("`{module}`")));
        }
        check_rank(config, &module, a.dims()[0])?;
        let scale = config.scale(&module)?;
        adapters.insert(module.clone(), Adapter { module, a, b, scale, dora });
    }
    match factors.keys().next() {
        Some(name) => Err(Error::run(format!("unexpected tensor `{name}`"))
            .hint("adapters of linear layers are supported, of embeddings not")),
        None => Ok(adapters),
    }
}

/// Rejects factors of another rank than the configuration's, by which they are scaled.
fn check_rank(config: &AdapterConfig, module: &str, found: usize) -> Result<()> {
    let expected = config.rank(module)?;
    if found == expected {
        return Ok(());
    }
    Err(Error::run(format!("factors of rank {found}, expected {expected} by {CONFIG}"))
        .at(format!("`{module}`"))
        .hint(
            "`r` and `rank_pattern` there must be those of the training: the scale depends on them",
        ))
}

/// Metadata keys of the safetensors file that describe the base.
const BASE: &str = "base_fingerprint";
const BASE_QUANTIZATION: &str = "base_quantization";
const BASE_MERGED: &str = "base_merged_fingerprint";
const BASE_TAKEN: &str = "base_taken_ranks";

/// An adapter's record of the base it was trained on.
///
/// # Errors
/// Missing or damaged files.
pub fn base(dir: &Path) -> Result<Option<BaseRecord>> {
    let path = dir.join(WEIGHTS);
    let mut texts = tensor_file::metadata(&path)?;
    let Some(fingerprint) = texts.remove(BASE) else { return Ok(None) };
    let mut record =
        BaseRecord { merged: texts.remove(BASE_MERGED), ..BaseRecord::dense(&fingerprint) };
    if let Some(text) = texts.remove(BASE_QUANTIZATION) {
        let name = Value::from(text);
        record.quantization =
            serde_json::from_value(name).at(BASE_QUANTIZATION).at(path.display())?;
    }
    if let Some(text) = texts.remove(BASE_TAKEN) {
        record.taken = serde_json::from_str(&text).at(BASE_TAKEN).at(path.display())?;
    }
    Ok(Some(record))
}

/// Writes factors, magnitudes and fully trained parameters, all by the model's own names, and the record of the base.
///
/// # Errors
/// Non-finite values, I/O errors.
pub fn write<'a>(
    dir: &Path,
    config: &AdapterConfig,
    trained: &Weights,
    base: impl Into<Option<&'a BaseRecord>>,
) -> Result<()> {
    write_in(DType::F32, dir, config, (trained, base.into()))
}

/// As [`write`], with tensors stored in `dtype`.
///
/// # Errors
/// As [`write`].
pub(crate) fn write_in(
    dtype: DType,
    dir: &Path,
    config: &AdapterConfig,
    (trained, base): (&Weights, Option<&BaseRecord>),
) -> Result<()> {
    let mut named: BTreeMap<String, &Tensor> =
        trained.iter().map(|(name, tensor)| (format!("{PREFIX}{name}"), tensor)).collect();
    if let Some(embedding) = trained.get(params::EMBEDDING).filter(|_| config.ensure_weight_tying) {
        // peft trains the tied head beside the embedding, and expects it.
        named.insert(format!("{PREFIX}{}", params::HEAD), embedding);
    }
    let tensors = named.iter().map(|(name, tensor)| (name.as_str(), *tensor)).collect();
    let path = dir.join(WEIGHTS);
    let texts = base.map_or_else(Vec::new, BaseRecord::texts);
    store::write_atomic_with(&path, |out| tensor_file::write_with(out, &tensors, dtype, &texts))
        .at(path.display())?;
    store::write_json(&dir.join(CONFIG), config)
}
