//! Adapters share their base's storage, and each matches its merged model.

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
use crate::model::params::{EMBEDDING, FINAL_NORM, HEAD, SCORE};
use crate::ops::linear::tests::random;

const BASE: &str = "data/tiny/student";

fn form() -> Form {
    Form::dense(&Device::Cpu, Precision::F32)
}

/// Writes an adapter with non-zero factors; a reward model's has its own head.
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
fn policy_reference_and_reward_model_share_one_base() {
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
        // All of the base's tensors share the base's storage.
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

    // Each matches its merged model, and all differ.
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
fn base_is_reread_once_released_rewritten_or_needed_in_another_form() {
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
    assert_eq!(before.id, again.base.id);
    let mut weights = whole.weights.clone();
    weights.insert(FINAL_NORM.to_owned(), (&weights[FINAL_NORM] * 2.0).unwrap());
    store::remove(&copy).unwrap();
    let moved = Checkpoint { weights, ..whole };
    moved.save(&copy, &crate::model::save::SaveOptions::new(DType::F32)).unwrap();
    let after = bases.base(name, &form()).unwrap();
    assert_ne!(before.id, after.id);
    assert_eq!(bases.reads(), 6);
}

/// Packing tensor by tensor equals packing the whole model.
#[test]
fn packed_base_equals_packing_the_whole_model() {
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
        assert_eq!(found.id, BaseId::new(peft::fingerprint(&weights).unwrap()));
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

/// Rows of Q and K are interleaved in the file and moved block by block: every projection is the student's own, rounded
/// once.
#[test]
fn blocks_of_each_type_are_kept_as_stored_in_the_file() {
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
        // llama.cpp's second row of a head is the first row of its second half.
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
    assert!(error.to_string().contains("trained on another"), "{error}");
    let mut narrow = trained;
    let module = "model.layers.0.mlp.up_proj";
    narrow.insert(parameter(module, A), random(1, (4, 8)));
    let fingerprint = Bases::default().base(BASE, &form()).unwrap().id.fingerprint.clone();
    peft::write(&dir, &config, &narrow, &BaseRecord::dense(&fingerprint)).unwrap();
    let error = Bases::default().model(dir.to_str().unwrap(), &form()).err().unwrap();
    assert!(error.to_string().contains("for a projection"), "{error}");
}

/// As written by peft: only the base's name is recorded. The embedding is changed, and any further given weights.
fn adapter_of_peft(dir: &Path, config: AdapterConfig, more: Weights) -> Tensor {
    store::create_dir(dir).unwrap();
    let base = Checkpoint::load_dir(BASE.as_ref(), &Device::Cpu).unwrap();
    let embedding = &base.weights[EMBEDDING];
    let moved = (embedding + random(1, embedding.shape()) * 0.02).unwrap();
    let module = "model.layers.0.self_attn.q_proj";
    let (outer, inner) = base.weights[&format!("{module}.weight")].dims2().unwrap();
    let mut trained = Weights::from([
        (parameter(module, A), random(2, (4, inner))),
        (parameter(module, B), (random(3, (outer, 4)) * 0.05).unwrap()),
    ]);
    if config.architecture() == Architecture::CausalLm {
        trained.insert(EMBEDDING.to_owned(), moved.clone());
    }
    trained.extend(more);
    let base_model_name_or_path = Some(lora::load::lasting_name(BASE).unwrap());
    let config = AdapterConfig { base_model_name_or_path, r: 4, ..config };
    peft::write(dir, &config, &trained, None).unwrap();
    moved
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Checks that an adapter gives the same model when merged, applied beside its base, or loaded as a base. Returns it.
fn one_model(dir: &Path) -> Checkpoint {
    let merged = Checkpoint::load_dir(dir, &Device::Cpu).unwrap();
    let (config, _) = checkpoint::peek(dir).unwrap();
    let shape = |config: &Config| (config.architecture, config.is_tied(), config.labels.clone());
    assert_eq!(shape(&config), shape(&merged.config));
    params::check(&config, &merged.weights).unwrap();
    let expected = outputs(&Transformer::new(&merged.config, &merged.weights).unwrap());
    let bases = Bases::default();
    let beside = outputs(&load(&bases, dir).transformer().unwrap());
    let base = bases.base(dir.to_str().unwrap(), &form()).unwrap();
    let base = outputs(&Transformer::of(&base.config, &base.tensors).unwrap());
    let largest = expected.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    for found in [beside, base] {
        assert_eq!(found.len(), expected.len());
        let apart = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-4 * largest, "{apart} of {largest}");
    }
    merged
}

/// peft stores the tied head beside the embedding, and expects it in our files.
#[test]
fn trained_tied_embedding_is_still_the_head() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("tied");
    let tied = AdapterConfig { ensure_weight_tying: true, ..AdapterConfig::default() };
    let moved = adapter_of_peft(&dir, tied, Weights::new());
    let stored = peft::read(&dir, &Device::Cpu).unwrap().weights;
    assert_eq!(numbers(&stored[HEAD]), numbers(&moved));
    let model = one_model(&dir);
    assert!(model.config.is_tied() && !model.weights.contains_key(HEAD));
    assert_eq!(numbers(&model.weights[EMBEDDING]), numbers(&moved));

    let mut files = peft::read(&dir, &Device::Cpu).unwrap();
    files.weights.insert(HEAD.to_owned(), (&moved * 2.0).unwrap());
    let base = Checkpoint::load_dir(BASE.as_ref(), &Device::Cpu).unwrap();
    let error = base.with_adapter(&files, &dir).err().unwrap().to_string();
    assert!(error.starts_with("the adapter's `lm_head.weight` is not its `model.embed"), "{error}");
}

/// Without `ensure_weight_tying` peft trains the embedding and the head independently.
#[test]
fn tied_base_is_untied_by_a_separately_trained_embedding_or_head() {
    let home = tempfile::tempdir().unwrap();
    let base = Checkpoint::load_dir(BASE.as_ref(), &Device::Cpu).unwrap();
    let old = &base.weights[EMBEDDING];
    let dir = home.path().join("embedding");
    let moved = adapter_of_peft(&dir, AdapterConfig::default(), Weights::new());
    let model = one_model(&dir);
    assert!(!model.config.is_tied());
    assert_eq!(numbers(&model.weights[EMBEDDING]), numbers(&moved));
    assert_eq!(numbers(&model.weights[HEAD]), numbers(old));

    let head = (old + random(9, old.shape()) * 0.02).unwrap();
    let dir = home.path().join("both");
    let both = Weights::from([(HEAD.to_owned(), head.clone())]);
    adapter_of_peft(&dir, AdapterConfig::default(), both);
    let model = one_model(&dir);
    assert_eq!(numbers(&model.weights[HEAD]), numbers(&head));
    assert_eq!(numbers(&model.weights[EMBEDDING]), numbers(&moved));
}

#[test]
fn reward_adapter_without_config_has_one_output_per_head_row() {
    let home = tempfile::tempdir().unwrap();
    let width = Checkpoint::load_dir(BASE.as_ref(), &Device::Cpu).unwrap().config.hidden_size;
    for (task, rows, labels) in [
        ("SEQ_CLS", 1, vec!["reward"]),
        ("SEQ_CLS", 3, vec!["LABEL_0", "LABEL_1", "LABEL_2"]),
        ("TOKEN_CLS", 2, vec!["wrong", "right"]),
    ] {
        let dir = home.path().join(format!("{task}-{rows}"));
        let task_type = Some(task.to_owned());
        let head = Weights::from([(SCORE.to_owned(), random(4, (rows, width)))]);
        let config = AdapterConfig { task_type, ..AdapterConfig::default() };
        adapter_of_peft(&dir, config, head.clone());
        let model = one_model(&dir);
        assert_eq!(model.config.labels, labels);
        assert_eq!(numbers(&model.weights[SCORE]), numbers(&head[SCORE]));
    }
}

/// peft adapts a head as well, and then saves the base's own weight beside the factors.
#[test]
fn an_adapter_of_the_head_is_refused_by_name_however_it_is_loaded() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("head");
    store::create_dir(&dir).unwrap();
    let base = Checkpoint::load_dir(BASE.as_ref(), &Device::Cpu).unwrap();
    let embedding = base.weights[EMBEDDING].clone();
    let (rows, width) = embedding.dims2().unwrap();
    let trained = Weights::from([
        (parameter("lm_head", A), random(1, (4, width))),
        (parameter("lm_head", B), random(2, (rows, 4))),
        ("lm_head.base_layer.weight".to_owned(), embedding),
    ]);
    let base_model_name_or_path = Some(lora::load::lasting_name(BASE).unwrap());
    let config = AdapterConfig { base_model_name_or_path, r: 4, ..AdapterConfig::default() };
    peft::write(&dir, &config, &trained, None).unwrap();
    assert!(peft::read(&dir, &Device::Cpu).unwrap().weights.is_empty());
    let (bases, name) = (Bases::default(), dir.to_str().unwrap());
    for error in [
        bases.model(name, &form()).err(),
        bases.base(name, &form()).err(),
        Checkpoint::load_dir(&dir, &Device::Cpu).err(),
    ] {
        let error = error.unwrap().to_string();
        let expected = "`lm_head`: the adapter has factors for it, expected only projections";
        assert!(error.contains(expected), "{error}");
    }
}

