//! Probes a server's abilities with a few short requests: servers silently ignore unknown keys, which must surface
//! before a long run, not after it.

use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::http::{Failure, Http, Trouble};
use super::ledger::Seen;
use super::spec::ServerSpec;
use super::wire::{self, ChatReply};
use crate::data::record::Message;
use crate::error::{did_you_mean, start_of};
use crate::generate::sampling::Sampling;
use crate::generate::teacher::Asked;

/// Abilities a run needs to know about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a question of its own")]
pub struct Needs {
    /// Several answers per request.
    pub n: bool,
    /// Token log-probabilities; the run cannot proceed without them.
    pub logprobs: bool,
    /// Answers constrained to a JSON schema.
    pub json_schema: bool,
    /// Equal answers for equal seeds.
    pub seed: bool,
    /// Everything else, for a report.
    pub all: bool,
}

impl Needs {
    /// The needs not already covered by earlier observations.
    pub(super) fn beyond(self, seen: &Seen) -> Self {
        Self {
            n: self.n && seen.n.is_none(),
            json_schema: self.json_schema && seen.json_schema.is_none(),
            seed: self.seed && seen.seed.is_none(),
            ..self
        }
    }
}

/// A server's self-description and observed abilities. `None`: not tried.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// The models it lists; may be empty.
    pub models: Vec<String>,
    /// Server software: `vllm`, `sglang`, `llamacpp`.
    pub server: Option<String>,
    /// Server version.
    pub version: Option<String>,
    /// `system_fingerprint` of its first answer.
    pub fingerprint: Option<String>,
    /// The model that its first answer names, which may be an alias's full name.
    #[serde(default)]
    pub answers_as: Option<String>,
    /// Reports why an answer ended (`finish_reason`).
    pub finish_reason: Option<bool>,
    /// Returns `n` choices to a request with `n`.
    pub n: Option<bool>,
    /// Returns a log-probability for every token of an answer.
    pub logprobs: Option<bool>,
    /// Repeats an answer for an equal seed.
    pub seed: Option<bool>,
    /// Returns prompt log-probabilities with `echo` (completions).
    pub echo: Option<bool>,
    /// Returns prompt log-probabilities with `prompt_logprobs` (vLLM).
    pub prompt_logprobs: Option<bool>,
    /// Constrains an answer to a JSON schema.
    pub json_schema: Option<bool>,
}

impl Probe {
    /// Missing abilities the run must do without, in words.
    pub(super) fn lacks(&self) -> impl Iterator<Item = &'static str> {
        let all = [
            (
                self.n,
                "gives one answer to a request, whatever `n` says: each sample is a request of its own, prompt included",
            ),
            (self.seed, "does not repeat an answer for an equal seed"),
            (
                self.json_schema,
                "does not hold answers to a JSON schema: they are read as they come",
            ),
            (
                self.finish_reason,
                "does not say how its answers end (`finish_reason`): those that were cut off count as whole",
            ),
        ];
        all.into_iter().filter_map(|(found, text)| (found == Some(false)).then_some(text))
    }
}

#[derive(Deserialize)]
struct Models {
    #[serde(default)]
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
    #[serde(default)]
    owned_by: Option<String>,
}

/// Probes the needed abilities of the server at `url`. `is_last`: there will be no retry.
///
/// # Errors
/// A transient or permanent failure.
pub(super) async fn probe(
    http: &Http,
    url: &str,
    spec: &ServerSpec,
    needs: Needs,
    is_last: bool,
) -> Result<Probe, Failure> {
    let mut found = Probe::default();
    models(http, url, spec, &mut found).await?;
    let visitor = Visitor { http, url, spec, is_last, says_end: AtomicBool::new(false) };
    let first = visitor.chat(&[("max_tokens", json!(1))]).await?;
    found.fingerprint.clone_from(&first.body.system_fingerprint);
    found.answers_as = first.body.model.clone().filter(|model| !model.is_empty());
    first.body.answers(url, 1, false, false).map_err(|failure| http.without_key(failure))?;
    found.server = found.server.or(first.server);
    found.version = visitor.version().await;
    if needs.n || needs.all {
        found.n = Some(visitor.n().await?);
    }
    if needs.logprobs || needs.all {
        let logprobs = visitor.logprobs().await?;
        found.logprobs = Some(logprobs.is_ok());
        if let (true, Err(message)) = (needs.logprobs, logprobs) {
            return Err(Failure {
                hint: Some("leave `logprobs` out, or use a server that gives them".to_owned()),
                ..Failure::new(Trouble::Denied, message)
            });
        }
    }
    if needs.json_schema || needs.all {
        found.json_schema = Some(visitor.json_schema().await?);
    }
    if needs.seed || needs.all {
        found.seed = Some(visitor.seed().await?);
    }
    if needs.all {
        found.echo = Some(visitor.echo().await?);
        found.prompt_logprobs = Some(visitor.prompt_logprobs().await?);
    }
    found.finish_reason = Some(visitor.says_end.into_inner());
    Ok(found)
}

