//! Masters in host memory are updated to the same bits, and the compute copies follow them.

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::*;
use crate::data::forest::Forest;
use crate::data::tree::Role;
use crate::loss::sft::Sft;
use crate::loss::{FixedGradient, Reading, StepTotals, Weighed};
use crate::model::checkpoint::Checkpoint;
use crate::model::lora::{Lora, attach};
use crate::model::{Precision, Tensors, Weights};
use crate::ops::linear::tests::random;
use crate::optim::Param;
use crate::train::checkpoint::{Saved, State};
use crate::train::{Ema, Held, Settings};

fn learner(dtype: Precision, offloaded: bool) -> Learner {
    let dir = Path::new("tests/fixtures/goldens/model_untied");
    let start = Checkpoint::load_dir(dir, &Device::Cpu).unwrap();
    Learner::with(&start.config, start.weights, Held { dtype, offloaded }, |_| false).unwrap()
}

fn trees() -> Vec<Tree> {
    let tokens = |len: usize, step: usize| (0..len).map(|i| 3 + (i * step % 500) as u32).collect();
    let tree = |len, step, row| Tree::sequence(tokens(len, step), vec![Role::Content; len], row);
    vec![tree(31, 7, 0), tree(45, 11, 1), tree(9, 29, 2)]
}

fn settings() -> Settings {
    Settings { weight_decay: 0.1, ema_decay: 0.9, ..Settings::default() }
}

