//! `arriero serve` as its clients meet it: the real program with the tiny model, spoken to over HTTP.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test program; a failure here is a failed test"
)]

#[path = "support/served.rs"]
mod served;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use arriero::data::forest::Forest;
use arriero::data::record::Message;
use arriero::data::tree::{Role, Tree};
use arriero::generate::engine::{Answer, Prompt};
use arriero::generate::local::{LocalModel, answer_logprobs};
use arriero::generate::sampling::Sampling;
use arriero::model::Transformer;
use arriero::model::checkpoint::Checkpoint;
use arriero::model::lora::peft::{self, AdapterConfig, BaseRecord};
use arriero::model::lora::{Lora, attach};
use arriero::model::packed::Quantization;
use arriero::model::save::SaveOptions;
use arriero::score::reward_model::{Reading, RewardModel};
use arriero::score::{Question, Scorer};
use candle_core::{DType, Device};
use serde_json::{Value, json};
use served::{Served, student};
use ureq::Agent;

fn checkpoint() -> Checkpoint {
    Checkpoint::load_dir(&student(), &Device::Cpu).unwrap()
}

/// A server with the tiny model, called `tiny`; ends with the test.
struct Server {
    served: Served,
    url: String,
    agent: Agent,
    key: Option<&'static str>,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let served = Served::start("tiny", arguments, &[("TINY_KEY", "a secret")]);
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_mins(5)))
            .build();
        Self { url: served.url.clone(), served, agent: config.into(), key: None }
    }

    fn post(&self, path: &str, body: &str) -> ureq::http::Response<ureq::Body> {
        let mut request = self.agent.post(format!("{}{path}", self.url));
        if let Some(key) = self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        request.header("Content-Type", "application/json").send(body.as_bytes()).unwrap()
    }

    /// The answer to a request that is honoured.
    #[track_caller]
    fn ask(&self, path: &str, body: &Value) -> Value {
        let mut response = self.post(path, &body.to_string());
        let text = response.body_mut().read_to_string().unwrap();
        assert_eq!(response.status(), 200, "{path} {body}: {text}");
        serde_json::from_str(&text).unwrap()
    }

    fn get(&self, path: &str) -> (u16, String) {
        let mut response = self.agent.get(format!("{}{path}", self.url)).call().unwrap();
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
    }

    /// Status and error of a request that is refused.
    #[track_caller]
    fn refused(&self, path: &str, body: &str) -> (u16, Value) {
        let mut response = self.post(path, body);
        let text = response.body_mut().read_to_string().unwrap();
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{path}: {text}"));
        assert!(value["error"]["message"].is_string(), "{path} {body}: {value}");
        (response.status().as_u16(), value["error"].clone())
    }

    /// The lines of a stream, without their `data: `.
    fn stream(&self, path: &str, body: &Value) -> Streamed {
        let response = self.post(path, &body.to_string());
        assert_eq!(response.status(), 200);
        Streamed(BufReader::new(Box::new(response.into_body().into_reader())))
    }

    /// All chunks of a stream that ends as it should.
    #[track_caller]
    fn chunks(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut lines: Vec<String> = self.stream(path, body).collect();
        assert_eq!(lines.pop().as_deref(), Some("[DONE]"));
        lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn terminate(&self) {
        let pid = self.served.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }

    /// Waits until the metrics have a line.
    #[track_caller]
    fn wait_for(&self, line: &str) {
        let start = Instant::now();
        loop {
            let (_, page) = self.get("/metrics");
            if page.lines().any(|found| found == line) {
                return;
            }
            assert!(start.elapsed() < Duration::from_mins(1), "no `{line}` in:\n{page}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

struct Streamed(BufReader<Box<dyn Read>>);

impl Iterator for Streamed {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            if let Some(data) = line.strip_prefix("data: ") {
                return Some(data.trim_end().to_owned());
            }
        }
    }
}

const CHAT: &str = "/v1/chat/completions";
const PLAIN: &str = "/v1/completions";
const SUM: &str = "Tom has 14 coins. Dora has 11 coins. How many coins do they have together?";

fn question() -> Value {
    json!([{"role": "user", "content": SUM}])
}

/// Bias that keeps an answer from ending.
fn endless() -> Value {
    checkpoint().ends().iter().map(|id| (id.to_string(), json!(-100))).collect()
}

/// Answers that take a while: many, long ones.
fn long(stream: bool) -> Value {
    json!({"messages": [{"role": "user", "content": "Go on."}], "n": 128, "max_tokens": 200,
           "logit_bias": endless(), "stream": stream})
}

fn engine(prompt: &[u32], sampling: &Sampling) -> Vec<Answer> {
    let model = LocalModel::new(&checkpoint()).unwrap();
    let mut all = Vec::new();
    let prompt = Prompt { index: 0, tokens: prompt.to_vec() };
    model
        .run(&[prompt], sampling, &mut |_, answers| {
            all = answers;
            Ok(())
        })
        .unwrap();
    all
}

/// Text, tokens' log-probabilities and reason of each choice of a chat stream.
fn joined(chunks: &[Value], n: usize) -> Vec<(String, Vec<Value>, Value)> {
    let mut all = vec![(String::new(), Vec::new(), Value::Null); n];
    for choice in chunks.iter().filter_map(|chunk| chunk["choices"].get(0)) {
        let one = &mut all[choice["index"].as_u64().unwrap() as usize];
        assert!(one.2.is_null(), "a chunk after the last one");
        one.0 += choice["delta"]["content"].as_str().unwrap_or_default();
        one.1.extend(choice["logprobs"]["content"].as_array().cloned().unwrap_or_default());
        one.2 = choice["finish_reason"].clone();
    }
    all
}

#[test]
fn seeded_chat_answers_match_the_engine_whole_and_streamed() {
    let server = Server::start(&[]);
    let mut body = json!({
        "model": "tiny", "messages": question(), "n": 3, "seed": 5, "temperature": 0.9, "max_tokens": 24,
        "logprobs": true, "top_logprobs": 2, "user": "somebody",
    });
    let whole = server.ask(CHAT, &body);
    assert_eq!(whole["object"], "chat.completion");
    assert!(whole["system_fingerprint"].as_str().unwrap().starts_with("fp_"));

    let model = checkpoint();
    let prompt = model.tokenizer().unwrap().prompt_ids(&[Message::new("user", SUM)], None).unwrap();
    let sampling = Sampling {
        temperature: 0.9,
        seed: 5,
        num_samples: 3,
        max_new_tokens: 24,
        ..Sampling::default()
    };
    let expected = engine(&prompt, &sampling);
    let mut tokens = 0;
    for (choice, expected) in whole["choices"].as_array().unwrap().iter().zip(&expected) {
        assert_eq!(choice["message"]["content"], expected.text);
        let content = choice["logprobs"]["content"].as_array().unwrap();
        let sum: f64 = content.iter().map(|one| one["logprob"].as_f64().unwrap()).sum();
        assert!((sum - expected.logprob_sum()).abs() < 1e-5, "{sum}");
        assert!(content.iter().all(|one| one["top_logprobs"].as_array().unwrap().len() == 2));
        // The bytes of the tokens are the text, but for the end of the turn.
        let bytes = content.iter().flat_map(|one| one["bytes"].as_array().unwrap());
        let bytes: Vec<u8> = bytes.map(|byte| byte.as_u64().unwrap() as u8).collect();
        assert!(String::from_utf8_lossy(&bytes).starts_with(&expected.text));
        tokens += expected.ids.len();
    }
    assert_eq!(whole["usage"]["prompt_tokens"], prompt.len());
    assert_eq!(whole["usage"]["completion_tokens"], tokens);

    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let chunks = server.chunks(CHAT, &body);
    let usage = chunks.last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], tokens);
    // The prompt was asked before.
    assert_eq!(usage["usage"]["prompt_tokens_details"]["cached_tokens"], prompt.len() - 1);
    let choices = whole["choices"].as_array().unwrap();
    for (choice, (text, logprobs, finish)) in choices.iter().zip(joined(&chunks, 3)) {
        assert_eq!(choice["message"]["content"], text);
        assert_eq!(choice["logprobs"]["content"], Value::Array(logprobs));
        assert_eq!(choice["finish_reason"], finish);
    }
    let unseeded = json!({"messages": question(), "max_tokens": 24, "temperature": 2, "logit_bias": endless()});
    let text = || server.ask(CHAT, &unseeded)["choices"][0]["message"]["content"].clone();
    assert_ne!(text(), text());
}

