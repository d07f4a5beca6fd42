//! `POST /v1/completions`: text completion, and log-probabilities of a given text.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};

use super::answering::{Format, Usage, reason};
use super::fields::Fields;
use super::http::Fresh;
use super::logprobs::{Legacy, Scored};
use super::manner::{MOST_TOP, Manner};
use super::problem::Problem;
use super::served::{Served, check_ids, now};
use super::voices::Voice;
use crate::generate::engine::{Answer, Piece, PromptScores, Request};

/// A prompt's text, if given as text, and its ids.
type Encoded = (Option<String>, Vec<u32>);

/// OpenAI's default for `max_tokens`.
const DEFAULT_TOKENS: usize = 16;

/// One or several texts, as strings or token ids.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(
    untagged,
    expecting = "expected a string, a list of strings, a list of tokens, or a list of those"
)]
pub(super) enum Texts {
    One(String),
    Many(Vec<String>),
    Ids(Vec<u32>),
    ManyIds(Vec<Vec<u32>>),
}

impl Texts {
    pub(super) fn count(&self) -> usize {
        match self {
            Self::One(_) | Self::Ids(_) => 1,
            Self::Many(many) => many.len(),
            Self::ManyIds(many) => many.len(),
        }
    }

    /// Token ids of each, with the text if given as text.
    ///
    /// # Errors
    /// No text, or ids outside the vocabulary.
    pub(super) fn encode(
        self,
        served: &Served,
        add_special: bool,
    ) -> Result<Vec<Encoded>, Problem> {
        let text = |text: String| {
            let ids = served.encode(&text, add_special)?;
            Ok::<_, Problem>((Some(text), ids))
        };
        let texts = match self {
            Self::One(one) => vec![text(one)?],
            Self::Many(many) => many.into_iter().map(text).collect::<Result<_, _>>()?,
            Self::Ids(ids) => vec![(None, ids)],
            Self::ManyIds(many) => many.into_iter().map(|ids| (None, ids)).collect(),
        };
        if texts.is_empty() || texts.iter().any(|(_, ids)| ids.is_empty()) {
            return Err(Problem::invalid("no text, or one without tokens"));
        }
        texts.iter().try_for_each(|(_, ids)| check_ids(ids, served))?;
        Ok(texts)
    }
}

/// A parsed request: the engine's input, and the response format.
pub(super) struct Asked<F> {
    pub(super) requests: Vec<Request>,
    pub(super) stream: bool,
    pub(super) format: F,
}

/// Fields that chat does not have.
struct Own {
    max_tokens: usize,
    echo: bool,
    top: Option<usize>,
    add_special: bool,
}

impl Own {
    fn take(fields: &mut Fields, manner: &Manner) -> Result<Self, Problem> {
        let refuse = |param: &str, message: String| Err(Problem::invalid(message).on(param));
        let max_tokens = fields.take("max_tokens")?.unwrap_or(DEFAULT_TOKENS);
        let echo = fields.take("echo")?.unwrap_or(false);
        let top: Option<usize> = fields.take("logprobs")?;
        let add_special = fields.take("add_special_tokens")?.unwrap_or(true);
        let best_of: Option<usize> = fields.take("best_of")?;
        let suffix: Option<String> = fields.take("suffix")?;
        if suffix.is_some_and(|suffix| !suffix.is_empty()) {
            return refuse("suffix", "`suffix`: the model cannot fill a gap".to_owned());
        }
        if let Some(best_of) = best_of.filter(|best_of| *best_of != manner.sampling.num_samples) {
            return refuse("best_of", format!("`best_of` is {best_of}, expected the value of `n`"));
        }
        if let Some(top) = top.filter(|top| *top > MOST_TOP) {
            return refuse("logprobs", format!("`logprobs` is {top}, expected 0 to {MOST_TOP}"));
        }
        if max_tokens == 0 && !echo {
            return refuse("max_tokens", "`max_tokens` is 0 without `echo`".to_owned());
        }
        if echo && manner.stream && top.is_some() {
            let message = "a prompt's log-probabilities are not streamed; leave out `stream`, `echo` or `logprobs`";
            return refuse("stream", message.to_owned());
        }
        Ok(Self { max_tokens, echo, top, add_special })
    }
}

/// Parses a request. `fresh`: a seed and id for it.
///
/// # Errors
/// An unsupported request.
pub(super) fn parse(
    served: &Arc<Served>,
    body: &[u8],
    fresh: &Fresh,
) -> Result<Asked<Completion>, Problem> {
    let mut fields = Fields::parse(body)?;
    let voice = served.take_voice(&mut fields)?;
    let prompt: Texts = fields.need("prompt")?;
    let mut manner = Manner::take(&mut fields, fresh.seed)?;
    let Own { max_tokens, echo, top, add_special } = Own::take(&mut fields, &manner)?;
    fields.finish()?;
    manner.extras.top_logprobs = top.unwrap_or(0);
    manner.extras.adaptation = voice.adaptation();
    manner.extras.prompt_logprobs = echo && top.is_some();
    let (stream, include_usage) = (manner.stream, manner.include_usage);
    let (texts, prompts): (Vec<_>, Vec<_>) =
        prompt.encode(served, add_special)?.into_iter().unzip();
    let echoed = |(text, ids): (Option<String>, &Vec<u32>)| {
        text.unwrap_or_else(|| served.tokenizer().decode(ids, false))
    };
    let texts = echo.then(|| texts.into_iter().zip(&prompts).map(echoed).collect());
    let n = manner.sampling.num_samples;
    let usage = Usage { prompt: prompts.iter().map(Vec::len).sum(), ..Usage::default() };
    // Checked before anything is allocated for the requested number of answers.
    let requests = manner.requests(served, prompts.clone(), Some(max_tokens))?;
    let format = Completion {
        head: Head::new(&voice, format!("cmpl-{}", fresh.id)),
        n,
        echo: texts,
        nothing_new: max_tokens == 0,
        top,
        include_usage,
        usage,
        streams: (0..requests.len() * n).map(|_| Stream::default()).collect(),
        prompts,
        served: Arc::clone(served),
    };
    Ok(Asked { requests, stream, format })
}