/// Takes steps; returns their measurements.
fn steps(learner: &Learner, adamw: &mut AdamW, in_backward: bool, count: usize) -> Vec<[u64; 2]> {
    let trees = trees();
    let trees: Vec<&Tree> = trees.iter().collect();
    let rounds = learner.params().values().any(|p| p.computed().dtype() == DType::BF16);
    let dtype = if rounds { Precision::Bf16 } else { Precision::F32 };
    let options =
        StepOptions { dtype, optimizer_in_backward: in_backward, ..StepOptions::new(1 << 20) };
    // A norm that causes clipping.
    let pace = Pace { lr: 1e-3, max_grad_norm: if in_backward { 0.0 } else { 0.1 } };
    let mut step = || {
        let (report, norm) =
            update(learner, (&Sft::default(), &trees), options, adamw, pace).unwrap();
        [report.loss.to_bits(), norm.to_bits()]
    };
    (0..count).map(|_| step()).collect()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let tensor = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    tensor.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn all_bits(weights: &Weights) -> Vec<Vec<u32>> {
    weights.values().map(bits).collect()
}

#[test]
fn masters_in_host_memory_are_updated_to_the_same_bits() {
    for dtype in [Precision::F32, Precision::Bf16] {
        for in_backward in [false, true] {
            let [home, away] = [false, true].map(|offloaded| {
                let learner = learner(dtype, offloaded);
                assert_eq!(learner.is_offloaded(), offloaded);
                let mut adamw = AdamW::new(settings().hyper());
                let measured = steps(&learner, &mut adamw, in_backward, 3);
                for (name, param) in learner.params() {
                    // The compute copy is the rounded master.
                    let rounded = param.master.to_dtype(param.computed().dtype()).unwrap();
                    assert_eq!(bits(&rounded), bits(param.computed()), "{name}");
                }
                (measured, all_bits(&learner.weights()), all_bits(&adamw.export()))
            });
            assert!(home == away, "{dtype:?}, in the backward pass: {in_backward}");
        }
    }
}

/// Stochastic rounding of the copies too, which affects the next step's gradients.
#[test]
fn rounding_by_chance_is_the_same_wherever_masters_are() {
    let settings = Settings { stochastic_rounding: true, dtype: Precision::Bf16, ..settings() };
    for in_backward in [false, true] {
        let [home, away] = [false, true].map(|offloaded| {
            let learner = learner(Precision::Bf16, offloaded);
            let mut adamw = settings.optimizer(5);
            let measured = steps(&learner, &mut adamw, in_backward, 3);
            let copies: Vec<_> = learner.params().values().map(|p| bits(p.computed())).collect();
            let to_nearest = |param: &Param| bits(&param.master.to_dtype(DType::BF16).unwrap());
            assert!(copies != learner.params().values().map(to_nearest).collect::<Vec<_>>());
            (measured, copies, all_bits(&learner.weights()), all_bits(&adamw.export()))
        });
        assert!(home == away, "in the backward pass: {in_backward}");
    }
}

/// Factors have bf16 copies if the model computes in bf16; DoRA's magnitudes do not.
#[test]
fn factors_of_adapters_are_rounded_by_chance() {
    let dir = Path::new("tests/fixtures/goldens/model_untied");
    let mut start = Checkpoint::load_dir(dir, &Device::Cpu).unwrap();
    let lora = Lora { lora_r: 4, use_dora: true, ..Lora::default() };
    let attached = attach(&lora, &start.config, &mut start.weights, 3).unwrap();
    let learner = Learner::adapted(
        &start.config,
        Tensors::dense(start.weights),
        &attached,
        Precision::Bf16,
        |_| false,
    )
    .unwrap();
    assert!(learner.rounds());
    let settings = Settings { stochastic_rounding: true, dtype: Precision::Bf16, ..settings() };
    steps(&learner, &mut settings.optimizer(5), false, 2);
    let mut rounded = 0;
    for (name, param) in learner.params() {
        let Some(copy) = &param.copy else { continue };
        let (copy, master) = (bits(copy), bits(&param.master));
        for (copy, master) in copy.into_iter().zip(master) {
            // One of the two neighbours.
            assert!(copy == master & 0xffff_0000 || copy == (master & 0xffff_0000) + 0x1_0000);
        }
        rounded += usize::from(name.contains("lora_"));
    }
    assert_eq!(rounded, 2 * attached.scales.len());
}

/// The average follows, and a run resumes from a checkpoint, wherever the masters are.
#[test]
fn averages_and_checkpoints_are_the_same_wherever_masters_are() {
    let run = |offloaded: [bool; 2], stochastic_rounding: bool| {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { stochastic_rounding, dtype: Precision::Bf16, ..settings() };
        let first = learner(Precision::Bf16, offloaded[0]);
        let mut adamw = settings.optimizer(5);
        let ema = Ema::new(&first, &settings).unwrap();
        steps(&first, &mut adamw, false, 2);
        ema.as_ref().unwrap().update(&first).unwrap();
        let state = State { step: 2, ..State::default() };
        let config = first.model().config().clone();
        let save = |learner: &Learner, dir: &Path| {
            let weights = learner.weights();
            let saved = Checkpoint { config: config.clone(), weights, tokenizer: None };
            saved.write_into(dir, &crate::model::save::SaveOptions::new(DType::F32))
        };
        Saved::write(dir.path(), (&first, ema.as_ref()), &adamw, &state, &save).unwrap();

        let second = learner(Precision::Bf16, offloaded[1]);
        let mut adamw = settings.optimizer(5);
        let ema = Ema::new(&second, &settings).unwrap();
        let saved = Saved::newest(dir.path()).unwrap().unwrap();
        saved.load((&second, ema.as_ref()), &mut adamw).unwrap();
        let measured = steps(&second, &mut adamw, false, 1);
        let ema = ema.unwrap();
        ema.update(&second).unwrap();
        let computed = all_bits(&ema.learner().tensors().weights);
        (measured, all_bits(&second.weights()), all_bits(&ema.learner().weights()), computed)
    };
    for by_chance in [false, true] {
        let expected = run([false, false], by_chance);
        for offloaded in [[true, true], [false, true], [true, false]] {
            assert!(run(offloaded, by_chance) == expected, "{offloaded:?}, by chance: {by_chance}");
        }
    }
}

#[test]
fn device_bytes_count_only_what_is_computed_with() {
    let [home, away] = [false, true].map(|offloaded| learner(Precision::F32, offloaded).bytes());
    assert_eq!(home, away);
    let [home, away] = [false, true].map(|offloaded| learner(Precision::Bf16, offloaded).bytes());
    assert!(home > 2 * away, "{home} {away}");
}

#[test]
fn ineffective_offload_is_refused_or_noted() {
    let settings = Settings { activation_offload: true, ..Settings::default() };
    let error = settings.check().unwrap_err().to_string();
    assert!(
        error.starts_with("`activation_offload` with `gradient_checkpointing` \"none\""),
        "{error}"
    );
    let settings = Settings {
        optimizer_offload: true,
        gradient_checkpointing: crate::train::Recompute::Block,
        ..settings
    };
    settings.check().unwrap();
    let note = settings.without_effect(&Device::Cpu).unwrap();
    assert!(
        note.starts_with("`optimizer_offload` and `activation_offload`: nothing to do"),
        "{note}"
    );
    let options = settings.step_options(0, &Device::Cpu).unwrap();
    assert!(!options.optimizer_offload && !options.activation_offload);
    assert_eq!(Settings::default().without_effect(&Device::Cpu), None);
}

/// Like SFT, but the gradient of its last token is NaN.
struct Diverged;

impl Objective for Diverged {
    fn terms(&self) -> Vec<(&'static str, f64)> {
        Sft::default().terms()
    }

    fn counts(&self, forest: &Forest) -> Vec<f64> {
        Sft::default().counts(forest)
    }

    fn for_forest(&self, _: &Forest) -> Result<Box<dyn Objective>> {
        Ok(Box::new(Self))
    }

    fn fixed_gradient(&self, forest: &Forest, totals: &StepTotals) -> Option<FixedGradient> {
        let mut known = Sft::default().fixed_gradient(forest, totals)?;
        *known.d_logps.last_mut()? = f32::NAN;
        Some(known)
    }

    fn weigh(&self, forest: &Forest, reading: Reading<'_>, totals: &StepTotals) -> Result<Weighed> {
        Sft::default().weigh(forest, reading, totals)
    }
}

#[test]
fn non_finite_gradient_is_named_and_changes_no_weights() {
    let learner = learner(Precision::F32, false);
    let before = all_bits(&learner.weights());
    let trees = trees();
    let trees: Vec<&Tree> = trees.iter().collect();
    let pace = Pace { lr: 1e-3, max_grad_norm: 1.0 };
    let mut adamw = AdamW::new(settings().hyper());
    let step = (&Diverged as &dyn Objective, trees.as_slice());
    let error = update(&learner, step, StepOptions::new(1 << 20), &mut adamw, pace).unwrap_err();
    let said = error.to_string();
    assert!(said.starts_with("element 0 of the gradient of `lm_head.weight`: loss "), "{said}");
    assert!(said.contains("with gradient norm NaN on rows [0, 1, 2]"), "{said}");
    assert_eq!(all_bits(&learner.weights()), before);
}

/// Adapters on two projections of the first block, `B` moved from zero.
fn adapted(loraplus_lr_ratio: f64) -> (Weights, Learner) {
    let dir = Path::new("tests/fixtures/goldens/model_untied");
    let mut start = Checkpoint::load_dir(dir, &Device::Cpu).unwrap();
    let lora = Lora {
        lora_r: 4,
        lora_target_modules: vec![r".*layers\.0\.self_attn\.(q|v)_proj".to_owned()],
        loraplus_lr_ratio,
        ..Lora::default()
    };
    let mut attached = attach(&lora, &start.config, &mut start.weights, 3).unwrap();
    for (seed, (name, factor)) in attached.factors.iter_mut().enumerate() {
        if name.contains("lora_B") {
            *factor = (random(seed as u64, factor.shape()) * 0.05).unwrap();
        }
    }
    let tensors = Tensors::dense(start.weights);
    let learner =
        Learner::adapted(&start.config, tensors, &attached, Precision::F32, |_| false).unwrap();
    (attached.factors, learner)
}

/// AdamW's first step moves each weight by the learning rate, whatever the gradient.
#[test]
fn loraplus_ratio_scales_the_learning_rate_of_b() {
    for (ratio, expected) in [(0.0, 1.0), (1.0, 1.0), (16.0, 16.0)] {
        let (before, learner) = adapted(ratio);
        let hyper = Settings { weight_decay: 0.0, ..Settings::default() }.hyper();
        steps(&learner, &mut AdamW::new(hyper), false, 1);
        for (name, now) in learner.weights() {
            let moved = (now - &before[&name]).unwrap().abs().unwrap();
            let moved = moved.max_all().unwrap().to_scalar::<f32>().unwrap();
            let rate = 1e-3 * if name.contains("lora_B") { expected } else { 1.0 };
            assert!(
                (moved - rate).abs() < 0.01 * rate,
                "{ratio}, {name}: {moved}, expected {rate}"
            );
        }
    }
}

#[test]
fn only_targeted_modules_have_gradients() {
    let (factors, learner) = adapted(0.0);
    let trees = trees();
    let trees: Vec<&Tree> = trees.iter().collect();
    let options = StepOptions::new(1 << 20);
    let (grads, _) = step::gradients(&learner, &Sft::default(), &trees, options).unwrap();
    assert_eq!(factors.len(), 4);
    assert!(grads.iter().map(|(name, _)| name).eq(factors.keys()));
    for (name, grad) in grads.iter() {
        let largest = grad.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(largest > 0.0, "{name}");
    }
}
