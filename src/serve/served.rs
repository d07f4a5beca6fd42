//! The served models and their descriptions.

use std::sync::{Arc, OnceLock};

use base64::Engine as _;
use candle_core::DType;
use llguidance::toktrie::TokTrie;
use serde_json::{Value, json};

use super::engine::{Embed, Judged, Others, Pooling};
use super::problem::Problem;
use super::voices::{Voice, Voices};
use crate::data::template::is_refusal;
use crate::data::tokenizer::ChatTokenizer;
use crate::error::{Context, Error, Result};
use crate::generate::engine::Limits;
use crate::generate::local::LocalModel;
use crate::generate::sampling::WeightFormat;
use crate::model::checkpoint::Checkpoint;
use crate::score::reward_model::RewardModel;
use crate::score::{Question, Scorer};
use crate::store::sha256_bytes;

/// The answering model, with its names.
pub(super) struct Served {
    /// The first one is reported in answers.
    pub(super) names: Vec<String>,
    pub(super) model: LocalModel,
    pub(super) limits: Limits,
    /// The model without adapters.
    pub(super) alone: Arc<Voice>,
    pub(super) voices: Voices,
    /// Unix time of the server's start, in seconds.
    pub(super) created: u64,
    words: OnceLock<Vec<Vec<u8>>>,
}

impl Served {
    /// Wraps a checkpoint. If adapters may be loaded, they need its weights, which are then shared rather than copied
    /// (unless quantised); otherwise the model uses its fastest storage format.
    ///
    /// # Errors
    /// A reward model, or a checkpoint without a tokenizer.
    pub(super) fn new(
        checkpoint: Checkpoint,
        names: Vec<String>,
        quantization: WeightFormat,
        voices: Voices,
    ) -> Result<Self> {
        let alone = Voice {
            name: names.first().cloned().unwrap_or_default(),
            fingerprint: fingerprint(&checkpoint, quantization)?,
            adapter: None,
        };
        let model = match quantization {
            // A packed copy would duplicate the weights.
            WeightFormat::None if voices.is_open() => LocalModel::new(&checkpoint)?,
            format => LocalModel::held(checkpoint, format)?,
        };
        let limits = Limits { keep_prefixes: true, ..model.limits() };
        Ok(Self {
            names,
            limits,
            alone: Arc::new(alone),
            voices,
            created: now(),
            words: OnceLock::new(),
            model,
        })
    }

    /// The name reported in answers.
    pub(super) fn name(&self) -> &str {
        &self.alone.name
    }

    /// The `/v1/models` entry of a name.
    pub(super) fn card(&self, name: &str) -> Value {
        json!({
            "id": name, "object": "model", "created": self.created, "owned_by": "arriero", "root": self.name(),
            "max_model_len": self.limits.max_positions,
        })
    }

    /// The tokenizer.
    pub(super) fn tokenizer(&self) -> &ChatTokenizer {
        self.model.tokenizer()
    }

    /// Token ids of plain text, with special tokens parsed, and preceded by `bos` if the tokenizer adds it.
    ///
    /// # Errors
    /// Text that the vocabulary cannot represent.
    pub(super) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let tokenizer = self.tokenizer();
        let mut ids = tokenizer.encode_special(text)?;
        if add_special {
            tokenizer.begin(&mut ids);
        }
        Ok(ids)
    }

    /// The bytes of a token; for a special token, those of its name.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        let words = self.words.get_or_init(|| words(self.tokenizer()));
        words.get(id as usize).map_or(&[], Vec::as_slice)
    }
}

/// Rejects ids outside the vocabulary.
///
/// # Errors
/// Names the first.
pub(super) fn check_ids(ids: &[u32], served: &Served) -> Result<(), Problem> {
    let size = served.model.vocab_size();
    match ids.iter().find(|id| **id as usize >= size) {
        None => Ok(()),
        Some(id) => Err(Problem::invalid(format!("token {id}, expected one below {size}"))),
    }
}

/// Unix time in seconds.
#[expect(clippy::disallowed_methods, reason = "answers carry the time of day; no artefact does")]
pub(super) fn now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// Bytes of each token, by id.
fn words(tokenizer: &ChatTokenizer) -> Vec<Vec<u8>> {
    let json = tokenizer.inner().to_string(false).ok();
    let json = json.and_then(|json| serde_json::from_str(&json).ok());
    let words = json.and_then(|json| llguidance::token_bytes_from_tokenizer_json(&json).ok());
    let Some(mut words) = words else {
        let text = |id| tokenizer.decode(&[id], false).into_bytes();
        return (0..tokenizer.vocab_size() as u32).map(text).collect();
    };
    for word in &mut words {
        if word.len() > 1 && word[0] == TokTrie::SPECIAL_TOKEN_MARKER {
            word.remove(0);
        }
    }
    words
}

