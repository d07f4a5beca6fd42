//! Low-rank adapters: LoRA (Hu et al., 2022) with its rank-stabilised, weight-decomposed and SVD-initialised forms.
//!
//! The base is frozen and needs no weight gradients; `A` and `B` of each adapted projection are trained. Files are in
//! peft's format.

mod adapter;
mod dropout;
mod fingerprint;
mod init;
pub mod load;
pub mod peft;
mod sum;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) use adapter::{A, B, MAGNITUDE, parameter};
pub use adapter::{Adapter, Dora};
pub use dropout::{Dropout, Masks};
pub use init::{Attached, attach, attach_beside};
pub use sum::sum;

use regex::Regex;

use super::packed::Quantization;
use super::params;
use super::{Architecture, Config, Precision, Tensors, Weights};
use crate::error::{Error, Result, did_you_mean};

/// Adapters by the names of their modules.
pub type Adapters = BTreeMap<String, Adapter>;

/// LoRA keys of a training stage, named as in TRL and peft.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lora {
    /// Train adapters beside a frozen model instead of the model.
    pub use_peft: bool,
    /// The rank `r`.
    pub lora_r: usize,
    /// The product of factors is scaled by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Dropout probability of an adapter's inputs in training.
    pub lora_dropout: f64,
    /// Adapted projections: `["all-linear"]`, names such as `q_proj`, or a regular expression for whole names, such as
    /// `.*layers\.(0|1)\..*q_proj`.
    pub lora_target_modules: Vec<String>,
    /// Further modules to train fully, such as `embed_tokens`, `lm_head` or `norm`, or a projection that is not
    /// adapted; a score head always is. They are neither rounded nor quantised.
    pub lora_modules_to_save: Vec<String>,
    /// Scale by `lora_alpha / √r` instead (Kalajdzievski, 2023).
    pub use_rslora: bool,
    /// Train the magnitude of each output separately from its direction (DoRA; Liu et al., 2024).
    pub use_dora: bool,
    /// Initialisation of the factors.
    pub init_lora_weights: Init,
    /// Ratio of the learning rates of `B` and `A` (LoRA+; Hayou et al., 2024); 0 or 1 disables it.
    pub loraplus_lr_ratio: f64,
    /// Quantisation of the frozen projections: `none`, `nf4` or `gguf` (QLoRA; Dettmers et al., 2023).
    pub quantization: Quantization,
}

/// Initialisation of the factors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// `A` uniform as in a linear layer, `B` zero: the initial model is unchanged.
    #[default]
    Default,
    /// `A` normal with standard deviation `1 / r`, `B` zero.
    Gaussian,
    /// Both from the largest singular values of the weight, which keeps the remainder (PiSSA; Meng et al., 2024).
    Pissa,
}

impl Default for Lora {
    fn default() -> Self {
        Self {
            use_peft: false,
            lora_r: 16,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            lora_target_modules: vec![ALL_LINEAR.to_owned()],
            lora_modules_to_save: Vec::new(),
            use_rslora: false,
            use_dora: false,
            init_lora_weights: Init::Default,
            loraplus_lr_ratio: 0.0,
            quantization: Quantization::None,
        }
    }
}

/// Every projection of every block.
pub const ALL_LINEAR: &str = "all-linear";

/// The projections of a block.
pub const PROJECTIONS: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

impl Lora {
    /// Rejects invalid values.
    ///
    /// # Errors
    /// Names the key, its value and the expected range.
    pub fn check(&self) -> Result<()> {
        if !self.use_peft {
            return match self.quantization {
                Quantization::None => Ok(()),
                kind => Err(Error::usage(format!(
                    "`quantization` is {kind:?} and `use_peft` false: packed weights cannot be trained"
                ))
                .hint("set use_peft = true to train adapters on top of them")),
            };
        }
        self.lora_target_modules.iter().try_for_each(|target| pattern(target).map(|_| ()))?;
        let refuse = |key: &str, value: f64, expected: &str| {
            Err(Error::usage(format!("`{key}` is {value}, expected {expected}")))
        };
        if self.lora_r == 0 {
            return refuse("lora_r", 0.0, "1 or more");
        }
        if !(self.lora_alpha > 0.0 && self.lora_alpha.is_finite()) {
            return refuse("lora_alpha", self.lora_alpha, "more than 0");
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return refuse("lora_dropout", self.lora_dropout, "0 or more and less than 1");
        }
        if !(self.loraplus_lr_ratio >= 0.0 && self.loraplus_lr_ratio.is_finite()) {
            return refuse("loraplus_lr_ratio", self.loraplus_lr_ratio, "0 or more");
        }
        if self.init_lora_weights == Init::Pissa && self.use_dora {
            return Err(Error::usage("`use_dora` with `init_lora_weights` pissa cannot be saved")
                .hint("what is left of a weight has another norm: choose one of the two"));
        }
        if self.init_lora_weights == Init::Pissa && self.quantization == Quantization::Gguf {
            return Err(Error::usage("`init_lora_weights` is pissa with `quantization` gguf")
                .hint("what is left of a weight cannot be put back into the file's blocks"));
        }
        Ok(())
    }

