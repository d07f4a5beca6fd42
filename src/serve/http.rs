//! Routes, the key, and refusals while the server stops.

use std::future::{Future, Ready, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use axum::Json;
use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use rand::RngCore;
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::answering::{Format, respond};
use super::completions::Asked;
use super::engine::Client;
use super::metrics::Metrics;
use super::problem::Problem;
use super::served::Served;
use super::voices::Voice;
use super::{chat, completions, digest, others, voices};
use crate::error::Error;
use crate::rng::Stream;

/// Every route, for counting and for "did you mean".
const ROUTES: [&str; 11] = [
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/tokenize",
    "/detokenize",
    "/score",
    "/health",
    "/metrics",
];

/// Routes that need no key: they say nothing of models or of what is asked.
const OPEN: [&str; 2] = ["/health", "/metrics"];

/// What handlers share.
pub(super) struct Shared {
    pub(super) served: Arc<Served>,
    /// The reward model's name, where there is one.
    pub(super) judge: Option<String>,
    pub(super) client: Client,
    pub(super) metrics: Arc<Metrics>,
    /// The [`digest`] of the key. The server does not keep the key itself.
    pub(super) key: Option<[u8; 32]>,
    pub(super) stopping: AtomicBool,
    /// Told when the engine has ended, whether or not it was asked to.
    pub(super) engine_gone: Notify,
    pub(super) entropy: Entropy,
}

/// Seeds and ids for requests that bring none.
pub(super) struct Entropy {
    stream: Stream,
    next: AtomicU64,
}

/// What a request is given that brings none of its own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Fresh {
    pub(super) seed: u64,
    pub(super) id: String,
}

impl Entropy {
    /// Different at each start of the program.
    pub(super) fn new(start: u64) -> Self {
        Self { stream: Stream::new(start, "serve"), next: AtomicU64::new(0) }
    }

    fn fresh(&self) -> Fresh {
        let mut rng = self.stream.at(0, self.next.fetch_add(1, Ordering::Relaxed));
        Fresh { seed: rng.next_u64(), id: format!("{:016x}{:08x}", rng.next_u64(), rng.next_u32()) }
    }
}

type Body = Result<Bytes, BytesRejection>;
type Answered = Result<Json<Value>, Problem>;

/// All routes, with requests of at most `max_body` bytes.
pub(super) fn router(shared: Arc<Shared>, max_body: usize) -> Router {
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/completions", post(complete))
        .route("/v1/chat/completions", post(converse))
        .route("/v1/embeddings", post(embed))
        .route("/v1/load_lora_adapter", post(load))
        .route("/v1/unload_lora_adapter", post(unload))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/score", post(score))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .fallback(no_route)
        .method_not_allowed_fallback(no_route)
        .layer(DefaultBodyLimit::max(max_body))
        .layer(middleware::from_fn_with_state(Arc::clone(&shared), gate))
        .with_state(shared)
}

/// Refuses who may not enter, and counts everybody.
async fn gate(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let route = route(request.uri().path());
    let response = match shared.refusal(&request) {
        Some(problem) => problem.into_response(),
        None => next.run(request).await,
    };
    shared.metrics.answered(route, response.status().as_u16());
    response
}

/// The route that a path belongs to: a fixed set, so that strangers cannot fill the counters.
fn route(path: &str) -> &'static str {
    let own = ROUTES.iter().find(|route| path == **route);
    let model = || path.starts_with("/v1/models/").then_some(&ROUTES[0]);
    own.or_else(model).copied().unwrap_or("other")
}

impl Shared {
    fn refusal(&self, request: &Request) -> Option<Problem> {
        let path = request.uri().path();
        if self.stopping.load(Ordering::Relaxed) && path != "/metrics" {
            return Some(Problem::stopping());
        }
        let key = self.key.as_ref().filter(|_| !OPEN.contains(&path))?;
        let given = request.headers().get(header::AUTHORIZATION);
        let given = given.and_then(|value| value.to_str().ok()).unwrap_or_default();
        let given = given.strip_prefix("Bearer ").unwrap_or_default();
        // Digests are compared, all of their bytes: how long it takes tells nothing of the key.
        let apart = key.iter().zip(digest(given)).fold(0, |apart, (a, b)| apart | (a ^ b));
        (apart != 0).then(Problem::unauthorized)
    }
}

fn read(body: Body) -> Result<Bytes, Problem> {
    body.map_err(|rejection| {
        let too_large = rejection.status() == StatusCode::PAYLOAD_TOO_LARGE;
        let code = if too_large { "body_too_large" } else { "unreadable_body" };
        Problem::invalid(rejection.body_text()).status(rejection.status()).code(code)
    })
}