#[test]
fn echoed_prompt_scores_match_the_whole_forward() {
    let server = Server::start(&[]);
    let model = checkpoint();
    let text = "Dora has 3 coins — three. ünïcode 日本";
    let ids = server.ask("/tokenize", &json!({"prompt": text}))["tokens"].clone();
    let ids: Vec<u32> = serde_json::from_value(ids).unwrap();
    let transformer = Transformer::new(&model.config, &model.weights).unwrap();
    let expected = answer_logprobs(&transformer, &ids[..1], &[&ids[1..]]).unwrap().remove(0);
    for prompt in [json!(text), json!(ids)] {
        let body = json!({"prompt": prompt, "echo": true, "logprobs": 3, "max_tokens": 0});
        let answer = server.ask(PLAIN, &body);
        let choice = &answer["choices"][0];
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(text), &json!("length")));
        let logprobs = &choice["logprobs"];
        let found = logprobs["token_logprobs"].as_array().unwrap();
        assert!(found[0].is_null() && logprobs["top_logprobs"][0].is_null());
        let found: Vec<f32> = found[1..].iter().map(|x| x.as_f64().unwrap() as f32).collect();
        assert_eq!(found, expected);
        assert_eq!(logprobs["tokens"].as_array().unwrap().len(), ids.len());
        let offsets: Vec<u64> = serde_json::from_value(logprobs["text_offset"].clone()).unwrap();
        assert!(offsets.is_sorted() && *offsets.last().unwrap() < text.chars().count() as u64);
        for top in &logprobs["top_logprobs"].as_array().unwrap()[1..] {
            assert!((3..=4).contains(&top.as_object().unwrap().len()), "{top}");
        }
        assert_eq!(answer["usage"]["completion_tokens"], 0);
    }
}

#[test]
fn text_that_fills_all_positions_is_scored() {
    let server = Server::start(&["--cache-tokens", "256"]);
    let model = checkpoint();
    let ids: Vec<u32> = (0..257).map(|i| 40 + (i * 29) % 300).collect();
    let transformer = Transformer::new(&model.config, &model.weights).unwrap();
    let expected = answer_logprobs(&transformer, &ids[..1], &[&ids[1..256]]).unwrap().remove(0);
    let body = |len: usize, max_tokens: usize| json!({"prompt": ids[..len], "echo": true, "logprobs": 0, "max_tokens": max_tokens});
    let answer = server.ask(PLAIN, &body(256, 0));
    let found = answer["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
    assert!(found.len() == 256 && found[0].is_null());
    let found: Vec<f32> = found[1..].iter().map(|x| x.as_f64().unwrap() as f32).collect();
    assert_eq!(found, expected);
    let usage = &answer["usage"];
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(256), &json!(0)));
    for (len, max_tokens, part) in
        [(257, 0, "expected at most the model's 256"), (256, 1, "must hold an answer too")]
    {
        let (status, error) = server.refused(PLAIN, &body(len, max_tokens).to_string());
        assert_eq!((status, &error["code"]), (400, &json!("context_length_exceeded")));
        assert!(error["message"].as_str().unwrap().contains(part), "{error}");
    }
}

