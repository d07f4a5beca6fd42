//! Training stages from recipe text: their first metrics compared with values derived from the models'
//! log-probabilities, and what the cached reference log-probabilities depend on.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde_json::{Value, json};

use super::{Metrics, StageContext, run_stage};
use crate::data::forest::Forest;
use crate::data::prepare::{PairOptions, SftOptions, pair_trees, sft_trees};
use crate::data::read::{ReadOptions, read};
use crate::data::tree::{Role, Tree};
use crate::error::Result;
use crate::loss::Readout;
use crate::model::Transformer;
use crate::model::checkpoint::Checkpoint;
use crate::model::save::SaveOptions;
use crate::recipe::{RecipeFile, resolve};
use crate::report::record::Silent;
use crate::train::step;

const STUDENT: &str = "data/tiny/student";
const TEACHER: &str = "data/tiny/teacher";

/// Writes rows into a file.
pub(super) fn written(dir: &Path, rows: &[Value]) -> PathBuf {
    let path = dir.join("rows.jsonl");
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    crate::store::write_atomic(&path, lines.join("\n").as_bytes()).unwrap();
    path
}

/// Runs a recipe's only stage in `dir`, a single step of two rows unless `keys` say otherwise.
pub(super) fn run(dir: &Path, kind: &str, keys: &[(&str, Value)]) -> Metrics {
    attempt(dir, kind, keys).unwrap()
}

fn attempt(dir: &Path, kind: &str, keys: &[(&str, Value)]) -> Result<Metrics> {
    let mut stage = toml::Table::new();
    for (key, value) in [
        ("kind", json!(kind)),
        ("model_name_or_path", json!(STUDENT)),
        ("chat_template", json!("chatml")),
        ("datasets", json!([dir.join("rows.jsonl")])),
        ("per_device_train_batch_size", json!(2)),
        ("max_steps", json!(1)),
    ]
    .iter()
    .chain(keys)
    {
        stage.insert((*key).to_owned(), toml::Value::try_from(value).unwrap());
    }
    let text = format!("[[stage]]\n{stage}");
    let file = RecipeFile::parse(&text, Path::new("recipe.toml")).unwrap();
    let step = resolve(&file, Some(dir)).unwrap().plan.steps.remove(0);
    let dir = dir.join("stage");
    let context =
        StageContext { dir, round: 1, seed: step.seed, device: Device::Cpu, events: &Silent };
    run_stage(&context, &step.spec)
}

/// Each trained token's log-probability and role, by response, of every tree.
fn read_tokens(model: &str, trees: &[Tree]) -> Vec<Vec<Vec<(f64, Role)>>> {
    let Checkpoint { config, weights, .. } =
        Checkpoint::load_dir(Path::new(model), &Device::Cpu).unwrap();
    let model = Transformer::new(&config, &weights).unwrap();
    let of_tree = |tree: &Tree| {
        let forest = Forest::pack([tree]).unwrap();
        let logps = step::read(&model, Readout::Logps, &forest).unwrap();
        let mut leaves = vec![Vec::new(); forest.leaves.len()];
        for (target, logp) in forest.targets.iter().zip(logps) {
            leaves[target.leaf as usize].push((f64::from(logp), target.role));
        }
        leaves
    };
    trees.iter().map(of_tree).collect()
}

#[track_caller]
fn assert_logged(metrics: &Metrics, expected: &[(&str, f64)], what: &str) {
    for (name, value) in expected {
        let logged = metrics[&format!("first_{name}")];
        let error = (logged - value).abs();
        assert!(error < 1e-4 * value.abs().max(0.1), "{what}: {name} is {logged}, not {value}");
    }
}

fn pairs() -> Vec<Value> {
    vec![
        json!({"prompt": [{"role": "user", "content": "How many?"}], "chosen": [{"role": "assistant", "content": "Four pears"}], "rejected": [{"role": "assistant", "content": "no"}]}),
        json!({"prompt": [{"role": "user", "content": "And now?"}], "chosen": [{"role": "assistant", "content": "5"}], "rejected": [{"role": "assistant", "content": "it is hard to say"}]}),
    ]
}

