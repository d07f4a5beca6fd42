//! A server of OpenAI's interface that does what a script says: in this process, on loopback, without a model.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// A request as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// `/v1/chat/completions`, …
    pub(crate) path: String,
    /// What stands behind `authorization:`.
    pub(crate) authorization: String,
    /// The JSON body; null where there is none.
    pub(crate) body: Value,
}

/// What is sent back.
#[derive(Clone, Debug)]
pub(crate) enum Response {
    /// A JSON body with status 200.
    Json(Value),
    /// A status, headers (each with its line end) and a body.
    Raw(u16, String, String),
    /// The same after a pause.
    After(Duration, Box<Self>),
    /// The connection is closed without a word.
    Reset,
    /// Nothing, ever.
    Silence,
}

/// Answers requests.
pub(crate) type Script = dyn Fn(&Request) -> Response + Send + Sync;

/// A running server; it ends with the value.
pub(crate) struct FakeServer {
    runtime: Option<tokio::runtime::Runtime>,
    address: std::net::SocketAddr,
}

impl FakeServer {
    /// Starts it.
    pub(crate) fn start(script: impl Fn(&Request) -> Response + Send + Sync + 'static) -> Self {
        let script: Arc<Script> = Arc::new(script);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
        let address = listener.local_addr().expect("an address");
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, script.clone()));
            }
        });
        Self { runtime: Some(runtime), address }
    }

    /// `base_url` for a recipe.
    pub(crate) fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }
}

impl Drop for FakeServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Answers the requests of one connection.
async fn serve(stream: TcpStream, script: Arc<Script>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    while let Some(request) = read(&mut stream).await? {
        let mut response = script(&request);
        while let Response::After(pause, then) = response {
            tokio::time::sleep(pause).await;
            response = *then;
        }
        let (status, headers, body) = match response {
            Response::Json(body) => (200, String::new(), body.to_string()),
            Response::Raw(status, headers, body) => (status, headers, body),
            Response::Reset => return Ok(()),
            Response::Silence | Response::After(..) => std::future::pending().await,
        };
        let length = body.len();
        let text =
            format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n{headers}\r\n{body}");
        stream.write_all(text.as_bytes()).await?;
    }
    Ok(())
}

/// Reads one request; none at the end of the connection.
async fn read(stream: &mut BufReader<TcpStream>) -> io::Result<Option<Request>> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let (mut length, mut authorization) = (0, String::new());
    loop {
        line.clear();
        stream.read_line(&mut line).await?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().unwrap_or(0),
            "authorization" => value.clone_into(&mut authorization),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    Ok(Some(Request { path, authorization, body }))
}

/// What a well-behaved server answers: it repeats the last message and the seed.
pub(crate) fn well_behaved(request: &Request) -> Response {
    match request.path.as_str() {
        "/v1/models" => Response::Json(json!({"data": [{"id": "big", "owned_by": "fake"}]})),
        "/v1/chat/completions" => Response::Json(chat(request)),
        _ => Response::Raw(404, String::new(), "{}".to_owned()),
    }
}

/// The body of a whole chat answer to `request`.
pub(crate) fn chat(request: &Request) -> Value {
    let body = &request.body;
    let count = body["n"].as_u64().unwrap_or(1);
    let asked = body["messages"].as_array().and_then(|messages| messages.last());
    let asked = asked.map_or("", |message| message["content"].as_str().unwrap_or(""));
    let choices: Vec<Value> = (0..count)
        .map(|index| {
            let text = format!("{asked} #{}.{index}", body["seed"]);
            let logprobs = body["logprobs"].as_bool().unwrap_or(false).then(|| {
                json!({"content": [{"token": "a", "logprob": -0.25}, {"token": "b", "logprob": -0.5}]})
            });
            json!({
                "index": index, "message": {"role": "assistant", "content": text},
                "finish_reason": "stop", "logprobs": logprobs,
            })
        })
        .collect();
    json!({
        "choices": choices, "model": body["model"], "system_fingerprint": "fake-1",
        "usage": {"prompt_tokens": 5, "completion_tokens": 2 * count},
    })
}

/// Whether a request is one of the small ones that find out what the server can do.
pub(crate) fn is_probe(request: &Request) -> bool {
    request.path != "/v1/chat/completions"
        || request.body["messages"][0]["content"] == "Write a few random words."
}
