//! What is asked of the engine and what comes back.

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
    /// A server's filter withheld the answer or the rest of it.
    Filtered,
}

/// A token with its log-probability in nats.
pub type Likely = (u32, f32);

/// One answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The text, without the token or the string that ended it.
    pub text: String,
    /// Every token drawn, the end-of-turn token included; empty where a server did not say them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<u32>,
    /// Log-probability of each under the model alone, in nats; empty where a server did not say them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<f32>,
    /// Log-probability of each under the distribution it was drawn from, in nats; servers do not say them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sample_logprobs: Vec<f32>,
    /// The likeliest tokens at each place under the model alone, likeliest first; empty where they were not asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top_logprobs: Vec<Vec<Likely>>,
    /// How many tokens were drawn. A server that only counts the tokens of several answers together has each
    /// answer take an equal share.
    pub tokens: usize,
    /// Why it ended.
    pub finish: Finish,
    /// Further fields of the message, as a server gave them: `tool_calls`, `reasoning_content`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub fields: Map<String, Value>,
}

#[cfg(test)]
impl Answer {
    /// A whole answer of one token, of which nothing but its text is known.
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
    /// Log-probability of the whole answer under the model alone, in nats; 0 where it is not known.
    pub fn logprob_sum(&self) -> f64 {
        self.logprobs.iter().map(|&logprob| f64::from(logprob)).sum()
    }
}

/// What a request may ask for besides how to sample; nothing by default.
#[derive(Clone, Debug, Default)]
pub struct Extras {
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Taken from the logits of tokens that the answer has already (OpenAI's interface).
    pub presence_penalty: f32,
    /// Taken from the logits of tokens as often as the answer has them already (OpenAI's interface).
    pub frequency_penalty: f32,
    /// Tokens that end the answer, besides the model's own.
    pub stop_token_ids: Vec<u32>,
    /// How many of the likeliest tokens to name at each place.
    pub top_logprobs: usize,
    /// Whether to say how likely the prompt's own tokens are.
    pub prompt_logprobs: bool,
    /// What the answer must have the form of.
    pub grammar: Option<Arc<Grammar>>,
    /// Whether to report text as it comes.
    pub stream: bool,
    /// The adapter to answer with; the model alone where there is none.
    pub adaptation: Option<Arc<Adaptation>>,
}

impl Extras {
    /// Whether caches of one are caches of the other.
    pub(super) fn same_adaptation(&self, other: &Self) -> bool {
        same(self.adaptation.as_ref(), other.adaptation.as_ref())
    }
}

/// Whether two are the same adapter.
pub(super) fn same(a: Option<&Arc<Adaptation>>, b: Option<&Arc<Adaptation>>) -> bool {
    a.map(Arc::as_ptr) == b.map(Arc::as_ptr)
}

/// A prompt with how it is to be answered.
#[derive(Clone, Debug)]
pub struct Request {
    /// What to answer.
    pub prompt: Prompt,
    /// How to sample; shared by the requests of a dataset.
    pub sampling: Arc<Sampling>,
    /// What else is wanted.
    pub extras: Arc<Extras>,
}

impl Request {
    /// A request for answers and nothing else.
    pub fn new(prompt: Prompt, sampling: Arc<Sampling>) -> Self {
        Self { prompt, sampling, extras: Arc::default() }
    }

    /// The adapter to answer with.
    pub(super) fn adaptation(&self) -> Option<&Adaptation> {
        self.extras.adaptation.as_deref()
    }

    /// Whether a model with `limit` positions has one left for an answer.
    pub fn leaves_room(&self, limit: usize) -> bool {
        self.prompt.tokens.len() < limit
    }

    /// Refuses what no model with `limit` positions and `vocab_size` tokens can answer.
    ///
    /// # Errors
    /// Says what, and what was expected.
    pub fn check(&self, limit: usize, vocab_size: usize) -> Result<()> {
        self.sampling.check()?;
        let len = self.prompt.tokens.len();
        if len == 0 || !self.leaves_room(limit) {
            return Err(Error::usage(format!(
                "{len} tokens, expected 1 to {} so that the model's {limit} positions hold an answer",
                limit - 1
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

/// How likely a prompt's own tokens are, each after those before it: all but the first. And how many need not be read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PromptScores {
    /// How many of the first tokens a kept cache had already.
    pub cached: usize,
    /// Log-probabilities in nats.
    pub logprobs: Vec<f32>,
    /// The likeliest tokens at each place, as many as `top_logprobs` says.
    pub top_logprobs: Vec<Vec<Likely>>,
}

/// Names a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// A piece of a streamed answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// Which of the prompt's answers.
    pub sample: usize,
    /// Text that is certain now; may be empty.
    pub text: String,
    /// Tokens drawn since the last piece.
    pub ids: Vec<u32>,
    /// Their log-probabilities under the model alone, in nats.
    pub logprobs: Vec<f32>,
    /// The likeliest tokens at each place, where they were asked for.
    pub top_logprobs: Vec<Vec<Likely>>,
    /// Set with the last piece of the answer.
    pub finish: Option<Finish>,
}

/// What the engine reports.
#[derive(Debug)]
pub enum Event {
    /// More of a streamed answer.
    Piece(Ticket, Piece),
    /// All answers of a request, in the order of the samples, and its prompt's scores where they were asked for.
    Done(Ticket, Vec<Answer>, PromptScores),
    /// A request that cannot be answered; the others go on.
    Failed(Ticket, Error),
}
