//! The divergence from an anchor, and its gradient combined with that of the targets.

use candle_core::{DType, Device, Tensor};
use half::bf16;

use super::super::host::{
    Guarded, Kernels, Manner, Number, assert_close, assert_within, manners, narrow, random, wide,
};
use super::{Batch, Beside, FILE, Onto, Other, SHAPES, assert_logs, blank, gradient};
use crate::data::forest::Target;
use crate::data::tree::Role;
use crate::ops::head::{self, Anchor, Asked, Detail, Slopes};

/// The same rows by another model, and a slope for each target's divergence.
struct Frozen<T> {
    logits: Vec<T>,
    slopes: Vec<f32>,
}

impl<T: Number> Frozen<T> {
    fn new(case: &Batch<T>) -> Self {
        let logits: Vec<f32> =
            random::<f32>(7, case.logits.len()).iter().map(|x| 1.5 * x - 1.0).collect();
        let slopes = (0..case.ids.len()).map(|n| (n as f32 * 0.9).cos() + 0.2).collect();
        Self { logits: narrow(&logits), slopes }
    }

    /// The divergence of each row, and the gradient of its logits with that of the targets, on the CPU.
    fn on_cpu(&self, case: &Batch<T>) -> (Vec<f32>, Vec<f32>) {
        let tensor = |values: &[T]| {
            Tensor::from_vec(wide(values), (case.rows, case.vocab), &Device::Cpu).unwrap()
        };
        let weight = Tensor::eye(case.vocab, DType::F32, &Device::Cpu).unwrap();
        let target = |row: usize, n: u32| Target {
            row: row as u32,
            id: case.ids[n as usize],
            leaf: 0,
            role: Role::Content,
        };
        let targets: Vec<Target> = (0..case.rows)
            .flat_map(|row| (case.starts[row]..case.starts[row + 1]).map(move |n| target(row, n)))
            .collect();
        let anchor = Anchor {
            hidden: tensor(&self.logits),
            weight: weight.clone(),
            slopes: self.slopes.clone(),
        };
        let slopes = Slopes { d_logps: &case.d_logps, mean_logp: 0.0, squared_lse: 0.0 };
        let asked = Asked { detail: Detail::Rows, d_weight: false, anchor: Some(&anchor) };
        let out = head::backward(&tensor(&case.logits), &weight, &targets, slopes, asked).unwrap();
        let rows = out.readings.wait().unwrap().rows;
        let apart = case.starts[..case.rows].iter().map(|&n| rows[n as usize].divergence);
        (apart.collect(), out.d_hidden.flatten_all().unwrap().to_vec1().unwrap())
    }

    /// Runs the kernel; returns the divergences and the buffers for the gradient kernel.
    fn diverge(&self, case: &Batch<T>, slopes: bool, manner: Manner) -> (Vec<f32>, Beside<T>) {
        let (logits, starts) =
            (Guarded::new(&case.logits, manner.side), Guarded::new(&case.starts, manner.side));
        let mut less = Guarded::new(&self.logits, manner.side);
        let log_sums = Guarded::new(&case.log_sums(), manner.side);
        let of_targets = Guarded::new(&self.slopes, manner.side);
        let (mut values, mut factors) =
            (blank::<f32>(case.rows, manner), blank::<f32>(case.rows * 2, manner));
        let entry = format!("head_anchor_{}", T::NAME);
        let call = Kernels::of(FILE).call(&entry, [case.rows as u32, 1, 1], manner);
        let call = call.input(&logits).output(&mut less).arg(case.vocab as u64).input(&starts);
        let call = call.input(&log_sums);
        let call = if slopes { call.input(&of_targets) } else { call.null() };
        call.output(&mut values).output(&mut factors).run();
        assert!(less.is_clean() && values.is_clean() && factors.is_clean(), "{manner:?}");
        let beside =
            Beside { less: less.as_slice().to_vec(), factors: factors.as_slice().to_vec() };
        (values.as_slice().to_vec(), beside)
    }
}

fn divergences_match<T: Number>(shape: (usize, usize)) {
    let case = Batch::<T>::new(shape);
    let frozen = Frozen::new(&case);
    let (apart, d_logits) = frozen.on_cpu(&case);
    let (logps, _, _) = case.on_cpu(0.0, 0.0);
    let log_sums = case.log_sums();
    for (at, manner) in manners(&[32, 128, 1024]).into_iter().enumerate() {
        let what = format!("head_anchor {} {shape:?} {manner:?}", T::NAME);
        let (read, _) = frozen.diverge(&case, false, manner);
        assert_logs(&what, &read, &apart);
        let (values, beside) = frozen.diverge(&case, true, manner);
        assert_eq!(values, read, "{what}");
        let read = (logps.as_slice(), log_sums.as_slice());
        let into = [Onto::Place, Onto::Beside, Onto::Bf16][at % 3];
        if matches!(into, Onto::Bf16) && T::NAME != "f32" {
            continue;
        }
        let how = (into, [16, 16384][at % 2], manner);
        let (found, narrower) = gradient(&case, read, (0.0, 0.0), Other::Anchor(&beside), how);
        if matches!(into, Onto::Bf16) {
            assert_close(&format!("{what} gradient in bf16"), &narrower, &d_logits);
        } else {
            // What the anchor takes off is rounded by itself, and may be larger than what is left.
            let tolerance = if T::NAME == "f32" { 1e-5 } else { 4.0 * T::ROUNDING };
            assert_within(&format!("{what} gradient"), &found, &d_logits, tolerance);
        }
    }
}

#[test]
fn divergences_from_an_anchor_match_the_cpu() {
    for shape in SHAPES {
        divergences_match::<f32>(shape);
        divergences_match::<bf16>(shape);
    }
}
