//! A server as a recipe names it, and which of its keys decide answers.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::generate::sampling::one_or_many;

/// Where the key is looked for unless the recipe says otherwise.
const DEFAULT_KEY: &str = "OPENAI_API_KEY";

/// Keys of a server's table that decide what it answers. All others say where it is, how fast it is asked and when
/// to give up: finished work does not depend on them.
const DECIDING: [&str; 5] = ["kind", "model", "logprobs", "samples_per_request", "extra_body"];

/// How a server is spoken to.
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
    /// Where the interface begins, usually ending in `/v1`; several serve the same model and share the work.
    #[serde(alias = "endpoint", alias = "base_urls", deserialize_with = "urls")]
    pub base_url: Vec<String>,
    /// The model's name at the server.
    pub model: String,
    /// Environment variable that holds the key. The key itself is never written anywhere.
    pub api_key_env: String,
    /// Most requests under way at once at each host: URLs with the same name and port share its limits.
    pub max_concurrency: usize,
    /// Most requests a minute at each host; 0 sets no limit.
    pub requests_per_minute: f64,
    /// Most tokens a minute at each host, prompts and answers together; 0 sets no limit.
    pub tokens_per_minute: f64,
    /// Seconds after which a request without an answer is given up and tried again.
    pub timeout: f64,
    /// Seconds after which a connection that does not come about is given up.
    pub connect_timeout: f64,
    /// How often a request is tried again before the stage ends with an error.
    pub max_retries: u32,
    /// Seconds before the first repetition, at most; doubled with each further one, up to a minute.
    pub retry_delay: f64,
    /// Most requests of the whole stage, repetitions included; 0 sets no limit.
    pub max_requests: u64,
    /// Most tokens of the whole stage, prompts and answers together; 0 sets no limit.
    pub max_tokens_total: u64,
    /// Answers asked for in one request; 0 asks for all of a prompt together.
    pub samples_per_request: usize,
    /// Ask for the log-probability of every token.
    pub logprobs: bool,
    /// A prompt that the server refuses (too long, for instance) goes unanswered instead of ending the stage.
    pub skip_refused: bool,
    /// Further keys of the request's body, sent as they are: `{chat_template_kwargs = {enable_thinking = false}}`.
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
    /// Refuses settings that cannot be acted on. Speaks to nobody.
    ///
    /// # Errors
    /// Names the key, its value and what was expected.
    pub fn check(&self) -> Result<()> {
        if self.base_url.is_empty() {
            return Err(Error::usage("`base_url` is missing")
                .hint("for example \"http://localhost:8000/v1\"; several URLs are a list"));
        }
        for url in &self.base_url {
            // What stands in a URL ends up in plans, logs and errors: a name or password is not repeated here either.
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
            // A day is more than any of them needs, and less than overflows a clock.
            let most = if key.ends_with("minute") { f64::MAX } else { 86_400.0 };
            if !(least..=most).contains(&value) {
                return Err(Error::usage(format!("`{key}` is {value}, expected {least} or more"))
                    .hint("seconds are at most 86400"));
            }
        }
        Ok(())
    }

    /// Leaves of a table as written what decides answers: what finished work depends on.
    pub fn deciding(table: &mut Map<String, Value>) {
        table.retain(|key, _| DECIDING.contains(&key.as_str()));
    }

    /// Reads the key from the environment.
    ///
    /// # Errors
    /// A variable that the recipe names is not set. The usual one need not be: most servers of one's own ask for no key.
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

/// A server's key. Shows itself to nobody but the server.
#[derive(Clone)]
pub struct ApiKey(String);

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

impl ApiKey {
    /// The header that carries it.
    pub(super) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// A text of the server without the key, which some repeat when they refuse it.
    pub(super) fn redact(&self, text: &str) -> String {
        text.replace(&self.0, "…")
    }
}

/// Accepts one URL where a list is meant, and takes off what does not belong to it.
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
    fn a_table_needs_a_url_and_a_model_and_no_secret_in_it() {
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
    fn a_key_shows_itself_to_nobody() {
        let key = ApiKey("sk-123".to_owned());
        assert_eq!(format!("{key:?}"), "ApiKey(…)");
        assert_eq!(key.redact("no such key sk-123!"), "no such key …!");
        assert_eq!(key.header(), "Bearer sk-123");
    }

    #[test]
    fn speed_and_place_decide_no_answers() {
        let mut table = json!({"kind": "openai", "base_url": ["u"], "model": "m", "timeout": 3});
        ServerSpec::deciding(table.as_object_mut().unwrap());
        assert_eq!(table, json!({"kind": "openai", "model": "m"}));
    }
}
