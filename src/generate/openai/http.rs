//! One HTTP exchange: JSON reply, or a failure and whether to retry it.

use std::time::Duration;

use reqwest::header::{AUTHORIZATION, DATE, HeaderMap, HeaderValue, RETRY_AFTER, SERVER};
use reqwest::{Response, StatusCode};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::spec::{ApiKey, ServerSpec};
use crate::error::{Context, Error, Result, start_of};

/// Largest reply accepted, in bytes.
const MAX_BYTES: usize = 64 << 20;
/// Longest pause a server may request.
const LONGEST_PAUSE: Duration = Duration::from_mins(10);

/// Kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Too many requests (429, or 503 with `Retry-After`).
    Busy,
    /// Server error (5xx, 408).
    Server,
    /// Timeout.
    Silent,
    /// No connection, or a lost one.
    Unreachable,
    /// A reply that violates the protocol.
    Malformed,
    /// This prompt is refused (400, 413, 422); others may be accepted.
    Refused,
    /// All requests would be refused: wrong key, model or path.
    Denied,
}

impl Trouble {
    /// Whether a retry may succeed.
    pub(super) fn passes(self) -> bool {
        !matches!(self, Self::Refused | Self::Denied)
    }
}

/// A failed request.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) trouble: Trouble,
    /// Description, including the URL.
    pub(super) message: String,
    pub(super) hint: Option<String>,
    pub(super) retry_after: Option<Duration>,
}

impl Failure {
    pub(super) fn new(trouble: Trouble, message: impl Into<String>) -> Self {
        Self { trouble, message: message.into(), hint: None, retry_after: None }
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the number of attempts, if more than one.
    pub(super) fn tried(mut self, times: u64) -> Self {
        if times > 1 {
            self.message = format!("{} (tried {times} times)", self.message);
        }
        self
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let error = Self::run(failure.message);
        match failure.hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}

/// HTTP client with the settings of a [`ServerSpec`].
#[derive(Debug)]
pub(super) struct Http {
    client: reqwest::Client,
    key: Option<ApiKey>,
    key_env: String,
    timeout: f64,
}

/// A reply, and the server's name for itself.
#[derive(Debug)]
pub(super) struct Reply<T> {
    pub(super) body: T,
    pub(super) server: Option<String>,
}

impl Http {
    pub(super) fn new(spec: &ServerSpec) -> Result<Self> {
        let key = spec.api_key()?;
        let mut headers = HeaderMap::new();
        if let Some(key) = &key {
            // The original error would reveal the key.
            let mut value = HeaderValue::from_str(&key.header()).map_err(|_| {
                Error::usage(format!("`{}` holds what no HTTP header can", spec.api_key_env))
            })?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let client = reqwest::Client::builder()
            .default_headers(headers)
            .user_agent(concat!("arriero/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(Duration::from_secs_f64(spec.connect_timeout))
            .timeout(Duration::from_secs_f64(spec.timeout))
            // A redirected POST would arrive as a GET without its body.
            .redirect(reqwest::redirect::Policy::none())
            .pool_max_idle_per_host(spec.max_concurrency)
            .build()
            .map_err(|error| Error::run(format!("cannot speak HTTP: {error}")))
            .at("teacher")?;
        Ok(Self { client, key, key_env: spec.api_key_env.clone(), timeout: spec.timeout })
    }

    /// Sends a JSON body and reads a JSON reply.
    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        url: &str,
        body: Vec<u8>,
    ) -> Result<Reply<T>, Failure> {
        let request = self.client.post(url).header("content-type", "application/json").body(body);
        self.finish(url, request).await
    }

    /// Reads a JSON reply.
    pub(super) async fn get<T: DeserializeOwned>(&self, url: &str) -> Result<Reply<T>, Failure> {
        self.finish(url, self.client.get(url)).await
    }

    async fn finish<T: DeserializeOwned>(
        &self,
        url: &str,
        request: reqwest::RequestBuilder,
    ) -> Result<Reply<T>, Failure> {
        let mut response = request.send().await.map_err(|error| self.lost(url, &error))?;
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.lost(url, &error))? {
            if bytes.len() + chunk.len() > MAX_BYTES {
                let message = format!("{url}: an answer of more than {} MiB", MAX_BYTES >> 20);
                return Err(Failure::new(Trouble::Malformed, message));
            }
            bytes.extend_from_slice(&chunk);
        }
        if !response.status().is_success() {
            return Err(self.refused(url, &response, &bytes));
        }
        let server = response.headers().get(SERVER).and_then(|name| name.to_str().ok());
        let server = server.map(str::to_owned);
        match serde_json::from_slice(&bytes) {
            Ok(body) => Ok(Reply { body, server }),
            Err(error) => Err(self.unreadable(url, &bytes, &error)),
        }
    }

    /// A connection that failed, was lost or timed out.
    fn lost(&self, url: &str, error: &reqwest::Error) -> Failure {
        let mut cause: &dyn std::error::Error = error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        if error.is_connect() {
            return Failure::new(Trouble::Unreachable, format!("{url}: no connection: {cause}"))
                .hint("is the server running, and is this its address?");
        }
        if error.is_timeout() {
            let message = format!("{url}: no answer within {} s", self.timeout);
            return Failure::new(Trouble::Silent, message)
                .hint("raise `timeout`, or lower `max_concurrency` where requests queue up");
        }
        Failure::new(Trouble::Unreachable, format!("{url}: the connection was lost: {cause}"))
    }

    fn unreadable(&self, url: &str, bytes: &[u8], error: &serde_json::Error) -> Failure {
        // Some servers report errors with status 200.
        if let Some(message) = error_message(bytes) {
            return Failure::new(Trouble::Server, format!("{url}: {}", self.clean(&message)));
        }
        let message = if bytes.is_empty() {
            format!("{url}: an empty answer, expected JSON")
        } else if error.is_eof() {
            format!("{url}: JSON that ends after {} bytes", bytes.len())
        } else {
            let start = self.clean(&String::from_utf8_lossy(bytes));
            format!("{url}: expected JSON ({error}), the answer begins with `{start}`")
        };
        Failure::new(Trouble::Malformed, message)
            .hint("`base_url` must lead to the interface itself, usually ending in /v1")
    }

    fn refused(&self, url: &str, response: &Response, bytes: &[u8]) -> Failure {
        let status = response.status();
        let said =
            error_message(bytes).unwrap_or_else(|| String::from_utf8_lossy(bytes).into_owned());
        let said = self.clean(&said);
        let message = format!("{url}: {status}: {said}");
        let retry_after = retry_after(response.headers());
        let spent =
            said.contains("insufficient_quota") || said.contains("exceeded your current quota");
        let trouble = match status {
            StatusCode::TOO_MANY_REQUESTS if spent => Trouble::Denied,
            StatusCode::TOO_MANY_REQUESTS => Trouble::Busy,
            StatusCode::SERVICE_UNAVAILABLE if retry_after.is_some() => Trouble::Busy,
            StatusCode::NOT_IMPLEMENTED => Trouble::Denied,
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY => Trouble::Server,
            StatusCode::BAD_REQUEST
            | StatusCode::PAYLOAD_TOO_LARGE
            | StatusCode::UNPROCESSABLE_ENTITY => Trouble::Refused,
            status if status.is_server_error() => Trouble::Server,
            _ => Trouble::Denied,
        };
        let failure = Failure { retry_after, ..Failure::new(trouble, message) };
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => failure.hint(self.key_hint()),
            StatusCode::NOT_FOUND => {
                failure.hint("`base_url` usually ends in /v1; `model` must be one that is served")
            }
            _ => failure,
        }
    }

    fn key_hint(&self) -> String {
        let name = &self.key_env;
        match self.key {
            Some(_) => format!("the key in `{name}` is not accepted"),
            None => format!("export {name}=… or name another variable in `api_key_env`"),
        }
    }

    /// The start of a server's text, on one line and without the key.
    fn clean(&self, text: &str) -> String {
        start_of(&self.redacted(text), 200)
    }

    fn redacted(&self, text: &str) -> String {
        self.key.as_ref().map_or_else(|| text.to_owned(), |key| key.redact(text))
    }

    /// The failure with the key removed from its message, which is shortened.
    pub(super) fn without_key(&self, failure: Failure) -> Failure {
        Failure { message: start_of(&self.redacted(&failure.message), 300), ..failure }
    }
}

/// The message of `{"error": …}`, in its various forms.
fn error_message(bytes: &[u8]) -> Option<String> {
    let body: Value = serde_json::from_slice(bytes).ok()?;
    let error = body.get("error").or_else(|| body.get("detail")).unwrap_or(&body);
    match error {
        Value::String(text) => Some(text.clone()),
        Value::Null => None,
        error => {
            let message = error.get("message").and_then(Value::as_str)?;
            let code = error.get("code").and_then(Value::as_str);
            Some(code.map_or_else(|| message.to_owned(), |code| format!("{message} ({code})")))
        }
    }
}

/// The requested delay: seconds, or a date compared with the server's own clock.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let seconds = if let Ok(seconds) = text.parse::<f64>() {
        seconds
    } else {
        let now = headers.get(DATE).and_then(|date| date.to_str().ok()).and_then(seconds_of);
        (seconds_of(text)? - now.unwrap_or_else(now_here)) as f64
    };
    let pause = Duration::try_from_secs_f64(seconds.max(0.0)).ok()?;
    Some(pause.min(LONGEST_PAUSE))
}

