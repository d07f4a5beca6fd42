//! What transformers, TRL and llama.cpp make of our files, and OpenAI's client of our server. `scripts/test` installs them and sets `ARRIERO_PEERS`; without it these
//! tests say so and pass, with it a missing program is a failure. `scripts/test --peers` adds TRL.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a test program; a failure here is a failed test"
)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::{env, fs};

use arriero::data::forest::Forest;
use arriero::data::record::Message;
use arriero::data::tree::{Role, Tree};
use arriero::generate::engine::{Finish, Prompt};
use arriero::generate::local::{LocalModel, answer_logprobs};
use arriero::generate::sampling::Sampling;
use arriero::loss::sft::Sft;
use arriero::loss::{Objective, Readout};
use arriero::model::average;
use arriero::model::checkpoint::{Checkpoint, LoadOptions};
use arriero::model::export::{Encoding, Format, export};
use arriero::model::lora::{Init, Lora};
use arriero::model::save::SaveOptions;
use arriero::model::{Architecture, Precision, Transformer, Weights};
use arriero::optim::adamw::AdamW;
use arriero::rng::Stream;
use arriero::score::candidates::{Candidate, Candidates};
use arriero::score::select::{Rules, select};
use arriero::stage::adapt::{Adapt, Trainee};
use arriero::stage::merge::{Merge, merge};
use arriero::train::Settings;
use arriero::train::step::{self, StepOptions};
use arriero::train::update::{Pace, update};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn goldens() -> PathBuf {
    env::var_os("ARRIERO_GOLDENS")
        .map_or_else(|| root().join("tests/fixtures/goldens"), PathBuf::from)
}

/// The Python that has the peers; `None` where nobody asked for them.
fn python(switch: &str) -> Option<PathBuf> {
    if env::var_os(switch).is_none_or(|value| value != "1") {
        println!("not run: {switch} is not 1; scripts/test sets it");
        return None;
    }
    let python = env::var_os("ARRIERO_PYTHON")
        .map_or_else(|| root().join(".venv/bin/python"), PathBuf::from);
    assert!(
        python.exists(),
        "{switch} is set, but there is no {}: run scripts/test",
        python.display()
    );
    Some(python)
}

/// Runs a script of tests/peers and returns what it printed.
fn script(python: &Path, name: &str, arguments: &[&Path]) -> String {
    let output = Command::new(python)
        .arg(root().join("tests/peers").join(name))
        .args(arguments)
        .env("HF_HUB_OFFLINE", "1")
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name}:\n{out}\n{err}");
    out.into_owned()
}

/// SmolLM2 as `scripts/fetch-smollm2` installed it. Part of the tests: its absence is a failure.
fn smollm2() -> Checkpoint {
    let path = smollm2_path();
    Checkpoint::load(path.to_str().unwrap(), &Device::Cpu, &LoadOptions::default()).unwrap()
}

fn smollm2_path() -> PathBuf {
    let folder =
        env::var_os("ARRIERO_SMOLLM2").map_or_else(|| root().join("data/smollm2"), PathBuf::from);
    let path = folder.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "there is no {}: run scripts/fetch-smollm2", path.display());
    path
}

/// Saves the model, has transformers run the rows, and gives back its tensors and what it printed.
fn in_transformers(python: &Path, model: &Checkpoint, rows: &[Vec<u32>]) -> (Weights, Value) {
    let dir = tempfile::tempdir().unwrap();
    let (saved, ids, out) =
        (dir.path().join("model"), dir.path().join("ids.json"), dir.path().join("out.safetensors"));
    model.save(&saved, &SaveOptions::new(DType::F32)).unwrap();
    fs::write(&ids, serde_json::to_vec(rows).unwrap()).unwrap();
    let printed = script(python, "load_in_transformers.py", &[&saved, &ids, &out]);
    let tensors = candle_core::safetensors::load(&out, &Device::Cpu).unwrap().into_iter().collect();
    (tensors, serde_json::from_str(printed.lines().last().unwrap()).unwrap())
}

