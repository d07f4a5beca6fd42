//! The top-level keys of a recipe: name, seed, rounds, device, output directory.

use std::path::{Path, PathBuf};

use super::file::{Entry, RecipeFile};
use super::keys::{self, suggestion};
use super::plan::Kind;
use crate::error::{Error, Result};

/// Keys at the top of a recipe.
pub const TOP_KEYS: [&str; 6] = ["name", "description", "seed", "rounds", "device", "output_dir"];

/// The top-level keys, resolved.
pub(super) struct Top {
    pub(super) name: String,
    pub(super) seed: u64,
    pub(super) rounds: u32,
    pub(super) device: String,
    pub(super) output_dir: PathBuf,
}

impl Top {
    /// Reads them from a recipe.
    pub(super) fn read(file: &RecipeFile) -> Result<Self> {
        let stem = file.path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let mut top = Self {
            name: stem,
            seed: 0,
            rounds: 1,
            device: "cpu".to_owned(),
            output_dir: PathBuf::new(),
        };
        for entry in &file.top {
            top.set(entry).map_err(|error| error.at(file.describe(&entry.place)))?;
        }
        if top.output_dir.as_os_str().is_empty() {
            top.output_dir = Path::new("runs").join(&top.name);
        }
        if file.stages.is_empty() {
            return Err(Error::usage("the recipe has no stages")
                .at(file.path.display())
                .hint("write a [[stage]] block with kind = \"sft\" or another kind"));
        }
        Ok(top)
    }

    fn set(&mut self, entry: &Entry) -> Result<()> {
        let wrong = |expected: &str| {
            Error::usage(format!("`{}` is {}, expected {expected}", entry.key, entry.value))
        };
        let text = || entry.value.as_str().map(str::to_owned).ok_or_else(|| wrong("text"));
        match entry.key.as_str() {
            "name" => self.name = text()?,
            "description" => {
                text()?;
            }
            "seed" => {
                self.seed =
                    entry.value.as_u64().ok_or_else(|| wrong("a whole number, 0 or more"))?;
            }
            "rounds" => {
                self.rounds = entry
                    .value
                    .as_u64()
                    .and_then(|rounds| u32::try_from(rounds).ok())
                    .filter(|rounds| (1..=1000).contains(rounds))
                    .ok_or_else(|| wrong("a whole number from 1 to 1000"))?;
            }
            "device" => self.device = device(&text()?)?,
            "output_dir" => self.output_dir = PathBuf::from(text()?),
            other => return Err(unknown_top(other)),
        }
        Ok(())
    }
}

fn unknown_top(key: &str) -> Error {
    let error = Error::usage(format!("unknown key `{key}`"));
    let of_a_stage = Kind::ALL
        .iter()
        .filter_map(|&kind| Some((kind, keys::known(kind).ok()?)))
        .find(|(_, known)| keys::canonical(key, known).is_some());
    match of_a_stage {
        Some((kind, _)) => error.hint(format!(
            "it is a key of stages: write {}.{key} = … on the command line, or put it in [defaults] or a [[stage]]",
            kind.name()
        )),
        None => error.hint(suggestion(key, &TOP_KEYS)),
    }
}

/// `cpu` or `cuda:N`.
fn device(text: &str) -> Result<String> {
    let wrong = || {
        Error::usage(format!("`device` is \"{text}\", expected \"cpu\" or \"cuda:N\""))
            .hint("N counts the GPUs from 0")
    };
    match text.split_once(':') {
        None if text == "cpu" => Ok(text.to_owned()),
        None if text == "cuda" => Ok("cuda:0".to_owned()),
        Some(("cuda", index)) => {
            index.parse::<usize>().map_err(|_| wrong())?;
            Ok(text.to_owned())
        }
        _ => Err(wrong()),
    }
}
