//! The generating stages on a random byte-level model, in a temporary directory.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device};
use serde_json::{Value, json};
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use super::{StageContext, run_stage};
use crate::data::template;
use crate::data::tokenizer::{ChatTokenizer, TokenizerSettings};
use crate::error::Kind;
use crate::generate::sampling::Sampling;
use crate::generate::teacher::TeacherSpec;
use crate::model::checkpoint::Checkpoint;
use crate::model::save::SaveOptions;
use crate::model::{Config, init};
use crate::recipe::Spec;
use crate::recipe::plan::{self, Dataset};
use crate::report::record::{Events, Metrics, Silent};
use crate::store;

fn byte_tokenizer() -> ChatTokenizer {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let vocab: Vec<(String, u32)> =
        alphabet.iter().zip(0..).map(|(c, id)| (c.to_string(), id)).collect();
    let bpe = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<ahash_map::Vocab>(), vec![])
        .build()
        .unwrap();
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, false)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    tokenizer
        .add_special_tokens(
            ["<|im_start|>", "<|im_end|>", "<|pad|>"].map(|text| AddedToken::from(text, true)),
        )
        .unwrap();
    let settings = TokenizerSettings {
        chat_template: Some(template::resolve("chatml").unwrap()),
        bos: None,
        ends: vec![257],
        eos: Some(257),
        pad: Some(258),
        add_bos: false,
    };
    ChatTokenizer::new(tokenizer, settings).unwrap()
}

/// The map type that the tokenizer's builder takes.
mod ahash_map {
    pub(super) type Vocab = tokenizers::models::bpe::Vocab;
}

pub(super) fn save_model(dir: &Path, seed: u64, reward: bool) -> String {
    let text = json!({
        "model_type": "llama", "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "initializer_range": 0.3, "max_position_embeddings": 128, "eos_token_id": 257,
        "tie_word_embeddings": true,
    });
    let config = Config::from_json(&text.to_string()).unwrap();
    let weights = init::random(&config, seed, &Device::Cpu).unwrap();
    let mut checkpoint = Checkpoint { config, weights, tokenizer: Some(byte_tokenizer()) };
    if reward {
        checkpoint = checkpoint.into_reward_model(seed).unwrap();
    }
    checkpoint.save(dir, &SaveOptions::new(DType::F32)).unwrap();
    dir.display().to_string()
}

fn prompts(dir: &Path, count: usize) -> Vec<Dataset> {
    let path = dir.join("prompts.jsonl");
    let rows: Vec<String> = (0..count)
        .map(|i| json!({"prompt": format!("say {i}"), "answer": "0"}).to_string())
        .collect();
    store::write_atomic(&path, rows.join("\n").as_bytes()).unwrap();
    vec![Dataset { path: path.display().to_string(), ..Dataset::default() }]
}

pub(super) fn run(dir: PathBuf, spec: &Spec, events: &dyn Events) -> crate::Result<Metrics> {
    store::create_dir(&dir)?;
    let context = StageContext { dir, round: 1, seed: 3, device: Device::Cpu, events };
    run_stage(&context, spec)
}

/// Interrupts after some prompts.
struct StopAfter(u64, AtomicU64);

impl Events for StopAfter {
    fn progress(&self, _what: &str, done: u64, _total: u64) {
        self.1.store(done, Ordering::Relaxed);
    }
    fn metrics(&self, _step: u64, _values: &Metrics) -> crate::Result<()> {
        Ok(())
    }
    fn resume_after(&self, _step: u64) -> crate::Result<()> {
        Ok(())
    }
    fn note(&self, _text: &str) {}
    fn interrupted(&self) -> bool {
        self.1.load(Ordering::Relaxed) >= self.0
    }
}

pub(super) fn sampling(samples: usize) -> Sampling {
    Sampling { num_samples: samples, max_new_tokens: 12, seed: 9, ..Sampling::default() }
}

pub(super) fn lines(path: &Path) -> Vec<Value> {
    store::read_ledger(path).unwrap()
}

