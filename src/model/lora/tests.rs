//! Adapters: initialisation, merging, and rejection of unsupported ones.

use candle_core::{DType, Device, Tensor, Var};

use super::peft::{AdapterConfig, BaseRecord, fingerprint};
use super::*;
use crate::data::forest::Forest;
use crate::data::tree::{Role, Tree};
use crate::model::Gradients;
use crate::model::checkpoint::{Checkpoint, LoadOptions};
use crate::model::matrix::Matrix;
use crate::model::projection::Projection;
use crate::ops::linear::tests::{distance, random};

fn base() -> Checkpoint {
    Checkpoint::load("data/tiny/student", &Device::Cpu, &LoadOptions::default()).unwrap()
}

fn product(attached: &Attached, module: &str) -> Tensor {
    let factor = |part: &str| attached.factors[&parameter(module, part)].clone();
    (factor(B).matmul(&factor(A)).unwrap() * attached.scales[module]).unwrap()
}

#[test]
fn fresh_adapter_adds_nothing_and_initializes_a_like_pytorch() {
    let Checkpoint { config, mut weights, .. } = base();
    let lora = Lora { lora_r: 4, use_dora: true, ..Lora::default() };
    let attached = attach(&lora, &config, &mut weights, 5).unwrap();
    assert_eq!(attached.scales.len(), 7 * config.num_hidden_layers);
    for (module, scale) in &attached.scales {
        assert_eq!(scale.to_bits(), 8.0_f64.to_bits());
        let sum = product(&attached, module).abs().unwrap().sum_all().unwrap();
        assert_eq!(sum.to_scalar::<f32>().unwrap().to_bits(), 0);
        let a = &attached.factors[&parameter(module, A)];
        let bound = 1.0 / (a.dims()[1] as f32).sqrt();
        let largest = a.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(largest <= bound && largest > 0.9 * bound, "{module}: {largest}, {bound}");
        // DoRA starts from the rows' norms; with B = 0 its factors are 1.
        let magnitude = attached.factors[&parameter(module, MAGNITUDE)].to_vec1::<f32>().unwrap();
        let rows = weights[&format!("{module}.weight")].to_vec2::<f32>().unwrap();
        for (magnitude, row) in magnitude.iter().zip(rows) {
            let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
            assert!((magnitude - norm).abs() < 1e-5 * norm);
        }
    }
}

#[test]
fn pissa_takes_the_largest_singular_values_and_leaves_the_rest() {
    let Checkpoint { config, mut weights, .. } = base();
    let module = "model.layers.0.mlp.up_proj";
    let name = format!("{module}.weight");
    // A sum of outer products of known norms, 8, 4, 2, 1, plus noise.
    let (outer, inner) = weights[&name].dims2().unwrap();
    let unit = |seed, len| {
        let x = random(seed, len);
        let norm = x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        (x / f64::from(norm)).unwrap()
    };
    let mut known = (random(9, (outer, inner)) * 1e-4).unwrap();
    for (index, size) in [8.0, 4.0, 2.0, 1.0].into_iter().enumerate() {
        let (u, v) = (unit(40 + index as u64, outer), unit(50 + index as u64, inner));
        let product = u.unsqueeze(1).unwrap().matmul(&v.unsqueeze(0).unwrap()).unwrap();
        known = (known + (product * size).unwrap()).unwrap();
    }
    weights.insert(name.clone(), known.clone());
    let lora = Lora { lora_r: 4, init_lora_weights: Init::Pissa, ..Lora::default() };
    let attached = attach(&lora, &config, &mut weights, 5).unwrap();
    let taken = product(&attached, module);
    assert!(distance(&(&weights[&name] + &taken).unwrap(), &known) < 1e-6);
    // Only the noise remains.
    let left = weights[&name].sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    assert!(left < 1.1e-4 * ((outer * inner) as f32).sqrt(), "{left}");
    // Each factor carries the square root of each singular value.
    let squares = |part: &str, dim: usize| {
        let factor = &attached.factors[&parameter(module, part)];
        factor.sqr().unwrap().sum(dim).unwrap().to_vec1::<f32>().unwrap()
    };
    for (a, b) in squares(A, 1).iter().zip(squares(B, 0)) {
        assert!((a - b).abs() < 1e-4 * a, "{a} {b}");
    }
}

