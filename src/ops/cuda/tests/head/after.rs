//! What follows the head: the likeliest tokens, sums over sequences, and pairs of them.

use half::bf16;

use super::super::host::{
    Guarded, Kernels, Manner, Number, assert_close, each_block, random, wide,
};
use super::{Batch, FILE, blank};

fn top_tokens_are_the_likeliest<T: Number>(turn: usize, shape: (usize, usize), k: usize) {
    let mut case = Batch::<T>::new(shape);
    // Equal logits, which stand in the order of their ids.
    for at in (0..case.logits.len()).step_by(3) {
        case.logits[at] = T::narrow((at % 7) as f32);
    }
    let log_sums = case.log_sums();
    let (mut ids, mut logps) = (Vec::new(), Vec::new());
    for (row, logits) in wide(&case.logits).chunks(case.vocab).enumerate() {
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
        let call = Kernels::of(FILE).call(&entry, [case.rows as u32, 1, 1], manner);
        let call = call.input(&logits).arg(case.vocab as u64).arg(k as u32).input(&sums);
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
    for (found, expected) in found.iter().zip(expected) {
        let bound = tolerance * (1.0 + expected.abs());
        assert!((found - expected).abs() <= bound, "{what}: {found}, expected {expected}");
    }
}

/// Zeros in double precision.
fn zeros(len: usize, manner: Manner) -> Guarded<f64> {
    Guarded::new(&vec![0.0; len], manner.side)
}

/// Sequences of these lengths, whose values lie scattered.
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
    assert_exact(&format!("{manner:?}"), sums.as_slice(), &expected, 1e-12);
    assert!(sums.is_clean(), "{manner:?}");
}

/// Pairs of sequences, tree by tree.
const PAIRS: [[u32; 2]; 5] = [[0, 1], [2, 3], [2, 4], [3, 4], [6, 5]];
const TREES: [u32; 5] = [0, 1, 4, 4, 5];
const SEQUENCES: usize = 7;

/// What is lost by pairs, and what that depends on.
struct Losses {
    kind: u32,
    beta: f64,
    smoothing: f64,
    scale: f64,
    references: Option<Vec<f64>>,
    lengths: Option<Vec<f64>>,
    margins: Option<Vec<f64>>,
}

impl Losses {
    /// The gap and the loss of one pair, by their definitions.
    fn of_pair(&self, pair: usize, sums: &[f64]) -> (f64, f64) {
        let side = |at: u32| {
            let at = at as usize;
            let reference = self.references.as_ref().map_or(0.0, |all| all[at]);
            (sums[at] - reference) / self.lengths.as_ref().map_or(1.0, |all| all[at])
        };
        let [better, worse] = PAIRS[pair];
        let gap = self.beta * (side(better) - side(worse));
        let x = gap - self.margins.as_ref().map_or(0.0, |all| all[pair]);
        let softplus = |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p();
        let loss = match self.kind {
            0 => (1.0 - self.smoothing) * softplus(-x) + self.smoothing * softplus(x),
            1 => (1.0 - x).max(0.0),
            _ => ((x - 0.5) / self.beta).powi(2),
        };
        (gap, loss)
    }

    fn check(&self, manner: Manner) {
        let sums: Vec<f64> =
            (0..SEQUENCES).map(|at| (at as f64 * 2.3).sin() * 30.0 - 40.0).collect();
        let all = |sums: &[f64]| (0..PAIRS.len()).map(|pair| self.of_pair(pair, sums)).collect();
        let both: Vec<(f64, f64)> = all(&sums);
        let slopes: Vec<f64> = (0..SEQUENCES)
            .map(|at| {
                let moved = |h: f64| {
                    let mut sums = sums.clone();
                    sums[at] += h;
                    let both: Vec<(f64, f64)> = all(&sums);
                    both.iter().map(|(_, loss)| loss).sum::<f64>()
                };
                self.scale * (moved(1e-4) - moved(-1e-4)) / 2e-4
            })
            .collect();
        let buffer = |values: &[f64]| Guarded::new(values, manner.side);
        let optional = |values: &Option<Vec<f64>>| values.as_ref().map(|values| buffer(values));
        let (sums, margins) = (buffer(&sums), optional(&self.margins));
        let (references, lengths) = (optional(&self.references), optional(&self.lengths));
        let pairs = Guarded::new(PAIRS.as_flattened(), manner.side);
        let starts = Guarded::new(&TREES, manner.side);
        let [mut losses, mut gaps] = [(); 2].map(|()| zeros(PAIRS.len(), manner));
        let mut d_sums = zeros(SEQUENCES, manner);
        let mut call = Kernels::of(FILE).call("pair_losses", [1, 1, 1], manner).input(&sums);
        for given in [&references, &lengths] {
            call = match given {
                Some(given) => call.input(given),
                None => call.null(),
            };
        }
        call = call.input(&pairs);
        call = match &margins {
            Some(margins) => call.input(margins),
            None => call.null(),
        };
        call = call.input(&starts).arg(TREES.len() as u32 - 1).arg(self.kind);
        call = call.arg(self.beta).arg(self.smoothing).arg(self.scale);
        call.output(&mut losses).output(&mut gaps).output(&mut d_sums).run();
        let (of_gaps, of_losses): (Vec<f64>, Vec<f64>) = both.into_iter().unzip();
        let what = format!("kind {} {manner:?}", self.kind);
        assert_exact(&what, gaps.as_slice(), &of_gaps, 1e-12);
        assert_exact(&what, losses.as_slice(), &of_losses, 1e-12);
        assert_exact(&what, d_sums.as_slice(), &slopes, 1e-6);
        assert!([losses, gaps, d_sums].iter().all(Guarded::is_clean), "{what}");
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
                scale: 0.25,
                references: given.then(|| numbers(SEQUENCES, 1.7)),
                lengths: given.then_some(lengths),
                margins: given.then(|| (0..PAIRS.len()).map(|at| 0.3 * at as f64).collect()),
            }
            .check(manner);
        }
    }
}

/// Slopes of sums, spread over targets.
fn check_spread(targets: usize, manner: Manner) {
    let d_sums: Vec<f64> = (0..SEQUENCES).map(|at| (at as f64 * 0.9).sin()).collect();
    let sequence: Vec<u32> = (0..targets).map(|at| (at * 5 % SEQUENCES) as u32).collect();
    let weights: Vec<f64> = (0..targets).map(|at| [1.0, 0.4, 0.0][at % 3]).collect();
    let slope = |(&s, weight): (&u32, &f64)| (weight * d_sums[s as usize]) as f32;
    let expected: Vec<f32> = sequence.iter().zip(&weights).map(slope).collect();
    let (d_sums, weights) =
        (Guarded::new(&d_sums, manner.side), Guarded::new(&weights, manner.side));
    let sequence = Guarded::new(&sequence, manner.side);
    let mut found = blank::<f32>(targets, manner);
    let grid = [(targets as u32).div_ceil(manner.block), 1, 1];
    let call = Kernels::of(FILE).call("target_slopes", grid, manner);
    let call = call.input(&d_sums).input(&sequence).input(&weights).arg(targets as u32);
    call.output(&mut found).run();
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
