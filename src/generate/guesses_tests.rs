//! Speculation preserves the sampling distribution, compared with the exact softmax.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::decode::CpuDecoder;
use super::engine::{
    Answer, Draft, Guesser, Limits, Lookup, Prompt, Request, Scheduler, answer_requests,
};
use super::sampling::Sampling;
use super::tests::{Bytes, WIDE, golden, whole_forward};
use crate::model::transformer::Transformer;

const KEPT: usize = 4;
const SAMPLES: usize = 2000;

/// Probabilities of the likeliest tokens after `tokens` (the only ones that may be sampled), from a full-sequence
/// forward pass of the transformer.
fn shares(model: &Transformer, tokens: &[u32]) -> BTreeMap<u32, f64> {
    let logprobs = whole_forward(model, tokens);
    let mut ids: Vec<u32> = (0..logprobs.len() as u32).collect();
    ids.sort_by(|a, b| logprobs[*b as usize].total_cmp(&logprobs[*a as usize]));
    let weight = |id: u32| f64::from(logprobs[id as usize]).exp();
    let all: f64 = ids[..KEPT].iter().map(|&id| weight(id)).sum();
    ids[..KEPT].iter().map(|&id| (id, weight(id) / all)).collect()
}

/// Pearson's chi-square statistic of the tokens sampled after each answer prefix, and its degrees of freedom.
fn chi_square(model: &Transformer, prompt: &[u32], answers: &[Answer]) -> (f64, usize) {
    let mut counts: BTreeMap<&[u32], BTreeMap<u32, f64>> = BTreeMap::new();
    for answer in answers {
        for (place, &id) in answer.ids.iter().enumerate() {
            *counts.entry(&answer.ids[..place]).or_default().entry(id).or_default() += 1.0;
        }
    }
    let (mut statistic, mut freedom) = (0.0, 0);
    for (beginning, found) in counts {
        let expected = shares(model, &[prompt, beginning].concat());
        assert!(found.keys().all(|id| expected.contains_key(id)), "{found:?} of {expected:?}");
        let all: f64 = found.values().sum();
        for (id, share) in expected {
            let count = found.get(&id).copied().unwrap_or(0.0);
            statistic += (count - share * all).powi(2) / (share * all);
        }
        freedom += KEPT - 1;
    }
    (statistic, freedom)
}

/// The chi-square value exceeded by chance once in 10,000 (Wilson and Hilferty, 1931).
fn bound(freedom: usize) -> f64 {
    const NORMAL: f64 = 3.719; // The normal quantile of the same probability.
    let spread = 2.0 / (9.0 * freedom as f64);
    freedom as f64 * (1.0 - spread + NORMAL * spread.sqrt()).powi(3)
}

#[test]
fn guessed_tokens_follow_the_exact_softmax() {
    let checkpoint = golden("model_tied");
    let decoder: CpuDecoder = CpuDecoder::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let other = golden("model_untied");
    let other: CpuDecoder = CpuDecoder::new(&other.config, &other.weights).unwrap();
    let model = Transformer::new(&checkpoint.config, &checkpoint.weights).unwrap();
    let tokens: Vec<u32> = vec![40, 41, 42, 40, 41];
    let sampling = Sampling {
        num_samples: SAMPLES,
        max_new_tokens: 3,
        top_k: KEPT,
        seed: 12,
        ..Sampling::default()
    };
    let limits = Limits { max_batch: 64, cache_tokens: 66 * 64, ..WIDE };
    let guessers: [(&str, Option<Box<dyn Guesser + '_>>); 4] = [
        ("nobody", None),
        ("a look-up", Some(Box::new(Lookup::default()))),
        ("another model", Some(Box::new(Draft::new(&other, 256)))),
        ("the model itself", Some(Box::new(Draft::new(&decoder, 256)))),
    ];
    for (name, guesser) in guessers {
        let vocabulary = Bytes::default();
        let mut scheduler = Scheduler::new(&decoder, &vocabulary, limits);
        if let Some(guesser) = guesser {
            scheduler = scheduler.guessing(guesser, 2);
        }
        let prompt = Prompt { index: 0, tokens: tokens.clone() };
        let request = Request::new(prompt, Arc::new(sampling.clone()));
        let mut answers = Vec::new();
        answer_requests(&mut scheduler, [request].into_iter(), &mut |_, all| {
            answers = all;
            Ok(())
        })
        .unwrap();
        assert!(answers.len() == SAMPLES && answers.iter().all(|answer| answer.ids.len() == 3));
        let (statistic, freedom) = chi_square(&model, &tokens, &answers);
        assert_eq!(freedom, (1 + KEPT + KEPT * KEPT) * (KEPT - 1), "{name}");
        assert!(statistic < bound(freedom), "{name} guesses: {statistic} of {freedom}");
    }
}