#[test]
fn lora_targets_are_all_projections_names_or_full_name_patterns() {
    let Checkpoint { config, .. } = base();
    let modules = |targets: &[&str]| {
        let targets = targets.iter().map(|target| (*target).to_owned()).collect();
        let lora = Lora { lora_target_modules: targets, ..Lora::default() };
        (lora.modules(&config).unwrap(), lora.target_modules(&config).unwrap())
    };
    let of = |layers: &[usize], parts: &[&str]| -> Vec<String> {
        let names = |layer| parts.iter().map(move |part| format!("model.layers.{layer}.{part}"));
        layers.iter().flat_map(names).collect()
    };
    let (q, v) = ("self_attn.q_proj", "self_attn.v_proj");
    assert_eq!(modules(&["all-linear"]).0.len(), 7 * config.num_hidden_layers);
    let named = of(&[0, 1, 2, 3], &[q, v]);
    assert_eq!(modules(&["q_proj", "v_proj"]), (named.clone(), named.into()));
    assert_eq!(modules(&["layers.2.self_attn.q_proj"]).0, of(&[2], &[q]));
    let pattern = r".*layers\.(0|1)\..*q_proj";
    assert_eq!(modules(&[pattern]), (of(&[0, 1], &[q]), pattern.into()));
    // peft does not support patterns beside names, so both become names.
    let both = of(&[0, 1], &[q]).into_iter().chain(of(&[3], &["mlp.up_proj"])).collect::<Vec<_>>();
    assert_eq!(modules(&[pattern, "layers.3.mlp.up_proj"]), (both.clone(), both.into()));
}

/// The tiny student's head is its embedding.
#[test]
fn modules_to_save_must_exist_in_the_model() {
    let Checkpoint { config, .. } = base();
    let check = |saved: &str| {
        let lora = Lora { lora_modules_to_save: vec![saved.to_owned()], ..Lora::default() };
        lora.modules(&config).map(|_| ())
    };
    for saved in ["embed_tokens", "norm", "model.norm", "layers.1.input_layernorm"] {
        check(saved).unwrap();
    }
    let refused = |saved: &str| {
        let error = check(saved).unwrap_err();
        (error.to_string(), error.hint_text().unwrap_or_default().to_owned())
    };
    let (error, hint) = refused("norms");
    assert_eq!(error, "`lora_modules_to_save` has `norms`, which the model does not have");
    assert_eq!(hint, "did you mean `norm`?");
    if config.tie_word_embeddings {
        assert_eq!(refused("lm_head").1, "its head is the embedding: name embed_tokens");
    }
}

/// peft matches every module that ends with a name: `norm` would include each `input_layernorm`.
#[test]
fn modules_to_save_are_stored_with_full_names() {
    let Checkpoint { config, .. } = base();
    let saved = |names: &[&str]| {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        Lora { lora_modules_to_save: names, ..Lora::default() }.saved_modules(&config)
    };
    assert_eq!(saved(&[]), [""; 0]);
    assert_eq!(saved(&["norm", "embed_tokens"]), ["model.embed_tokens", "model.norm"]);
    let downs = [0, 1, 2, 3].map(|layer| format!("model.layers.{layer}.mlp.down_proj"));
    assert_eq!(saved(&["down_proj", "layers.2.mlp.down_proj"]), downs);
}

