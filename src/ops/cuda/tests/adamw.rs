//! `adamw.cu` compared with AdamW on the CPU, including its stochastic rounding, and with the expected distribution.

use half::bf16;

use super::host::{
    Guarded, Kernels, Manner, Number, Order, Side, assert_close, assert_same, each_block,
    every_mutant_is_caught, narrow, random, wide,
};
use crate::ops::cpu::adamw::{self, Chance};
use crate::rng::philox;

const FILE: &str = "adamw.cu";
const CHECK: &str = "ops::cuda::tests::adamw::a_step_is_the_cpus";
const CHANCE: &str = "ops::cuda::tests::adamw::rounding_by_chance_is_the_cpus_to_the_bit";

const COUNTS: [usize; 5] = [0, 1, 6, 64, 1003];
const GRID: [u32; 3] = [2, 1, 1];
/// Its two halves are distinct and non-zero.
const STREAM: u64 = 5 << 32 | 9;

/// The constants in the kernel's layout.
#[repr(C)]
#[derive(Clone, Copy)]
struct Update {
    beta1: f32,
    beta2: f32,
    grad_scale: f32,
    shrink: f32,
    step_size: f32,
    root_correction: f32,
    eps: f32,
}

const UPDATE: Update = Update {
    beta1: 0.9,
    beta2: 0.95,
    grad_scale: 0.7,
    shrink: 0.999,
    step_size: 0.1,
    root_correction: 0.223_606_8,
    eps: 1e-8,
};

/// Inputs and state of a step.
struct State<T> {
    param: Guarded<f32>,
    moments: [Guarded<f32>; 2],
    grad: Guarded<f32>,
    copy: Guarded<T>,
}

impl<T: Number> State<T> {
    fn new(count: usize, side: Side) -> Self {
        let [param, grad, first] = [1, 2, 3].map(|index| random::<f32>(index, count));
        let second: Vec<f32> = random::<f32>(4, count).iter().map(|x| x * x).collect();
        Self {
            param: Guarded::new(&param, side),
            moments: [&first, &second].map(|values| Guarded::new(values, side)),
            grad: Guarded::new(&grad, side),
            copy: Guarded::new(&narrow::<T>(&vec![f32::NAN; count]), side),
        }
    }

    /// One step. `seed` enables stochastic rounding of the copy.
    fn step(&mut self, update: Update, clip: Option<f32>, seed: Option<u64>, manner: Manner) {
        let count = self.param.as_slice().len() as u64;
        let clip = clip.map(|clip| Guarded::new(&[clip], manner.side));
        let entry = format!("adamw_{}", T::NAME);
        let [first, second] = &mut self.moments;
        let call = Kernels::of(FILE).call(&entry, GRID, manner).output(&mut self.param);
        let call = call.output(first).output(second).input(&self.grad).output(&mut self.copy);
        let call = match &clip {
            Some(clip) => call.input(clip),
            None => call.null(),
        };
        let call = call.arg(count).arg(update).arg(u32::from(seed.is_some()));
        call.arg(seed.unwrap_or(0)).arg(STREAM).run();
    }

    /// The CPU's rounding of the current masters.
    fn rounded(&self, seed: u64) -> Vec<bf16> {
        let masters = self.param.as_slice();
        let mut copy = vec![bf16::ZERO; masters.len()];
        adamw::round_by_chance(&mut copy, masters, 0, Chance { seed, stream: STREAM });
        copy
    }

    fn is_clean(&self) -> bool {
        let [first, second] = &self.moments;
        [&self.param, first, second, &self.grad].into_iter().all(Guarded::is_clean)
            && self.copy.is_clean()
    }
}

fn check<T: Number>(count: usize, clip: Option<f32>, manner: Manner) {
    let mut state = State::<T>::new(count, manner.side);
    let numbers = |buffer: &Guarded<f32>| buffer.as_slice().to_vec();
    let (mut param, grad) = (numbers(&state.param), numbers(&state.grad));
    let [mut first, mut second] = state.moments.each_ref().map(numbers);
    let Update { beta1, beta2, grad_scale, shrink, step_size, root_correction, eps } = UPDATE;
    let grad_scale = grad_scale * clip.unwrap_or(1.0);
    let constants =
        adamw::Update { beta1, beta2, grad_scale, shrink, step_size, root_correction, eps };
    adamw::update(&mut param, [&mut first, &mut second], &grad, &mut [], constants);

    state.step(UPDATE, clip, None, manner);
    assert_close("adamw, parameter", state.param.as_slice(), &param);
    assert_close("adamw, first moment", state.moments[0].as_slice(), &first);
    assert_close("adamw, second moment", state.moments[1].as_slice(), &second);
    let copy = narrow::<T>(state.param.as_slice());
    assert_same("adamw, copy", T::NAME, &wide(state.copy.as_slice()), &wide(&copy));
    assert!(state.is_clean(), "{manner:?}");
}

#[test]
fn a_step_is_the_cpus() {
    for (turn, count) in COUNTS.into_iter().enumerate() {
        for manner in each_block(turn) {
            check::<f32>(count, None, manner);
            check::<bf16>(count, Some(0.5), manner);
            // Non-finite gradients change nothing.
            let mut state = State::<bf16>::new(count, manner.side);
            let before = state.param.as_slice().to_vec();
            state.step(UPDATE, Some(f32::NAN), None, manner);
            assert!(state.param.as_slice() == before && state.moments[0].is_clean());
            assert!(state.copy.as_slice().iter().all(|value| value.is_nan()));
        }
    }
}

