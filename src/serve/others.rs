//! The smaller endpoints: embeddings, tokenize and detokenize, scores.

use serde_json::{Map, Value, json};

use super::chat::Conversation;
use super::completions::Texts;
use super::engine::{Embed, Judged, Pooling};
use super::fields::Fields;
use super::problem::Problem;
use super::served::{Served, check_ids, in_base64};
use super::tools::Tools;
use crate::data::record::Message;

/// Most texts or answers per request: OpenAI's limit for embeddings.
const MOST: usize = 2048;

fn at_most(count: usize, what: &str) -> Result<(), Problem> {
    if count <= MOST {
        return Ok(());
    }
    Err(Problem::invalid(format!("{count} items in `{what}`, expected {MOST} at most")).on(what))
}

/// `POST /v1/embeddings`: output options.
pub(super) struct Embeddings {
    tokens: usize,
    base64: bool,
    dimensions: Option<usize>,
}

impl Embeddings {
    /// Reads a request.
    ///
    /// # Errors
    /// An unsupported request.
    pub(super) fn parse(served: &Served, body: &[u8]) -> Result<(Embed, Self), Problem> {
        let mut fields = Fields::parse(body)?;
        served.take_name(&mut fields)?;
        let input: Texts = fields.need("input")?;
        let encoding: Option<String> = fields.take("encoding_format")?;
        let pooling = fields.take("pooling")?.unwrap_or(Pooling::Mean);
        let add_special = fields.take("add_special_tokens")?.unwrap_or(true);
        let dimensions: Option<usize> = fields.take("dimensions")?;
        fields.finish()?;
        let base64 = match encoding.as_deref() {
            None | Some("float") => false,
            Some("base64") => true,
            Some(other) => {
                let message = format!("`encoding_format` is \"{other}\", expected float or base64");
                return Err(Problem::invalid(message).on("encoding_format"));
            }
        };
        at_most(input.count(), "input")?;
        let texts: Vec<Vec<u32>> =
            input.encode(served, add_special)?.into_iter().map(|(_, ids)| ids).collect();
        let positions = served.limits.max_positions;
        if let Some((place, ids)) = texts.iter().enumerate().find(|(_, ids)| ids.len() > positions)
        {
            let len = ids.len();
            let message =
                format!("input {place} has {len} tokens, and the model {positions} positions");
            return Err(Problem::invalid(message).on("input").code("context_length_exceeded"));
        }
        let tokens = texts.iter().map(Vec::len).sum();
        Ok((Embed { texts, pooling }, Self { tokens, base64, dimensions }))
    }

    /// The response body.
    ///
    /// # Errors
    /// A dimension other than requested.
    pub(super) fn answer(&self, name: &str, vectors: &[Vec<f32>]) -> Result<Value, Problem> {
        let width = vectors.first().map_or(0, Vec::len);
        if let Some(dimensions) = self.dimensions.filter(|dimensions| *dimensions != width) {
            let message = format!("`dimensions` is {dimensions}, expected the model's {width}");
            return Err(Problem::invalid(message).on("dimensions"));
        }
        let object = |(index, vector): (usize, &Vec<f32>)| {
            let embedding = if self.base64 { json!(in_base64(vector)) } else { json!(vector) };
            json!({"object": "embedding", "index": index, "embedding": embedding})
        };
        let data: Vec<Value> = vectors.iter().enumerate().map(object).collect();
        let usage = json!({"prompt_tokens": self.tokens, "total_tokens": self.tokens});
        Ok(json!({"object": "list", "data": data, "model": name, "usage": usage}))
    }
}

/// `POST /tokenize`, for a text or a conversation.
///
/// # Errors
/// An unsupported request.
pub(super) fn tokenize(served: &Served, body: &[u8]) -> Result<Value, Problem> {
    let mut fields = Fields::parse(body)?;
    let voice = served.take_voice(&mut fields)?;
    let prompt: Option<String> = fields.take("prompt")?;
    let add_special: Option<bool> = fields.take("add_special_tokens")?;
    let with_texts = fields.take("return_token_strs")?.unwrap_or(false);
    let ids = if let Some(prompt) = prompt {
        fields.finish()?;
        served.encode(&prompt, add_special.unwrap_or(true))?
    } else {
        let conversation = Conversation::take(&mut fields)?;
        let tools = Tools::take(&mut fields)?;
        fields.finish()?;
        let tokenizer = voice.tokenizer(served);
        let mut ids = conversation.encode(tokenizer, tools.described.as_ref())?;
        // Templates write them where they belong.
        if add_special.unwrap_or(false) {
            tokenizer.begin(&mut ids);
        }
        ids
    };
    let texts: Option<Vec<String>> = with_texts.then(|| {
        ids.iter().map(|&id| String::from_utf8_lossy(served.bytes(id)).into_owned()).collect()
    });
    let (count, positions) = (ids.len(), served.limits.max_positions);
    Ok(json!({"count": count, "max_model_len": positions, "tokens": ids, "token_strs": texts}))
}

