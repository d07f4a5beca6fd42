//! Compares every op on a device with the CPU, forward and backward, and steps of every kind: what
//! `arriero doctor --device cuda:0 --check` prints. Tests cannot do this without a GPU, so the program does it where
//! there is one.
//!
//! All inputs are representable in bf16. The CPU computes in f32, the device in either type; an error is the largest
//! difference relative to the largest value of the CPU's result.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Shape, Tensor};
use serde::Serialize;

use super::case::{Case, Op};
use super::{generation, steps};
use crate::data::forest::{Forest, Target};
use crate::data::tree::{Role, Tree};
use crate::model::gradients::Gradients;
use crate::model::packed::{BlockType, Packed};
use crate::ops::norm::residual_norm;
use crate::ops::unpack::{self, Unpack};
use crate::ops::{
    AttentionPlan, Rotary, attention, embed, head, linear, residual, rms_norm, rope, swiglu,
};
use crate::optim::Param;
use crate::optim::adamw::{AdamW, Hyper, is_decayed};
use crate::rng::Stream;

/// One result of one op.
#[derive(Clone, Debug, Serialize)]
pub struct Checked {
    /// The op with its shape.
    pub op: String,
    /// The type that the device computed in.
    pub dtype: &'static str,
    /// `forward`, or the input that the gradient belongs to.
    pub what: String,
    /// The largest difference, relative to the CPU's largest value.
    pub error: f64,
    /// Maximum allowed error.
    pub bound: f64,
}

impl Checked {
    /// An op that failed on the device.
    pub fn failed(op: &str, error: &candle_core::Error) -> Self {
        let what = format!("failed: {error}");
        Self { op: op.to_owned(), dtype: "–", what, error: f64::NAN, bound: 0.0 }
    }

    /// Whether the device agrees. A NaN does not.
    pub fn agrees(&self) -> bool {
        self.error <= self.bound
    }
}

const BOTH: &[DType] = &[DType::F32, DType::BF16];
/// Norms read and write the residual stream, which is f32 in any compute type.
const F32: &[DType] = &[DType::F32];

/// Runs every op on the CPU and on the device. An op that fails there counts as a result that does not agree, and the
/// check continues.
///
/// # Errors
/// Inputs that cannot be created.
pub fn run(device: &Device) -> Result<Vec<Checked>> {
    let mut all = Vec::new();
    let mut keep = |op: &str, found: Result<Vec<Checked>>| match found {
        Ok(found) => all.extend(found),
        Err(error) => all.push(Checked::failed(op, &error)),
    };
    for case in cases()? {
        keep(&case.op, case.check(device));
    }
    for dtype in BOTH {
        // A small vocabulary and, on a GPU, more rows than fit in one chunk of logits.
        for shape in [(67, 96, 5003), (4101, 32, 101)] {
            keep("head", of_the_head(device, *dtype, shape));
            keep("head beside an anchor", of_an_anchor(device, *dtype, shape));
        }
        keep("packed", of_packed(device, *dtype));
        keep("cached attention", generation::of_the_cache(device, *dtype));
        keep("adamw", of_the_optimizer(device, *dtype));
    }
    keep("adamw", of_chance(device).map(|one| vec![one]));
    keep("embed", of_the_embedding(device));
    keep("draws", generation::of_the_draws(device));
    for way in steps::ways() {
        keep(&format!("step {}", way.name), way.check(device).map_err(candle_core::Error::wrap));
    }
    Ok(all)
}

