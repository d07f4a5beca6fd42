//! A model behind OpenAI's HTTP API (`arriero serve`).
//!
//! One thread owns the model and computes ([`engine`]); the HTTP side parses, waits and formats. On the CPU the same
//! request with the same seed gets the same answer, whatever the load.
//!
//! Does not load models on request (only adapters, if allowed), store conversations or files, or speak TLS, which is
//! left to a proxy.

mod answering;
mod chat;
mod completions;
mod engine;
mod fields;
mod http;
mod logprobs;
mod manner;
mod metrics;
mod others;
mod places;
mod problem;
mod served;
mod tools;
mod voices;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use rand::TryRngCore;
use sha2::{Digest, Sha256};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;

use crate::error::{Context, Error, Result};
use crate::generate::sampling::WeightFormat;
use crate::model::checkpoint::Checkpoint;
use crate::model::lora::peft::BaseId;
use crate::score::reward_model::RewardModel;
use engine::{Client, Command, Engine};
use http::{Entropy, Shared};
use metrics::Metrics;
use places::Places;
use served::{Companions, Served};
use voices::{Base, Voices};

/// How long clients may take to read the last bytes of a stopping server.
const FAREWELL: Duration = Duration::from_secs(1);

/// Server settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Names under which requests may address the model; answers report the first.
    pub names: Vec<String>,
    /// Storage format of the model's matrices.
    pub quantization: WeightFormat,
    /// Adapters to load beside the model, as (name, path).
    pub adapters: Vec<(String, String)>,
    /// Whether requests may load adapters from this machine's directories and unload them.
    pub allow_runtime_lora_updating: bool,
    /// [`digest`] of the key required in the `Authorization` header.
    pub key: Option<[u8; 32]>,
    /// Most answers decoded at once; defaults to the model's limit.
    pub max_batch: Option<usize>,
    /// Most tokens in all caches together; defaults to the model's limit.
    pub cache_tokens: Option<usize>,
    /// Most prompts in progress or waiting; further ones are refused before they are read.
    pub max_requests: usize,
    /// Most bytes in a request.
    pub max_body: usize,
    /// How long requests in progress may take to finish once the server is told to stop.
    pub drain: Duration,
}

/// The served models.
pub struct Models {
    /// The model that answers.
    pub policy: Checkpoint,
    /// The fingerprints that adapters of the policy record.
    pub id: BaseId,
    /// A reward model and its name, for `/score`.
    pub judge: Option<(String, RewardModel)>,
}