/// Its head has only as many rows as outputs: taken for a vocabulary head, it could learn and say nothing sensible.
#[test]
fn reward_model_is_refused_as_policy_and_as_reference() {
    let dir = tempfile::tempdir().unwrap();
    written(dir.path(), &pairs());
    let reward = dir.path().join("reward");
    let student = Checkpoint::load_dir(Path::new(STUDENT), &Device::Cpu).unwrap();
    let mut model = student.into_reward_model(1).unwrap();
    model.save(&reward, &SaveOptions::new(DType::F32)).unwrap();
    // As transformers writes a head whose output nobody named.
    model.config.labels = vec!["LABEL_0".to_owned()];
    let unnamed = dir.path().join("unnamed");
    model.save(&unnamed, &SaveOptions::new(DType::F32)).unwrap();
    let reward = json!(reward);
    let start = "model_name_or_path";
    for (kind, key) in [("sft", start), ("dpo", start), ("dpo", "reference")] {
        for use_peft in [false, true] {
            let keys = [(key, reward.clone()), ("use_peft", json!(use_peft))];
            let error = attempt(dir.path(), kind, &keys).unwrap_err();
            let expected = "reward: a reward model (SequenceClassification of reward), expected";
            assert!(error.to_string().contains(expected), "{kind} {key}: {error}");
            assert!(error.hint_text().is_some(), "{kind} {key}");
        }
    }
    let goes_on =
        [reward, json!(unnamed)].map(|model| run(dir.path(), "reward", &[(start, model)]));
    assert_eq!(goes_on[0]["loss"].to_bits(), goes_on[1]["loss"].to_bits());
}

/// Sum and length of a response's counted tokens.
fn summed(tokens: &[(f64, Role)], mask: bool) -> (f64, f64) {
    let entering = tokens.iter().filter(|(_, role)| !mask || *role == Role::Content);
    entering.fold((0.0, 0.0), |(sum, count), (logp, _)| (sum + logp, count + 1.0))
}

/// Textbook metrics of a step over the pairs: the policy is the student, the reference the teacher.
fn expected_of_pairs(path: &Path, loss: &str, mask: bool) -> Vec<(&'static str, f64)> {
    let rows = read(path.to_str().unwrap(), &ReadOptions::default()).unwrap().rows;
    let student = Checkpoint::load_dir(Path::new(STUDENT), &Device::Cpu).unwrap();
    let tokenizer = student.tokenizer().unwrap().with_template("chatml").unwrap();
    let trees = pair_trees(&rows, &tokenizer, &PairOptions::default()).unwrap().trees;
    let (policy, reference) = (read_tokens(STUDENT, &trees), read_tokens(TEACHER, &trees));
    let beta = 0.1;
    let nls = |x: f64| (-x).exp().ln_1p();
    let (mut all, mut tokens, mut nll, mut ratios) = (vec![0.0; 9], [0.0; 2], 0.0, 0.0);
    for (own, other) in policy.iter().zip(&reference) {
        let [(c, lc), (r, lr)] = [0, 1].map(|side| summed(&own[side], mask));
        let [(ref_c, _), (ref_r, _)] = [0, 1].map(|side| summed(&other[side], mask));
        let gap = |divide: bool| {
            let (lc, lr) = if divide { (lc, lr) } else { (1.0, 1.0) };
            (c - ref_c) / lc - (r - ref_r) / lr
        };
        let value = match loss {
            "ipo" => (gap(true) - 0.5 / beta).powi(2),
            "sigmoid_norm" => nls(beta * gap(true)),
            _ => nls(beta * gap(false)),
        };
        let numbers = [
            value,
            beta * (c - ref_c),
            beta * (r - ref_r),
            beta * gap(false),
            f64::from(u8::from(gap(false) > 0.0)),
            c,
            r,
            lc,
            lr,
        ];
        all.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += number / 2.0);
        ratios += c - ref_c;
        tokens[0] += lc;
        // The NLL covers all tokens, masked or not.
        let (sum, count) = summed(&own[0], false);
        nll -= sum;
        tokens[1] += count;
    }
    if loss == "preset" {
        all[0] += 0.2 * nll / tokens[1];
    }
    let names = [
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "lengths/chosen",
        "lengths/rejected",
    ];
    names.into_iter().zip(all).chain([("kl/chosen", ratios / tokens[0])]).collect()
}

