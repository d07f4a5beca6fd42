//! Every kernel with every buffer at a guard page: an access one element out of bounds crashes the test.

#![expect(unsafe_code, reason = "tiles and products are called as their callers do, by pointer")]

use half::bf16;
use proptest::prelude::*;

use super::attention::{self, Inputs};
use super::element::Element;
use super::guard::{Guarded, Side};
use super::isa::Isa;
use super::kernel::{Kernel, Left, Place, REHEARSAL, REHEARSAL_WIDENED, Tile, UNIT};
use super::matmul::{Mat, TILE, Threads, product};
use super::pack::pack;
use super::{rows, simd};
use crate::data::forest::Forest;
use crate::data::tree::{Role, Tree};
use crate::ops::AttentionPlan;
use crate::rng::Stream;

fn kernels<E: Element>() -> Vec<Kernel> {
    let supported = Isa::ALL.into_iter().filter(|isa| isa.is_supported());
    let rehearsal = if E::PER_UNIT == 1 { REHEARSAL } else { REHEARSAL_WIDENED };
    supported.map(E::kernel).chain([rehearsal]).collect()
}

fn random(index: u64, len: usize) -> Vec<f32> {
    Stream::new(31, "guard").normal(index, len, 1.0)
}

fn guarded(index: u64, len: usize, side: Side) -> Guarded<f32> {
    Guarded::new(&random(index, len), side)
}

/// The sum in f64, and a bound on f32's error.
fn sum(products: impl Iterator<Item = (f32, f32)>) -> (f64, f64) {
    products.fold((0.0, 1e-6), |(sum, bound), (a, b)| {
        let product = f64::from(a) * f64::from(b);
        (sum + product, bound + 1e-6 * product.abs())
    })
}

/// Memory layout of an operand.
#[derive(Clone, Copy, Debug)]
struct Lie {
    transposed: bool,
    /// Elements between the end of a row and the start of the next.
    gap: usize,
}

impl Lie {
    /// Elements of a `[rows, cols]` matrix, without a gap after the last row.
    fn len(self, rows: usize, cols: usize) -> usize {
        let (rows, cols) = if self.transposed { (cols, rows) } else { (rows, cols) };
        if rows == 0 || cols == 0 { 0 } else { (rows - 1) * (cols + self.gap) + cols }
    }

    fn view<E: Element>(self, data: &[E], rows: usize, cols: usize) -> Mat<'_, E> {
        if self.transposed {
            Mat::strided(data, cols, rows, rows + self.gap).t()
        } else {
            Mat::strided(data, rows, cols, cols + self.gap)
        }
    }
}

fn at<E: Element>(mat: Mat<'_, E>, row: usize, column: usize) -> f32 {
    mat.data[row * mat.row_stride + column * mat.col_stride].widened()
}

/// One product with every kernel, operands and result at guard pages, compared with sums in f64.
fn check_product(shape: [usize; 3], lies: [Lie; 2], add: bool, threads: Threads) {
    check_product_of::<f32>(shape, lies, add, threads);
    check_product_of::<bf16>(shape, lies, add, threads);
}

fn check_product_of<E: Element>(
    [m, n, k]: [usize; 3],
    [left, right]: [Lie; 2],
    add: bool,
    threads: Threads,
) {
    for side in Side::BOTH {
        let a = Guarded::new(&E::rounded(random(1, left.len(m, k))), side);
        let b = Guarded::new(&E::rounded(random(2, right.len(k, n))), side);
        let (a_view, b_view) = (left.view(a.as_slice(), m, k), right.view(b.as_slice(), k, n));
        for kernel in kernels::<E>() {
            let before = if add { random(3, m * n) } else { vec![f32::NAN; m * n] };
            let mut out = Guarded::new(&before, side);
            let place = Place { data: out.as_mut().as_mut_ptr(), stride: n, add };
            // SAFETY: `out` holds exactly the product's elements.
            unsafe { product(&kernel, a_view, b_view, place, threads) };
            assert!(out.is_clean(), "{side:?}: beside the result of {m}x{n}x{k}");
            for (place, value) in out.as_slice().iter().enumerate() {
                let (i, j) = (place / n, place % n);
                let products = (0..k).map(|k| (at(a_view, i, k), at(b_view, k, j)));
                let start = add.then(|| (before[place], 1.0));
                let (expected, bound) = sum(start.into_iter().chain(products));
                let error = (f64::from(*value) - expected).abs();
                assert!(error <= bound, "{value} at ({i}, {j}) of {m}x{n}x{k}, not {expected}");
            }
        }
        assert!(a.is_clean() && b.is_clean(), "an operand of {m}x{n}x{k} was written");
    }
}

/// Sizes on both sides of every boundary: tiles of 4 to 32, few rows (96), blocks of rows (192).
fn rows_or_columns() -> impl Strategy<Value = usize> {
    prop_oneof![8 => 0..40_usize, 2 => 90..104_usize, 1 => 190..200_usize]
}

