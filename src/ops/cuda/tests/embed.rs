//! `embed.cu` compared with the embedding on the CPU, bit for bit.

use candle_core::{Device, Tensor};
use half::bf16;

use super::host::{
    Guarded, Kernels, Manner, Number, assert_same, each_block, every_mutant_is_caught, manners,
    random, wide,
};
use crate::ops::embed;

const FILE: &str = "embed.cu";
const CHECK: &str = "ops::cuda::tests::embed::both_directions_are_the_cpus";

/// Tokens, vocabulary, hidden size: one of each; many tokens of few rows; few tokens of many rows.
const SHAPES: [(usize, usize, usize); 4] = [(1, 1, 1), (23, 5, 17), (9, 700, 64), (4, 3, 1030)];

/// Token indices sorted by id, start of each id's run, and the ids: the inputs of the gradient kernel.
fn segments(tokens: &[u32]) -> [Vec<u32>; 3] {
    let mut order: Vec<u32> = (0..tokens.len() as u32).collect();
    order.sort_by_key(|&place| tokens[place as usize]);
    let (mut starts, mut rows) = (Vec::new(), Vec::new());
    for (at, &place) in order.iter().enumerate() {
        let row = tokens[place as usize];
        if rows.last() != Some(&row) {
            rows.push(row);
            starts.push(at as u32);
        }
    }
    starts.push(tokens.len() as u32);
    [order, starts, rows]
}

fn check<T: Number>((count, vocab, width): (usize, usize, usize), manner: Manner) {
    let tokens: Vec<u32> = (0..count as u32).map(|i| i * i * 7919 % vocab as u32).collect();
    let kernels = Kernels::of(FILE);
    let table = random::<T>(1, vocab * width);
    let rows = |values: &[f32], count: usize| {
        Tensor::from_slice(values, (count, width), &Device::Cpu).unwrap()
    };
    let numbers = |tensor: Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();

    let table_buffer = Guarded::new(&table, manner.side);
    let ids = Guarded::new(&tokens, manner.side);
    let mut out = Guarded::new(&vec![f32::NAN; count * width], manner.side);
    let entry = format!("embed_forward_{}", T::NAME);
    let call = kernels.call(&entry, [count as u32, 1, 1], manner).input(&table_buffer).input(&ids);
    call.output(&mut out).arg(width as u64).arg(vocab as u32).run();
    let expected = numbers(embed::embed(&rows(&wide(&table), vocab), &tokens).unwrap());
    assert_same(&format!("rows {manner:?}"), T::NAME, out.as_slice(), &expected);

    let (start, d_x) = (random::<f32>(2, vocab * width), random::<T>(3, count * width));
    let d_x_buffer = Guarded::new(&d_x, manner.side);
    let [order, starts, segment_rows] =
        segments(&tokens).map(|values| Guarded::new(&values, manner.side));
    let mut d_table = Guarded::new(&start, manner.side);
    let entry = format!("embed_backward_{}", T::NAME);
    let call = kernels.call(&entry, [segment_rows.as_slice().len() as u32, 2, 1], manner);
    let call = call.input(&d_x_buffer).input(&order).input(&starts).input(&segment_rows);
    call.output(&mut d_table).arg(width as u64).run();
    let sum = embed::embed_grad(rows(&start, vocab), &tokens, &rows(&wide(&d_x), count)).unwrap();
    assert_same(&format!("d(table) {manner:?}"), T::NAME, d_table.as_slice(), &numbers(sum));
    assert!(out.is_clean() && d_table.is_clean(), "{manner:?}");
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
fn id_beyond_the_table_gives_nan() {
    for manner in manners(&[64]) {
        let table = Guarded::new(&random::<f32>(1, 3 * 5), manner.side);
        let ids = Guarded::new(&[2_u32, 3, u32::MAX], manner.side);
        let mut out = Guarded::new(&[0.0_f32; 15], manner.side);
        let call = Kernels::of(FILE).call("embed_forward_f32", [3, 1, 1], manner);
        call.input(&table).input(&ids).output(&mut out).arg(5_u64).arg(3_u32).run();
        assert!(out.as_slice()[..5] == table.as_slice()[10..]);
        assert!(out.as_slice()[5..].iter().all(|value| value.is_nan()));
    }
}

#[test]
fn kernels_that_are_wrong_are_caught() {
    let mutants = [
        ("u32 id = ids[blockIdx.x];", "u32 id = ids[blockIdx.x] / 2;"),
        (
            "for (u32 place = first; place < end; place++)",
            "for (u32 place = first; place <= end; place++)",
        ),
        (
            "for (u32 place = first; place < end; place++)",
            "for (u32 place = end; place-- > first;)",
        ),
        ("auto sums = load_pack<N>(d_table + i);", "Pack<float, N> sums{};"),
        ("u64(order[place]) * width", "u64(place) * width"),
        ("u64 thread = u64(blockIdx.y) * blockDim.x + threadIdx.x,", "u64 thread = threadIdx.x,"),
    ];
    every_mutant_is_caught(FILE, CHECK, &mutants);
}