/// Looks the model up among those the server lists. Not every server lists any.
pub(super) async fn models(
    http: &Http,
    url: &str,
    spec: &ServerSpec,
    found: &mut Probe,
) -> Result<(), Failure> {
    let list = match http.get::<Models>(&format!("{url}/models")).await {
        Ok(reply) => reply.body.data,
        // Not supported; a wrong address will fail in the next request.
        Err(failure)
            if failure.message.contains(": 404 ") || failure.message.contains(": 405 ") =>
        {
            return Ok(());
        }
        Err(failure) => return Err(failure),
    };
    let served = list.iter().find(|model| model.id == spec.model);
    if served.is_none() && !list.is_empty() {
        let names: Vec<&str> = list.iter().map(|model| model.id.as_str()).collect();
        let shown = names.iter().take(20).copied().collect::<Vec<_>>().join(", ");
        let message = format!("{url}: serves no model `{}`; it has {shown}", spec.model);
        let near = did_you_mean(&spec.model, names.iter().copied());
        return Err(Failure {
            hint: near.map(|near| format!("did you mean `{near}`?")),
            ..Failure::new(Trouble::Denied, message)
        });
    }
    found.server = served.and_then(|model| model.owned_by.clone());
    found.models = list.into_iter().map(|model| model.id).collect();
    Ok(())
}

/// A server's failure at a particular ability, with a hint how to avoid needing it.
fn way_out(failure: Failure, hint: &str) -> Failure {
    match failure.trouble {
        Trouble::Server => Failure { hint: Some(hint.to_owned()), ..failure },
        _ => failure,
    }
}

/// Sends small requests to one server.
struct Visitor<'a> {
    http: &'a Http,
    url: &'a str,
    spec: &'a ServerSpec,
    is_last: bool,
    /// An answer had a finish reason.
    says_end: AtomicBool,
}

/// Whether a server says that it does not support what was requested. Other failures (key, quota) say nothing about its
/// abilities.
fn is_unknown(failure: &Failure) -> bool {
    let says = |status: &&str| failure.message.contains(*status);
    match failure.trouble {
        Trouble::Refused => true,
        Trouble::Denied => [": 404 ", ": 405 ", ": 501 "].iter().any(says),
        _ => false,
    }
}

