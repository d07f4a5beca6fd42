//! The vocabulary head, the one place where logits exist (design idea 2).
//!
//! Works on *targets*: (hidden row, token id, sequence). Rows without a target are dropped before the product; logits
//! live for one chunk of rows and are never stored. Two calls: [`logps`] reads what each target's log-probability is,
//! [`backward`] takes the gradient with respect to each log-probability and runs the head's own backward. Where that
//! gradient is known beforehand (SFT), `backward` alone is a single pass, as it returns the log-probabilities too.

use candle_core::{D, DType, Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::cpu::{
    self, Element,
    matmul::{Mat, Threads, matmul, matmul_into},
    simd,
};
use crate::data::forest::Target;

/// Logits held at once, in elements: 48 MiB of f32.
pub const CHUNK_ELEMENTS: usize = 12 << 20;

/// What [`backward`] returns.
#[derive(Debug)]
pub struct HeadGrads {
    /// Log-probability of each target, `[N]`.
    pub logps: Vec<f32>,
    /// Gradient of the hidden states, `[T, D]`; zero in rows without a target.
    pub d_hidden: Tensor,
    /// Gradient of the head's weight, `[V, D]`, where it was asked for.
    pub d_weight: Option<Tensor>,
}

/// Log-probability of each target under the full softmax.
///
/// # Shapes
/// - `hidden`: `[T, D]`, `weight`: `[V, D]`, `targets`: `N`  →  `N` values
pub fn logps(hidden: &Tensor, weight: &Tensor, targets: &[Target]) -> Result<Vec<f32>> {
    Ok(run(hidden, weight, targets, None)?.0)
}

/// Log-probabilities, and the gradients of `Σ_n d_logps[n] · logp[n]`.
///
/// # Shapes
/// - `hidden`: `[T, D]`, `weight`: `[V, D]`, `targets` and `d_logps`: `N`
pub fn backward(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[Target],
    d_logps: &[f32],
    want_d_weight: bool,
) -> Result<HeadGrads> {
    if d_logps.len() != targets.len() {
        candle_core::bail!("{} weights for {} targets", d_logps.len(), targets.len());
    }
    let (logps, grads) = run(hidden, weight, targets, Some((d_logps, want_d_weight)))?;
    match grads {
        Some((d_hidden, d_weight)) => Ok(HeadGrads { logps, d_hidden, d_weight }),
        None => Ok(HeadGrads { logps, d_hidden: hidden.zeros_like()?, d_weight: None }),
    }
}

/// Rows whose logits exist at once, for a vocabulary of this size.
pub fn rows_at_once(vocab: usize) -> usize {
    Rows::chunk(vocab)
}

type Grads = Option<(Tensor, Option<Tensor>)>;

fn run(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[Target],
    d: Option<(&[f32], bool)>,
) -> Result<(Vec<f32>, Grads)> {
    let (t, width) = hidden.dims2()?;
    let (vocab, weight_width) = weight.dims2()?;
    let misplaced = targets.iter().find(|x| x.row as usize >= t || x.id as usize >= vocab);
    if let Some(target) = misplaced {
        candle_core::bail!(
            "target {} at row {} is outside {t} rows and {vocab} ids",
            target.id,
            target.row
        );
    }
    if width != weight_width {
        candle_core::bail!("hidden states of width {width} meet a head of width {weight_width}");
    }
    let rows = Rows::new(targets);
    let (hidden, weight) = (hidden.detach().contiguous()?, weight.detach().contiguous()?);
    if hidden.device().is_cpu() {
        let sizes = [t, width, vocab];
        return match weight.dtype() {
            DType::BF16 => on_cpu::<bf16>((&hidden, &weight), sizes, &rows, d),
            _ => on_cpu::<f32>((&hidden, &weight), sizes, &rows, d),
        };
    }
    plain(&hidden, &weight, &rows, d)
}

/// Targets grouped by hidden row.
struct Rows {
    /// Hidden rows with at least one target, ascending.
    hidden: Vec<u32>,
    /// Where each row's targets start in `order`; one more entry than rows.
    starts: Vec<usize>,
    /// (index of the target, its token id), row by row.
    order: Vec<(usize, u32)>,
}

impl Rows {
    fn new(targets: &[Target]) -> Self {
        let mut sorted: Vec<usize> = (0..targets.len()).collect();
        sorted.sort_by_key(|&index| (targets[index].row, index));
        let (mut rows, mut starts) = (Vec::new(), Vec::new());
        for (place, &index) in sorted.iter().enumerate() {
            if rows.last() != Some(&targets[index].row) {
                rows.push(targets[index].row);
                starts.push(place);
            }
        }
        starts.push(sorted.len());
        Self {
            hidden: rows,
            starts,
            order: sorted.into_iter().map(|index| (index, targets[index].id)).collect(),
        }
    }

    fn targets(&self, slot: usize) -> &[(usize, u32)] {
        &self.order[self.starts[slot]..self.starts[slot + 1]]
    }

    fn chunk(vocab: usize) -> usize {
        (CHUNK_ELEMENTS / vocab.max(1)).clamp(16, 4096)
    }
}

/// Contiguous inputs on the CPU.
struct Dense<'a, E> {
    h: &'a [f32],
    w: &'a [E],
    t: usize,
    width: usize,
    vocab: usize,
}