/// If the method changed the base, the factors alone do not represent the trained model.
#[test]
fn init_methods_that_changed_the_base_are_refused_on_load() {
    let home = tempfile::tempdir().unwrap();
    let read = |value: &str| {
        let config = format!(r#"{{"peft_type": "LORA", "r": 8, "init_lora_weights": {value}}}"#);
        crate::store::write_atomic(&home.path().join(peft::CONFIG), config.as_bytes()).unwrap();
        peft::AdapterConfig::read(home.path())
    };
    let named = ["\"gaussian\"", "\"eva\"", "\"mica\"", "\"orthogonal\""];
    for value in ["true", "false", "null"].into_iter().chain(named) {
        read(value).unwrap();
    }
    for value in ["\"pissa\"", "\"olora\"", "\"loftq\"", "\"corda\"", "\"pissa_niter_4\"", "3"] {
        let error = read(value).unwrap_err().to_string();
        assert!(error.contains("`init_lora_weights` is "), "{error}");
    }
}

/// The first has norm six along one direction, the second two along another: the best rank-1 approximation of the sum
/// is the first.
#[test]
fn adapter_sum_is_exact_when_joined_and_nearest_at_a_given_rank() {
    let (inner, outer, module) = (6, 5, "model.layers.0.self_attn.q_proj");
    let unit = |at: usize, len: usize, size: f32| -> Vec<f32> {
        (0..len).map(|i| if i == at { size } else { 0.0 }).collect()
    };
    let saved = |at: usize, (rank, scale): (usize, f64), size: f32| {
        let mut a = unit(at, inner, size);
        a.resize(rank * inner, 0.0);
        let a = Tensor::from_vec(a, (rank, inner), &Device::Cpu).unwrap();
        let mut b = vec![0.0; outer * rank];
        b[at * rank] = 1.0;
        let b = Tensor::from_vec(b, (outer, rank), &Device::Cpu).unwrap();
        let adapter = Adapter { module: module.to_owned(), a, b, scale, dora: None };
        let adapters = Adapters::from([(module.to_owned(), adapter)]);
        let config = AdapterConfig { r: rank, use_rslora: true, ..AdapterConfig::default() };
        peft::Saved { config, adapters, weights: Weights::new(), base: None }
    };
    let two = [("a", saved(1, (2, 3.0), 4.0)), ("b", saved(3, (1, 0.5), 8.0))];
    let product = |saved: &peft::Saved| {
        assert!(!saved.config.use_rslora);
        let adapter = &saved.adapters[module];
        let scale = saved.config.scale(module).unwrap();
        (adapter.b.matmul(&adapter.a).unwrap() * scale).unwrap().to_vec2::<f32>().unwrap()
    };
    let expected = |first: f32, second: f32| {
        let mut rows = vec![vec![0.0; inner]; outer];
        (rows[1][1], rows[3][3]) = (first, second);
        rows
    };
    // 0.5 · 3 · 4 and 0.5 · 0.5 · 8.
    let joined = sum(&two, &[0.5, 0.5], None).unwrap();
    assert_eq!((joined.config.r, product(&joined)), (3, expected(6.0, 2.0)));
    // Whatever the first one's targets were narrowed by.
    assert_eq!(joined.config.target_modules, serde_json::json!([module]));
    let nearest = sum(&two, &[0.5, 0.5], Some(1)).unwrap();
    assert_eq!(nearest.config.r, 1);
    for (found, expected) in product(&nearest).iter().flatten().zip(expected(6.0, 0.0).concat()) {
        assert!((found - expected).abs() < 1e-5, "{found} {expected}");
    }
    let [(_, first), (_, mut other)] = two;
    other.adapters = other.adapters.into_values().map(|one| ("k_proj".to_owned(), one)).collect();
    let error = sum(&[("a", first), ("b", other)], &[0.5, 0.5], None).unwrap_err().to_string();
    assert!(error.starts_with("b: adapts other modules"), "{error}");
}

/// The hand-written form matches the graph of ops with the same dropped elements.
#[test]
fn dropout_gradients_match_the_graph_of_ops() {
    let (tokens, inner, outer) = (23, 40, 24);
    let tree = Tree::sequence(vec![5; tokens], vec![Role::Content; tokens], 4);
    let forest = Forest::pack(&[tree]).unwrap();
    let masks = Dropout { rate: 0.3, seed: 1, step: 2 }.over(&forest);
    let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let close = |found: &[f32], expected: &Tensor, what: &str| {
        let expected = numbers(expected);
        assert_eq!(found.len(), expected.len(), "{what}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (found - expected).abs() < 1e-4 * expected.abs().max(1.0),
                "{what}: {found} {expected}"
            );
        }
    };
    for is_dora in [false, true] {
        let weight = Matrix::Dense(random(1, (outer, inner)));
        let [x, a, b] = [(2, (tokens, inner)), (3, (5, inner)), (4, (outer, 5))]
            .map(|(seed, shape)| Var::from_tensor(&random(seed, shape)).unwrap());
        let magnitude = (random(5, outer).abs().unwrap() + 0.5).unwrap();
        let magnitude = Var::from_tensor(&magnitude).unwrap();
        let dora = is_dora.then(|| Dora {
            magnitude: magnitude.as_tensor().clone(),
            squares: weight.row_squares().unwrap(),
        });
        let (module, factors) = ("m".to_owned(), [&a, &b].map(|x| x.as_tensor().clone()));
        let [factor_a, factor_b] = factors;
        let adapter = Adapter { module, a: factor_a, b: factor_b, scale: 0.7, dora };
        let (name, bias) = ("m.weight".to_owned(), None);
        let projection = Projection { name, weight, bias, adapter: Some(adapter) };
        let d_y = random(6, (tokens, outer));

        let y = projection.forward(&x, Some(&masks), DType::F32).unwrap();
        let expected = (&y * &d_y).unwrap().sum_all().unwrap().backward().unwrap();
        let rows = numbers(&x);
        let by_hand = projection.apply::<f32>(&rows, Some(&masks)).unwrap();
        close(&by_hand, &y, "output");
        let undropped = projection.apply::<f32>(&rows, None).unwrap();
        assert!(by_hand.iter().zip(undropped).any(|(a, b)| (a - b).abs() > 0.1));

        let (mut d_x, mut grads) = (Vec::new(), Gradients::new(&Device::Cpu));
        let of = (rows.as_slice(), Some(&masks));
        projection.backward::<f32>(of, &numbers(&d_y), &mut d_x, &mut grads).unwrap();
        close(&d_x, expected.get(&x).unwrap(), "input");
        let trained = [(A, &a), (B, &b), (MAGNITUDE, &magnitude)];
        for (part, var) in &trained[..if is_dora { 3 } else { 2 }] {
            let found = numbers(grads.get(&parameter("m", part)).unwrap());
            close(&found, expected.get(var).unwrap(), part);
        }
    }
}

