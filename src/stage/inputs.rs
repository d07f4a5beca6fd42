//! Hashes what a stage's outputs depend on: its settings, the contents of everything it reads, its seed, and the
//! version of its kind. Paths and the binary are not part of it.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::data::paths;
use crate::error::{Context, Error, Result};
use crate::generate::openai::spec::ServerSpec;
use crate::model::{hub, run_dir};
use crate::recipe::keys::INPUT_KEYS;
use crate::recipe::{Step, refs};
use crate::store;

/// Keys that name a model (as text) or a server (as a table).
const SERVER_KEYS: [&str; 2] = ["teacher", "judge"];
/// Keys that decide what happens to rows that cannot be answered or judged, each with its table. Like a server's keys
/// they do not affect finished work: on hitting such a row, one can add the key and resume the run.
const PATIENCE: [(&str, &str); 2] = [("sampling", "skip_refused"), ("scorers", "on_error")];

/// Keys whose directories contain rows, not a model.
const DATA_KEYS: [&str; 3] = ["path", "earlier", "data"];

/// Content hashes of paths, each computed once per process.
#[derive(Debug, Default)]
pub struct Hashes {
    known: BTreeMap<String, String>,
}

/// The inputs that determine a stage's outputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Inputs {
    /// The combined hash.
    pub hash: String,
    /// Content hash of every input, by path.
    pub contents: BTreeMap<String, String>,
    /// The settings as planned; informational.
    pub settings: Value,
}

impl Hashes {
    /// Hashes everything `step` depends on.
    ///
    /// # Errors
    /// A missing input.
    pub fn of(&mut self, step: &Step) -> Result<Inputs> {
        let settings = serde_json::to_value(&step.spec)?;
        let mut contents = BTreeMap::new();
        let addressed = self.replace("", settings.clone(), &mut contents)?;
        let kind = step.spec.kind();
        let all = json!({
            "kind": kind.name(),
            "version": kind.version(),
            "seed": step.seed,
            "round": step.round,
            "settings": addressed,
        });
        Ok(Inputs { hash: store::sha256_bytes(all.to_string().as_bytes()), contents, settings })
    }

    /// Forgets the hashes of a path and everything below it, because it was rewritten.
    pub fn forget(&mut self, path: &Path) {
        self.known.retain(|known, _| !Path::new(known).starts_with(path));
    }

    /// Replaces everything that names an input by its content hash, at any depth, and reduces a server to the keys that
    /// determine its answers. `key` is the value's own key; `contents` collects the hashes by path.
    ///
    /// # Errors
    /// A missing input.
    pub(super) fn replace(
        &mut self,
        key: &str,
        value: Value,
        contents: &mut BTreeMap<String, String>,
    ) -> Result<Value> {
        Ok(match value {
            Value::String(text) if INPUT_KEYS.contains(&key) && !text.is_empty() => {
                let hash = self.content(key, &text)?;
                contents.insert(text, hash.clone());
                Value::String(hash)
            }
            Value::Array(list) => {
                let list = list.into_iter().map(|item| self.replace(key, item, contents));
                Value::Array(list.collect::<Result<_>>()?)
            }
            Value::Object(mut table) => {
                // For a server, only what determines its answers: not its address, nor the request rate.
                if SERVER_KEYS.contains(&key) {
                    ServerSpec::deciding(&mut table);
                }
                table.retain(|inner, _| !PATIENCE.contains(&(key, inner.as_str())));
                let mut replaced = serde_json::Map::new();
                for (key, value) in table {
                    let value = self.replace(&key, value, contents)?;
                    replaced.insert(key, value);
                }
                Value::Object(replaced)
            }
            other => other,
        })
    }

    /// The content hash of what `text` names as the value of `key`: a path, a glob, or a hub id at its commit.
    ///
    /// # Errors
    /// Nothing with that name.
    pub(super) fn content(&mut self, key: &str, text: &str) -> Result<String> {
        if let Some(known) = self.known.get(text) {
            return Ok(known.clone());
        }
        let path = Path::new(text);
        let hash = if path.is_dir() && !DATA_KEYS.contains(&key) {
            // In a stage or run directory only the model counts: logs and reports next to it may be rewritten.
            store::sha256_path(&run_dir::model(path).at(format_args!("`{key}`"))?)?
        } else if path.exists() {
            store::sha256_path(path)?
        } else if text.contains(['*', '?']) {
            let mut files = String::new();
            for file in paths::files(text, None)? {
                files.push_str(&store::sha256_file(&file)?);
            }
            store::sha256_bytes(files.as_bytes())
        } else if key == "chat_template" {
            // A built-in template is identified by its name.
            text.to_owned()
        } else if refs::is_hub_id(text) {
            // A branch moves: work made from an earlier commit does not match this one.
            format!("{text}@{}", hub::commit(text, key == "path").at(format_args!("`{key}`"))?)
        } else {
            return Err(Error::run(format!("`{text}` is not there"))
                .at(format_args!("`{key}`"))
                .hint("an earlier stage's output was removed, or a file was moved"));
        };
        self.known.insert(text.to_owned(), hash.clone());
        Ok(hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stage_used_as_a_model_is_hashed_by_its_checkpoint_alone() {
        let stage = tempfile::tempdir().unwrap();
        let checkpoint = stage.path().join("checkpoint");
        store::write_atomic(&checkpoint.join("config.json"), b"{}").unwrap();
        let of = |key: &str, path: &Path| {
            Hashes::default().content(key, path.to_str().unwrap()).unwrap()
        };
        let (model, rows) = (of("model_name_or_path", &checkpoint), of("path", stage.path()));
        store::write_atomic(&stage.path().join("metrics.jsonl"), b"{}\n").unwrap();
        assert_eq!(of("model_name_or_path", stage.path()), model);
        assert_ne!(of("path", stage.path()), rows);
    }

    #[test]
    fn keys_for_unusable_rows_do_not_affect_reuse_of_finished_work() {
        let settings = |patience: Value| {
            let mut scorer = json!({"reward_model": "", "weight": 2.0});
            let mut sampling = json!({"seed": 1});
            if patience != Value::Null {
                scorer["on_error"] = patience;
                sampling["skip_refused"] = json!(true);
            }
            let policies = json!([{"name": "code", "sampling": sampling}]);
            json!({"sampling": sampling, "scorers": [scorer], "policies": policies})
        };
        let replaced = |value| Hashes::default().replace("", value, &mut BTreeMap::new()).unwrap();
        assert_eq!(replaced(settings(Value::Null)), settings(Value::Null));
        assert_eq!(replaced(settings(json!("fail"))), settings(Value::Null));
        // Elsewhere these names have no special meaning.
        let columns = json!({"columns": {"on_error": "x", "skip_refused": "y"}});
        assert_eq!(replaced(columns.clone()), columns);
    }
}