fn on_cpu<E: Element>(
    (hidden, weight): (&Tensor, &Tensor),
    [t, width, vocab]: [usize; 3],
    rows: &Rows,
    d: Option<(&[f32], bool)>,
) -> Result<(Vec<f32>, Grads)> {
    cpu::with_slice(hidden, |h| {
        cpu::with_slice::<E, _>(weight, |w| by_chunks(&Dense { h, w, t, width, vocab }, rows, d))
    })??
}

/// Products in the weight's type, logits and their softmax in f32.
fn by_chunks<E: Element>(
    inputs: &Dense<'_, E>,
    rows: &Rows,
    d: Option<(&[f32], bool)>,
) -> Result<(Vec<f32>, Grads)> {
    let Dense { h, w, t, width, vocab } = *inputs;
    let mut logps = vec![0.0; rows.order.len()];
    let mut d_hidden = d.map(|_| vec![0.0; t * width]);
    let mut d_weight = d.and_then(|(_, wanted)| wanted.then(|| vec![0.0; vocab * width]));
    let weight = Mat::new(w, vocab, width);
    let chunk = Rows::chunk(vocab);
    for first in (0..rows.hidden.len()).step_by(chunk) {
        let slots = first..(first + chunk).min(rows.hidden.len());
        let mut x = Vec::with_capacity(slots.len() * width);
        rows.hidden[slots.clone()]
            .iter()
            .for_each(|&row| x.extend_from_slice(&h[row as usize * width..][..width]));
        let x = E::rounded(x);
        let x = Mat::new(&x, slots.len(), width);
        let mut logits = matmul(x, weight.t(), Threads::All);
        let found: Vec<Vec<(usize, f32)>> = logits
            .par_chunks_mut(vocab)
            .zip(slots.clone())
            .map(|(logits, slot)| row_on_cpu(logits, rows.targets(slot), d.map(|(d, _)| d)))
            .collect();
        found.into_iter().flatten().for_each(|(index, logp)| logps[index] = logp);
        let Some(d_hidden) = &mut d_hidden else { continue };
        let d_logits = E::rounded_from(&logits);
        let d_logits = Mat::new(&d_logits, slots.len(), vocab);
        let d_x = matmul(d_logits, weight, Threads::All);
        for (&row, d_x) in rows.hidden[slots].iter().zip(d_x.chunks_exact(width)) {
            d_hidden[row as usize * width..][..width].copy_from_slice(d_x);
        }
        if let Some(d_weight) = &mut d_weight {
            matmul_into(d_weight, d_logits.t(), x, true, Threads::All);
        }
    }
    let device = candle_core::Device::Cpu;
    let grads = match d_hidden {
        Some(d_hidden) => {
            let d_weight =
                d_weight.map(|d| Tensor::from_vec(d, (vocab, width), &device)).transpose()?;
            Some((Tensor::from_vec(d_hidden, (t, width), &device)?, d_weight))
        }
        None => None,
    };
    Ok((logps, grads))
}

