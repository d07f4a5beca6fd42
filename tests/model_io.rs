//! Checkpoints of other programs read and written, against the files that those programs made.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "helpers of tests: damaged files are written on purpose"
)]

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use arriero::data::record::Message;
use arriero::model::checkpoint::{Checkpoint, LoadOptions, load_weights};
use arriero::model::save::SaveOptions;
use arriero::model::tensor_file;
use arriero::model::{Architecture, Config};
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use serde_json::json;

const CPU: Device = Device::Cpu;

/// The folder of reference files.
fn goldens() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/goldens");
    std::env::var_os("ARRIERO_GOLDENS").map_or_else(default, PathBuf::from)
}

const MODELS: [&str; 5] =
    ["model_tied", "model_untied", "model_llama3rope", "model_ref_untied", "model_reward"];

fn golden_model(name: &str) -> Checkpoint {
    Checkpoint::load_dir(&goldens().join(name), &CPU).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[track_caller]
fn assert_same_weights(one: &BTreeMap<String, Tensor>, two: &BTreeMap<String, Tensor>) {
    assert_eq!(one.keys().collect::<Vec<_>>(), two.keys().collect::<Vec<_>>());
    for (name, tensor) in one {
        assert_eq!(tensor.dims(), two[name].dims(), "{name}");
        assert!(bits(tensor) == bits(&two[name]), "{name} differs");
    }
}

fn f32_options() -> SaveOptions {
    SaveOptions::new(DType::F32)
}

#[test]
fn golden_models_save_and_load_to_the_same_bits() {
    for name in MODELS {
        let model = golden_model(name);
        let is_reward = name == "model_reward";
        assert_eq!(model.config.architecture == Architecture::SequenceClassification, is_reward);
        assert_eq!(model.weights.contains_key("score.weight"), is_reward);
        let dir = tempfile::tempdir().unwrap();
        let one = dir.path().join("one");
        model.save(&one, &f32_options()).unwrap();
        let again = Checkpoint::load_dir(&one, &CPU).unwrap();
        assert_same_weights(&model.weights, &again.weights);
        assert_eq!(model.config, again.config, "{name}");
        let original = tensor_file::read(&goldens().join(name).join("model.safetensors"), &CPU);
        assert_same_weights(&original.unwrap(), &again.weights);

        let sharded = dir.path().join("sharded");
        model.save(&sharded, &SaveOptions { shard_bytes: 50_000, ..f32_options() }).unwrap();
        assert!(!sharded.join("model.safetensors").exists());
        assert!(sharded.join("model.safetensors.index.json").exists());
        let again = Checkpoint::load_dir(&sharded, &CPU).unwrap();
        assert_same_weights(&model.weights, &again.weights);
    }
}

#[test]
fn saving_into_a_directory_that_is_not_empty_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("precious.txt"), "x").unwrap();
    let error = golden_model("model_tied").save(dir.path(), &f32_options()).unwrap_err();
    assert!(error.to_string().contains("not empty"), "{error}");
    assert!(dir.path().join("precious.txt").exists());
}

/// Saves a golden model, lets `change` damage the directory, and expects loading to say `expected`.
#[track_caller]
fn check_refused(change: impl Fn(&Path, &mut Checkpoint), expected: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    let mut model = golden_model("model_untied");
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("config.json"), model.config.to_json()).unwrap();
    change(&path, &mut model);
    let file = path.join("model.safetensors");
    if !file.exists() {
        write_raw(&file, &model);
    }
    let text = match Checkpoint::load_dir(&path, &CPU) {
        Ok(_) => panic!("must be refused: {expected:?}"),
        Err(error) => error.to_string(),
    };
    for part in expected {
        assert!(text.contains(part), "`{text}` does not say `{part}`");
    }
}

/// Writes weights without the checks of a checkpoint.
fn write_raw(path: &Path, model: &Checkpoint) {
    let tensors: std::collections::HashMap<String, Tensor> =
        model.weights.clone().into_iter().collect();
    candle_core::safetensors::save(&tensors, path).unwrap();
}