fn sequences(rows: &[Vec<u32>]) -> Vec<Tree> {
    let tree = |(row, tokens): (usize, &Vec<u32>)| {
        Tree::sequence(tokens.clone(), vec![Role::Content; tokens.len()], row)
    };
    rows.iter().enumerate().map(tree).collect()
}

#[track_caller]
fn assert_same_logits(python: &Path, model: &Checkpoint, rows: &[Vec<u32>], what: &str) {
    let (theirs, about) = in_transformers(python, model, rows);
    assert_eq!(about["missing"], serde_json::json!([]), "{what}");
    assert_eq!(about["unexpected"], serde_json::json!([]), "{what}");
    assert_eq!(about["end_ids"], serde_json::json!(model.ends()), "{what}");
    let transformer = Transformer::new(&model.config, &model.weights).unwrap();
    let forest = Forest::pack(&sequences(rows)).unwrap();
    let hidden = transformer.hidden(&forest).unwrap();
    let mut start = 0;
    for (row, tokens) in rows.iter().enumerate() {
        let hidden = hidden.narrow(0, start, tokens.len()).unwrap();
        let logits = hidden.matmul(&transformer.head().t().unwrap()).unwrap();
        let apart = largest_difference(&logits, &theirs[&format!("logits.{row}")]);
        assert!(apart <= 1e-4, "{what}, row {row}: logits differ by {apart}");
        start += tokens.len();
    }
}