#[test]
fn sampling_resumed_from_a_torn_ledger_gives_the_same_file() {
    let home = tempfile::tempdir().unwrap();
    let policy = save_model(&home.path().join("policy"), 1, false);
    let reward = save_model(&home.path().join("reward"), 2, true);
    let spec = Spec::Sample(plan::Sample {
        model_name_or_path: policy,
        datasets: prompts(home.path(), 7),
        sampling: sampling(3),
        scorers: vec![
            json!({"reward_model": reward}),
            json!({"verifier": "length", "max": 5, "weight": 0.1}),
        ],
        ..plan::Sample::default()
    });
    let whole = home.path().join("whole");
    let metrics = run(whole.clone(), &spec, &Silent).unwrap();
    assert!((metrics["candidates"] - 21.0).abs() < 1e-9);

    let torn = home.path().join("torn");
    for stop in [2, 4] {
        let stopped = run(torn.clone(), &spec, &StopAfter(stop, AtomicU64::new(0))).unwrap_err();
        assert_eq!(stopped.kind(), Kind::Interrupted);
        // A kill in the middle of a line.
        let ledger = torn.join("ledger.jsonl");
        let bytes = std::fs::read(&ledger).unwrap();
        crate::store::write_atomic(&ledger, &bytes[..bytes.len() - 9]).unwrap();
    }
    run(torn.clone(), &spec, &Silent).unwrap();
    let read = |dir: &Path| std::fs::read(dir.join("data.jsonl")).unwrap();
    assert_eq!(read(&torn), read(&whole));
}

#[test]
fn samples_are_selected_across_rounds_and_evaluated_against_a_reference() {
    let home = tempfile::tempdir().unwrap();
    let policy = save_model(&home.path().join("policy"), 1, false);
    let reward = save_model(&home.path().join("reward"), 2, true);
    let datasets = prompts(home.path(), 4);
    let scorers = vec![json!({"reward_model": reward})];
    let sample = |seed, earlier| {
        Spec::Sample(plan::Sample {
            model_name_or_path: policy.clone(),
            datasets: datasets.clone(),
            sampling: Sampling { seed, stop: vec!["\u{fffd}".to_owned()], ..sampling(4) },
            scorers: scorers.clone(),
            earlier,
            ..plan::Sample::default()
        })
    };
    run(home.path().join("s1"), &sample(1, vec![]), &Silent).unwrap();
    let first = home.path().join("s1/data.jsonl");
    run(home.path().join("s2"), &sample(2, vec![first.display().to_string()]), &Silent).unwrap();
    let second = home.path().join("s2/data.jsonl");
    for (old, new) in lines(&first).iter().zip(lines(&second)) {
        let candidates = new["candidates"].as_array().unwrap();
        assert_eq!(candidates.len(), 5);
        let old = old["candidates"].as_array().unwrap();
        // The same answer has the same score under the same judge.
        assert!(
            old.iter().any(|old| old["text"] == candidates[4]["text"]
                && old["score"] == candidates[4]["score"])
        );
    }
    let select = Spec::Select(plan::Select {
        datasets: vec![Dataset { path: second.display().to_string(), ..Dataset::default() }],
        ..plan::Select::default()
    });
    let metrics = run(home.path().join("sel"), &select, &Silent).unwrap();
    assert!(metrics["pairs"] > 0.0 && metrics["margin"] > 0.0, "{metrics:?}");
    let empty = |text: &Value| text.as_str().unwrap().trim().is_empty();
    let rows = lines(&second);
    let candidates = rows.iter().flat_map(|row| row["candidates"].as_array().unwrap());
    let left_out = candidates.filter(|one| empty(&one["text"])).count() as f64;
    assert!((metrics["empty"] - left_out).abs() < 1e-9 && left_out > 0.0, "{metrics:?}");
    for pair in lines(&home.path().join("sel/pairs.jsonl")) {
        assert_eq!(pair["chosen"][0]["role"], "assistant");
        assert!(["chosen", "rejected"].iter().all(|side| !empty(&pair[side][0]["content"])));
    }

    let eval = |reference: &str| {
        let spec = Spec::Eval(plan::Eval {
            model_name_or_path: policy.clone(),
            datasets: datasets.clone(),
            sampling: sampling(2),
            scorers: vec![json!({"verifier": "contains"}), scorers[0].clone()],
            reference: reference.to_owned(),
        });
        run(home.path().join(format!("eval-{}", reference.len())), &spec, &Silent).unwrap()
    };
    let own = eval(&policy);
    assert!(own["kl"].abs() < 1e-4 && own.contains_key("best_of_k_accuracy"), "{own:?}");
    let other = save_model(&home.path().join("other-policy"), 5, false);
    assert!(eval(&other)["kl"] > 0.1);
    assert!(!eval("").contains_key("kl"));
}