/// With another model as the reference nothing is 0, and what the recipe asks for is computed.
#[test]
fn step_against_another_model_logs_the_values_of_both() {
    for (loss, mask) in
        [("preset", true), ("ipo", true), ("sigmoid_norm", true), ("sigmoid_norm", false)]
    {
        let keys = match loss {
            "preset" => [("preset", json!("llama3")), ("beta", json!(0.1))],
            _ => [("loss_type", json!(loss)), ("mask_formatting_tokens", json!(mask))],
        };
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path(), &pairs());
        let keys = [&[("reference", json!(TEACHER))][..], &keys].concat();
        let metrics = run(dir.path(), "dpo", &keys);
        let expected = expected_of_pairs(&path, loss, mask);
        assert!(expected[1].1.abs() > 0.1, "the models agree: {expected:?}");
        assert_logged(&metrics, &expected, &format!("{loss}, masked {mask}"));
    }
}

/// A copy of the student with one file changed.
fn student_but(dir: &Path, file: &str, change: fn(&mut Vec<u8>)) -> Value {
    for entry in std::fs::read_dir(STUDENT).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        if name == file {
            change(&mut bytes);
        }
        crate::store::write_atomic(&dir.join("model").join(name), &bytes).unwrap();
    }
    json!(dir.join("model"))
}

/// Flips the last bit of the last weight, which is bf16.
fn flip_a_bit(bytes: &mut [u8]) {
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
}

/// Swaps the ids of `o` and `a`.
fn swap_two_tokens(bytes: &mut Vec<u8>) {
    let mut tokenizer: Value = serde_json::from_slice(bytes).unwrap();
    let vocabulary = &mut tokenizer["model"]["vocab"];
    let (o, a) = (vocabulary["o"].take(), vocabulary["a"].take());
    assert!(o.is_u64() && a.is_u64(), "no such tokens");
    (vocabulary["o"], vocabulary["a"]) = (a, o);
    *bytes = tokenizer.to_string().into_bytes();
}

/// Name of the cached reference log-probabilities.
fn kept(dir: &Path, rows: &[Value], keys: &[(&str, Value)]) -> String {
    written(dir, rows);
    run(dir, "dpo", keys);
    let names = std::fs::read_dir(dir.join("stage")).unwrap();
    let mut names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.find(|name| name.starts_with("reference-")).unwrap()
}

#[test]
fn reference_log_probabilities_are_keyed_only_by_what_affects_them() {
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str| dir.path().join(name);
    let against = |name: &str, reference: Value, keys: &[(&str, Value)]| {
        kept(&place(name), &pairs(), &[&[("reference", reference)][..], keys].concat())
    };
    let teacher = || json!(TEACHER);
    let first = against("first", teacher(), &[]);
    let others = [
        ("learning_rate", json!(1e-3)),
        ("beta", json!(0.7)),
        ("loss_type", json!("ipo")),
        ("max_grad_norm", json!(3.0)),
        ("weight_decay", json!(0.2)),
        ("ld_alpha", json!(1.0)),
        ("logging_steps", json!(2)),
    ];
    assert_eq!(against("same", teacher(), &others), first);
    let weights = student_but(&place("weights"), "model.safetensors", |bytes| flip_a_bit(bytes));
    let tokens = student_but(&place("tokens"), "tokenizer.json", swap_two_tokens);
    let mut rows = pairs();
    rows[1]["rejected"][0]["content"] = json!("it is hard to tell");
    let student = json!(STUDENT);
    let mut seen = vec![
        ("first", first),
        // The initial policy is the reference if none is given.
        ("start", kept(&place("start"), &pairs(), &[])),
        (
            "its weights",
            kept(&place("its-weights"), &pairs(), &[("model_name_or_path", weights.clone())]),
        ),
        ("student", against("student", student, &[("model_name_or_path", weights.clone())])),
        ("weights", against("weights", weights, &[])),
        // Another reference has the policy's vocabulary.
        ("tokenizer", kept(&place("its-tokens"), &pairs(), &[("model_name_or_path", tokens)])),
        ("template", against("template", teacher(), &[("chat_template", json!("plain"))])),
        ("data", kept(&place("data"), &rows, &[("reference", teacher())])),
        ("dtype", against("dtype", teacher(), &[("dtype", json!("bf16"))])),
        ("mask", against("mask", teacher(), &[("mask_formatting_tokens", json!(false))])),
    ];
    seen.sort_by(|a, b| a.1.cmp(&b.1));
    for two in seen.windows(2) {
        assert_ne!(two[0].1, two[1].1, "{} and {} share a file", two[0].0, two[1].0);
    }
}

