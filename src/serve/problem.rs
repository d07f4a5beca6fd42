//! Error responses: an HTTP status and OpenAI's error object.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::error::{Error, Kind, did_you_mean};

/// A refusal or failure reported to the client.
#[derive(Debug)]
pub(super) struct Problem {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
}

impl Problem {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, code: None }
    }

    /// An unsupported request.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// Sets the status.
    pub(super) fn status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }

    /// Sets the offending field.
    pub(super) fn on(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Sets the machine-readable code.
    pub(super) fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// Unknown model.
    pub(super) fn no_model(name: &str, known: &[String]) -> Self {
        let message = format!("no model `{name}`; {}", nearest(name, known));
        Self::invalid(message).status(StatusCode::NOT_FOUND).on("model").code("model_not_found")
    }

    /// Unknown route.
    pub(super) fn no_route(method: &str, path: &str, known: &[String]) -> Self {
        Self::invalid(format!("no {method} {path}; {}", nearest(path, known)))
            .status(StatusCode::NOT_FOUND)
    }

    /// A missing or wrong key.
    pub(super) fn unauthorized() -> Self {
        Self::invalid("no valid API key; send the header `Authorization: Bearer KEY`")
            .status(StatusCode::UNAUTHORIZED)
            .code("invalid_api_key")
    }

    /// All slots are taken.
    pub(super) fn busy(most: usize) -> Self {
        let message =
            format!("{most} requests are under way or wait, which is the most; try again");
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message).code("queue_full")
    }

    /// The server is stopping or has stopped.
    pub(super) fn stopping() -> Self {
        let message = "the server is stopping";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", message).code("stopping")
    }

    /// The message.
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// OpenAI's error object.
    pub(super) fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

/// "did you mean" for a name, or the list of all names.
pub(super) fn nearest<S: AsRef<str>>(name: &str, known: &[S]) -> String {
    if let Some(near) = did_you_mean(name, known.iter().map(AsRef::as_ref)) {
        return format!("did you mean `{near}`?");
    }
    let all: Vec<&str> = known.iter().map(AsRef::as_ref).collect();
    format!("there is: {}", all.join(", "))
}

/// Usage errors are the client's, all others the server's.
impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let message = match error.hint_text() {
            Some(hint) => format!("{error}; {hint}"),
            None => error.to_string(),
        };
        match error.kind() {
            Kind::Usage => {
                // Such messages begin with the offending field, if there is one.
                let param = message.strip_prefix('`').and_then(|rest| rest.split_once('`'));
                let param = param.map(|(name, _)| name.to_owned());
                Self { param, ..Self::invalid(message) }
            }
            Kind::Run | Kind::Interrupted => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
            }
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let (name, value) = match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                (header::RETRY_AFTER, "1")
            }
            StatusCode::UNAUTHORIZED => (header::WWW_AUTHENTICATE, "Bearer"),
            _ => return response,
        };
        response.headers_mut().insert(name, HeaderValue::from_static(value));
        response
    }
}