/// Hash of the shape, the tokenizer and the first values of every parameter: distinguishes models and dtypes without
/// reading a file.
fn fingerprint(checkpoint: &Checkpoint, quantization: WeightFormat) -> Result<String> {
    const LOOKED_AT: usize = 64;
    let mut all = checkpoint.config.to_json().into_bytes();
    all.extend_from_slice(checkpoint.tokenizer()?.hash().as_bytes());
    all.extend_from_slice(format!("{quantization:?}").as_bytes());
    all.extend_from_slice(env!("CARGO_PKG_VERSION").as_bytes());
    for (name, tensor) in &checkpoint.weights {
        all.extend_from_slice(
            format!("{name} {:?} {:?}", tensor.dtype(), tensor.dims()).as_bytes(),
        );
        let flat = tensor.flatten_all()?;
        let some = flat.narrow(0, 0, LOOKED_AT.min(flat.elem_count()))?.to_dtype(DType::F32)?;
        all.extend(some.to_vec1::<f32>()?.iter().flat_map(|value| value.to_le_bytes()));
    }
    Ok(format!("fp_{}", &sha256_bytes(&all)[..12]))
}

/// Computations on the engine's thread other than generation.
pub(super) struct Companions {
    pub(super) served: Arc<Served>,
    pub(super) judge: Option<RewardModel>,
}

impl Others for Companions {
    fn embed(&self, embed: &Embed) -> Result<Vec<Vec<f32>>> {
        let model = &self.served.model;
        let mut all = vec![Vec::new(); embed.texts.len()];
        // Pooled as they arrive: the states of a whole request may not fit in memory.
        model.states(&embed.texts, &mut |place, states| {
            all[place] = pooled(&states, model.hidden_size(), embed.pooling);
        })?;
        Ok(all)
    }

    fn score(&self, judged: &Judged) -> Result<Vec<f64>> {
        let Some(judge) = &self.judge else { return Err(Error::usage("no reward model")) };
        let (limit, tokenizer) = (judge.positions(), judge.tokenizer());
        let prompt = judge.prompt_len(&judged.prompt, judged.tools.as_ref());
        let prompt = prompt.map_err(Error::as_usage).at("`messages`")?;
        for (place, answer) in judged.answers.iter().enumerate() {
            // Plus the end of the turn.
            let len = prompt + tokenizer.encode(answer).len() + 1;
            if len > limit {
                return Err(Error::usage(format!(
                    "completion {} has {len} tokens with its prompt, and the reward model {limit} positions",
                    judged.first + place
                )));
            }
        }
        let question = Question {
            place: "the request",
            prompt: &judged.prompt,
            tools: judged.tools.as_ref(),
            answer: None,
            extra: None,
        };
        let answers: Vec<&str> = judged.answers.iter().map(String::as_str).collect();
        let scores = judge.score(&question, &answers).map_err(|error| {
            // A template may accept the prompt but refuse it with its answer.
            if is_refusal(&error) { error.as_usage() } else { error }
        })?;
        let scores: Vec<f64> = scores.into_iter().map(|score| score.value).collect();
        if scores.len() == answers.len() {
            return Ok(scores);
        }
        Err(Error::run(format!("{} scores of {} completions", scores.len(), answers.len())))
    }
}

/// Pools a text's states into a unit vector. Shapes: `[T, D] -> [D]`.
fn pooled(states: &[f32], width: usize, pooling: Pooling) -> Vec<f32> {
    let last = states.len().saturating_sub(width);
    let mut vector = match pooling {
        Pooling::Last => states[last..].to_vec(),
        Pooling::Mean => {
            let mut sums = vec![0.0_f64; width];
            for row in states.chunks_exact(width) {
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
            }
            let count = (states.len() / width) as f64;
            sums.into_iter().map(|sum| (sum / count) as f32).collect()
        }
    };
    let squares = vector.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
    let length = squares.sqrt().max(f64::MIN_POSITIVE);
    for value in &mut vector {
        *value = (f64::from(*value) / length) as f32;
    }
    vector
}

/// Little-endian 32-bit floats in base64, the format OpenAI's clients request.
pub(super) fn in_base64(vector: &[f32]) -> String {
    let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_pooled_into_one_unit_vector() {
        let states = [3.0, 0.0, 3.0, 8.0];
        // The mean is (3, 4), whose length is 5.
        assert_eq!(pooled(&states, 2, Pooling::Mean), [0.6, 0.8]);
        let last = pooled(&states, 2, Pooling::Last);
        assert!((last[1] / last[0] - 8.0 / 3.0).abs() < 1e-6, "{last:?}");
        assert_eq!(in_base64(&[1.0, -2.0]), "AACAPwAAAMA=");
    }
}
