//! Routes, authentication, and refusals while the server stops.

use std::future::{Future, Ready, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, FromRequest, Path, Request, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::StreamExt;
use rand::RngCore;
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::answering::{Format, respond};
use super::completions::Asked;
use super::engine::Client;
use super::metrics::Metrics;
use super::places::{Place, Places};
use super::problem::Problem;
use super::served::Served;
use super::voices::Voice;
use super::{chat, completions, digest, others, voices};
use crate::error::Error;
use crate::rng::Stream;

/// All routes, for metrics and "did you mean".
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

/// Routes without authentication: they reveal nothing about models or requests.
const OPEN: [&str; 2] = ["/health", "/metrics"];

/// Time limit for a request's body. It holds a place meanwhile, which others wait for.
const BODY_WITHIN: Duration = Duration::from_mins(1);

/// How long a refused client may keep sending.
const LINGER: Duration = Duration::from_secs(2);

/// State shared by handlers.
pub(super) struct Shared {
    pub(super) served: Arc<Served>,
    /// The reward model's name, if there is one.
    pub(super) judge: Option<String>,
    pub(super) client: Client,
    /// Places of those who are asked for nothing that the engine computes.
    pub(super) beside: Places,
    pub(super) metrics: Arc<Metrics>,
    /// [`digest`] of the key. The server does not store the key itself.
    pub(super) key: Option<[u8; 32]>,
    pub(super) stopping: AtomicBool,
    /// Notified when the engine has ended for any reason.
    pub(super) engine_gone: Notify,
    pub(super) entropy: Entropy,
}

/// Seeds and ids for requests without their own.
pub(super) struct Entropy {
    stream: Stream,
    next: AtomicU64,
}

/// Defaults for a request without its own seed and id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Fresh {
    pub(super) seed: u64,
    pub(super) id: String,
}

impl Entropy {
    /// Different at each program start.
    pub(super) fn new(start: u64) -> Self {
        Self { stream: Stream::new(start, "serve"), next: AtomicU64::new(0) }
    }

    fn fresh(&self) -> Fresh {
        let mut rng = self.stream.at(0, self.next.fetch_add(1, Ordering::Relaxed));
        Fresh { seed: rng.next_u64(), id: format!("{:016x}{:08x}", rng.next_u64(), rng.next_u32()) }
    }
}

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

/// Rejects unauthorised requests, and counts all of them.
async fn gate(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let route = route(request.uri().path());
    let response = match shared.refusal(&request) {
        Some(problem) => problem.into_response(),
        None => next.run(request).await,
    };
    shared.metrics.answered(route, response.status().as_u16());
    response
}

/// The route of a path: a fixed set, so that arbitrary paths cannot fill the counters.
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
        // Constant-time comparison of digests, so that timing reveals nothing about the key.
        let apart = key.iter().zip(digest(given)).fold(0, |apart, (a, b)| apart | (a ^ b));
        (apart != 0).then(Problem::unauthorized)
    }
}

/// Lets a request in: takes a place for it and then reads its body. Where no place is free, nothing is read.
async fn enter(places: &Places, request: Request) -> Result<(Place, Bytes), Problem> {
    match places.take() {
        Ok(place) => Ok((place, read(request, BODY_WITHIN).await?)),
        Err(problem) => {
            let_it_end(request.into_body());
            Err(problem)
        }
    }
}

async fn read(request: Request, within: Duration) -> Result<Bytes, Problem> {
    match tokio::time::timeout(within, Bytes::from_request(request, &())).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(rejection)) => {
            let too_large = rejection.status() == StatusCode::PAYLOAD_TOO_LARGE;
            let code = if too_large { "body_too_large" } else { "unreadable_body" };
            Err(Problem::invalid(rejection.body_text()).status(rejection.status()).code(code))
        }
        Err(_) => {
            let seconds = within.as_secs();
            let message =
                format!("the body did not come whole within {seconds} seconds; try again");
            Err(Problem::invalid(message).status(StatusCode::REQUEST_TIMEOUT).code("body_too_slow"))
        }
    }
}

/// Reads and drops the rest of a refused client's body in the background: if the connection were cut while the client
/// is still sending, it might not read the reason.
fn let_it_end(body: Body) {
    tokio::spawn(async move {
        let mut rest = body.into_data_stream();
        let rest = async { while let Some(Ok(_)) = rest.next().await {} };
        // A client that is still sending is cut off after all.
        let _ = tokio::time::timeout(LINGER, rest).await;
    });
}

/// Runs potentially slow work, such as tokenizing a long text, off the threads that serve connections. It keeps its place
/// until it ends, even if the client is gone, so there is never more of it than there are places.
async fn aside<T: Send + 'static>(
    place: Place,
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<(T, Place), Problem> {
    let work = move || work().map(|done| (done, place));
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        // Tasks not begun when the runtime ends are cancelled.
        if !error.is_panic() {
            return Err(Problem::stopping());
        }
        Err(Problem::from(Error::run("internal error: the request handler panicked")))
    })
}

