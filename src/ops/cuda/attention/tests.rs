//! Attention's kernels on the host, compared with the definition (including the kernels' rounding), with the plain form
//! and its gradients, and with the CPU's log-sum-exps.

use half::bf16;

use super::case::{Case, FILE, Heads, Results, Trees, plan};
use super::{Kernel, Lists, OWN, THREADS};
use crate::data::forest::Forest;
use crate::ops::AttentionPlan;
use crate::ops::cuda::tests::host::{
    Guarded, Manner, Number, assert_close, assert_within, each_block, every_mutant_is_caught,
    every_mutant_within_is_caught, manners, wide,
};

/// Nested branches, spans of one token, and a second and third tree.
const BRANCHES: Trees<'_> = &[
    &[(None, 4), (Some(0), 3), (Some(1), 2), (Some(1), 1), (Some(0), 6)],
    &[(None, 33)],
    &[(None, 1)],
];
/// A shared prompt with answers ending within, at and after the end of a tile.
const ANSWERS: Trees<'_> = &[&[(None, 37), (Some(0), 64), (Some(0), 65)], &[(None, 16)]];
/// An empty prompt, and one of a single token.
const EMPTY: Trees<'_> = &[&[(None, 0), (Some(0), 3), (Some(0), 2)], &[(None, 1), (Some(0), 5)]];
/// Several tiles of keys and of queries, nested.
const LONG: Trees<'_> = &[&[(None, 150), (Some(0), 70), (Some(1), 131)]];

fn bits<T: Number>(found: &Results<T>) -> Vec<u32> {
    let Results { out, log_sums, d_q, d_k, d_v } = found;
    let of_type = [out, d_q, d_k, d_v].into_iter().flatten().map(|x| x.wide().to_bits());
    of_type.chain(log_sums.iter().map(|x| x.to_bits())).collect()
}

/// Threads of each warp scheduled first, last and at random, at either end of the buffers.
fn all_manners() -> Vec<Manner> {
    manners(&[THREADS])
}

/// Each order once.
fn each_order() -> Vec<Manner> {
    [0, 3, 5].map(|at| all_manners()[at]).to_vec()
}

/// In bf16 a weight near a rounding midpoint may round either way.
#[track_caller]
fn is_by_definition<T: Number>(trees: Trees<'_>, heads: Heads, manners: &[Manner]) {
    let case = Case::<T>::new(trees, heads);
    let expected = case.by_definition();
    let tolerance = if size_of::<T>() == 2 { 5e-3 } else { 1e-5 };
    let mut first = None;
    for &manner in manners {
        let found = case.on_kernels(manner);
        let what = |what: &str| format!("attention {what} {heads:?} {manner:?}");
        assert_within(&what("out"), &found.out, &expected.out, tolerance);
        assert_close(&what("log_sums"), &found.log_sums, &expected.log_sums);
        assert_within(&what("d_q"), &found.d_q, &expected.d_q, tolerance);
        assert_within(&what("d_k"), &found.d_k, &expected.d_k, tolerance);
        assert_within(&what("d_v"), &found.d_v, &expected.d_v, tolerance);
        let bits = bits(&found);
        assert_eq!(*first.get_or_insert_with(|| bits.clone()), bits, "{manner:?}");
    }
}

fn all_shapes<T: Number>() {
    is_by_definition::<T>(BRANCHES, (6, 2, 32), &all_manners());
    is_by_definition::<T>(EMPTY, (2, 2, 64), &all_manners());
    is_by_definition::<T>(ANSWERS, (4, 2, 32), &each_order());
    is_by_definition::<T>(ANSWERS, (1, 1, 64), &each_order());
    is_by_definition::<T>(LONG, (1, 1, 32), &each_order());
    // Seven query heads per key head: no tile except the first starts at a token's first head.
    is_by_definition::<T>(BRANCHES, (14, 2, 32), &each_order());
    is_by_definition::<T>(BRANCHES, (3, 1, 96), &each_order());
    is_by_definition::<T>(BRANCHES, (8, 2, 128), &each_order());
}

#[test]
fn f32_attention_matches_its_definition() {
    all_shapes::<f32>();
}

#[test]
fn bf16_attention_matches_its_definition_with_rounded_weights() {
    all_shapes::<bf16>();
}