/// Not a multiple of a task's outputs, and more tokens than a task of any other op.
#[test]
fn dora_gradients_are_bitwise_equal_on_any_number_of_threads() {
    let (tokens, inner, outer) = (301, 48, 200);
    let weight = Matrix::Dense(random(1, (outer, inner)));
    let magnitude = (random(2, outer).abs().unwrap() + 0.5).unwrap();
    let dora = Some(Dora { magnitude, squares: weight.row_squares().unwrap() });
    let (a, b) = (random(3, (5, inner)), random(4, (outer, 5)));
    let adapter = Adapter { module: "m".to_owned(), a, b, scale: 0.7, dora };
    let numbers = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (x, d_y) = (numbers(random(5, (tokens, inner))), numbers(random(6, (tokens, outer))));
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut grads = Gradients::new(&Device::Cpu);
            let of = (x.as_slice(), None, &weight);
            let through = adapter.through_magnitude(of, &d_y, &mut grads).unwrap().unwrap();
            let mut y = numbers(random(7, (tokens, outer)));
            adapter.forward((x.as_slice(), None), &mut y, &weight).unwrap();
            let d = numbers(grads.get(&parameter("m", MAGNITUDE)).unwrap().clone());
            [through, y, d].map(|x| x.into_iter().map(f32::to_bits).collect::<Vec<_>>())
        })
    };
    let one = run(1);
    for threads in [2, 3, 7] {
        assert_eq!(run(threads), one, "{threads} threads");
    }
    // The magnitude's gradient in f64, from `y = x·(W + s·B·A)ᵀ` over its row norms.
    let f64 = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
    let merged = {
        let delta = f64(&adapter.b).matmul(&f64(&adapter.a)).unwrap();
        (f64(&weight.tensor(&Device::Cpu, DType::F32).unwrap()) + (delta * 0.7).unwrap()).unwrap()
    };
    let norms = merged.sqr().unwrap().sum(1).unwrap().sqrt().unwrap();
    let y = f64(&random(5, (tokens, inner))).matmul(&merged.t().unwrap()).unwrap();
    let d = (y * f64(&random(6, (tokens, outer)))).unwrap().sum(0).unwrap();
    let expected = (d / norms).unwrap().to_vec1::<f64>().unwrap();
    for (bits, expected) in one[2].iter().zip(expected) {
        let found = f64::from(f32::from_bits(*bits));
        assert!((found - expected).abs() < 1e-4 * expected.abs().max(1.0), "{found} {expected}");
    }
}

