//! The tokenizer in a GGUF file, rebuilt for the `tokenizers` crate, and its pre-tokenizer's name.
//!
//! `gpt2` vocabularies are byte-level BPE; the pre-tokenizer is named by `tokenizer.ggml.pre`. `llama` vocabularies are
//! SentencePiece BPE, whose merges follow from the scores. Anything else is refused by name: a wrong pre-tokenizer
//! gives different ids without any error.

use candle_core::quantized::gguf_file::Value;
use serde_json::Value as Json;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{NFC, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as Cuts;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, NormalizerWrapper, SplitDelimiterBehavior, Tokenizer};

use super::gguf::Gguf;
use crate::data::tokenizer::{ChatTokenizer, TokenizerSettings};
use crate::error::{Context, Error, Result};

/// Words with an optional leading punctuation mark, runs of one to three digits, punctuation, line ends, spaces.
const LLAMA3_CUT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As [`LLAMA3_CUT`], with single digits.
const QWEN2_CUT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// SentencePiece's mark for a space.
const SPACE: &str = "▁";

/// Values of `tokenizer.ggml.token_type`.
pub(super) mod kind {
    pub(in crate::model) const NORMAL: i64 = 1;
    pub(in crate::model) const UNKNOWN: i64 = 2;
    pub(in crate::model) const CONTROL: i64 = 3;
    pub(in crate::model) const USER_DEFINED: i64 = 4;
    pub(in crate::model) const UNUSED: i64 = 5;
}

/// The file's tokenizer with its chat template and special ids.
///
/// # Errors
/// As [`tokenizer`]; a template that does not compile; special ids outside the vocabulary.
pub(super) fn chat_tokenizer(gguf: &Gguf) -> Result<ChatTokenizer> {
    let tokenizer = tokenizer(gguf)?;
    let template = gguf.text("tokenizer.chat_template").map(str::to_owned);
    let mut ends = gguf.end_ids();
    // Many files only name the end of a text; the template shows which tokens end a turn.
    for name in ["<|im_end|>", "<|eot_id|>", "<|eom_id|>"] {
        let used = template.as_deref().is_some_and(|template| template.contains(name));
        ends.extend(tokenizer.token_to_id(name).filter(|id| used && !ends.contains(id)));
    }
    let settings = TokenizerSettings {
        chat_template: template,
        bos: gguf.token_id("bos_token_id"),
        eos: gguf.token_id("eos_token_id"),
        pad: gguf.token_id("padding_token_id"),
        ends,
        add_bos: wants_bos(gguf),
    };
    ChatTokenizer::new(tokenizer, settings)
}

/// The file's tokenizer.
///
/// # Errors
/// An unsupported or broken vocabulary or pre-tokenizer.
fn tokenizer(gguf: &Gguf) -> Result<Tokenizer> {
    let tokens = texts(gguf, "tokenizer.ggml.tokens")?;
    if tokens.is_empty() {
        return Err(Error::run("the file has no tokenizer"));
    }
    let vocab: Vocab = (0..).zip(&tokens).map(|(id, t)| (t.clone(), id)).collect();
    if vocab.len() != tokens.len() {
        return Err(Error::run("the vocabulary holds a token twice"));
    }
    let mut tokenizer = match gguf.text("tokenizer.ggml.model") {
        Some("gpt2") => byte_level(gguf, vocab)?,
        Some("llama") => sentence_piece(gguf, vocab, &tokens)?,
        other => {
            let name = other.unwrap_or("(none)");
            return Err(Error::run(format!("tokenizer model `{name}` is not supported"))
                .hint("supported: gpt2 (byte-level BPE), llama (SentencePiece BPE)"));
        }
    };
    add_special_tokens(gguf, &tokens, &mut tokenizer)?;
    add_bos(gguf, &tokens, &mut tokenizer)?;
    Ok(tokenizer)
}

fn byte_level(gguf: &Gguf, vocab: Vocab) -> Result<Tokenizer> {
    let merges = texts(gguf, "tokenizer.ggml.merges")?;
    let merges: Result<Vec<(String, String)>> = merges
        .iter()
        .map(|merge| match merge.split_once(' ') {
            Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
            None => Err(Error::run(format!("merge `{merge}` is not two tokens"))),
        })
        .collect();
    let pre = gguf.text("tokenizer.ggml.pre").unwrap_or("default");
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges?)
        .ignore_merges(is_llama3(pre))
        .build()
        .at("tokenizer.ggml.merges")?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_decoder(Some(ByteLevel::default()));
    cut(pre, &mut tokenizer)?;
    Ok(tokenizer)
}