fn agrees_with_candle<T: Number>(trees: Trees<'_>, heads: Heads) {
    let case = Case::<T>::new(trees, heads);
    let (expected, found) = (case.on_candle(), case.on_kernels(each_order()[1]));
    assert_close("log_sums", &found.log_sums, &expected.log_sums);
    for (what, found, expected) in [
        ("out", &found.out, &expected.out),
        ("d_q", &found.d_q, &expected.d_q),
        ("d_k", &found.d_k, &expected.d_k),
        ("d_v", &found.d_v, &expected.d_v),
    ] {
        // Gradients of scores are differences of two sums over the head dimension, and Candle's sums round differently.
        if size_of::<T>() == 4 {
            assert_within(what, found, expected, 3e-5);
        }
        // Compared as a whole: single bf16 values carry the rounding errors of cancelling weights.
        let square = |x: f64| x * x;
        let pairs = found.iter().zip(expected);
        let apart: f64 = pairs.map(|(a, &b)| square(f64::from(a.wide() - b))).sum();
        let size: f64 = expected.iter().map(|&x| square(f64::from(x))).sum();
        let (error, bound) = ((apart / size).sqrt(), if size_of::<T>() == 4 { 2e-6 } else { 4e-3 });
        assert!(error < bound, "{what} of {heads:?} in {}: {error}", T::NAME);
    }
}

#[test]
fn attention_agrees_with_the_plain_form_and_its_gradients() {
    for (trees, heads) in [
        (BRANCHES, (6, 2, 32)),
        (EMPTY, (2, 1, 64)),
        (ANSWERS, (4, 2, 32)),
        (LONG, (2, 1, 32)),
        (BRANCHES, (2, 2, 96)),
        (BRANCHES, (4, 2, 128)),
    ] {
        agrees_with_candle::<f32>(trees, heads);
        agrees_with_candle::<bf16>(trees, heads);
    }
}

#[test]
fn single_token_attends_only_to_itself() {
    let case = Case::<f32>::new(&[&[(None, 1)]], (2, 2, 32));
    let found = case.on_kernels(all_manners()[0]);
    assert_eq!(found.out, case.v);
    assert_eq!(found.d_v, case.d_out);
    let d = found.d_q.iter().chain(&found.d_k).fold(0.0_f32, |most, d| most.max(d.abs()));
    assert!(d < 1e-5, "{d}");
}

/// The row rule: a query's result depends only on its path, bit for bit.
fn neighbours_do_not_matter<T: Number>() {
    let heads = (6, 2, 32);
    let long = Case::<T>::new(&[&[(None, 37), (Some(0), 50)]], heads);
    let of_long = long.on_kernels(all_manners()[0]);
    // The same sequence truncated, after another tree and beside another answer.
    let mut short =
        Case::<T>::new(&[&[(None, 9)], &[(None, 37), (Some(0), 5), (Some(0), 43)]], heads);
    for (from, to, heads) in
        [(&long.q, &mut short.q, 6), (&long.k, &mut short.k, 2), (&long.v, &mut short.v, 2)]
    {
        let row = heads * 32;
        to[9 * row..46 * row].copy_from_slice(&from[..37 * row]);
        to[51 * row..94 * row].copy_from_slice(&from[37 * row..80 * row]);
    }
    let of_short = short.on_kernels(all_manners()[0]);
    let bits = |x: &[T]| wide(x).iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let row = 6 * 32;
    assert_eq!(bits(&of_short.out[9 * row..46 * row]), bits(&of_long.out[..37 * row]));
    assert_eq!(bits(&of_short.out[51 * row..94 * row]), bits(&of_long.out[37 * row..80 * row]));
}

#[test]
fn attention_of_a_path_is_bitwise_independent_of_its_neighbours() {
    neighbours_do_not_matter::<f32>();
    neighbours_do_not_matter::<bf16>();
}