/// Inner sizes, also on both sides of the chain length (288).
fn inner() -> impl Strategy<Value = usize> {
    prop_oneof![8 => 0..24_usize, 2 => 284..293_usize, 1 => 574..579_usize]
}

fn lie() -> impl Strategy<Value = Lie> {
    (any::<bool>(), prop_oneof![Just(0_usize), 1..5_usize])
        .prop_map(|(transposed, gap)| Lie { transposed, gap })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

    #[test]
    fn products_of_any_shape_stay_within_their_buffers(
        shape in (rows_or_columns(), rows_or_columns(), inner()),
        lies in (lie(), lie()),
        add: bool,
        all: bool,
    ) {
        let threads = if all { Threads::All } else { Threads::One };
        check_product([shape.0, shape.1, shape.2], [lies.0, lies.1], add, threads);
    }

    #[test]
    fn packing_stays_within_its_buffers(
        shape in (0..70_usize, 0..30_usize),
        lie in lie(),
        width in prop_oneof![Just(4_usize), Just(6), Just(8), Just(12), Just(16), Just(32), 1..20_usize],
    ) {
        let (rows, cols) = shape;
        for side in Side::BOTH {
            let data = guarded(1, lie.len(rows, cols), side);
            let source = lie.view(data.as_slice(), rows, cols);
            let strips = rows.div_ceil(width);
            let mut to = Guarded::new(&vec![f32::NAN; strips * width * cols], side);
            pack(source, width, to.as_mut());
            prop_assert!(to.is_clean() && data.is_clean());
            for (place, value) in to.as_slice().iter().enumerate() {
                let row = place / width / cols * width + place % width;
                let expected = if row < rows { at(source, row, place / width % cols) } else { 0.0 };
                prop_assert_eq!(value.to_bits(), expected.to_bits());
            }
        }
    }

    #[test]
    fn rows_of_any_length_stay_within_their_buffers(len in 0..100_usize) {
        check_rows(len);
    }
}

/// Large enough for several threads (2^20 multiply-adds) and several tasks.
#[test]
fn products_on_several_threads_stay_within_their_buffers() {
    let plain = Lie { transposed: false, gap: 0 };
    let transposed = Lie { transposed: true, gap: 3 };
    for (shape, lies) in [
        ([97, 130, 100], [plain, transposed]),
        ([13, 301, 290], [plain, transposed]),
        ([203, 67, 81], [transposed, plain]),
        ([5, 3077, 70], [plain, plain]),
    ] {
        check_product(shape, lies, true, Threads::All);
    }
}

#[test]
fn every_tile_stays_within_its_strips_and_its_place() {
    for kernel in kernels::<f32>() {
        let Kernel { rows, columns, narrow_rows, narrow_columns, .. } = kernel;
        for k in [1, 2, 17] {
            check_tile(kernel.packed, (rows, columns), k, [1, rows]);
            for gap in [0, 1] {
                check_tile(kernel.strided, (rows, columns), k, [k + gap, 1]);
                check_tile(kernel.strided, (rows, columns), k, [1, rows + gap]);
                check_tile(kernel.narrow, (narrow_rows, narrow_columns), k, [k + gap, 1]);
                check_tile(kernel.narrow, (narrow_rows, narrow_columns), k, [1, narrow_rows + gap]);
            }
        }
    }
}

/// A single tile; the left matrix has the given row and column strides.
fn check_tile(
    tile: Tile,
    (rows, columns): (usize, usize),
    k: usize,
    [row_stride, k_stride]: [usize; 2],
) {
    assert!(rows * columns <= TILE, "a tile of {rows}x{columns} is too large to be put aside");
    for (side, add, gap) in
        Side::BOTH.into_iter().flat_map(|side| [(side, false, 0), (side, true, 3)])
    {
        let stride = columns + gap;
        let left = guarded(1, (rows - 1) * row_stride + (k - 1) * k_stride + 1, side);
        let strip = guarded(2, k * columns, side);
        let before = random(3, (rows - 1) * stride + columns);
        let mut out = Guarded::new(&before, side);
        let place = Place { data: out.as_mut().as_mut_ptr(), stride, add };
        // SAFETY: the instruction set was detected, and the buffers have the sizes that a tile asks for.
        unsafe {
            let data = left.as_ptr().cast();
            let left = Left { data, row_stride: row_stride * UNIT, k_stride: k_stride * UNIT };
            tile(k, left, strip.as_ptr().cast(), place);
        }
        assert!(left.is_clean() && strip.is_clean() && out.is_clean(), "{side:?}");
        let (left, strip) = (left.as_slice(), strip.as_slice());
        for (place, value) in out.as_slice().iter().enumerate() {
            let (i, j) = (place / stride, place % stride);
            if j >= columns {
                assert_eq!(value.to_bits(), before[place].to_bits(), "between rows, {side:?}");
                continue;
            }
            let products =
                (0..k).map(|k| (left[i * row_stride + k * k_stride], strip[k * columns + j]));
            let (expected, bound) =
                sum(add.then(|| (before[place], 1.0)).into_iter().chain(products));
            assert!((f64::from(*value) - expected).abs() <= bound, "{value}, not {expected}");
        }
    }
}

