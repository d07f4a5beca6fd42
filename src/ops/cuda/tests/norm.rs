//! `norm.cu` compared with the norm on the CPU.

use half::bf16;

use super::host::{
    Guarded, Kernels, Manner, Number, assert_close, each_block, every_mutant_is_caught,
    every_mutant_within_is_caught, narrow, random, wide,
};
use crate::ops::norm;

const FILE: &str = "norm.cu";
const FORWARD: &str = "ops::cuda::tests::norm::the_forward_is_the_cpus";
const BACKWARD: &str = "ops::cuda::tests::norm::the_backward_is_the_cpus";

const EPS: f32 = 1e-5;

/// Rows and widths: one row; not a multiple of a vector, warp or block; whole vectors; more than a block.
const SHAPES: [(usize, usize); 6] = [(1, 1), (1, 3), (5, 17), (3, 64), (2, 576), (2, 1100)];

fn forward<T: Number>((rows, width): (usize, usize), manner: Manner) {
    let [x, more] = [1, 2].map(|index| random::<f32>(index, rows * width));
    let weight = random::<f32>(3, width);
    let summed: Vec<f32> = x.iter().zip(&more).map(|(x, more)| x + more).collect();
    let guarded = |values: &[f32]| Guarded::new(values, manner.side);
    let [x_buffer, more_buffer, weight_buffer] = [&x, &more, &weight].map(|values| guarded(values));
    let mut sum = guarded(&vec![f32::NAN; x.len()]);
    let mut y = Guarded::new(&narrow::<T>(&vec![f32::NAN; x.len()]), manner.side);
    let kernels = Kernels::of(FILE);
    let entry = format!("rms_norm_forward_{}", T::NAME);
    let grid = [rows as u32, 1, 1];

    let call = kernels.call(&entry, grid, manner).input(&x_buffer).null().null();
    call.input(&weight_buffer).output(&mut y).arg(width as u64).arg(EPS).run();
    assert_close("rms norm, forward", y.as_slice(), &norm::forward::<f32>(&x, &weight, EPS));

    let call = kernels.call(&entry, grid, manner).input(&x_buffer).input(&more_buffer);
    let call = call.output(&mut sum).input(&weight_buffer).output(&mut y);
    call.arg(width as u64).arg(EPS).run();
    assert!(sum.as_slice() == summed, "the sum of the residual stream, {manner:?}");
    let expected = norm::forward::<f32>(&summed, &weight, EPS);
    assert_close("rms norm, forward after a sum", y.as_slice(), &expected);
    assert!(sum.is_clean() && y.is_clean(), "{manner:?}");
}

#[test]
fn the_forward_is_the_cpus() {
    for (turn, shape) in SHAPES.into_iter().enumerate() {
        for manner in each_block(turn) {
            forward::<f32>(shape, manner);
            forward::<bf16>(shape, manner);
        }
    }
}

