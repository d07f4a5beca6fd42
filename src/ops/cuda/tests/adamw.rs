//! `adamw.cu` against AdamW on the CPU, and its rounding by chance against what chance should be.

use half::bf16;

use super::host::{
    Guarded, Kernels, Manner, Number, Order, Side, assert_close, assert_same, each_block,
    every_mutant_is_caught, narrow, random, wide,
};
use crate::ops::cpu::adamw;

const FILE: &str = "adamw.cu";
const CHECK: &str = "ops::cuda::tests::adamw::a_step_is_the_cpus";
const CHANCE: &str = "ops::cuda::tests::adamw::rounding_by_chance_is_unbiased_and_repeats";

const COUNTS: [usize; 5] = [0, 1, 6, 64, 1003];
const GRID: [u32; 3] = [2, 1, 1];

/// The constants as the kernel takes them.
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

/// What a step reads and changes.
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

    /// One step. `seed` rounds the copy by chance.
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
        call.arg(seed.unwrap_or(0)).arg(5_u64).run();
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
            // Gradients that are not finite move nothing.
            let mut state = State::<bf16>::new(count, manner.side);
            let before = state.param.as_slice().to_vec();
            state.step(UPDATE, Some(f32::NAN), None, manner);
            assert!(state.param.as_slice() == before && state.moments[0].is_clean());
            assert!(state.copy.as_slice().iter().all(|value| value.is_nan()));
        }
    }
}

/// The step that changes nothing but the copy.
const STILL: Update = Update {
    beta1: 1.0,
    beta2: 1.0,
    grad_scale: 1.0,
    shrink: 1.0,
    step_size: 0.0,
    root_correction: 1.0,
    eps: 1.0,
};

/// Each copy is one of the two neighbours of its master, over 400 draws the mean is the master: a draw's standard
/// deviation is at most half of the neighbours' distance, 2^-8 of the number at most, and the mean of 1003 × 400 has
/// some 600 times less.
#[test]
fn rounding_by_chance_is_unbiased_and_repeats() {
    let (count, draws) = (1003, 400);
    let with = |side, block| Manner { block, order: Order::Forward, side };
    let mut state = State::<bf16>::new(count, Side::Start);
    let (mut bias, mut ups) = (0.0, 0);
    for seed in 0..draws {
        state.step(STILL, None, Some(seed), with(Side::Start, 256));
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
    // The same seed gives the same copies, however a thread reads them: alone or four at a time.
    let mut other = State::<bf16>::new(count, Side::End);
    other.step(STILL, None, Some(draws - 1), with(Side::End, 32));
    assert!(other.copy.as_slice() == state.copy.as_slice());
}

/// The vectors that the authors published with the generator (Random123, `kat_vectors`).
#[test]
fn the_generator_is_philox() {
    let manner = Manner { block: 32, order: Order::Forward, side: Side::End };
    let words = |seed: u64, stream: u64| {
        let mut out = Guarded::new(&[0_u32; 4], manner.side);
        let call = Kernels::of(FILE).call("philox_words", [1, 1, 1], manner).output(&mut out);
        call.arg(1_u64).arg(seed).arg(stream).run();
        out.as_slice().to_vec()
    };
    let published = [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8];
    assert_same("philox", "u32", &words(0, 0), &published);
}

#[test]
fn steps_that_are_wrong_are_caught() {
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
fn chances_that_are_wrong_are_caught() {
    let mutants = [
        ("u16((bits + (random >> 16)) >> 16)", "u16((bits + (random >> 17)) >> 16)"),
        ("u32 word = N == 4 ? j : u32(i % 4);", "u32 word = j;"),
    ];
    every_mutant_is_caught(FILE, CHANCE, &mutants);
}