#[test]
fn plain_completions_accept_several_prompts_and_stream() {
    let server = Server::start(&[]);
    let mut body = json!({"prompt": ["Tom has", "Dora has 2 coins"], "n": 2, "seed": 1, "max_tokens": 20,
                          "echo": true, "stop": ["coins.", "never seen"]});
    let whole = server.ask(PLAIN, &body);
    let choices = whole["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    assert!(choices[3]["text"].as_str().unwrap().starts_with("Dora has 2 coins"));
    body["stream"] = json!(true);
    let chunks = server.chunks(PLAIN, &body);
    for (index, choice) in choices.iter().enumerate() {
        let own = chunks.iter().map(|chunk| &chunk["choices"][0]);
        let own: Vec<&Value> = own.filter(|choice| choice["index"] == index).collect();
        let text: String = own.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
        assert_eq!(choice["text"], text);
        assert_eq!(choice["finish_reason"], own.last().unwrap()["finish_reason"]);
    }
    // Each prompt of a list is answered as if it were asked in its place; the first as if it were alone.
    let alone = json!({"prompt": "Tom has", "n": 2, "seed": 1, "max_tokens": 20, "stop": "coins."});
    let alone = server.ask(PLAIN, &alone);
    for (one, two) in choices.iter().zip(alone["choices"].as_array().unwrap()) {
        assert_eq!(one["text"], format!("Tom has{}", two["text"].as_str().unwrap()));
    }
}

#[test]
fn stop_token_ends_an_answer_and_is_not_part_of_it() {
    let server = Server::start(&[]);
    let model = LocalModel::new(&checkpoint()).unwrap();
    let asked = [Message::new("user", SUM)];
    for (path, key, prompt) in [
        (PLAIN, "prompt", model.tokenizer().encode_special("Tom has").unwrap()),
        (CHAT, "messages", model.tokenizer().prompt_ids(&asked, None).unwrap()),
    ] {
        let ids = engine(&prompt, &Sampling::greedy(12)).remove(0).ids;
        // A token that the answer has not had before.
        let new = |place: &usize| !ids[..*place].contains(&ids[*place]);
        let place = (0..ids.len().min(8)).rfind(new).unwrap();
        let text = model.text(&ids[..place]);
        let mut body =
            json!({"max_tokens": 12, "temperature": 0, "stop_token_ids": [383, ids[place]]});
        body[key] = if path == PLAIN { json!("Tom has") } else { question() };
        let answer = server.ask(path, &body);
        let choice = &answer["choices"][0];
        let said = choice["message"].get("content").unwrap_or(&choice["text"]);
        assert_eq!((said, &choice["finish_reason"]), (&json!(text), &json!("stop")), "{path}");
        assert_eq!(answer["usage"]["completion_tokens"], place + 1);
        body["stream"] = json!(true);
        let chunks = server.chunks(path, &body);
        let choices = || chunks.iter().map(|chunk| &chunk["choices"][0]);
        let piece = |choice: &Value| {
            let said = choice["delta"].get("content").unwrap_or(&choice["text"]);
            said.as_str().unwrap_or_default().to_owned()
        };
        assert_eq!(choices().map(piece).collect::<String>(), text, "{path}");
        assert_eq!(choices().next_back().unwrap()["finish_reason"], "stop");
    }
}

#[test]
fn stop_string_that_never_occurs_does_not_end_the_answer() {
    let server = Server::start(&[]);
    let body = json!({"prompt": "Tom", "max_tokens": 12, "stop": "zzzzzz", "logit_bias": endless(), "seed": 2});
    let answer = server.ask(PLAIN, &body);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 12);
}

#[test]
fn answers_have_the_requested_form_and_never_split_characters() {
    let server = Server::start(&[]);
    let content = |extra: Value| {
        let mut body = json!({"messages": question(), "seed": 3, "max_tokens": 180});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let answer = server.ask(CHAT, &body);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    let schema = json!({"type": "object", "additionalProperties": false, "required": ["sum", "unit"],
        "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}, "unit": {"enum": ["coins", "€"]}}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "sum", "strict": true, "schema": schema}});
    let value: Value = serde_json::from_str(&content(json!({"response_format": format}))).unwrap();
    assert!((0..100).contains(&value["sum"].as_i64().unwrap()), "{value}");
    assert!(["coins", "€"].contains(&value["unit"].as_str().unwrap()), "{value}");
    // What it says is its own affair, but for a bias towards what ends strings and objects.
    let quick: Value = ["\"", ":", "}"]
        .iter()
        .map(|text| {
            let ids = server.ask("/tokenize", &json!({"prompt": text}))["tokens"].clone();
            assert_eq!(ids.as_array().unwrap().len(), 1);
            (ids[0].to_string(), json!(if *text == "\"" { 100 } else { 50 }))
        })
        .collect();
    let format = json!({"type": "json_object"});
    let asked = json!({"response_format": format, "logit_bias": quick, "temperature": 0});
    let value: Value = serde_json::from_str(&content(asked)).unwrap();
    assert_eq!(value.as_object().map(serde_json::Map::len), Some(1), "{value}");
    let number = content(json!({"guided_regex": "[0-9]{2} coins"}));
    assert!(number.len() == 8 && number.ends_with(" coins"), "{number}");
    let choice = content(json!({"structured_outputs": {"choice": ["yes", "no"]}}));
    assert!(["yes", "no"].contains(&choice.as_str()), "{choice}");

    let pattern = "(é|日|🙂){6}";
    let body = json!({"messages": question(), "guided_regex": pattern, "stream": true, "seed": 1, "max_tokens": 80});
    let chunks = server.chunks(CHAT, &body);
    assert!(chunks.len() > 6, "all at once");
    let (text, _, finish) = joined(&chunks, 1).remove(0);
    assert_eq!((text.chars().count(), finish), (6, json!("stop")), "{text}");
    assert!(text.chars().all(|c| "é日🙂".contains(c)), "{text}");
}

#[test]
fn required_tool_is_called_and_calls_are_rendered_by_the_template() {
    let dir = tempfile::tempdir().unwrap();
    let template = dir.path().join("tools.jinja");
    std::fs::write(
        &template,
        "{% if tools %}{{ tools | length }} tools\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n\
         {% if message.tool_calls %}{{ message.tool_calls[0].function.arguments.a }}{% else %}{{ message.content }}{% endif %}\
         <|im_end|>\n{% endfor %}<|im_start|>assistant\n",
    )
    .unwrap();
    let server = Server::start(&["--chat-template", template.to_str().unwrap()]);
    let parameters = json!({"type": "object", "additionalProperties": false, "required": ["a"],
                            "properties": {"a": {"enum": [7, 12]}}});
    let tools =
        json!([{"type": "function", "function": {"name": "add", "parameters": parameters}}]);
    let mut body = json!({"messages": question(), "tools": tools, "tool_choice": "required", "seed": 1, "max_tokens": 150});
    let answer = server.ask(CHAT, &body);
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
    assert!(choice["message"]["content"].is_null());
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("add")));
    let arguments: Value =
        serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert!(arguments["a"] == 7 || arguments["a"] == 12);

    body["stream"] = json!(true);
    let chunks = server.chunks(CHAT, &body);
    let deltas: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]).collect();
    let called = deltas.iter().find(|choice| choice["delta"]["tool_calls"].is_array()).unwrap();
    assert_eq!(called["delta"]["tool_calls"][0]["function"], call["function"]);
    assert_eq!(called["delta"]["tool_calls"][0]["index"], 0);
    assert_eq!(deltas.last().unwrap()["finish_reason"], "tool_calls");

    let history = json!([question()[0], choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "25"}]);
    let tokens = server.ask("/tokenize", &json!({"messages": history, "tools": tools}));
    let text = server.ask("/detokenize", &json!({"tokens": tokens["tokens"]}))["prompt"].clone();
    let expected = format!(
        "1 tools\n<|im_start|>user\n{SUM}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n\
         <|im_start|>tool\n25<|im_end|>\n<|im_start|>assistant",
        arguments["a"]
    );
    assert_eq!(text, expected);
    // Without calls, an answer is text although tools were offered.
    body["tool_choice"] = json!("auto");
    body["stream"] = json!(false);
    assert!(server.ask(CHAT, &body)["choices"][0]["message"]["content"].is_string());
}

