//! Resolves `model_name_or_path`: a directory (also a stage's or a run's), a GGUF file, or a hub repository.

use std::path::{Path, PathBuf};

use super::hub::{Hub, is_gguf};
use super::run_dir;
use crate::error::{Error, Result, did_you_mean};
use crate::store;

/// A model on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A Hugging Face directory.
    Directory(PathBuf),
    /// A GGUF file.
    Gguf(PathBuf),
}

/// Finds a model, downloading it from the hub if the name is neither a directory nor a file.
///
/// A hub name is `org/name`, or `org/name:file.gguf` for a GGUF file in that repository.
///
/// # Errors
/// A path that does not exist, an unknown kind of file, a run of several models, and all of [`Hub::model`].
pub fn resolve(name_or_path: &str, revision: Option<&str>) -> Result<Source> {
    match local(name_or_path)? {
        Some(source) => Ok(source),
        None => remote(&Hub::from_env()?, name_or_path, revision),
    }
}

fn local(name_or_path: &str) -> Result<Option<Source>> {
    let path = Path::new(name_or_path);
    if path.is_dir() {
        return Ok(Some(Source::Directory(run_dir::model(path)?)));
    }
    if path.is_file() {
        return match path.extension().and_then(|ending| ending.to_str()) {
            Some("gguf") => Ok(Some(Source::Gguf(path.to_path_buf()))),
            Some("safetensors") => Err(Error::run("a safetensors file alone is not a model")
                .at(path.display())
                .hint("give the directory that holds it and config.json")),
            _ => Err(Error::run("not a model")
                .at(path.display())
                .hint("give a Hugging Face directory, a .gguf file or a hub id")),
        };
    }
    if is_hub_name(name_or_path) && !parent_exists(path) {
        return Ok(None);
    }
    Err(missing(path))
}

fn remote(hub: &Hub, name: &str, revision: Option<&str>) -> Result<Source> {
    match name.split_once(':') {
        Some((id, file)) => Ok(Source::Gguf(hub.model_file(id, revision, file)?)),
        None => Ok(Source::Directory(hub.model(name, revision)?)),
    }
}

/// `org/name` with an optional `:file.gguf`, in characters the hub allows.
fn is_hub_name(name: &str) -> bool {
    let (id, file) = name.split_once(':').map_or((name, None), |(id, file)| (id, Some(file)));
    let allowed = |part: &str| {
        let letters = part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        let begins = part.chars().next().is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
        begins && letters
    };
    let is_id = id.split_once('/').is_some_and(|(org, name)| allowed(org) && allowed(name));
    let is_file = file.is_none_or(is_gguf);
    is_id && is_file && (file.is_some() || !is_gguf(id))
}

/// If `runs` is a directory here, `runs/mine` is a mistyped path rather than a hub id.
fn parent_exists(path: &Path) -> bool {
    path.parent().is_some_and(|parent| !parent.as_os_str().is_empty() && parent.is_dir())
}

fn missing(path: &Path) -> Error {
    let error = Error::run("no such model directory or file").at(path.display());
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let beside = store::entries(parent.unwrap_or(Path::new("."))).unwrap_or_default();
    let names: Vec<String> = beside
        .iter()
        .filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
        .collect();
    let wanted = path.file_name().map(|name| name.to_string_lossy().into_owned());
    match did_you_mean(&wanted.unwrap_or_default(), names.iter().map(String::as_str)) {
        Some(near) => error.hint(format!("did you mean `{near}`?")),
        None => error.hint("give a Hugging Face directory, a .gguf file or a hub id like org/name"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_names_are_distinguished_from_paths() {
        let hub =
            ["org/name", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b:q4.gguf", "a/b:x/y.gguf"];
        for name in hub {
            assert!(is_hub_name(name), "{name}");
        }
        let paths = ["", "model", "./a/b", "../a", "/a/b", "~/a", "a/b/c", "a/b.gguf", "a/b:c.bin"];
        for name in paths {
            assert!(!is_hub_name(name), "{name}");
        }
    }

    #[test]
    fn missing_path_error_suggests_the_most_similar_name() {
        let dir = tempfile::tempdir().unwrap();
        store::create_dir(&dir.path().join("checkpoint")).unwrap();
        let path = dir.path().join("chekpoint");
        let error = resolve(path.to_str().unwrap(), None).unwrap_err();
        assert!(error.to_string().contains("no such model directory"), "{error}");
        assert_eq!(error.hint_text(), Some("did you mean `checkpoint`?"));
    }

    #[test]
    fn stage_directory_resolves_to_its_checkpoint() {
        let stage = tempfile::tempdir().unwrap();
        let checkpoint = stage.path().join("checkpoint");
        store::write_atomic(&checkpoint.join("config.json"), b"{}").unwrap();
        let found = resolve(stage.path().to_str().unwrap(), None).unwrap();
        assert_eq!(found, Source::Directory(checkpoint));
    }

    #[test]
    fn unsupported_model_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["model.safetensors", "notes.txt"] {
            let path = dir.path().join(name);
            store::write_atomic(&path, b"x").unwrap();
            assert!(resolve(path.to_str().unwrap(), None).is_err());
        }
        let found = resolve(dir.path().to_str().unwrap(), None).unwrap();
        assert_eq!(found, Source::Directory(dir.path().to_path_buf()));
    }
}