fn is_llama3(pre: &str) -> bool {
    matches!(pre, "llama-bpe" | "llama3" | "llama-v3")
}

/// Sets the pre-tokenizer.
fn cut(pre: &str, tokenizer: &mut Tokenizer) -> Result<()> {
    let bytes = |use_regex| ByteLevel::new(false, true, use_regex).into();
    let split = |pattern: &str| {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false).at("pre-tokenizer")
    };
    let cuts = match pre {
        // Conversions of this tokenizer often lose the first step and then split numbers wrongly.
        "smollm" => vec![Digits::new(true).into(), bytes(true)],
        "default" | "gpt-2" => vec![bytes(true)],
        "qwen2" => {
            tokenizer.with_normalizer(Some(NFC))?;
            vec![split(QWEN2_CUT)?.into(), bytes(false)]
        }
        name if is_llama3(name) => vec![split(LLAMA3_CUT)?.into(), bytes(false)],
        other => {
            return Err(Error::run(format!("pre-tokenizer `{other}` is not supported"))
                .hint("supported: smollm, llama-bpe, qwen2, gpt-2, default"));
        }
    };
    tokenizer.with_pre_tokenizer(Some(Cuts::new(cuts)));
    Ok(())
}

/// GGUF's name for the pre-tokenizer of a `tokenizer.json`, given as JSON.
///
/// # Errors
/// Not byte-level BPE, or a pre-tokenizer without a GGUF name.
pub(super) fn pre_name(tokenizer: &Json) -> Result<&'static str> {
    let model = &tokenizer["model"];
    if model["type"] != "BPE" || model["byte_fallback"] == true {
        return Err(Error::run("the tokenizer is not byte-level BPE")
            .hint("GGUF files are written for byte-level BPE only; save as safetensors"));
    }
    for name in ["smollm", "llama-bpe", "qwen2", "gpt-2"] {
        let mut known = Tokenizer::new(BPE::default());
        cut(name, &mut known)?;
        let known: Json = serde_json::from_str(&known.to_string(false)?)?;
        if cuts(tokenizer) == cuts(&known) && (model["ignore_merges"] == true) == is_llama3(name) {
            return Ok(name);
        }
    }
    let found = &tokenizer["pre_tokenizer"];
    Err(Error::run(format!("GGUF has no name for how the tokenizer cuts text: {found}"))
        .hint("known: smollm, llama-bpe, qwen2, gpt-2; save as safetensors"))
}

/// The parts that determine pre-tokenization: the normalizer, and the steps except those that only affect offsets.
fn cuts(tokenizer: &Json) -> (Json, Vec<Json>) {
    let pre = &tokenizer["pre_tokenizer"];
    let mut steps = match pre["pretokenizers"].as_array() {
        Some(steps) => steps.clone(),
        None => vec![pre.clone()],
    };
    for step in steps.iter_mut().filter_map(Json::as_object_mut) {
        step.remove("trim_offsets");
    }
    (tokenizer["normalizer"].clone(), steps)
}