    /// As [`check`](Self::check), for adapters to be stored in this dtype.
    ///
    /// # Errors
    /// As [`check`](Self::check), and PiSSA in bf16.
    pub fn check_saved_as(&self, save_dtype: Precision) -> Result<()> {
        self.check()?;
        if self.use_peft && self.init_lora_weights == Init::Pissa && save_dtype != Precision::F32 {
            let dtype = save_dtype.dtype().as_str();
            return Err(Error::usage(format!("`save_dtype` is {dtype} with `init_lora_weights` pissa"))
                .hint("what was learned is a small difference of the stored factors, which rounding would lose: save_dtype = \"f32\""));
        }
        Ok(())
    }

    /// Scale of the product of factors of this rank.
    pub fn scale(&self, rank: usize) -> f64 {
        let rank = rank as f64;
        self.lora_alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }

    /// The adapted modules of a model, in name order.
    ///
    /// # Errors
    /// A name or pattern without a match; a module that is also to be trained fully.
    pub fn modules(&self, config: &Config) -> Result<Vec<String>> {
        self.check_saved(config)?;
        let all: Vec<String> = params::shapes(config)
            .into_keys()
            .filter(|name| is_projection(name))
            .map(|name| name.trim_end_matches(".weight").to_owned())
            .collect();
        let mut wanted = BTreeSet::new();
        for target in &self.lora_target_modules {
            let pattern = pattern(target)?;
            let means = |module: &String| {
                let whole = |pattern: &Regex| pattern.is_match(module);
                is_all(target) || names(target, module) || pattern.as_ref().is_some_and(whole)
            };
            if !all.iter().any(means) {
                return Err(matches_none(target, pattern.is_some()));
            }
            wanted.extend(all.iter().filter(|module| means(module)).cloned());
        }
        self.check_apart(&wanted)?;
        Ok(wanted.into_iter().collect())
    }

    /// Rejects modules that are both adapted and fully trained: the weight beside the adapter must be frozen.
    fn check_apart(&self, adapted: &BTreeSet<String>) -> Result<()> {
        let both = self.lora_modules_to_save.iter().find_map(|saved| {
            adapted.iter().find(|module| names(saved, module)).map(|module| (saved, module))
        });
        let Some((saved, module)) = both else { return Ok(()) };
        Err(Error::usage(format!(
            "`lora_modules_to_save` has `{saved}`, and `lora_target_modules` adapts `{module}`"
        ))
        .hint("a projection is adapted or trained in full: name the others in lora_target_modules"))
    }

    /// Full names of the fully trained modules: peft matches every module that ends with a name, so `norm` would
    /// include each `input_layernorm`.
    pub fn saved_modules(&self, config: &Config) -> Vec<String> {
        let shapes = params::shapes(config);
        let trained = shapes.keys().filter(|name| self.trains(name)).map(|name| module_of(name));
        let modules: BTreeSet<&str> = trained.collect();
        modules.into_iter().map(str::to_owned).collect()
    }

    /// Rejects fully trained modules that the model does not have.
    fn check_saved(&self, config: &Config) -> Result<()> {
        let shapes = params::shapes(config);
        let modules = || shapes.keys().map(|name| module_of(name));
        for saved in &self.lora_modules_to_save {
            if modules().any(|module| names(saved, module)) {
                continue;
            }
            let error = Error::usage(format!(
                "`lora_modules_to_save` has `{saved}`, which the model does not have"
            ));
            let last = |module: &str| module.rsplit('.').next().unwrap_or(module).to_owned();
            let known: BTreeSet<String> = modules().map(last).collect();
            let is_head = saved == "lm_head" && config.architecture == Architecture::CausalLm;
            return Err(error.hint(if is_head {
                "its head is the embedding: name embed_tokens".to_owned()
            } else {
                match did_you_mean(saved, known.iter().map(String::as_str)) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => format!("there is: {}", Vec::from_iter(known).join(", ")),
                }
            }));
        }
        Ok(())
    }

    /// The adapted modules for `adapter_config.json`: the pattern, if it is the only target, otherwise the modules'
    /// names.
    ///
    /// # Errors
    /// As [`modules`](Self::modules).
    pub fn target_modules(&self, config: &Config) -> Result<Value> {
        let modules = self.modules(config)?;
        match &self.lora_target_modules[..] {
            [target] if pattern(target)?.is_some() => Ok(Value::from(target.as_str())),
            _ => Ok(Value::from(modules)),
        }
    }

    /// Whether a parameter of the model is fully trained.
    pub fn trains(&self, name: &str) -> bool {
        trains(&self.lora_modules_to_save, name)
    }
}