#[test]
fn embeddings_match_the_model_states() {
    let server = Server::start(&[]);
    let texts = ["Tom has 3 coins.", "Dora"];
    let body = |more: Value| {
        let mut body = json!({"model": "tiny", "input": texts});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let answer = server.ask("/v1/embeddings", &body(json!({})));
    let in_base64 = server.ask("/v1/embeddings", &body(json!({"encoding_format": "base64"})));
    let last = server.ask("/v1/embeddings", &body(json!({"pooling": "last", "dimensions": 128})));
    let model = checkpoint();
    let transformer = Transformer::new(&model.config, &model.weights).unwrap();
    let mut count = 0;
    for (index, text) in texts.iter().enumerate() {
        let ids = model.tokenizer().unwrap().encode(text);
        count += ids.len();
        let tree = Tree::sequence(ids.clone(), vec![Role::Context; ids.len()], 0);
        let states = transformer.hidden(&Forest::pack([&tree]).unwrap()).unwrap();
        let mean = states.mean(0).unwrap().to_vec1::<f32>().unwrap();
        let end = states.get(ids.len() - 1).unwrap().to_vec1::<f32>().unwrap();
        for (answer, state) in [(&answer, mean), (&last, end)] {
            let length = state.iter().map(|x| x * x).sum::<f32>().sqrt();
            let found = answer["data"][index]["embedding"].as_array().unwrap();
            assert_eq!(found.len(), state.len());
            for (found, state) in found.iter().zip(&state) {
                assert!((found.as_f64().unwrap() as f32 - state / length).abs() < 1e-5);
            }
        }
        let first = answer["data"][index]["embedding"][0].as_f64().unwrap() as f32;
        let coded = in_base64["data"][index]["embedding"].as_str().unwrap();
        // Six bits a letter, lowest byte first.
        let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let bits = coded.bytes().take(6).fold(0u64, |bits, letter| {
            bits << 6 | letters.iter().position(|known| *known == letter).unwrap() as u64
        });
        assert_eq!(((bits >> 4) as u32).swap_bytes(), first.to_bits());
    }
    assert_eq!(answer["usage"]["prompt_tokens"], count);
}

#[test]
fn the_reward_model_scores_completions() {
    let dir = tempfile::tempdir().unwrap();
    let judge = dir.path().join("reward");
    checkpoint().into_reward_model(7).unwrap().save(&judge, &SaveOptions::new(DType::F32)).unwrap();
    let judge = judge.to_str().unwrap();
    let server = Server::start(&["--reward-model", judge]);
    let answers = ["They have 25 coins.", "I do not know."];
    let by_text = server.ask("/score", &json!({"prompt": SUM, "completions": answers}));
    let by_messages = server
        .ask("/score", &json!({"messages": question(), "completions": answers, "model": judge}));
    assert_eq!(by_text, by_messages);
    let model = RewardModel::load(judge, &Device::Cpu, &Reading::default()).unwrap();
    let prompt = [Message::new("user", SUM)];
    let asked = Question { place: "", prompt: &prompt, tools: None, answer: None, extra: None };
    for (index, expected) in model.score(&asked, &answers).unwrap().iter().enumerate() {
        assert_eq!(by_text["data"][index]["score"], expected.value);
    }
    let long = "coins ".repeat(300);
    let (status, error) =
        server.refused("/score", &json!({"prompt": "a", "completions": [long]}).to_string());
    assert!(
        status == 400 && error["message"].as_str().unwrap().contains("256 positions"),
        "{error}"
    );
}

#[test]
fn messages_refused_by_the_chat_template_are_client_errors_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let (template, judge) = (dir.path().join("strict.jinja"), dir.path().join("reward"));
    std::fs::write(
        &template,
        "{% for message in messages %}{% if message.role == 'oracle' %}{{ raise_exception('no oracles') }}{% endif %}\
         {% if message.role == 'assistant' and loop.index0 % 2 == 0 %}{{ raise_exception('out of turn') }}{% endif %}\
         <|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}\
         {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    .unwrap();
    let template = template.to_str().unwrap();
    let mut model = checkpoint();
    model.tokenizer = Some(model.tokenizer().unwrap().with_template(template).unwrap());
    model.into_reward_model(7).unwrap().save(&judge, &SaveOptions::new(DType::F32)).unwrap();
    let judge = judge.to_str().unwrap();
    let server = Server::start(&["--reward-model", judge, "--chat-template", template]);
    let messages = json!([{"role": "oracle", "content": "x"}]);
    for (path, body) in [
        (CHAT, json!({"messages": messages, "max_tokens": 1})),
        ("/tokenize", json!({"messages": messages})),
        ("/score", json!({"messages": messages, "completions": ["a", "b"]})),
    ] {
        let (status, error) = server.refused(path, &body.to_string());
        let message = error["message"].as_str().unwrap();
        assert_eq!((status, &error["type"]), (400, &json!("invalid_request_error")), "{path}");
        assert!(message.contains("`messages`") && message.contains("no oracles"), "{message}");
    }
    // A prompt that the template takes, and refuses once an answer follows.
    let twice = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]);
    server.ask("/tokenize", &json!({"messages": twice}));
    let body = json!({"messages": twice, "completions": ["a"]});
    let (status, error) = server.refused("/score", &body.to_string());
    assert!(status == 400 && error["message"].as_str().unwrap().contains("out of turn"), "{error}");
    server.ask("/score", &json!({"messages": question(), "completions": ["a"]}));
}

#[test]
fn default_host_listens_on_localhost_only() {
    let server = Server::start(&[]);
    let address: SocketAddr = server.url.strip_prefix("http://").unwrap().parse().unwrap();
    assert_eq!(address.ip(), Ipv4Addr::LOCALHOST);
    // One that listened to all addresses would answer at this one too.
    assert!(TcpStream::connect((Ipv4Addr::new(127, 0, 0, 2), address.port())).is_err());
}

#[test]
fn models_health_and_metrics_are_shown() {
    let server = Server::start(&["--served-model-name", "other/name"]);
    let models: Value = serde_json::from_str(&server.get("/v1/models").1).unwrap();
    assert_eq!(
        (&models["data"][0]["id"], &models["data"][1]["id"]),
        (&json!("tiny"), &json!("other/name"))
    );
    assert_eq!(models["data"][0]["max_model_len"], 256);
    assert_eq!(server.get("/v1/models/other/name").0, 200);
    assert_eq!(server.get("/v1/models/none").0, 404);
    assert_eq!(server.get("/health"), (200, "{\"status\":\"ok\"}".to_owned()));
    let (_, lost) = server.get("/v1/completion");
    assert!(lost.contains("did you mean `POST /v1/completions`?"), "{lost}");
    server.ask(PLAIN, &json!({"prompt": "Tom has", "max_tokens": 4, "logit_bias": endless()}));
    let (_, page) = server.get("/metrics");
    for line in [
        "arriero_requests_total{route=\"/v1/completions\",status=\"200\"} 1",
        "arriero_requests_total{route=\"/v1/models\",status=\"404\"} 1",
        "arriero_generated_tokens_total 4",
        "arriero_time_to_first_token_seconds_count 1",
        "arriero_request_seconds_count 1",
    ] {
        assert!(page.lines().any(|found| found == line), "{line} in:\n{page}");
    }
}