#[test]
fn empty_responses_are_bad_rows_in_pairs_and_labelled_data() {
    let says = |text: &str| json!([{"role": "assistant", "content": text}]);
    let user = json!([{"role": "user", "content": "How many?"}]);
    let mut pairs = pairs();
    pairs.push(json!({"prompt": user, "chosen": says("three"), "rejected": says(" ")}));
    let labelled =
        |text: &str, label: bool| json!({"prompt": user, "completion": says(text), "label": label});
    let labelled = vec![labelled("two", true), labelled("no", false), labelled("", false)];
    for (rows, loss, what) in [(pairs, "sigmoid", "response 1"), (labelled, "kto", "`completion`")]
    {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path(), &rows);
        let keys = [("loss_type", json!(loss))];
        let error = attempt(dir.path(), "dpo", &keys).unwrap_err();
        assert_eq!(error.to_string(), format!("{}:3: {what} is empty", path.display()));
        assert!(error.hint_text().unwrap().contains("on_bad_row"), "{error:?}");
        let skipped = [&keys[..], &[("on_bad_row", json!("skip"))]].concat();
        let metrics = run(dir.path(), "dpo", &skipped);
        assert!((metrics["examples"] - 2.0).abs() < 1e-9, "{metrics:?}");
    }
}

/// Two rows of unequal lengths and weights, under each loss and each normalization.
#[test]
fn sft_loss_weights_and_normalization_follow_the_recipe() {
    let dir = tempfile::tempdir().unwrap();
    let row = |answer: &str, [importance, share]: [f64; 2]| json!({"prompt": "How many?", "completion": answer, "importance": importance, "share": share});
    let rows = [row("Four pears and a plum", [3.0, 0.25]), row("no", [0.5, 0.125])];
    let path = written(dir.path(), &rows);
    let rows = read(path.to_str().unwrap(), &ReadOptions::default()).unwrap().rows;
    let student = Checkpoint::load_dir(Path::new(STUDENT), &Device::Cpu).unwrap();
    let tokenizer = student.tokenizer().unwrap().with_template("chatml").unwrap();
    let trees = sft_trees(&rows, &tokenizer, &SftOptions::default()).unwrap().trees;
    let tokens: Vec<Vec<f64>> = read_tokens(STUDENT, &trees)
        .into_iter()
        .map(|leaves| leaves[0].iter().map(|(logp, _)| *logp).collect())
        .collect();
    for loss in ["nll", "dft"] {
        // What is counted may be less than one row.
        for (weight_column, [a, b]) in
            [("importance", [3.0, 0.5]), ("share", [0.25, 0.125]), ("", [1.0, 1.0])]
        {
            let cost = |logp: &f64| if loss == "dft" { -logp * logp.exp() } else { -logp };
            let sum = |row: usize| tokens[row].iter().map(cost).sum::<f64>();
            let count = |row: usize| tokens[row].len() as f64;
            assert!(count(0) > count(1));
            for (normalization, expected) in [
                ("token", (a * sum(0) + b * sum(1)) / (a * count(0) + b * count(1))),
                ("row", (a * sum(0) / count(0) + b * sum(1) / count(1)) / (a + b)),
                ("step", (a * sum(0) + b * sum(1)) / (a + b)),
            ] {
                let what = format!("{loss}, {normalization}, {weight_column:?}");
                let keys = [
                    ("loss_type", json!(loss)),
                    ("loss_normalization", json!(normalization)),
                    ("row_weight_column", json!(weight_column)),
                ];
                let metrics = run(dir.path(), "sft", &keys);
                assert_logged(&metrics, &[("loss", expected)], &what);
            }
        }
    }
}