#[test]
fn damaged_checkpoints_are_refused_with_file_and_tensor() {
    let norm = "model.norm.weight";
    let file = "model.safetensors";
    check_refused(|_, model| drop(model.weights.remove(norm)), &["missing tensor", norm, file]);
    check_refused(
        |_, model| {
            let tensor = model.weights[norm].clone();
            model.weights.insert("model.extra.weight".into(), tensor);
        },
        &["unexpected tensor `model.extra.weight`", file],
    );
    check_refused(
        |_, model| {
            drop(model.weights.insert(norm.into(), Tensor::ones(3, DType::F32, &CPU).unwrap()));
        },
        &[norm, "[3]", "[64]", file],
    );
    for bad in [f32::NAN, f32::INFINITY] {
        check_refused(
            |_, model| {
                let mut values = vec![1.0; 64];
                values[7] = bad;
                model.weights.insert(norm.into(), Tensor::new(values, &CPU).unwrap());
            },
            &[norm, "not finite", "index 7", file],
        );
    }
    check_refused(
        |_, model| {
            drop(model.weights.insert(norm.into(), Tensor::ones(64, DType::U32, &CPU).unwrap()));
        },
        &[norm, "U32"],
    );
}

#[test]
fn truncated_files_and_broken_indices_are_refused() {
    let (norm, file) = ("model.norm.weight", "model.safetensors");
    check_refused(
        |path, model| {
            write_raw(&path.join(file), model);
            let whole = std::fs::read(path.join(file)).unwrap();
            std::fs::write(path.join(file), &whole[..whole.len() - 1]).unwrap();
        },
        &[file, "not a whole safetensors file"],
    );
    check_refused(|path, _| std::fs::write(path.join(file), "").unwrap(), &[file, "empty"]);
    check_refused(|path, _| std::fs::write(path.join(file), "junkjunkjunk").unwrap(), &[file]);
    check_refused(
        |path, _| std::fs::remove_file(path.join("config.json")).unwrap(),
        &["config.json"],
    );
    check_refused(
        |path, _| std::fs::write(path.join("config.json"), "{").unwrap(),
        &["config.json"],
    );
    check_refused(
        |path, _| {
            let index = json!({"weight_map": {norm: "../other.safetensors"}}).to_string();
            std::fs::write(path.join("model.safetensors.index.json"), index).unwrap();
        },
        &["expected a file name"],
    );
    check_refused(
        |path, _| {
            let index = json!({"weight_map": {norm: "model-2.safetensors"}}).to_string();
            std::fs::write(path.join("model.safetensors.index.json"), index).unwrap();
        },
        &["model-2.safetensors"],
    );
}

#[test]
fn stored_tied_head_must_be_a_copy_of_the_embedding() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = golden_model("model_tied");
    let embedding = model.weights["model.embed_tokens.weight"].clone();
    model.weights.insert("lm_head.weight".into(), embedding.copy().unwrap());
    write_raw(&dir.path().join("model.safetensors"), &model);
    let weights = load_weights(dir.path(), &model.config, &CPU).unwrap();
    assert!(!weights.contains_key("lm_head.weight"));
    model.weights.insert("lm_head.weight".into(), embedding.affine(1.0, 1e-3).unwrap());
    write_raw(&dir.path().join("model.safetensors"), &model);
    let error = load_weights(dir.path(), &model.config, &CPU).unwrap_err();
    assert!(error.to_string().contains("lm_head.weight"), "{error}");
}

#[test]
fn half_precision_is_read_and_written() {
    let model = golden_model("model_tied");
    for dtype in [DType::BF16, DType::F16] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("half");
        model.save(&path, &SaveOptions::new(dtype)).unwrap();
        let again = Checkpoint::load_dir(&path, &CPU).unwrap();
        assert_eq!(again.config.dtype, dtype);
        for (name, tensor) in &model.weights {
            let expected = tensor.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap();
            assert!(bits(&expected) == bits(&again.weights[name]), "{name}");
        }
    }
}

