//! The head's kernels on the host, compared with the head on the CPU.
//!
//! With an identity weight the head's logits are its hidden states, and d(logits) is d(hidden), so the whole CPU op
//! serves as reference for the row kernels. Divergences, and the steps after the head, are compared with their
//! definitions in double precision.

mod after;
mod anchor;
mod divergence;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use half::bf16;

use super::host::{
    BLOCKS, Guarded, Kernels, Manner, Number, Order, Side, assert_close, assert_within,
    every_mutant_is_caught, manners, narrow, random, wide,
};
use crate::data::forest::Target;
use crate::data::tree::Role;
use crate::ops::head::{self, Asked, Detail, RowStats, Slopes};

const FILE: &str = "head.cu";

/// Rows and vocabularies: one row; not a multiple of a warp; whole 16-byte loads; more than a block.
const SHAPES: [(usize, usize); 6] = [(1, 2), (3, 7), (2, 33), (3, 64), (4, 257), (3, 1048)];

/// A NaN-filled buffer.
fn blank<T: Number>(len: usize, manner: Manner) -> Guarded<T> {
    Guarded::new(&vec![T::narrow(f32::NAN); len], manner.side)
}

/// Rows of logits with targets: the first row has one, the others several, two of them for the same token.
struct Batch<T> {
    rows: usize,
    vocab: usize,
    logits: Vec<T>,
    starts: Vec<u32>,
    ids: Vec<u32>,
    d_logps: Vec<f32>,
}

impl<T: Number> Batch<T> {
    fn new((rows, vocab): (usize, usize)) -> Self {
        let logits = random::<f32>(vocab as u64, rows * vocab).into_iter().enumerate();
        // A mean away from 0, and some rows that are nearly one-hot.
        let logits: Vec<f32> = logits.map(|(at, x)| 2.0 * x + 2.0 + 9.0 * peak(at)).collect();
        let (mut starts, mut ids) = (vec![0], Vec::new());
        for row in 0..rows {
            let first = row * 31 + vocab / 2;
            ids.extend((0..=row * 40).map(|n| ((first + n / 2 * 5) % vocab) as u32));
            starts.push(ids.len() as u32);
        }
        let d_logps = (0..ids.len()).map(|n| (n as f32 * 0.7).sin() - 0.3).collect();
        Self { rows, vocab, logits: narrow(&logits), starts, ids, d_logps }
    }

    /// The CPU's results.
    fn on_cpu(&self, mean_logp: f32, squared_lse: f32) -> (Vec<f32>, Vec<RowStats>, Vec<f32>) {
        let hidden =
            Tensor::from_vec(wide(&self.logits), (self.rows, self.vocab), &Device::Cpu).unwrap();
        let weight = Tensor::eye(self.vocab, DType::F32, &Device::Cpu).unwrap();
        let mut targets = Vec::new();
        for row in 0..self.rows {
            for n in self.starts[row]..self.starts[row + 1] {
                let id = self.ids[n as usize];
                targets.push(Target { row: row as u32, id, leaf: 0, role: Role::Content });
            }
        }
        let slopes = Slopes { d_logps: &self.d_logps, mean_logp, squared_lse };
        let asked = Asked { detail: Detail::Rows, ..Asked::default() };
        let out = head::backward(&hidden, &weight, &targets, slopes, asked).unwrap();
        let readings = out.readings.wait().unwrap();
        let stats = self.starts[..self.rows].iter().map(|&n| readings.rows[n as usize]);
        let d_logits = out.d_hidden.flatten_all().unwrap().to_vec1().unwrap();
        (readings.logps.clone(), stats.collect(), d_logits)
    }

    /// Log-sum-exp of each row.
    fn log_sums(&self) -> Vec<f32> {
        wide(&self.logits).chunks(self.vocab).map(head::log_sum_exp).collect()
    }
}

/// 1 at one element in 500.
fn peak(at: usize) -> f32 {
    f32::from(u8::from(at % 500 == 123))
}

/// Checks that results are bit-identical for any thread order.
#[derive(Default)]
struct Repeats(BTreeMap<(u32, bool), Vec<u32>>);

impl Repeats {
    #[track_caller]
    fn check(&mut self, manner: Manner, found: &[f32]) {
        let bits: Vec<u32> = found.iter().map(|x| x.to_bits()).collect();
        let first = self.0.entry((manner.block, manner.side == Side::Start));
        assert_eq!(*first.or_insert_with(|| bits.clone()), bits, "{manner:?}");
    }
}

/// Asserts that logarithms are as expected to 1e-5, relative to their size if above 1, since they are differences of
/// values that large.
#[track_caller]
fn assert_logs(what: &str, found: &[f32], expected: &[f32]) {
    let squares = expected.iter().map(|x| x * x).sum::<f32>();
    let scale = (squares / expected.len().max(1) as f32).sqrt();
    assert_within(what, found, expected, 1e-5 / scale.clamp(1e-9, 1.0));
}

