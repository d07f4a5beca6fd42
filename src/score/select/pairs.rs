//! Choice of a prompt's preference pairs.

use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::{Candidate, PairStrategy, Rules};

/// The pairs of one prompt, better side first. `ranked`: its distinct candidates, best first.
pub(super) fn choose<'a>(
    ranked: &[&'a Candidate],
    rules: &Rules,
    rng: &mut ChaCha8Rng,
) -> Vec<(&'a Candidate, &'a Candidate)> {
    // An unjudged answer is not evidence of a worse one.
    let judged: Vec<&Candidate> =
        ranked.iter().copied().filter(|candidate| !candidate.is_unjudged()).collect();
    let ranked = judged.as_slice();
    let far_enough = |&(better, worse): &(&Candidate, &Candidate)| {
        let margin = better.score - worse.score;
        margin > 0.0 && margin >= rules.min_margin
    };
    let limit = rules.pairs_per_prompt;
    let winners = || ranked.iter().copied().filter(|candidate| candidate.may_win());
    let best = winners().next();
    let below_best =
        best.into_iter().flat_map(|best| ranked.iter().map(move |other| (best, *other)));
    match rules.pairs {
        PairStrategy::BestWorst => {
            let pairs = winners().zip(ranked.iter().rev().copied());
            pairs.take(limit).take_while(far_enough).collect()
        }
        PairStrategy::BestSecond => below_best.filter(far_enough).take(limit).collect(),
        PairStrategy::BestRandom => {
            let mut below: Vec<_> = below_best.filter(far_enough).collect();
            below.shuffle(rng);
            below.truncate(limit);
            below
        }
        PairStrategy::MaxMinMargin => {
            let mut all = every(ranked, far_enough);
            // Stable sort: pairs with equal margins keep the order of their better and worse sides.
            all.sort_by(|a, b| (b.0.score - b.1.score).total_cmp(&(a.0.score - a.1.score)));
            all.truncate(limit);
            all
        }
        PairStrategy::AllAboveMargin => every(ranked, far_enough),
    }
}

fn every<'a>(
    ranked: &[&'a Candidate],
    fits: impl Fn(&(&Candidate, &Candidate)) -> bool,
) -> Vec<(&'a Candidate, &'a Candidate)> {
    let winners = ranked.iter().enumerate().filter(|(_, candidate)| candidate.may_win());
    winners
        .flat_map(|(at, better)| ranked[at + 1..].iter().map(|worse| (*better, *worse)))
        .filter(|pair| fits(pair))
        .collect()
}
