//! What must not change a step: recomputation, the memory budget, threads, an optimizer in the backward pass. And what
//! bf16 may change, and may not.
#![expect(clippy::unwrap_used, reason = "a test program; a failure here is a failed test")]

use std::collections::BTreeMap;

use arriero::data::forest::Forest;
use arriero::data::tree::{Role, Tree};
use arriero::loss::Readout;
use arriero::loss::sft::Sft;
use arriero::model::checkpoint::Checkpoint;
use arriero::model::{Precision, Transformer};
use arriero::optim::adamw::AdamW;
use arriero::train::memory::Footprint;
use arriero::train::step::{self, StepOptions};
use arriero::train::update::{Pace, update};
use arriero::train::{Learner, Recompute, Settings};
use candle_core::{DType, Device, Tensor, Var};

const PACE: Pace = Pace { lr: 1e-3, max_grad_norm: 0.0 };

fn start() -> Checkpoint {
    checkpoint("model_untied")
}

fn checkpoint(fixture: &str) -> Checkpoint {
    let dir = std::path::Path::new("tests/fixtures/goldens").join(fixture);
    Checkpoint::load_dir(&dir, &Device::Cpu).unwrap()
}

fn learner(precision: Precision) -> Learner {
    let start = start();
    Learner::with(&start.config, start.weights, precision, |_| false).unwrap()
}

/// Conversations and trees, of an odd number of tokens in all.
fn trees() -> Vec<Tree> {
    let tokens = |len: usize, step: usize| -> Vec<u32> {
        (0..len).map(|i| 3 + (i * step % 500) as u32).collect()
    };
    let content = |len, step| (tokens(len, step), vec![Role::Content; len]);
    vec![
        Tree::sequence(tokens(31, 7), vec![Role::Content; 31], 0),
        Tree::siblings(tokens(12, 11), vec![content(5, 13), content(70, 17)], 1),
        Tree::sequence(tokens(9, 29), vec![Role::Content; 9], 2),
    ]
}

fn options(precision: Precision) -> StepOptions {
    StepOptions { dtype: precision, ..StepOptions::new(1 << 20) }
}

