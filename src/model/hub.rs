//! Models and datasets from the Hugging Face hub, through its standard cache directory.
//!
//! Uses the standard variables: `HF_HOME` (or `HF_HUB_CACHE`) for the cache, `HF_ENDPOINT` for a mirror, `HF_TOKEN` for
//! private repositories, and `HF_HUB_OFFLINE=1` to use only the cache, without network access.

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::path::{Component, Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use serde_json::Value;

use super::checkpoint::{INDEX, SINGLE};
use crate::error::{Error, Result};
use crate::store;

/// Small files that are fetched if the repository has them.
const BESIDE: &[&str] = &[
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// Supported extensions of data files.
const DATA_ENDINGS: &[&str] = &[".jsonl", ".jsonl.gz", ".parquet"];

/// Access to hub repositories.
#[derive(Clone, Debug)]
pub struct Hub {
    cache: PathBuf,
    endpoint: String,
    token: Option<String>,
    offline: bool,
}

impl Hub {
    /// A hub configured by the environment.
    ///
    /// # Errors
    /// Neither `HF_HOME` nor a home directory is known.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let home = var("HF_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::home_dir().map(|home| home.join(".cache").join("huggingface")));
        let cache = var("HF_HUB_CACHE").map(PathBuf::from);
        let cache = cache.or_else(|| home.map(|home| home.join("hub"))).ok_or_else(|| {
            Error::run("no home directory for downloads").hint("set HF_HOME to a directory")
        })?;
        let offline = var("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_lowercase();
        Ok(Self {
            endpoint: var("HF_ENDPOINT").map_or_else(
                || "https://huggingface.co".to_owned(),
                |url| url.trim_end_matches('/').to_owned(),
            ),
            token: var("HF_TOKEN").or_else(|| Cache::new(cache.clone()).token()),
            offline: matches!(offline.as_str(), "1" | "true" | "yes" | "on"),
            cache,
        })
    }

    /// The local directory of a model: config, weights and tokenizer files of one revision.
    ///
    /// # Errors
    /// No such repository, one without safetensors, or a failed connection.
    pub fn model(&self, id: &str, revision: Option<&str>) -> Result<PathBuf> {
        let files = self.open(id, RepoType::Model, revision)?;
        if !files.has("config.json") {
            return Err(files.not_a_model());
        }
        let config = files.get("config.json")?;
        if files.has(INDEX) {
            let path = files.get(INDEX)?;
            for shard in shards(&path)? {
                files.get(&shard)?;
            }
        } else if files.has(SINGLE) {
            files.get(SINGLE)?;
        } else {
            return Err(files.not_a_model());
        }
        for name in BESIDE {
            if files.has(name) {
                files.get(name)?;
            }
        }
        let dir = config.parent().unwrap_or(&self.cache);
        Ok(dir.to_path_buf())
    }

    /// One file of a model repository, e.g. a GGUF file.
    ///
    /// # Errors
    /// No such repository or file, or a failed connection.
    pub fn model_file(&self, id: &str, revision: Option<&str>, file: &str) -> Result<PathBuf> {
        let files = self.open(id, RepoType::Model, revision)?;
        files.expect(file)?;
        files.get(file)
    }

    /// The local files of one split of a dataset, in name order; if `names` is not empty, it lists the files instead.
    ///
    /// # Errors
    /// No such repository, split or file, or a failed connection.
    pub fn dataset(&self, id: &str, split: &str, names: &[String]) -> Result<Vec<PathBuf>> {
        let files = self.open(id, RepoType::Dataset, None)?;
        let chosen = if names.is_empty() { files.of_split(split)? } else { names.to_vec() };
        for name in &chosen {
            files.expect(name)?;
        }
        chosen.iter().map(|name| files.get(name)).collect()
    }

    /// Current commit of a repository's main branch: the server's if online, the cache's if offline.
    ///
    /// # Errors
    /// No such repository, a failed connection, or a repository missing from the cache.
    pub fn commit(&self, id: &str, kind: RepoType) -> Result<String> {
        let files = self.open(id, kind, None)?;
        if let Some(remote) = files.remote {
            return Ok(remote.commit);
        }
        let main = self.cache.join(Repo::new(id.to_owned(), kind).folder_name()).join("refs/main");
        store::read_text(&main).map(|text| text.trim().to_owned()).map_err(|error| {
            error.at(files.place).hint("HF_HUB_OFFLINE is set and the cache does not hold it")
        })
    }

    fn open(&self, id: &str, kind: RepoType, revision: Option<&str>) -> Result<Files> {
        let revision = revision.unwrap_or("main").to_owned();
        let repo = Repo::with_revision(id.to_owned(), kind, revision);
        let cached = Cache::new(self.cache.clone()).repo(repo.clone());
        let place = format!("hub:{id}");
        if self.offline {
            return Ok(Files { place, cached, remote: None });
        }
        let remote = self.api().map_err(|error| failed(&place, error))?.repo(repo);
        let info = remote.info().map_err(|error| failed(&place, error))?;
        let names = info.siblings.into_iter().map(|file| file.rfilename).collect();
        Ok(Files { place, cached, remote: Some(Remote { repo: remote, names, commit: info.sha }) })
    }

    fn api(&self) -> Result<Api, ApiError> {
        ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_progress(std::io::stderr().is_terminal())
            .with_retries(2)
            .build()
    }
}

/// Whether a file's name says that it is a GGUF file.
pub(super) fn is_gguf(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|ending| ending == "gguf")
}

/// As [`Hub::dataset`], on the hub configured by the environment.
///
/// # Errors
/// As [`Hub::dataset`].
pub fn dataset(id: &str, split: &str, names: &[String]) -> Result<Vec<PathBuf>> {
    Hub::from_env()?.dataset(id, split, names)
}

/// The commit at which a model (`org/name`, `org/name:file.gguf`) or dataset of the hub would be read now.
///
/// # Errors
/// As [`Hub::commit`].
pub fn commit(name: &str, is_dataset: bool) -> Result<String> {
    let kind = if is_dataset { RepoType::Dataset } else { RepoType::Model };
    let id = name.split_once(':').map_or(name, |(id, _)| id);
    Hub::from_env()?.commit(id, kind)
}

/// The files of one revision of one repository.
struct Files {
    place: String,
    cached: CacheRepo,
    /// `None` offline.
    remote: Option<Remote>,
}

struct Remote {
    repo: ApiRepo,
    names: BTreeSet<String>,
    commit: String,
}

impl Files {
    fn has(&self, name: &str) -> bool {
        match &self.remote {
            Some(remote) => remote.names.contains(name),
            None => self.cached.get(name).is_some(),
        }
    }

    fn expect(&self, name: &str) -> Result<()> {
        if self.has(name) {
            return Ok(());
        }
        let error = Error::run(format!("no file `{name}`")).at(&self.place);
        Err(match &self.remote {
            None => error.hint("HF_HUB_OFFLINE is set and the cache does not hold it"),
            Some(remote) => {
                let names = remote.names.iter().map(String::as_str);
                match crate::error::did_you_mean(name, names) {
                    Some(near) => error.hint(format!("did you mean `{near}`?")),
                    None => error.hint(format!("the repository has: {}", list(&remote.names))),
                }
            }
        })
    }

    /// The local path, downloaded unless this commit's file is in the cache.
    fn get(&self, name: &str) -> Result<PathBuf> {
        // Names come from the server and must not escape the cache directory.
        if !Path::new(name).components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(Error::run(format!("refused file name `{name}`")).at(&self.place));
        }
        let Some(remote) = &self.remote else {
            return self.cached.get(name).ok_or_else(|| {
                Error::run(format!("`{name}` is not in the cache"))
                    .at(&self.place)
                    .hint("unset HF_HUB_OFFLINE to download it")
            });
        };
        // By commit rather than branch: a moving branch must not give a mixture of versions.
        let path = self.cached.pointer_path(&remote.commit).join(name);
        if path.exists() {
            return Ok(path);
        }
        let place = format!("{}/{name}", self.place);
        remote.repo.download(name).map_err(|error| failed(&place, error))
    }

    fn not_a_model(&self) -> Error {
        let error = Error::run(format!("no config.json with {SINGLE} or {INDEX}")).at(&self.place);
        match &self.remote {
            None => error.hint("HF_HUB_OFFLINE is set and the cache does not hold the model"),
            Some(remote) => match remote.names.iter().find(|name| is_gguf(name)) {
                Some(file) => error.hint(format!("ask for a GGUF file: `org/name:{file}`")),
                None => error.hint(format!("the repository has: {}", list(&remote.names))),
            },
        }
    }

    /// Data files whose path contains the split's name as a separate component or word: `train.jsonl`,
    /// `data/train-00000-of-00002.parquet`, `default/train/0000.parquet`.
    fn of_split(&self, split: &str) -> Result<Vec<String>> {
        let Some(remote) = &self.remote else {
            return Err(Error::run("the files of a split are not known offline")
                .at(&self.place)
                .hint("name the files, or unset HF_HUB_OFFLINE"));
        };
        let readable = |name: &&String| DATA_ENDINGS.iter().any(|ending| name.ends_with(ending));
        let data: BTreeSet<String> = remote.names.iter().filter(readable).cloned().collect();
        let alone = |name: &&String| name.split(['/', '-', '.', '_']).any(|part| part == split);
        let chosen: Vec<String> = data.iter().filter(alone).cloned().collect();
        match (chosen.is_empty(), data.len()) {
            (false, _) => Ok(chosen),
            (true, 1) if split == "train" => Ok(data.into_iter().collect()),
            _ => Err(Error::run(format!("no JSONL or Parquet file of the split `{split}`"))
                .at(&self.place)
                .hint(format!("the repository has: {}", list(&remote.names)))),
        }
    }
}

/// The first few names.
fn list(names: &BTreeSet<String>) -> String {
    let shown: Vec<&str> = names.iter().take(12).map(String::as_str).collect();
    let more = names.len().saturating_sub(shown.len());
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", shown.join(", "))
}

/// The files listed in a sharded checkpoint's index.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let value: Value = store::read_json(index)?;
    let map = value.get("weight_map").and_then(Value::as_object);
    let map =
        map.ok_or_else(|| Error::run("missing the object `weight_map`").at(index.display()))?;
    Ok(map.values().filter_map(Value::as_str).map(str::to_owned).collect())
}

fn failed(place: &str, error: ApiError) -> Error {
    let text = error.to_string();
    let failed = Error::run(format!("cannot fetch: {text}")).because(error).at(place);
    if text.contains("401") || text.contains("403") {
        failed.hint("set HF_TOKEN to a token that may read this repository")
    } else if text.contains("404") {
        failed.hint("no such repository or revision; a private one needs HF_TOKEN")
    } else {
        failed.hint("check the connection and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses the cache alone")
    }
}

#[cfg(test)]
mod tests;
