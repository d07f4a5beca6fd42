//! `rope.cu` compared with the rotation on the CPU.

use half::bf16;

use super::host::{
    Guarded, Kernels, Manner, Number, assert_close, each_block, every_mutant_is_caught, random,
    wide,
};
use crate::ops::rope::{self, Rotary};

const FILE: &str = "rope.cu";
const CHECK: &str = "ops::cuda::tests::rope::both_directions_are_the_cpus";

/// Tokens, heads, half of the head dimension, and elements between rows.
const SHAPES: [(usize, usize, usize, usize); 5] =
    [(1, 1, 1, 0), (5, 2, 3, 0), (3, 3, 32, 64), (2, 9, 36, 1), (2, 5, 64, 0)];

/// The tables of [`Rotary`].
fn tables(frequencies: &[f32], positions: &[u32]) -> [Vec<f32>; 2] {
    let angles = positions.iter().flat_map(|&position| {
        frequencies.iter().map(move |frequency| f64::from(position as f32 * frequency))
    });
    let angles: Vec<f64> = angles.collect();
    [f64::cos, f64::sin].map(|of| angles.iter().map(|&angle| of(angle) as f32).collect())
}

fn check<T: Number>((tokens, heads, half, gap): (usize, usize, usize, usize), manner: Manner) {
    let width = heads * 2 * half;
    let stride = width + gap;
    let positions: Vec<u32> = (0..tokens as u32).map(|token| token * 701).collect();
    let frequencies: Vec<f32> = (0..half).map(|i| 0.7_f32.powi(i as i32)).collect();
    let rotary = Rotary::new(&frequencies, &positions);
    let tables = tables(&frequencies, &positions);
    let [cos, sin] = tables.each_ref().map(|table| Guarded::new(table, manner.side));
    // The last row ends with its heads, without a gap.
    let start = random::<T>(1, tokens * stride - gap);
    let before: Vec<T> = start.chunks(stride).flat_map(|row| row[..width].to_vec()).collect();
    let entry = format!("rope_{}", T::NAME);
    let begin = || Kernels::of(FILE).call(&entry, [tokens as u32, 1, 1], manner);
    for sign in [1.0_f32, -1.0] {
        let mut expected = wide(&before);
        rope::rotate(&mut expected, &rotary, sign);
        let what = if sign > 0.0 { "rope, forward" } else { "rope, backward" };
        let x = Guarded::new(&start, manner.side);
        let mut out = Guarded::new(&vec![T::narrow(f32::NAN); tokens * width], manner.side);
        let call = begin().input(&x).output(&mut out).input(&cos).input(&sin).arg(stride as u64);
        call.arg(heads as u32).arg(half as u32).arg(sign).run();
        assert_close(what, out.as_slice(), &expected);
        assert!(out.is_clean(), "{manner:?}");

        let mut own = Guarded::new(&before, manner.side);
        let x = own.as_mut().as_mut_ptr();
        let call = begin().arg(x).output(&mut own).input(&cos).input(&sin).arg(width as u64);
        call.arg(heads as u32).arg(half as u32).arg(sign).run();
        assert_close(&format!("{what}, in place"), own.as_slice(), &expected);
        assert!(own.is_clean(), "in place, {manner:?}");
    }
}

#[test]
fn both_directions_are_the_cpus() {
    for (turn, shape) in SHAPES.into_iter().enumerate() {
        for manner in each_block(turn) {
            check::<f32>(shape, manner);
            check::<bf16>(shape, manner);
        }
    }
}

#[test]
fn kernels_that_are_wrong_are_caught() {
    let mutants = [
        ("turn = sines.at[j] * sign;", "turn = sines.at[j];"),
        ("x += token * stride,", "x += token * heads * 2 * half,"),
        ("cos += token * half,", ""),
        ("u32 head = u32(pair) / half,", "u32 head = u32(pair) / (half + 1),"),
        ("out += token * heads * 2 * half,", "out += token * stride,"),
        ("high = low + half;", "high = low + half + 1;"),
        (
            "from_f32<T>(right * cosines.at[j] + left * turn)",
            "from_f32<T>(right * cosines.at[j] - left * turn)",
        ),
    ];
    every_mutant_is_caught(FILE, CHECK, &mutants);
}