/// `ln Σ e^x` of one row of logits: what every log-probability subtracts, in training and in sampling. Not finite where
/// the row is not.
pub fn log_sum_exp(row: &[f32]) -> f32 {
    let max = simd::max(row);
    log_of_sum(max, simd::sum_exp_sub(row, max))
}

fn log_of_sum(max: f32, sum: f32) -> f32 {
    max + sum.ln()
}

/// Reads one row's targets; where a gradient is asked for, turns the logits into `d logits` in place:
/// `Σ_n d_n · (onehot(id_n) − softmax)`.
fn row_on_cpu(
    logits: &mut [f32],
    targets: &[(usize, u32)],
    d_logps: Option<&[f32]>,
) -> Vec<(usize, f32)> {
    let max = simd::max(logits);
    let picked: Vec<f32> = targets.iter().map(|&(_, id)| logits[id as usize]).collect();
    let sum = match d_logps {
        Some(_) => simd::exp_sub(logits, max),
        None => simd::sum_exp_sub(logits, max),
    };
    let log_sum_exp = log_of_sum(max, sum);
    if let Some(d_logps) = d_logps {
        let total: f32 = targets.iter().map(|&(index, _)| d_logps[index]).sum();
        simd::scale(logits, -total / sum);
        for &(index, id) in targets {
            logits[id as usize] += d_logps[index];
        }
    }
    targets.iter().zip(picked).map(|(&(index, _), logit)| (index, logit - log_sum_exp)).collect()
}

