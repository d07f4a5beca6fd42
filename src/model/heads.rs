//! The reward model's head: `L` scores at the end of each scored segment.

use candle_core::Tensor;

use crate::data::forest::End;
use crate::error::Result;
use crate::ops;

/// Scores of each end: its hidden row times the head's weight `[L, D]`, plus its bias `[L]`. Shapes: `hidden` `[T, D]`
/// -> `[E, L]`, for `E` ends.
pub fn scores(
    hidden: &Tensor,
    (weight, bias): (&Tensor, Option<&Tensor>),
    ends: &[End],
) -> Result<Tensor> {
    let bias = bias.map(Tensor::detach);
    Ok(ops::linear(&end_rows(hidden, ends)?, &weight.detach(), bias.as_ref())?)
}

/// Gradient with respect to the hidden states, `[T, D]`, from `d` `[E, L]`.
pub(super) fn d_hidden(
    hidden: &Tensor,
    weight: &Tensor,
    ends: &[End],
    d: &Tensor,
) -> Result<Tensor> {
    let d_rows = d.matmul(&weight.detach().to_dtype(d.dtype())?)?;
    Ok(hidden.zeros_like()?.index_add(&end_ids(ends, hidden)?, &d_rows, 0)?)
}

/// Gradient with respect to the head's weight, `[L, D]`, from `d` `[E, L]`.
pub(super) fn d_weight(hidden: &Tensor, ends: &[End], d: &Tensor) -> Result<Tensor> {
    Ok(d.t()?.matmul(&end_rows(hidden, ends)?)?)
}

fn end_ids(ends: &[End], hidden: &Tensor) -> Result<Tensor> {
    let ids: Vec<u32> = ends.iter().map(|end| end.row as u32).collect();
    Ok(Tensor::from_vec(ids, ends.len(), hidden.device())?)
}

fn end_rows(hidden: &Tensor, ends: &[End]) -> Result<Tensor> {
    Ok(hidden.detach().index_select(&end_ids(ends, hidden)?, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear::tests::random;

    fn end(row: usize) -> End {
        End { row, ..End::default() }
    }

    #[test]
    fn score_is_bitwise_independent_of_the_batch() {
        let (hidden, head) = (random(1, (40, 577)), random(2, (3, 577)));
        let bias = random(3, 3);
        let ends: Vec<End> = (0..40).map(end).collect();
        let values = |ends: &[End]| -> Vec<f32> {
            let scores = scores(&hidden, (&head, Some(&bias)), ends).unwrap();
            scores.flatten_all().unwrap().to_vec1().unwrap()
        };
        let all = values(&ends);
        for (row, three) in all.chunks(3).enumerate() {
            let alone = values(&[end(row)]);
            let bits = |scores: &[f32]| scores.iter().map(|s| s.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&alone), bits(three), "row {row}");
        }
    }
}