/// Fields common to all objects of a response.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) id: String,
    created: u64,
    model: String,
    fingerprint: String,
}

impl Head {
    pub(super) fn new(voice: &Voice, id: String) -> Self {
        let (model, fingerprint) = (voice.name.clone(), voice.fingerprint.clone());
        Self { id, created: now(), model, fingerprint }
    }

    /// A response object.
    pub(super) fn object(&self, object: &str, choices: &[Value]) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "choices": choices,
        })
    }

    /// A stream chunk; each has a `usage` field if usage was requested.
    pub(super) fn chunk(&self, object: &str, choice: &Value, include_usage: bool) -> Value {
        let mut chunk = self.object(object, std::slice::from_ref(choice));
        if include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

#[derive(Debug, Default)]
struct Stream {
    begun: bool,
    logprobs: Legacy,
}

/// OpenAI's `text_completion`.
pub(super) struct Completion {
    served: Arc<Served>,
    head: Head,
    n: usize,
    /// The prompts' texts, if echoed.
    echo: Option<Vec<String>>,
    prompts: Vec<Vec<u32>>,
    /// Whether only the prompt is scored: the engine samples one token, which is dropped.
    nothing_new: bool,
    top: Option<usize>,
    include_usage: bool,
    usage: Usage,
    streams: Vec<Stream>,
}

impl Completion {
    fn echoed(&self, place: usize) -> &str {
        self.echo.as_ref().and_then(|texts| texts.get(place)).map_or("", String::as_str)
    }

    fn choice(
        &mut self,
        place: usize,
        sample: usize,
        answer: &Answer,
        scores: &PromptScores,
    ) -> Value {
        let mut logprobs = Legacy::default();
        if self.echo.is_some() {
            let PromptScores { logprobs: prompt, top_logprobs: top, .. } = scores;
            let scored = Scored { ids: &self.prompts[place], logprobs: prompt, top };
            logprobs.prompt(&self.served, scored);
        }
        let mut text = self.echoed(place).to_owned();
        let mut finish = "length";
        if !self.nothing_new {
            let Answer { ids, logprobs: own, top_logprobs: top, .. } = answer;
            logprobs.add(&self.served, Scored { ids, logprobs: own, top });
            text.push_str(&answer.text);
            finish = reason(answer.finish);
            self.usage.completion += answer.ids.len();
        }
        let logprobs = self.top.map(|top| logprobs.take(top > 0));
        json!({"index": place * self.n + sample, "text": text, "logprobs": logprobs, "finish_reason": finish})
    }
}

impl Format for Completion {
    fn whole(&mut self, all: Vec<(Vec<Answer>, PromptScores)>) -> Value {
        let mut choices = Vec::new();
        for (place, (answers, scores)) in all.iter().enumerate() {
            self.usage.cached += scores.cached;
            for (sample, answer) in answers.iter().enumerate() {
                choices.push(self.choice(place, sample, answer, scores));
            }
        }
        let mut object = self.head.object("text_completion", &choices);
        object["usage"] = self.usage.object();
        object
    }

    fn piece(&mut self, place: usize, piece: Piece) -> Vec<Value> {
        let index = place * self.n + piece.sample;
        let mut text = String::new();
        let stream = &mut self.streams[index];
        if !stream.begun {
            stream.begun = true;
            if let Some(echoed) = &self.echo {
                text.push_str(&echoed[place]);
            }
        }
        if !self.nothing_new {
            let Piece { ids, logprobs, top_logprobs: top, .. } = &piece;
            stream.logprobs.add(&self.served, Scored { ids, logprobs, top });
            text.push_str(&piece.text);
            self.usage.completion += piece.ids.len();
        }
        let finish =
            piece.finish.map(|finish| if self.nothing_new { "length" } else { reason(finish) });
        // Log-probabilities of held-back text are sent with that text.
        if text.is_empty() && finish.is_none() {
            return Vec::new();
        }
        let logprobs = self.top.map(|top| stream.logprobs.take(top > 0));
        let choice =
            json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish});
        vec![self.head.chunk("text_completion", &choice, self.include_usage)]
    }

    fn done(&mut self, scores: &PromptScores) {
        self.usage.cached += scores.cached;
    }

    fn end(&mut self) -> Vec<Value> {
        if !self.include_usage {
            return Vec::new();
        }
        let mut last = self.head.object("text_completion", &[]);
        last["usage"] = self.usage.object();
        vec![last]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_accepted_as_text_or_tokens() {
        let of = |value: Value| serde_json::from_value::<Texts>(value);
        assert_eq!(of(json!("a")).unwrap(), Texts::One("a".to_owned()));
        assert_eq!(
            of(json!(["a", "b"])).unwrap(),
            Texts::Many(vec!["a".to_owned(), "b".to_owned()])
        );
        assert_eq!(of(json!([1, 2])).unwrap(), Texts::Ids(vec![1, 2]));
        assert_eq!(of(json!([[1], [2, 3]])).unwrap(), Texts::ManyIds(vec![vec![1], vec![2, 3]]));
        for bad in [json!(1), json!([-1]), json!(["a", 1]), json!({"text": "a"})] {
            assert!(of(bad).unwrap_err().to_string().starts_with("expected a string"));
        }
    }
}
