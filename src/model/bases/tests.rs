//! Adapters share their base's storage, and each computes what its merged model does.

use std::path::PathBuf;

use candle_core::DType;
use candle_core::quantized::{QTensor, gguf_file};

use super::*;
use crate::data::forest::Forest;
use crate::data::tree::{Role, Tree};
use crate::model::Architecture;
use crate::model::checkpoint::LoadOptions;
use crate::model::export::{Encoding, Format, export};
use crate::model::lora::peft::{AdapterConfig, BaseRecord};
use crate::model::lora::{A, B, Lora, MAGNITUDE, attach, parameter};
use crate::model::packed::BlockType;
use crate::model::params::{EMBEDDING, FINAL_NORM, SCORE};
use crate::ops::linear::tests::random;

const BASE: &str = "data/tiny/student";

fn form() -> Form {
    Form::dense(&Device::Cpu, Precision::F32)
}

/// Writes an adapter whose factors are not zero; a reward model's has a head of its own.
fn adapter(dir: &Path, name: &str, seed: u64, (dora, scorer): (bool, bool)) -> PathBuf {
    let Checkpoint { config, mut weights, tokenizer } =
        Checkpoint::load_dir(BASE.as_ref(), &Device::Cpu).unwrap();
    let fingerprint = peft::fingerprint(&weights).unwrap();
    let lora = Lora { lora_r: 4, use_dora: dora, ..Lora::default() };
    let mut trained = attach(&lora, &config, &mut weights, seed).unwrap().factors;
    for (at, (name, tensor)) in trained.iter_mut().enumerate() {
        if name.contains(B) {
            *tensor = (random(seed + at as u64, tensor.shape()) * 0.05).unwrap();
        }
    }
    let dir = dir.join(name);
    store::create_dir(&dir).unwrap();
    let mut files = AdapterConfig {
        r: 4,
        lora_alpha: 8.0,
        use_dora: dora,
        base_model_name_or_path: Some(lora::load::lasting_name(BASE).unwrap()),
        ..AdapterConfig::default()
    };
    if scorer {
        files.task_type = Some("SEQ_CLS".to_owned());
        trained.insert(SCORE.to_owned(), random(seed, (1, config.hidden_size)));
        let model = Checkpoint { config, weights, tokenizer };
        let model = model.into_reward_model(seed).unwrap();
        model.write_beside(&dir, DType::F32).unwrap();
    }
    peft::write(&dir, &files, &trained, &BaseRecord::dense(&fingerprint)).unwrap();
    dir
}

fn load(bases: &Bases, dir: &Path) -> Model {
    bases.model(dir.to_str().unwrap(), &form()).unwrap()
}

fn outputs(model: &Transformer) -> Vec<f32> {
    let tree = Tree::sequence((5..45).collect(), vec![Role::Content; 40], 0);
    let hidden = model.hidden(&Forest::pack(&[tree]).unwrap()).unwrap();
    let outputs = crate::ops::linear(&hidden, model.head(), None).unwrap();
    outputs.flatten_all().unwrap().to_vec1::<f32>().unwrap()
}

fn bytes(weights: &Weights) -> usize {
    weights.values().map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum()
}

#[test]
fn a_policy_its_reference_and_its_reward_model_are_one_base() {
    let home = tempfile::tempdir().unwrap();
    let policy = adapter(home.path(), "policy", 1, (false, false));
    let reference = adapter(home.path(), "reference", 2, (true, false));
    let judge = adapter(home.path(), "judge", 3, (false, true));
    let bases = Bases::default();
    let base = bases.model(BASE, &form()).unwrap();
    let models = [&policy, &reference, &judge].map(|dir| load(&bases, dir));
    assert_eq!(bases.reads(), 1);
    assert_eq!(models[2].config.architecture, Architecture::SequenceClassification);
    for model in &models {
        // Every tensor that the base has is the base's own storage.
        for (name, tensor) in &base.tensors.weights {
            if model.config.architecture == Architecture::CausalLm
                || model.tensors.weights.contains_key(name)
            {
                assert_eq!(model.tensors.weights[name].id(), tensor.id(), "{name}");
            }
        }
        assert!(bytes(&model.own()) < bytes(&base.tensors.weights) / 4);
        assert!(base.own().is_empty());
    }
    assert!(models[2].own().contains_key(SCORE) && !models[0].own().contains_key(SCORE));
    assert!(models[1].own().keys().any(|name| name.contains(MAGNITUDE)));

    // What stands apart computes what the merged model does, and no two of them the same.
    let mut seen = vec![outputs(&base.transformer().unwrap())];
    for (model, dir) in models.iter().zip([&policy, &reference, &judge]) {
        let found = outputs(&model.transformer().unwrap());
        let merged = Checkpoint::load_dir(dir, &Device::Cpu).unwrap();
        let expected = outputs(&Transformer::new(&merged.config, &merged.weights).unwrap());
        let apart = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let largest = expected.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        assert!(apart < 1e-4 * largest, "{}: {apart} of {largest}", dir.display());
        let own = model.checkpoint().unwrap();
        assert_eq!(outputs(&Transformer::new(&own.config, &own.weights).unwrap()), expected);
        for other in &seen {
            let same = other.len() == found.len()
                && other.iter().zip(&found).all(|(a, b)| (a - b).abs() < 1e-3);
            assert!(!same, "{}", dir.display());
        }
        seen.push(found);
    }
}

