//! Requests to the engine, and its results.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::generate::adaptation::Adaptation;
use crate::generate::grammar::Grammar;
use crate::generate::sampling::Sampling;

/// A prompt to answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Keys the draws: the row's index in its dataset, so that a resumed run draws the same answers.
    pub index: u64,
    /// Token ids, at least one.
    pub tokens: Vec<u32>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// An end-of-turn token, a stop string, or a token of `stop_token_ids`.
    Stop,
    /// `max_new_tokens`, or the model's last position.
    Length,
    /// A server's filter withheld all or part of the answer.
    Filtered,
}

/// A token with its log-probability in nats.
pub type Likely = (u32, f32);

/// One answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Text, without the end token or stop string.
    pub text: String,
    /// Every sampled token, including the end-of-turn token; empty if a server did not return them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<u32>,
    /// Log-probability of each token under the model alone, in nats; empty if a server did not return them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<f32>,
    /// Log-probability of each token under the sampling distribution, in nats; empty for servers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sample_logprobs: Vec<f32>,
    /// The likeliest tokens at each position under the model alone, likeliest first; empty if not requested.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top_logprobs: Vec<Vec<Likely>>,
    /// Number of sampled tokens. If a server only reports a total for several answers, it is divided equally.
    pub tokens: usize,
    /// Why the answer ended.
    pub finish: Finish,
    /// Further message fields from a server: `tool_calls`, `reasoning_content`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub fields: Map<String, Value>,
}

#[cfg(test)]
impl Answer {
    /// A complete answer of one token, with nothing known but its text.
    pub(crate) fn said(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            ids: Vec::new(),
            logprobs: Vec::new(),
            sample_logprobs: Vec::new(),
            top_logprobs: Vec::new(),
            tokens: 1,
            finish: Finish::Stop,
            fields: Map::new(),
        }
    }
}

impl Answer {
    /// Log-probability of the whole answer under the model alone, in nats; 0 if unknown.
    pub fn logprob_sum(&self) -> f64 {
        self.logprobs.iter().map(|&logprob| f64::from(logprob)).sum()
    }
}

/// Request options beyond sampling; all off by default.
#[derive(Clone, Debug, Default)]
pub struct Extras {
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Subtracted from the logits of tokens already in the answer (OpenAI's definition).
    pub presence_penalty: f32,
    /// Subtracted from a token's logit once per occurrence in the answer (OpenAI's definition).
    pub frequency_penalty: f32,
    /// Tokens that end the answer, besides the model's own end tokens.
    pub stop_token_ids: Vec<u32>,
    /// How many of the likeliest tokens to return at each position.
    pub top_logprobs: usize,
    /// Whether to return the prompt's token log-probabilities.
    pub prompt_logprobs: bool,
    /// Only the prompt is scored. The one token that is drawn anyway needs no position.
    pub prompt_only: bool,
    /// Grammar the answer must match.
    pub grammar: Option<Arc<Grammar>>,
    /// Whether to report text as it is generated.
    pub stream: bool,
    /// The adapter to answer with; `None` for the base model.
    pub adaptation: Option<Arc<Adaptation>>,
}

impl Extras {
    /// Whether caches are interchangeable between the two.
    pub(super) fn same_adaptation(&self, other: &Self) -> bool {
        self.adaptation.as_ref().map(Arc::as_ptr) == other.adaptation.as_ref().map(Arc::as_ptr)
    }

    /// Most tokens of a prompt for a model with `limit` positions: an answer, if one is wanted, needs at least one.
    pub(crate) fn longest_prompt(&self, limit: usize) -> usize {
        if self.prompt_only { limit } else { limit.saturating_sub(1) }
    }
}

/// A prompt and how to answer it.
#[derive(Clone, Debug)]
pub struct Request {
    /// The prompt.
    pub prompt: Prompt,
    /// How to sample; shared by the requests of a dataset.
    pub sampling: Arc<Sampling>,
    /// Further options.
    pub extras: Arc<Extras>,
}

impl Request {
    /// A request without further options.
    pub fn new(prompt: Prompt, sampling: Arc<Sampling>) -> Self {
        Self { prompt, sampling, extras: Arc::default() }
    }

    /// The adapter to answer with.
    pub(super) fn adaptation(&self) -> Option<&Adaptation> {
        self.extras.adaptation.as_deref()
    }

    /// Whether a model with `limit` positions has room for an answer token, if one is wanted.
    pub fn leaves_room(&self, limit: usize) -> bool {
        self.prompt.tokens.len() <= self.extras.longest_prompt(limit)
    }

    /// Rejects requests that no model with `limit` positions and `vocab_size` tokens can answer.
    ///
    /// # Errors
    /// Names the problem and what was expected.
    pub fn check(&self, limit: usize, vocab_size: usize) -> Result<()> {
        self.sampling.check()?;
        let len = self.prompt.tokens.len();
        if len == 0 || !self.leaves_room(limit) {
            let answer = if self.extras.prompt_only { "them" } else { "an answer" };
            return Err(Error::usage(format!(
                "{len} tokens, expected 1 to {} so that the model's {limit} positions hold {answer}",
                self.extras.longest_prompt(limit)
            )));
        }
        if let Some(id) = self.prompt.tokens.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(Error::usage(format!("token {id}, the model has {vocab_size}"))
                .hint("this tokenizer does not belong to this model"));
        }
        let Extras { logit_bias, presence_penalty, frequency_penalty, stop_token_ids, .. } =
            &*self.extras;
        if let Some(id) = stop_token_ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(Error::usage(format!(
                "`stop_token_ids` has {id}, expected tokens below {vocab_size}"
            )));
        }
        if let Some((id, bias)) = logit_bias.iter().find(|(id, bias)| {
            *id as usize >= vocab_size || bias.is_nan() || *bias == f32::INFINITY
        }) {
            return Err(Error::usage(format!(
                "`logit_bias` of {bias} for token {id}, expected a number for a token below {vocab_size}"
            )));
        }
        for (key, value) in
            [("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)]
        {
            if !value.is_finite() {
                return Err(Error::usage(format!("`{key}` is {value}, expected a number")));
            }
        }
        Ok(())
    }
}

/// Log-probabilities of a prompt's tokens after the first, each given its predecessors, and the number of cached
/// tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PromptScores {
    /// Number of leading tokens found in the prefix cache.
    pub cached: usize,
    /// Log-probabilities, in nats.
    pub logprobs: Vec<f32>,
    /// The `top_logprobs` likeliest tokens at each position.
    pub top_logprobs: Vec<Vec<Likely>>,
}

/// Identifies a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// A piece of a streamed answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// Which of the prompt's answers.
    pub sample: usize,
    /// Text that is final; may be empty.
    pub text: String,
    /// Tokens sampled since the last piece.
    pub ids: Vec<u32>,
    /// Their log-probabilities under the model alone, in nats.
    pub logprobs: Vec<f32>,
    /// The likeliest tokens at each position, if requested.
    pub top_logprobs: Vec<Vec<Likely>>,
    /// Set with the last piece of the answer.
    pub finish: Option<Finish>,
}

/// An engine event.
#[derive(Debug)]
pub enum Event {
    /// More of a streamed answer.
    Piece(Ticket, Piece),
    /// All answers of a request, in sample order, and its prompt's scores if requested.
    Done(Ticket, Vec<Answer>, PromptScores),
    /// A request that cannot be answered; others continue.
    Failed(Ticket, Error),
}
