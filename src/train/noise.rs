//! NEFTune: noise on the token embeddings during training (Jain et al., 2023, algorithm 1).

use candle_core::{DType, Tensor};
use rand::Rng;

use crate::data::forest::Forest;
use crate::error::Result;
use crate::ops::host::sent;
use crate::rng::Stream;

/// The noise of one optimizer step. A row's noise depends only on the seed, the step and the row, never on how the step
/// is split into micro-batches or on where the run was resumed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Noise {
    /// `α`: each element is uniform in `±α / sqrt(L D)`, where `L` is the token count of the row's longest sequence.
    pub alpha: f64,
    /// Seed of the run.
    pub seed: u64,
    /// Steps already taken.
    pub step: usize,
}

impl Noise {
    /// Adds the noise. Shapes: `[T, D] -> [T, D]`.
    pub fn add(&self, forest: &Forest, x: &Tensor) -> Result<Tensor> {
        let (_, width) = x.dims2()?;
        let stream = Stream::new(self.seed, "train/neftune");
        let mut noise = Vec::with_capacity(forest.len() * width);
        // The spans of a tree are contiguous.
        for spans in forest.spans.chunk_by(|a, b| a.tree == b.tree) {
            let longest = spans.iter().map(|span| span.position + span.len).max().unwrap_or(0);
            let tokens: usize = spans.iter().map(|span| span.len).sum();
            let reach = (self.alpha / ((longest * width) as f64).sqrt()) as f32;
            let row = forest.sources[spans[0].tree];
            let mut rng = stream.at(self.step as u64, row as u64);
            noise.extend((0..tokens * width).map(|_| reach * (2.0 * rng.random::<f32>() - 1.0)));
        }
        let noise = sent(noise, x.shape(), x.device())?;
        Ok((x.to_dtype(DType::F32)? + noise)?.to_dtype(x.dtype())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tree::{Role, Tree};
    use crate::ops::linear::tests::random;

    #[test]
    fn noise_of_a_row_is_batch_independent_and_differs_per_step() {
        const WIDTH: usize = 8;
        let response = |len| (vec![7; len], vec![Role::Content; len]);
        let trees = [
            Tree::siblings(vec![1; 3], vec![response(2), response(13)], 4),
            Tree::sequence(vec![5; 9], vec![Role::Content; 9], 2),
        ];
        let rows = |step: usize, trees: &[Tree]| {
            let forest = Forest::pack(trees).unwrap();
            let noise = Noise { alpha: 5.0, seed: 3, step };
            let zeros = (random(1, (forest.len(), WIDTH)) * 0.0).unwrap();
            noise.add(&forest, &zeros).unwrap().to_vec2::<f32>().unwrap()
        };
        let whole = rows(6, &trees);
        assert_eq!([rows(6, &trees[..1]), rows(6, &trees[1..])].concat(), whole);
        assert_ne!(rows(7, &trees), whole);
        for (rows, len) in [(&whole[..18], 16.0), (&whole[18..], 9.0)] {
            let reach = 5.0 / (len * WIDTH as f32).sqrt();
            let all: Vec<f32> = rows.concat();
            let largest = all.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
            assert!(largest <= reach && largest > 0.8 * reach, "{largest} of {reach}");
            let mean = all.iter().sum::<f32>() / all.len() as f32;
            assert!(mean.abs() < 0.25 * reach, "{mean} of {reach}");
        }
    }
}
