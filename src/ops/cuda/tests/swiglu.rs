//! `swiglu.cu` compared with SwiGLU on the CPU.

use half::bf16;

use super::host::{
    Guarded, Kernels, Manner, Number, assert_close, each_block, every_mutant_is_caught, narrow,
    random, wide,
};
use crate::ops::swiglu;

const FILE: &str = "swiglu.cu";
const CHECK: &str = "ops::cuda::tests::swiglu::both_directions_are_the_cpus";

/// Element counts: none, one, less than a vector, less than a block, more than one pass of the grid.
const COUNTS: [usize; 6] = [0, 1, 7, 96, 1003, 17000];
const GRID: [u32; 3] = [2, 1, 1];

/// Values covering the range of gates, including where `exp` saturates.
fn gates<T: Number>(count: usize) -> Vec<T> {
    let values = random::<f32>(1, count).into_iter().zip(0..);
    narrow(&values.map(|(x, i)| if i % 5 == 0 { 40.0 * x } else { 3.0 * x }).collect::<Vec<_>>())
}

fn check<T: Number, D: Number>(entry: &str, count: usize, manner: Manner) {
    let (gate, up, d_out) = (gates::<T>(count), random::<T>(2, count), random::<D>(3, count));
    let blank = || Guarded::new(&narrow::<T>(&vec![f32::NAN; count]), manner.side);
    let [gate_buffer, up_buffer] = [&gate, &up].map(|values| Guarded::new(values, manner.side));
    let d_out_buffer = Guarded::new(&d_out, manner.side);
    let (gate, up) = (wide(&gate), wide(&up));
    let kernels = Kernels::of(FILE);

    let mut out = blank();
    let forward = format!("swiglu_forward_{}", T::NAME);
    let call = kernels.call(&forward, GRID, manner).input(&gate_buffer).input(&up_buffer);
    call.output(&mut out).arg(count as u64).run();
    assert_close("swiglu, forward", out.as_slice(), &swiglu::forward::<f32>(&gate, &up));

    let (mut d_gate, mut d_up) = (blank(), blank());
    let call = kernels.call(entry, GRID, manner).input(&gate_buffer).input(&up_buffer);
    let call = call.input(&d_out_buffer).output(&mut d_gate).output(&mut d_up);
    call.arg(count as u64).run();
    let expected = swiglu::gradients::<f32>(&gate, &up, &wide(&d_out));
    assert_close("swiglu, d(gate)", d_gate.as_slice(), &expected.0);
    assert_close("swiglu, d(up)", d_up.as_slice(), &expected.1);
    assert!(out.is_clean() && d_gate.is_clean() && d_up.is_clean(), "{manner:?}");
}

#[test]
fn both_directions_are_the_cpus() {
    for (turn, count) in COUNTS.into_iter().enumerate() {
        for manner in each_block(turn) {
            check::<f32, f32>("swiglu_backward_f32", count, manner);
            check::<bf16, bf16>("swiglu_backward_bf16", count, manner);
            check::<bf16, f32>("swiglu_backward_bf16_of_f32", count, manner);
        }
    }
}

#[test]
fn kernels_that_are_wrong_are_caught() {
    let mutants = [
        ("x / (1.0f + expf(-x)) * to_f32", "x / (1.0f + expf(x)) * to_f32"),
        ("(sigmoid + silu * (1.0f - sigmoid))", "(sigmoid + sigmoid * (1.0f - sigmoid))"),
        ("ups.at[j] = from_f32<T>(slope * silu);", "ups.at[j] = from_f32<T>(slope * sigmoid);"),
        ("packs<WIDE>(out, 0);", "packs<WIDE>(out, 0) && (count = count / WIDE * WIDE);"),
        ("packed = packed && packs<WIDE>(d_out, 0);", "count += 1;"),
    ];
    every_mutant_is_caught(FILE, CHECK, &mutants);
}
