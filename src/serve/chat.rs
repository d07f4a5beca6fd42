//! `POST /v1/chat/completions`: the next turn of a conversation.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::answering::{Format, Usage, reason};
use super::completions::{Asked, Head};
use super::fields::Fields;
use super::http::Fresh;
use super::logprobs::{self, Scored};
use super::manner::{MOST_TOP, Manner};
use super::problem::Problem;
use super::served::Served;
use super::tools::{Call, Tools};
use crate::data::record::{Message, kind};
use crate::data::tokenizer::ChatTokenizer;
use crate::error::{Context, Error, Result};
use crate::generate::engine::{Answer, Likely, Piece, PromptScores};

const WHOLE: &str = "chat.completion";
const CHUNK: &str = "chat.completion.chunk";

/// A conversation in a request.
pub(super) struct Conversation {
    pub(super) messages: Vec<Message>,
    pub(super) template_kwargs: Map<String, Value>,
}

impl Conversation {
    /// Takes `messages` and `chat_template_kwargs`.
    ///
    /// # Errors
    /// No messages, or ones this model does not support.
    pub(super) fn take(fields: &mut Fields) -> Result<Self, Problem> {
        let values: Vec<Value> = fields.need("messages")?;
        let template_kwargs = fields.take("chat_template_kwargs")?.unwrap_or_default();
        if values.is_empty() {
            return Err(Problem::invalid("`messages` is empty").on("messages"));
        }
        let message = |(place, value)| {
            let message = message(value).map_err(Error::as_usage);
            message.at(format_args!("`messages[{place}]`"))
        };
        let messages = values.into_iter().enumerate().map(message).collect::<Result<_>>();
        let messages = messages.map_err(|error| Problem::from(error).on("messages"))?;
        Ok(Self { messages, template_kwargs })
    }

    /// Token ids of the rendered conversation, up to where the answer begins.
    ///
    /// # Errors
    /// No template, or one that refuses the messages or does not support tools.
    pub(super) fn encode(
        self,
        tokenizer: &ChatTokenizer,
        tools: Option<&Value>,
    ) -> Result<Vec<u32>, Problem> {
        let template = tokenizer.settings().chat_template.as_deref().unwrap_or_default();
        if tools.is_some() && !template.contains("tools") {
            let message = "`tools`: the model's chat template has no place for them";
            return Err(Problem::invalid(message).on("tools"));
        }
        let Self { messages, template_kwargs } = self;
        let ids = tokenizer.prompt_ids_with(&messages, tools, &template_kwargs).at("`messages`");
        ids.map_err(|error| Problem::from(error.as_usage()).on("messages"))
    }
}

/// A message as chat templates expect it: text parts joined, call arguments as objects.
fn message(value: Value) -> Result<Message> {
    let mut message = Message::from_value(value)?;
    match message.fields().get("content") {
        None | Some(Value::Null | Value::String(_)) => {}
        Some(Value::Array(parts)) => {
            let text = parts.iter().map(part).collect::<Result<String>>()?;
            message.fields_mut().insert("content".to_owned(), Value::String(text));
        }
        Some(other) => {
            let found = kind(other);
            return Err(Error::usage(format!("`content` is {found}, expected text or its parts")));
        }
    }
    if !message.fields().contains_key("content") {
        message.fields_mut().insert("content".to_owned(), Value::String(String::new()));
    }
    let calls = message.fields_mut().get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in calls.into_iter().flatten() {
        let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
        let parsed = arguments.as_str().and_then(|text| serde_json::from_str(text).ok());
        if let Some(object @ Value::Object(_)) = parsed {
            *arguments = object;
        }
    }
    Ok(message)
}

