//! Writes the tiny world that the quickstart lives in: word problems with checkable answers.
//!
//!     cargo run --release --example tiny_world -- runs/tiny-world data/tiny
//!
//! The first folder gets what the two models are pre-trained on (`teacher.jsonl`, conversations with right answers;
//! `student.jsonl`, plain text without a chat format) and the untrained models (`teacher/`, `student/`: configuration
//! and tokenizer). The second gets the quickstart's own prompts: `taught.jsonl` for the teacher to answer,
//! `prompts.jsonl` to draw candidates for, and `heldout.jsonl`. No prompt is in two files.
//! `examples/tiny-teacher.toml` and `examples/tiny-student.toml` then pre-train the models.

use std::collections::BTreeSet;
use std::path::Path;

use arriero::data::tokenizer::{ChatTokenizer, TokenizerSettings};
use arriero::data::train_tokenizer;
use arriero::error::{Error, Result};
use arriero::rng::Stream;
use arriero::store;
use rand::Rng;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};

const NAMES: [&str; 16] = [
    "Mara", "Tom", "Lena", "Omar", "Nina", "Hugo", "Iris", "Paul", "Rosa", "Ben", "Clara", "Emil",
    "Dora", "Finn", "Greta", "Yusuf",
];
const THINGS: [&str; 12] = [
    "apples", "stamps", "shells", "marbles", "coins", "books", "cards", "pens", "stones", "eggs",
    "beads", "nuts",
];

/// One problem: its question, the worked answer, the number, and the same story told as plain text.
struct Problem {
    question: String,
    worked: String,
    answer: i64,
    story: String,
}

fn problem(rng: &mut impl Rng) -> Problem {
    let pick = |rng: &mut _, list: &[&'static str]| -> &'static str {
        list.choose(rng).copied().unwrap_or("")
    };
    let name = pick(rng, &NAMES);
    let friend = loop {
        let friend = pick(rng, &NAMES);
        if friend != name {
            break friend;
        }
    };
    let things = pick(rng, &THINGS);
    let (a, b) = (rng.random_range(2..=20_i64), rng.random_range(2..=20_i64));
    let (high, low) = (a.max(b), a.min(b));
    let (facts, ask, steps, answer, end) = match rng.random_range(0..5) {
        0 => (
            format!("{name} has {a} {things} and finds {b} more."),
            format!("How many {things} does {name} have now?"),
            format!("{a} + {b} = {}.", a + b),
            a + b,
            format!("{name} has {} {things}.", a + b),
        ),
        1 => (
            format!("{name} has {high} {things} and gives {low} to {friend}."),
            format!("How many {things} does {name} have left?"),
            format!("{high} - {low} = {}.", high - low),
            high - low,
            format!("{name} has {} {things} left.", high - low),
        ),
        2 => (
            format!("{name} has {high} {things}. {friend} has {low} {things}."),
            format!("How many more {things} does {name} have than {friend}?"),
            format!("{high} - {low} = {}.", high - low),
            high - low,
            format!("{name} has {} more {things}.", high - low),
        ),
        3 => (
            format!("{name} has {a} {things}. {friend} has twice as many."),
            format!("How many {things} does {friend} have?"),
            format!("{a} + {a} = {}.", a + a),
            a + a,
            format!("{friend} has {} {things}.", a + a),
        ),
        _ => {
            let lost = rng.random_range(1..=20.min(a + b - 1));
            let left = a + b - lost;
            (
                format!("{name} has {a} {things}, finds {b} more and then loses {lost}."),
                format!("How many {things} does {name} have now?"),
                format!("{a} + {b} = {}. {} - {lost} = {left}.", a + b, a + b),
                left,
                format!("{name} has {left} {things}."),
            )
        }
    };
    Problem {
        question: format!("{facts} {ask}"),
        worked: format!("{steps} {end}"),
        answer,
        story: format!("{facts} {steps} {end}"),
    }
}

/// `count` problems whose questions are in no earlier set.
fn problems(stream: &str, count: usize, seen: &mut BTreeSet<String>) -> Vec<Problem> {
    let stream = Stream::new(20_240_726, stream);
    let mut out = Vec::with_capacity(count);
    for index in 0.. {
        if out.len() == count {
            break;
        }
        let problem = problem(&mut stream.at(0, index));
        if seen.insert(problem.question.clone()) {
            out.push(problem);
        }
    }
    out
}

/// Six sums in a row: what a base model reads of arithmetic.
fn sums(index: u64) -> String {
    let mut rng = Stream::new(20_240_726, "sums").at(0, index);
    let mut sum = || {
        let (a, b) = (rng.random_range(2..=20_i64), rng.random_range(1..=20_i64));
        match rng.random_range(0..3) {
            0 => format!("{a} + {b} = {}.", a + b),
            1 => format!("{} - {b} = {a}.", a + b),
            _ => format!("{a} + {a} = {}.", a + a),
        }
    };
    (0..6).map(|_| sum()).collect::<Vec<_>>().join(" ")
}

fn conversation(problem: &Problem) -> Value {
    json!({"messages": [
        {"role": "user", "content": problem.question},
        {"role": "assistant", "content": problem.worked},
    ]})
}

fn prompt(problem: &Problem) -> Value {
    json!({
        "messages": [{"role": "user", "content": problem.question}],
        "answer": problem.answer.to_string(),
    })
}

fn write_rows(path: &Path, rows: impl Iterator<Item = Value>) -> Result<()> {
    let text: String = rows.flat_map(|row| [row.to_string(), "\n".to_owned()]).collect();
    store::write_atomic(path, text.as_bytes())
}

/// An untrained model: sizes and tokenizer, no weights.
fn write_model(dir: &Path, tokenizer: &ChatTokenizer, sizes: [usize; 6]) -> Result<()> {
    let [hidden, layers, heads, kv_heads, feed_forward, positions] = sizes;
    store::create_dir(dir)?;
    tokenizer.save(dir)?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": hidden / heads, "intermediate_size": feed_forward,
        "max_position_embeddings": positions, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "initializer_range": 0.05, "torch_dtype": "float32",
        "vocab_size": tokenizer.vocab_size().next_multiple_of(8),
        "bos_token_id": tokenizer.bos(), "eos_token_id": tokenizer.ends(), "pad_token_id": tokenizer.pad(),
    });
    store::write_json(&dir.join("config.json"), &config)
}

