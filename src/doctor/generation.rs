//! The device check for generation: attention over pages, predictions, and draws.

use candle_core::{DType, Device, Result, Tensor};
use llguidance::toktrie::SimpleVob;

use super::check::{Checked, checked, home, numbers};
use crate::generate::sampler::{Draw, draw_rows};
use crate::ops::cached::{CachePlan, PAGE, Page, Sequence, Span};
use crate::ops::head;
use crate::ops::sample::Chance;
use crate::rng::Stream;

/// New tokens of a long sequence and of one that shares its first page, over pages filled beforehand.
pub(super) fn of_the_cache(device: &Device, dtype: DType) -> Result<Vec<Checked>> {
    let mut all = Vec::new();
    // Key heads, query heads per key head, and head width.
    for shape in [(1, 2, 8), (2, 1, 32), (3, 3, 64), (1, 2, 96), (2, 4, 128)] {
        let (expected, found) =
            (over_pages(&Device::Cpu, DType::F32, shape)?, over_pages(device, dtype, shape)?);
        let (groups, share, width) = shape;
        let op = format!("cached attention {}/{groups}×{width}", groups * share);
        for (at, pair) in expected.iter().zip(&found).enumerate() {
            all.push(checked((&op, &format!("pass {}", at + 1)), dtype, pair)?);
        }
    }
    Ok(all)
}

/// Attention in each of two passes: prompts, then a few new tokens of three sequences.
fn over_pages(
    device: &Device,
    dtype: DType,
    (groups, share, width): (usize, usize, usize),
) -> Result<[Tensor; 2]> {
    let layer = 1;
    let pages = (0..9).map(|_| Page::new((2, groups, width), dtype, device));
    let pages: Vec<Page> = pages.collect::<Result<_>>()?;
    let sequence = |pages: &[Page], len: usize, new: usize| {
        let span = |(index, page): (usize, &Page)| Span {
            page: page.clone(),
            slot: 0,
            position: index * PAGE,
            count: PAGE.min(len - index * PAGE),
        };
        Sequence { spans: pages.iter().enumerate().map(span).collect(), new }
    };
    // More positions than one partition of the kernel holds.
    let beside = [pages[0].clone(), pages[6].clone()];
    let passes = [
        vec![sequence(&pages[..5], 300, 300), sequence(&pages[7..8], 20, 20)],
        vec![
            sequence(&pages[..5], 303, 3),
            sequence(&beside, PAGE + 1, 1),
            sequence(&pages[7..8], 21, 1),
        ],
    ];
    let mut results = Vec::new();
    for (pass, sequences) in passes.into_iter().enumerate() {
        let rows: usize = sequences.iter().map(|sequence| sequence.new).sum();
        let moved = |at: u64, heads: usize| {
            let x = numbers(20 + 3 * pass as u64 + at, (rows, heads, width))?;
            x.to_device(device)?.to_dtype(dtype)
        };
        let plan = CachePlan::new(sequences, share);
        plan.store(layer, &moved(0, groups)?, &moved(1, groups)?)?;
        results.push(home(&plan.attend(layer, &moved(2, groups * share)?)?)?);
    }
    let [first, second] = <[Tensor; 2]>::try_from(results)
        .map_err(|_| candle_core::Error::msg("two passes have two results"))?;
    Ok([first, second])
}

/// Predictions, and tokens drawn from them in every way the kernel supports, some with the top tokens reported or with
/// tokens masked out.
pub(super) fn of_the_draws(device: &Device) -> Result<Vec<Checked>> {
    let base = Chance::default();
    let ways = [
        base,
        Chance { temperature: 0.0, ..base },
        Chance { temperature: 2.5, ..base },
        Chance { top_k: 40, ..base },
        Chance { top_p: 0.9, ..base },
        Chance { min_p: 0.02, ..base },
        Chance { temperature: 0.7, top_k: 50, top_p: 0.95, min_p: 0.001, ..base },
    ];
    let (d, v) = (96, 5003);
    let chances: Vec<Chance> = (0..70)
        .map(|row| Chance {
            key: Stream::new(row, "check").at(0, 0).get_seed(),
            draw: row * 3,
            top: [5, 0, 2][row as usize % 3],
            ..ways[row as usize % ways.len()]
        })
        .collect();
    let mut allowed = SimpleVob::alloc(v);
    (0..v as u32).filter(|id| id % 3 != 1).for_each(|id| allowed.allow_token(id));
    let allowed = |row: usize| (row % 4 == 1).then_some(&allowed);
    let chances: Vec<_> =
        chances.into_iter().enumerate().map(|(row, chance)| (chance, allowed(row))).collect();
    // Whole numbers over a power of two: every order of summation gives the same logits.
    let whole = |index, shape: (usize, usize)| (numbers(index, shape)? * 2.0)?.round();
    let (hidden, weight) = (whole(30, (chances.len(), d))?, (whole(31, (v, d))? / 64.0)?);
    let results = |device: &Device| -> crate::Result<[Tensor; 6]> {
        let logits = head::logits(&hidden.to_device(device)?, &weight.to_device(device)?)?;
        let drawn: Vec<Draw> =
            draw_rows(&logits, &chances)?.into_iter().collect::<crate::Result<_>>()?;
        let column = |value: fn(&Draw) -> f32| {
            Tensor::from_vec(drawn.iter().map(value).collect(), drawn.len(), &Device::Cpu)
        };
        Ok([
            home(&logits)?,
            column(|draw| draw.id as f32)?,
            column(|draw| draw.logprob)?,
            column(|draw| draw.sample_logprob)?,
            likely(&drawn, |(id, _)| id as f32)?,
            likely(&drawn, |(_, logprob)| logprob)?,
        ])
    };
    let both =
        [&Device::Cpu, device].map(|device| results(device).map_err(candle_core::Error::wrap));
    let [expected, found] = both;
    let (expected, found) = (expected?, found?);
    ["logits", "ids", "logprobs", "sample_logprobs", "likeliest ids", "likeliest logprobs"]
        .iter()
        .zip(expected.iter().zip(&found))
        .map(|(what, pair)| checked((&format!("draws 70×{v}"), what), DType::F32, pair))
        .collect()
}

/// One value per reported token of all draws.
fn likely(drawn: &[Draw], value: fn((u32, f32)) -> f32) -> Result<Tensor> {
    let values: Vec<f32> = drawn.iter().flat_map(|draw| &draw.top).map(|&one| value(one)).collect();
    let count = values.len();
    Tensor::from_vec(values, count, &Device::Cpu)
}
