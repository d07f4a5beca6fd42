//! `arriero serve`: a model behind an OpenAI-compatible HTTP API.

use std::net::TcpListener;
use std::time::Duration;

use clap::Args;

use super::dtype::{Dtype, Held};
use super::output;
use crate::error::{Context, Error, Result};
use crate::model::bases::{Bases, Form};
use crate::score::reward_model::{Reading, RewardModel};
use crate::serve::{self, Models, Settings};
use crate::stage::rounds::device;

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// A checkpoint directory, a .gguf file, or a hub id
    model: String,
    /// The address to listen on; 0.0.0.0 for all
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// The port; 0 picks a free one
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Name of the model in requests, instead of MODEL; may be given several times
    #[arg(long, value_name = "NAME")]
    served_model_name: Vec<String>,
    /// The environment variable with the API key that requests must send
    #[arg(long, value_name = "NAME")]
    api_key_env: Option<String>,
    /// An adapter for the model, and its name in requests; may be given several times
    #[arg(long, value_name = "NAME=DIR", value_parser = named)]
    lora_modules: Vec<(String, String)>,
    /// Let requests load adapters from local directories, and unload them
    #[arg(long)]
    allow_runtime_lora_updating: bool,
    /// Storage of the model's matrices
    #[arg(long, default_value = "none")]
    quantization: Held,
    /// A reward model for /score
    #[arg(long, value_name = "MODEL")]
    reward_model: Option<String>,
    /// Compute type
    #[arg(long, default_value = "f32")]
    dtype: Dtype,
    /// cpu or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    /// A built-in chat template or a file, instead of the model's own
    #[arg(long, value_name = "TEMPLATE")]
    chat_template: Option<String>,
    /// Maximum number of answers generated concurrently
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_batch: Option<u32>,
    /// Maximum number of tokens in all caches together [default: what fits into 1 GiB, on a GPU into a quarter of what
    /// is free]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    cache_tokens: Option<u32>,
    /// Maximum number of prompts running or waiting; further ones are told to retry
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    max_requests: u32,
    /// Maximum size of a request in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 8 << 20)]
    max_body: usize,
    /// Seconds that running requests may take to finish when the server is stopped
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    drain: u64,
}

/// Serves until asked to stop.
pub(super) fn run(args: ServeArgs) -> Result<()> {
    let listener = serve::bind(&args.host, args.port)?;
    let key = args.api_key_env.as_deref().map(key).transpose()?;
    warn(&listener, key.is_some())?;
    let models = models(&args)?;
    let names =
        if args.served_model_name.is_empty() { vec![args.model] } else { args.served_model_name };
    let settings = Settings {
        names,
        quantization: args.quantization.into(),
        adapters: args.lora_modules,
        allow_runtime_lora_updating: args.allow_runtime_lora_updating,
        key,
        max_batch: args.max_batch.map(|most| most as usize),
        cache_tokens: args.cache_tokens.map(|most| most as usize),
        max_requests: args.max_requests as usize,
        max_body: args.max_body,
        drain: Duration::from_secs(args.drain),
    };
    serve::serve(listener, models, &settings, |address| {
        output::line(&format!("listening on http://{address}"));
    })
}

/// Parses `NAME=DIR`.
fn named(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, dir)) if !name.trim().is_empty() && !dir.is_empty() => {
            Ok((name.trim().to_owned(), dir.to_owned()))
        }
        _ => Err("expected NAME=DIR".to_owned()),
    }
}

/// The digest of the key in an environment variable.
fn key(name: &str) -> Result<[u8; 32]> {
    match std::env::var(name) {
        Ok(key) if !key.trim().is_empty() => Ok(serve::digest(key.trim())),
        _ => Err(Error::usage(format!("--api-key-env: no key in the environment variable {name}"))
            .hint(format!("export {name}=…"))),
    }
}

fn warn(listener: &TcpListener, has_key: bool) -> Result<()> {
    let address = listener.local_addr()?;
    if !address.ip().is_loopback() && !has_key {
        output::note(&format!(
            "warning: everybody who can reach {address} may use the model; --api-key-env asks for a key"
        ));
    }
    Ok(())
}

fn models(args: &ServeArgs) -> Result<Models> {
    let device = device(&args.device)?;
    let base = Bases::default().base(&args.model, &Form::dense(&device, args.dtype.into()))?;
    let (mut policy, id) = (base.checkpoint(), base.id.clone());
    if let Some(template) = &args.chat_template {
        policy.tokenizer = Some(policy.tokenizer()?.with_template(template).at("--chat-template")?);
    }
    let judge = |name: &String| {
        let model = RewardModel::load(name, &device, &Reading::default());
        Ok::<_, Error>((name.clone(), model.at("--reward-model")?))
    };
    let judge = args.reward_model.as_ref().map(judge).transpose()?;
    Ok(Models { policy, id, judge })
}
