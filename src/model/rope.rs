//! RoPE frequencies: plain, and with Llama 3.1's scaling for longer contexts.

use std::f64::consts::TAU;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// RoPE configuration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base of the geometric sequence of wavelengths.
    pub theta: f64,
    /// Llama 3.1's frequency scaling, if the model has it.
    pub scaling: Option<Llama3Scaling>,
}

/// Llama 3.1's RoPE scaling: long wavelengths are stretched, short ones kept, with interpolation in between.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Llama3Scaling {
    /// Stretch factor of the longest wavelengths.
    pub factor: f64,
    /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
    pub high_freq_factor: f64,
    /// Context length of the original model, in tokens.
    pub original_max_position_embeddings: usize,
}

impl Rope {
    /// Plain RoPE with this base.
    pub fn plain(theta: f64) -> Self {
        Self { theta, scaling: None }
    }

    /// Angle per position of each channel pair, `[head_dim / 2]`, longest wavelength last.
    ///
    /// ```
    /// use arriero::model::rope::Rope;
    /// assert_eq!(Rope::plain(10_000.0).inverse_frequencies(4), [1.0, 0.01]);
    /// ```
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|pair| self.frequency(pair, head_dim))
            .map(|frequency| self.scaling.map_or(frequency, |scaling| scaling.apply(frequency)))
            .map(|frequency| frequency as f32)
            .collect()
    }

    /// llama.cpp's divisors of the plain frequencies, `[head_dim / 2]`; `None` without scaling.
    pub(super) fn factors(&self, head_dim: usize) -> Option<Vec<f32>> {
        let scaling = self.scaling?;
        let factor = |pair: usize| {
            let plain = self.frequency(pair, head_dim);
            (plain / scaling.apply(plain)) as f32
        };
        Some((0..head_dim / 2).map(factor).collect())
    }

    fn frequency(&self, pair: usize, head_dim: usize) -> f64 {
        self.theta.powf(-((2 * pair) as f64) / head_dim as f64)
    }

    /// Takes the rope keys of either transformers generation from a `config.json`.
    ///
    /// # Errors
    /// A scaling other than `llama3`, incomplete scaling, or conflicting keys of the two generations.
    pub(super) fn from_keys(keys: &mut Map<String, Value>) -> Result<Self> {
        let theta = keys.shift_remove("rope_theta");
        let old = Self::from_parts("rope_scaling", theta, keys.shift_remove("rope_scaling"))?;
        let new = Self::from_parts("rope_parameters", None, keys.shift_remove("rope_parameters"))?;
        match (old, new) {
            (Some(old), Some(new)) if !old.agrees_with(&new) => Err(Error::run(format!(
                "rope_parameters ({new}) disagree with rope_theta and rope_scaling ({old})"
            ))
            .hint("remove the wrong ones from config.json")),
            (Some(old), Some(new)) => Ok(Self {
                theta: old.theta.or(new.theta).unwrap_or(DEFAULT_THETA),
                scaling: old.scaling.or(new.scaling),
            }),
            (old, new) => Ok(old.or(new).map_or(Self::plain(DEFAULT_THETA), |parts| Self {
                theta: parts.theta.unwrap_or(DEFAULT_THETA),
                scaling: parts.scaling,
            })),
        }
    }

    /// Writes the keys for both transformers 4 and 5.
    pub(super) fn to_keys(self, keys: &mut Map<String, Value>) {
        let mut parameters = Map::new();
        let kind = if self.scaling.is_some() { "llama3" } else { "default" };
        parameters.insert("rope_type".to_owned(), json!(kind));
        if let Some(scaling) = self.scaling {
            parameters.insert("factor".to_owned(), json!(scaling.factor));
            parameters.insert("low_freq_factor".to_owned(), json!(scaling.low_freq_factor));
            parameters.insert("high_freq_factor".to_owned(), json!(scaling.high_freq_factor));
            parameters.insert(
                "original_max_position_embeddings".to_owned(),
                json!(scaling.original_max_position_embeddings),
            );
        }
        let old = if self.scaling.is_some() { json!(parameters) } else { Value::Null };
        keys.insert("rope_theta".to_owned(), json!(self.theta));
        keys.insert("rope_scaling".to_owned(), old);
        parameters.insert("rope_theta".to_owned(), json!(self.theta));
        keys.insert("rope_parameters".to_owned(), Value::Object(parameters));
    }

    fn from_parts(
        place: &str,
        theta: Option<Value>,
        scaling: Option<Value>,
    ) -> Result<Option<Parts>> {
        let scaling = scaling.filter(|value| !value.is_null());
        let theta = theta.filter(|value| !value.is_null());
        if theta.is_none() && scaling.is_none() {
            return Ok(None);
        }
        let mut parts = Parts { theta: None, scaling: None };
        if let Some(value) = &scaling {
            let Value::Object(object) = value else {
                return Err(Error::run(format!("`{place}` is {value}, expected an object")));
            };
            parts.scaling = scaling_of(place, object)?;
            if object.get("rope_theta").is_some_and(|theta| !theta.is_null()) {
                parts.theta = Some(positive(place, object, "rope_theta")?);
            }
        }
        if let Some(theta) = theta {
            let object = Map::from_iter([("rope_theta".to_owned(), theta)]);
            parts.theta = Some(positive("config.json", &object, "rope_theta")?);
        }
        Ok(Some(parts))
    }
}