#[test]
fn unsupported_requests_are_refused_with_an_explanation() {
    let server = Server::start(&["--max-body", "20000"]);
    let messages = question();
    let long = "coins ".repeat(400);
    for (path, body, status, part) in [
        (CHAT, json!({"messages": messages, "model": "tinny"}), 404, "did you mean `tiny`?"),
        (CHAT, json!({"messages": messages, "temprature": 1}), 400, "did you mean `temperature`?"),
        (
            CHAT,
            json!({"messages": messages, "temperature": "hot"}),
            400,
            "`temperature`: invalid type",
        ),
        (CHAT, json!({"messages": []}), 400, "`messages` is empty"),
        (CHAT, json!({}), 400, "`messages` is missing"),
        (
            CHAT,
            json!({"messages": messages, "max_tokens": 250}),
            400,
            "`max_tokens` is 250, together more than the model's 256 positions",
        ),
        (CHAT, json!({"messages": messages, "guided_regex": "("}), 400, "cannot be enforced"),
        (
            CHAT,
            json!({"messages": messages, "tools": [{"type": "function", "function": {"name": "f"}}]}),
            400,
            "no place for them",
        ),
        (CHAT, json!({"messages": messages, "logit_bias": {"9999": 1}}), 400, "9999"),
        (CHAT, json!({"messages": messages, "stop_token_ids": [384]}), 400, "has 384, expected"),
        (PLAIN, json!({"prompt": long}), 400, "positions must hold an answer too"),
        (PLAIN, json!({"prompt": []}), 400, "no text"),
        (PLAIN, json!({"prompt": [1, 99999]}), 400, "token 99999, expected one below 384"),
        (PLAIN, json!({"prompt": "a", "suffix": "b"}), 400, "cannot fill a gap"),
        (PLAIN, json!({"prompt": "a", "best_of": 2}), 400, "`best_of`"),
        (PLAIN, json!({"prompt": "a", "max_tokens": 0}), 400, "without `echo`"),
        (PLAIN, json!({"prompt": "a", "logprobs": 21}), 400, "0 to 20"),
        (PLAIN, json!({"prompt": "x".repeat(30_000)}), 413, "limit"),
        ("/v1/embeddings", json!({"input": long}), 400, "256 positions"),
        ("/v1/embeddings", json!({"input": "a", "dimensions": 7}), 400, "expected the model's 128"),
        ("/v1/embeddings", json!({"input": "a", "encoding_format": "hex"}), 400, "float or base64"),
        ("/score", json!({"prompt": "a", "completions": ["b"]}), 400, "--reward-model"),
        ("/detokenize", json!({"tokens": [400]}), 400, "token 400"),
    ] {
        let (found, error) = server.refused(path, &body.to_string());
        let message = error["message"].as_str().unwrap();
        assert!(found == status && message.contains(part), "{path}: {found} {message}, not {part}");
    }
    let (status, error) = server.refused(CHAT, "{\"messages\": [");
    assert!(
        status == 400
            && error["message"].as_str().unwrap().starts_with("the body is not valid JSON")
    );
}

#[test]
fn unenforceable_form_is_refused_by_its_field() {
    let server = Server::start(&[]);
    let named = json!({"name": "s", "schema": {"type": 5}});
    for (field, value) in [
        ("guided_regex", json!("(")),
        ("guided_json", json!({"type": 5})),
        ("structured_outputs", json!({"regex": "("})),
        ("structured_outputs", json!({"json": {"type": 5}})),
        ("structured_outputs", json!({"choice": []})),
        ("response_format", json!({"type": "json_schema", "json_schema": named})),
    ] {
        for (path, asked) in
            [(PLAIN, json!({"prompt": "a"})), (CHAT, json!({"messages": question()}))]
        {
            let mut body = asked;
            body[field] = value.clone();
            let (status, error) = server.refused(path, &body.to_string());
            assert_eq!((status, &error["param"]), (400, &json!(field)), "{body}: {error}");
            let message = error["message"].as_str().unwrap();
            assert!(message.starts_with(&format!("`{field}")), "{message}");
        }
    }
}

/// A chat request for a few tokens with more fields, or others.
fn chat_with(more: &Value) -> String {
    let mut body = json!({"messages": question(), "max_tokens": 8});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body.to_string()
}

/// Chat requests with a number, a word or a list where something else belongs.
fn mistyped() -> Vec<String> {
    let big = 1_u64 << 62;
    let fields = [
        json!({"n": big}),
        json!({"n": -1}),
        json!({"n": 1.5}),
        json!({"max_tokens": big}),
        json!({"max_tokens": -1}),
        json!({"temperature": -0.1}),
        json!({"temperature": "hot"}),
        json!({"top_p": 2}),
        json!({"top_k": -7}),
        json!({"seed": 1.5}),
        json!({"stop": [1]}),
        json!({"stop_token_ids": 2}),
        json!({"stop_token_ids": [-1]}),
        json!({"stop_token_ids": [big]}),
        json!({"stream": "yes"}),
        json!({"logit_bias": {"-1": 5}}),
        json!({"logit_bias": {"99999999999999999999": 5}}),
        json!({"logit_bias": [1]}),
        json!({"top_logprobs": big, "logprobs": true}),
        json!({"chat_template_kwargs": 3}),
        json!({"messages": null}),
        json!({"messages": [null]}),
        json!({"messages": [[]]}),
        json!({"messages": [{}]}),
        json!({"messages": [{"role": 5, "content": "x"}]}),
        json!({"messages": [{"role": "user", "content": 5}]}),
        json!({"messages": [{"role": "user", "content": {"type": "text", "text": "x"}}]}),
        json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
        json!({"messages": [{"role": "user", "content": [[]]}]}),
    ];
    fields.iter().map(chat_with).collect()
}

