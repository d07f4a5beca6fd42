//! Steps after the head: top tokens, sums over sequences, and pairs of sequences.

use half::bf16;

use super::super::host::{
    Guarded, Kernels, Manner, Number, assert_close, each_block, random, record, wide,
};
use super::{Batch, FILE, blank};
use crate::data::forest::Target;
use crate::data::tree::Role;
use crate::ops::head::{MarginLoss, PairTerm, Pairs, Placed, Rows};

fn top_tokens_are_the_likeliest<T: Number>(turn: usize, shape: (usize, usize), k: usize) {
    let mut case = Batch::<T>::new(shape);
    // Equal logits, ordered by id.
    for at in (0..case.logits.len()).step_by(3) {
        case.logits[at] = T::narrow((at % 7) as f32);
    }
    let log_sums = case.log_sums();
    // All rows, or every other row in reverse.
    let which: Option<Vec<u32>> =
        (turn % 2 == 1).then(|| (0..case.rows as u32).rev().step_by(2).collect());
    let rows = which.clone().unwrap_or_else(|| (0..case.rows as u32).collect());
    let (mut ids, mut logps, all) = (Vec::new(), Vec::new(), wide(&case.logits));
    for row in rows.iter().map(|&row| row as usize) {
        let logits = &all[row * case.vocab..][..case.vocab];
        let mut order: Vec<usize> = (0..case.vocab).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        for at in 0..k {
            let id = order.get(at).copied();
            ids.push(id.map_or(u32::MAX, |id| id as u32));
            logps.push(id.map_or(f32::NEG_INFINITY, |id| logits[id] - log_sums[row]));
        }
    }
    for manner in each_block(turn) {
        let logits = Guarded::new(&case.logits, manner.side);
        let sums = Guarded::new(&log_sums, manner.side);
        let mut found = Guarded::new(&vec![0_u32; ids.len()], manner.side);
        let mut values = blank::<f32>(ids.len(), manner);
        let entry = format!("head_top_{}", T::NAME);
        let which = which.as_ref().map(|which| Guarded::new(which, manner.side));
        let call = Kernels::of(FILE).call(&entry, [rows.len() as u32, 1, 1], manner);
        let call = call.input(&logits).arg(case.vocab as u64).arg(k as u32);
        let call = match &which {
            Some(which) => call.input(which),
            None => call.null(),
        };
        let call = call.input(&sums);
        call.output(&mut found).output(&mut values).run();
        assert_eq!(found.as_slice(), ids, "{shape:?} {k} {manner:?}");
        assert_close(&format!("{entry} {shape:?} {k} {manner:?}"), values.as_slice(), &logps);
        assert!(found.is_clean() && values.is_clean(), "{manner:?}");
    }
}

#[test]
fn the_likeliest_tokens_are_found_in_order() {
    let shapes = [((1, 1), 1), ((3, 7), 9), ((2, 33), 5), ((2, 1048), 8)];
    for (turn, (shape, k)) in shapes.into_iter().enumerate() {
        top_tokens_are_the_likeliest::<f32>(turn, shape, k);
        top_tokens_are_the_likeliest::<bf16>(turn, shape, k);
    }
}

#[track_caller]
fn assert_exact(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let mut worst = 0.0_f64;
    for (found, expected) in found.iter().zip(expected) {
        let error = (found - expected).abs() / (1.0 + expected.abs());
        assert!(error <= tolerance, "{what}: {found}, expected {expected}");
        worst = worst.max(error);
    }
    record(what, "f64", worst as f32, tolerance as f32);
}

/// Double-precision zeros.
fn zeros(len: usize, manner: Manner) -> Guarded<f64> {
    Guarded::new(&vec![0.0; len], manner.side)
}

/// Sequences of these lengths, with scattered values.
fn check_sums(lengths: &[usize], manner: Manner) {
    let count: usize = lengths.iter().sum();
    let values = random::<f32>(3, count);
    let weights: Vec<f64> = (0..count).map(|at| [1.0, 0.0, 0.3][at % 3]).collect();
    let order: Vec<u32> = (0..count).map(|at| ((at * 7 + 3) % count) as u32).collect();
    let mut starts = vec![0_u32];
    let mut expected = Vec::new();
    for length in lengths {
        let first = starts[starts.len() - 1] as usize;
        starts.push((first + length) as u32);
        let own = order[first..first + length].iter().map(|&at| at as usize);
        expected.push(own.map(|at| weights[at] * f64::from(values[at])).sum());
    }
    let (values, weights) =
        (Guarded::new(&values, manner.side), Guarded::new(&weights, manner.side));
    let (order, starts) = (Guarded::new(&order, manner.side), Guarded::new(&starts, manner.side));
    let mut sums = zeros(lengths.len(), manner);
    let grid = [(lengths.len() as u32).div_ceil(manner.block / 32), 1, 1];
    let call = Kernels::of(FILE).call("sequence_sums", grid, manner);
    let call = call.input(&values).input(&weights).input(&order).input(&starts);
    call.arg(lengths.len() as u32).output(&mut sums).run();
    assert_exact(&format!("sums {manner:?}"), sums.as_slice(), &expected, 1e-12);
    assert!(sums.is_clean(), "{manner:?}");
}