fn deltas_are_sums<T: Number>(turn: usize, (heads, groups, width): Heads, tokens: usize) {
    let trees = [(None, tokens)];
    let case = Case::<T>::new(&[&trees[..]], (heads, groups, width));
    let mut expected = vec![0.0; tokens * heads];
    let (out, d_out) = (wide(&case.q), wide(&case.d_out));
    for (at, (out, d_out)) in out.chunks(width).zip(d_out.chunks(width)).enumerate() {
        let sum: f64 = out.iter().zip(d_out).map(|(a, b)| f64::from(a * b)).sum();
        expected[case.slot(at / heads, at % heads)] = sum as f32;
    }
    for manner in each_block(turn) {
        let out = Guarded::new(&case.q, manner.side);
        let d_out = Guarded::new(&case.d_out, manner.side);
        let mut found = Guarded::new(&vec![f32::NAN; tokens * heads], manner.side);
        case.delta(&out, &d_out, &mut found, manner);
        assert_close(&format!("attention_delta {manner:?}"), found.as_slice(), &expected);
        assert!(found.is_clean(), "{manner:?}");
    }
}

#[test]
fn deltas_are_summed_over_the_head_width() {
    let shapes = [((1, 1, 1), 1), ((6, 2, 33), 5), ((3, 3, 64), 7), ((4, 1, 128), 2)];
    for (turn, (heads, tokens)) in shapes.into_iter().enumerate() {
        deltas_are_sums::<f32>(turn, heads, tokens);
        deltas_are_sums::<bf16>(turn, heads, tokens);
    }
}

/// (Query token, key) pairs in the lists, with multiplicity, by the kernels' rule.
fn pairs(plan: &AttentionPlan, lists: &Lists, share: usize, of_queries: bool) -> Vec<u32> {
    let mut seen = vec![0; plan.tokens * plan.tokens];
    for &[first, count, begin, end] in &lists.tiles {
        for row in first..first + count {
            for &[start, len] in &lists.ranges[begin as usize..end as usize] {
                for other in start..start + len {
                    let own = row as usize / if of_queries { share } else { 1 };
                    let other = other as usize;
                    let (query, key) = if of_queries { (own, other) } else { (other, own) };
                    seen[query * plan.tokens + key] += u32::from(key <= query);
                }
            }
        }
    }
    seen
}

#[test]
fn lists_hold_every_visible_pair_once_and_little_else() {
    for trees in [BRANCHES, ANSWERS, EMPTY, LONG] {
        let plan = plan(trees);
        let mut expected = vec![0; plan.tokens * plan.tokens];
        for (index, span) in plan.spans.iter().enumerate() {
            for row in span.start..span.start + span.len {
                for key in plan.ancestors(index).into_iter().flatten().chain(span.start..=row) {
                    expected[row * plan.tokens + key] = 1;
                }
            }
        }
        for share in [1, 3, 4] {
            let lists = Lists::of_queries(&plan, share);
            let of_heads: Vec<u32> = expected.iter().map(|seen| seen * share as u32).collect();
            assert_eq!(pairs(&plan, &lists, share, true), of_heads, "{trees:?}");
            // Besides these pairs, a tile covers the keys between its first and last token.
            let cells: usize = cells(&lists);
            let pairs = of_heads.iter().sum::<u32>() as usize;
            assert!(cells <= pairs + plan.tokens * share * OWN, "{trees:?}: {cells} for {pairs}");
        }
        let lists = Lists::of_keys(&plan);
        assert_eq!(pairs(&plan, &lists, 1, false), expected, "{trees:?}");
        let pairs = expected.iter().sum::<u32>() as usize;
        assert!(cells(&lists) <= pairs + plan.tokens * OWN, "{trees:?}");
    }
}

/// Rows of the lists' tiles times the tokens they cover.
fn cells(lists: &Lists) -> usize {
    let of_tile = |&[_, count, begin, end]: &[u32; 4]| -> u32 {
        count * lists.ranges[begin as usize..end as usize].iter().map(|range| range[1]).sum::<u32>()
    };
    lists.tiles.iter().map(of_tile).sum::<u32>() as usize
}

#[test]
fn longest_tiles_go_first_and_an_empty_forest_has_none() {
    let plan = plan(LONG);
    for lists in [Lists::of_queries(&plan, 2), Lists::of_keys(&plan)] {
        let tokens = lists.tiles.iter().map(|&[_, _, begin, end]| {
            lists.ranges[begin as usize..end as usize].iter().map(|range| range[1]).sum::<u32>()
        });
        assert!(tokens.is_sorted_by(|a, b| a >= b));
    }
    let empty = AttentionPlan::new(&Forest::default());
    assert!(
        Lists::of_queries(&empty, 2).tiles.is_empty() && Lists::of_keys(&empty).tiles.is_empty()
    );
}

