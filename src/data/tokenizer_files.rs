//! The files next to `tokenizer.json` that define the begin, end and padding tokens and the chat template.

use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use super::tokenizer::TokenizerSettings;
use crate::error::{Context, Error, Result};
use crate::store;

/// Reads the settings from a Hugging Face directory.
pub(super) fn read_settings(dir: &Path, tokenizer: &Tokenizer) -> Result<TokenizerSettings> {
    let config = read(dir, "tokenizer_config.json")?;
    let map = read(dir, "special_tokens_map.json")?;
    let named = |key: &str| token_text(config.get(key)).or_else(|| token_text(map.get(key)));
    let id = |key: &str| named(key).and_then(|text| tokenizer.token_to_id(&text));
    let mut ends: Vec<u32> = id("eos_token").into_iter().collect();
    for file in ["generation_config.json", "config.json"] {
        let eos = read(dir, file)?.get("eos_token_id").cloned().unwrap_or_default();
        let ids = match eos {
            Value::Array(ids) => ids,
            other => vec![other],
        };
        for id in ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()) {
            // A config may name ids from a larger vocabulary than this tokenizer's.
            if !ends.contains(&id) && tokenizer.id_to_token(id).is_some() {
                ends.push(id);
            }
        }
    }
    let bos = id("bos_token");
    let asked = config.get("add_bos_token").and_then(Value::as_bool);
    let first = tokenizer.encode("", true)?.get_ids().first().copied();
    Ok(TokenizerSettings {
        chat_template: chat_template(dir, &config)?,
        bos,
        eos: id("eos_token").or_else(|| ends.first().copied()),
        ends,
        pad: id("pad_token"),
        add_bos: bos.is_some() && asked.unwrap_or(first == bos),
    })
}

fn chat_template(dir: &Path, config: &Map<String, Value>) -> Result<Option<String>> {
    // Newer transformers versions write the template to a separate file, which takes precedence.
    let file = dir.join("chat_template.jinja");
    if file.exists() {
        return std::fs::read_to_string(&file).at(file.display()).map(Some);
    }
    Ok(match config.get("chat_template") {
        Some(Value::String(source)) => Some(source.clone()),
        // Several named templates: the one called `default`, or the first.
        Some(Value::Array(named)) => named
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
            .or(named.first())
            .and_then(|entry| entry.get("template").and_then(Value::as_str).map(str::to_owned)),
        _ => None,
    })
}

fn read(dir: &Path, name: &str) -> Result<Map<String, Value>> {
    let path = dir.join(name);
    if !path.exists() {
        return Ok(Map::new());
    }
    let text = std::fs::read_to_string(&path).at(path.display())?;
    serde_json::from_str(&text)
        .map_err(|error| Error::run(format!("not a JSON object: {error}")))
        .at(path.display())
}

fn token_text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) => Some(text.clone()),
        Value::Object(token) => token.get("content").and_then(Value::as_str).map(str::to_owned),
        _ => None,
    }
}

/// Writes the three files.
pub(super) fn write(dir: &Path, tokenizer: &Tokenizer, settings: &TokenizerSettings) -> Result<()> {
    store::write_atomic(&dir.join("tokenizer.json"), tokenizer.to_string(true)?.as_bytes())?;
    let mut named = Map::new();
    for (key, id) in
        [("bos_token", settings.bos), ("eos_token", settings.eos), ("pad_token", settings.pad)]
    {
        if let Some(text) = id.and_then(|id| tokenizer.id_to_token(id)) {
            named.insert(key.to_owned(), Value::String(text));
        }
    }
    store::write_json(&dir.join("special_tokens_map.json"), &Value::Object(named.clone()))?;
    let mut config = named;
    config.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
    config.insert("add_bos_token".to_owned(), json!(settings.add_bos));
    config.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
    if let Some(template) = &settings.chat_template {
        config.insert("chat_template".to_owned(), json!(template));
    }
    store::write_json(&dir.join("tokenizer_config.json"), &Value::Object(config))
}
