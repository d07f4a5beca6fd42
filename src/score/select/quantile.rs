//! The top fraction of all candidates over all prompts.

use rand::Rng;

use super::{Candidate, Rules, is_eligible};
use crate::rng::Stream;

/// How many of each prompt's eligible candidates are in the top `top_quantile` of all distinct candidates, rounded up.
/// Ties at the cut-off score go to prompts in turn, in an order drawn from the seed: with a 0/1 judge the first prompts
/// of the file must not fill the quota.
pub(super) fn best(ranked: &[Vec<&Candidate>], rules: &Rules) -> Vec<usize> {
    let all: usize = ranked.iter().map(Vec::len).sum();
    let room = (rules.top_quantile * all as f64).ceil() as usize;
    let order = Stream::new(rules.seed, "select/quantile");
    let mut eligible: Vec<(f64, usize, u64, usize)> = Vec::new();
    for (at, candidates) in ranked.iter().enumerate() {
        let turn: u64 = order.at(0, at as u64).random();
        let scores = candidates.iter().filter(|one| is_eligible(one, rules)).map(|one| one.score);
        eligible.extend(scores.enumerate().map(|(rank, score)| (score, rank, turn, at)));
    }
    eligible.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    let mut kept = vec![0; ranked.len()];
    for (.., at) in eligible.into_iter().take(room) {
        kept[at] += 1;
    }
    kept
}