#[test]
fn hostile_chats_are_handled_without_fetching_and_the_server_survives() {
    let server = Server::start(&[]);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let remote = format!("http://{}/x.json", listener.local_addr().unwrap());
    let file = format!("file://{}", student().join("config.json").display());
    let schema = |schema: Value| chat_with(&json!({"guided_json": schema}));
    let deep = "[".repeat(100_000);
    let mut bodies = mistyped();
    bodies.extend([
        schema(json!({"$ref": remote})),
        schema(json!({"properties": {"a": {"$ref": remote}}, "required": ["a"]})),
        schema(json!({"$ref": file})),
        schema(json!({"type": "no such type"})),
        schema(json!({"type": 5})),
        schema(json!(7)),
        chat_with(&json!({"guided_regex": "(?=a)b"})),
        format!("{{\"messages\": {deep}"),
        format!("{{\"guided_json\": {deep}{}}}", "]".repeat(100_000)),
        "[]".to_owned(),
        "null".to_owned(),
        String::new(),
    ]);
    for body in bodies {
        let (status, error) = server.refused(CHAT, &body);
        let start: String = body.chars().take(200).collect();
        assert!(status == 400, "{start}: {status} {error}");
    }
    // Roles are the template's affair; what is odd and can be honoured is.
    let says = |role: &str, content: Value| {
        chat_with(&json!({"messages": [{"role": role, "content": content}]}))
    };
    for body in [
        says("oracle", json!("x")),
        says("user", Value::Null),
        says("user", json!([])),
        schema(json!({"$ref": "#"})),
        chat_with(&json!({"guided_regex": "(a{1000}){1000}{1000}"})),
        chat_with(&json!({"guided_regex": "((((a?){100}){100}){100}){100}b"})),
        chat_with(&json!({"top_k": 1_u64 << 62, "seed": i64::MIN, "stop": vec!["x"; 1000]})),
    ] {
        let mut response = server.post(CHAT, &body);
        let text = response.body_mut().read_to_string().unwrap();
        assert!([200, 400].contains(&response.status().as_u16()), "{body}: {text}");
    }
    assert!(listener.accept().is_err(), "somebody came to fetch a schema");
    server.ask(CHAT, &json!({"messages": question(), "max_tokens": 4}));
}

#[test]
fn malformed_requests_of_every_kind_are_refused() {
    let server = Server::start(&[]);
    for body in [
        json!({"prompt": null}),
        json!({"prompt": 5}),
        json!({"prompt": [[]]}),
        json!({"prompt": [[1], "a"]}),
        json!({"prompt": [-1]}),
        json!({"prompt": vec!["a"; 300]}),
        json!({"prompt": "a", "echo": 1}),
    ] {
        let (status, error) = server.refused(PLAIN, &body.to_string());
        assert!(status == 400, "{body}: {status} {error}");
    }
    for path in [CHAT, PLAIN, "/v1/embeddings", "/tokenize", "/detokenize", "/score"] {
        for body in ["{}", "{\"messages\": 1}", "{\"input\": []}", "{\"tokens\": [-1]}"] {
            assert_eq!(server.refused(path, body).0, 400, "{path} {body}");
        }
        let request = server.agent.post(format!("{}{path}", server.url));
        let answer = request.send(&b"{\"prompt\": \"\xff\"}"[..]).unwrap();
        assert_eq!(answer.status(), 400, "{path}");
    }
    server.ask(PLAIN, &json!({"prompt": "Tom", "max_tokens": 1}));
}