/// `part` rows per partial sum, accumulated in shared memory or not.
fn backward<T: Number>(
    (rows, width): (usize, usize),
    (part, in_shared): (usize, bool),
    manner: Manner,
) {
    let [x, past] = [1, 2].map(|index| random::<f32>(index, rows * width));
    let (weight, d_y) = (random::<f32>(3, width), random::<T>(4, rows * width));
    let (mut d_x, d_weight) = norm::gradients(&x, &weight, &wide(&d_y), EPS);
    d_x.iter_mut().zip(&past).for_each(|(d_x, past)| *d_x += past);

    let parts = rows.div_ceil(part);
    let guarded = |values: &[f32]| Guarded::new(values, manner.side);
    let [x_buffer, weight_buffer] = [&x, &weight].map(|values| guarded(values));
    let d_y_buffer = Guarded::new(&d_y, manner.side);
    let mut partials = guarded(&vec![f32::NAN; parts * width]);
    // The residual gradient is updated in place in every other case.
    let in_place = rows % 2 == 1;
    let past_buffer = guarded(&past);
    let mut out = guarded(if in_place { &past } else { &x });
    let own = out.as_ptr();
    let entry = format!("rms_norm_backward_{}", T::NAME);
    let kernels = Kernels::of(FILE);
    let call = kernels.call(&entry, [parts as u32, 1, 1], manner);
    let call = call.shared(if in_shared { 4 * width } else { 0 });
    let call = call.input(&x_buffer).input(&weight_buffer).input(&d_y_buffer);
    let call = if in_place { call.arg(own) } else { call.input(&past_buffer) };
    let call = call.output(&mut out).output(&mut partials).arg(rows as u64).arg(width as u64);
    call.arg(part as u32).arg(u32::from(in_shared)).arg(EPS).run();
    assert_close("rms norm, d(x)", out.as_slice(), &d_x);

    let start = random::<f32>(5, width);
    let mut sums = guarded(&start);
    for (add, start) in [(1_u32, &start), (0, &vec![0.0; width])] {
        let grid = [(width as u32).div_ceil(manner.block), 1, 1];
        let call = kernels.call("column_sum", grid, manner).input(&partials).output(&mut sums);
        call.arg(parts as u64).arg(width as u64).arg(add).run();
        let expected: Vec<f32> = d_weight.iter().zip(start).map(|(d, start)| d + start).collect();
        assert_close("rms norm, d(weight)", sums.as_slice(), &expected);
    }
    assert!(out.is_clean() && partials.is_clean() && sums.is_clean(), "{manner:?}");
}

#[test]
fn the_backward_is_the_cpus() {
    for (turn, shape) in SHAPES.into_iter().enumerate() {
        for manner in each_block(turn) {
            backward::<f32>(shape, (2, false), manner);
            backward::<bf16>(shape, (4, true), manner);
        }
    }
}

#[test]
fn wrong_forwards_are_caught() {
    let mutants = [
        ("u64 row = u64(blockIdx.x) * width;", "u64 row = u64(blockIdx.x + 1) * width;"),
        (
            "block_sum(squares) / width + eps);\n  // Each",
            "warp_sum(squares) / width + eps);\n  // Each",
        ),
        ("store_pack(sum + i, values);", ""),
        ("const float *normed = add ? sum : x;", "const float *normed = x;"),
        ("packed = packed && packs<4>(add", "packed = true || packs<4>(add"),
    ];
    every_mutant_is_caught(FILE, FORWARD, &mutants);
}

#[test]
fn wrong_backwards_are_caught() {
    let mutants = [
        ("end = first + part < rows ? first + part : rows", "end = first + part"),
        (
            "end = first + part < rows ? first + part : rows",
            "end = first + part < rows ? first + part - 1 : rows",
        ),
        ("float mean = block_sum(dot)", "float mean = warp_sum(dot)"),
        ("if (past) out = load_pack<N>", "if (false) out = load_pack<N>"),
        ("for (u64 part = 0; part < parts; part++)", "for (u64 part = 1; part < parts; part++)"),
        ("if (column >= width) return;", "if (column > width) return;"),
        ("add ? out[column] + sum : sum", "sum"),
    ];
    every_mutant_is_caught(FILE, BACKWARD, &mutants);
}

#[test]
fn reductions_without_a_barrier_or_with_a_wrong_width_are_caught() {
    let mutants = [
        (
            "__syncthreads();\n  value = lane_id() < warp_count()",
            "value = lane_id() < warp_count()",
        ),
        (
            "value = shuffle(warp_reduce(value, op), 0);\n  __syncthreads();",
            "value = shuffle(warp_reduce(value, op), 0);",
        ),
        ("for (u32 distance = 16; distance > 0;", "for (u32 distance = 8; distance > 0;"),
        ("for (u64 i = whole + thread; i < count;", "for (u64 i = whole + thread; i <= count;"),
        ("lane_id() < warp_count() ?", "lane_id() + 1 < warp_count() ?"),
    ];
    every_mutant_within_is_caught("common.cuh", FILE, BACKWARD, &mutants);
}