fn main() -> Result<()> {
    let folders: Vec<String> = std::env::args().skip(1).collect();
    let [work, data] = folders.as_slice() else {
        return Err(Error::usage(
            "expected two folders: one for pre-training data, one for the quickstart's data",
        ));
    };
    let (work, data) = (Path::new(work), Path::new(data));
    let mut seen = BTreeSet::new();
    let heldout = problems("heldout", 300, &mut seen);
    let taught = problems("taught", 600, &mut seen);
    let prompts = problems("prompts", 800, &mut seen);
    let teacher = problems("teacher", 24_000, &mut seen);
    let student = problems("student", 24_000, &mut seen);

    write_rows(&data.join("taught.jsonl"), taught.iter().map(prompt))?;
    write_rows(&data.join("prompts.jsonl"), prompts.iter().map(prompt))?;
    write_rows(&data.join("heldout.jsonl"), heldout.iter().map(prompt))?;
    write_rows(&work.join("teacher.jsonl"), teacher.iter().map(conversation))?;
    let stories = student.iter().map(|problem| problem.story.clone());
    let texts = stories.chain((0..20_000).map(sums)).map(|text| json!({"text": text}));
    write_rows(&work.join("student.jsonl"), texts)?;
    let test = problems("test", 300, &mut seen);
    write_rows(&work.join("test.jsonl"), test.iter().map(conversation))?;

    let texts =
        teacher.iter().take(4000).map(|problem| format!("{} {}", problem.question, problem.worked));
    let specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"];
    let bpe = train_tokenizer(texts.chain(["user assistant system\n".to_owned()]), 380, &specials)?;
    let id = |token: &str| bpe.token_to_id(token);
    let settings = TokenizerSettings {
        bos: id("<|endoftext|>"),
        ends: id("<|im_end|>").into_iter().collect(),
        eos: id("<|im_end|>"),
        pad: id("<|pad|>"),
        ..TokenizerSettings::default()
    };
    let tokenizer = ChatTokenizer::new(bpe, settings)?.with_template("chatml")?;
    write_model(&work.join("teacher"), &tokenizer, [192, 5, 6, 3, 512, 256])?;
    write_model(&work.join("student"), &tokenizer, [128, 4, 4, 2, 320, 256])
}
