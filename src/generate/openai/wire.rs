//! Wire format: the body of a chat request, and its reply.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::http::{Failure, Trouble};
use super::spec::ServerSpec;
use crate::data::record::Message;
use crate::generate::engine::{Answer, Finish};
use crate::generate::sampling::Sampling;
use crate::generate::teacher::Asked;

/// The body of a chat request for `count` answers, without its seed. `schema` says whether the server supports JSON
/// schemas.
pub(super) fn body(
    spec: &ServerSpec,
    asked: &Asked,
    sampling: &Sampling,
    count: usize,
    schema: bool,
) -> Map<String, Value> {
    let mut body = Map::new();
    let mut set = |key: &str, value: Value| body.insert(key.to_owned(), value);
    set("model", json!(spec.model));
    set("messages", asked.messages.iter().map(message).collect());
    if let Some(tools) = &asked.tools {
        set("tools", tools.clone());
    }
    set("temperature", json!(sampling.temperature));
    set("max_tokens", json!(sampling.max_new_tokens));
    // Disabled options are omitted: not every server knows every key.
    if sampling.top_p < 1.0 {
        set("top_p", json!(sampling.top_p));
    }
    if sampling.top_k > 0 {
        set("top_k", json!(sampling.top_k));
    }
    if sampling.min_p > 0.0 {
        set("min_p", json!(sampling.min_p));
    }
    if (sampling.repetition_penalty - 1.0).abs() > 0.0 {
        set("repetition_penalty", json!(sampling.repetition_penalty));
        // llama.cpp's name for it.
        set("repeat_penalty", json!(sampling.repetition_penalty));
    }
    if !sampling.stop.is_empty() {
        set("stop", json!(sampling.stop));
    }
    if count > 1 {
        set("n", json!(count));
    }
    if spec.logprobs {
        set("logprobs", json!(true));
    }
    if let Some(schema) = asked.schema.as_ref().filter(|_| schema) {
        set("response_format", response_format(schema));
    }
    if !asked.template_kwargs.is_empty() {
        set("chat_template_kwargs", json!(asked.template_kwargs));
    }
    for (key, value) in &spec.extra_body {
        set(key, value.clone());
    }
    body
}

/// A message in the servers' format: without training-only fields, tool arguments as text.
fn message(message: &Message) -> Value {
    let mut fields = message.fields().clone();
    fields.retain(|key, _| !["training", "train", "weight"].contains(&key.as_str()));
    let calls = fields.get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in calls.into_iter().flatten() {
        if let Some(arguments @ Value::Object(_)) = call.pointer_mut("/function/arguments") {
            *arguments = Value::String(arguments.to_string());
        }
    }
    Value::Object(fields)
}

/// The request field for JSON that follows a schema.
pub(super) fn response_format(schema: &Value) -> Value {
    json!({
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": true, "schema": schema},
    })
}

/// The reply to a chat request.
#[derive(Debug, Deserialize)]
pub(super) struct ChatReply {
    #[serde(default)]
    pub(super) choices: Vec<Choice>,
    #[serde(default)]
    pub(super) usage: Option<Usage>,
    /// The answering model, as named by the server.
    #[serde(default)]
    pub(super) model: Option<String>,
    #[serde(default)]
    pub(super) system_fingerprint: Option<String>,
    #[serde(default)]
    pub(super) prompt_logprobs: Option<Value>,
    #[serde(default)]
    error: Option<Value>,
}

/// Tokens a request used.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(super) struct Usage {
    #[serde(default)]
    pub(super) prompt_tokens: u64,
    #[serde(default)]
    pub(super) completion_tokens: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct Choice {
    #[serde(default)]
    pub(super) index: usize,
    #[serde(default)]
    pub(super) message: Map<String, Value>,
    #[serde(default)]
    finish_reason: Option<String>,
    #[serde(default)]
    pub(super) logprobs: Option<Logprobs>,
}

/// Token log-probabilities of one choice.
#[derive(Debug, Deserialize)]
pub(super) struct Logprobs {
    #[serde(default)]
    pub(super) content: Option<Vec<TokenLogprob>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct TokenLogprob {
    /// The token id: llama.cpp's extension.
    #[serde(default)]
    id: Option<u32>,
    logprob: f64,
}

impl ChatReply {
    /// Text of the first choice.
    pub(super) fn text(&self) -> &str {
        let message = self.choices.first().map(|choice| &choice.message);
        message.and_then(|message| message.get("content")).and_then(Value::as_str).unwrap_or("")
    }