#[test]
fn a_resized_embedding_keeps_its_rows_and_adds_their_mean() {
    for name in ["model_tied", "model_untied"] {
        let mut model = golden_model(name);
        let before = model.weights["model.embed_tokens.weight"].clone();
        model.resize_embeddings(515).unwrap();
        let after = &model.weights["model.embed_tokens.weight"];
        assert_eq!(after.dims(), [515, 64]);
        assert_eq!(bits(&after.narrow(0, 0, 512).unwrap()), bits(&before));
        let mean = before.mean_keepdim(0).unwrap();
        assert_eq!(bits(&after.narrow(0, 514, 1).unwrap()), bits(&mean));
        arriero::model::params::check(&model.config, &model.weights).unwrap();
        assert!(model.resize_embeddings(10).is_err());
    }
}

#[test]
fn added_tokens_get_ids_and_rows_and_survive_saving() {
    let mut model = Checkpoint::load_dir(std::path::Path::new("data/tiny/student"), &CPU).unwrap();
    let (rows, before) = (model.config.vocab_size, model.tokenizer().unwrap().vocab_size());
    let known = model.tokenizer().unwrap().token(0).unwrap();
    let wanted = ["<|tool|>".to_owned(), known, "<|think|>".to_owned()];
    assert_eq!(model.add_tokens(&wanted).unwrap(), 2);
    assert_eq!(model.config.vocab_size, rows.max(before + 2), "spare rows are used first");
    let more: Vec<String> = (0..rows).map(|index| format!("<|more-{index}|>")).collect();
    assert_eq!(model.add_tokens(&more).unwrap(), rows);
    assert_eq!(model.config.vocab_size, before + 2 + rows);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("more");
    model.save(&path, &SaveOptions::new(DType::F32)).unwrap();
    let again = Checkpoint::load_dir(&path, &CPU).unwrap();
    let tokenizer = again.tokenizer().unwrap();
    assert_eq!(tokenizer.encode_special("<|think|>").unwrap(), [before as u32 + 1]);
    assert!(tokenizer.encode("<|think|>").len() > 1, "what a user writes stays text");
    assert!(model.add_tokens(&[String::new()]).is_err());
}

#[test]
fn reward_model_is_saved_with_a_padding_token_that_ends_no_row() {
    let mut model = golden_model("model_untied").into_reward_model(3).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("reward");
    model.save(&path, &f32_options()).unwrap();
    let again = Checkpoint::load_dir(&path, &CPU).unwrap();
    assert_eq!(again.config.architecture, Architecture::SequenceClassification);
    assert_eq!(again.weights["score.weight"].dims(), [1, 64]);
    assert_eq!(again.config.pad_token_id, Some(0));
    model.config.pad_token_id = Some(2); // the end of a turn, and there is no tokenizer to ask
    let error = model.save(&dir.path().join("other"), &f32_options()).unwrap_err();
    assert!(error.to_string().contains("padding"), "{error}");
    assert!(!dir.path().join("other").exists());
}

/// The numbers of a safetensors file's tensor as f32.
fn golden_tensors(file: &str) -> std::collections::HashMap<String, Tensor> {
    candle_core::safetensors::load(goldens().join(file), &CPU).unwrap()
}