/// Pairs of sequences, tree by tree.
const PAIRS: [[u32; 2]; 5] = [[0, 1], [2, 3], [2, 4], [3, 4], [6, 5]];
const TREES: [u32; 5] = [0, 1, 4, 4, 5];
const SEQUENCES: usize = 7;

/// A pairwise loss and its inputs.
struct Losses {
    kind: u32,
    beta: f64,
    smoothing: f64,
    offset: f64,
    scale: f64,
    references: Option<Vec<f64>>,
    lengths: Option<Vec<f64>>,
}

impl Losses {
    /// Loss of one pair, by definition.
    fn of_pair(&self, [better, worse]: [u32; 2], sums: &[f64]) -> f64 {
        let side = |at: u32| {
            let at = at as usize;
            let reference = self.references.as_ref().map_or(0.0, |all| all[at]);
            (sums[at] - reference) / self.lengths.as_ref().map_or(1.0, |all| all[at])
        };
        let x = self.beta * (side(better) - side(worse)) - self.offset;
        let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
        match self.kind {
            0 => (1.0 - self.smoothing) * softplus(-x) + self.smoothing * softplus(x),
            1 => (1.0 - x).max(0.0),
            _ => ((x - 0.5) / self.beta).powi(2),
        }
    }

    fn check(&self, manner: Manner) {
        let sums: Vec<f64> =
            (0..SEQUENCES).map(|at| (at as f64 * 2.3).sin() * 30.0 - 40.0).collect();
        let all = |sums: &[f64]| -> f64 { PAIRS.map(|pair| self.of_pair(pair, sums)).iter().sum() };
        let slopes: Vec<f64> = (0..SEQUENCES)
            .map(|at| {
                let moved = |h: f64| {
                    let mut sums = sums.clone();
                    sums[at] += h;
                    all(&sums)
                };
                self.scale * (moved(1e-4) - moved(-1e-4)) / 2e-4
            })
            .collect();
        let buffer = |values: &[f64]| Guarded::new(values, manner.side);
        let optional = |values: &Option<Vec<f64>>| values.as_ref().map(|values| buffer(values));
        let sums = buffer(&sums);
        let (references, lengths) = (optional(&self.references), optional(&self.lengths));
        let pairs = Guarded::new(PAIRS.as_flattened(), manner.side);
        let starts = Guarded::new(&TREES, manner.side);
        let mut d_sums = zeros(SEQUENCES, manner);
        let mut call = Kernels::of(FILE).call("pair_slopes", [1, 1, 1], manner).input(&sums);
        for given in [&references, &lengths] {
            call = match given {
                Some(given) => call.input(given),
                None => call.null(),
            };
        }
        call = call.input(&pairs).input(&starts).arg(TREES.len() as u32 - 1).arg(self.kind);
        call = call.arg(self.beta).arg(self.smoothing).arg(self.offset).arg(self.scale);
        call.output(&mut d_sums).run();
        let what = format!("kind {} {manner:?}", self.kind);
        assert_exact(&what, d_sums.as_slice(), &slopes, 1e-6);
        assert!(d_sums.is_clean(), "{what}");
    }
}

fn check_pairs(manner: Manner) {
    let numbers = |len: usize, by: f64| -> Vec<f64> {
        (0..len).map(|at| (at as f64 * by).cos().mul_add(10.0, -40.0)).collect()
    };
    for kind in 0..3 {
        for given in [false, true] {
            let lengths = (0..SEQUENCES).map(|at| (3 * at + 1) as f64).collect();
            Losses {
                kind,
                beta: 0.1,
                smoothing: if given { 0.2 } else { 0.0 },
                offset: if given { 0.6 } else { 0.0 },
                scale: 0.25,
                references: given.then(|| numbers(SEQUENCES, 1.7)),
                lengths: given.then_some(lengths),
            }
            .check(manner);
        }
    }
}

/// Gradients of sums, distributed over targets.
fn check_spread(targets: usize, manner: Manner) {
    let d_sums: Vec<f64> = (0..SEQUENCES).map(|at| (at as f64 * 0.9).sin()).collect();
    let sequence: Vec<u32> = (0..targets).map(|at| (at * 5 % SEQUENCES) as u32).collect();
    let weights: Vec<f64> = (0..targets).map(|at| [1.0, 0.4, 0.0][at % 3]).collect();
    let addends: Vec<f64> = (0..targets).map(|at| [0.0, -0.3][at % 2]).collect();
    let slope = |n: usize| (weights[n] * d_sums[sequence[n] as usize] + addends[n]) as f32;
    let expected: Vec<f32> = (0..targets).map(slope).collect();
    let [d_sums, weights, addends] =
        [&d_sums, &weights, &addends].map(|values| Guarded::new(values, manner.side));
    let sequence = Guarded::new(&sequence, manner.side);
    let mut found = blank::<f32>(targets, manner);
    let grid = [(targets as u32).div_ceil(manner.block), 1, 1];
    let call = Kernels::of(FILE).call("target_slopes", grid, manner);
    let call = call.input(&d_sums).input(&sequence).input(&weights).input(&addends);
    call.arg(targets as u32).output(&mut found).run();
    assert_close(&format!("target_slopes {targets} {manner:?}"), found.as_slice(), &expected);
    assert!(found.is_clean(), "{manner:?}");
}