/// SHA-256 of a key; the server stores nothing else of it.
pub fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// Binds an address, before loading a model, so that an address in use is reported at once.
///
/// # Errors
/// No such address, or one in use.
pub fn bind(host: &str, port: u16) -> Result<TcpListener> {
    let listener = TcpListener::bind((host, port))
        .map_err(Error::from)
        .map_err(Error::as_usage)
        .at(format_args!("{host}:{port}"))
        .hint("choose another --port; 0 takes a free one")?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Serves until SIGINT or SIGTERM. Computes on the calling thread, which should belong to rayon's pool. `ready` is
/// called with the address once requests are accepted.
///
/// # Errors
/// Models that cannot be served, operating system errors, and a GPU that has failed permanently.
pub fn serve(
    listener: TcpListener,
    models: Models,
    settings: &Settings,
    ready: impl FnOnce(SocketAddr),
) -> Result<()> {
    let Models { policy, id, judge } = models;
    let served = Arc::new(served(policy, id, settings)?);
    let (judge_name, judge) = judge.unzip();
    let companions = Companions { served: Arc::clone(&served), judge };
    let (sender, commands) = mpsc::channel();
    let shared = Arc::new(shared(Arc::clone(&served), judge_name, sender, settings)?);
    let address = listener.local_addr()?;
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ended = start_http(&runtime, listener, Arc::clone(&shared), settings)?;
    ready(address);
    let engine = Engine::new(&served.model, served.limits, &companions, &shared.metrics);
    let worked = engine.run(&commands, &shared.client.told_to_stop());
    // Waiting clients now learn that the engine is gone.
    drop(commands);
    shared.engine_gone.notify_one();
    let ended = runtime.block_on(async { tokio::time::timeout(2 * FAREWELL, ended).await });
    runtime.shutdown_timeout(Duration::from_secs(1));
    if worked.is_err() {
        // Memory on a failed GPU cannot be freed, and closing cuBLAS there panics.
        std::mem::forget(companions);
    }
    worked?;
    match ended {
        Ok(Ok(result)) => result,
        // Connections that did not end in time are cut; nothing is lost.
        Ok(Err(_)) | Err(_) => Ok(()),
    }
}

/// State shared by handlers. They reach the engine through `sender`.
fn shared(
    served: Arc<Served>,
    judge: Option<String>,
    sender: mpsc::Sender<Command>,
    settings: &Settings,
) -> Result<Shared> {
    let start = rand::rngs::OsRng.try_next_u64().map_err(Error::run)?;
    Ok(Shared {
        served,
        judge,
        client: Client::new(sender, settings.max_requests),
        beside: Places::new(settings.max_requests),
        metrics: Arc::new(Metrics::default()),
        key: settings.key,
        stopping: AtomicBool::new(false),
        engine_gone: Notify::new(),
        entropy: Entropy::new(start),
    })
}

fn served(policy: Checkpoint, id: BaseId, settings: &Settings) -> Result<Served> {
    let by_request = settings.allow_runtime_lora_updating;
    // Weights that nothing else owns are freed while the model converts them.
    let adapted = by_request || !settings.adapters.is_empty();
    let base = adapted.then(|| Base { weights: policy.weights.clone(), id });
    let voices = Voices::new(base, by_request);
    let mut served = Served::new(policy, settings.names.clone(), settings.quantization, voices)?;
    served.limits.max_batch = settings.max_batch.unwrap_or(served.limits.max_batch);
    served.limits.cache_tokens = settings.cache_tokens.unwrap_or(served.limits.cache_tokens);
    for (name, path) in &settings.adapters {
        served.load(name, path).map_err(|problem| Error::usage(problem.message()))?;
    }
    if !by_request {
        // Frees nothing if the model shares them.
        served.voices.close();
    }
    Ok(served)
}

/// Stops the engine when the HTTP side ends for any reason.
struct StopsEngine(Arc<Shared>);

impl Drop for StopsEngine {
    fn drop(&mut self) {
        self.0.client.stop();
    }
}

fn start_http(
    runtime: &Runtime,
    listener: TcpListener,
    shared: Arc<Shared>,
    settings: &Settings,
) -> Result<tokio::task::JoinHandle<Result<()>>> {
    let (max_body, drain) = (settings.max_body, settings.drain);
    // Install signal handlers before the server can be known to be up.
    let (listener, mut signals) = {
        let _inside = runtime.enter();
        (tokio::net::TcpListener::from_std(listener)?, Signals::listen()?)
    };
    Ok(runtime.spawn(async move {
        let stops = StopsEngine(Arc::clone(&shared));
        let router = http::router(Arc::clone(&shared), max_body);
        let (drained, is_drained) = tokio::sync::oneshot::channel::<()>();
        let serving = axum::serve(listener, router).with_graceful_shutdown(async {
            // A dropped sender means the same.
            let _ = is_drained.await;
        });
        let stopping = async {
            tokio::select! {
                () = signals.next() => {}
                // Also ends by itself if the engine can no longer compute.
                () = shared.engine_gone.notified() => {}
            }
            shared.stopping.store(true, Ordering::Relaxed);
            // A second signal ends the wait. Without an engine nothing remains in progress.
            tokio::select! {
                () = idle(&shared) => {}
                () = signals.next() => {}
                () = tokio::time::sleep(drain) => {}
            }
            // Waiting clients are notified and get a moment to read it. Connections close after their last byte; others
            // are cut.
            shared.client.stop();
            let _ = drained.send(());
            tokio::time::sleep(FAREWELL).await;
        };
        let result = tokio::select! {
            result = serving => result.map_err(Error::from),
            () = stopping => Ok(()),
        };
        drop(stops);
        result
    }))
}

async fn idle(shared: &Shared) {
    while !shared.client.is_idle() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// SIGINT and SIGTERM.
#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn listen() -> Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let (interrupt, terminate) = (SignalKind::interrupt(), SignalKind::terminate());
        Ok(Self { interrupt: signal(interrupt)?, terminate: signal(terminate)? })
    }

    /// Resolves at the next signal.
    async fn next(&mut self) {
        tokio::select! { _ = self.interrupt.recv() => {}, _ = self.terminate.recv() => {} }
    }
}

/// Ctrl-C.
#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn listen() -> Result<Self> {
        Ok(Self)
    }

    /// Resolves at the next Ctrl-C.
    async fn next(&mut self) {
        let _ = tokio::signal::ctrl_c().await;
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::Device;

    use super::*;

    #[test]
    fn a_server_stops_by_itself_once_its_engine_is_gone() {
        let settings = Settings {
            names: vec!["tiny".to_owned()],
            quantization: WeightFormat::None,
            adapters: Vec::new(),
            allow_runtime_lora_updating: false,
            key: None,
            max_batch: None,
            cache_tokens: None,
            max_requests: 4,
            max_body: 1 << 20,
            drain: Duration::from_mins(5),
        };
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny/student");
        let policy = Checkpoint::load_dir(&dir, &Device::Cpu).unwrap();
        let served = Arc::new(served(policy, BaseId::default(), &settings).unwrap());
        let (sender, commands) = mpsc::channel();
        let shared = Arc::new(shared(served, None, sender, &settings).unwrap());
        let listener = bind("127.0.0.1", 0).unwrap();
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let ended = start_http(&runtime, listener, Arc::clone(&shared), &settings).unwrap();
        assert!(!shared.stopping.load(Ordering::Relaxed));
        drop(commands);
        shared.engine_gone.notify_one();
        let limit = Duration::from_mins(1);
        let ended = runtime.block_on(async { tokio::time::timeout(limit, ended).await });
        ended.unwrap().unwrap().unwrap();
        assert!(shared.stopping.load(Ordering::Relaxed));
    }
}