/// candle-transformers reads the directory that was saved and gives the reference logits.
fn check_logits_with_candle(variant: &str) {
    use candle_transformers::models::llama;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    golden_model(&format!("model_{variant}")).save(&path, &f32_options()).unwrap();
    let text = std::fs::read_to_string(path.join("config.json")).unwrap();
    let config: llama::LlamaConfig = serde_json::from_str(&text).unwrap();
    let config = config.into_config(false);
    #[expect(unsafe_code, reason = "candle maps the file, which nothing else touches")]
    let weights = unsafe {
        candle_nn::VarBuilder::from_mmaped_safetensors(
            &[path.join("model.safetensors")],
            DType::F32,
            &CPU,
        )
    };
    let model = llama::Llama::load(weights.unwrap(), &config).unwrap();
    let golden = golden_tensors(&format!("a_logits_{variant}.safetensors"));
    let (rows, _) = golden["input_ids"].dims2().unwrap();
    for row in 0..rows {
        let length = golden["attention_mask"].get(row).unwrap();
        let length = length.to_dtype(DType::F32).unwrap().sum_all().unwrap();
        let length = length.to_scalar::<f32>().unwrap() as usize;
        let ids = golden["input_ids"].get(row).unwrap().narrow(0, 0, length).unwrap();
        let ids = ids.to_dtype(DType::U32).unwrap().unsqueeze(0).unwrap();
        let mut cache = llama::Cache::new(false, DType::F32, &config, &CPU).unwrap();
        let logits = model.forward(&ids, 0, &mut cache).unwrap().flatten_all().unwrap();
        let expected = golden["logits"].get(row).unwrap().get(length - 1).unwrap();
        let difference = (logits - expected).unwrap().abs().unwrap().max(0).unwrap();
        let difference = difference.to_scalar::<f32>().unwrap();
        assert!(difference < 1e-4, "{variant} row {row}: {difference}");
    }
}

#[test]
fn candle_reproduces_golden_logits_from_the_saved_tied_model() {
    check_logits_with_candle("tied");
}

#[test]
fn candle_reproduces_golden_logits_from_the_saved_untied_model() {
    check_logits_with_candle("untied");
}

#[test]
fn candle_reproduces_golden_logits_from_the_saved_llama3_rope_model() {
    check_logits_with_candle("llama3rope");
}

/// Metadata and tensors of a small GGUF file made of a golden model, in llama.cpp's names and order.
struct Gguf {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, Tensor)>,
}

impl Gguf {
    fn of(model: &Checkpoint) -> Self {
        let config = &model.config;
        let u32_of = |n: usize| Value::U32(u32::try_from(n).unwrap());
        let texts =
            |list: &[String]| Value::Array(list.iter().cloned().map(Value::String).collect());
        let tokens: Vec<String> = (0..config.vocab_size).map(token).collect();
        let kinds =
            (0..config.vocab_size).map(|id| Value::I32(if id < 3 { 3 } else { 1 })).collect();
        let metadata = [
            ("general.architecture", Value::String("llama".into())),
            ("llama.block_count", u32_of(config.num_hidden_layers)),
            ("llama.context_length", u32_of(config.max_position_embeddings)),
            ("llama.embedding_length", u32_of(config.hidden_size)),
            ("llama.feed_forward_length", u32_of(config.intermediate_size)),
            ("llama.attention.head_count", u32_of(config.num_attention_heads)),
            ("llama.attention.head_count_kv", u32_of(config.num_key_value_heads)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32)),
            ("llama.rope.freq_base", Value::F32(config.rope.theta as f32)),
            ("llama.rope.dimension_count", u32_of(config.head_dim)),
            ("tokenizer.ggml.model", Value::String("gpt2".into())),
            ("tokenizer.ggml.pre", Value::String("smollm".into())),
            ("tokenizer.ggml.tokens", texts(&tokens)),
            ("tokenizer.ggml.merges", texts(&["a b".to_owned()])),
            ("tokenizer.ggml.token_type", Value::Array(kinds)),
            ("tokenizer.ggml.bos_token_id", Value::U32(1)),
            ("tokenizer.ggml.eos_token_id", Value::U32(2)),
            ("tokenizer.ggml.padding_token_id", Value::U32(0)),
            ("tokenizer.chat_template", Value::String("{{ messages[0].content }}".into())),
        ];
        let metadata = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let tensors = model.weights.iter().map(|(name, tensor)| renamed(name, tensor, config));
        let mut gguf = Self { metadata, tensors: tensors.collect() };
        if let Some(scaling) = config.rope.scaling {
            let plain = arriero::model::rope::Rope::plain(config.rope.theta);
            let factors: Vec<f32> = plain
                .inverse_frequencies(config.head_dim)
                .iter()
                .zip(config.rope.inverse_frequencies(config.head_dim))
                .map(|(plain, scaled)| plain / scaled)
                .collect();
            assert!(scaling.factor > 1.0);
            gguf.tensors.push(("rope_freqs.weight".into(), Tensor::new(factors, &CPU).unwrap()));
        }
        gguf
    }

    fn set(&mut self, key: &str, value: Value) {
        self.metadata.retain(|(name, _)| name != key);
        self.metadata.push((key.to_owned(), value));
    }

    fn bytes(&self, dtype: GgmlDType) -> Vec<u8> {
        let metadata: Vec<(&str, &Value)> =
            self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let quantised: Vec<(&str, QTensor)> = self
            .tensors
            .iter()
            .map(|(name, tensor)| {
                let dtype = if tensor.rank() == 2 { dtype } else { GgmlDType::F32 };
                (name.as_str(), QTensor::quantize(tensor, dtype).unwrap())
            })
            .collect();
        let quantised: Vec<(&str, &QTensor)> =
            quantised.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let mut out = Cursor::new(Vec::new());
        gguf_file::write(&mut out, &metadata, &quantised).unwrap();
        out.into_inner()
    }

    fn load(&self, dtype: GgmlDType) -> arriero::Result<Checkpoint> {
        load_gguf_bytes(&self.bytes(dtype))
    }
}