#[test]
fn cache_capacity_is_counted_in_whole_pages() {
    // Four pages of 64: one for the prompt, three for answers.
    let server = Server::start(&["--cache-tokens", "256"]);
    let ask = |n: usize, more: Value| {
        let mut body = json!({"prompt": "Tom has", "n": n, "logit_bias": endless()});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let answer = server.ask(PLAIN, &ask(3, json!({"max_tokens": 64})));
    assert_eq!(answer["usage"]["completion_tokens"], 3 * 64);
    // A token more takes a page more for each answer: they take turns, and are the same.
    let seeded = |n: usize| ask(n, json!({"max_tokens": 65, "seed": 4}));
    let answer = server.ask(PLAIN, &seeded(3));
    assert_eq!(answer["usage"]["completion_tokens"], 3 * 65);
    let texts = |answer: &Value| {
        let choices = answer["choices"].as_array().unwrap().iter();
        choices.map(|choice| choice["text"].clone()).collect::<Vec<Value>>()
    };
    assert_eq!(texts(&answer), texts(&Server::start(&[]).ask(PLAIN, &seeded(3))));
    // One that is too long by itself is refused.
    let (status, error) = server.refused(PLAIN, &ask(1, json!({"max_tokens": 193})).to_string());
    let message = error["message"].as_str().unwrap();
    assert!(status == 400 && message.contains("an answer of 193 take 320"), "{message}");
    assert!(error["param"] == "max_tokens" && message.contains("`--cache-tokens`"), "{error}");
    // Without a number each answer has what fits, at least a page.
    let messages = json!([{"role": "user", "content": "Go on."}]);
    let chat = |n: usize| json!({"messages": messages, "n": n, "logit_bias": endless()});
    assert_eq!(server.ask(CHAT, &chat(2))["usage"]["completion_tokens"], 2 * 64);
    assert_eq!(server.ask(CHAT, &chat(4))["usage"]["completion_tokens"], 4 * 64);
}

#[test]
fn requests_without_the_api_key_are_refused() {
    let mut server = Server::start(&["--api-key-env", "TINY_KEY"]);
    let body = json!({"prompt": "Tom", "max_tokens": 1});
    for key in [None, Some(""), Some("a secreT"), Some("a")] {
        server.key = key;
        let (status, error) = server.refused(PLAIN, &body.to_string());
        assert_eq!((status, &error["code"]), (401, &json!("invalid_api_key")), "{key:?}");
    }
    assert_eq!((server.get("/v1/models").0, server.get("/health").0), (401, 200));
    server.key = Some("a secret");
    server.ask(PLAIN, &body);
}

#[test]
fn disconnected_client_is_cancelled_and_frees_its_place() {
    let server = Server::start(&["--max-requests", "1"]);
    let mut stream = server.stream(CHAT, &long(true));
    stream.next().unwrap();
    let brief = json!({"prompt": "Tom", "max_tokens": 1});
    let response = server.post(PLAIN, &brief.to_string());
    assert_eq!(
        (response.status().as_u16(), &response.headers()["retry-after"]),
        (429, &"1".parse().unwrap())
    );
    drop(response);
    drop(stream);
    server.wait_for("arriero_requests_cancelled_total 1");
    server.wait_for("arriero_answers_running 0");
    server.ask(PLAIN, &brief);
    // Also where the answer was to come as a whole.
    let url = server.url.clone();
    let quick = Agent::config_builder().timeout_global(Some(Duration::from_millis(300))).build();
    let gone = Agent::from(quick).post(format!("{url}{CHAT}")).send(long(false).to_string());
    assert!(gone.is_err());
    server.wait_for("arriero_requests_cancelled_total 2");
    server.ask(PLAIN, &brief);
}

/// A connection on which a request was begun whose body does not go on.
fn begun(server: &Server, path: &str) -> BufReader<TcpStream> {
    let address = server.url.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    // Less than a body is waited for.
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 10000\r\n\r\n{{\"prompt\": \"Tom"
    )
    .unwrap();
    BufReader::new(stream)
}

#[test]
fn a_request_without_a_free_place_is_refused_before_its_body_is_read() {
    let server = Server::start(&["--max-requests", "1", "--max-body", "20000"]);
    let mut answer = server.stream(CHAT, &long(true));
    answer.next().unwrap();
    for path in [PLAIN, CHAT, "/v1/embeddings", "/score"] {
        let mut line = String::new();
        begun(&server, path).read_line(&mut line).unwrap();
        assert!(line.starts_with("HTTP/1.1 429 "), "{path}: {line}");
    }
    // What nothing is computed for has places of its own.
    server.ask("/tokenize", &json!({"prompt": "Tom"}));
    drop(answer);
    server.wait_for("arriero_answers_running 0");

    let brief = json!({"prompt": "Tom", "max_tokens": 1}).to_string();
    let until_answered = || {
        let start = Instant::now();
        while server.post(PLAIN, &brief).status() != 200 {
            assert!(start.elapsed() < Duration::from_mins(1), "the place is not given back");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    until_answered();
    // A request whose body stalls keeps the place until its client goes away. One that arrives while a brief request is answered is
    // refused itself, so it may take more than one.
    let start = Instant::now();
    let half = loop {
        let half = begun(&server, PLAIN);
        std::thread::sleep(Duration::from_millis(50));
        if server.post(PLAIN, &brief).status() == 429 {
            break half;
        }
        assert!(start.elapsed() < Duration::from_mins(1), "no stalled request takes the place");
    };
    drop(half);
    until_answered();
}

#[test]
fn failed_requests_always_free_their_place() {
    let server = Server::start(&["--max-requests", "1", "--max-body", "20000"]);
    let embed = json!({"input": "a", "dimensions": 7}).to_string();
    let brief = json!({"prompt": "Tom", "max_tokens": 1});
    for (path, body, status) in [
        (PLAIN, "{", 400),
        (PLAIN, "{\"prompt\": 5}", 400),
        (PLAIN, "{\"prompt\": [\"a\", \"b\"]}", 400),
        (PLAIN, "x".repeat(30_000).as_str(), 413),
        (CHAT, "{\"messages\": []}", 400),
        (CHAT, "{\"messages\": [], \"model\": \"none\"}", 404),
        ("/v1/embeddings", "{}", 400),
        ("/v1/embeddings", embed.as_str(), 400),
        ("/score", "{}", 400),
        ("/tokenize", "{}", 400),
        ("/detokenize", "{", 400),
        ("/v1/unload_lora_adapter", "{}", 400),
    ] {
        let (found, error) = server.refused(path, body);
        assert_eq!(found, status, "{path} {body:.40}: {error}");
        server.ask(PLAIN, &brief);
        server.ask("/tokenize", &json!({"prompt": "Tom"}));
    }
}

#[test]
fn stopping_server_finishes_its_answers_and_accepts_no_more() {
    let mut server = Server::start(&["--drain", "300"]);
    let mut stream = server.stream(CHAT, &long(true));
    stream.next().unwrap();
    server.terminate();
    let start = Instant::now();
    while server.get("/health").0 == 200 {
        assert!(start.elapsed() < Duration::from_secs(10), "it goes on");
    }
    let (status, error) = server.refused(PLAIN, "{\"prompt\": \"Tom\"}");
    assert_eq!((status, &error["code"]), (503, &json!("stopping")));
    let mut lines: Vec<String> = stream.collect();
    assert_eq!(lines.pop().as_deref(), Some("[DONE]"));
    let ended = lines.iter().filter(|line| line.contains("\"finish_reason\":\"length\"")).count();
    assert_eq!(ended, 128);
    assert!(server.served.child.wait().unwrap().success());
}

#[test]
fn answer_cut_off_by_the_drain_limit_says_why() {
    let mut server = Server::start(&["--drain", "0"]);
    let mut stream = server.stream(CHAT, &long(true));
    stream.next().unwrap();
    server.terminate();
    let mut lines: Vec<String> = stream.collect();
    assert_eq!(lines.pop().as_deref(), Some("[DONE]"));
    assert!(lines.pop().unwrap().contains("\"code\":\"stopping\""));
    assert!(server.served.child.wait().unwrap().success());
}

#[test]
fn invalid_server_arguments_are_refused() {
    let refused = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_arriero"));
        let output = command.arg("serve").arg(student()).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    let server = Server::start(&[]);
    let port = server.url.rsplit(':').next().unwrap();
    assert!(refused(&["--port", port]).contains("hint: choose another --port"));
    let no_key = refused(&["--port", "0", "--api-key-env", "NO_SUCH_VARIABLE"]);
    assert!(no_key.contains("no key in the environment variable NO_SUCH_VARIABLE"), "{no_key}");
}

/// Whole and streamed. `scripts/test` installs curl; without it, a machine that only builds says so and passes.
#[test]
fn curl_gets_answers() {
    let server = Server::start(&[]);
    let curl = |arguments: &[&str]| {
        Command::new("curl").args(["-sS", "--max-time", "60"]).args(arguments).output()
    };
    if curl(&["--version"]).is_err() {
        assert!(std::env::var_os("ARRIERO_PEERS").is_none(), "there is no curl: run scripts/test");
        println!("not run: there is no curl");
        return;
    }
    let url = format!("{}{CHAT}", server.url);
    let mut body = json!({"messages": question(), "max_tokens": 8, "temperature": 0});
    let output = curl(&["-d", &body.to_string(), &url]).unwrap();
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");

    body["stream"] = json!(true);
    let output = curl(&["-N", "-D", "-", "-d", &body.to_string(), &url]).unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (head, events) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.to_lowercase().contains("content-type: text/event-stream"), "{head}");
    let mut events: Vec<&str> =
        events.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(events.pop(), Some("[DONE]"), "{text}");
    let chunks: Vec<Value> =
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let streamed = joined(&chunks, 1).remove(0);
    assert_eq!(answer["choices"][0]["message"]["content"], streamed.0);
    assert_eq!(answer["choices"][0]["finish_reason"], streamed.2);
}

/// Writes an adapter of the tiny model whose answers are others than its own.
fn adapter(dir: &Path, seed: u64) {
    let base = checkpoint();
    let lora = Lora { lora_r: 4, ..Lora::default() };
    let mut weights = base.weights.clone();
    let mut attached = attach(&lora, &base.config, &mut weights, seed).unwrap();
    for (name, factor) in &mut attached.factors {
        if name.ends_with("lora_B.weight") {
            *factor = (factor.ones_like().unwrap() * 0.02).unwrap();
        }
    }
    let config = AdapterConfig { r: 4, lora_alpha: 32.0, ..AdapterConfig::default() };
    std::fs::create_dir_all(dir).unwrap();
    let record = BaseRecord::dense(&peft::fingerprint(&base.weights).unwrap());
    peft::write(dir, &config, &attached.factors, &record).unwrap();
}

/// What the tiny model with an adapter merged into it answers.
fn merged(dir: &Path, prompt: &str) -> String {
    let saved = peft::read(dir, &Device::Cpu).unwrap();
    let model = LocalModel::new(&checkpoint().with_adapter(&saved, dir).unwrap()).unwrap();
    let tokens = model.tokenizer().encode_special(prompt).unwrap();
    let sampling = Sampling { max_new_tokens: 12, ..Sampling::greedy(12) };
    let mut text = String::new();
    model
        .run(&[Prompt { index: 0, tokens }], &sampling, &mut |_, answers| {
            text.clone_from(&answers[0].text);
            Ok(())
        })
        .unwrap();
    text
}

#[test]
fn adapters_load_and_unload_beside_one_base() {
    let home = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| home.path().join(name));
    adapter(&one, 3);
    adapter(&two, 4);
    let module = format!("one={}", one.display());
    let server = Server::start(&["--lora-modules", &module, "--allow-runtime-lora-updating"]);
    let greedy = |model: &str| json!({"model": model, "prompt": "Tom has", "max_tokens": 12, "temperature": 0});
    let text = |model: &str| {
        let answer = server.ask(PLAIN, &greedy(model));
        assert_eq!(answer["model"], model);
        answer["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    let (own, first) = (text("tiny"), text("one"));
    assert_eq!(first, merged(&one, "Tom has"));
    assert_ne!(own, first);

    let loaded = json!({"lora_name": "two", "lora_path": two.display().to_string()});
    server.ask("/v1/load_lora_adapter", &loaded);
    assert_eq!(text("two"), merged(&two, "Tom has"));
    let models: Value = serde_json::from_str(&server.get("/v1/models").1).unwrap();
    let of = |index: usize, key: &str| models["data"][index][key].clone();
    assert_eq!([of(0, "id"), of(1, "id"), of(2, "id")], ["tiny", "one", "two"]);
    assert_eq!((of(2, "parent"), of(2, "root")), (json!("tiny"), json!(two.display().to_string())));
    let prints = ["tiny", "one", "two"]
        .map(|model| server.ask(PLAIN, &greedy(model))["system_fingerprint"].to_string());
    assert!(prints[0] != prints[1] && prints[1] != prints[2]);
    let (_, error) = server.refused("/v1/load_lora_adapter", &loaded.to_string());
    assert_eq!(error["code"], "name_taken");
    let embed = json!({"model": "two", "input": "a"}).to_string();
    let (_, error) = server.refused("/v1/embeddings", &embed);
    assert!(error["message"].as_str().unwrap().contains("expected its base"), "{error}");

    // Trained beside NF4, it is another model here than it was there, and its loader is told.
    let saved = peft::read(&two, &Device::Cpu).unwrap();
    let record = BaseRecord { quantization: Quantization::Nf4, ..saved.base.clone().unwrap() };
    let three = home.path().join("three");
    std::fs::create_dir(&three).unwrap();
    peft::write(&three, &saved.config, &saved.attached().factors, &record).unwrap();
    let coarse = json!({"lora_name": "three", "lora_path": three.display().to_string()});
    let told = server.ask("/v1/load_lora_adapter", &coarse);
    assert!(told["note"].as_str().unwrap().contains("trained on NF4"), "{told}");
    server.ask("/v1/unload_lora_adapter", &json!({"lora_name": "three"}));

    server.ask("/v1/unload_lora_adapter", &json!({"lora_name": "two"}));
    let (status, error) = server.refused(PLAIN, &greedy("two").to_string());
    assert!(status == 404 && error["code"] == "model_not_found", "{error}");
    assert_eq!(text("one"), first);
    for (path, what) in [("/none", "adapter_config.json"), ("", "adapter_config.json")] {
        let asked =
            json!({"lora_name": "x", "lora_path": format!("{}{path}", home.path().display())});
        let (status, error) = server.refused("/v1/load_lora_adapter", &asked.to_string());
        assert!(status == 400 && error["message"].as_str().unwrap().contains(what), "{error}");
    }
}

#[test]
fn caches_of_an_adapter_are_freed_when_it_is_unloaded() {
    let home = tempfile::tempdir().unwrap();
    adapter(home.path(), 3);
    let module = format!("one={}", home.path().display());
    let server = Server::start(&["--lora-modules", &module, "--allow-runtime-lora-updating"]);
    let asked = |model: &str| json!({"model": model, "prompt": "Tom has", "max_tokens": 12});
    // A page for the prompt and one for its answer, of each.
    server.ask(PLAIN, &asked("tiny"));
    server.wait_for("arriero_cache_tokens 128");
    server.ask(PLAIN, &asked("one"));
    server.wait_for("arriero_cache_tokens 256");
    server.ask("/v1/unload_lora_adapter", &json!({"lora_name": "one"}));
    server.wait_for("arriero_cache_tokens 128");
}

#[test]
fn server_with_rounded_weights_loads_adapters_at_start_and_embeds() {
    let home = tempfile::tempdir().unwrap();
    adapter(home.path(), 3);
    let module = format!("one={}", home.path().display());
    let server = Server::start(&["--quantization", "q8_0", "--lora-modules", &module]);
    for model in ["tiny", "one"] {
        let asked = json!({"model": model, "prompt": "Tom has", "max_tokens": 4});
        assert_eq!(server.ask(PLAIN, &asked)["model"], model);
    }
    // The rounded model's states are nearly the whole one's.
    let embed = json!({"model": "tiny", "input": "Tom has 3 coins."});
    let answers = [server, Server::start(&[])].map(|server| server.ask("/v1/embeddings", &embed));
    let vectors =
        answers.each_ref().map(|answer| answer["data"][0]["embedding"].as_array().unwrap());
    let products =
        vectors[0].iter().zip(vectors[1]).map(|(a, b)| a.as_f64().unwrap() * b.as_f64().unwrap());
    let cosine = products.sum::<f64>();
    assert!(cosine > 0.99 && cosine < 1.0 - 1e-7, "{cosine}");
    let server = Server::start(&["--lora-modules", &module]);
    let asked = json!({"lora_name": "x", "lora_path": "y"}).to_string();
    let (_, error) = server.refused("/v1/load_lora_adapter", &asked);
    assert_eq!(error["code"], "not_allowed");
}