fn readings_are_the_cpus<T: Number>(turn: usize, shape: (usize, usize)) {
    let case = Batch::<T>::new(shape);
    let (logps, stats, _) = case.on_cpu(0.0, 0.0);
    let grid = [case.rows as u32, 1, 1];
    let mut repeats = Repeats::default();
    // Two block sizes per shape, covering all of them; every order, since the bits must not depend on it.
    let blocks = [0, 3].map(|place| BLOCKS[(turn + place) % BLOCKS.len()]);
    for manner in manners(&blocks) {
        let logits = Guarded::new(&case.logits, manner.side);
        let (starts, ids) =
            (Guarded::new(&case.starts, manner.side), Guarded::new(&case.ids, manner.side));
        for with_stats in [false, true] {
            let mut found = blank::<f32>(case.ids.len(), manner);
            let mut log_sums = blank::<f32>(case.rows, manner);
            let mut rows = blank::<f32>(case.rows * 5, manner);
            let entry = if with_stats { "head_stats" } else { "head_logps" };
            let call = Kernels::of(FILE).call(&format!("{entry}_{}", T::NAME), grid, manner);
            let call = call.input(&logits).arg(case.vocab as u64).input(&starts).input(&ids);
            let call = call.output(&mut found).output(&mut log_sums);
            if with_stats {
                call.output(&mut rows).run();
            } else {
                call.run();
            }
            let name = |what: &str| format!("{entry}_{} {what} {shape:?} {manner:?}", T::NAME);
            assert_logs(&name("logps"), found.as_slice(), &logps);
            let expected: Vec<f32> = stats.iter().map(|row| row.log_sum_exp).collect();
            assert_logs(&name("log_sums"), log_sums.as_slice(), &expected);
            assert!(found.is_clean() && log_sums.is_clean() && rows.is_clean(), "{manner:?}");
            if with_stats {
                for (at, of) in parts().into_iter().enumerate() {
                    let column: Vec<f32> =
                        rows.as_slice().iter().skip(at).step_by(5).copied().collect();
                    let expected: Vec<f32> = stats.iter().map(of).collect();
                    assert_logs(&name(&format!("stats {at}")), &column, &expected);
                }
                repeats.check(manner, rows.as_slice());
            }
        }
    }
}

/// A row's statistics, in the kernel's order.
fn parts() -> [fn(&RowStats) -> f32; 5] {
    [
        |row| row.log_sum_exp,
        |row| row.mean_logit,
        |row| row.entropy,
        |row| row.log_sum_squares,
        |row| row.best_logp,
    ]
}

#[test]
fn rows_say_what_they_say_on_the_cpu() {
    for (turn, shape) in SHAPES.into_iter().enumerate() {
        readings_are_the_cpus::<f32>(turn, shape);
        readings_are_the_cpus::<bf16>(turn, shape);
    }
}

#[test]
fn out_of_vocabulary_tokens_and_infinite_rows_have_no_log_probability() {
    let manner = Manner { block: 64, order: Order::Forward, side: Side::End };
    let mut logits = vec![1.0_f32; 3 * 70];
    logits[70..140].fill(f32::NEG_INFINITY);
    logits[140..].fill(f32::INFINITY);
    let logits = Guarded::new(&logits, manner.side);
    let starts = Guarded::new(&[0_u32, 2, 3, 4], manner.side);
    let ids = Guarded::new(&[70_u32, 69, 0, 0], manner.side);
    let (mut found, mut log_sums) = (blank::<f32>(4, manner), blank::<f32>(3, manner));
    let call = Kernels::of(FILE).call("head_logps_f32", [3, 1, 1], manner);
    let call = call.input(&logits).arg(70_u64).input(&starts).input(&ids);
    call.output(&mut found).output(&mut log_sums).run();
    let finite: Vec<bool> = found.as_slice().iter().map(|x| x.is_finite()).collect();
    assert_eq!(finite, [false, true, false, false], "{:?}", found.as_slice());
}

/// A divergence's contribution to the gradient: buffers as written by `head_kl`.
struct Teacher {
    k: u32,
    ids: Vec<u32>,
    student: Vec<f32>,
    addends: Vec<f32>,
    factors: Vec<f32>,
}

/// The same of an anchor, as written by `head_anchor`.
struct Beside<T> {
    less: Vec<T>,
    factors: Vec<f32>,
}