fn load_gguf_bytes(bytes: &[u8]) -> arriero::Result<Checkpoint> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Checkpoint::load(path.to_str().unwrap(), &CPU, &LoadOptions::default())
}

/// Three control tokens, `a`, `b`, `ab`, digits, then numbered fillers.
fn token(id: usize) -> String {
    let fixed = ["<pad>", "<s>", "</s>", "a", "b", "ab", "1", "2", "12"];
    fixed.get(id).map_or_else(|| format!("<filler{id}>"), |text| (*text).to_owned())
}

/// llama.cpp's name; rows of q and k interleaved, as its converter writes them.
fn renamed(name: &str, tensor: &Tensor, config: &Config) -> (String, Tensor) {
    let mut new = name.replace("model.layers.", "blk.");
    for (from, to) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        new = new.replace(from, to);
    }
    let heads = match new.rsplit('.').nth(1) {
        Some("attn_q") => config.num_attention_heads,
        Some("attn_k") => config.num_key_value_heads,
        _ => return (new, tensor.clone()),
    };
    let (rows, columns) = tensor.dims2().unwrap();
    let split = tensor.reshape((heads, 2, config.head_dim / 2, columns)).unwrap();
    let swapped = split.transpose(1, 2).unwrap().contiguous().unwrap();
    (new, swapped.reshape((rows, columns)).unwrap())
}

#[test]
fn golden_models_round_trip_through_gguf_bitwise() {
    for name in ["model_tied", "model_untied", "model_llama3rope"] {
        let model = golden_model(name);
        let again = Gguf::of(&model).load(GgmlDType::F32).unwrap();
        assert_same_weights(&model.weights, &again.weights);
        assert_eq!(again.config.rope, model.config.rope, "{name}");
        assert_eq!(again.config.tie_word_embeddings, model.config.tie_word_embeddings);
        assert!((again.config.rms_norm_eps - model.config.rms_norm_eps).abs() < 1e-12);
        assert_eq!(again.config.eos_token_ids, [2]);
        let tokenizer = again.tokenizer.unwrap();
        assert_eq!(tokenizer.ends(), [2]);
        assert_eq!(tokenizer.bos(), Some(1));
        // Digits one by one, though the vocabulary has `12`.
        assert_eq!(tokenizer.encode("ab12"), [5, 6, 7]);
        assert_eq!(tokenizer.encode_special("ab</s>").unwrap(), [5, 2]);
    }
}