#[test]
fn blocks_fit_the_shared_memory_of_gpus_since_sm_80() {
    for which in [Kernel::Forward, Kernel::Cached, Kernel::BackwardKeys, Kernel::BackwardQueries] {
        for (size, width) in
            [2, 4].into_iter().flat_map(|size| [32, 64, 96, 128].map(|e| (size, e)))
        {
            // 163 KiB on sm_80, 99 on sm_86 and sm_89.
            assert!(which.shared(size, width) <= 96 << 10, "{which:?} {size} {width}");
        }
    }
}

/// Target of the mutation tests: small, with a group size that is not a power of two.
#[test]
fn a_small_forest_in_both_types() {
    is_by_definition::<f32>(BRANCHES, (6, 2, 32), &each_order());
    is_by_definition::<bf16>(BRANCHES, (6, 2, 32), &each_order());
    is_by_definition::<f32>(ANSWERS, (2, 2, 32), &each_order()[1..2]);
    is_by_definition::<bf16>(ANSWERS, (2, 2, 32), &each_order()[1..2]);
}

const CHECK: &str = "ops::cuda::attention::tests::a_small_forest_in_both_types";

#[test]
fn every_mutant_of_attention_is_caught() {
    every_mutant_is_caught(
        FILE,
        CHECK,
        &[
            // Stages, and rows out of range.
            ("if (row >= tile.count) continue;", "if (row > tile.count) continue;"),
            ("row + half * 8 < tile.count)\n", "row + half * 8 <= tile.count)\n"),
            ("bool there = at < piece.count;", "bool there = at <= piece.count;"),
            ("min(left, step)};", "left > step + 1 ? step : left};"),
            // The mask.
            (">= (key + i / 2 * 8) * share;", "> (key + i / 2 * 8) * share;"),
            (
                "piece.first + piece.count <= (tile.first + own)",
                "piece.first + piece.count <= (tile.first + own + 1)",
            ),
            // Heads that share keys.
            ("      first = at->first * share, left", "      first = at->first, left"),
            (
                "(group * tokens + line / groups) * share",
                "(line / groups * groups + group) * share",
            ),
            // The gradients.
            ("(d[n][i] - of_deltas[column])", "d[n][i]"),
            ("x * (d[n][i] - delta[i / 2])", "x * d[n][i]"),
            ("tile, sum_k, {scale, scale}", "tile, sum_k, {1, 1}"),
        ],
    );
}

#[test]
fn every_mutant_of_the_shared_attention_code_is_caught() {
    let value = "b + k * 8 * O::ROW + n * 8);\n      mma_bf16(sum[n], left, {right[0], right[1]});";
    let key = "b + n * 8 * O::ROW + k);\n      mma_bf16(sum[n], left, {right[0], right[1]});";
    let other_value = value.replace("right[1]", "right[2]");
    let other_key = key.replace("right[1]", "right[2]");
    every_mutant_within_is_caught(
        "attention.cuh",
        FILE,
        CHECK,
        &[
            // Barriers, stages and copies.
            ("    __syncthreads();  // The copies", "    // The copies"),
            ("if (STAGES == 1) __syncthreads();", ""),
            ("load(after, stage ^ 1);", "load(after, stage);"),
            ("stage ^= STAGES - 1)", "stage ^= 0)"),
            (
                "    if (index < count)\n      copy_async",
                "    if (index <= count)\n      copy_async",
            ),
            // The mask.
            ("position - first + 1)", "position - first)"),
            // Heads that share keys.
            ("inverse((1 << 20) / by + 1)", "inverse((1 << 20) / by)"),
            // The softmax.
            ("x = op(x, shuffle_xor(x, 1));", "x = op(x, shuffle_xor(x, 4));"),
            ("      total[half] *= factor;\n", ""),
            // Products.
            (value, other_value.as_str()),
            (key, other_key.as_str()),
            ("lane_id() / 4 * 4 + k % 8 / 2;", "lane_id() / 4 * 4 + k % 4 / 2;"),
        ],
    );
}