#[test]
fn teacher_answers_accepted_by_the_judges_are_kept() {
    let home = tempfile::tempdir().unwrap();
    let synth = |scorers: Vec<Value>| {
        let dir = home.path().join("teacher");
        let teacher =
            if dir.exists() { dir.display().to_string() } else { save_model(&dir, 1, false) };
        Spec::Synth(plan::Synth {
            teacher: TeacherSpec::Local(teacher),
            datasets: prompts(home.path(), 6),
            sampling: Sampling { stop: vec!["\u{fffd}".to_owned()], ..sampling(4) },
            scorers,
            ..plan::Synth::default()
        })
    };
    let all = run(home.path().join("a"), &synth(vec![]), &Silent).unwrap();
    let short = json!({"verifier": "length", "max": 2});
    let some = run(home.path().join("b"), &synth(vec![short]), &Silent).unwrap();
    assert!(some["rows"] < all["rows"], "{some:?} {all:?}");
    for row in lines(&home.path().join("b/data.jsonl")) {
        assert_eq!(row["messages"][1]["role"], "assistant");
        assert!(row["messages"][1]["content"].as_str().unwrap().chars().count() <= 2);
        assert_eq!(row["answer"], "0");
    }
    let impossible = json!({"verifier": "regex", "pattern": "impossible"});
    let error = run(home.path().join("c"), &synth(vec![impossible]), &Silent).unwrap_err();
    assert!(error.to_string().starts_with("none of the answers to 6 prompts"), "{error}");
}

/// Prompts of two capabilities, with answers of their own.
fn answered(dir: &Path) -> Vec<Dataset> {
    let path = dir.join("answered.jsonl");
    let rows: Vec<String> = (0..6)
        .map(|i| {
            let capability = if i % 2 == 0 { "code" } else { "chat" };
            let messages = json!([
                {"role": "user", "content": format!("say {i}")},
                {"role": "assistant", "content": format!("own {i}")},
            ]);
            json!({"messages": messages, "answer": "0", "capability": capability}).to_string()
        })
        .collect();
    store::write_atomic(&path, rows.join("\n").as_bytes()).unwrap();
    vec![Dataset { path: path.display().to_string(), ..Dataset::default() }]
}

fn mixed_sample(home: &Path, keep_system: bool, policies: Vec<plan::Policy>) -> plan::Sample {
    let policy = home.join("policy");
    let model =
        if policy.exists() { policy.display().to_string() } else { save_model(&policy, 1, false) };
    plan::Sample {
        model_name_or_path: model,
        datasets: answered(home),
        sampling: sampling(3),
        scorers: vec![json!({"verifier": "contains", "values": ["own"]})],
        include_reference: true,
        keep_system,
        policies,
        ..plan::Sample::default()
    }
}

/// The policy for code: another model, with a system message.
fn code_policy(home: &Path) -> plan::Policy {
    let condition =
        plan::Condition { column: "capability".to_owned(), values: vec![json!("code")] };
    plan::Policy {
        name: "code".to_owned(),
        conditions: vec![condition],
        model_name_or_path: save_model(&home.join("expert"), 4, false),
        system: "use few words".to_owned(),
        sampling: sampling(2),
    }
}