/// Merged weights have other last bits on another device, so they do not say which base it is.
#[test]
fn a_base_that_is_an_adapter_is_known_by_what_it_was_made_of() {
    let home = tempfile::tempdir().unwrap();
    let policy = adapter(home.path(), "policy", 1, (false, false));
    let name = policy.to_str().unwrap();
    let id = |form: &Form| Bases::default().base(name, form).unwrap().id.clone();
    let known = id(&form());
    let (merged, loaded) = Checkpoint::load_with_id(name, &Device::Cpu).unwrap();
    assert_eq!(loaded, known);
    let former = peft::fingerprint(&merged.weights).unwrap();
    assert_eq!(known.former.as_ref(), Some(&former));
    assert_ne!(known.fingerprint, former);
    assert_eq!(id(&Form { quantization: Quantization::Nf4, ..form() }), known);

    // An adapter of it, as it is recorded and as earlier versions did.
    let second = adapter(home.path(), "second", 2, (false, false));
    let config = AdapterConfig {
        base_model_name_or_path: Some(name.to_owned()),
        ..AdapterConfig::read(&second).unwrap()
    };
    let trained = peft::read(&second, &Device::Cpu).unwrap().into_trained();
    for recorded in [&known.fingerprint, &former] {
        peft::write(&second, &config, &trained, &BaseRecord::dense(recorded)).unwrap();
        one_model(&second);
    }
    // And on the model that its base was merged into.
    let both = BaseRecord { merged: known.former.clone(), ..BaseRecord::dense(&known.fingerprint) };
    peft::write(&second, &config, &trained, &both).unwrap();
    assert_eq!(peft::base(&second).unwrap(), Some(both));
    let dense = home.path().join("dense");
    merged.save(&dense, &crate::model::save::SaveOptions::new(DType::F32)).unwrap();
    let dense = Bases::default().base(dense.to_str().unwrap(), &form()).unwrap();
    peft::read(&second, &Device::Cpu).unwrap().check_base(&dense.id).unwrap();

    // Its own base may move, its factors may not.
    let copy = home.path().join("copy");
    let student = Checkpoint::load_dir(BASE.as_ref(), &Device::Cpu).unwrap();
    student.save(&copy, &crate::model::save::SaveOptions::new(DType::F32)).unwrap();
    let moved = AdapterConfig {
        base_model_name_or_path: Some(copy.display().to_string()),
        ..AdapterConfig::read(&policy).unwrap()
    };
    store::write_json(&policy.join(peft::CONFIG), &moved).unwrap();
    assert_eq!(id(&form()), known);
    let record = peft::base(&policy).unwrap();
    let mut trained = peft::read(&policy, &Device::Cpu).unwrap().into_trained();
    for (_, tensor) in trained.iter_mut().filter(|(name, _)| name.contains(B)) {
        *tensor = (&*tensor * 1.5).unwrap();
    }
    peft::write(&policy, &moved, &trained, record.as_ref()).unwrap();
    assert_ne!(id(&form()).fingerprint, known.fingerprint);
    let error = Checkpoint::load_dir(&second, &Device::Cpu).err().unwrap().to_string();
    assert!(error.contains("the adapter was trained on"), "{error}");
}