impl Visitor<'_> {
    fn body(&self, changes: &[(&str, Value)]) -> Map<String, Value> {
        let asked = Asked {
            messages: vec![Message::new("user", "Write a few random words.")],
            ..Asked::default()
        };
        let sampling = Sampling { max_new_tokens: 4, ..Sampling::default() };
        let spec = ServerSpec { logprobs: false, ..self.spec.clone() };
        let mut body = wire::body(&spec, &asked, &sampling, 1, true);
        for (key, value) in changes {
            body.insert((*key).to_owned(), value.clone());
        }
        body
    }

    async fn chat(
        &self,
        changes: &[(&str, Value)],
    ) -> Result<super::http::Reply<ChatReply>, Failure> {
        let body = Value::Object(self.body(changes)).to_string().into_bytes();
        let url = format!("{}/chat/completions", self.url);
        let reply = self.http.post::<ChatReply>(&url, body).await?;
        reply.body.check(self.url).map_err(|failure| self.http.without_key(failure))?;
        self.says_end.fetch_or(reply.body.says_end(), Ordering::Relaxed);
        Ok(reply)
    }

    /// The reply, or `None` if the server says that it does not support the changes. Transient failures must be
    /// retried: taken as an answer they would decide the whole run, and differently for a resumed one.
    async fn tried(&self, changes: &[(&str, Value)]) -> Result<Option<ChatReply>, Failure> {
        match self.chat(changes).await {
            Ok(reply) => Ok(Some(reply.body)),
            Err(failure) if is_unknown(&failure) => Ok(None),
            Err(failure) => {
                let asked = changes.first().map_or("nothing more", |(key, _)| key);
                let message = format!("{} (asked for `{asked}`)", failure.message);
                Err(Failure { message, ..failure })
            }
        }
    }

    async fn n(&self) -> Result<bool, Failure> {
        let reply = self.tried(&[("n", json!(2))]).await.map_err(|failure| {
            way_out(failure, "set `samples_per_request = 1` to ask for each answer alone")
        })?;
        Ok(reply.is_some_and(|reply| reply.choices.len() == 2))
    }

    /// `Err` names what is missing.
    async fn logprobs(&self) -> Result<Result<(), String>, Failure> {
        let url = self.url;
        let reply = self.tried(&[("logprobs", json!(true))]).await.map_err(|failure| {
            way_out(failure, "leave `logprobs` out, or use a server that gives them")
        })?;
        let Some(reply) = reply else {
            return Ok(Err(format!("{url}: refuses `logprobs`")));
        };
        let entries = reply.logprob_count();
        let tokens = reply.usage.map_or(1, |usage| usage.completion_tokens as usize);
        // The end-of-turn token may lack one.
        if entries == 0 || entries + 1 < tokens {
            return Ok(Err(format!("{url}: {entries} log-probabilities for {tokens} tokens")));
        }
        Ok(Ok(()))
    }

    async fn seed(&self) -> Result<bool, Failure> {
        let changes = [("seed", json!(7)), ("temperature", json!(1.5)), ("max_tokens", json!(8))];
        let first = self.tried(&changes).await?;
        let second = self.tried(&changes).await?;
        Ok(match (first, second) {
            (Some(first), Some(second)) => {
                !first.text().is_empty() && first.text() == second.text()
            }
            _ => false,
        })
    }

    async fn json_schema(&self) -> Result<bool, Failure> {
        let schema = json!({
            "type": "object",
            "properties": {"good": {"type": "boolean"}},
            "required": ["good"],
            "additionalProperties": false,
        });
        let format = wire::response_format(&schema);
        let changes = [("response_format", format), ("max_tokens", json!(64))];
        let reply = match self.tried(&changes).await {
            // Some servers return 500 for unknown keys. If only this request keeps failing, count it as unsupported: no
            // setting would work around it, and failures cost nothing.
            Err(failure) if self.is_last && failure.trouble == Trouble::Server => {
                self.chat(&[("max_tokens", json!(1))]).await?;
                None
            }
            tried => tried?,
        };
        let Some(reply) = reply else { return Ok(false) };
        let said: Result<Value, _> = serde_json::from_str(reply.text().trim());
        Ok(said.is_ok_and(|said| said.get("good").is_some_and(Value::is_boolean)))
    }

    async fn prompt_logprobs(&self) -> Result<bool, Failure> {
        let reply = self.tried(&[("prompt_logprobs", json!(1))]).await?;
        let entries = reply.and_then(|reply| reply.prompt_logprobs);
        Ok(entries.is_some_and(|entries| entries.as_array().is_some_and(|list| !list.is_empty())))
    }

    /// Whether completions return more log-probabilities than sampled tokens: those of the prompt.
    async fn echo(&self) -> Result<bool, Failure> {
        let body = json!({
            "model": self.spec.model, "prompt": "one two three four", "max_tokens": 1,
            "echo": true, "logprobs": 1,
        });
        let url = format!("{}/completions", self.url);
        let reply = match self.http.post::<Value>(&url, body.to_string().into_bytes()).await {
            Ok(reply) => reply,
            // Not every server has this endpoint.
            Err(failure) if !failure.trouble.passes() || failure.trouble == Trouble::Malformed => {
                return Ok(false);
            }
            Err(failure) => return Err(failure),
        };
        let logprobs = &reply.body["choices"][0]["logprobs"];
        let entries = ["token_logprobs", "content"].iter().find_map(|key| logprobs[key].as_array());
        Ok(entries.is_some_and(|entries| entries.len() > 2))
    }

    /// vLLM reports its version under /version, llama.cpp under /props.
    async fn version(&self) -> Option<String> {
        let root = self.url.strip_suffix("/v1").unwrap_or(self.url);
        for (path, key) in [("version", "version"), ("props", "build_info")] {
            if let Ok(reply) = self.http.get::<Value>(&format!("{root}/{path}")).await
                && let Some(version) = reply.body.get(key).and_then(Value::as_str)
            {
                return Some(start_of(version, 80));
            }
        }
        None
    }
}