/// Whether a parameter is fully trained on adapters: those of the named modules, and a score head.
pub(crate) fn trains(modules: &[String], name: &str) -> bool {
    let module = module_of(name);
    [params::SCORE, params::SCORE_BIAS].contains(&name)
        || modules.iter().any(|saved| names(saved, module))
}

/// A parameter's module.
fn module_of(name: &str) -> &str {
    name.strip_suffix(".weight").or(name.strip_suffix(".bias")).unwrap_or(name)
}

/// Every projection; LLaMA-Factory calls it `all`.
fn is_all(target: &str) -> bool {
    target == ALL_LINEAR || target == "all"
}

/// The target as a regular expression for whole names, as in peft; `None` if it is a plain name.
fn pattern(target: &str) -> Result<Option<Regex>> {
    if target.chars().all(|c| c.is_alphanumeric() || "._-".contains(c)) {
        return Ok(None);
    }
    let whole = Regex::new(&format!("^(?:{target})$")).map_err(|error| {
        Error::usage(format!("`lora_target_modules` has `{target}`: {error}"))
            .hint("the syntax is that of the crate regex: no look-around")
    })?;
    Ok(Some(whole))
}

fn matches_none(target: &str, is_pattern: bool) -> Error {
    if is_pattern {
        return Error::usage(format!(
            "`lora_target_modules` has `{target}`, which matches no projection"
        ))
        .hint("a pattern is held against whole names, such as `model.layers.0.self_attn.q_proj`");
    }
    let error =
        Error::usage(format!("`lora_target_modules` has `{target}`, which is not a projection"));
    error.hint(match did_you_mean(target, PROJECTIONS) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("there is: {ALL_LINEAR}, {}, or a pattern", PROJECTIONS.join(", ")),
    })
}

/// Whether a parameter is the weight of a block's projection.
pub(crate) fn is_projection(name: &str) -> bool {
    name.starts_with("model.layers.") && name.ends_with("_proj.weight")
}

/// Whether `pattern` is the module's whole name or its end.
fn names(pattern: &str, module: &str) -> bool {
    module.strip_suffix(pattern).is_some_and(|front| front.is_empty() || front.ends_with('.'))
}

/// Rejects adapters that do not fit a model.
///
/// # Errors
/// An adapter for a module the model does not have, one that is no projection of a block, or of another shape.
pub fn check_fit(tensors: &Tensors, adapters: &Adapters) -> Result<()> {
    adapters.iter().try_for_each(|(module, adapter)| {
        let name = format!("{module}.weight");
        let dense = tensors.weights.get(&name).map(|weight| weight.dims().to_vec());
        let packed =
            || tensors.packed.get(&name).map(|packed| <[usize; 2]>::from(packed.shape()).to_vec());
        let shape = dense.or_else(packed);
        if !is_projection(&name) && (shape.is_some() || name == params::HEAD) {
            return Err(not_adaptable(module));
        }
        adapter.check(&shape.ok_or_else(|| unknown(module))?)
    })
}

fn not_adaptable(module: &str) -> Error {
    let projections = PROJECTIONS.join(", ");
    Error::run(format!(
        "the adapter has factors for it, expected only projections of blocks: {projections}"
    ))
    .at(format!("`{module}`"))
    .hint("merge the adapter in peft, or train the module in full there: modules_to_save")
}

/// Merges adapters, which must [fit](check_fit), into a model's weights, in f32.
///
/// # Errors
/// An adapter for a module the model does not have.
pub fn merge(weights: &mut Weights, adapters: &Adapters) -> Result<()> {
    for (module, adapter) in adapters {
        let weight = weights.get_mut(&format!("{module}.weight")).ok_or_else(|| unknown(module))?;
        *weight = adapter.merged(weight)?;
    }
    Ok(())
}

pub(super) fn unknown(module: &str) -> Error {
    Error::run("the adapter has factors for it, the base model has no such projection")
        .at(format!("`{module}`"))
        .hint("the adapter was trained on another model")
}