fn cases() -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    // One row; a width that is no multiple of a warp; the widths of SmolLM2-135M and of Llama 3 8B.
    for (t, d) in [(1, 7), (5, 33), (130, 576), (64, 4096)] {
        let named = |op: &str| format!("{op} {t}×{d}");
        let inputs = vec![("x", numbers(1, (t, d))?), ("weight", numbers(2, d)?)];
        let run: Op = Box::new(|x| rms_norm(&x[0], &x[1], 1e-5));
        cases.push(Case { op: named("rms_norm"), inputs, run, types: F32 });
        let pair = || -> Result<Vec<_>> {
            Ok(vec![("x", numbers(3, (t, d))?), ("y", numbers(4, (t, d))?)])
        };
        let run: Op = Box::new(|x| residual(&x[0], &x[1]));
        cases.push(Case { op: named("residual"), inputs: pair()?, run, types: F32 });
        cases.push(of_a_sum(t, d)?);
        let run: Op = Box::new(|x| swiglu(&x[0], &x[1]));
        cases.push(Case { op: named("swiglu"), inputs: pair()?, run, types: BOTH });
        let inputs = vec![("x", numbers(5, (t, d))?), ("weight", numbers(6, (96, d))?)];
        let run: Op = Box::new(|x| linear(&x[0], &x[1], None));
        cases.push(Case { op: named("linear"), inputs, run, types: BOTH });
    }
    // Query heads, key heads and head width.
    for (h, g, e) in [(2, 1, 8), (4, 2, 32), (9, 3, 64), (3, 1, 96), (8, 2, 128)] {
        cases.extend(of_heads(h, g, e)?);
    }
    Ok(cases)
}

/// The norm after a residual sum, both of which are outputs. The summands and the norm's input are f32 in any type.
fn of_a_sum(t: usize, d: usize) -> Result<Case> {
    let inputs =
        vec![("x", numbers(3, (t, d))?), ("y", numbers(4, (t, d))?), ("weight", numbers(2, d)?)];
    let run: Op = Box::new(|inputs| {
        let dtype = inputs[0].dtype();
        let wide: Vec<Tensor> =
            inputs.iter().map(|x| x.to_dtype(DType::F32)).collect::<Result<_>>()?;
        let [sum, normed] = residual_norm((&wide[0], &wide[1]), &wide[2], 1e-5, dtype)?;
        sum.to_dtype(dtype)? + normed
    });
    Ok(Case { op: format!("residual_norm {t}×{d}"), inputs, run, types: BOTH })
}

/// Rotation and attention over a forest: a row, a prompt with two answers, and a one-token row.
fn of_heads(h: usize, g: usize, e: usize) -> Result<Vec<Case>> {
    let tokens = |len| (vec![0; len], vec![Role::Content; len]);
    let (row, roles) = tokens(70);
    let (last, last_roles) = tokens(1);
    let trees = [
        Tree::sequence(row, roles, 0),
        Tree::siblings(vec![0; 37], vec![tokens(65), tokens(18)], 1),
        Tree::sequence(last, last_roles, 2),
    ];
    let forest = Forest::pack(&trees).map_err(candle_core::Error::wrap)?;
    let t = forest.len();
    let positions: Vec<u32> = (0..t as u32).map(|token| token * 31).collect();
    let frequencies: Vec<f32> = (0..e / 2).map(|at| 0.7_f32.powi(at as i32)).collect();
    let rotary = Rotary::new(&frequencies, &positions);
    let plan = Arc::new(AttentionPlan::new(&forest));
    let qkv = vec![
        ("q", numbers(7, (t, h, e))?),
        ("k", numbers(8, (t, g, e))?),
        ("v", numbers(9, (t, g, e))?),
    ];
    let x = vec![("x", numbers(10, (t, h, e))?)];
    let shape = format!("{t}×{h}/{g}×{e}");
    Ok(vec![
        of_a_rotation(format!("rope {shape}"), x, rotary),
        Case {
            op: format!("attention {shape}"),
            inputs: qkv,
            run: Box::new(move |x| attention(&x[0], &x[1], &x[2], &plan)),
            types: BOTH,
        },
    ])
}

