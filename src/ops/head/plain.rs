//! The head's plain form, on any device: the same chunks in Candle's ops.

use candle_core::{D, DType, Result, Tensor};

use super::{Anchor, Detail, Grads, Pass, Readings, RowStats, Rows, Slopes, TOP, entropy_among};

/// As [`on_cpu`](super::chunks::on_cpu).
pub(super) fn plain(
    hidden: &Tensor,
    weight: &Tensor,
    rows: &Rows,
    pass: Pass<'_>,
) -> Result<(Readings, Grads)> {
    let (device, vocab) = (hidden.device(), weight.dim(0)?);
    let mut readings = Readings::zeros(rows.order.len(), pass.detail);
    let mut d_hidden = hidden.zeros_like()?;
    let mut d_weight = match pass.gradient {
        Some((_, true)) => Some(Tensor::zeros(weight.shape(), DType::F32, device)?),
        _ => None,
    };
    let chunk = Rows::chunk(vocab);
    for first in (0..rows.hidden.len()).step_by(chunk) {
        let slots = first..(first + chunk).min(rows.hidden.len());
        let ids = Tensor::from_slice(&rows.hidden[slots.clone()], slots.len(), device)?;
        let x = hidden.index_select(&ids, 0)?.to_dtype(weight.dtype())?;
        let logits = x.matmul(&weight.t()?)?.to_dtype(DType::F32)?;
        let log_sum_exp = logits.log_sum_exp(D::Minus1)?.unsqueeze(1)?;
        let log_probs = logits.broadcast_sub(&log_sum_exp)?;
        // (target, its place in the flat [slots, V]) of every target of the chunk.
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
        let mut stats = match pass.detail {
            Detail::Targets => Vec::new(),
            detail => plain_stats(&logits, &log_probs, detail)?,
        };
        // The anchor's probabilities, `[slots, V]`.
        let q = match pass.anchor {
            Some(anchor) => Some(diverge(&log_probs, (anchor, &ids), &mut stats)?),
            None => None,
        };
        for (&(index, at), logp) in entries.iter().zip(picked) {
            readings.set(index, logp, stats.get(at / vocab).copied());
        }
        let Some((slopes, _)) = pass.gradient else { continue };
        let own: Vec<f32> = entries.iter().map(|&(index, _)| slopes.d_logps[index]).collect();
        let own = Tensor::from_vec(own, entries.len(), device)?;
        let log_sums = log_sum_exp.flatten_all()?.to_vec1::<f32>()?;
        let read = ReadRows { rows, slots, log_sums };
        let of_softmax = d_softmax((slopes, pass.anchor.zip(q)), &log_probs, read)?;
        let d_logits = of_softmax
            .flatten_all()?
            .index_add(&flat, &own, 0)?
            .reshape(log_probs.shape())?
            .to_dtype(x.dtype())?;
        let d_x = d_logits.matmul(weight)?.to_dtype(hidden.dtype())?;
        d_hidden = d_hidden.index_add(&ids, &d_x, 0)?;
        if let Some(sum) = d_weight {
            d_weight = Some((sum + d_logits.t()?.matmul(&x)?.to_dtype(DType::F32)?)?);
        }
    }
    Ok((readings, pass.gradient.is_some().then_some((d_hidden, d_weight))))
}

/// Some of a head's rows, as `slots` counts them, and the log-sum-exp of each.
struct ReadRows<'a> {
    rows: &'a Rows,
    slots: std::ops::Range<usize>,
    log_sums: Vec<f32>,
}

/// The gradient of these rows' logits, `[R, V]`, but for what their targets' own log-probabilities add.
fn d_softmax(
    (slopes, anchor): (Slopes<'_>, Option<(&Anchor, Tensor)>),
    log_probs: &Tensor,
    ReadRows { rows, slots, log_sums }: ReadRows<'_>,
) -> Result<Tensor> {
    let (vocab, device, count) = (log_probs.dim(1)?, log_probs.device(), slots.len());
    let column = |values: Vec<f32>| Tensor::from_vec(values, (count, 1), device);
    let of_rows = slots.clone().zip(log_sums);
    let (softmax, one): (Vec<f32>, Vec<f32>) =
        of_rows.map(|(slot, lse)| slopes.of_row(rows.targets(slot), lse, vocab)).unzip();
    let p = log_probs.exp()?;
    let d_logits = p.broadcast_mul(&column(softmax)?)?.broadcast_add(&column(one)?)?;
    let Some((anchor, q)) = anchor else { return Ok(d_logits) };
    let slopes = slots.map(|slot| anchor.slope_of_row(rows.targets(slot))).collect();
    d_logits + (p - q)?.broadcast_mul(&column(slopes)?)?
}

/// The probabilities that an anchor gives after the rows `ids`, `[R, V]`; sets the divergence of `log_probs`, `[R, V]`, from
/// them where rows are read.
fn diverge(
    log_probs: &Tensor,
    (anchor, ids): (&Anchor, &Tensor),
    stats: &mut [RowStats],
) -> Result<Tensor> {
    let x = anchor.hidden.index_select(ids, 0)?.to_dtype(anchor.weight.dtype())?;
    let logits = x.matmul(&anchor.weight.t()?)?.to_dtype(DType::F32)?;
    let log_q = logits.broadcast_sub(&logits.log_sum_exp(D::Minus1)?.unsqueeze(1)?)?;
    let q = log_q.exp()?;
    let divergences = (&q * (log_q - log_probs)?)?.sum(D::Minus1)?.to_vec1::<f32>()?;
    stats.iter_mut().zip(divergences).for_each(|(row, divergence)| row.divergence = divergence);
    Ok(q)
}

/// [`RowStats`] of each row of `logits` and its `log_probs`, `[R, V]` both.
fn plain_stats(logits: &Tensor, log_probs: &Tensor, detail: Detail) -> Result<Vec<RowStats>> {
    let values = |tensor: Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    let entropy = values((log_probs.exp()? * log_probs)?.sum(D::Minus1)?.neg()?)?;
    let log_sum_squares = values((log_probs * 2.0)?.log_sum_exp(D::Minus1)?)?;
    let mean_logit = values(logits.mean(D::Minus1)?)?;
    let log_sum_exp = values(logits.log_sum_exp(D::Minus1)?)?;
    let best_logp = values(log_probs.max(D::Minus1)?)?;
    let top_entropy: Vec<f32> = match detail {
        Detail::Top => {
            let of_row = |mut row: Vec<f32>| {
                row.sort_by(|a, b| b.total_cmp(a));
                entropy_among(&row[..TOP.min(row.len())])
            };
            logits.to_vec2()?.into_iter().map(of_row).collect()
        }
        _ => vec![0.0; entropy.len()],
    };
    let row = |at: usize| RowStats {
        log_sum_exp: log_sum_exp[at],
        mean_logit: mean_logit[at],
        entropy: entropy[at],
        log_sum_squares: log_sum_squares[at],
        best_logp: best_logp[at],
        top_entropy: top_entropy[at],
        divergence: 0.0,
    };
    Ok((0..entropy.len()).map(row).collect())
}