fn largest_difference(one: &Tensor, two: &Tensor) -> f32 {
    (one - two).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

/// Rows of unequal length over the vocabulary, none with an id below `lowest`.
fn some_rows(vocab: u32, lowest: u32) -> Vec<Vec<u32>> {
    [13, 5, 29]
        .iter()
        .map(|len| (0..*len).map(|at| lowest + (at * 7919 + len * 31) % (vocab - lowest)).collect())
        .collect()
}

#[test]
fn golden_models_give_transformers_the_same_logits() {
    let Some(python) = python("ARRIERO_PEERS") else { return };
    for name in ["model_tied", "model_untied", "model_llama3rope"] {
        let model = Checkpoint::load_dir(&goldens().join(name), &Device::Cpu).unwrap();
        let rows = some_rows(model.config.vocab_size as u32, 3);
        assert_same_logits(&python, &model, &rows, name);
    }
}

#[test]
fn smollm2_saved_from_gguf_gives_transformers_the_same_logits() {
    let Some(python) = python("ARRIERO_PEERS") else { return };
    let model = smollm2();
    assert_same_logits(&python, &model, &conversations(&model), "SmolLM2");
}

/// Real conversations of unequal length, each ending with the end of turn and the line feed left out.
fn conversations(model: &Checkpoint) -> Vec<Vec<u32>> {
    let tokenizer = model.tokenizer().unwrap();
    let prompt = tokenizer
        .prompt_ids(&[Message::new("user", "What is the capital of France?")], None)
        .unwrap();
    let end = model.ends()[0];
    let reply = |text: &str| {
        let mut row = prompt.clone();
        row.extend(tokenizer.encode(text));
        row.push(end);
        row
    };
    vec![
        reply("The capital of France is Paris."),
        reply("Paris"),
        reply("I do not know, but it may well be Lyon or Nice."),
    ]
}

#[track_caller]
fn assert_same_scores(python: &Path, model: &Checkpoint, rows: &[Vec<u32>], prompt: usize) {
    assert_eq!(model.config.architecture, Architecture::SequenceClassification);
    let (theirs, about) = in_transformers(python, model, rows);
    let pad = about["pad_token_id"].as_u64().unwrap() as u32;
    assert!(rows.iter().all(|row| row.last() != Some(&pad)), "the padding {pad} ends a row");
    let responses = rows.iter().map(|row| {
        let tokens = row[prompt..].to_vec();
        let roles = vec![Role::Content; tokens.len()];
        (tokens, roles)
    });
    let tree = Tree::siblings(rows[0][..prompt].to_vec(), responses.collect(), 0);
    let transformer = Transformer::new(&model.config, &model.weights).unwrap();
    for (what, trees) in [("separate rows", sequences(rows)), ("a tree", vec![tree])] {
        let forest = Forest::pack(&trees).unwrap();
        let ours = step::read(&transformer, Readout::Scores, &forest).unwrap();
        for name in ["scores", "scores_alone"] {
            let theirs = theirs[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (ours, theirs) in ours.iter().zip(&theirs) {
                assert!((ours - theirs).abs() <= 1e-4, "{what}, {name}: {ours} and {theirs}");
            }
            assert_eq!(ours.len(), theirs.len());
        }
    }
}

/// Rows that share their first three tokens.
#[track_caller]
fn assert_same_scores_of_a_tree(python: &Path, model: &Checkpoint) {
    let mut rows = some_rows(model.config.vocab_size as u32, 3);
    let shared: Vec<u32> = rows[1][..3].to_vec();
    for row in &mut rows {
        row.splice(..3, shared.iter().copied());
    }
    assert_same_scores(python, model, &rows, 3);
}

#[test]
fn golden_reward_model_scores_padded_rows_as_transformers_does() {
    let Some(python) = python("ARRIERO_PEERS") else { return };
    let model = Checkpoint::load_dir(&goldens().join("model_reward"), &Device::Cpu).unwrap();
    assert_same_scores_of_a_tree(&python, &model);
}

#[test]
fn smollm2_reward_model_scores_padded_rows_as_transformers_does() {
    let Some(python) = python("ARRIERO_PEERS") else { return };
    let model = smollm2();
    let rows = conversations(&model);
    let shared = (0..rows[0].len())
        .take_while(|&at| rows.iter().all(|row| row.get(at) == rows[0].get(at)))
        .count();
    // Its padding is its end of turn; the saved model must not take that.
    assert_same_scores(&python, &model.into_reward_model(7).unwrap(), &rows, shared);
}

/// What llama.cpp makes of a file: the tokens of texts, and greedy answers of `NEW` tokens.
fn in_llama_cpp(python: &Path, file: &Path, texts: &[&str], prompts: &[Vec<u32>]) -> Value {
    let asked = file.with_extension("json");
    let request = serde_json::json!({"texts": texts, "prompts": prompts, "new": NEW});
    fs::write(&asked, request.to_string()).unwrap();
    let printed = script(python, "llama_cpp.py", &[file, &asked]);
    serde_json::from_str(printed.lines().last().unwrap()).unwrap()
}

/// Tokens that llama.cpp is asked for.
const NEW: usize = 16;

/// The model exported as GGUF, in llama.cpp: the same tokens of texts, and the same greedy answers with log-probabilities
/// within `apart`.
#[track_caller]
fn assert_same_in_llama_cpp(
    python: &Path,
    model: &Checkpoint,
    (encoding, apart): (Encoding, f64),
    questions: &[&str],
) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    export(model.clone(), &path, Format::Gguf, encoding).unwrap();
    let model = Checkpoint::load_gguf(&path, &Device::Cpu).unwrap();
    let tokenizer = model.tokenizer().unwrap();
    let prompt = |text: &&str| tokenizer.prompt_ids(&[Message::new("user", *text)], None).unwrap();
    let prompts: Vec<Vec<u32>> = questions.iter().map(prompt).collect();
    let texts = [
        "<|im_start|>user\nIt isn't 1984, is it?<|im_end|>\n",
        "  x = [3.14, 2]; \t// Ünïcödé 日本語 🙂\r\n\n",
    ];
    let theirs = in_llama_cpp(python, &path, &texts, &prompts);
    let encoded = texts.map(|text| tokenizer.encode_special(text).unwrap());
    assert_eq!(theirs["tokens"], serde_json::json!(encoded));

    let prompts = prompts.into_iter().enumerate();
    let prompts: Vec<Prompt> =
        prompts.map(|(at, tokens)| Prompt { index: at as u64, tokens }).collect();
    let mut answers = vec![Vec::new(); prompts.len()];
    LocalModel::new(&model)
        .unwrap()
        .run(&prompts, &Sampling::greedy(NEW), &mut |at, drawn| {
            answers[at] = drawn;
            Ok(())
        })
        .unwrap();
    for (at, ours) in answers.iter().enumerate() {
        let theirs = &theirs["answers"][at];
        assert_eq!(theirs["ids"], serde_json::json!(ours[0].ids), "prompt {at}");
        for (ours, theirs) in ours[0].logprobs.iter().zip(theirs["logprobs"].as_array().unwrap()) {
            let off = (f64::from(*ours) - theirs.as_f64().unwrap()).abs();
            assert!(off <= apart, "prompt {at}: log-probabilities {ours} and {theirs}");
        }
    }
}

#[test]
fn exported_models_match_in_llama_cpp() {
    let Some(python) = python("ARRIERO_PEERS") else { return };
    let teacher = root().join("data/tiny/teacher");
    let teacher = Checkpoint::load_dir(&teacher, &Device::Cpu).unwrap();
    let sums =
        ["Tom has 14 coins. Dora has 11 coins. How many more coins does Tom have than Dora?"];
    assert_same_in_llama_cpp(&python, &teacher, (Encoding::F32, 1e-3), &sums);
    assert_same_in_llama_cpp(
        &python,
        &smollm2(),
        (Encoding::F16, 0.05),
        &["What is the capital of France?"],
    );
}

/// Four steps on one row; returns the first loss and the last.
fn train_on(row: &Tree, trainee: &Trainee, lr: f64) -> [f64; 2] {
    let mut adamw = AdamW::new(Settings::default().hyper());
    let pace = Pace { lr, max_grad_norm: 1.0 };
    let mut step = |_| {
        let work = (&Sft::default() as &dyn Objective, &[row][..]);
        let options = StepOptions::new(4096);
        update(&trainee.learner, work, options, &mut adamw, pace).unwrap().0.loss
    };
    let losses: Vec<f64> = (0..4).map(&mut step).collect();
    [losses[0], losses[3]]
}

/// The checkpoint exported as GGUF: llama.cpp's greedy answer has the log-probabilities, to `apart`, that the model in
/// training gives it, and not those of the model that training began with.
#[track_caller]
fn assert_llama_cpp_says(
    python: &Path,
    (dir, encoding, apart): (&Path, Encoding, f64),
    prompt: &[u32],
    (live, before): (&Transformer, &Transformer),
) {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("model.gguf");
    let saved = Checkpoint::load_dir(dir, &Device::Cpu).unwrap();
    export(saved, &file, Format::Gguf, encoding).unwrap();
    let theirs = in_llama_cpp(python, &file, &[], &[prompt.to_vec()]);
    let ids: Vec<u32> = serde_json::from_value(theirs["answers"][0]["ids"].clone()).unwrap();
    let theirs: Vec<f64> =
        serde_json::from_value(theirs["answers"][0]["logprobs"].clone()).unwrap();
    assert!(!ids.is_empty() && ids.len() == theirs.len());
    let furthest = |model: &Transformer| {
        let ours = answer_logprobs(model, prompt, &[&ids]).unwrap().remove(0);
        let off = ours.iter().zip(&theirs).map(|(a, b)| (f64::from(*a) - b).abs());
        off.fold(0.0, f64::max)
    };
    let (now, then) = (furthest(live), furthest(before));
    println!("{}, {}: {now:.1e} apart, untrained {then:.2}", dir.display(), encoding.name());
    assert!(now <= apart, "{}: log-probabilities {now} apart", encoding.name());
    assert!(then > 3.0 * apart, "{}: untrained only {then} apart", encoding.name());
}

/// SmolLM2 after a few steps, whole or with adapters that `merge` makes part of it. llama.cpp keeps keys and values in f16:
/// of a file in f32 its log-probabilities are a thousandth away.
#[test]
fn trained_and_merged_models_match_in_llama_cpp() {
    let Some(python) = python("ARRIERO_PEERS") else { return };
    let (model, base) = (smollm2(), smollm2_path());
    let before = Transformer::new(&model.config, &model.weights).unwrap();
    let tokenizer = model.tokenizer().unwrap().clone();
    let question = [Message::new("user", "What is the capital of France?")];
    let prompt = tokenizer.prompt_ids(&question, None).unwrap();
    let mut row = prompt.clone();
    row.extend(tokenizer.encode("Ask me again tomorrow, after breakfast."));
    row.push(model.ends()[0]);
    let role = |at| if at < prompt.len() { Role::Context } else { Role::Content };
    let roles = (0..row.len()).map(role).collect();
    let row = Tree::sequence(row, roles, 0);
    let lora = Lora { use_peft: true, lora_r: 8, ..Lora::default() };
    let whole = Lora { use_peft: false, ..lora.clone() };
    let home = tempfile::tempdir().unwrap();
    for (name, lora, lr, encodings) in [
        ("whole", whole, 2e-4, [(Encoding::F32, 0.01), (Encoding::F16, 0.02)]),
        ("lora", lora, 1e-3, [(Encoding::F32, 0.01), (Encoding::Bf16, 0.1)]),
    ] {
        let (base, dtype) = (base.to_str().unwrap(), Precision::F32);
        let adapt = Adapt { lora: &lora, base, dtype, offloaded: false, seed: 3 };
        let trainee = adapt.trainee(model.clone()).unwrap();
        let [first, last] = train_on(&row, &trainee, lr);
        assert!(last < 0.7 * first, "{name}: {first}, {last}");
        let mut dir = home.path().join(name);
        trainee.save(&dir, Precision::F32).unwrap();
        if lora.use_peft {
            let (adapter, out) = (dir, home.path().join("merged"));
            let encoding = Encoding::F32;
            merge(&Merge { adapter, base: None, out: out.clone(), encoding, dense_base: false })
                .unwrap();
            dir = out;
        }
        for (encoding, apart) in encodings {
            let live = trainee.learner.model();
            assert_llama_cpp_says(&python, (&dir, encoding, apart), &prompt, (live, &before));
        }
    }
}

#[test]
fn rating_models_of_several_attributes_score_as_in_transformers() {
    let Some(python) = python("ARRIERO_PEERS") else { return };
    let model = Checkpoint::load_dir(&goldens().join("model_untied"), &Device::Cpu).unwrap();
    let attributes = ["helpfulness", "correctness", "verbosity"];
    let model = model.into_scorer(Architecture::SequenceClassification, &attributes, 7).unwrap();
    assert_same_scores_of_a_tree(&python, &model);
}

#[test]
fn process_reward_models_score_each_step_as_in_transformers() {
    let Some(python) = python("ARRIERO_PEERS") else { return };
    let model = Checkpoint::load_dir(&goldens().join("model_untied"), &Device::Cpu).unwrap();
    let architecture = Architecture::TokenClassification;
    let mut model = model.into_scorer(architecture, &["wrong", "right"], 7).unwrap();
    let bias = Tensor::new(&[0.5_f32, -0.25], &Device::Cpu).unwrap();
    model.weights.insert("score.bias".to_owned(), bias);
    let row = some_rows(model.config.vocab_size as u32, 3).remove(1);
    let (theirs, about) = in_transformers(&python, &model, std::slice::from_ref(&row));
    assert_eq!(about["class"], "LlamaForTokenClassification");
    assert!(about["missing"].as_array().unwrap().is_empty(), "{about}");
    let part = |tokens: &[u32]| (tokens.to_vec(), vec![Role::Content; tokens.len()]);
    let (first, last) = (row.len() / 2, row.len() - 1);
    let parts = vec![part(&row[2..=first]), part(&row[first + 1..])];
    let forest = Forest::pack(&[Tree::chain(row[..2].to_vec(), parts, 0)]).unwrap();
    let transformer = Transformer::new(&model.config, &model.weights).unwrap();
    let ours = step::read(&transformer, Readout::Scores, &forest).unwrap();
    let theirs = theirs["logits.0"].to_vec2::<f32>().unwrap();
    let theirs = [theirs[first].as_slice(), &theirs[last]].concat();
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert!((ours - theirs).abs() <= 1e-4, "{ours} and {theirs}");
    }
}

