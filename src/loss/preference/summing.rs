//! Sums token log-probabilities into one per response.

use std::collections::BTreeMap;

use crate::data::forest::Forest;
use crate::data::tree::{Role, Tree};

/// Which tokens contribute to a response's log-probability, and with what weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summing {
    /// Mask tokens produced by the template rather than the content (Llama 3, section 4.1.4).
    pub mask_formatting_tokens: bool,
    /// Weight of a pair's tokens beyond the length of its shorter response (LD-DPO, Liu et al., 2024); 1 disables it.
    pub ld_alpha: f64,
}

impl Default for Summing {
    fn default() -> Self {
        Self { mask_formatting_tokens: false, ld_alpha: 1.0 }
    }
}

/// One response summed under a [`Summing`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Response {
    /// Its log-probability.
    pub logp: f64,
    /// Number of tokens in the sum.
    pub length: f64,
}

impl Summing {
    fn enters(self, role: Role) -> bool {
        role == Role::Content || (role == Role::Format && !self.mask_formatting_tokens)
    }

    /// Number of contributing tokens in each response of a tree.
    pub fn lengths(self, tree: &Tree) -> Vec<usize> {
        let leaves = tree.leaves().into_iter();
        let enters = |leaf| tree.unroll(leaf).1.iter().skip(1).filter(|r| self.enters(**r)).count();
        leaves.map(enters).collect()
    }

    /// Weight of each target in its response's log-probability.
    pub fn weights(self, forest: &Forest) -> Vec<f64> {
        let mut lengths = vec![0_usize; forest.leaves.len()];
        for target in forest.targets.iter().filter(|target| self.enters(target.role)) {
            lengths[target.leaf as usize] += 1;
        }
        let mut shortest = vec![usize::MAX; forest.trees()];
        for (leaf, length) in forest.leaves.iter().zip(&lengths) {
            shortest[leaf.tree] = shortest[leaf.tree].min(*length);
        }
        let mut seen = vec![0_usize; forest.leaves.len()];
        let weight = forest.targets.iter().map(|target| {
            let leaf = target.leaf as usize;
            if !self.enters(target.role) {
                return 0.0;
            }
            seen[leaf] += 1;
            if seen[leaf] > shortest[forest.leaves[leaf].tree] { self.ld_alpha } else { 1.0 }
        });
        weight.collect()
    }

    /// Responses of each tree with its row, in the order of [`Forest::sources`].
    pub fn trees(self, forest: &Forest, logps: &[f32]) -> Vec<(usize, Vec<Response>)> {
        let mut trees: Vec<(usize, Vec<Response>)> =
            forest.sources.iter().map(|&source| (source, Vec::new())).collect();
        for (leaf, response) in forest.leaves.iter().zip(self.responses(forest, logps)) {
            trees[leaf.tree].1.push(response);
        }
        trees
    }

    /// Log-probability of each leaf by row: the form in which a reference is stored.
    pub fn table(self, forest: &Forest, logps: &[f32]) -> BTreeMap<usize, Vec<f64>> {
        let logp = |response: Response| response.logp;
        let trees = self.trees(forest, logps).into_iter();
        trees.map(|(row, all)| (row, all.into_iter().map(logp).collect())).collect()
    }

    /// The response of every leaf, in the order of [`Forest::leaves`].
    pub fn responses(self, forest: &Forest, logps: &[f32]) -> Vec<Response> {
        let mut responses = vec![Response::default(); forest.leaves.len()];
        let weights = self.weights(forest);
        for ((target, logp), weight) in forest.targets.iter().zip(logps).zip(weights) {
            let response = &mut responses[target.leaf as usize];
            if self.enters(target.role) {
                response.logp += weight * f64::from(*logp);
                response.length += 1.0;
            }
        }
        responses
    }
}