#[test]
fn a_base_is_read_again_once_nobody_holds_it_or_it_was_written_anew_or_in_another_form() {
    let home = tempfile::tempdir().unwrap();
    let policy = adapter(home.path(), "policy", 1, (false, false));
    let bases = Bases::default();
    let first = load(&bases, &policy);
    let in_bf16 = Form::dense(&Device::Cpu, Precision::Bf16);
    let other = bases.model(BASE, &in_bf16).unwrap();
    assert_eq!(other.tensors.weights[EMBEDDING].dtype(), DType::BF16);
    assert_eq!(bases.reads(), 2);
    let nf4 = Form { quantization: Quantization::Nf4, ..form() };
    let packed = bases.model(policy.to_str().unwrap(), &nf4).unwrap();
    assert!(Arc::ptr_eq(&packed.base, &bases.base(BASE, &nf4).unwrap()));
    assert_eq!(bases.reads(), 3);
    drop(first);
    let again = load(&bases, &policy);
    assert_eq!(bases.reads(), 4);

    let copy = home.path().join("copy");
    let whole = Checkpoint::load_dir(BASE.as_ref(), &Device::Cpu).unwrap();
    whole.save(&copy, &crate::model::save::SaveOptions::new(DType::F32)).unwrap();
    let name = copy.to_str().unwrap();
    let before = bases.base(name, &form()).unwrap();
    assert_eq!(before.fingerprint, again.base.fingerprint);
    let mut weights = whole.weights.clone();
    weights.insert(FINAL_NORM.to_owned(), (&weights[FINAL_NORM] * 2.0).unwrap());
    store::remove(&copy).unwrap();
    let moved = Checkpoint { weights, ..whole };
    moved.save(&copy, &crate::model::save::SaveOptions::new(DType::F32)).unwrap();
    let after = bases.base(name, &form()).unwrap();
    assert_ne!(before.fingerprint, after.fingerprint);
    assert_eq!(bases.reads(), 6);
}

/// Tensor by tensor as all at once.
#[test]
fn a_packed_base_is_what_packing_the_whole_model_gives() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("student.gguf");
    let student = Checkpoint::load_dir(BASE.as_ref(), &Device::Cpu).unwrap();
    export(student, &file, Format::Gguf, Encoding::Q4_1).unwrap();
    let file = file.to_str().unwrap();
    let down = "down_proj";
    for (name, quantization, in_full) in [
        (BASE, Quantization::Nf4, vec![]),
        (BASE, Quantization::Nf4, vec![down.to_owned()]),
        (file, Quantization::Nf4, vec![]),
        (file, Quantization::Gguf, vec![]),
        (file, Quantization::Gguf, vec![down.to_owned()]),
    ] {
        let held = Form { quantization, in_full: in_full.clone(), ..form() };
        let found = Bases::default().base(name, &held).unwrap();
        let is_dense = found.tensors.weights.keys().any(|name| name.contains(down));
        assert_eq!(is_dense, !in_full.is_empty(), "{quantization:?}");
        let source = source::resolve(name, None).unwrap();
        let mut weights =
            Checkpoint::load(name, &Device::Cpu, &LoadOptions::default()).unwrap().weights;
        assert_eq!(found.fingerprint, peft::fingerprint(&weights).unwrap());
        let packed = packed::pack(&mut weights, quantization, &source, &in_full).unwrap();
        assert!(!packed.is_empty() && packed.keys().eq(found.tensors.packed.keys()));
        for (name, expected) in &packed {
            let bits = |packed: &Packed| -> Vec<u32> {
                packed.unpack::<f32>().into_iter().map(f32::to_bits).collect()
            };
            let found = &found.tensors.packed[name];
            assert_eq!((found.shape(), found.bytes()), (expected.shape(), expected.bytes()));
            assert_eq!(bits(found), bits(expected), "{name}");
        }
        let numbers = |weights: &Weights| -> Vec<(String, Vec<f32>)> {
            let of = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            weights.iter().map(|(name, tensor)| (name.clone(), of(tensor))).collect()
        };
        assert_eq!(numbers(&found.tensors.weights), numbers(&weights));
    }
}