/// A prompt with a right, a wrong and a chatty answer, scored by two judges.
fn candidates(row: usize) -> Candidates {
    let drawn = |(number, (text, score)): (usize, (String, f64))| Candidate {
        tokens: text.len(),
        text,
        finish: Finish::Stop,
        logprob_sum: -1.5,
        scores: [("number".to_owned(), score), ("@reward".to_owned(), score - 0.25)]
            .into_iter()
            .collect(),
        score,
        passed: Some(score > 0.5),
        origin: format!("r1/{number}"),
        why: indexmap::IndexMap::default(),
        streams: None,
    };
    let answers = [
        ((row + 2).to_string(), 1.0),
        ((row + 3).to_string(), 0.0),
        ("It is hard to say.".to_owned(), 0.0),
    ];
    Candidates {
        prompt: vec![Message::new("user", format!("What is {row} + 2?"))],
        answer: (row + 2).to_string(),
        tools: None,
        candidates: answers.into_iter().enumerate().map(drawn).collect(),
        unanswered: false,
    }
}

fn write_lines<'a, T: serde::Serialize + 'a>(path: &Path, rows: impl Iterator<Item = &'a T>) {
    let lines: String = rows.map(|row| serde_json::to_string(row).unwrap() + "\n").collect();
    assert!(!lines.is_empty());
    fs::write(path, lines).unwrap();
}

