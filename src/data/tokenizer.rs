//! A tokenizer with its chat template and special tokens: everything that converts conversations to ids and back.
//!
//! Special tokens are parsed only where the caller allows it. User text never becomes one: a prompt that quotes
//! `<|im_end|>` is read as these ten characters, not as the end of a turn.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokenizers::{AddedToken, Tokenizer};

use super::record::Message;
use super::render::{self, Request};
use super::template::Template;
use crate::error::{Context, Error, Result};
use crate::store::sha256_bytes;

/// What a tokenizer file does not contain: the chat template and the roles of special tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TokenizerSettings {
    /// Jinja source of the chat template; `None` for base models that have none.
    pub chat_template: Option<String>,
    /// The id that begins a sequence.
    pub bos: Option<u32>,
    /// All ids that end a turn or a text.
    pub ends: Vec<u32>,
    /// Appended to plain text responses; defaults to the first of `ends`.
    pub eos: Option<u32>,
    /// Padding in other programs; never used here, kept for the saved files.
    pub pad: Option<u32>,
    /// Whether plain text begins with `bos`.
    pub add_bos: bool,
}

/// Tokenizer, compiled chat template and special ids. Cheap to clone.
#[derive(Clone)]
pub struct ChatTokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    /// As loaded, for saving and decoding.
    full: Tokenizer,
    /// Encodes special tokens as plain text and adds nothing.
    inert: Tokenizer,
    /// Text and id of every special token, longest text first.
    specials: Vec<Special>,
    template: Option<Template>,
    settings: TokenizerSettings,
    vocab_size: usize,
    hash: String,
}

struct Special {
    text: String,
    id: u32,
    lstrip: bool,
    rstrip: bool,
}

/// Ids with the byte range of the text that each came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Byte range of each id in the encoded text. Ids that share a multi-byte character share its range.
    pub ranges: Vec<Range<usize>>,
    /// Whether each id is a special token.
    pub special: Vec<bool>,
}

