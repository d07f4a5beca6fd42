//! A recipe's server settings, and which of them affect answers.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::generate::sampling::one_or_many;

/// Default environment variable of the API key.
const DEFAULT_KEY: &str = "OPENAI_API_KEY";

/// Server keys that affect answers. All others concern location, rate and timeouts, so finished work does not depend on
/// them.
const DECIDING: [&str; 5] = ["kind", "model", "logprobs", "samples_per_request", "extra_body"];

/// Protocol of the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interface {
    /// OpenAI's chat completions, as vLLM, SGLang, llama.cpp and many others serve them.
    #[default]
    Openai,
}

/// The table `teacher = { base_url = …, model = … }`, resolved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerSpec {
    /// `openai`.
    pub kind: Interface,
    /// Base URL of the API, usually ending in `/v1`; several URLs serve the same model and share the work.
    #[serde(alias = "endpoint", alias = "base_urls", deserialize_with = "urls")]
    pub base_url: Vec<String>,
    /// The server's name for the model.
    pub model: String,
    /// Environment variable with the API key. The key itself is never written anywhere.
    pub api_key_env: String,
    /// Most concurrent requests per host; URLs with the same name and port share the limits.
    pub max_concurrency: usize,
    /// Most requests per minute and host; 0 for no limit.
    pub requests_per_minute: f64,
    /// Most tokens per minute and host, prompts plus answers; 0 for no limit.
    pub tokens_per_minute: f64,
    /// Seconds after which an unanswered request is aborted and retried.
    pub timeout: f64,
    /// Seconds after which a connection attempt is aborted.
    pub connect_timeout: f64,
    /// Number of retries before the stage ends with an error.
    pub max_retries: u32,
    /// Upper bound of the first retry's delay, in seconds; doubled with each retry, up to a minute.
    pub retry_delay: f64,
    /// Most requests in the whole stage, including retries; 0 for no limit.
    pub max_requests: u64,
    /// Most tokens in the whole stage, prompts plus answers; 0 for no limit.
    pub max_tokens_total: u64,
    /// Answers per request; 0 requests all of a prompt's answers together.
    pub samples_per_request: usize,
    /// Request the log-probability of every token.
    pub logprobs: bool,
    /// Leave a prompt unanswered if the server refuses it (too long, for instance), instead of ending the stage.
    pub skip_refused: bool,
    /// Further keys for the request body, sent unchanged: `{chat_template_kwargs = {enable_thinking = false}}`.
    pub extra_body: Map<String, Value>,
}

impl Default for ServerSpec {
    fn default() -> Self {
        Self {
            kind: Interface::default(),
            base_url: Vec::new(),
            model: String::new(),
            api_key_env: DEFAULT_KEY.to_owned(),
            max_concurrency: 64,
            requests_per_minute: 0.0,
            tokens_per_minute: 0.0,
            timeout: 600.0,
            connect_timeout: 10.0,
            max_retries: 8,
            retry_delay: 0.5,
            max_requests: 0,
            max_tokens_total: 0,
            samples_per_request: 0,
            logprobs: false,
            skip_refused: false,
            extra_body: Map::new(),
        }
    }
}

impl ServerSpec {
    /// Rejects invalid settings. Sends no requests.
    ///
    /// # Errors
    /// Names the key, its value and the expected range.
    pub fn check(&self) -> Result<()> {
        if self.base_url.is_empty() {
            return Err(Error::usage("`base_url` is missing")
                .hint("for example \"http://localhost:8000/v1\"; several URLs are a list"));
        }
        for url in &self.base_url {
            // URLs end up in plans, logs and errors, so do not echo a name or password in them.
            let shown = if url.contains('@') { "…" } else { url };
            let parsed = reqwest::Url::parse(url)
                .map_err(|error| Error::usage(format!("`base_url` is `{shown}`: {error}")))?;
            if !["http", "https"].contains(&parsed.scheme()) {
                return Err(Error::usage(format!(
                    "`base_url` is `{shown}`, expected http or https"
                )));
            }
            if !parsed.username().is_empty() || parsed.password().is_some() {
                return Err(Error::usage("`base_url` holds a name or a password").hint(
                    "put the key into an environment variable and name it in `api_key_env`",
                ));
            }
            if parsed.query().is_some() {
                return Err(Error::usage("`base_url` has a query (`?…`)")
                    .hint("it is the part before `/chat/completions`"));
            }
        }
        if self.model.is_empty() {
            return Err(Error::usage("`model` is missing")
                .hint("the name that the server lists under /v1/models"));
        }
        for key in ["model", "messages", "n", "seed", "stream", "max_tokens", "response_format"] {
            if self.extra_body.contains_key(key) {
                return Err(Error::usage(format!("`extra_body` has `{key}`"))
                    .hint("the stage's own settings say it"));
            }
        }
        self.check_numbers()
    }