#[test]
fn invalid_adaptations_are_refused_with_a_hint() {
    let Checkpoint { config, mut weights, .. } = base();
    let refused = |lora: Lora| {
        lora.check().and_then(|()| attach(&lora, &config, &mut weights.clone(), 1)).unwrap_err()
    };
    let on = Lora { use_peft: true, ..Lora::default() };
    let error = refused(Lora { lora_r: 4096, ..on.clone() });
    assert!(error.to_string().starts_with("`lora_r` is 4096, `model.layers.0."), "{error}");
    let error = refused(Lora { lora_target_modules: vec!["qproj".to_owned()], ..on.clone() });
    assert_eq!(error.hint_text(), Some("did you mean `q_proj`?"));
    let targets =
        |target: &str| Lora { lora_target_modules: vec![target.to_owned()], ..on.clone() };
    let error = refused(targets(r"layers\.9\..*"));
    assert!(
        error.to_string().ends_with(r"`layers\.9\..*`, which matches no projection"),
        "{error}"
    );
    assert!(error.hint_text().unwrap().contains("model.layers.0.self_attn.q_proj"));
    let error = refused(targets("(q_proj"));
    assert!(error.to_string().starts_with("`lora_target_modules` has `(q_proj`: "), "{error}");
    let error = refused(Lora { lora_target_modules: Vec::new(), ..on.clone() });
    assert!(error.to_string().contains("`lora_target_modules` is empty"), "{error}");
    let saved = |module: &str| vec![module.to_owned()];
    let error = refused(Lora { lora_modules_to_save: saved("mlp.up_proj"), ..on.clone() });
    assert_eq!(
        error.to_string(),
        "`lora_modules_to_save` has `mlp.up_proj`, and `lora_target_modules` adapts `model.layers.0.mlp.up_proj`"
    );
    assert!(error.hint_text().unwrap().contains("name the others in lora_target_modules"));
    let error = refused(Lora { lora_dropout: 1.0, ..on.clone() });
    assert!(error.to_string().contains("`lora_dropout` is 1"), "{error}");
    let both = Lora { init_lora_weights: Init::Pissa, use_dora: true, ..on.clone() };
    assert!(refused(both).to_string().contains("`use_dora` with `init_lora_weights` pissa"));
    let pissa = Lora { init_lora_weights: Init::Pissa, ..on.clone() };
    pissa.check_saved_as(Precision::F32).unwrap();
    let error = pissa.check_saved_as(Precision::Bf16).unwrap_err().to_string();
    assert_eq!(error, "`save_dtype` is bf16 with `init_lora_weights` pissa");
    let packed = Lora { quantization: Quantization::Nf4, ..Lora::default() };
    assert!(refused(packed).hint_text().unwrap().contains("use_peft"));

    // Another base: by its values, and by its shapes.
    let attached = attach(&on, &config, &mut weights, 1).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let save = |base: &str| {
        let config = AdapterConfig { r: on.lora_r, ..AdapterConfig::default() };
        let base = BaseRecord::dense(base);
        peft::write(dir.path(), &config, &attached.factors, &base).unwrap();
        peft::read(dir.path(), &Device::Cpu).unwrap()
    };
    let saved = save(&fingerprint(&weights).unwrap());
    assert!(base().with_adapter(&saved, dir.path()).is_ok());
    let mut other = base();
    let norm = other.weights.get_mut(params::FINAL_NORM).unwrap();
    *norm = (&*norm + 1e-3).unwrap();
    let error = other.with_adapter(&saved, dir.path()).err().unwrap();
    assert!(error.to_string().contains("trained on"), "{error}");
    let mut narrow = base();
    let name = "model.layers.0.mlp.up_proj.weight";
    narrow.weights.insert(name.to_owned(), random(1, (8, 8)));
    let saved = save(&fingerprint(&narrow.weights).unwrap());
    let error = narrow.with_adapter(&saved, dir.path()).err().unwrap();
    assert!(error.to_string().contains("for a projection [8, 8]"), "{error}");
}

#[test]
fn rank_and_alpha_patterns_match_peft() {
    let config: AdapterConfig = serde_json::from_str(
        r#"{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 2, "mlp\\..*": 32}}"#,
    )
    .unwrap();
    let expected = [
        ("model.layers.0.self_attn.v_proj", 2.0_f64),
        ("model.layers.0.self_attn.q_proj", 4.0),
        ("model.layers.1.self_attn.q_proj", 0.5),
        ("model.layers.1.mlp.up_proj", 4.0),
    ];
    for (module, expected) in expected {
        assert_eq!(config.scale(module).unwrap().to_bits(), expected.to_bits(), "{module}");
    }
}