/// A step that changes only the copy.
const STILL: Update = Update {
    beta1: 1.0,
    beta2: 1.0,
    grad_scale: 1.0,
    shrink: 1.0,
    step_size: 0.0,
    root_correction: 1.0,
    eps: 1.0,
};

fn bits(copy: &[bf16]) -> Vec<u16> {
    copy.iter().map(|value| value.to_bits()).collect()
}

/// A step that moves the masters: its copies equal the CPU's rounding of these masters, whether a thread reads one or
/// four at a time, for any values.
#[test]
fn rounding_by_chance_is_the_cpus_to_the_bit() {
    let seeds = [0, 7, u64::MAX, 0x0123_4567_89ab_cdef];
    let special = [f32::NAN, -f32::NAN, f32::INFINITY, f32::MIN, f32::MAX, 1e-40, -0.0];
    for (turn, count) in COUNTS.into_iter().enumerate() {
        for (manner, seed) in each_block(turn).into_iter().zip(seeds.into_iter().cycle()) {
            let mut state = State::<bf16>::new(count, manner.side);
            if count > special.len() {
                state.param.as_mut()[1..][..special.len()].copy_from_slice(&special);
            }
            state.step(UPDATE, Some(0.5), Some(seed), manner);
            let expected = state.rounded(seed);
            let what = "adamw, copy rounded by chance";
            assert_same(what, "bf16", &bits(state.copy.as_slice()), &bits(&expected));
            assert!(state.is_clean(), "{manner:?}");
        }
    }
}

/// Over 400 draws the mean of the copies is their master: a draw's standard deviation is at most half the spacing of
/// neighbours, itself at most 2^-8 of the value, and averaging 1003 × 400 draws divides it by some 600.
#[test]
fn rounding_by_chance_is_unbiased() {
    let (count, draws) = (1003, 400);
    let manner = Manner { block: 256, order: Order::Forward, side: Side::Start };
    let mut state = State::<bf16>::new(count, Side::Start);
    let (mut bias, mut ups) = (0.0, 0);
    for seed in 0..draws {
        state.step(STILL, None, Some(seed), manner);
        let copies = state.copy.as_slice();
        for (copy, &master) in copies.iter().zip(state.param.as_slice()) {
            let below = bf16::from_bits((master.to_bits() >> 16) as u16);
            let above = bf16::from_bits(below.to_bits() + 1);
            assert!(*copy == below || *copy == above, "{copy} for {master}");
            ups += u64::from(*copy == above);
            bias += f64::from(copy.to_f32() - master) / f64::from(master.abs());
        }
    }
    let total = f64::from(count as u32) * draws as f64;
    assert!((bias / total).abs() < 5.0 / 256.0 / total.sqrt(), "{}", bias / total);
    assert!((ups as f64 / total - 0.5).abs() < 0.05, "{ups} of {total}");
}

/// The same words as `rng::philox`, which is tested against the published vectors.
#[test]
fn the_generator_is_the_cpus() {
    const COUNT: usize = 37;
    let manner = Manner { block: 32, order: Order::Forward, side: Side::End };
    for (seed, stream) in [(0, 0), (u64::MAX, u64::MAX), (0x0123_4567_89ab_cdef, STREAM)] {
        let mut out = Guarded::new(&[0_u32; 4 * COUNT], manner.side);
        let call = Kernels::of(FILE).call("philox_words", [2, 1, 1], manner).output(&mut out);
        call.arg(COUNT as u64).arg(seed).arg(stream).run();
        let [[c, d], key] = [stream, seed].map(|x| [x as u32, (x >> 32) as u32]);
        let words = (0..COUNT as u32)
            .flat_map(|counter| philox([counter, 0, c, d].map(|word| [word]), key))
            .flatten();
        assert_same("philox", "u32", out.as_slice(), &words.collect::<Vec<u32>>());
    }
}

#[test]
fn wrong_steps_are_caught() {
    let mutants = [
        ("(1.0f - update.beta1) * g;", "(1.0f - update.beta2) * g;"),
        ("* (g * g);", "* g;"),
        ("if (clip) grad_scale *= *clip;", ""),
        ("if (grad_scale != grad_scale) return;", ""),
        ("sqrtf(v) / update.root_correction", "sqrtf(v / update.root_correction)"),
        ("store_pack(second + i, seconds);", ""),
        ("global_thread(), global_threads(), [&]", "global_thread(), blockDim.x, [&]"),
    ];
    every_mutant_is_caught(FILE, CHECK, &mutants);
}

#[test]
fn wrong_rounding_by_chance_is_caught() {
    let mutants = [
        ("u16((bits + (random >> 16)) >> 16)", "u16((bits + (random >> 17)) >> 16)"),
        ("u32 word = N == 4 ? j : u32(i % 4);", "u32 word = j;"),
        (
            "u32(i / 4), u32(i / 4 >> 32), u32(stream)",
            "u32(i / 4), u32(i / 4 >> 32), u32(stream >> 32)",
        ),
        ("if ((bits & 0x7f800000) == 0x7f800000) return from_f32<bf16>(x);", ""),
        ("left += 0x9e3779b9u,", "left += 0x9e3779b8u,"),
    ];
    every_mutant_is_caught(FILE, CHANCE, &mutants);
}