    fn check_numbers(&self) -> Result<()> {
        if self.max_concurrency == 0 {
            return Err(Error::usage("`max_concurrency` is 0, expected 1 or more"));
        }
        for (key, value, least) in [
            ("timeout", self.timeout, 1e-3),
            ("connect_timeout", self.connect_timeout, 1e-3),
            ("retry_delay", self.retry_delay, 0.0),
            ("requests_per_minute", self.requests_per_minute, 0.0),
            ("tokens_per_minute", self.tokens_per_minute, 0.0),
        ] {
            // A day is more than any of them needs, and does not overflow a clock.
            let most = if key.ends_with("minute") { f64::MAX } else { 86_400.0 };
            if !(least..=most).contains(&value) {
                return Err(Error::usage(format!("`{key}` is {value}, expected {least} or more"))
                    .hint("seconds are at most 86400"));
            }
        }
        Ok(())
    }

    /// Keeps only a table's keys that affect answers: those finished work depends on.
    pub fn deciding(table: &mut Map<String, Value>) {
        table.retain(|key, _| DECIDING.contains(&key.as_str()));
    }

    /// Reads the key from the environment.
    ///
    /// # Errors
    /// A variable named in the recipe is not set. The default one may be missing: most self-hosted servers need no key.
    pub fn api_key(&self) -> Result<Option<ApiKey>> {
        let name = &self.api_key_env;
        match std::env::var(name) {
            Ok(key) if !key.trim().is_empty() => Ok(Some(ApiKey(key.trim().to_owned()))),
            _ if name == DEFAULT_KEY || name.is_empty() => Ok(None),
            _ => Err(Error::usage(format!("the environment variable `{name}` is not set"))
                .at("`api_key_env`")
                .hint(format!("export {name}=… in the shell that starts arriero"))),
        }
    }
}

/// A server's API key; hidden from `Debug` output.
#[derive(Clone)]
pub struct ApiKey(String);

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

impl ApiKey {
    /// Value of the authorization header.
    pub(super) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// Removes the key from a server's text; some servers echo it when they refuse it.
    pub(super) fn redact(&self, text: &str) -> String {
        text.replace(&self.0, "…")
    }
}

/// Accepts a single URL in place of a list; strips a trailing slash and `/chat/completions`.
fn urls<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let urls = one_or_many(deserializer)?;
    let bare =
        |url: &String| url.trim_end_matches('/').trim_end_matches("/chat/completions").to_owned();
    Ok(urls.iter().map(bare).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(value: Value) -> Result<ServerSpec, String> {
        let spec: ServerSpec = serde_json::from_value(value).map_err(|error| error.to_string())?;
        spec.check().map_err(|error| error.to_string())?;
        Ok(spec)
    }

    #[test]
    fn server_table_needs_a_url_and_a_model_and_refuses_secrets() {
        let good = spec(json!({"base_url": "http://a:1/v1/chat/completions/", "model": "m"}));
        assert_eq!(good.unwrap().base_url, ["http://a:1/v1"]);
        for (value, part) in [
            (json!({"model": "m"}), "`base_url` is missing"),
            (json!({"base_url": "http://a/v1"}), "`model` is missing"),
            (json!({"base_url": "a/v1", "model": "m"}), "`base_url` is `a/v1`"),
            (json!({"base_url": "ftp://a/v1", "model": "m"}), "expected http"),
            (json!({"base_url": "http://a/v1", "model": "m", "timeout": 0}), "`timeout` is 0"),
            (json!({"base_url": "http://a/v1", "model": "m", "max_concurrency": 0}), "`max_conc"),
            (json!({"base_url": "http://a/v1", "modle": "m"}), "unknown field `modle`"),
            (json!({"base_url": "http://a", "model": "m", "extra_body": {"n": 2}}), "has `n`"),
        ] {
            let error = spec(value.clone()).unwrap_err();
            assert!(error.contains(part), "{value}: {error}");
        }
        let error = spec(json!({"base_url": "http://me:secret@a/v1", "model": "m"})).unwrap_err();
        assert!(error.contains("password") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn api_key_is_redacted_in_debug_output_and_messages() {
        let key = ApiKey("sk-123".to_owned());
        assert_eq!(format!("{key:?}"), "ApiKey(…)");
        assert_eq!(key.redact("no such key sk-123!"), "no such key …!");
        assert_eq!(key.header(), "Bearer sk-123");
    }

    #[test]
    fn speed_and_location_keys_do_not_decide_answers() {
        let mut table = json!({"kind": "openai", "base_url": ["u"], "model": "m", "timeout": 3});
        ServerSpec::deciding(table.as_object_mut().unwrap());
        assert_eq!(table, json!({"kind": "openai", "model": "m"}));
    }
}