#[test]
fn trl_trains_on_what_select_writes() {
    let Some(python) = python("ARRIERO_PEERS_TRL") else { return };
    let dir = tempfile::tempdir().unwrap();
    let rows: Vec<_> = (0..4).map(candidates).collect();
    let chosen = select(&rows, &Rules::default());
    write_lines(&dir.path().join("sft.jsonl"), chosen.iter().flat_map(|one| &one.sft));
    write_lines(&dir.path().join("pairs.jsonl"), chosen.iter().flat_map(|one| &one.pairs));
    let model = goldens().join("model_untied");
    let printed = script(
        &python,
        "train_in_trl.py",
        &[
            &model,
            &dir.path().join("sft.jsonl"),
            &dir.path().join("pairs.jsonl"),
            &dir.path().join("out"),
        ],
    );
    let about: Value = serde_json::from_str(printed.lines().last().unwrap()).unwrap();
    assert!(about["sft_loss"].as_f64().unwrap().is_finite());
    let dpo = about["dpo_loss"].as_f64().unwrap();
    assert!((dpo - 2f64.ln()).abs() < 1e-3, "the first DPO loss is {dpo}, expected ln 2");
}

/// A small model with factors of one form beside it, moved from where they begin.
fn adapted(model: &Checkpoint, base: &Path, lora: &Lora) -> Trainee {
    let seed = 3;
    let adapt =
        Adapt { lora, base: base.to_str().unwrap(), dtype: Precision::F32, offloaded: false, seed };
    let trainee = adapt.trainee(model.clone()).unwrap();
    for (index, param) in trainee.learner.params().values().enumerate() {
        let size = param.master.elem_count();
        let noise = Stream::new(seed, "peers").normal(index as u64, size, 0.05);
        let noise = Tensor::from_vec(noise, param.master.shape(), &Device::Cpu).unwrap();
        param.set(&(param.master.as_tensor() + noise).unwrap()).unwrap();
    }
    trainee
}

