//! An exported model equals the original; failed exports leave nothing behind.

use std::collections::BTreeMap;

use candle_core::Tensor;
use tempfile::TempDir;

use super::*;
use crate::model::{Config, init, params};

fn teacher() -> Checkpoint {
    Checkpoint::load_dir("data/tiny/teacher".as_ref(), &Device::Cpu).unwrap()
}

/// A model with 512 embedding rows, 380 of them with tokens of the teacher.
fn golden(name: &str) -> Checkpoint {
    let dir = Path::new("tests/fixtures/goldens").join(name);
    let mut checkpoint = Checkpoint::load_dir(&dir, &Device::Cpu).unwrap();
    checkpoint.tokenizer = teacher().tokenizer;
    checkpoint
}

/// Qwen2 has biases, and its rows keep their order in a GGUF file.
fn qwen2() -> Checkpoint {
    let config = Config::from_json(
        r#"{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
        "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "hidden_act": "silu", "eos_token_id": 2}"#,
    )
    .unwrap();
    let mut weights = init::random(&config, 5, &Device::Cpu).unwrap();
    for (name, tensor) in &mut weights {
        if name.ends_with("bias") {
            let ramp = Tensor::arange(0_f32, tensor.elem_count() as f32, &Device::Cpu).unwrap();
            *tensor = (ramp * 0.01).unwrap();
        }
    }
    Checkpoint { config, weights, tokenizer: teacher().tokenizer }
}

fn numbers(checkpoint: &Checkpoint) -> BTreeMap<&str, Vec<f32>> {
    let numbers = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    checkpoint.weights.iter().map(|(name, tensor)| (name.as_str(), numbers(tensor))).collect()
}

fn to(home: &TempDir, name: &str) -> std::path::PathBuf {
    home.path().join(name)
}

#[test]
fn f32_gguf_export_round_trips_bitwise() {
    let home = tempfile::tempdir().unwrap();
    let models = [teacher(), golden("model_llama3rope"), golden("model_untied"), qwen2()];
    for (at, model) in models.into_iter().enumerate() {
        let path = to(&home, &format!("{at}.gguf"));
        let found = export(model.clone(), &path, Format::Gguf, Encoding::F32).unwrap();
        assert_eq!(found.max_logit_difference.to_bits(), 0.0_f64.to_bits(), "model {at}");
        assert!(found.tokens > 64, "model {at}: {} tokens", found.tokens);
        let back = Checkpoint::load_gguf(&path, &Device::Cpu).unwrap();
        assert_eq!(numbers(&back), numbers(&model), "model {at}");
        assert_eq!(params::shapes(&back.config), params::shapes(&model.config));
        assert_eq!(back.config.rope, model.config.rope, "model {at}");
        assert_eq!(
            back.config.max_position_embeddings, model.config.max_position_embeddings,
            "model {at}"
        );
        let template = |checkpoint: &Checkpoint| {
            checkpoint.tokenizer().unwrap().settings().chat_template.clone()
        };
        assert_eq!(template(&back), template(&model), "model {at}");
    }
    assert_eq!(store::entries(home.path()).unwrap().len(), 4, "nothing half-written is left");
}

#[test]
fn smaller_encodings_diverge_more_and_take_fewer_bytes() {
    let home = tempfile::tempdir().unwrap();
    let encodings = [Encoding::F32, Encoding::F16, Encoding::Q8_0, Encoding::Q4_1, Encoding::Q4_0];
    let found = encodings.map(|encoding| {
        let path = to(&home, encoding.name());
        // The teacher is stored as bf16; noise gives it low-order bits to lose.
        let mut model = teacher();
        let noise = init::random(&model.config, 1, &Device::Cpu).unwrap();
        for (name, tensor) in &mut model.weights {
            *tensor = (&*tensor + (&noise[name] * 0.01).unwrap()).unwrap();
        }
        let difference = export(model, &path, Format::Gguf, encoding).unwrap();
        (difference.kl, std::fs::metadata(path).unwrap().len())
    });
    assert!(found.is_sorted_by(|(one, _), (two, _)| one < two), "{found:?}");
    assert!(found.is_sorted_by(|(_, one), (_, two)| one > two), "{found:?}");
}

#[test]
fn exported_directory_has_the_requested_type_and_shards() {
    let home = tempfile::tempdir().unwrap();
    let dir = to(&home, "bf16");
    let format = Format::Safetensors(50_000);
    let found = export(golden("model_untied"), &dir, format, Encoding::Bf16).unwrap();
    assert!(found.kl > 0.0 && found.max_logit_difference > 0.0, "{found:?}");
    assert!(dir.join("model.safetensors.index.json").exists());
    let back = Checkpoint::load_dir(&dir, &Device::Cpu).unwrap();
    assert_eq!(back.config.dtype, DType::BF16);
    let reward = golden("model_untied").into_reward_model(1).unwrap();
    let dir = to(&home, "reward");
    export(reward, &dir, Format::Safetensors(usize::MAX), Encoding::F16).unwrap();
    assert!(Checkpoint::load_dir(&dir, &Device::Cpu).is_ok());
}

#[test]
fn unsupported_exports_are_refused_and_leave_no_files() {
    let home = tempfile::tempdir().unwrap();
    let refuse = |model: Checkpoint, format, encoding, expected: &str| {
        let error = export(model, &to(&home, "out"), format, encoding).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(store::entries(home.path()).unwrap().is_empty());
    };
    let directory = Format::Safetensors(usize::MAX);
    let reward = || teacher().into_reward_model(1).unwrap();
    refuse(
        reward(),
        Format::Gguf,
        Encoding::F32,
        "a reward model, for which llama.cpp has no form",
    );
    refuse(teacher(), directory, Encoding::Q4_0, "safetensors in q4_0, expected f32, f16 or bf16");
    refuse(
        Checkpoint { tokenizer: None, ..teacher() },
        Format::Gguf,
        Encoding::F32,
        "the checkpoint has no tokenizer.json",
    );
    let mut large = teacher();
    let matrix = large.weights.get_mut("model.layers.0.mlp.up_proj.weight").unwrap();
    *matrix = (&*matrix * 1e6).unwrap();
    refuse(
        large,
        Format::Gguf,
        Encoding::F16,
        "tensor `model.layers.0.mlp.up_proj.weight`: weight",
    );
}

#[test]
fn model_that_reads_back_differently_is_refused() {
    let live = Reading::of(&teacher()).unwrap();
    live.compare(&teacher(), Encoding::F32).unwrap();
    // A typical conversion error: rows of q in the wrong order.
    let mut wrong = teacher();
    let rows = wrong.weights.get_mut("model.layers.1.self_attn.q_proj.weight").unwrap();
    *rows = crate::model::gguf_layout::interleaved(rows, 6, 32).unwrap();
    let error = live.compare(&wrong, Encoding::Q8_0).unwrap_err().to_string();
    assert!(error.starts_with("what was written as q8_0 gives other logits"), "{error}");
    let more = teacher().tokenizer().unwrap().with_special_tokens(&["capital".to_owned()]);
    let other = Checkpoint { tokenizer: Some(more.unwrap().0), ..teacher() };
    let error = live.compare(&other, Encoding::F32).unwrap_err().to_string();
    assert!(error.contains("as the tokens"), "{error}");
}