/// What a gradient holds beside that of the targets.
#[derive(Clone, Copy)]
enum Other<'a, T> {
    None,
    Teacher(&'a Teacher),
    Anchor(&'a Beside<T>),
}

/// Which entry: in place of the logits, beside them, or beside them in another dtype.
#[derive(Clone, Copy, Debug)]
enum Onto {
    Place,
    Beside,
    Bf16,
}

/// Runs the gradient kernel.
fn gradient<T: Number>(
    case: &Batch<T>,
    (logps, log_sums): (&[f32], &[f32]),
    (mean_logp, squared_lse): (f32, f32),
    other: Other<'_, T>,
    (into, span, manner): (Onto, u64, Manner),
) -> (Vec<T>, Vec<bf16>) {
    let input = |values: &[f32]| Guarded::new(values, manner.side);
    let whole = |values: &[u32]| Guarded::new(values, manner.side);
    let mut logits = Guarded::new(&case.logits, manner.side);
    let (starts, ids) = (whole(&case.starts), whole(&case.ids));
    let (logps, log_sums, d_logps) = (input(logps), input(log_sums), input(&case.d_logps));
    let size = case.logits.len();
    let (mut own, mut narrower) = (blank::<T>(size, manner), blank::<bf16>(size, manner));
    let entry = match into {
        Onto::Bf16 => "head_grad_f32_to_bf16".to_owned(),
        _ => format!("head_grad_{}", T::NAME),
    };
    let parts = (case.vocab as u64).div_ceil(span) as u32;
    let call = Kernels::of(FILE).call(&entry, [case.rows as u32, parts, 1], manner);
    let call = call.arg(logits.as_ptr());
    let call = match into {
        Onto::Place => call.output(&mut logits),
        Onto::Beside => call.output(&mut own),
        Onto::Bf16 => call.output(&mut narrower),
    };
    let call = call.arg(case.vocab as u64).arg(span).input(&log_sums).input(&starts).input(&ids);
    let call = call.input(&logps).input(&d_logps).arg(mean_logp).arg(squared_lse);
    match other {
        Other::None => call.null().null().null().null().arg(0_u32).null().run(),
        Other::Anchor(Beside { less, factors }) => {
            let (less, factors) = (Guarded::new(less, manner.side), input(factors));
            call.null().null().null().input(&factors).arg(0_u32).input(&less).run();
        }
        Other::Teacher(teacher) => {
            let ids = whole(&teacher.ids);
            let buffers = [&teacher.student, &teacher.addends, &teacher.factors];
            let buffers = buffers.map(|values| input(values));
            let [student, addends, factors] = &buffers;
            let call = call.input(&ids).input(student).input(addends).input(factors);
            call.arg(teacher.k).null().run();
        }
    }
    assert!(logits.is_clean() && own.is_clean() && narrower.is_clean(), "{manner:?}");
    let out = if matches!(into, Onto::Place) { logits } else { own };
    (out.as_slice().to_vec(), narrower.as_slice().to_vec())
}

fn gradients_are_the_cpus<T: Number>(shape: (usize, usize)) {
    let case = Batch::<T>::new(shape);
    let log_sums = case.log_sums();
    let rounds = [(0.0, 0.0), (0.25, 0.0), (0.0, -0.5), (0.3, 0.02)];
    for (round, slopes) in rounds.into_iter().enumerate() {
        let (logps, _, d_logits) = case.on_cpu(slopes.0, slopes.1);
        let mut repeats = Repeats::default();
        // Some block sizes in each round, covering all of them.
        let blocks = [BLOCKS[round], BLOCKS[(round + 3) % BLOCKS.len()]];
        for (at, manner) in manners(&blocks).into_iter().enumerate() {
            let into = [Onto::Place, Onto::Beside][(at / 2 + round) % 2];
            let span = [64, 16384, 8][(at + round) % 3];
            let read = (logps.as_slice(), log_sums.as_slice());
            let (found, _) = gradient(&case, read, slopes, Other::None, (into, span, manner));
            let what = format!("head_grad {shape:?} {slopes:?} {into:?} {span} {manner:?}");
            assert_close(&what, &found, &d_logits);
            repeats.check(manner, &wide(&found));
            if T::NAME == "f32" {
                let how = (Onto::Bf16, span, manner);
                let (_, found) = gradient(&case, read, slopes, Other::None, how);
                assert_close(&format!("{what} to bf16"), &found, &d_logits);
            }
        }
    }
}

#[test]
fn gradients_are_what_they_are_on_the_cpu() {
    for shape in SHAPES {
        gradients_are_the_cpus::<f32>(shape);
        gradients_are_the_cpus::<bf16>(shape);
    }
}

#[test]
fn a_row_without_targets_has_no_gradient() {
    let mut case = Batch::<f32>::new((2, 40));
    (case.starts, case.ids, case.d_logps) = (vec![0, 0, 0], Vec::new(), Vec::new());
    let manner = Manner { block: 32, order: Order::Forward, side: Side::End };
    let log_sums = case.log_sums();
    let how = (Onto::Place, 64, manner);
    let (found, _) = gradient(&case, (&[], &log_sums), (0.3, 0.1), Other::None, how);
    assert!(found.iter().all(|d| *d == 0.0), "{found:?}");
}

fn caught(test: &str, mutants: &[(&str, &str)]) {
    every_mutant_is_caught(FILE, &format!("ops::cuda::tests::head::{test}"), mutants);
}

#[test]
fn wrong_row_kernels_are_caught() {
    caught(
        "rows_say_what_they_say_on_the_cpu",
        &[
            // Each warp on its own.
            (
                "block_reduce(own_sums<T, STATS>(x, vocab), no_sums(), Merge<STATS>())",
                "warp_reduce(own_sums<T, STATS>(x, vocab), Merge<STATS>())",
            ),
            // A wrong distance.
            ("shuffle_xor(s.sum, distance)", "shuffle_xor(s.sum, distance / 2)"),
            // Another row; one row less.
            (
                "logits + row * vocab;\n  const Sums s",
                "logits + (row ^ 1) * vocab;\n  const Sums s",
            ),
            ("float *out = stats + row * 5", "float *out = stats + row * 4"),
            // Sums not rescaled to the new maximum.
            ("  s.sum *= factor;", ""),
            ("s.squares *= factor * factor", "s.squares *= factor"),
            ("s.first + s.sum * fmaxf(below, -1e30f)", "s.first"),
            (
                "starts[row + 1]; n += blockDim.x)\n    logps",
                "starts[row + 1] - 1; n += blockDim.x)\n    logps",
            ),
        ],
    );
    caught(
        "gradients_are_what_they_are_on_the_cpu",
        &[
            // Some threads still write values that others then overwrite.
            ("  __syncthreads();\n  for (u32 n = first", "  for (u32 n = first"),
            ("start + span < vocab ? start + span : vocab", "start + span"),
            ("blockIdx.y * span", "0"),
            ("- t.mean_logp + 2.f", "+ t.mean_logp + 2.f"),
            (
                "float factor = outer, sum = slope_of(t, row, id, found)",
                "float factor = outer, sum = t.d_logps[n]",
            ),
            ("load_pack(x + at + i * IN)", "load_pack(x + at)"),
        ],
    );
}

#[test]
fn wrong_teacher_and_pair_kernels_are_caught() {
    caught(
        "divergence::divergences_and_their_gradients_are_as_defined",
        &[
            ("own + d.factors[row * 2 + 1]", "own + d.factors[row * 2]"),
            ("if (!found) out[id]", "out[id]"),
            ("if (!among(ids, k, u32(at)))", "if (ids[0] != at)"),
            ("mean = block_sum(mean)", "mean = warp_sum(mean)"),
            ("mean += reverse ? p * rest : -q;", ""),
        ],
    );
    caught(
        "anchor::divergences_from_an_anchor_match_the_cpu",
        &[
            ("own_sums<T, false>(a, vocab)", "own_sums<T, false>(x, vocab)"),
            ("slope += slopes[n]", "slope = slopes[n]"),
            (
                "sum = block_sum(sum);\n  if (threadIdx.x != 0) return;\n  divergences",
                "sum = warp_sum(sum);\n  if (threadIdx.x != 0) return;\n  divergences",
            ),
            ("from_f32<T>(slope * q)", "from_f32<T>(q)"),
            ("factors[row * 2 + 1] = slope;", "factors[row * 2 + 1] = 0.f;"),
            ("anchor + row * vocab : nullptr", "anchor : nullptr"),
            ("+ sum - less_at(less, id)", "+ sum"),
            ("- less_at(less, at + i)", "- less_at(less, at)"),
        ],
    );
    caught(
        "after::the_likeliest_tokens_are_found_in_order",
        &[
            ("a.id < b.id", "a.id > b.id"),
            ("block_reduce(own, Best{LOWEST, NO_ID}, First())", "warp_reduce(own, First())"),
            ("      any = true;", ""),
            ("which ? which[blockIdx.x] : blockIdx.x", "blockIdx.x"),
            ("ids[blockIdx.x * k + i]", "ids[row * k + i]"),
        ],
    );
    caught(
        "after::sums_margins_and_slopes_are_as_defined",
        &[
            ("sum = warp_reduce(sum, Add())", "sum = sum"),
            ("blockIdx.x * warp_count() + warp_id()", "blockIdx.x + warp_id()"),
            ("d_sums[worse] -= scale", "d_sums[worse] = -scale"),
            ("if (tree >= trees)", "if (tree > trees)"),
            ("if (n < targets)", "if (n <= targets)"),
            ("+ addends[n]", ""),
            ("of_low) - offset", "of_low)"),
        ],
    );
}