/// Transformers' default for `rope_theta`.
const DEFAULT_THETA: f64 = 10_000.0;

/// Values from one generation of keys; the base may be missing if the other has it.
#[derive(Clone, Copy)]
struct Parts {
    theta: Option<f64>,
    scaling: Option<Llama3Scaling>,
}

impl Parts {
    #[expect(clippy::float_cmp, reason = "both come from the same file, digit for digit")]
    fn agrees_with(&self, other: &Self) -> bool {
        // A lone `rope_theta` does not imply unscaled: transformers 5 may have kept it alongside.
        let same_theta = match (self.theta, other.theta) {
            (Some(one), Some(two)) => one == two,
            _ => true,
        };
        let same_scaling = match (self.scaling, other.scaling) {
            (Some(one), Some(two)) => one == two,
            (Some(_), None) => false,
            _ => true,
        };
        same_theta && same_scaling
    }
}

impl std::fmt::Display for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.theta {
            Some(theta) => write!(f, "rope_theta {theta}")?,
            None => f.write_str("no rope_theta")?,
        }
        match self.scaling {
            Some(scaling) => write!(f, ", llama3 factor {}", scaling.factor),
            None => f.write_str(", no scaling"),
        }
    }
}

impl Llama3Scaling {
    /// One scaled frequency (Llama 3.1's `apply_scaling`).
    fn apply(&self, frequency: f64) -> f64 {
        let context = self.original_max_position_embeddings as f64;
        let turns = context * frequency / TAU; // rotations of this pair within the original context
        if turns < self.low_freq_factor {
            frequency / self.factor
        } else if turns > self.high_freq_factor {
            frequency
        } else {
            let span = self.high_freq_factor - self.low_freq_factor;
            let blend = (turns - self.low_freq_factor) / span;
            (1.0 - blend) * frequency / self.factor + blend * frequency
        }
    }
}

fn scaling_of(place: &str, object: &Map<String, Value>) -> Result<Option<Llama3Scaling>> {
    let kind = object.get("rope_type").or_else(|| object.get("type")).unwrap_or(&Value::Null);
    match kind.as_str() {
        Some("default") => Ok(None),
        Some("llama3") => {
            let scaling = Llama3Scaling {
                factor: positive(place, object, "factor")?,
                low_freq_factor: positive(place, object, "low_freq_factor")?,
                high_freq_factor: positive(place, object, "high_freq_factor")?,
                original_max_position_embeddings: positive(
                    place,
                    object,
                    "original_max_position_embeddings",
                )? as usize,
            };
            if scaling.high_freq_factor <= scaling.low_freq_factor {
                return Err(Error::run(format!(
                    "{place}.high_freq_factor {} is not above low_freq_factor {}",
                    scaling.high_freq_factor, scaling.low_freq_factor
                )));
            }
            Ok(Some(scaling))
        }
        Some(other) => Err(Error::run(format!("{place}: rope type `{other}` is not implemented"))
            .hint("supported rope types: default, llama3")),
        None if object.values().any(Value::is_object) => {
            Err(Error::run(format!("{place}: a rope per layer type is not implemented")))
        }
        None if object.keys().all(|key| key == "rope_theta") => Ok(None),
        None => Err(Error::run(format!("{place}: missing key `rope_type`"))
            .hint("supported rope types: default, llama3")),
    }
}

fn positive(place: &str, object: &Map<String, Value>, key: &str) -> Result<f64> {
    let value = object.get(key).unwrap_or(&Value::Null);
    value.as_f64().filter(|x| x.is_finite() && *x > 0.0).ok_or_else(|| {
        Error::run(format!("{place}.{key} is {value}, expected a number above zero"))
    })
}