#[test]
fn sums_margins_and_slopes_are_as_defined() {
    for manner in each_block(0) {
        check_sums(&[0, 1, 31, 32, 33, 201, 0], manner);
        check_sums(&[5], manner);
        check_pairs(manner);
        check_spread(1, manner);
        check_spread(1025, manner);
    }
}

/// Sequences that share rows, with targets reordered by the head: kernels on the uploaded arrays, compared with the
/// host's results.
fn check_pairs_of_a_head(manner: Manner) {
    let targets: Vec<Target> = (0..70_u32)
        .map(|n| Target { row: n * 29 % 31, id: n, leaf: n * 3 % 7, role: Role::Content })
        .collect();
    let numbers = |by: f64, base: f64| -> Vec<f64> {
        (0..SEQUENCES).map(|at| (at as f64 * by).cos() + base).collect()
    };
    let term = PairTerm {
        loss: MarginLoss::Sigmoid(0.1),
        beta: 0.4,
        offset: 0.2,
        referenced: true,
        by_length: true,
        scale: 0.3,
    };
    let ipo = PairTerm { loss: MarginLoss::Ipo, referenced: false, by_length: false, ..term };
    let pairs = Pairs {
        sequences: targets.iter().map(|target| target.leaf).collect(),
        weights: (0..targets.len()).map(|at| [1.0, 0.4, 0.0][at % 3]).collect(),
        addends: (0..targets.len()).map(|at| [0.0, -0.3][at % 2]).collect(),
        references: numbers(1.7, -12.0),
        lengths: numbers(0.6, 10.0),
        pairs: PAIRS.to_vec(),
        starts: TREES.to_vec(),
        terms: vec![term, ipo, PairTerm { loss: MarginLoss::Hinge, ..term }],
    };
    let logps = random::<f32>(5, targets.len());
    let rows = Rows::new(&targets);
    let placed = Placed::new(&pairs, &rows);
    let in_rows: Vec<f32> = rows.order.iter().map(|&(target, _)| logps[target]).collect();
    let found = slopes_by_kernels((&pairs, &placed), &in_rows, manner);
    let slopes = pairs.slopes(&logps);
    let expected: Vec<f32> = rows.order.iter().map(|&(target, _)| slopes[target]).collect();
    assert_close(&format!("pairs of a head {manner:?}"), &found, &expected);
}

/// The launches of `launch::pairs`.
fn slopes_by_kernels(
    (pairs, placed): (&Pairs, &Placed),
    logps: &[f32],
    manner: Manner,
) -> Vec<f32> {
    let long = |values: &[u32]| Guarded::new(values, manner.side);
    let wide = |values: &[f64]| Guarded::new(values, manner.side);
    let (values, weights, addends) =
        (Guarded::new(logps, manner.side), wide(&placed.weights), wide(&placed.addends));
    let (order, starts, of_targets) =
        (long(&placed.order), long(&placed.starts), long(&placed.sequences));
    let (references, lengths) = (wide(&pairs.references), wide(&pairs.lengths));
    let (both, trees) = (long(pairs.pairs.as_flattened()), long(&pairs.starts));
    let sequences = pairs.references.len();
    let (mut sums, mut d_sums) = (zeros(sequences, manner), zeros(sequences, manner));
    let grid = |count: usize, of_block: u32| [(count as u32).div_ceil(of_block), 1, 1];
    let kernels = Kernels::of(FILE);
    let call = kernels.call("sequence_sums", grid(sequences, manner.block / 32), manner);
    let call = call.input(&values).input(&weights).input(&order).input(&starts);
    call.arg(sequences as u32).output(&mut sums).run();
    for term in &pairs.terms {
        let count = pairs.starts.len() - 1;
        let call = kernels.call("pair_slopes", grid(count, manner.block), manner).input(&sums);
        let call = if term.referenced { call.input(&references) } else { call.null() };
        let call = if term.by_length { call.input(&lengths) } else { call.null() };
        let (kind, smoothing) = term.kind();
        let call = call.input(&both).input(&trees).arg(count as u32).arg(kind).arg(term.beta);
        call.arg(smoothing).arg(term.offset).arg(term.scale).output(&mut d_sums).run();
    }
    let mut found = blank::<f32>(logps.len(), manner);
    let call = kernels.call("target_slopes", grid(logps.len(), manner.block), manner);
    let call = call.input(&d_sums).input(&of_targets).input(&weights).input(&addends);
    call.arg(logps.len() as u32).output(&mut found).run();
    found.as_slice().to_vec()
}

#[test]
fn pair_slopes_match_the_host_for_any_row_order() {
    for manner in each_block(0) {
        check_pairs_of_a_head(manner);
    }
}