/// Every row kernel on rows of one length, with this process's instruction set.
fn check_rows(len: usize) {
    for side in Side::BOTH {
        let [a, b, c] = [1, 2, 3].map(|index| guarded(index, len, side));
        let mut outs = [4, 5].map(|index| guarded(index, len, side));
        let [out, other] = &mut outs;
        let max = simd::max(a.as_slice());
        assert!(a.as_slice().iter().all(|x| *x <= max));
        let total = simd::sum_exp_sub(a.as_slice(), 0.5);
        out.as_mut().copy_from_slice(a.as_slice());
        assert_eq!(simd::exp_sub(out.as_mut(), 0.5).to_bits(), total.to_bits());
        let exact: f64 = a.as_slice().iter().map(|x| (f64::from(*x) - 0.5).exp()).sum();
        assert!((f64::from(total) - exact).abs() <= 1e-5 * exact, "{total}, not {exact}");
        let (expected, bound) = sum(a.as_slice().iter().copied().zip(b.as_slice().iter().copied()));
        assert!((f64::from(simd::dot(a.as_slice(), b.as_slice())) - expected).abs() <= bound);
        simd::scale(out.as_mut(), 0.5);
        simd::axpy(out.as_mut(), 2.0, b.as_slice());
        simd::swiglu(out.as_mut(), a.as_slice(), b.as_slice());
        simd::swiglu_grad(out.as_mut(), other.as_mut(), [&a, &b, &c].map(Guarded::as_slice));
        simd::softmax_grad(out.as_mut(), b.as_slice(), other.as_mut(), [0.1, 0.2, 0.3]);
        assert!([&a, &b, &c].into_iter().chain(&outs).all(Guarded::is_clean), "{side:?}, {len}");
        check_single_rows(len, side);
    }
}

/// Attention of one row over `count` keys, as in generation.
fn check_single_rows(count: usize, side: Side) {
    let width = 1 + count % 7;
    let query = guarded(1, width, side);
    let tile = guarded(2, width * rows::TILE, side);
    let mut scores = [[f32::NAN; rows::TILE]; 1];
    rows::scores(&mut scores, query.as_slice(), &[tile.as_slice()], 0.5, &mut Default::default());
    for (i, score) in scores[0].iter().enumerate() {
        let keys = tile.as_slice().iter().skip(i).step_by(rows::TILE);
        let (expected, bound) = sum(query.as_slice().iter().copied().zip(keys.copied()));
        assert!((f64::from(*score) - 0.5 * expected).abs() <= bound);
    }
    let (weights, values) = (guarded(4, count, side), guarded(5, count * width, side));
    let mut out = guarded(6, width, side);
    let mut mixture = rows::Mixture::new(out.as_mut(), width);
    mixture.add(weights.as_slice(), count, values.as_slice());
    mixture.finish();
    for (i, value) in out.as_slice().iter().enumerate() {
        let column = values.as_slice().iter().skip(i).step_by(width).copied();
        let (expected, bound) = sum(weights.as_slice().iter().copied().zip(column));
        assert!((f64::from(*value) - expected).abs() <= bound);
    }
    assert!([&query, &tile, &weights, &values, &out].into_iter().all(Guarded::is_clean));
}

/// Both passes of attention on trees whose segments end within query tiles, at guard pages and elsewhere.
#[test]
fn attention_stays_within_its_buffers() {
    let response = |len: usize| (vec![0; len], vec![Role::Content; len]);
    let trees = [
        Tree::siblings(vec![0; 7], vec![response(65), response(3)], 0),
        Tree::sequence(vec![0; 70], vec![Role::Content; 70], 1),
    ];
    let plan = AttentionPlan::new(&Forest::pack(&trees).unwrap());
    let (heads, groups, width) = (4, 2, 6);
    let [q_len, kv_len] = [heads, groups].map(|heads| plan.tokens * heads * width);
    let run = |q: &[f32], k: &[f32], v: &[f32], d_out: &[f32]| {
        let inputs = Inputs { plan: &plan, heads, groups, width, q, k, v };
        let (out, log_sum_exp) = attention::forward(&inputs);
        let grads = attention::backward(&inputs, &log_sum_exp, &out, d_out);
        (out, log_sum_exp, grads)
    };
    let plain = [q_len, kv_len, kv_len, q_len];
    let plain: Vec<Vec<f32>> = (0_u64..).zip(plain).map(|(i, len)| random(i, len)).collect();
    let expected = run(&plain[0], &plain[1], &plain[2], &plain[3]);
    for side in Side::BOTH {
        let [q, k, v, d_out] = [0, 1, 2, 3].map(|index| Guarded::new(&plain[index], side));
        let found = run(q.as_slice(), k.as_slice(), v.as_slice(), d_out.as_slice());
        assert!(found == expected, "{side:?}");
        assert!([&q, &k, &v, &d_out].into_iter().all(Guarded::is_clean), "{side:?}");
    }
}