/// The plain form, on any device: the same chunks in Candle's ops.
fn plain(
    hidden: &Tensor,
    weight: &Tensor,
    rows: &Rows,
    d: Option<(&[f32], bool)>,
) -> Result<(Vec<f32>, Grads)> {
    let (device, vocab) = (hidden.device(), weight.dim(0)?);
    let mut logps = vec![0.0; rows.order.len()];
    let mut d_hidden = hidden.zeros_like()?;
    let mut d_weight = match d {
        Some((_, true)) => Some(weight.zeros_like()?),
        _ => None,
    };
    let chunk = Rows::chunk(vocab);
    for first in (0..rows.hidden.len()).step_by(chunk) {
        let slots = first..(first + chunk).min(rows.hidden.len());
        let ids = Tensor::from_slice(&rows.hidden[slots.clone()], slots.len(), device)?;
        let x = hidden.index_select(&ids, 0)?;
        let log_probs =
            candle_nn::ops::log_softmax(&x.matmul(&weight.t()?)?.to_dtype(DType::F32)?, D::Minus1)?;
        // (slot, target, id) of every target of the chunk, as flat positions in [slots, V].
        let entries: Vec<(usize, usize)> = slots
            .clone()
            .flat_map(|slot| {
                let start = (slot - first) * vocab;
                rows.targets(slot).iter().map(move |&(index, id)| (index, start + id as usize))
            })
            .collect();
        let flat: Vec<u32> = entries.iter().map(|&(_, at)| at as u32).collect();
        let flat = Tensor::from_vec(flat, entries.len(), device)?;
        let picked = log_probs.flatten_all()?.index_select(&flat, 0)?.to_vec1::<f32>()?;
        entries.iter().zip(picked).for_each(|(&(index, _), logp)| logps[index] = logp);
        let Some((d_logps, _)) = d else { continue };
        let totals: Vec<f32> = slots
            .clone()
            .map(|slot| rows.targets(slot).iter().map(|&(index, _)| d_logps[index]).sum())
            .collect();
        let totals = Tensor::from_vec(totals, (slots.len(), 1), device)?;
        let own: Vec<f32> = entries.iter().map(|&(index, _)| d_logps[index]).collect();
        let own = Tensor::from_vec(own, entries.len(), device)?;
        let d_logits = log_probs.exp()?.broadcast_mul(&totals.neg()?)?.flatten_all()?;
        let d_logits = d_logits
            .index_add(&flat, &own, 0)?
            .reshape((slots.len(), vocab))?
            .to_dtype(x.dtype())?;
        d_hidden = d_hidden.index_add(&ids, &d_logits.matmul(weight)?, 0)?;
        if let Some(sum) = d_weight {
            d_weight = Some((sum + d_logits.t()?.matmul(&x)?)?);
        }
    }
    Ok((logps, d.is_some().then_some((d_hidden, d_weight))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tree::Role;
    use crate::ops::linear::tests::{distance, random};

    fn targets(t: usize, vocab: usize) -> Vec<Target> {
        // Rows without, with one and with several targets, and one id twice in a row.
        (0..t * 2)
            .filter(|i| i % 3 != 0)
            .map(|i| Target {
                row: (i * 7 % t) as u32,
                id: (i * i % vocab) as u32,
                leaf: 0,
                role: Role::Content,
            })
            .collect()
    }

    #[test]
    fn both_forms_agree_with_candles_graph() {
        for (t, width, vocab) in [(1, 4, 3), (9, 8, 33), (40, 16, 257)] {
            let (hidden, weight) = (random(1, (t, width)), random(2, (vocab, width)));
            let targets = targets(t, vocab);
            let d_logps: Vec<f32> = (0..targets.len()).map(|i| (i as f32 * 0.3).sin()).collect();
            let ours = backward(&hidden, &weight, &targets, &d_logps, true).unwrap();
            assert_eq!(ours.logps, logps(&hidden, &weight, &targets).unwrap());
            let rows = Rows::new(&targets);
            let (plain_logps, grads) =
                plain(&hidden, &weight, &rows, Some((&d_logps, true))).unwrap();
            let (d_hidden, d_weight) = grads.unwrap();
            assert!(ours.logps.iter().zip(&plain_logps).all(|(a, b)| (a - b).abs() < 1e-5));
            assert!(distance(&ours.d_hidden, &d_hidden) < 1e-5);
            assert!(distance(ours.d_weight.as_ref().unwrap(), &d_weight.unwrap()) < 1e-5);

            // Candle's own graph over the full logits.
            let (h, w) = (
                candle_core::Var::from_tensor(&hidden).unwrap(),
                candle_core::Var::from_tensor(&weight).unwrap(),
            );
            let log_probs =
                candle_nn::ops::log_softmax(&h.matmul(&w.t().unwrap()).unwrap(), D::Minus1)
                    .unwrap();
            let mut weights = vec![0_f32; t * vocab];
            targets
                .iter()
                .zip(&d_logps)
                .for_each(|(x, d)| weights[x.row as usize * vocab + x.id as usize] += d);
            let weights = Tensor::from_vec(weights, (t, vocab), hidden.device()).unwrap();
            let graph = (log_probs * weights).unwrap().sum_all().unwrap().backward().unwrap();
            assert!(distance(&ours.d_hidden, graph.get(&h).unwrap()) < 1e-5);
            assert!(distance(&ours.d_weight.unwrap(), graph.get(&w).unwrap()) < 1e-5);
        }
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_refused() {
        let target = Target { row: 0, id: 3, leaf: 0, role: Role::Content };
        let error = logps(&random(1, (1, 4)), &random(2, (3, 4)), &[target]).unwrap_err();
        assert!(error.to_string().contains("target 3 at row 0 is outside 1 rows and 3 ids"));
    }
}
