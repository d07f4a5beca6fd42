//! The tokenizer in a GGUF file's metadata.

use std::collections::BTreeMap;

use candle_core::quantized::gguf_file::Value;
use serde_json::Value as Json;

use super::gguf::Metadata;
use crate::data::tokenizer::ChatTokenizer;
use crate::error::{Context, Error, Result};
use crate::model::checkpoint::Checkpoint;
use crate::model::gguf_tokenizer::{self, kind};

/// Tokens, their types, merges, the pre-tokenizer, special ids and the chat template.
///
/// # Errors
/// No tokenizer, or one that is not byte-level BPE with a pre-tokenizer known to llama.cpp.
pub(super) fn metadata(checkpoint: &Checkpoint) -> Result<Metadata> {
    let tokenizer = checkpoint.tokenizer()?;
    let text = tokenizer.inner().to_string(false)?;
    let json: Json = serde_json::from_str(&text)?;
    let pre = gguf_tokenizer::pre_name(&json)?;
    let (tokens, kinds) = tokens(checkpoint, tokenizer);
    let strings = |list: Vec<String>| Value::Array(list.into_iter().map(Value::String).collect());
    let mut metadata = Metadata::new();
    let mut put = |key: &str, value: Value| metadata.push((format!("tokenizer.{key}"), value));
    put("ggml.model", Value::String("gpt2".to_owned()));
    put("ggml.pre", Value::String(pre.to_owned()));
    put("ggml.tokens", strings(tokens));
    put("ggml.token_type", Value::Array(kinds.into_iter().map(Value::I32).collect()));
    put("ggml.merges", strings(merges(&json)?));
    let settings = tokenizer.settings();
    let bos = settings.bos.or(checkpoint.config.bos_token_id);
    let mut ends = checkpoint.ends();
    // End of text first, then of turn and of message.
    ends.sort_by_key(|id| Some(*id) != settings.eos);
    let names = ["eos_token_id", "eot_token_id", "eom_token_id"];
    for (name, id) in names.iter().zip(&ends) {
        put(&format!("ggml.{name}"), Value::U32(*id));
    }
    for (name, id) in [("bos_token_id", bos), ("padding_token_id", settings.pad)] {
        if let Some(id) = id {
            put(&format!("ggml.{name}"), Value::U32(id));
        }
    }
    put("ggml.add_bos_token", Value::Bool(settings.add_bos));
    if let Some(template) = &settings.chat_template {
        put("chat_template", Value::String(template.clone()));
    }
    Ok(metadata)
}

/// Text and type of each embedding row. Rows without a token get a name that occurs in no text.
fn tokens(checkpoint: &Checkpoint, tokenizer: &ChatTokenizer) -> (Vec<String>, Vec<i32>) {
    let added: BTreeMap<u32, bool> = tokenizer
        .inner()
        .get_added_tokens_decoder()
        .into_iter()
        .map(|(id, token)| (id, token.special))
        .collect();
    let ends = checkpoint.ends();
    let settings = tokenizer.settings();
    let rows = 0..checkpoint.config.vocab_size as u32;
    let token = |id: u32| {
        let named = ends.contains(&id) || settings.bos == Some(id) || settings.pad == Some(id);
        match (tokenizer.token(id), added.get(&id)) {
            (None, _) => (format!("[PAD{id}]"), kind::UNUSED),
            (Some(token), special) if named || special == Some(&true) => (token, kind::CONTROL),
            (Some(token), Some(_)) => (token, kind::USER_DEFINED),
            (Some(token), None) => (token, kind::NORMAL),
        }
    };
    rows.map(token).map(|(token, kind)| (token, kind as i32)).unzip()
}

/// Merges as `left right`, best first.
fn merges(json: &Json) -> Result<Vec<String>> {
    let list = json["model"]["merges"].as_array().map_or(&[][..], Vec::as_slice);
    let merges: Option<Vec<String>> = list
        .iter()
        .map(|merge| match merge {
            Json::String(text) => Some(text.clone()),
            Json::Array(pair) => match pair.as_slice() {
                [left, right] => Some(format!("{} {}", left.as_str()?, right.as_str()?)),
                _ => None,
            },
            _ => None,
        })
        .collect();
    merges.ok_or_else(|| Error::run("merges that are not pairs of tokens")).at("tokenizer.json")
}