/// Runs what may take long, as tokenizing a long text does, beside the threads that serve connections.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        // What has not begun when the runtime ends is cancelled.
        if !error.is_panic() {
            return Err(Problem::stopping());
        }
        Err(Problem::from(Error::run("a mistake of the server: the request broke its reader")))
    })
}

/// Reads a request's body.
type Parse<F> = fn(&Arc<Served>, &[u8], &Fresh) -> Result<Asked<F>, Problem>;

async fn generate<F: Format>(shared: Arc<Shared>, body: Body, parse: Parse<F>) -> Response {
    let open = async {
        let body = read(body)?;
        let (served, fresh) = (Arc::clone(&shared.served), shared.entropy.fresh());
        let Asked { requests, stream, format } =
            aside(move || parse(&served, &body, &fresh)).await?;
        let open = shared.client.generate(requests, stream)?;
        Ok::<_, Problem>((open, format, stream))
    };
    match open.await {
        Ok((open, format, stream)) => respond(open, format, stream).await,
        Err(problem) => problem.into_response(),
    }
}

fn complete(State(shared): State<Arc<Shared>>, body: Body) -> impl Future<Output = Response> {
    generate(shared, body, completions::parse)
}

fn converse(State(shared): State<Arc<Shared>>, body: Body) -> impl Future<Output = Response> {
    generate(shared, body, chat::parse)
}

async fn embed(State(shared): State<Arc<Shared>>, body: Body) -> Answered {
    let (body, served) = (read(body)?, Arc::clone(&shared.served));
    let (embed, wanted) = aside(move || others::Embeddings::parse(&served, &body)).await?;
    let vectors = shared.client.embed(embed).await?;
    aside(move || wanted.answer(shared.served.name(), &vectors)).await.map(Json)
}

async fn score(State(shared): State<Arc<Shared>>, body: Body) -> Answered {
    let (body, reader) = (read(body)?, Arc::clone(&shared));
    let judged = aside(move || others::judged(reader.judge.as_deref(), &body)).await?;
    let scores = shared.client.score(judged).await?;
    Ok(Json(others::scores(shared.judge.as_deref(), &scores)))
}

async fn tokenize(State(shared): State<Arc<Shared>>, body: Body) -> Answered {
    let body = read(body)?;
    aside(move || others::tokenize(&shared.served, &body)).await.map(Json)
}

async fn detokenize(State(shared): State<Arc<Shared>>, body: Body) -> Answered {
    let body = read(body)?;
    aside(move || others::detokenize(&shared.served, &body)).await.map(Json)
}

async fn load(State(shared): State<Arc<Shared>>, body: Body) -> Answered {
    let body = read(body)?;
    aside(move || voices::load(&shared.served, &body)).await.map(Json)
}

async fn unload(State(shared): State<Arc<Shared>>, body: Body) -> Answered {
    let body = read(body)?;
    aside(move || voices::unload(&shared.served, &body)).await.map(Json)
}

fn models(State(shared): State<Arc<Shared>>) -> Ready<Json<Value>> {
    let served = &shared.served;
    let mut data: Vec<Value> = served.names.iter().map(|name| served.card(name)).collect();
    data.extend(served.voices.all().iter().map(|voice| voice.card(served)));
    ready(Json(json!({"object": "list", "data": data})))
}

fn model(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Ready<Answered> {
    let served = &shared.served;
    let card = |voice: Arc<Voice>| match &voice.adapter {
        Some(_) => voice.card(served),
        None => served.card(&name),
    };
    ready(served.voice(&name).map(|voice| Json(card(voice))))
}

fn health() -> Ready<Json<Value>> {
    ready(Json(json!({"status": "ok"})))
}

fn metrics(State(shared): State<Arc<Shared>>) -> Ready<impl IntoResponse> {
    ready(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], shared.metrics.page()))
}

#[expect(clippy::needless_pass_by_value, reason = "the interface of a handler")]
fn no_route(method: Method, uri: Uri) -> Ready<Problem> {
    let known = ROUTES.map(|route| {
        let method = if OPEN.contains(&route) || route == ROUTES[0] { "GET" } else { "POST" };
        format!("{method} {route}")
    });
    ready(Problem::no_route(method.as_str(), uri.path(), &known))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_paths_are_counted_together() {
        assert_eq!(route("/v1/completions"), "/v1/completions");
        assert_eq!(route("/v1/models/a/b"), "/v1/models");
        assert_eq!(route("/wp-admin"), "other");
    }

    #[test]
    fn seeds_and_ids_differ_by_request_and_by_start() {
        let entropy = Entropy::new(1);
        let all = [entropy.fresh(), entropy.fresh(), Entropy::new(2).fresh()];
        assert!(all[0] != all[1] && all[0] != all[2]);
        assert_eq!(all[0].id.len(), 24);
    }
}
