//! Chat templates, masks and ids against the reference numbers in `ARRIERO_GOLDENS`.

use std::path::PathBuf;

use arriero::data::record::Message;
use arriero::data::render::{Request, render};
use arriero::data::tokenizer::{ChatTokenizer, TokenizerSettings};
use arriero::data::train_tokenizer;
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