impl ChatTokenizer {
    /// Compiles the template and checks the ids.
    ///
    /// # Errors
    /// A template that does not compile, or an id outside the vocabulary.
    pub fn new(tokenizer: Tokenizer, settings: TokenizerSettings) -> Result<Self> {
        let mut settings = settings;
        if let Some(eos) = settings.eos
            && !settings.ends.contains(&eos)
        {
            settings.ends.push(eos);
        }
        if settings.eos.is_none() {
            settings.eos = settings.ends.first().copied();
        }
        let mut full = tokenizer;
        full.with_padding(None);
        full.with_truncation(None)?;
        let roles = settings.ends.iter().chain(&settings.bos).chain(&settings.pad);
        let mut named = BTreeMap::new();
        for &id in roles {
            let text = full.id_to_token(id).ok_or_else(|| {
                Error::run(format!("special token id {id} is not in the vocabulary"))
                    .hint("the tokenizer and the model's config do not belong together")
            })?;
            named.insert(id, text);
        }
        let specials = special_tokens(&full, &named);
        let mut inert = full.clone();
        inert.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
        // Only tokens flagged special can be encoded as text; an end token without the flag gets it here.
        inert
            .add_special_tokens(named.values().map(|text| AddedToken::from(text.clone(), true)))?;
        inert.set_encode_special_tokens(true);
        let template = settings.chat_template.as_deref().map(Template::new).transpose()?;
        let vocab_size = full.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        let hash = content_hash(&full, &settings)?;
        let inner = Inner { full, inert, specials, template, settings, vocab_size, hash };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The same tokenizer with additional special tokens, and how many of them are new.
    ///
    /// # Errors
    /// An empty token.
    pub fn with_special_tokens(&self, tokens: &[String]) -> Result<(Self, usize)> {
        if tokens.iter().any(|token| token.trim().is_empty()) {
            return Err(Error::usage(format!("an empty token among {tokens:?}"))
                .hint("write tokens as the template has them, e.g. \"<|tool|>\""));
        }
        let mut full = self.inner.full.clone();
        let before = full.get_vocab_size(true);
        full.add_special_tokens(tokens.iter().map(|token| AddedToken::from(token.clone(), true)))?;
        let added = full.get_vocab_size(true) - before;
        Ok((Self::new(full, self.inner.settings.clone())?, added))
    }

    /// [`from_dir`](Self::from_dir) if the directory has a `tokenizer.json`.
    ///
    /// # Errors
    /// Files that contradict the vocabulary.
    pub fn in_dir(dir: &Path) -> Result<Option<Self>> {
        dir.join("tokenizer.json").is_file().then(|| Self::from_dir(dir)).transpose()
    }

    /// Reads `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`, `special_tokens_map.json` and the end
    /// ids of `generation_config.json` and `config.json`, in Hugging Face's layout.
    ///
    /// # Errors
    /// No `tokenizer.json`, or files that contradict the vocabulary.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path)
            .at(path.display())
            .hint("a model directory needs tokenizer.json (only `fast` tokenizers are read)")?;
        let tokenizer = Tokenizer::from_bytes(bytes).at(path.display())?;
        let settings = super::tokenizer_files::read_settings(dir, &tokenizer)?;
        Self::new(tokenizer, settings).at(dir.display())
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` (with the chat template) and `special_tokens_map.json`.
    ///
    /// # Errors
    /// Files that cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        super::tokenizer_files::write(dir, &self.inner.full, &self.inner.settings)
    }

    /// The same tokenizer with another chat template: a built-in name, a path, or Jinja text.
    ///
    /// # Errors
    /// Neither a known name nor a readable file, or a template that does not compile.
    pub fn with_template(&self, template: &str) -> Result<Self> {
        let chat_template = Some(super::template::resolve(template)?);
        let settings = TokenizerSettings { chat_template, ..self.inner.settings.clone() };
        Self::new(self.inner.full.clone(), settings)
    }

    /// The settings, with defaults filled in.
    pub fn settings(&self) -> &TokenizerSettings {
        &self.inner.settings
    }

    /// The tokenizer as it was loaded.
    pub fn inner(&self) -> &Tokenizer {
        &self.inner.full
    }

    /// The compiled chat template.
    ///
    /// # Errors
    /// The model has none.
    pub fn template(&self) -> Result<&Template> {
        self.inner.template.as_ref().ok_or_else(|| {
            Error::run("the tokenizer has no chat template").as_usage().hint(format!(
                "set `chat_template` to a built-in name ({}) or a file",
                super::template::BUILT_IN.join(", ")
            ))
        })
    }

    /// One more than the largest id, including added tokens.
    pub fn vocab_size(&self) -> usize {
        self.inner.vocab_size
    }

    /// All ids that end a turn.
    pub fn ends(&self) -> &[u32] {
        &self.inner.settings.ends
    }

    /// The id that ends plain text.
    pub fn eos(&self) -> Option<u32> {
        self.inner.settings.eos
    }

    /// The id that begins a sequence.
    pub fn bos(&self) -> Option<u32> {
        self.inner.settings.bos
    }

    /// The padding id of other programs.
    pub fn pad(&self) -> Option<u32> {
        self.inner.settings.pad
    }

    /// SHA-256 of the chat template's source.
    pub fn template_hash(&self) -> String {
        let source = self.inner.settings.chat_template.as_deref().unwrap_or_default();
        sha256_bytes(source.as_bytes())
    }

    /// SHA-256 of everything that determines the ids.
    pub fn hash(&self) -> &str {
        &self.inner.hash
    }

    /// The ids of `text`; special tokens in it stay plain text, and nothing is added.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        // Encoding fails only if the vocabulary lacks both a character and an unknown token; such text has no ids.
        self.encode_inert(text).map(|encoded| encoded.ids).unwrap_or_default()
    }

    /// The ids of `text` with special tokens parsed and nothing added.
    pub fn encode_special(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encode_where(text, |_| true)?.ids)
    }

    /// Puts `bos` before ids that do not begin with it, if the settings ask for one. A text that spells it out may have
    /// it already.
    pub(crate) fn begin(&self, ids: &mut Vec<u32>) {
        let bos = self.bos().filter(|_| self.settings().add_bos);
        if let Some(bos) = bos.filter(|bos| ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
    }

    /// The text of `ids`.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        // Ids outside the vocabulary are skipped; if the decoder fails there is nothing to show.
        self.inner.full.decode(ids, skip_special).unwrap_or_default()
    }

    /// The first id that differs from another tokenizer's, and its meaning in this one and in the other.
    pub fn first_difference(&self, other: &Self) -> Option<(u32, [String; 2])> {
        let ids = self.vocab_size().max(other.vocab_size()) as u32;
        let id = (0..ids).find(|id| self.token(*id) != other.token(*id))?;
        let named = |tokenizer: &Self| {
            tokenizer.token(id).map_or("absent".to_owned(), |token| format!("`{token}`"))
        };
        Some((id, [named(self), named(other)]))
    }

    /// The token of `id` as spelled in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.full.id_to_token(id)
    }

    /// The id of a token as spelled in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.full.token_to_id(token)
    }

    /// The texts of all special tokens, longest first.
    pub(crate) fn special_texts(&self) -> Vec<&str> {
        self.inner.specials.iter().map(|special| special.text.as_str()).collect()
    }

    /// The texts of the tokens that end a turn.
    pub(crate) fn end_texts(&self) -> Vec<&str> {
        let ends = &self.inner.settings.ends;
        let specials = self.inner.specials.iter();
        specials.filter(|token| ends.contains(&token.id)).map(|token| token.text.as_str()).collect()
    }

    /// Whether `text` contains the text of a special token.
    pub(crate) fn has_special(&self, text: &str) -> bool {
        self.inner.specials.iter().any(|special| text.contains(&special.text))
    }

    /// The ids of a conversation that awaits its answer, rendered with the generation prompt.
    ///
    /// # Errors
    /// No template, or one that refuses these messages.
    pub fn prompt_ids(&self, messages: &[Message], tools: Option<&Value>) -> Result<Vec<u32>> {
        self.prompt_ids_with(messages, tools, &Map::new())
    }

    /// [`prompt_ids`](Self::prompt_ids) with additional variables for the template.
    ///
    /// # Errors
    /// No template, or one that refuses these messages.
    pub fn prompt_ids_with(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        kwargs: &Map<String, Value>,
    ) -> Result<Vec<u32>> {
        let request = Request { messages, tools, kwargs, add_generation_prompt: true };
        let rendered = render::render(self, request)?;
        Ok(rendered.encode(self, false)?.ids)
    }

    /// `bos_token`, `eos_token` and `pad_token`, as named in templates.
    pub(crate) fn named_tokens(&self) -> Vec<(&'static str, String)> {
        let settings = &self.inner.settings;
        [("bos_token", settings.bos), ("eos_token", settings.eos), ("pad_token", settings.pad)]
            .into_iter()
            .map(|(name, id)| (name, id.and_then(|id| self.token(id)).unwrap_or_default()))
            .collect()
    }

    /// Ids of plain text, special tokens inert, with byte ranges.
    pub(crate) fn encode_inert(&self, text: &str) -> Result<Encoded> {
        let mut encoded = Encoded::default();
        self.push_inert(text, 0, &mut encoded)?;
        Ok(encoded)
    }

    /// Ids of `text`; a special token is parsed if `allowed` accepts its byte range.
    pub(crate) fn encode_where(
        &self,
        text: &str,
        allowed: impl Fn(&Range<usize>) -> bool,
    ) -> Result<Encoded> {
        let mut encoded = Encoded::default();
        let (mut done, mut at) = (0, 0);
        while at < text.len() {
            let Some((special, found)) = self.special_at(text, at, done, &allowed) else {
                at += text[at..].chars().next().map_or(1, char::len_utf8);
                continue;
            };
            self.push_inert(&text[done..found.start], done, &mut encoded)?;
            encoded.ids.push(special.id);
            encoded.special.push(true);
            (done, at) = (found.end, found.end);
            encoded.ranges.push(found);
        }
        self.push_inert(&text[done..], done, &mut encoded)?;
        Ok(encoded)
    }

    fn special_at(
        &self,
        text: &str,
        at: usize,
        done: usize,
        allowed: impl Fn(&Range<usize>) -> bool,
    ) -> Option<(&Special, Range<usize>)> {
        let special = self.inner.specials.iter().find(|special| {
            text[at..].starts_with(&special.text) && allowed(&(at..at + special.text.len()))
        })?;
        let (mut start, mut end) = (at, at + special.text.len());
        if special.lstrip {
            start = done + text[done..at].trim_end().len();
        }
        if special.rstrip {
            end = text.len() - text[end..].trim_start().len();
        }
        Some((special, start..end))
    }

    fn push_inert(&self, text: &str, offset: usize, encoded: &mut Encoded) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let encoding = self.inner.inert.encode(text, false)?;
        encoded.ids.extend_from_slice(encoding.get_ids());
        encoded.ranges.extend(
            encoding.get_offsets().iter().map(|&(start, end)| offset + start..offset + end),
        );
        encoded.special.resize(encoded.ids.len(), false);
        Ok(())
    }
}

/// Tokens flagged special and tokens with a named role, longest text first.
fn special_tokens(tokenizer: &Tokenizer, named: &BTreeMap<u32, String>) -> Vec<Special> {
    let added: BTreeMap<u32, AddedToken> =
        tokenizer.get_added_tokens_decoder().into_iter().collect();
    let mut specials: Vec<Special> = added
        .iter()
        .filter(|(id, token)| token.special || named.contains_key(id))
        .map(|(&id, token)| Special {
            text: token.content.clone(),
            id,
            lstrip: token.lstrip,
            rstrip: token.rstrip,
        })
        .collect();
    let unflagged = named.iter().filter(|(id, _)| !added.contains_key(id));
    specials.extend(unflagged.map(|(&id, text)| Special {
        text: text.clone(),
        id,
        lstrip: false,
        rstrip: false,
    }));
    specials.retain(|special| !special.text.is_empty());
    specials.sort_by(|a, b| b.text.len().cmp(&a.text.len()).then(a.id.cmp(&b.id)));
    specials
}

fn content_hash(tokenizer: &Tokenizer, settings: &TokenizerSettings) -> Result<String> {
    let content = tokenizer.to_string(false)? + &json!(settings).to_string();
    Ok(sha256_bytes(content.as_bytes()))
}