#[test]
fn quantised_gguf_weights_are_close_to_the_original() {
    let model = golden_model("model_untied");
    let again = Gguf::of(&model).load(GgmlDType::Q8_0).unwrap();
    for (name, tensor) in &model.weights {
        let difference = (tensor - &again.weights[name]).unwrap().abs().unwrap();
        let difference = difference.flatten_all().unwrap().max(0).unwrap();
        assert!(difference.to_scalar::<f32>().unwrap() < 5e-3, "{name}");
    }
}

#[test]
fn unsupported_gguf_files_are_refused_by_name() {
    let model = golden_model("model_untied");
    let text = |text: &str| Value::String(text.to_owned());
    let cases = [
        ("general.architecture", text("gemma3"), "gemma3"),
        ("llama.rope.scaling.type", text("yarn"), "yarn"),
        ("llama.rope.dimension_count", Value::U32(8), "8 of 16"),
        ("llama.expert_count", Value::U32(8), "llama.expert_count"),
        ("llama.logit_scale", Value::F32(0.5), "llama.logit_scale"),
        ("llama.block_count", text("two"), "llama.block_count"),
        ("tokenizer.ggml.pre", text("tekken"), "tekken"),
        ("tokenizer.ggml.model", text("t5"), "t5"),
        ("tokenizer.ggml.merges", Value::Array(vec![text("ab")]), "merge `ab`"),
    ];
    for (key, value, expected) in cases {
        let mut gguf = Gguf::of(&model);
        gguf.set(key, value);
        let error = gguf.load(GgmlDType::F32).err().expect(expected).to_string();
        assert!(error.contains(expected) && error.contains("model.gguf"), "{error}");
    }
}

#[test]
fn gguf_file_truncated_anywhere_is_an_error() {
    let bytes = Gguf::of(&golden_model("model_tied")).bytes(GgmlDType::Q8_0);
    for keep in [0, 3, 20, 300, 9_000, bytes.len() / 2, bytes.len() - 64] {
        assert!(load_gguf_bytes(&bytes[..keep]).is_err(), "{keep} of {}", bytes.len());
    }
    load_gguf_bytes(&bytes).unwrap();
}

#[test]
fn a_gguf_tokenizer_larger_than_the_model_is_refused() {
    let mut gguf = Gguf::of(&golden_model("model_tied"));
    let tokens = (0..600).map(|id| Value::String(token(id))).collect();
    gguf.set("tokenizer.ggml.tokens", Value::Array(tokens));
    let error = gguf.load(GgmlDType::F32).err().unwrap().to_string();
    assert!(error.contains("599") && error.contains("512"), "{error}");
}

/// The GGUF file of SmolLM2-135M-Instruct.
fn smollm2() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("data/smollm2");
    let home = std::env::var_os("ARRIERO_SMOLLM2").map_or_else(default, PathBuf::from);
    let path = home.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.is_file(), "{} is not there: run scripts/fetch-smollm2", path.display());
    path
}

#[test]
fn smollm2_loads_from_gguf_with_its_own_tokenizer() {
    let model = Checkpoint::load_gguf(&smollm2(), &CPU).unwrap();
    let config = &model.config;
    assert_eq!((config.num_hidden_layers, config.hidden_size, config.vocab_size), (30, 576, 49152));
    assert!(config.tie_word_embeddings);
    let tokenizer = model.tokenizer().unwrap();
    let message: Message = serde_json::from_value(
        json!({"role": "user", "content": "What is the capital of France?"}),
    )
    .unwrap();
    let ids = tokenizer.prompt_ids(&[message], None).unwrap();
    let turn = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198];
    assert!(ids.ends_with(&turn), "{ids:?}");
    assert_eq!(tokenizer.ends(), [2]);

    let text = std::fs::read_to_string(goldens().join("g_tokenizer.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    for case in golden.as_array().or_else(|| golden["cases"].as_array()).unwrap() {
        let text = case["text"].as_str().unwrap();
        let expected: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode_special(text).unwrap(), expected, "{text:?}");
    }

    let reward = Checkpoint { tokenizer: model.tokenizer.clone(), ..model.clone() };
    let reward = reward.into_reward_model(1).unwrap();
    assert_ne!(reward.reward_pad().unwrap(), 2);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("reward");
    reward.save(&path, &SaveOptions::new(DType::BF16)).unwrap();
    let again = Checkpoint::load_dir(&path, &CPU).unwrap();
    assert_eq!(again.config.pad_token_id, again.tokenizer().unwrap().pad());
    assert_eq!(again.tokenizer().unwrap().encode("Hi 2024!"), tokenizer.encode("Hi 2024!"));
}