/// Each form of adapter with its name.
fn forms() -> [(&'static str, Lora); 4] {
    let plain = Lora { use_peft: true, lora_r: 4, ..Lora::default() };
    [
        ("lora", plain.clone()),
        ("dora", Lora { use_dora: true, ..plain.clone() }),
        ("pissa", Lora { init_lora_weights: Init::Pissa, use_rslora: true, ..plain.clone() }),
        (
            "pattern",
            Lora { lora_target_modules: vec![r".*layers\.(1|2)\..*[qv]_proj".to_owned()], ..plain },
        ),
    ]
}

/// Modules that are trained in full beside adapters.
const IN_FULL: [&str; 3] = ["embed_tokens", "norm", "down_proj"];

#[test]
fn adapters_give_peft_the_same_logits_as_our_merged_model() {
    let Some(python) = python("ARRIERO_PEERS") else { return };
    let base = goldens().join("model_tied");
    let model = Checkpoint::load_dir(&base, &Device::Cpu).unwrap();
    let rows = some_rows(model.config.vocab_size as u32, 3);
    let dir = tempfile::tempdir().unwrap();
    let ids = dir.path().join("ids.json");
    fs::write(&ids, serde_json::to_vec(&rows).unwrap()).unwrap();
    let other = Lora { use_peft: true, lora_r: 3, lora_alpha: 5.0, ..Lora::default() };
    for (name, lora) in forms().into_iter().chain([("other", other)]) {
        adapted(&model, &base, &lora).save(&dir.path().join(name), Precision::F32).unwrap();
    }
    let summed = ["lora", "other"].map(|name| dir.path().join(name).display().to_string());
    for (name, rank) in [("cat", None), ("svd", Some(5))] {
        average::write_sum(&dir.path().join(name), &summed, (&[0.75, 0.25], rank), None).unwrap();
    }
    for module in IN_FULL {
        let lora = Lora {
            lora_target_modules: vec!["q_proj".to_owned()],
            lora_modules_to_save: vec![module.to_owned()],
            ..forms()[0].1.clone()
        };
        adapted(&model, &base, &lora).save(&dir.path().join(module), Precision::F32).unwrap();
    }
    for name in ["lora", "dora", "pissa", "pattern", "cat", "svd"].into_iter().chain(IN_FULL) {
        let adapter = dir.path().join(name);
        let out = dir.path().join(format!("{name}.safetensors"));
        let printed = script(&python, "load_in_peft.py", &[&base, &adapter, &ids, &out]);
        let about: Value = serde_json::from_str(printed.lines().last().unwrap()).unwrap();
        assert_eq!(about["complaints"], serde_json::json!([]), "{name}");

        let theirs = candle_core::safetensors::load(&out, &Device::Cpu).unwrap();
        let merged = Checkpoint::load_dir(&adapter, &Device::Cpu).unwrap();
        let merged = Transformer::new(&merged.config, &merged.weights).unwrap();
        for (row, tree) in sequences(&rows).iter().enumerate() {
            let hidden = merged.hidden(&Forest::pack([tree]).unwrap()).unwrap();
            let logits = hidden.matmul(&merged.head().t().unwrap()).unwrap();
            let apart = largest_difference(&logits, &theirs[&format!("logits.{row}")]);
            assert!(apart <= 1e-4, "{name}, row {row}: logits differ by {apart}");
        }
    }
}

#[test]
fn adapters_train_as_in_peft() {
    const STEPS: usize = 8;
    const LR: f64 = 5e-3;
    let Some(python) = python("ARRIERO_PEERS") else { return };
    let base = goldens().join("model_tied");
    let model = Checkpoint::load_dir(&base, &Device::Cpu).unwrap();
    let rows = some_rows(model.config.vocab_size as u32, 3);
    let dir = tempfile::tempdir().unwrap();
    let ids = dir.path().join("ids.json");
    fs::write(&ids, serde_json::to_vec(&rows).unwrap()).unwrap();
    for (name, lora) in forms().into_iter().take(2) {
        let trainee = adapted(&model, &base, &lora);
        let adapter = dir.path().join(name);
        trainee.save(&adapter, Precision::F32).unwrap();
        let (steps, lr) = (STEPS.to_string(), LR.to_string());
        let arguments: [&Path; 5] = [&base, &adapter, &ids, Path::new(&steps), Path::new(&lr)];
        let printed = script(&python, "train_in_peft.py", &arguments);
        let theirs: Value = serde_json::from_str(printed.lines().last().unwrap()).unwrap();

        let trained = trainee.learner.params().values();
        let trained: usize = trained.map(|param| param.master.elem_count()).sum();
        assert_eq!(theirs["trained"], trained, "{name}");
        let trees = sequences(&rows);
        let trees: Vec<&Tree> = trees.iter().collect();
        let mut adamw = AdamW::new(Settings { weight_decay: 0.0, ..Settings::default() }.hyper());
        let pace = Pace { lr: LR, max_grad_norm: 0.0 };
        for (step, expected) in theirs["losses"].as_array().unwrap().iter().enumerate() {
            let work = (&Sft::default() as &dyn Objective, trees.as_slice());
            let options = StepOptions::new(4096);
            let (report, _) = update(&trainee.learner, work, options, &mut adamw, pace).unwrap();
            let expected = expected.as_f64().unwrap();
            let apart = (report.loss - expected).abs() / expected;
            assert!(apart < 1e-4, "{name}, step {step}: {} and {expected}", report.loss);
        }
    }
}

/// `arriero serve` with a model; ends with the test.
struct Server {
    child: Child,
    url: String,
}

impl Server {
    fn start(model: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_arriero"))
            .arg("serve")
            .arg(model)
            .args(["--port", "0", "--served-model-name", "served", "--api-key-env", "SERVER_KEY"])
            // The models' own templates have no place for tools.
            .arg("--chat-template")
            .arg(root().join("tests/peers/chatml_tools.jinja"))
            .env("SERVER_KEY", "secret")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { child, url: line.trim().strip_prefix("listening on ").unwrap().to_owned() }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A session of OpenAI's client with a served model; returns what it says it got.
fn in_openai(python: &Path, model: &Path) -> Value {
    let server = Server::start(model);
    let printed =
        script(python, "openai_client.py", &[Path::new(&server.url), Path::new("secret")]);
    println!("{printed}");
    let got: Value = serde_json::from_str(printed.lines().last().unwrap()).unwrap();
    for name in [
        "stream_equal",
        "usage_equal",
        "greedy_is_likeliest",
        "probabilities",
        "tool_call_valid",
        "tool_stream_equal",
        "named_tool",
        "after_tool",
        "echo",
        "embeddings_sane",
        "base64_equals_floats",
    ] {
        assert_eq!(got[name], true, "{name}");
    }
    assert!(got["json_schema"]["sure"].is_boolean());
    let word = got["guided_regex"].as_str().unwrap();
    assert!(word.starts_with("Paris, ") || word.starts_with("Lyon, "), "{word}");
    for (name, class, status) in [
        ("wrong_model", "NotFoundError", 404),
        ("wrong_value", "BadRequestError", 400),
        ("unknown_field", "BadRequestError", 400),
        ("too_long", "BadRequestError", 400),
        ("unknown_tool", "BadRequestError", 400),
        ("wrong_key", "AuthenticationError", 401),
    ] {
        assert_eq!((&got[name][0], &got[name][1]), (&class.into(), &status.into()), "{name}");
    }
    got
}

#[test]
fn openai_client_works_with_the_server() {
    let Some(python) = python("ARRIERO_PEERS") else { return };
    in_openai(&python, &root().join("data/tiny/student"));
    let got = in_openai(&python, &smollm2_path());
    assert!(got["chat"].to_string().contains("Paris"), "{}", got["chat"]);
}