/// Rows of Q and K lie interleaved in the file. They are moved block by block: every projection is the student's own,
/// rounded once.
#[test]
fn blocks_of_each_type_are_held_as_they_stand_in_the_file() {
    let home = tempfile::tempdir().unwrap();
    let student = Checkpoint::load_dir(BASE.as_ref(), &Device::Cpu).unwrap();
    let kinds = [
        (Encoding::Q4_0, BlockType::Q4_0),
        (Encoding::Q4_1, BlockType::Q4_1),
        (Encoding::Q8_0, BlockType::Q8_0),
    ];
    for (encoding, kind) in kinds {
        let file = home.path().join(format!("{}.gguf", encoding.name()));
        export(student.clone(), &file, Format::Gguf, encoding).unwrap();
        let held = Form { quantization: Quantization::Gguf, ..form() };
        let model = Bases::default().model(file.to_str().unwrap(), &held).unwrap();
        assert_eq!(model.tensors.packed.len(), 7 * student.config.num_hidden_layers);
        let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (name, packed) in &model.tensors.packed {
            let rounded = QTensor::quantize(&student.weights[name], kind.dtype()).unwrap();
            assert_eq!(packed.bytes(), rounded.storage_size_in_bytes(), "{name}");
            let expected = numbers(&rounded.dequantize(&Device::Cpu).unwrap());
            assert!(packed.unpack::<f32>() == expected, "{encoding:?}, {name}");
        }
        // llama.cpp's second row of a head is the first of the head's second half.
        let mut reader = std::fs::File::open(&file).unwrap();
        let content = gguf_file::Content::read(&mut reader).unwrap();
        let query = content.tensor(&mut reader, "blk.1.attn_q.weight", &Device::Cpu).unwrap();
        let query = query.dequantize(&Device::Cpu).unwrap().get(1).unwrap();
        let (half, width) = (student.config.head_dim / 2, student.config.hidden_size);
        let ours = model.tensors.packed["model.layers.1.self_attn.q_proj.weight"].unpack::<f32>();
        assert!(numbers(&query) == ours[half * width..][..width], "{encoding:?}");

        let dense = Checkpoint::load(file.to_str().unwrap(), &Device::Cpu, &LoadOptions::default())
            .unwrap();
        let dense = Transformer::new(&dense.config, &dense.weights).unwrap();
        assert_eq!(outputs(&model.transformer().unwrap()), outputs(&dense), "{encoding:?}");
    }
}

#[test]
fn an_adapter_of_another_base_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let dir = adapter(home.path(), "policy", 1, (false, false));
    let config = AdapterConfig::read(&dir).unwrap();
    let trained = peft::read(&dir, &Device::Cpu).unwrap().into_trained();
    peft::write(&dir, &config, &trained, &BaseRecord::dense("another")).unwrap();
    let error = Bases::default().model(dir.to_str().unwrap(), &form()).err().unwrap();
    assert!(error.to_string().contains("trained beside another"), "{error}");
    let mut narrow = trained;
    let module = "model.layers.0.mlp.up_proj";
    narrow.insert(parameter(module, A), random(1, (4, 8)));
    let fingerprint = Bases::default().base(BASE, &form()).unwrap().fingerprint.clone();
    peft::write(&dir, &config, &narrow, &BaseRecord::dense(&fingerprint)).unwrap();
    let error = Bases::default().model(dir.to_str().unwrap(), &form()).err().unwrap();
    assert!(error.to_string().contains("for a projection"), "{error}");
}
