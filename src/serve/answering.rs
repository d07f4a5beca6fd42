//! Turns engine events into a response: complete, or streamed as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::Json;
use axum::response::sse::{Event as Sent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::{Value, json};

use super::engine::Open;
use super::problem::Problem;
use crate::generate::engine::{Answer, Event, Finish, Piece, PromptScores};

/// Token usage of a request.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    pub(super) prompt: usize,
    pub(super) completion: usize,
    pub(super) cached: usize,
}

impl Usage {
    /// OpenAI's object.
    pub(super) fn object(self) -> Value {
        let Self { prompt, completion, cached } = self;
        json!({
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        })
    }
}

/// OpenAI's name for the finish reason.
pub(super) fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::Filtered => "content_filter",
    }
}

/// Response format of an HTTP request.
pub(super) trait Format: Send + 'static {
    /// The complete response. `all`: the answers to each prompt.
    fn whole(&mut self, all: Vec<(Vec<Answer>, PromptScores)>) -> Value;
    /// Chunks to send for a streamed piece.
    fn piece(&mut self, place: usize, piece: Piece) -> Vec<Value>;
    /// All answers to a streamed prompt are complete.
    fn done(&mut self, scores: &PromptScores);
    /// Chunks to send at the end of a stream.
    fn end(&mut self) -> Vec<Value>;
}

/// The response to `open`, complete or streamed.
pub(super) async fn respond(open: Open, format: impl Format, stream: bool) -> Response {
    if stream {
        return pieces(open, format);
    }
    let mut format = format;
    match collect(open).await {
        Ok(all) => Json(format.whole(all)).into_response(),
        Err(problem) => problem.into_response(),
    }
}

async fn collect(mut open: Open) -> Result<Vec<(Vec<Answer>, PromptScores)>, Problem> {
    let mut all = Vec::new();
    while let Some((place, event)) = open.next().await? {
        match event {
            Event::Done(_, answers, scores) => all.push((place, (answers, scores))),
            Event::Failed(_, error) => return Err(error.into()),
            Event::Piece(..) => {}
        }
    }
    all.sort_by_key(|(place, _)| *place);
    Ok(all.into_iter().map(|(_, answers)| answers).collect())
}

struct Streaming<F> {
    /// `None` once nothing more is expected.
    open: Option<Open>,
    format: F,
    ready: VecDeque<String>,
}

impl<F: Format> Streaming<F> {
    async fn next(&mut self) -> Option<String> {
        while self.ready.is_empty() {
            let event = self.open.as_mut()?.next().await;
            let values = match event {
                Ok(Some((place, Event::Piece(_, piece)))) => self.format.piece(place, piece),
                Ok(Some((_, Event::Done(_, _, scores)))) => {
                    self.format.done(&scores);
                    Vec::new()
                }
                Ok(Some((_, Event::Failed(_, error)))) => {
                    self.close(vec![Problem::from(error).body()])
                }
                Ok(None) => {
                    let values = self.format.end();
                    self.close(values)
                }
                Err(problem) => self.close(vec![problem.body()]),
            };
            let ended = self.open.is_none();
            self.ready.extend(values.iter().map(Value::to_string));
            self.ready.extend(ended.then(|| "[DONE]".to_owned()));
        }
        self.ready.pop_front()
    }

    fn close(&mut self, last: Vec<Value>) -> Vec<Value> {
        self.open = None;
        last
    }
}

fn pieces(open: Open, format: impl Format) -> Response {
    let streaming = Streaming { open: Some(open), format, ready: VecDeque::new() };
    let events = stream::unfold(streaming, |mut streaming| async {
        let data = streaming.next().await?;
        Some((Ok::<_, Infallible>(Sent::default().data(data)), streaming))
    });
    // Periodic keep-alive comments detect a disconnected client while a long prompt is prefilled.
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}