    /// Number of log-probability entries of the first choice.
    pub(super) fn logprob_count(&self) -> usize {
        self.choices.first().map_or(0, |choice| choice.entries().len())
    }

    /// Whether it gives a finish reason.
    pub(super) fn says_end(&self) -> bool {
        self.choices.iter().any(|choice| choice.finish_reason.is_some())
    }

    /// Rejects an error or an empty reply: some servers send either with status 200.
    pub(super) fn check(&self, url: &str) -> Result<(), Failure> {
        if let Some(error) = self.error.as_ref().filter(|error| !error.is_null()) {
            // Shortened after the key has been redacted.
            return Err(Failure::new(Trouble::Server, format!("{url}: {error}")));
        }
        if self.choices.is_empty() {
            let message = format!("{url}: an answer without choices");
            return Err(Failure::new(Trouble::Malformed, message));
        }
        Ok(())
    }

    /// The answers; there must be `count`, with everything that was requested. `url` names the server in errors;
    /// `says_end` means that the server is known to send finish reasons.
    pub(super) fn answers(
        self,
        url: &str,
        count: usize,
        logprobs: bool,
        says_end: bool,
    ) -> Result<Vec<Answer>, Failure> {
        self.check(url)?;
        let mut choices = self.choices;
        if choices.len() < count {
            let found = choices.len();
            let message = format!("{url}: {found} choices, asked for {count}");
            return Err(Failure {
                hint: Some("set `samples_per_request = 1`".to_owned()),
                ..Failure::new(Trouble::Malformed, message)
            });
        }
        let total = self.usage.map_or(0, |usage| usage.completion_tokens as usize);
        if logprobs {
            check_logprobs(&choices, total)
                .map_err(|message| Failure::new(Trouble::Malformed, format!("{url}: {message}")))?;
        }
        choices.sort_by_key(|choice| choice.index);
        choices.truncate(count);
        let share = |at: usize| total / count + usize::from(at < total % count);
        let each = choices.into_iter().enumerate();
        each.map(|(at, choice)| choice.answer(url, share(at), says_end)).collect()
    }
}

impl Choice {
    fn entries(&self) -> &[TokenLogprob] {
        self.logprobs.as_ref().and_then(|logprobs| logprobs.content.as_deref()).unwrap_or_default()
    }

    fn text(&self) -> &str {
        self.message.get("content").and_then(Value::as_str).unwrap_or("")
    }

    fn ended_by(&self, reason: &str) -> bool {
        self.finish_reason.as_deref() == Some(reason)
    }