/// Rotation of a copy, in place, and in place as part of a tensor whose rest stays unchanged.
fn of_a_rotation(op: String, inputs: Vec<(&'static str, Tensor)>, rotary: Rotary) -> Case {
    let run: Op = Box::new(move |x| {
        let both = Tensor::cat(&[&x[0], &x[0]], 0)?;
        let parts = both.chunk(2, 0)?;
        let own = rope::rope_in_place(&x[0].affine(2.0, 0.0)?, &rotary)?;
        let of_a_part = rope::rope_in_place(&parts[1], &rotary)?;
        let turned = ((rope(&x[0], &rotary)? + own)? + of_a_part)?;
        (turned + &parts[0])? + &parts[1]
    });
    Case { op, inputs, run, types: BOTH }
}

/// Pairs from two trees with five sequences, with scattered targets, and one loss of each kind.
fn pairs(targets: usize) -> head::Pairs {
    let term = |loss, referenced, by_length| head::PairTerm {
        loss,
        beta: 0.1,
        offset: 0.3,
        referenced,
        by_length,
        scale: 0.5,
    };
    head::Pairs {
        sequences: (0..targets).map(|at| (at * 3 % 5) as u32).collect(),
        weights: (0..targets).map(|at| [1.0, 0.5, 0.0][at % 3]).collect(),
        addends: (0..targets).map(|at| [0.0, -0.1][at % 2]).collect(),
        references: vec![-50.0, -70.0, -60.0, -55.0, -90.0],
        lengths: vec![10.0, 12.0, 11.0, 13.0, 14.0],
        pairs: vec![[0, 1], [3, 2], [3, 4], [2, 4]],
        starts: vec![0, 1, 4],
        terms: vec![
            term(head::MarginLoss::Sigmoid(0.1), true, false),
            term(head::MarginLoss::Hinge, false, true),
            term(head::MarginLoss::Ipo, true, true),
        ],
    }
}

/// The head's readings and gradients, over rows of which one has no target and one has two.
fn of_the_head(
    device: &Device,
    dtype: DType,
    (t, d, v): (usize, usize, usize),
) -> Result<Vec<Checked>> {
    let (targets, slopes) = targets_of_the_head(t, v);
    let (hidden, weight) = (numbers(12, (t, d))?, numbers(13, (v, d))?);
    let results = |device: &Device, dtype: DType| -> Result<Vec<(&'static str, Tensor)>> {
        let weight = weight.to_device(device)?.to_dtype(dtype)?;
        let asked = head::Asked { detail: head::Detail::Top, d_weight: true, anchor: None };
        let hidden = hidden.to_device(device)?;
        let grads = head::backward(&hidden, &weight, &targets, slopes.as_slice().into(), asked)?;
        let Some(d_weight) = &grads.d_weight else { candle_core::bail!("head: no d_weight") };
        let asked = head::Asked { detail: head::Detail::Rows, ..asked };
        let of_pairs =
            head::backward_of_pairs(&hidden, &weight, &targets, &pairs(targets.len()), asked)?;
        let weigh = |read: &head::Readings| {
            let slope = |(logp, row): (&f32, &head::RowStats)| logp.exp() - 0.1 * row.entropy;
            read.logps.iter().zip(&read.rows).map(slope).collect()
        };
        let by_host = head::backward_by(&hidden, &weight, &targets, Box::new(weigh), asked)?;
        let readings = grads.readings.wait()?;
        let column = |values: Vec<f32>| {
            let count = values.len();
            Tensor::from_vec(values, count, &Device::Cpu)
        };
        let of_rows =
            |value: fn(&head::RowStats) -> f32| column(readings.rows.iter().map(value).collect());
        Ok(vec![
            ("logps", column(readings.logps.clone())?),
            ("log_sum_exp", of_rows(|row| row.log_sum_exp)?),
            ("entropy", of_rows(|row| row.entropy)?),
            ("top_entropy", of_rows(|row| row.top_entropy)?),
            ("d_hidden", home(&grads.d_hidden)?),
            ("d_weight", home(d_weight)?),
            ("logps for pairs", column(of_pairs.readings.wait()?.logps)?),
            ("d_hidden of pairs", home(&of_pairs.d_hidden)?),
            ("logps for the host", column(by_host.readings.wait()?.logps)?),
            ("d_hidden by the host", home(&by_host.d_hidden)?),
        ])
    };
    let (expected, found) = (results(&Device::Cpu, DType::F32)?, results(device, dtype)?);
    let op = format!("head {t}×{d}×{v}");
    expected
        .iter()
        .zip(&found)
        .map(|((what, expected), (_, found))| checked((&op, what), dtype, (expected, found)))
        .collect()
}

/// Targets in all rows but the first, two in the sixth, and their slopes.
fn targets_of_the_head(t: usize, v: usize) -> (Vec<Target>, Vec<f32>) {
    let target = |(row, id)| Target { row, id, leaf: 0, role: Role::Content };
    let rows = (1..t as u32).chain([5]);
    let targets: Vec<Target> = rows.map(|row| target((row, row * 73 % v as u32))).collect();
    let slopes = (0..targets.len()).map(|at| (at % 5) as f32 * 0.25 - 0.5).collect();
    (targets, slopes)
}

/// The head beside a narrower frozen model: the divergences, and the gradients of both losses together.
fn of_an_anchor(
    device: &Device,
    dtype: DType,
    (t, d, v): (usize, usize, usize),
) -> Result<Vec<Checked>> {
    let (targets, slopes) = targets_of_the_head(t, v);
    let results = |device: &Device, dtype: DType| -> Result<Vec<(&'static str, Tensor)>> {
        let on = |name: u64, shape: (usize, usize)| numbers(name, shape)?.to_device(device);
        let (hidden, weight) = (on(12, (t, d))?, on(13, (v, d))?.to_dtype(dtype)?);
        let anchor = head::Anchor {
            hidden: on(14, (t, d / 2))?,
            weight: on(15, (v, d / 2))?.to_dtype(dtype)?,
            slopes: slopes.iter().map(|slope| 0.3 - slope).collect(),
        };
        let (detail, own) = (head::Detail::Rows, slopes.clone());
        let asked = head::Asked { detail, d_weight: true, anchor: Some(&anchor) };
        let weigh = Box::new(move |_: &head::Readings| own);
        let grads = head::backward_by(&hidden, &weight, &targets, weigh, asked)?;
        let Some(d_weight) = &grads.d_weight else { candle_core::bail!("head: no d_weight") };
        let (d_hidden, d_weight) = (home(&grads.d_hidden)?, home(d_weight)?);
        let rows = grads.readings.wait()?.rows;
        let apart: Vec<f32> = rows.iter().map(|row| row.divergence).collect();
        let apart = Tensor::from_vec(apart, rows.len(), &Device::Cpu)?;
        Ok(vec![("divergence", apart), ("d_hidden", d_hidden), ("d_weight", d_weight)])
    };
    let (expected, found) = (results(&Device::Cpu, DType::F32)?, results(device, dtype)?);
    let op = format!("head {t}×{d}×{v} beside an anchor");
    let pairs = expected.iter().zip(&found);
    pairs
        .map(|((what, expected), (_, found))| checked((&op, what), dtype, (expected, found)))
        .collect()
}

/// Quantized matrices: their dequantized values, bit for bit, and products with them.
fn of_packed(device: &Device, dtype: DType) -> Result<Vec<Checked>> {
    // Not a whole number of the scales that share a second-level scale.
    let (t, i, o) = (5, 96, 333);
    let (weight, x) = (numbers(21, (o, i))?, numbers(22, (t, i))?);
    let kinds = [BlockType::Q4_0, BlockType::Q4_1, BlockType::Q8_0];
    let blocks = kinds.map(|kind| (format!("{kind:?}"), Packed::rounded(&weight, kind)));
    let all = [("NF4".to_owned(), Packed::nf4(&weight))].into_iter().chain(blocks);
    let mut checks = Vec::new();
    for (name, packed) in all {
        let op = format!("{name} {o}×{i}");
        let packed = Arc::new(packed.map_err(candle_core::Error::wrap)?);
        let rounded = home(&packed.tensor(&Device::Cpu, dtype)?)?;
        let dense = home(&packed.tensor(device, dtype)?)?;
        let kind = if dtype == DType::F32 { "f32" } else { "bf16" };
        checks.push(compared((&op, "dense"), (kind, 0.0), (&rounded, &dense))?);
        let twin = packed.clone();
        let case = Case {
            op: format!("{t} rows by {op}"),
            inputs: vec![("x", x.clone())],
            run: Box::new(move |x| unpack::linear(&x[0], twin.clone(), x[0].dtype())),
            types: if dtype == DType::F32 { F32 } else { &[DType::BF16] },
        };
        checks.extend(case.check(device)?);
    }
    Ok(checks)
}

/// Rows of the table, and its gradient for repeated tokens.
fn of_the_embedding(device: &Device) -> Result<Vec<Checked>> {
    let (v, d, t) = (101, 33, 300);
    let tokens: Vec<u32> = (0..t as u32).map(|at| at * at % 53).collect();
    let (table, d_x) = (numbers(14, (v, d))?, numbers(15, (t, d))?);
    let results = |device: &Device| -> Result<[Tensor; 2]> {
        let (table, d_x) = (table.to_device(device)?, d_x.to_device(device)?);
        let d_table = embed::embed_grad(table.zeros_like()?, &tokens, &d_x)?;
        Ok([home(&embed::embed(&table, &tokens)?)?, home(&d_table)?])
    };
    let (expected, found) = (results(&Device::Cpu)?, results(device)?);
    let op = format!("embed {t}×{d}");
    ["forward", "d_table"]
        .iter()
        .zip(expected.iter().zip(&found))
        .map(|(what, pair)| checked((&op, what), DType::F32, pair))
        .collect()
}

/// Two steps of AdamW, its gradient norm, and the position of a non-finite element. Master and moments are f32 in any
/// compute type.
fn of_the_optimizer(device: &Device, dtype: DType) -> Result<Vec<Checked>> {
    let results = |device: &Device| -> crate::Result<[Tensor; 4]> {
        let (param, norms) = two_steps(device, dtype, &mut AdamW::new(HYPER))?;
        let norms = Tensor::from_vec(norms, 2, &Device::Cpu)?;
        let mut grads = Gradients::new(device);
        let hole = Tensor::new(&[f32::INFINITY, 1.0, f32::NAN], device)?;
        grads
            .add("w.weight", &Tensor::cat(&[&numbers(19, 2000)?.to_device(device)?, &hole], 0)?)?;
        let place = grads.first_not_finite()?.map_or(f32::NAN, |(_, place)| place as f32);
        let place = Tensor::new(&[place], &Device::Cpu)?;
        Ok([home(&param.master)?, home(param.computed())?, norms, place])
    };
    let both =
        [&Device::Cpu, device].map(|device| results(device).map_err(candle_core::Error::wrap));
    let [expected, found] = both;
    let (expected, found) = (expected?, found?);
    // The copy is within rounding of its master.
    [("master", DType::F32), ("copy", dtype), ("norm", DType::F32), ("place", DType::F32)]
        .iter()
        .zip(expected.iter().zip(&found))
        .map(|((what, dtype), pair)| checked(("adamw 67×33", what), *dtype, pair))
        .collect()
}

const HYPER: Hyper =
    Hyper { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decayed: is_decayed };
const PARAMETER: &str = "w.weight";

/// A parameter after two steps, and its gradient norms.
fn two_steps(device: &Device, dtype: DType, adamw: &mut AdamW) -> crate::Result<(Param, Vec<f32>)> {
    let start = numbers(16, (67, 33))?.to_device(device)?;
    let param = Param::computed_in(&start, dtype)?;
    let params = BTreeMap::from([(PARAMETER.to_owned(), param.clone())]);
    let mut norms = Vec::new();
    for step in 0..2 {
        let mut grads = Gradients::new(device);
        grads.add(PARAMETER, &numbers(17 + step, (67, 33))?.to_device(device)?)?;
        norms.push(grads.norm()? as f32);
        adamw.step(&params, &grads, 0.01, 0.5)?;
    }
    Ok((param, norms))
}

/// A copy that the device rounds stochastically equals, bit for bit, the CPU's rounding of the device's master.
fn of_chance(device: &Device) -> Result<Checked> {
    let results = || -> crate::Result<[Tensor; 2]> {
        let mut adamw = AdamW::new(HYPER).rounding_by_chance(Some(7));
        let (param, _) = two_steps(device, DType::BF16, &mut adamw)?;
        let twin = Param::computed_in(&home(&param.master)?, DType::BF16)?;
        adamw.round_again(&BTreeMap::from([(PARAMETER.to_owned(), twin.clone())]))?;
        Ok([home(twin.computed())?, home(param.computed())?])
    };
    let [expected, found] = results().map_err(candle_core::Error::wrap)?;
    compared(("adamw 67×33", "copy by chance"), ("bf16", 0.0), (&expected, &found))
}

pub(super) fn checked(
    names: (&str, &str),
    dtype: DType,
    pair: (&Tensor, &Tensor),
) -> Result<Checked> {
    // f32: a different order of summation over some thousands. bf16: rounding to eight bits along the way and at the
    // end.
    let kind = if dtype == DType::F32 { ("f32", 3e-5) } else { ("bf16", 3.2e-2) };
    compared(names, kind, pair)
}

/// Compares two tensors on the CPU within a bound.
pub(super) fn compared(
    (op, what): (&str, &str),
    (dtype, bound): (&'static str, f64),
    (expected, found): (&Tensor, &Tensor),
) -> Result<Checked> {
    let (expected, found) = (flat(expected)?, flat(found)?);
    let largest = expected.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    let apart = expected.iter().zip(&found).map(|(a, b)| f64::from((a - b).abs()));
    // `max` would skip NaN.
    let worst = apart.fold(0.0, |worst: f64, x| if x > worst || x.is_nan() { x } else { worst });
    let error = if expected.len() == found.len() { worst / f64::from(largest) } else { f64::NAN };
    Ok(Checked { op: op.to_owned(), dtype, what: what.to_owned(), error, bound })
}

fn flat(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_vec1()
}

/// Moves a tensor to the CPU as f32, without a graph.
pub(super) fn home(x: &Tensor) -> Result<Tensor> {
    x.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)
}

/// Reproducible normal numbers, rounded to bf16.
pub(super) fn numbers(index: u64, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    let values = Stream::new(1, "check").normal(index, shape.elem_count(), 1.0);
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(DType::BF16)?.to_dtype(DType::F32)
}

#[cfg(test)]
mod tests {
    use super::super::case::Lie;
    use super::*;

    /// The CPU agrees with itself to the last bit, in f32: any difference would come from the check itself.
    #[test]
    fn the_cpu_agrees_with_itself() {
        let all: Vec<Checked> = cases()
            .unwrap()
            .iter()
            .flat_map(|case| {
                let once = case.results((&Device::Cpu, DType::F32), Lie::Whole).unwrap();
                let twice = case.results((&Device::Cpu, DType::F32), Lie::Whole).unwrap();
                let pairs = once.into_iter().zip(twice);
                pairs
                    .map(|((what, a), (_, b))| {
                        checked((&case.op, &what), DType::F32, (&a, &b)).unwrap()
                    })
                    .collect::<Vec<_>>()
            })
            .chain(of_the_head(&Device::Cpu, DType::F32, (67, 96, 5003)).unwrap())
            .chain(of_an_anchor(&Device::Cpu, DType::F32, (67, 96, 5003)).unwrap())
            .chain(of_the_embedding(&Device::Cpu).unwrap())
            .chain(generation::of_the_cache(&Device::Cpu, DType::F32).unwrap())
            .chain(generation::of_the_draws(&Device::Cpu).unwrap())
            .chain(of_the_optimizer(&Device::Cpu, DType::BF16).unwrap())
            .chain([of_chance(&Device::Cpu).unwrap()])
            .collect();
        assert!(all.len() > 40, "{}", all.len());
        assert!(all.iter().all(|one| one.error == 0.0), "{all:?}");
    }

    #[test]
    fn failed_op_is_reported_as_a_disagreement() {
        let failed = Checked::failed("op", &candle_core::Error::msg("illegal address"));
        assert!(!failed.agrees() && failed.what.contains("illegal address"));
        let all = run(&Device::Cpu).unwrap();
        // The CPU's plain bf16 implementations have no exact counterpart; in f32 all agree.
        assert!(all.iter().filter(|one| one.dtype == "f32").all(Checked::agrees), "{all:?}");
        assert!(all.iter().any(|one| one.op.starts_with("draws")), "the last is there");
    }

    #[test]
    fn differing_or_nan_results_do_not_agree() {
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
        let agrees = |found: &[f32], dtype| {
            let pair = (&tensor(&[1.0, -2.0]), &tensor(found));
            checked(("op", "forward"), dtype, pair).unwrap().agrees()
        };
        assert!(agrees(&[1.0, -2.0], DType::F32) && agrees(&[1.0, -2.01], DType::BF16));
        assert!(!agrees(&[1.0, -2.01], DType::F32) && !agrees(&[1.1, -2.0], DType::BF16));
        assert!(!agrees(&[f32::NAN, -2.0], DType::F32) && !agrees(&[1.0], DType::F32));
    }
}