/// Parses a request's body.
type Parse<F> = fn(&Arc<Served>, &[u8], &Fresh) -> Result<Asked<F>, Problem>;

async fn generate<F: Format>(shared: Arc<Shared>, request: Request, parse: Parse<F>) -> Response {
    let open = async {
        let (place, body) = enter(&shared.client.places, request).await?;
        let (served, fresh) = (Arc::clone(&shared.served), shared.entropy.fresh());
        let (asked, place) = aside(place, move || parse(&served, &body, &fresh)).await?;
        let Asked { requests, stream, format } = asked;
        let open = shared.client.generate(requests, stream, place)?;
        Ok::<_, Problem>((open, format, stream))
    };
    match open.await {
        Ok((open, format, stream)) => respond(open, format, stream).await,
        Err(problem) => problem.into_response(),
    }
}

fn complete(State(shared): State<Arc<Shared>>, asked: Request) -> impl Future<Output = Response> {
    generate(shared, asked, completions::parse)
}

fn converse(State(shared): State<Arc<Shared>>, asked: Request) -> impl Future<Output = Response> {
    generate(shared, asked, chat::parse)
}

async fn embed(State(shared): State<Arc<Shared>>, request: Request) -> Answered {
    let (place, body) = enter(&shared.client.places, request).await?;
    let served = Arc::clone(&shared.served);
    let parsed = aside(place, move || others::Embeddings::parse(&served, &body)).await?;
    let ((embed, wanted), place) = parsed;
    let vectors = shared.client.embed(embed, &place).await?;
    let answer = aside(place, move || wanted.answer(shared.served.name(), &vectors)).await?;
    Ok(Json(answer.0))
}

async fn score(State(shared): State<Arc<Shared>>, request: Request) -> Answered {
    let (place, body) = enter(&shared.client.places, request).await?;
    let reader = Arc::clone(&shared);
    let parsed = aside(place, move || others::judged(reader.judge.as_deref(), &body)).await?;
    let (judged, place) = parsed;
    let scores = shared.client.score(judged, &place).await?;
    Ok(Json(others::scores(shared.judge.as_deref(), &scores)))
}

/// Answers what the engine is not asked for, in a place beside those who wait for it.
async fn by_itself(
    shared: &Arc<Shared>,
    request: Request,
    answer: fn(&Served, &[u8]) -> Result<Value, Problem>,
) -> Answered {
    let (place, body) = enter(&shared.beside, request).await?;
    let served = Arc::clone(&shared.served);
    let (answer, _) = aside(place, move || answer(&served, &body)).await?;
    Ok(Json(answer))
}

async fn tokenize(State(shared): State<Arc<Shared>>, request: Request) -> Answered {
    by_itself(&shared, request, others::tokenize).await
}

async fn detokenize(State(shared): State<Arc<Shared>>, request: Request) -> Answered {
    by_itself(&shared, request, others::detokenize).await
}

async fn load(State(shared): State<Arc<Shared>>, request: Request) -> Answered {
    by_itself(&shared, request, voices::load).await
}

async fn unload(State(shared): State<Arc<Shared>>, request: Request) -> Answered {
    let told = by_itself(&shared, request, voices::unload).await?;
    shared.client.tidy();
    Ok(told)
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
    fn unknown_paths_are_counted_together() {
        assert_eq!(route("/v1/completions"), "/v1/completions");
        assert_eq!(route("/v1/models/a/b"), "/v1/models");
        assert_eq!(route("/wp-admin"), "other");
    }

    #[test]
    fn seeds_and_ids_differ_per_request_and_per_server_start() {
        let entropy = Entropy::new(1);
        let all = [entropy.fresh(), entropy.fresh(), Entropy::new(2).fresh()];
        assert!(all[0] != all[1] && all[0] != all[2]);
        assert_eq!(all[0].id.len(), 24);
    }

    #[tokio::test]
    async fn reading_a_request_body_times_out() {
        let never = futures_util::stream::pending::<Result<Bytes, std::convert::Infallible>>();
        let request = Request::new(Body::from_stream(never));
        let problem = read(request, Duration::from_millis(20)).await.unwrap_err();
        assert!(problem.message().contains("did not come whole"), "{problem:?}");
        assert_eq!(problem.into_response().status(), StatusCode::REQUEST_TIMEOUT);
        let request = Request::new(Body::from("all"));
        assert_eq!(read(request, BODY_WITHIN).await.unwrap(), "all");
    }

    #[tokio::test]
    async fn abandoned_work_keeps_its_place_until_it_ends() {
        let places = Places::new(1);
        let (go, gone) = std::sync::mpsc::channel::<()>();
        let works = aside(places.take().unwrap(), move || {
            let _ = gone.recv();
            Ok(())
        });
        let impatient = tokio::time::timeout(Duration::from_millis(20), works).await;
        assert!(impatient.is_err() && places.take().is_err());
        go.send(()).unwrap();
        while !places.are_all_free() {
            tokio::task::yield_now().await;
        }
        let fails = aside(places.take().unwrap(), || Err::<(), _>(Problem::stopping())).await;
        assert!(fails.is_err() && places.are_all_free());
    }
}