fn part(part: &Value) -> Result<&str> {
    let kind = part["type"].as_str().unwrap_or_default();
    match (kind, part["text"].as_str()) {
        ("text", Some(text)) => Ok(text),
        _ => Err(Error::usage(format!("a part of type \"{kind}\", expected text"))),
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
) -> Result<Asked<Chat>, Problem> {
    let mut fields = Fields::parse(body)?;
    let voice = served.take_voice(&mut fields)?;
    let conversation = Conversation::take(&mut fields)?;
    let mut manner = Manner::take(&mut fields, fresh.seed)?;
    let tools = Tools::take(&mut fields)?;
    let max_tokens = max_tokens(&mut fields)?;
    let top = top(&mut fields)?;
    let modalities: Option<Vec<String>> = fields.take("modalities")?;
    fields.finish()?;
    if modalities.is_some_and(|kinds| kinds.iter().any(|kind| kind != "text")) {
        return Err(Problem::invalid("`modalities`, expected text alone").on("modalities"));
    }
    if let Some(form) = &tools.form {
        if manner.form.is_some() {
            let message = "an answer that must be a call can have no other form";
            return Err(Problem::invalid(message).on("tool_choice"));
        }
        manner.form = Some(("tools", form.clone()));
    }
    manner.extras.top_logprobs = top.unwrap_or(0);
    manner.extras.adaptation = voice.adaptation();
    let prompt = conversation.encode(voice.tokenizer(served), tools.described.as_ref())?;
    let (stream, include_usage) = (manner.stream, manner.include_usage);
    let (n, len) = (manner.sampling.num_samples, prompt.len());
    let requests = manner.requests(served, vec![prompt], max_tokens)?;
    let format = Chat {
        served: Arc::clone(served),
        head: Head::new(&voice, format!("chatcmpl-{}", fresh.id)),
        tools,
        with_logprobs: top.is_some(),
        include_usage,
        usage: Usage { prompt: len, ..Usage::default() },
        streams: (0..n).map(|_| Stream::default()).collect(),
    };
    Ok(Asked { requests, stream, format })
}

/// Neither of the two names takes precedence: if both are set they must agree.
fn max_tokens(fields: &mut Fields) -> Result<Option<usize>, Problem> {
    let newer: Option<usize> = fields.take("max_completion_tokens")?;
    let older: Option<usize> = fields.take("max_tokens")?;
    match (newer, older) {
        (Some(newer), Some(older)) if newer != older => {
            let message = format!("`max_completion_tokens` is {newer} and `max_tokens` is {older}");
            Err(Problem::invalid(message).on("max_tokens"))
        }
        (Some(0), _) | (_, Some(0)) => {
            let message = "`max_completion_tokens` is 0, expected 1 or more";
            Err(Problem::invalid(message).on("max_completion_tokens"))
        }
        _ => Ok(newer.or(older)),
    }
}

/// Number of top tokens per position; `None` if no log-probabilities are requested.
fn top(fields: &mut Fields) -> Result<Option<usize>, Problem> {
    let wanted = fields.take("logprobs")?.unwrap_or(false);
    let top: Option<usize> = fields.take("top_logprobs")?;
    match top {
        Some(top) if top > MOST_TOP => {
            let message = format!("`top_logprobs` is {top}, expected 0 to {MOST_TOP}");
            Err(Problem::invalid(message).on("top_logprobs"))
        }
        Some(top) if top > 0 && !wanted => {
            Err(Problem::invalid("`top_logprobs` without `logprobs`").on("top_logprobs"))
        }
        _ => Ok(wanted.then_some(top.unwrap_or(0))),
    }
}

/// State of a streamed answer.
#[derive(Default)]
struct Stream {
    begun: bool,
    /// Whether the answer is known not to be a tool call.
    plain: bool,
    /// Text held back until it is known whether it is a call.
    held: String,
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    top: Vec<Vec<Likely>>,
}

/// OpenAI's `chat.completion` and its chunks.
pub(super) struct Chat {
    served: Arc<Served>,
    head: Head,
    tools: Tools,
    with_logprobs: bool,
    include_usage: bool,
    usage: Usage,
    streams: Vec<Stream>,
}

impl Chat {
    fn choice(&mut self, index: usize, answer: &Answer) -> Value {
        let Answer { ids, logprobs, top_logprobs: top, .. } = answer;
        self.usage.completion += ids.len();
        let scored = Scored { ids, logprobs, top };
        let logprobs = self.with_logprobs.then(|| logprobs::of_chat(&self.served, scored));
        let calls = self.tools.calls(&answer.text);
        let mut message = json!({"role": "assistant", "content": answer.text, "refusal": null});
        let mut finish = reason(answer.finish);
        if let Some(calls) = calls {
            message["content"] = Value::Null;
            message["tool_calls"] = self.calls(index, &calls, false);
            finish = "tool_calls";
        }
        json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish})
    }

    /// The calls of an answer; in a stream each has its index.
    fn calls(&self, index: usize, calls: &[Call], numbered: bool) -> Value {
        let id = format!("{}_{index}", self.head.id.trim_start_matches("chatcmpl-"));
        let object = |(number, call): (usize, &Call)| {
            let mut object = call.object(&id, number);
            if numbered {
                object["index"] = json!(number);
            }
            object
        };
        calls.iter().enumerate().map(object).collect()
    }

    fn chunk(&self, index: usize, delta: &Value, logprobs: &Value, finish: Option<&str>) -> Value {
        let choice =
            json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish});
        self.head.chunk(CHUNK, &choice, self.include_usage)
    }

    /// Log-probabilities of the tokens whose text is about to be sent.
    fn logprobs(&mut self, index: usize) -> Value {
        let stream = &mut self.streams[index];
        let (ids, logprobs) =
            (std::mem::take(&mut stream.ids), std::mem::take(&mut stream.logprobs));
        let top = std::mem::take(&mut stream.top);
        if !self.with_logprobs || ids.is_empty() {
            return Value::Null;
        }
        logprobs::of_chat(&self.served, Scored { ids: &ids, logprobs: &logprobs, top: &top })
    }
}