/// Llama-style SentencePiece pieces in a GGUF file: the merges follow from the scores.
#[test]
fn sentence_piece_merges_follow_from_the_scores() {
    let mut gguf = Gguf::of(&golden_model("model_tied"));
    let mut pieces = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
    pieces.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    let words = ["▁", "h", "i", "t", "▁h", "it", "hi", "▁hi", "▁hit"];
    let first = pieces.len() as u32;
    pieces.extend(words.map(str::to_owned));
    let kinds = (0..pieces.len()).map(|id| match id {
        0 => 2,
        1 | 2 => 3,
        3..259 => 6,
        _ => 1,
    });
    let kinds = kinds.map(Value::I32).collect();
    // Better scores merge first: `it` before `▁h`, so that ` hit` is `▁h` + `it` only by its last merge.
    let scores = [-9.0, -9.0, -9.0, -9.0, -3.0, -1.0, -4.0, -5.0, -6.0];
    let scores = std::iter::repeat_n(0.0, first as usize).chain(scores).map(Value::F32).collect();
    gguf.set("tokenizer.ggml.model", Value::String("llama".into()));
    gguf.set(
        "tokenizer.ggml.tokens",
        Value::Array(pieces.into_iter().map(Value::String).collect()),
    );
    gguf.set("tokenizer.ggml.token_type", Value::Array(kinds));
    gguf.set("tokenizer.ggml.scores", Value::Array(scores));
    let tokenizer = gguf.load(GgmlDType::F32).unwrap().tokenizer.unwrap();
    let id = |word: &str| first + words.iter().position(|w| *w == word).unwrap() as u32;
    assert_eq!(tokenizer.encode_special("hit").unwrap(), [id("▁hit")]);
    assert_eq!(tokenizer.encode_special("hi hi").unwrap(), [id("▁hi"), id("▁hi")]);
    // What no piece covers is spelt in bytes, and reads back.
    let ids = tokenizer.encode_special("hit é").unwrap();
    assert_eq!(ids, [id("▁hit"), id("▁"), 3 + 0xC3, 3 + 0xA9]);
    assert_eq!(tokenizer.decode(&ids, true), "hit é");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(20) })]
    /// Any finite weights of any small shape, in any number of files, come back to the same bits.
    #[test]
    fn saved_weights_load_to_the_same_bits(
        layers in 1_usize..4,
        groups in 1_usize..3,
        tied in any::<bool>(),
        shard_bytes in 1_usize..20_000,
        seed in any::<u64>(),
        scale in prop_oneof![Just(1e-30_f64), Just(1.0), Just(1e30)],
    ) {
        let keys = json!({
            "model_type": "llama", "vocab_size": 20, "hidden_size": 12, "intermediate_size": 10,
            "num_hidden_layers": layers, "num_attention_heads": 2 * groups, "head_dim": 6,
            "num_key_value_heads": groups, "tie_word_embeddings": tied, "initializer_range": scale,
        });
        let config = Config::from_json(&keys.to_string()).unwrap();
        let weights = arriero::model::init::random(&config, seed, &CPU).unwrap();
        let model = Checkpoint { config, weights, tokenizer: None };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model");
        model.save(&path, &SaveOptions { shard_bytes, ..f32_options() }).unwrap();
        let again = Checkpoint::load_dir(&path, &CPU).unwrap();
        assert_same_weights(&model.weights, &again.weights);
        // JSON keeps this one number only to its last digit but one.
        let initializer_range = model.config.initializer_range;
        prop_assert_eq!(model.config, Config { initializer_range, ..again.config });
    }
}