    /// `share` is its token count if all choices are equally long.
    fn answer(self, url: &str, share: usize, says_end: bool) -> Result<Answer, Failure> {
        let finish = match self.finish_reason.as_deref() {
            // It may have been cut off anywhere, and a student would learn to stop there.
            None if says_end => {
                let message = format!("{url}: an answer without `finish_reason`, which others had");
                return Err(Failure::new(Trouble::Malformed, message));
            }
            None | Some("stop" | "eos" | "tool_calls" | "function_call") => Finish::Stop,
            Some("length") => Finish::Length,
            Some("content_filter") => Finish::Filtered,
            // vLLM reports `abort` for a request it dropped.
            Some(other) => {
                let message = format!("{url}: an answer that ended with `{other}`");
                return Err(Failure::new(Trouble::Malformed, message));
            }
        };
        let text = self.text().to_owned();
        let entries = self.logprobs.and_then(|logprobs| logprobs.content).unwrap_or_default();
        let fields = further_fields(self.message);
        // Tokens without text mean that the server removed text, reasoning for instance: not a complete answer.
        let withheld = text.is_empty() && fields.is_empty() && share > 2;
        let finish = if withheld && finish == Finish::Stop { Finish::Filtered } else { finish };
        let ids: Option<Vec<u32>> = entries.iter().map(|entry| entry.id).collect();
        let tokens = if entries.is_empty() { share } else { entries.len() };
        Ok(Answer {
            top_logprobs: Vec::new(),
            text,
            ids: ids.unwrap_or_default(),
            logprobs: entries.iter().map(|entry| entry.logprob as f32).collect(),
            sample_logprobs: Vec::new(),
            tokens,
            finish,
            fields,
        })
    }
}

/// Rejects log-probabilities fewer than the tokens; the server only reports the total over all answers of a request.
/// End-of-turn tokens and withheld answers may lack one.
fn check_logprobs(choices: &[Choice], total: usize) -> Result<(), String> {
    let found: usize = choices.iter().map(|one| one.entries().len()).sum();
    let unlisted = choices.iter().filter(|one| !one.ended_by("length")).count();
    let needed = total.saturating_sub(unlisted);
    let told: Vec<&Choice> = choices.iter().filter(|one| !one.ended_by("content_filter")).collect();
    if found < needed && told.len() == choices.len() {
        let answers = choices.len();
        return Err(format!("{found} log-probabilities for {needed} tokens of {answers} answers"));
    }
    if told.iter().any(|one| one.entries().is_empty() && !one.text().is_empty()) {
        return Err("no log-probabilities for an answer with text".to_owned());
    }
    let mut all = told.iter().flat_map(|one| one.entries());
    match all.find(|entry| !entry.logprob.is_finite() || entry.logprob > 1e-3) {
        Some(entry) => Err(format!("a log-probability of {}", entry.logprob)),
        None => Ok(()),
    }
}

/// A message's fields besides its text: tool calls, with arguments parsed into objects as chat templates expect, and
/// reasoning that the server split off.
fn further_fields(message: Map<String, Value>) -> Map<String, Value> {
    let mut fields = Map::new();
    for (key, mut value) in message {
        let empty = match &value {
            Value::Null => true,
            Value::String(text) => text.is_empty(),
            Value::Array(list) => list.is_empty(),
            _ => false,
        };
        let name = match key.as_str() {
            "tool_calls" => "tool_calls",
            "reasoning_content" | "reasoning" => "reasoning_content",
            _ => continue,
        };
        if empty {
            continue;
        }
        for call in value.as_array_mut().into_iter().flatten() {
            let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
            if let Some(Ok(object @ Value::Object(_))) =
                arguments.as_str().map(serde_json::from_str::<Value>)
            {
                *arguments = object;
            }
        }
        fields.insert(name.to_owned(), value);
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(value: Value) -> ChatReply {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn disabled_settings_are_not_sent() {
        let spec = ServerSpec { model: "m".to_owned(), ..ServerSpec::default() };
        let asked = Asked { messages: vec![Message::new("user", "hi")], ..Asked::default() };
        let plain = body(&spec, &asked, &Sampling::default(), 1, true);
        assert_eq!(
            Value::Object(plain),
            json!({"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 1.0, "max_tokens": 256})
        );
        let sampling = Sampling { top_k: 5, min_p: 0.1, top_p: 0.9, ..Sampling::default() };
        let spec = ServerSpec { logprobs: true, ..spec };
        let full = body(&spec, &asked, &sampling, 3, true);
        for key in ["top_k", "min_p", "top_p", "n", "logprobs"] {
            assert!(full.contains_key(key), "{key}");
        }
    }

    #[test]
    fn request_has_tools_text_arguments_template_kwargs_and_extra_body() {
        let mut call = Message::new("assistant", "");
        let calls = json!([{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}]);
        call.fields_mut().insert("tool_calls".to_owned(), calls);
        // Training-only field.
        call.fields_mut().insert("weight".to_owned(), json!(0.5));
        let tools = json!([{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]);
        let asked = Asked {
            messages: vec![Message::new("user", "1 + [2]?"), call],
            tools: Some(tools.clone()),
            template_kwargs: json!({"enable_thinking": false}).as_object().unwrap().clone(),
            schema: Some(json!({"type": "object"})),
            ..Asked::default()
        };
        let extra_body = json!({"priority": 3}).as_object().unwrap().clone();
        let spec = ServerSpec { model: "m".to_owned(), extra_body, ..ServerSpec::default() };
        let sampling = Sampling {
            repetition_penalty: 1.5,
            stop: vec!["END".to_owned()],
            temperature: 0.0,
            max_new_tokens: 9,
            ..Sampling::default()
        };
        let mut expected = json!({
            "model": "m",
            "messages": [
                {"role": "user", "content": "1 + [2]?"},
                {"role": "assistant", "content": "", "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{\"a\":1,\"b\":[2]}"}},
                ]},
            ],
            "tools": tools,
            "temperature": 0.0,
            "max_tokens": 9,
            "repetition_penalty": 1.5,
            "repeat_penalty": 1.5,
            "stop": ["END"],
            "n": 2,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": true, "schema": {"type": "object"}},
            },
            "chat_template_kwargs": {"enable_thinking": false},
            "priority": 3,
        });
        let written = |schema: bool, spec: &ServerSpec| {
            Value::Object(body(spec, &asked, &sampling, 2, schema))
        };
        assert_eq!(written(true, &spec), expected);
        // Without schema support none is sent; the recipe's own keys take precedence.
        expected.as_object_mut().unwrap().remove("response_format");
        expected["chat_template_kwargs"] = json!({"enable_thinking": true});
        let extra_body = json!({"priority": 3, "chat_template_kwargs": {"enable_thinking": true}});
        let extra_body = extra_body.as_object().unwrap().clone();
        assert_eq!(written(false, &ServerSpec { extra_body, ..spec }), expected);
    }

    #[test]
    fn missing_finish_reason_is_refused_when_other_answers_have_one() {
        let read = |reasons: [Option<&str>; 2], says_end: bool| {
            let choices =
                reasons.map(|reason| json!({"message": {"content": "x"}, "finish_reason": reason}));
            let reply = reply(json!({"choices": choices}));
            (reply.says_end(), reply.answers("http://u", 2, false, says_end))
        };
        let (says, refused) = read([Some("stop"), None], true);
        assert!(says);
        let refused = refused.unwrap_err();
        assert_eq!(
            (refused.trouble, refused.message.as_str()),
            (Trouble::Malformed, "http://u: an answer without `finish_reason`, which others had")
        );
        let (says, whole) = read([None, None], false);
        assert!(!says && whole.unwrap().iter().all(|answer| answer.finish == Finish::Stop));
    }

    #[test]
    fn answers_keep_only_what_the_server_returned() {
        let answers = reply(json!({
            "choices": [
                {"index": 1, "message": {"role": "assistant", "content": "b"}, "finish_reason": "length"},
                {"index": 0, "message": {"content": null, "tool_calls": [{"function": {"name": "f", "arguments": "{\"x\": 1}"}}]}, "finish_reason": "tool_calls"},
            ],
            "usage": {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10},
        }))
        .answers("u", 2, false, true)
        .unwrap();
        assert_eq!((answers[0].tokens, answers[1].tokens), (4, 3));
        assert_eq!((answers[1].text.as_str(), answers[1].finish), ("b", Finish::Length));
        assert_eq!(answers[0].fields["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
        assert!(answers[0].ids.is_empty() && answers[0].logprobs.is_empty());
    }

    #[test]
    fn silently_omitted_parts_of_a_reply_are_refused() {
        let choice = |entries: usize, reason: &str| {
            let content: Vec<Value> =
                (0..entries).map(|id| json!({"id": id, "logprob": -0.5})).collect();
            json!({"message": {"content": "hey"}, "finish_reason": reason, "logprobs": {"content": content}})
        };
        let with = |choices: Value, tokens: u64| {
            reply(json!({"choices": choices, "usage": {"completion_tokens": tokens}}))
        };
        let refused = |reply: ChatReply, count: usize| {
            reply.answers("http://u", count, true, true).unwrap_err().message
        };
        assert_eq!(
            refused(with(json!([choice(2, "length")]), 3), 1),
            "http://u: 2 log-probabilities for 3 tokens of 1 answers"
        );
        assert_eq!(
            refused(with(json!([choice(3, "stop")]), 3), 2),
            "http://u: 1 choices, asked for 2"
        );
        assert_eq!(refused(with(json!([]), 3), 1), "http://u: an answer without choices");
        assert_eq!(
            refused(with(json!([choice(3, "abort")]), 3), 1),
            "http://u: an answer that ended with `abort`"
        );
        // Only the sum over several answers is known.
        assert_eq!(
            refused(with(json!([choice(2, "stop"), choice(1, "length")]), 6), 2),
            "http://u: 3 log-probabilities for 5 tokens of 2 answers"
        );
        let both = with(json!([choice(2, "stop"), choice(3, "length")]), 6);
        assert_eq!(both.answers("u", 2, true, true).unwrap().len(), 2);
        let whole = with(json!([choice(2, "stop")]), 3).answers("u", 1, true, true).unwrap();
        assert_eq!((whole[0].ids.as_slice(), whole[0].tokens), (&[0, 1][..], 2));
        // Not every server reports token counts.
        let uncounted = |entries: usize| reply(json!({"choices": [choice(entries, "stop")]}));
        assert_eq!(uncounted(2).answers("u", 1, true, true).unwrap()[0].tokens, 2);
        assert_eq!(
            refused(uncounted(0), 1),
            "http://u: no log-probabilities for an answer with text"
        );
        assert_eq!(uncounted(0).answers("u", 1, false, true).unwrap()[0].text, "hey");
        // A filtered answer has none.
        let filtered = with(json!([choice(0, "content_filter"), choice(2, "length")]), 9);
        assert_eq!(filtered.answers("u", 2, true, true).unwrap()[0].finish, Finish::Filtered);
    }
}