/// `POST /detokenize`.
///
/// # Errors
/// An unsupported request.
pub(super) fn detokenize(served: &Served, body: &[u8]) -> Result<Value, Problem> {
    let mut fields = Fields::parse(body)?;
    served.take_name(&mut fields)?;
    let ids: Vec<u32> = fields.need("tokens")?;
    fields.finish()?;
    check_ids(&ids, served)?;
    Ok(json!({"prompt": served.tokenizer().decode(&ids, false)}))
}

/// `POST /score`: parses the answers to score.
///
/// # Errors
/// An unsupported request; a server without a reward model.
pub(super) fn judged(judge: Option<&str>, body: &[u8]) -> Result<Judged, Problem> {
    let Some(judge) = judge else {
        let message = "no reward model is served; start the server with --reward-model";
        return Err(Problem::invalid(message).code("no_reward_model"));
    };
    let mut fields = Fields::parse(body)?;
    let name: Option<String> = fields.take("model")?;
    let prompt: Option<String> = fields.take("prompt")?;
    let answers: Vec<String> = fields.need("completions")?;
    let (prompt, tools) = if let Some(prompt) = prompt {
        fields.finish()?;
        (vec![Message::new("user", prompt)], None)
    } else {
        let Conversation { messages, template_kwargs } = Conversation::take(&mut fields)?;
        let tools = Tools::take(&mut fields)?;
        fields.finish()?;
        if template_kwargs != Map::new() {
            let message = "`chat_template_kwargs` are not for the reward model";
            return Err(Problem::invalid(message).on("chat_template_kwargs"));
        }
        (messages, tools.described)
    };
    if let Some(name) = name.filter(|name| name != judge) {
        return Err(Problem::no_model(&name, &[judge.to_owned()]));
    }
    if answers.is_empty() {
        return Err(Problem::invalid("`completions` is empty").on("completions"));
    }
    at_most(answers.len(), "completions")?;
    Ok(Judged { prompt, tools, first: 0, answers })
}

/// The response body with the scores of the reward model of this name.
pub(super) fn scores(judge: Option<&str>, scores: &[f64]) -> Value {
    let object =
        |(index, score): (usize, &f64)| json!({"object": "score", "index": index, "score": score});
    let data: Vec<Value> = scores.iter().enumerate().map(object).collect();
    json!({"object": "list", "data": data, "model": judge})
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::Device;

    use super::*;
    use crate::data::tokenizer::{ChatTokenizer, TokenizerSettings};
    use crate::generate::sampling::WeightFormat;
    use crate::model::checkpoint::Checkpoint;
    use crate::serve::voices::Voices;

    #[test]
    fn special_tokens_default_on_for_text_and_off_for_conversations() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny/student");
        let mut model = Checkpoint::load_dir(&dir, &Device::Cpu).unwrap();
        let own = model.tokenizer().unwrap();
        let settings = TokenizerSettings { add_bos: true, ..own.settings().clone() };
        let bos = settings.bos.unwrap();
        model.tokenizer = Some(ChatTokenizer::new(own.inner().clone(), settings).unwrap());
        let voices = Voices::new(None, false);
        let served =
            Served::new(model, vec!["tiny".to_owned()], WeightFormat::None, voices).unwrap();
        let first = |body: Value| {
            let answer = tokenize(&served, body.to_string().as_bytes()).unwrap();
            answer["tokens"][0].as_u64() == Some(u64::from(bos))
        };
        let with = |add: Value, key: &str, asked: Value| {
            first(json!({key: asked, "add_special_tokens": add}))
        };
        let messages = json!([{"role": "user", "content": "Tom"}]);
        for (add, text, conversation) in
            [(Value::Null, true, false), (json!(true), true, true), (json!(false), false, false)]
        {
            assert_eq!(with(add.clone(), "prompt", json!("Tom")), text, "{add}");
            assert_eq!(with(add.clone(), "messages", messages.clone()), conversation, "{add}");
        }
    }
}