impl Format for Chat {
    fn whole(&mut self, all: Vec<(Vec<Answer>, PromptScores)>) -> Value {
        let mut choices = Vec::new();
        for (answers, scores) in &all {
            self.usage.cached += scores.cached;
            for (index, answer) in answers.iter().enumerate() {
                choices.push(self.choice(index, answer));
            }
        }
        let mut object = self.head.object(WHOLE, &choices);
        object["usage"] = self.usage.object();
        object
    }

    fn piece(&mut self, _: usize, piece: Piece) -> Vec<Value> {
        let Piece { sample: index, text, ids, logprobs, top_logprobs, finish } = piece;
        let mut chunks = Vec::new();
        self.usage.completion += ids.len();
        if !std::mem::replace(&mut self.streams[index].begun, true) {
            let delta = json!({"role": "assistant", "content": "", "refusal": null});
            chunks.push(self.chunk(index, &delta, &Value::Null, None));
        }
        let stream = &mut self.streams[index];
        stream.ids.extend(ids);
        stream.logprobs.extend(logprobs);
        stream.top.extend(top_logprobs);
        stream.held.push_str(&text);
        stream.plain |= !self.tools.may_be_calls(&stream.held);
        let calls = finish.filter(|_| !stream.plain).and_then(|_| self.tools.calls(&stream.held));
        let mut reason = finish.map(reason);
        let ready = stream.plain && !stream.held.is_empty();
        if let Some(calls) = calls {
            let delta = json!({"tool_calls": self.calls(index, &calls, true)});
            let logprobs = self.logprobs(index);
            chunks.push(self.chunk(index, &delta, &logprobs, None));
            reason = Some("tool_calls");
        } else if ready || finish.is_some() {
            let text = std::mem::take(&mut self.streams[index].held);
            let logprobs = self.logprobs(index);
            if !text.is_empty() || !logprobs.is_null() {
                chunks.push(self.chunk(index, &json!({"content": text}), &logprobs, None));
            }
        }
        if reason.is_some() {
            chunks.push(self.chunk(index, &json!({}), &Value::Null, reason));
        }
        chunks
    }

    fn done(&mut self, scores: &PromptScores) {
        self.usage.cached += scores.cached;
    }

    fn end(&mut self) -> Vec<Value> {
        if !self.include_usage {
            return Vec::new();
        }
        let mut last = self.head.object(CHUNK, &[]);
        last["usage"] = self.usage.object();
        vec![last]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(value: &Value) -> Fields {
        Fields::parse(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn messages_become_what_templates_expect() {
        let messages = json!([
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "3"},
        ]);
        let conversation = Conversation::take(&mut fields(&json!({"messages": messages}))).unwrap();
        assert_eq!(conversation.messages[0].text(), "ab");
        let call = &conversation.messages[1].fields()["tool_calls"][0];
        assert_eq!(call["function"]["arguments"], json!({"x": 1}));
        for (messages, part) in [
            (json!([]), "is empty"),
            (json!([{"content": "x"}]), "messages[0]"),
            (
                json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
                "image_url",
            ),
            (json!([{"role": "user", "content": 5}]), "`content` is a number"),
            (json!("hello"), "invalid type"),
        ] {
            let body = json!({"messages": messages});
            let problem = Conversation::take(&mut fields(&body)).err().unwrap().body().to_string();
            assert!(problem.contains(part), "{problem}");
        }
    }

    #[test]
    fn conflicting_token_limits_are_refused() {
        let of = |body: Value| max_tokens(&mut fields(&body));
        assert_eq!(of(json!({})).unwrap(), None);
        assert_eq!(of(json!({"max_tokens": 3})).unwrap(), Some(3));
        assert_eq!(of(json!({"max_tokens": 3, "max_completion_tokens": 3})).unwrap(), Some(3));
        assert!(of(json!({"max_tokens": 3, "max_completion_tokens": 4})).is_err());
        assert!(of(json!({"max_tokens": 0})).is_err());
        assert_eq!(
            top(&mut fields(&json!({"logprobs": true, "top_logprobs": 2}))).unwrap(),
            Some(2)
        );
        assert!(top(&mut fields(&json!({"top_logprobs": 2}))).is_err());
        assert!(top(&mut fields(&json!({"logprobs": true, "top_logprobs": 21}))).is_err());
    }
}
