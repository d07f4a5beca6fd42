//! Normalizes the shapes in which values may be written to that of the plan; references become paths.

use std::path::Path;

use serde_json::{Map, Value};

use super::file::{Entry, Place};
use super::keys;
use super::refs::Scope;
use crate::error::{Error, Result};
use crate::model::lora::ALL_LINEAR;

/// Expands keys that combine several settings into one key per setting.
///
/// # Errors
/// `loss_weights` whose length differs from the list of losses; `bf16` with a conflicting `dtype`.
pub(super) fn expand(entries: &[Entry]) -> Result<Vec<Entry>> {
    let has = |key: &str| entries.iter().any(|entry| entry.key == key);
    let lists_losses = |entry: &Entry| {
        keys::alias(&entry.key) == "loss_type" && (entry.value.is_array() || entry.value == "sft")
    };
    let losses_listed = entries.iter().any(lists_losses);
    let mut expanded = Vec::new();
    let mut scorers = Vec::new();
    for entry in entries {
        let with = |key: &str, value: Value| Entry {
            key: key.to_owned(),
            value,
            place: entry.place.clone(),
        };
        match (entry.key.as_str(), &entry.value) {
            // A single scorer needs no table.
            ("verifier" | "reward_model", Value::String(_)) if !has("scorers") => {
                let mut scorer = Map::new();
                scorer.insert(entry.key.clone(), entry.value.clone());
                scorers.push(Value::Object(scorer));
                expanded.retain(|entry: &Entry| entry.key != "scorers");
                expanded.push(with("scorers", Value::Array(scorers.clone())));
            }
            _ if lists_losses(entry) => {
                let weights = entries.iter().find(|entry| entry.key == "loss_weights");
                expanded.extend(losses(entry, weights)?);
            }
            ("loss_weights", Value::Array(_)) if losses_listed => {}
            // axolotl and torchtune use the opposite flag.
            ("train_on_inputs" | "train_on_input" | "train_on_prompt", Value::Bool(all)) => {
                expanded.push(with("assistant_only_loss", Value::Bool(!all)));
                expanded.push(with("completion_only_loss", Value::Bool(!all)));
            }
            // LLaMA-Factory and axolotl name the method, TRL and axolotl the bits.
            ("finetuning_type" | "adapter", Value::String(method)) => {
                let peft = ["lora", "qlora", "dora"].contains(&method.as_str());
                if !peft && method != "full" {
                    return Err(Error::usage(format!(
                        "`{}` is {method}, expected full, lora, qlora or dora",
                        entry.key
                    )));
                }
                expanded.push(with("use_peft", Value::Bool(peft)));
                if method == "dora" {
                    expanded.push(with("use_dora", Value::Bool(true)));
                }
                if method == "qlora" && !has("quantization") && !has("load_in_4bit") {
                    expanded.push(with("quantization", Value::from("nf4")));
                }
            }
            ("load_in_4bit", Value::Bool(four)) => {
                expanded
                    .push(with("quantization", Value::from(if *four { "nf4" } else { "none" })));
            }
            ("bf16", _) => expanded.extend(bf16(entry, entries)?),
            ("mask_history", Value::Bool(_)) => {
                expanded.push(with("final_response_only", entry.value.clone()));
            }
            _ => expanded.push(entry.clone()),
        }
    }
    Ok(expanded)
}

/// The entries of `[defaults]` for a stage that writes `own`. A key that the stage writes under any of its names is left
/// out before it is expanded: none of the settings that it combines may stay behind.
pub(super) fn beside(own: &[Entry], defaults: &[Entry]) -> Vec<Entry> {
    let writes = |entries: &[Entry], name: &str| {
        entries.iter().any(|entry| keys::written(&entry.key) == name)
    };
    let applies = |entry: &&Entry| match keys::written(&entry.key) {
        // They weigh the losses beside them.
        "loss_weights" if writes(defaults, "loss_type") => !writes(own, "loss_type"),
        name => !writes(own, name),
    };
    defaults.iter().filter(applies).cloned().collect()
}