/// SentencePiece stores a score per piece instead of merges: pieces with higher scores were merged earlier.
fn sentence_piece(gguf: &Gguf, vocab: Vocab, tokens: &[String]) -> Result<Tokenizer> {
    let scores: Vec<f32> =
        gguf.list("tokenizer.ggml.scores").iter().filter_map(|v| v.to_f32().ok()).collect();
    if scores.len() != tokens.len() {
        return Err(Error::run(format!("{} scores for {} tokens", scores.len(), tokens.len())));
    }
    let merges = merges_by_score(&vocab, tokens, &scores);
    let unknown = gguf.token_id("unknown_token_id").unwrap_or(0) as usize;
    let mut builder =
        BPE::builder().vocab_and_merges(vocab, merges).byte_fallback(true).fuse_unk(true);
    if let Some(token) = tokens.get(unknown) {
        builder = builder.unk_token(token.clone());
    }
    let mut tokenizer = Tokenizer::new(builder.build()?);
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    let mut decoders = vec![Replace::new(SPACE, " ")?.into(), ByteFallback::new().into()];
    decoders.push(Fuse::new().into());
    let prefix = gguf.get("tokenizer.ggml.add_space_prefix").and_then(|v| v.to_bool().ok());
    if prefix.unwrap_or(true) {
        steps.push(Prepend::new(SPACE.to_owned()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    steps.push(Replace::new(" ", SPACE)?.into());
    tokenizer.with_normalizer(Some(Normalizers::new(steps)))?;
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    Ok(tokenizer)
}

/// All ways to form a piece from two others, best piece first.
fn merges_by_score(vocab: &Vocab, tokens: &[String], scores: &[f32]) -> Vec<(String, String)> {
    let mut ranked: Vec<(f32, u32, u32)> = Vec::new(); // score of the whole, ids of the halves
    for (token, score) in tokens.iter().zip(scores) {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(left), Some(right)) = (vocab.get(left), vocab.get(right)) {
                ranked.push((*score, *left, *right));
            }
        }
    }
    ranked.sort_by(|one, two| two.0.total_cmp(&one.0).then((one.1, one.2).cmp(&(two.1, two.2))));
    let text = |id: u32| tokens[id as usize].clone();
    ranked.into_iter().map(|(_, left, right)| (text(left), text(right))).collect()
}

/// Control tokens are special; user-defined tokens are matched whole but kept in the text.
fn add_special_tokens(gguf: &Gguf, tokens: &[String], tokenizer: &mut Tokenizer) -> Result<()> {
    let kinds = gguf.list("tokenizer.ggml.token_type");
    let kind_of = |value: &Value| match value {
        Value::I32(kind) => i64::from(*kind),
        value => value.to_u64().map_or(0, |kind| kind as i64),
    };
    let mut named = gguf.end_ids();
    named.extend(gguf.token_id("bos_token_id"));
    named.extend(gguf.token_id("padding_token_id"));
    for (id, token) in tokens.iter().enumerate() {
        let kind = kinds.get(id).map_or(0, kind_of);
        let special =
            kind == kind::CONTROL || kind == kind::UNKNOWN || named.contains(&(id as u32));
        if special {
            tokenizer.add_special_tokens([AddedToken::from(token.clone(), true)])?;
        } else if kind == kind::USER_DEFINED {
            let added = AddedToken::from(token.clone(), false).normalized(false);
            tokenizer.add_tokens([added])?;
        }
    }
    Ok(())
}

/// Adds a post-processor so that other programs also prepend the BOS token when this file asks for it.
fn add_bos(gguf: &Gguf, tokens: &[String], tokenizer: &mut Tokenizer) -> Result<()> {
    if !wants_bos(gguf) {
        return Ok(());
    }
    let Some(bos) = gguf.token_id("bos_token_id") else { return Ok(()) };
    let token = tokens.get(bos as usize).ok_or_else(|| {
        Error::run(format!("bos_token_id {bos} is not in the vocabulary of {}", tokens.len()))
    })?;
    let template = TemplateProcessing::builder()
        .try_single(vec![token.clone(), "$A".to_owned()])
        .map_err(Error::run)?
        .try_pair(vec![token.clone(), "$A".to_owned(), token.clone(), "$B:1".to_owned()])
        .map_err(Error::run)?
        .special_tokens(vec![(token.clone(), bos)])
        .build()
        .map_err(Error::run)?;
    tokenizer.with_post_processor(Some(template));
    Ok(())
}

/// Whether plain text is prefixed with the BOS token; the default for SentencePiece models.
fn wants_bos(gguf: &Gguf) -> bool {
    let set = gguf.get("tokenizer.ggml.add_bos_token").and_then(|value| value.to_bool().ok());
    set.unwrap_or_else(|| gguf.text("tokenizer.ggml.model") == Some("llama"))
}

fn texts(gguf: &Gguf, key: &str) -> Result<Vec<String>> {
    let list = gguf.list(key);
    let texts: candle_core::Result<Vec<String>> =
        list.iter().map(|value| value.to_string().cloned()).collect();
    texts.at(key)
}