fn bits_of(tensor: &Tensor) -> Vec<u32> {
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

fn bits(learner: &Learner) -> BTreeMap<String, Vec<u32>> {
    learner.weights().iter().map(|(name, tensor)| (name.clone(), bits_of(tensor))).collect()
}

/// Weights after three steps.
fn three_steps(options: StepOptions) -> BTreeMap<String, Vec<u32>> {
    let (learner, trees) = (learner(options.dtype), trees());
    let trees: Vec<&Tree> = trees.iter().collect();
    let mut adamw = AdamW::new(Settings::default().hyper());
    for _ in 0..3 {
        update(&learner, (&Sft::default(), &trees), options, &mut adamw, PACE).unwrap();
    }
    assert_eq!(adamw.steps(), 3);
    bits(&learner)
}

fn with_threads<R: Send>(count: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(count).build().unwrap().install(work)
}

#[test]
fn weights_are_bitwise_equal_in_every_step_mode() {
    for precision in [Precision::F32, Precision::Bf16] {
        let plain = options(precision);
        let expected = with_threads(2, || three_steps(plain));
        let config = start().config;
        // Just too little for all blocks, and a block that runs again needs as much as one that is kept.
        let budget = Footprint::new(&config, &plain, 127).bytes(config.num_hidden_layers) - 1;
        let auto = StepOptions { recompute: Recompute::Auto, budget, ..plain };
        assert_eq!(auto.keep(&config, 127), config.num_hidden_layers - 2);
        let modes = [
            StepOptions { recompute: Recompute::Block, ..plain },
            auto,
            StepOptions { optimizer_in_backward: true, ..plain },
            StepOptions { optimizer_in_backward: true, recompute: Recompute::Block, ..plain },
        ];
        assert!(with_threads(1, || three_steps(plain)) == expected, "{precision:?}, one thread");
        for mode in modes {
            assert!(three_steps(mode) == expected, "{mode:?}");
        }
    }
}

#[test]
fn rounding_by_chance_is_the_same_in_every_step_mode() {
    let settings =
        Settings { stochastic_rounding: true, dtype: Precision::Bf16, ..Settings::default() };
    let trees = trees();
    let trees: Vec<&Tree> = trees.iter().collect();
    // One weight is embedding and head: in the backward pass it moves last, elsewhere in its name's turn.
    for fixture in ["model_untied", "model_tied"] {
        let start = checkpoint(fixture);
        let run = |options: StepOptions, seed: u64| {
            let weights = start.weights.clone();
            let learner =
                Learner::with(&start.config, weights, Precision::Bf16, |_| false).unwrap();
            let mut adamw = settings.optimizer(seed);
            for _ in 0..3 {
                update(&learner, (&Sft::default(), &trees), options, &mut adamw, PACE).unwrap();
            }
            let copies = learner.params().values().filter_map(|param| param.copy.as_ref());
            let wide = |copy: &Var| bits_of(&copy.to_dtype(DType::F32).unwrap());
            (bits(&learner), copies.map(wide).collect::<Vec<_>>())
        };
        let plain = options(Precision::Bf16);
        let expected = with_threads(2, || run(plain, 1));
        assert!(with_threads(1, || run(plain, 1)) == expected, "{fixture}, one thread");
        for mode in [
            StepOptions { optimizer_in_backward: true, ..plain },
            StepOptions { recompute: Recompute::Block, ..plain },
        ] {
            assert!(run(mode, 1) == expected, "{fixture}, {mode:?}");
        }
        assert!(run(plain, 2) != expected, "{fixture}: another seed rounds alike");
    }
}

#[test]
fn optimizer_in_backward_refuses_several_micro_batches_before_moving() {
    let (learner, trees) = (learner(Precision::F32), trees());
    let trees: Vec<&Tree> = trees.iter().collect();
    let options = StepOptions { optimizer_in_backward: true, ..StepOptions::new(40) };
    let mut adamw = AdamW::new(Settings::default().hyper());
    let before = bits(&learner);
    let error = update(&learner, (&Sft::default(), &trees), options, &mut adamw, PACE).unwrap_err();
    assert!(error.to_string().contains("`max_tokens_per_micro_batch` 40"), "{error}");
    assert!(bits(&learner) == before && adamw.steps() == 0);
    let settings = Settings { optimizer_in_backward: true, ..Settings::default() };
    let error = settings.check().unwrap_err();
    assert!(error.to_string().starts_with("`optimizer_in_backward` with `max_grad_norm` 1"));
    Settings { max_grad_norm: 0.0, ..settings }.check().unwrap();
}

fn norm(tensor: &Tensor) -> f64 {
    let tensor = tensor.to_dtype(DType::F64).unwrap();
    tensor.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
}

#[test]
fn bf16_gradients_match_f32_up_to_rounding() {
    let trees = trees();
    let trees: Vec<&Tree> = trees.iter().collect();
    let gradients = |precision| {
        step::gradients(&learner(precision), &Sft::default(), &trees, options(precision)).unwrap()
    };
    let (exact, exact_report) = gradients(Precision::F32);
    let (rounded, report) = gradients(Precision::Bf16);
    let off = (report.loss - exact_report.loss).abs() / exact_report.loss;
    assert!(off > 0.0 && off < 1e-2, "{} {}", report.loss, exact_report.loss);
    for (name, grad) in exact.iter() {
        let other = rounded.get(name).unwrap();
        assert_eq!(other.dtype(), DType::F32, "{name}");
        let distance = norm(&(grad - other).unwrap()) / norm(grad);
        assert!(distance > 0.0 && distance < 0.05, "{name}: {distance}");
    }
}

#[test]
fn master_weights_move_and_their_copies_follow() {
    let (learner, trees) = (learner(Precision::Bf16), trees());
    let trees: Vec<&Tree> = trees.iter().collect();
    let mut adamw = AdamW::new(Settings::default().hyper());
    let before = bits(&learner);
    let pace = Pace { lr: 1e-6, max_grad_norm: 1.0 };
    update(&learner, (&Sft::default(), &trees), options(Precision::Bf16), &mut adamw, pace)
        .unwrap();
    for (name, param) in learner.params() {
        let master = param.master.as_tensor();
        assert_eq!(master.dtype(), DType::F32);
        assert_eq!(param.copy.is_some(), master.rank() == 2, "{name}");
        let Some(copy) = &param.copy else { continue };
        let expected = master.to_dtype(DType::BF16).unwrap();
        let differ = expected.ne(copy.as_tensor()).unwrap().to_dtype(DType::F32).unwrap();
        let differ = differ.sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(differ.abs() < 0.5, "{name}: {differ} of the copy are not the master's");
    }
    // A step far below bf16's resolution moves the masters all the same.
    assert!(bits(&learner).iter().all(|(name, after)| before[name] != *after));
}

#[test]
fn bf16_reference_equals_the_policy_started_from_it_bitwise() {
    let forest = Forest::pack(&trees()).unwrap();
    let start = start().computed_in(Precision::Bf16).unwrap();
    let reference = Transformer::new(&start.config, &start.weights).unwrap();
    let of_reference = step::read(&reference, Readout::Logps, &forest).unwrap();
    let of_policy = step::read(learner(Precision::Bf16).model(), Readout::Logps, &forest).unwrap();
    assert!(of_reference == of_policy && of_policy.len() > 100);
}