/// Applied to all of a text it would say something else than in peft.
#[test]
#[expect(clippy::disallowed_methods, reason = "the file of another program")]
fn adapter_with_invocation_tokens_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter_config.json");
    for (tokens, refused) in [("null", false), ("[5, 7]", true)] {
        let text = format!(
            r#"{{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "alora_invocation_tokens": {tokens}}}"#
        );
        std::fs::write(&path, text).unwrap();
        let read = AdapterConfig::read(dir.path());
        assert_eq!(read.is_err(), refused);
        if let Err(error) = read {
            assert!(error.to_string().contains("`alora_invocation_tokens` is set"), "{error}");
        }
    }
}

/// Each makes something else of the factors, or has tensors of its own.
#[test]
fn settings_of_peft_that_change_what_factors_mean_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let read = |key: &str, value: &str| {
        let text = format!(r#"{{"peft_type": "LORA", "r": 8, "{key}": {value}}}"#);
        crate::store::write_atomic(&dir.path().join(peft::CONFIG), text.as_bytes()).unwrap();
        AdapterConfig::read(dir.path())
    };
    for (key, value) in [
        ("kasa_config", r#"{"beta": 1e-4, "gamma": 1e-3}"#),
        ("layer_replication", "[[0, 2], [1, 3]]"),
        ("lora_bias", "true"),
        ("target_parameters", r#"["q_proj.weight"]"#),
        ("trainable_token_indices", "[5, 7]"),
        ("use_qalora", "true"),
    ] {
        read(key, "null").unwrap();
        let error = read(key, value).unwrap_err().to_string();
        assert!(error.contains(&format!("`{key}` is set: ")), "{error}");
    }
    read("lora_bias", "false").unwrap();
}

/// Elsewhere than in a block an adapter would be merged by some programs and dropped by others.
#[test]
fn adapters_of_other_modules_than_projections_are_refused_by_name() {
    let Checkpoint { mut weights, .. } = base();
    let (rows, width) = weights[params::EMBEDDING].dims2().unwrap();
    let refused = |weights: &Weights, module: &str| {
        let (a, b) = (random(1, (4, width)), random(2, (rows, 4)));
        let adapter = Adapter { module: module.to_owned(), a, b, scale: 1.0, dora: None };
        let adapters = Adapters::from([(module.to_owned(), adapter)]);
        check_fit(&Tensors::dense(weights.clone()), &adapters).unwrap_err().to_string()
    };
    let expected = |module: &str| {
        format!(
            "`{module}`: the adapter has factors for it, expected only projections of blocks: q_proj, "
        )
    };
    weights.remove(params::HEAD);
    for module in ["lm_head", "model.embed_tokens"] {
        let error = refused(&weights, module);
        assert!(error.starts_with(&expected(module)), "{error}");
    }
    weights.insert(params::HEAD.to_owned(), weights[params::EMBEDDING].clone());
    let error = refused(&weights, "lm_head");
    assert!(error.starts_with(&expected("lm_head")), "{error}");
    let error = refused(&weights, "model.layers.99.mlp.up_proj");
    assert!(error.ends_with("the base model has no such projection"), "{error}");
}

/// The scale is `lora_alpha` over the rank: with another one the adapter would be another.
#[test]
fn factors_of_another_rank_than_the_configurations_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let module = "model.layers.0.self_attn.q_proj";
    let factors = Weights::from([
        (parameter(module, A), random(1, (4, 6))),
        (parameter(module, B), random(2, (5, 4))),
    ]);
    let read = |r: usize, patterns: &[(&str, usize)]| {
        let named = patterns.iter().map(|(pattern, rank)| ((*pattern).to_owned(), *rank));
        let config = AdapterConfig { r, rank_pattern: named.collect(), ..AdapterConfig::default() };
        peft::write(dir.path(), &config, &factors, None).unwrap();
        peft::read(dir.path(), &Device::Cpu)
    };
    read(4, &[]).unwrap();
    read(8, &[("q_proj", 4)]).unwrap();
    // In peft the first pattern that matches counts.
    read(8, &[("self_attn.q_proj", 4), ("q_proj", 2)]).unwrap();
    let expected = format!("`{module}`: factors of rank 4, expected 8 by adapter_config.json");
    for read in [read(8, &[]), read(4, &[("q_proj", 8)])] {
        let error = read.unwrap_err().to_string();
        assert!(error.ends_with(&expected), "{error}");
    }
}
