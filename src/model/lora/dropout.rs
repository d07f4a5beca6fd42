//! Dropout on the input of an adapter's first factor (`lora_dropout`), counter-based: an element's mask depends on the
//! seed, the step, the token's position in its row, and the module, so recomputation, a different split into
//! micro-batches and a resumed run drop the same elements.

use candle_core::{Device, Tensor};
use rand::RngCore;
use rayon::prelude::*;

use crate::data::forest::Forest;
use crate::ops::cpu::Element;
use crate::ops::host::sent;
use crate::rng::Stream;

/// Dropout in one optimizer step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Dropout probability.
    pub rate: f64,
    /// The run's seed.
    pub seed: u64,
    /// Number of previous steps.
    pub step: usize,
}

impl Dropout {
    /// The masks over a packed forest.
    pub fn over(&self, forest: &Forest) -> Masks {
        let stream = Stream::new(self.seed, "train/lora_dropout");
        let mut keys = Vec::with_capacity(forest.len());
        // The spans of a tree are contiguous.
        for spans in forest.spans.chunk_by(|a, b| a.tree == b.tree) {
            let row = forest.sources[spans[0].tree];
            let mut rng = stream.at(self.step as u64, row as u64);
            let tokens: usize = spans.iter().map(|span| span.len).sum();
            keys.extend((0..tokens).map(|_| rng.next_u64()));
        }
        Masks { rate: self.rate, keys }
    }
}

/// Dropped elements, `[T, I]` per module.
#[derive(Clone, Debug)]
pub struct Masks {
    rate: f64,
    /// One key per token.
    keys: Vec<u64>,
}

impl Masks {
    /// Rows with dropped elements set to zero and the others scaled up. Shapes: `[T, I] -> [T, I]`.
    pub(super) fn apply<E: Element>(&self, module: u64, x: &[E]) -> Vec<E> {
        let width = x.len() / self.keys.len().max(1);
        let mut out = x.to_vec();
        out.par_chunks_mut(width.max(1)).zip(&self.keys).for_each_init(
            Vec::new,
            |scratch: &mut Vec<f32>, (row, key)| {
                let mut values = E::widen(row, scratch).to_vec();
                self.drop_from(&mut values, key ^ module);
                E::round_into(row, &values);
            },
        );
        out
    }

    fn drop_from(&self, row: &mut [f32], key: u64) {
        let below = (self.rate * 65536.0).round() as u16;
        let kept = (1.0 / (1.0 - f64::from(below) / 65536.0)) as f32;
        for (index, values) in row.chunks_mut(4).enumerate() {
            let bits = mixed(key.wrapping_add((index as u64).wrapping_mul(GOLDEN)));
            for (lane, value) in values.iter_mut().enumerate() {
                *value *= if ((bits >> (16 * lane)) as u16) < below { 0.0 } else { kept };
            }
        }
    }

    /// The mask as a tensor of factors, for graphs on any device.
    pub(super) fn tensor(
        &self,
        module: u64,
        width: usize,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let ones = vec![1.0_f32; self.keys.len() * width];
        sent(self.apply(module, &ones), (self.keys.len(), width), device)
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of SplitMix64 (Steele et al., 2014).
fn mixed(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A module's part of the keys.
pub(super) fn module_key(module: &str) -> u64 {
    module.bytes().fold(GOLDEN, |key, byte| mixed(key ^ u64::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tree::{Role, Tree};

    #[test]
    fn dropout_of_a_token_is_batch_independent_and_keeps_the_rate() {
        const WIDTH: usize = 1001;
        let tree = |source, len| Tree::sequence(vec![5; len], vec![Role::Content; len], source);
        let trees = [tree(4, 30), tree(2, 9)];
        let masks = |step, trees: &[Tree]| {
            let forest = Forest::pack(trees).unwrap();
            let dropout = Dropout { rate: 0.1, seed: 3, step }.over(&forest);
            dropout.apply(module_key("a"), &vec![1.0_f32; forest.len() * WIDTH])
        };
        let whole = masks(6, &trees);
        assert_eq!([masks(6, &trees[..1]), masks(6, &trees[1..])].concat(), whole);
        assert_ne!(masks(7, &trees), whole);
        let dropped = whole.iter().filter(|x| **x == 0.0).count() as f64 / whole.len() as f64;
        assert!((dropped - 0.1).abs() < 0.005, "{dropped}");
        let mean = whole.iter().sum::<f32>() / whole.len() as f32;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        let forest = Forest::pack(&trees).unwrap();
        let other = Dropout { rate: 0.1, seed: 3, step: 6 }.over(&forest);
        assert_ne!(other.apply(module_key("b"), &vec![1.0_f32; whole.len()]), whole);
    }
}
