//! Chat templates, masks and ids against the reference numbers in `ARRIERO_GOLDENS`.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test program; a failure here is a failed test"
)]

use std::path::PathBuf;

use arriero::data::record::Message;
use arriero::data::render::{Request, render};
use arriero::data::tokenizer::{ChatTokenizer, TokenizerSettings};
use arriero::data::train_tokenizer;
use arriero::model::checkpoint::{Checkpoint, LoadOptions};
use serde_json::{Map, Value};

const MARKERS: [&str; 7] = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
];

fn golden(name: &str) -> Value {
    let folder = std::env::var_os("ARRIERO_GOLDENS")
        .map_or_else(|| PathBuf::from("tests/fixtures/goldens"), PathBuf::from);
    let path = folder.join(name);
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap()
}

/// A byte-level tokenizer that knows the markers of both template families.
fn tiny(template: &str) -> ChatTokenizer {
    let tokenizer = train_tokenizer(["hello there"].iter(), 263, &MARKERS).unwrap();
    let settings = TokenizerSettings {
        chat_template: Some(template.to_owned()),
        bos: Some(3),
        ends: vec![2, 6],
        ..TokenizerSettings::default()
    };
    ChatTokenizer::new(tokenizer, settings).unwrap()
}

fn messages(case: &Value) -> Vec<Message> {
    case["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|message| Message::from_value(message.clone()).unwrap())
        .collect()
}

fn spans(case: &Value) -> Vec<(usize, usize)> {
    serde_json::from_value(case["assistant_char_spans"].clone()).unwrap()
}

/// Renders one case and compares its text and spans.
#[track_caller]
fn check(case: &Value, template: &Value, what: &str) {
    let tokenizer = tiny(template.as_str().unwrap());
    let messages = messages(case);
    let tools = Some(&case["tools"]).filter(|tools| !tools.is_null());
    let request = Request {
        messages: &messages,
        tools,
        kwargs: &Map::new(),
        add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
    };
    let rendered = render(&tokenizer, request).unwrap();
    let name = format!("{} with {what}", case["name"]);
    assert_eq!(rendered.text, case["text"].as_str().unwrap(), "{name}");
    let turns = rendered
        .turns(&tokenizer, request, |index| messages[index].role() == "assistant")
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let chars = |byte| rendered.text[..byte].chars().count();
    let found: Vec<_> =
        turns.iter().map(|turn| (chars(turn.span.start), chars(turn.span.end))).collect();
    assert_eq!(found, spans(case), "{name}");
}

#[test]
fn golden_conversations_render_and_mask_to_the_character() {
    let golden = golden("g_chat.json");
    let templates = golden["templates"].as_object().unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        check(case, &templates[name], name);
        let marked = format!("{name}_generation_marked");
        if let Some(template) = templates.get(&marked) {
            check(case, template, &marked);
        }
    }
}

#[test]
fn golden_llama_conversations_render_alike_with_the_built_in_template() {
    let golden = golden("g_chat.json");
    let cases = golden["cases"].as_array().unwrap();
    let built_in = Value::from(arriero::data::template::built_in("llama3.1").unwrap());
    for case in cases.iter().filter(|case| case["template"] == "llama3.1") {
        check(case, &built_in, "the built-in template");
    }
}

/// SmolLM2's tokenizer, out of the GGUF file that `scripts/fetch-smollm2` installs.
fn smollm2() -> ChatTokenizer {
    let folder = std::env::var_os("ARRIERO_SMOLLM2")
        .map_or_else(|| PathBuf::from("data/smollm2"), PathBuf::from);
    let path = folder.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing; run scripts/fetch-smollm2", path.display());
    let (path, device) = (path.to_string_lossy(), candle_core::Device::Cpu);
    let checkpoint = Checkpoint::load(&path, &device, &LoadOptions::default()).unwrap();
    checkpoint.tokenizer.unwrap()
}

#[test]
fn golden_ids_and_masks_of_smollm2() {
    let tokenizer = smollm2();
    for case in golden("g_tokenizer.json").as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode_special(text).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, false), case["decoded"].as_str().unwrap(), "{text:?}");
    }
    let golden = golden("g_chat.json");
    for case in golden["cases"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        let tokenizer =
            tokenizer.with_template(golden["templates"][name].as_str().unwrap()).unwrap();
        let mut kwargs = Map::new();
        if name.starts_with("llama") {
            kwargs.insert("bos_token".to_owned(), "<|begin_of_text|>".into());
        }
        let messages = messages(case);
        let request = Request {
            messages: &messages,
            tools: Some(&case["tools"]).filter(|tools| !tools.is_null()),
            kwargs: &kwargs,
            add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
        };
        let name = format!("{} with {name}", case["name"]);
        let rendered = render(&tokenizer, request).unwrap();
        let encoded = rendered.encode(&tokenizer, true).unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["token_ids"].clone()).unwrap();
        assert_eq!(encoded.ids, ids, "{name}");
        let turns = rendered
            .turns(&tokenizer, request, |index| messages[index].role() == "assistant")
            .unwrap();
        let roles = rendered.roles(&encoded, &turns, &messages);
        let mask: Vec<u8> = serde_json::from_value(case["assistant_mask"].clone()).unwrap();
        let trained: Vec<u8> = roles.iter().map(|role| u8::from(role.trained())).collect();
        assert_eq!(trained, mask, "{name}");
    }
}