/// Converts the boolean of Hugging Face, axolotl and LLaMA-Factory to the equivalent `dtype`; `None` if `dtype` is
/// written too. If only one of them is on the command line, that one wins.
fn bf16(entry: &Entry, entries: &[Entry]) -> Result<Option<Entry>> {
    let Value::Bool(on) = entry.value else {
        return Err(Error::usage(format!("`bf16` is {}, expected true or false", entry.value))
            .hint("true is dtype = \"bf16\""));
    };
    let is_argument = |entry: &Entry| matches!(entry.place, Place::Argument(_));
    let written = entries.iter().find(|other| keys::alias(&other.key) == "dtype");
    if let Some(other) = written.filter(|other| is_argument(other) || !is_argument(entry)) {
        let agrees = (other.value == "bf16" || other.value == "bfloat16") == on;
        if agrees || (is_argument(other) && !is_argument(entry)) {
            return Ok(None);
        }
        let (key, value) = (&other.key, &other.value);
        return Err(Error::usage(format!("`bf16` is {on} and `{key}` is {value}"))
            .hint("keep one of the two"));
    }
    let value = Value::from(if on { "bf16" } else { "f32" });
    Ok(Some(Entry { key: "dtype".to_owned(), value, place: entry.place.clone() }))
}

/// Splits TRL's list of losses with weights into the preference losses and the weight of `sft` as a key of its own.
fn losses(entry: &Entry, weights: Option<&Entry>) -> Result<Vec<Entry>> {
    let listed = match &entry.value {
        Value::Array(list) => list.clone(),
        one => vec![one.clone()],
    };
    let given = weights.and_then(|weights| weights.value.as_array());
    if let Some(given) = given.filter(|given| given.len() != listed.len()) {
        let (weights, losses) = (given.len(), listed.len());
        return Err(Error::usage(format!(
            "`loss_weights` has {weights} entries for {losses} losses"
        ))
        .hint("one weight a loss, or none for 1 each"));
    }
    let (mut kept, mut kept_weights, mut expanded) = (Vec::new(), Vec::new(), Vec::new());
    let with =
        |key: &str, value: Value| Entry { key: key.to_owned(), value, place: entry.place.clone() };
    for (at, loss) in listed.into_iter().enumerate() {
        let weight = given.map_or(Value::from(1.0), |given| given[at].clone());
        if loss == "sft" {
            expanded.push(with("sft_loss_weight", weight));
        } else {
            kept.push(loss);
            kept_weights.push(weight);
        }
    }
    expanded.push(with("loss_type", Value::Array(kept)));
    if let Some(weights) = weights {
        let value = Value::Array(kept_weights);
        expanded.push(Entry {
            key: "loss_weights".to_owned(),
            value,
            place: weights.place.clone(),
        });
    }
    Ok(expanded)
}