fn draw(home: &Path, name: &str, spec: plan::Sample) -> (Vec<Value>, Metrics) {
    let metrics = run(home.join(name), &Spec::Sample(spec), &Silent).unwrap();
    (lines(&home.join(name).join("data.jsonl")), metrics)
}

#[test]
fn each_capability_uses_its_policy_and_rows_drop_the_system_prompt() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let code = code_policy(home);
    let (rows, metrics) = draw(home, "mixed", mixed_sample(home, false, vec![code.clone()]));
    assert!((metrics["candidates"] - 15.0).abs() < 1e-9, "{metrics:?}");
    assert!(metrics["samples_per_second"] > 0.0 && metrics["pass@2"] <= 1.0, "{metrics:?}");

    // Each policy draws as it would alone.
    let (chat, _) = draw(home, "chat", mixed_sample(home, false, vec![]));
    assert_eq!(chat[1], rows[1]);
    let alone = plan::Sample {
        model_name_or_path: code.model_name_or_path.clone(),
        system: code.system.clone(),
        sampling: sampling(2),
        ..mixed_sample(home, false, vec![])
    };
    let (alone, _) = draw(home, "alone", alone);
    for at in [0, 2, 4] {
        for sample in 0..2 {
            let text = |rows: &[Value]| rows[at]["candidates"][sample]["text"].clone();
            assert_eq!(text(&alone), text(&rows));
        }
        assert_eq!(rows[at]["prompt"].as_array().unwrap().len(), 1, "steered, then forgotten");
    }
    let (kept, _) = draw(home, "kept", mixed_sample(home, true, vec![code]));
    assert_eq!(kept[0]["prompt"][0], json!({"role": "system", "content": "use few words"}));
    assert_eq!(kept[1]["prompt"].as_array().unwrap().len(), 1);
    for file in ["candidates.html", "curve.json"] {
        assert!(home.join("kept").join(file).is_file(), "{file}");
    }
}

#[test]
fn reference_answer_is_judged_beside_the_sampled_ones() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let spec = mixed_sample(home, false, vec![code_policy(home)]);
    let (rows, metrics) = draw(home, "mixed", spec.clone());
    let origins = |row: &Value| -> Vec<String> {
        let candidates = row["candidates"].as_array().unwrap();
        candidates.iter().map(|one| one["origin"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(origins(&rows[0]), ["round 1 code/0", "round 1 code/1", "reference"]);
    assert_eq!(origins(&rows[1]), ["round 1/0", "round 1/1", "round 1/2", "reference"]);
    let own = &rows[2]["candidates"][2];
    assert_eq!((&own["text"], &own["finish"]), (&json!("own 2"), &json!("stop")));
    // Five bytes and the end-of-turn token.
    assert_eq!((&own["tokens"], &own["passed"]), (&json!(6), &json!(true)));
    assert!(metrics["reference_score"] > 0.99);

    // Only the reference contains the word, so it is chosen, in the next round too.
    let first = home.join("mixed/data.jsonl").display().to_string();
    let select = Spec::Select(plan::Select {
        datasets: vec![Dataset { path: first.clone(), ..Dataset::default() }],
        strategy: crate::score::select::PairStrategy::BestRandom,
        ..plan::Select::default()
    });
    let metrics = run(home.join("chosen"), &select, &Silent).unwrap();
    assert!((metrics["from_reference"] - 6.0).abs() < 1e-9, "{metrics:?}");
    let (again, _) = draw(home, "again", plan::Sample { earlier: vec![first], ..spec });
    assert_eq!(origins(&again[0]), origins(&rows[0]), "the earlier best is the reference itself");

    let none = plan::Sample {
        datasets: prompts(home, 2),
        include_reference: true,
        ..mixed_sample(home, false, vec![])
    };
    let error = run(home.join("none"), &Spec::Sample(none), &Silent).unwrap_err().to_string();
    assert!(error.contains("no row has an answer of its own"), "{error}");
}