fn seconds_of(date: &str) -> Option<i64> {
    chrono::DateTime::parse_from_rfc2822(date).ok().map(|date| date.timestamp())
}

#[expect(clippy::disallowed_methods, reason = "decides how long to wait, nothing that is written")]
fn now_here() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |passed| passed.as_secs() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_read_as_seconds_or_a_date() {
        let headers = |pairs: &[(&'static str, &str)]| {
            let mut map = HeaderMap::new();
            for (name, value) in pairs {
                map.insert(*name, HeaderValue::from_str(value).unwrap());
            }
            map
        };
        let wait =
            |pairs: &[(&'static str, &str)]| retry_after(&headers(pairs)).map(|d| d.as_secs_f64());
        assert_eq!(wait(&[]), None);
        assert_eq!(wait(&[("retry-after", "1.5")]), Some(1.5));
        assert_eq!(wait(&[("retry-after", "soon")]), None);
        assert_eq!(wait(&[("retry-after", "-3")]), Some(0.0));
        assert_eq!(wait(&[("retry-after", "99999999")]), Some(600.0));
        let date = [
            ("retry-after", "Wed, 21 Oct 2015 07:28:30 GMT"),
            ("date", "Wed, 21 Oct 2015 07:28:00 GMT"),
        ];
        assert_eq!(wait(&date), Some(30.0));
        assert_eq!(wait(&date[..1]), Some(0.0));
    }

    #[test]
    fn error_message_is_found_in_every_body_shape() {
        for (body, expected) in [
            (r#"{"error": {"message": "no", "code": "c"}}"#, Some("no (c)")),
            (r#"{"error": "no"}"#, Some("no")),
            (r#"{"object": "error", "message": "no"}"#, Some("no")),
            (r#"{"detail": "no"}"#, Some("no")),
            (r#"{"choices": []}"#, None),
            ("<html>", None),
        ] {
            assert_eq!(error_message(body.as_bytes()).as_deref(), expected, "{body}");
        }
    }
}