/// Wraps a single value in a list where a list is expected; datasets and scorers written as text become tables.
pub(super) fn shaped(key: &str, value: Value, default: &Value) -> Value {
    let value = match (default, value) {
        (Value::Array(_), value @ (Value::String(_) | Value::Number(_) | Value::Object(_))) => {
            Value::Array(vec![value])
        }
        // Its default is none, which shows no list.
        (_, Value::String(role)) if key == "roles_to_train" => return Value::from(vec![role]),
        // TOML has no null: 0 means no limit.
        (_, value) if key == "max_length" && value == 0 => return Value::Null,
        // peft's boolean for a key that has three values here.
        (_, Value::Bool(true)) if key == "init_lora_weights" => return Value::from("default"),
        // axolotl's flag for all projections.
        (_, Value::Bool(true)) if key == "lora_target_modules" => {
            return Value::from(vec![ALL_LINEAR]);
        }
        // Hugging Face's boolean for a key that has three values here.
        (_, Value::Bool(flag)) if key == "gradient_checkpointing" => {
            return Value::from(if flag { "block" } else { "none" });
        }
        // A list of models where one is expected: the first that exists, see `inputs`.
        (Value::String(_), Value::Array(list)) if MODEL_KEYS.contains(&key) => {
            return Value::String(
                list.iter()
                    .map(|value| value.as_str().unwrap_or_default())
                    .collect::<Vec<_>>()
                    .join(OR),
            );
        }
        (_, value) => value,
    };
    let wrap = match key {
        "datasets" | "eval_datasets" => "path",
        "scorers" => "verifier",
        _ => return value,
    };
    let Value::Array(list) = value else { return value };
    list.into_iter()
        .map(|item| match item {
            Value::String(text) => {
                let mut table = Map::new();
                table.insert(wrap.to_owned(), Value::String(text));
                Value::Object(table)
            }
            other => other,
        })
        .collect()
}

const MODEL_KEYS: [&str; 6] = [
    "model_name_or_path",
    "ref_model_name_or_path",
    "base_model",
    "teacher",
    "reference",
    "assistant_model",
];
/// Words for references that are not paths.
const REFERENCES: [&str; 3] = ["stage_start", "base", "none"];
/// Separator between alternative models; no path contains it.
const OR: &str = "\0";

/// Replaces references and relative paths in the values that name inputs.
pub(super) fn inputs(key: &str, value: Value, scope: &Scope<'_>) -> Result<Value> {
    match (key, value) {
        ("ref_model_name_or_path", Value::String(text)) if REFERENCES.contains(&text.as_str()) => {
            Ok(Value::from(match text.as_str() {
                // For the first policy, it is its own start.
                "base" => scope.base.unwrap_or_default(),
                "stage_start" => "",
                word => word,
            }))
        }
        (key, Value::String(text)) if MODEL_KEYS.contains(&key) => {
            first_model(&text, scope).map(Value::String)
        }
        ("chat_template", Value::String(text)) => {
            let beside = scope.home.join(&text);
            let there = !text.is_empty() && !Path::new(&text).exists() && beside.is_file();
            Ok(Value::String(if there { beside.display().to_string() } else { text }))
        }
        ("models" | "earlier", Value::Array(list)) => {
            let mut paths = Vec::new();
            for item in list {
                paths.extend(
                    scope.paths(item.as_str().unwrap_or_default())?.into_iter().map(Value::String),
                );
            }
            Ok(Value::Array(paths))
        }
        ("datasets" | "eval_datasets", Value::Array(list)) => {
            let mut tables = Vec::new();
            for item in list {
                let path = item.get("path").and_then(Value::as_str).unwrap_or_default().to_owned();
                for path in scope.paths(&path)? {
                    let mut table = item.clone();
                    table["path"] = Value::String(path);
                    tables.push(table);
                }
            }
            Ok(Value::Array(tables))
        }
        ("scorers", Value::Array(list)) => {
            let mut scorers = Vec::new();
            for mut scorer in list {
                let mut absent = false;
                for key in ["reward_model", "judge", "tokenizer"] {
                    let Some(model) = scorer.get(key).and_then(Value::as_str) else { continue };
                    match scope.paths(model)?.pop() {
                        Some(path) => scorer[key] = Value::String(path),
                        None => absent = true,
                    }
                }
                if !absent {
                    scorers.push(scorer);
                }
            }
            Ok(Value::Array(scorers))
        }
        (_, value) => Ok(value),
    }
}

fn first_model(alternatives: &str, scope: &Scope<'_>) -> Result<String> {
    for text in alternatives.split(OR).filter(|text| !text.is_empty()) {
        if let Some(path) = scope.paths(text)?.pop() {
            return Ok(path);
        }
    }
    // Empty means "none": the spec's check refuses it where a model is required.
    Ok(String::new())
}
