//! The reward model's head: one number at the end of each sequence.

use candle_core::Tensor;

use crate::data::forest::Leaf;
use crate::error::Result;
use crate::ops;

/// Score of each sequence: its end row times the head. Shapes: `hidden` `[T, D]`, `head` `[1, D]` -> `S` values.
pub fn scores(hidden: &Tensor, head: &Tensor, leaves: &[Leaf]) -> Result<Vec<f32>> {
    let ends = end_rows(hidden, leaves)?;
    Ok(ops::linear(&ends, &head.detach(), None)?.squeeze(1)?.to_vec1::<f32>()?)
}

/// Gradients of `Σ_s d_scores[s] · score[s]`: of the hidden states `[T, D]` and of the head `[1, D]`.
pub fn backward(
    hidden: &Tensor,
    head: &Tensor,
    leaves: &[Leaf],
    d_scores: &[f32],
) -> Result<(Tensor, Tensor)> {
    let device = hidden.device();
    let d = Tensor::from_slice(d_scores, (d_scores.len(), 1), device)?;
    let ids = end_ids(leaves, hidden)?;
    let d_hidden = hidden.zeros_like()?.index_add(&ids, &d.matmul(&head.detach())?, 0)?;
    let d_head = d.t()?.matmul(&end_rows(hidden, leaves)?)?;
    Ok((d_hidden, d_head))
}

fn end_ids(leaves: &[Leaf], hidden: &Tensor) -> Result<Tensor> {
    let ids: Vec<u32> = leaves.iter().map(|leaf| leaf.end as u32).collect();
    Ok(Tensor::from_vec(ids, leaves.len(), hidden.device())?)
}

fn end_rows(hidden: &Tensor, leaves: &[Leaf]) -> Result<Tensor> {
    Ok(hidden.detach().index_select(&end_ids(leaves, hidden)?, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear::tests::random;

    #[test]
    fn a_score_is_the_same_bits_whatever_is_scored_beside_it() {
        let (hidden, head) = (random(1, (40, 577)), random(2, (1, 577)));
        let leaf = |end: usize| Leaf { tree: end, span: end, end };
        let leaves: Vec<Leaf> = (0..40).map(leaf).collect();
        let all = scores(&hidden, &head, &leaves).unwrap();
        for (end, score) in all.iter().enumerate() {
            let alone = scores(&hidden, &head, &[leaf(end)]).unwrap();
            assert_eq!(alone[0].to_bits(), score.to_bits(), "row {end}");
        }
    }
}
