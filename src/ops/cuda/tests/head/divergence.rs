//! KL divergence from a teacher, and its gradient combined with that of the targets.

use half::bf16;

use super::super::host::{Guarded, Kernels, Manner, Number, assert_close, manners, random, wide};
use super::{Batch, FILE, Onto, Other, Teacher, blank, gradient};

/// A teacher's top tokens for some rows: ascending ids, with nine tenths of its mass.
struct Lesson {
    k: usize,
    ids: Vec<u32>,
    logqs: Vec<f32>,
    slopes: Vec<f32>,
}

impl Lesson {
    fn new(rows: usize, vocab: usize, k: usize) -> Self {
        let step = vocab / k;
        let id = |at: usize| (at % k * step + (at / k) % step) as u32;
        let mut ids: Vec<u32> = (0..rows * k).map(id).collect();
        // The last row has one token fewer.
        ids[rows * k - 1] = u32::MAX;
        let weights: Vec<f32> = random::<f32>(99, rows * k).iter().map(|x| x.exp()).collect();
        let logqs = weights.chunks(k).flat_map(|row| {
            let sum: f32 = row.iter().sum();
            row.iter().map(move |weight| (0.9 * weight / sum).ln())
        });
        let slopes = (0..rows).map(|row| 0.5 + row as f32).collect();
        Self { k, ids, logqs: logqs.collect(), slopes }
    }

    /// Divergence of one row, by definition.
    fn of_row(&self, row: usize, x: &[f64], reverse: bool, tail: bool) -> f64 {
        let term = |logp: f64, logq: f64| {
            if reverse { logp.exp() * (logp - logq) } else { logq.exp() * (logq - logp) }
        };
        let max = x.iter().copied().fold(f64::MIN, f64::max);
        let log_sum = max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
        let mut rest: Vec<bool> = vec![true; x.len()];
        let (mut sum, mut given) = (0.0, 0.0);
        for at in row * self.k..(row + 1) * self.k {
            let (id, logq) = (self.ids[at] as usize, f64::from(self.logqs[at]));
            if id < x.len() {
                rest[id] = false;
                given += logq.exp();
                sum += term(x[id] - log_sum, logq);
            }
        }
        if tail {
            let others = x.iter().zip(rest).filter(|(_, rest)| *rest);
            let mass: f64 = others.map(|(x, _)| (x - log_sum).exp()).sum();
            sum += term(mass.ln(), (1.0 - given).ln());
        }
        sum
    }
}

/// The divergence and its gradient with respect to each logit, times the row's weight, by finite differences.
fn by_definition<T: Number>(
    case: &Batch<T>,
    lesson: &Lesson,
    (reverse, tail): (bool, bool),
) -> (Vec<f32>, Vec<f32>) {
    let (mut values, mut slopes) = (Vec::new(), Vec::new());
    let all = wide(&case.logits);
    for (row, logits) in all.chunks(case.vocab).enumerate() {
        let mut x: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
        values.push(lesson.of_row(row, &x, reverse, tail) as f32);
        for at in 0..x.len() {
            let middle = x[at];
            let mut moved = |h: f64| {
                x[at] = middle + h;
                lesson.of_row(row, &x, reverse, tail)
            };
            let slope = (moved(1e-4) - moved(-1e-4)) / 2e-4;
            slopes.push(slope as f32 * lesson.slopes[row]);
            x[at] = middle;
        }
    }
    (values, slopes)
}

/// Runs the divergence kernel; returns its values and the buffers for the gradient kernel.
fn diverge<T: Number>(
    case: &Batch<T>,
    lesson: &Lesson,
    (reverse, tail): (bool, bool),
    manner: Manner,
) -> (Vec<f32>, Teacher) {
    let input = |values: &[f32]| Guarded::new(values, manner.side);
    let (logits, ids) =
        (Guarded::new(&case.logits, manner.side), Guarded::new(&lesson.ids, manner.side));
    let (logqs, slopes) = (input(&lesson.logqs), input(&lesson.slopes));
    let log_sums = input(&case.log_sums());
    let (entries, k) = (lesson.ids.len(), lesson.k as u32);
    let mut values = blank::<f32>(case.rows, manner);
    let mut factors = blank::<f32>(case.rows * 2, manner);
    let (mut student, mut addends) = (blank::<f32>(entries, manner), blank::<f32>(entries, manner));
    let entry = format!("head_kl_{}", T::NAME);
    let call = Kernels::of(FILE).call(&entry, [case.rows as u32, 1, 1], manner);
    let call = call.input(&logits).arg(case.vocab as u64).arg(k);
    let call = call.arg(u32::from(reverse)).arg(u32::from(tail)).input(&ids).input(&logqs);
    let call = call.input(&log_sums).input(&slopes).output(&mut values).output(&mut student);
    call.output(&mut addends).output(&mut factors).run();
    assert!([&values, &factors, &student, &addends].iter().all(|buffer| buffer.is_clean()));
    let taught = Teacher {
        k,
        ids: lesson.ids.clone(),
        student: student.as_slice().to_vec(),
        addends: addends.as_slice().to_vec(),
        factors: factors.as_slice().to_vec(),
    };
    (values.as_slice().to_vec(), taught)
}

fn divergences_are_as_defined<T: Number>(shape: (usize, usize), k: usize) {
    let case = Batch::<T>::new(shape);
    let lesson = Lesson::new(case.rows, case.vocab, k);
    let (logps, _, of_targets) = case.on_cpu(0.2, 0.01);
    let log_sums = case.log_sums();
    for kind in [(false, false), (false, true), (true, false), (true, true)] {
        let (values, slopes) = by_definition(&case, &lesson, kind);
        let expected: Vec<f32> = of_targets.iter().zip(&slopes).map(|(a, b)| a + b).collect();
        for manner in manners(&[32, 128, 1024]) {
            let what = format!("head_kl {shape:?} {k} {kind:?} {manner:?}");
            let (found, teacher) = diverge(&case, &lesson, kind, manner);
            assert_close(&format!("{what} values {}", T::NAME), &found, &values);
            let read = (logps.as_slice(), log_sums.as_slice());
            let how = (Onto::Place, 16, manner);
            let (found, _) = gradient(&case, read, (0.2, 0.01), Other::Teacher(&teacher), how);
            assert_close(&format!("{what} gradient"), &found, &expected);
        }
    }
}

#[test]
fn divergences_and_their_gradients_are_as_defined() {
    for (shape, k) in [((1, 7), 2), ((3, 64), 5), ((2, 129), 40)] {
        divergences_are_as_defined::<f32>(shape, k);
        divergences_are_as_defined::<bf16>(shape, k);
    }
}
