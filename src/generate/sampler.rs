//! Samples a token from one row of logits.
//!
//! The steps follow Hugging Face's order: bias and penalties, temperature, top-k, top-p, min-p. Grammar masking comes
//! before the temperature. Ties go to the smaller token id, so equal logits and equal draws give equal tokens
//! everywhere.

use std::cmp::Ordering;

use candle_core::Tensor;
use llguidance::toktrie::SimpleVob;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::engine::{Extras, Likely};
use super::sampling::Sampling;
use crate::error::{Error, Result};
use crate::ops::cpu::simd;
use crate::ops::head::log_sum_exp;
use crate::ops::sample::{Chance, Drawn, Likeliest, NoDraw};

/// A sampled token and its log-probabilities.
#[derive(Clone, Debug, PartialEq)]
pub struct Draw {
    /// The token.
    pub id: u32,
    /// Log-probability under the model alone: the log-softmax of the unmodified logits, in nats.
    pub logprob: f32,
    /// Log-probability under the sampling distribution, in nats; 0 if the choice was deterministic.
    pub sample_logprob: f32,
    /// The likeliest tokens under the model alone, if requested.
    pub top: Vec<Likely>,
}

impl From<(Drawn, Likeliest)> for Draw {
    fn from((Drawn { id, logprob, sample_logprob }, top): (Drawn, Likeliest)) -> Self {
        Self { id, logprob, sample_logprob, top }
    }
}

impl From<NoDraw> for Error {
    fn from(why: NoDraw) -> Self {
        match why {
            NoDraw::NotFinite => Self::run("the model's logits are not finite")
                .hint("check the checkpoint's weights for NaN, or lower the learning rate"),
            NoDraw::NothingAllowed => Self::run("no token may come next")
                .hint("the grammar or `logit_bias` leaves none; allow an end of the answer"),
        }
    }
}

/// Samples tokens with fixed settings. Holds only buffers: a draw depends on its arguments and the settings alone.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f32,
    top_p: f64,
    top_k: usize,
    min_p: f32,
    penalty: f32,
    presence: f32,
    frequency: f32,
    bias: Vec<(u32, f32)>,
    top: usize,
    /// Unnormalised probabilities, one per token.
    weights: Vec<f32>,
    kept: Vec<u32>,
    /// Tokens whose logits were modified, with their original logits; ordered by id.
    changed: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler with these settings.
    pub fn new(settings: &Sampling, extras: &Extras) -> Self {
        Self {
            temperature: settings.temperature as f32,
            top_p: settings.top_p,
            top_k: settings.top_k,
            min_p: settings.min_p as f32,
            penalty: settings.repetition_penalty as f32,
            presence: extras.presence_penalty,
            frequency: extras.frequency_penalty,
            bias: extras.logit_bias.clone(),
            top: extras.top_logprobs,
            weights: Vec::new(),
            kept: Vec::new(),
            changed: Vec::new(),
        }
    }

    /// The next draw as data for a decoder that samples itself; `None` if it depends on earlier tokens or a bias.
    pub(crate) fn chance(&self, rng: &ChaCha8Rng) -> Option<Chance> {
        if self.looks_back() || !self.bias.is_empty() {
            return None;
        }
        Some(Chance {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            key: rng.get_seed(),
            // Each draw consumes two words.
            draw: (rng.get_word_pos() / 2) as u64,
            top: self.top,
        })
    }

    /// Samples from a [`Chance`]: the same token as [`draw`](Self::draw) with the settings and generator it was made
    /// from.
    fn draw_by(
        logits: &mut [f32],
        (chance, allowed): &(Chance, Option<&SimpleVob>),
    ) -> Result<Draw> {
        let Chance { temperature, top_k, top_p, min_p, key, draw, top } = *chance;
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_word_pos(2 * u128::from(draw));
        let plain = Self::new(&Sampling::default(), &Extras::default());
        let mut sampler = Self { temperature, top_p, top_k, min_p, top, ..plain };
        sampler.draw(logits, (&[], 0), *allowed, &mut rng)
    }

    /// Advances a generator past a draw that was made elsewhere.
    pub(super) fn skip(&self, rng: &mut ChaCha8Rng) {
        if self.temperature != 0.0 {
            rng.set_word_pos(rng.get_word_pos() + 2);
        }
    }

    /// Whether a draw depends on earlier tokens.
    pub fn looks_back(&self) -> bool {
        let off = [(self.penalty, 1.0_f32), (self.presence, 0.0), (self.frequency, 0.0)];
        off.iter().any(|(value, off)| value.to_bits() != off.to_bits())
    }

    /// Samples one token. `logits`: `[V]`, overwritten. `history`: the tokens that penalties apply to, prompt first,
    /// and the index at which the answer begins. `allowed`: the tokens the grammar allows.
    ///
    /// # Errors
    /// Logits without a finite maximum (the model has diverged), or no allowed token.
    pub fn draw(
        &mut self,
        logits: &mut [f32],
        (history, answer): (&[u32], usize),
        allowed: Option<&SimpleVob>,
        rng: &mut impl Rng,
    ) -> Result<Draw> {
        let log_sum = finite_log_sum(logits)?;
        let top = likeliest(logits, log_sum, self.top, &mut self.kept);
        self.adjust(logits, history, answer);
        if let Some(allowed) = allowed {
            for (id, logit) in logits.iter_mut().enumerate() {
                if !allowed.is_allowed(id as u32) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        let top_logit = simd::max(logits);
        if top_logit == f32::NEG_INFINITY {
            return Err(NoDraw::NothingAllowed.into());
        }
        let (id, sample_logprob) = match self.temperature {
            0.0 => (argmax(logits), 0.0),
            _ => self.draw_by_chance(logits, top_logit, rng),
        };
        let as_it_came = match self.changed.binary_search_by_key(&id, |&(id, _)| id) {
            Ok(index) => self.changed[index].1,
            Err(_) => logits[id as usize],
        };
        Ok(Draw { id, logprob: as_it_came - log_sum, sample_logprob, top })
    }

    /// Applies the bias, then the penalties on tokens in the history.
    fn adjust(&mut self, logits: &mut [f32], history: &[u32], answer: usize) {
        self.changed.clear();
        if !self.looks_back() && self.bias.is_empty() {
            return;
        }
        let in_vocabulary = |id: u32| (id as usize) < logits.len();
        self.kept.clear();
        if self.looks_back() {
            distinct(&mut self.kept, history.iter().copied().filter(|&id| in_vocabulary(id)));
        }
        let biased = self.bias.iter().map(|&(id, _)| id).filter(|&id| in_vocabulary(id));
        self.changed
            .extend(self.kept.iter().copied().chain(biased).map(|id| (id, logits[id as usize])));
        self.changed.sort_unstable_by_key(|&(id, _)| id);
        self.changed.dedup_by_key(|&mut (id, _)| id);
        for &(id, bias) in &self.bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        for &id in &self.kept {
            let logit = &mut logits[id as usize];
            *logit = if *logit > 0.0 { *logit / self.penalty } else { *logit * self.penalty };
        }
        if self.presence != 0.0 || self.frequency != 0.0 {
            let answer = &history[answer.min(history.len())..];
            for &id in answer {
                if let Some(logit) = logits.get_mut(id as usize) {
                    *logit -= self.frequency;
                }
            }
            distinct(
                &mut self.kept,
                answer.iter().copied().filter(|&id| (id as usize) < logits.len()),
            );
            for &id in &self.kept {
                logits[id as usize] -= self.presence;
            }
        }
    }

    fn draw_by_chance(&mut self, logits: &[f32], top: f32, rng: &mut impl Rng) -> (u32, f32) {
        let scale = 1.0 / self.temperature;
        self.weights.clear();
        self.weights.extend(logits.iter().map(|&logit| (logit - top) * scale));
        simd::exp_sub(&mut self.weights, 0.0);
        for (weight, logit) in self.weights.iter_mut().zip(logits) {
            // The kernels' `exp` never reaches 0.
            *weight = if *logit == f32::NEG_INFINITY { 0.0 } else { *weight };
        }
        let chance: f64 = rng.random();
        if self.top_k == 0 && self.top_p >= 1.0 && self.min_p <= 0.0 {
            return pick_of_all(&self.weights, chance);
        }
        self.keep_likely();
        pick(&self.weights, self.kept.iter().copied(), chance)
    }

    /// Keeps in `kept` the tokens that pass top-k, top-p and min-p, ordered by id.
    fn keep_likely(&mut self) {
        let weights = &self.weights;
        let likelier = |a: &u32, b: &u32| by_weight(weights, *a, *b);
        self.kept.clear();
        let has_top_k = self.top_k > 0 && self.top_k < weights.len();
        if has_top_k {
            self.kept.extend(0..weights.len() as u32);
            self.kept.select_nth_unstable_by(self.top_k - 1, likelier);
            self.kept.truncate(self.top_k);
        }
        if self.top_p < 1.0 {
            if !has_top_k {
                likely_enough(weights, self.top_p, &mut self.kept);
            }
            self.kept.sort_unstable_by(likelier);
            let total = if has_top_k { sum(weights, &self.kept) } else { sum_all(weights) };
            let mut mass = 0.0;
            let needed = self
                .kept
                .iter()
                .position(|&id| {
                    mass += f64::from(weights[id as usize]);
                    mass >= self.top_p * total
                })
                .map_or(self.kept.len(), |last| last + 1);
            self.kept.truncate(needed);
        } else if !has_top_k {
            self.kept.extend(0..weights.len() as u32);
        }
        // The most likely token has weight 1.
        let floor = self.min_p;
        self.kept.retain(|&id| weights[id as usize] >= floor);
        self.kept.sort_unstable();
    }
}

/// Samples a token per row on the logits' device; errors are per row.
///
/// # Shapes
/// - `logits`: `[R, V]`, f32; `chances`: `[R]`, each with its allowed tokens, if restricted
///
/// # Errors
/// A device error.
pub(crate) fn draw_rows(
    logits: &Tensor,
    chances: &[(Chance, Option<&SimpleVob>)],
) -> Result<Vec<Result<Draw>>> {
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda() {
        let words = chances.iter().map(|(chance, mask)| (*chance, mask.map(SimpleVob::as_slice)));
        let chances: Vec<_> = words.collect();
        let drawn = crate::ops::cuda::launch::sample::on_cuda(logits, &chances)?;
        return Ok(drawn.into_iter().map(|drawn| Ok(drawn?.into())).collect());
    }
    let mut rows = logits.to_vec2::<f32>()?;
    let pairs = rows.iter_mut().zip(chances);
    Ok(pairs.map(|(row, chance)| Sampler::draw_by(row, chance)).collect())
}

/// Fills `kept` with the distinct ids, in order.
fn distinct(kept: &mut Vec<u32>, ids: impl Iterator<Item = u32>) {
    kept.clear();
    kept.extend(ids);
    kept.sort_unstable();
    kept.dedup();
}

/// Log-probability of one token, and the `count` likeliest tokens, under the model alone, in nats.
///
/// # Errors
/// Logits without a finite maximum.
pub(super) fn scores(logits: &[f32], id: u32, count: usize) -> Result<(f32, Vec<Likely>)> {
    let log_sum = finite_log_sum(logits)?;
    let top = likeliest(logits, log_sum, count, &mut Vec::new());
    Ok((logits[id as usize] - log_sum, top))
}

fn finite_log_sum(logits: &[f32]) -> Result<f32> {
    let log_sum = log_sum_exp(logits);
    if log_sum.is_finite() {
        return Ok(log_sum);
    }
    Err(NoDraw::NotFinite.into())
}

/// The likeliest tokens; ties go to the smaller id. `ids` is a buffer.
fn likeliest(logits: &[f32], log_sum: f32, count: usize, ids: &mut Vec<u32>) -> Vec<Likely> {
    let count = count.min(logits.len());
    if count == 0 {
        return Vec::new();
    }
    ids.clear();
    ids.extend(0..logits.len() as u32);
    let likelier = |a: &u32, b: &u32| by_weight(logits, *a, *b);
    ids.select_nth_unstable_by(count - 1, likelier);
    ids.truncate(count);
    ids.sort_unstable_by(likelier);
    ids.iter().map(|&id| (id, logits[id as usize] - log_sum)).collect()
}

/// Descending weight, then ascending id.
fn by_weight(weights: &[f32], a: u32, b: u32) -> Ordering {
    weights[b as usize].total_cmp(&weights[a as usize]).then(a.cmp(&b))
}

/// Collects the likeliest tokens until they hold `share` of the weight, lowering a threshold instead of sorting the
/// whole vocabulary.
fn likely_enough(weights: &[f32], share: f64, kept: &mut Vec<u32>) {
    let total = sum_all(weights);
    let mut floor = 1e-2_f32;
    loop {
        kept.clear();
        kept.extend((0..weights.len() as u32).filter(|&id| weights[id as usize] >= floor));
        if sum(weights, kept) >= share * total || kept.len() == weights.len() {
            return;
        }
        floor = if floor < 1e-30 { 0.0 } else { floor * 1e-3 };
    }
}

fn sum(weights: &[f32], kept: &[u32]) -> f64 {
    kept.iter().map(|&id| f64::from(weights[id as usize])).sum()
}

fn sum_all(weights: &[f32]) -> f64 {
    weights.iter().map(|&weight| f64::from(weight)).sum()
}

/// Inverse-CDF sampling over `ids` at `chance` in [0, 1). Returns the token and its log-probability.
fn pick(weights: &[f32], ids: impl Iterator<Item = u32> + Clone, chance: f64) -> (u32, f32) {
    let total: f64 = ids.clone().map(|id| f64::from(weights[id as usize])).sum();
    let mut left = chance * total;
    let mut chosen = 0;
    for id in ids {
        let weight = f64::from(weights[id as usize]);
        if weight > 0.0 {
            chosen = id;
            if left < weight {
                break;
            }
        }
        left -= weight;
    }
    (chosen, (f64::from(weights[chosen as usize]) / total).ln() as f32)
}

/// [`pick`] over all tokens, skipping whole chunks of the vocabulary by their sums.
fn pick_of_all(weights: &[f32], chance: f64) -> (u32, f32) {
    const PIECE: usize = 256;
    let sum = |piece: &[f32]| piece.iter().map(|&weight| f64::from(weight)).sum::<f64>();
    let sums: Vec<f64> = weights.chunks(PIECE).map(sum).collect();
    let total: f64 = sums.iter().sum();
    let mut left = chance * total;
    // Rounding must not move past the last chunk that has any weight.
    let last = sums.iter().rposition(|&sum| sum > 0.0).unwrap_or(0);
    let mut piece = 0;
    while piece < last && left >= sums[piece] {
        left -= sums[piece];
        piece += 1;
    }
    let first = piece * PIECE;
    let mut chosen = first;
    for (offset, &weight) in weights[first..].iter().take(PIECE).enumerate() {
        if weight > 0.0 {
            chosen = first + offset;
            if left < f64::from(weight) {
                break;
            }
        }
        left -= f64::from(weight);
    }
    (chosen as u32, (f64::from(weights[chosen]) / total).ln() as f32)
}

/// Index of the largest entry; the first one on ties. NaN never wins.
pub fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (index, value) in row.iter().enumerate() {
        if *value > row[best] || row[best].is_nan() {
            best = index;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn probabilities(logits: &[f32], temperature: f64) -> Vec<f64> {
        let exp: Vec<f64> = logits.iter().map(|&x| (f64::from(x) / temperature).exp()).collect();
        let total: f64 = exp.iter().sum();
        exp.iter().map(|x| x / total).collect()
    }

    /// Draws 20 000 tokens and compares counts with `expected` by a chi-square statistic. The bound is the 99.9 %
    /// point for up to 8 degrees of freedom; the seed is fixed, so the outcome is too.
    #[track_caller]
    fn check(settings: &Sampling, logits: &[f32], expected: &[f64]) {
        let mut sampler = Sampler::new(settings, &Extras::default());
        let mut rng = Stream::new(11, "test").at(0, 0);
        let mut counts = vec![0_u32; logits.len()];
        let draws = 20_000;
        for _ in 0..draws {
            let draw = sampler.draw(&mut logits.to_vec(), (&[], 0), None, &mut rng).unwrap();
            counts[draw.id as usize] += 1;
            let probability = expected[draw.id as usize];
            assert!((f64::from(draw.sample_logprob) - probability.ln()).abs() < 1e-5);
        }
        let mut chi_square = 0.0;
        for (count, share) in counts.iter().zip(expected) {
            let mean = share * f64::from(draws);
            assert!(mean > 0.0 || *count == 0, "a token without probability was drawn");
            if mean > 0.0 {
                chi_square += (f64::from(*count) - mean).powi(2) / mean;
            }
        }
        assert!(chi_square < 26.1, "chi-square {chi_square}, counts {counts:?}");
    }

    const LOGITS: [f32; 6] = [0.0, 2.0, 1.0, -1.0, 2.0, -3.0];

    fn renormalised(keep: &[usize]) -> Vec<f64> {
        let all = probabilities(&LOGITS, 1.0);
        let total: f64 = keep.iter().map(|&id| all[id]).sum();
        (0..6).map(|id| if keep.contains(&id) { all[id] / total } else { 0.0 }).collect()
    }

    #[test]
    fn draws_follow_the_tempered_softmax() {
        check(&Sampling::default(), &LOGITS, &probabilities(&LOGITS, 1.0));
        let warm = Sampling { temperature: 2.5, ..Sampling::default() };
        check(&warm, &LOGITS, &probabilities(&LOGITS, 2.5));
    }

    // The softmax of LOGITS is 0.0508, 0.3757, 0.1382, 0.0187, 0.3757, 0.0025 (rounded; sum 0.9617 + ...).
    #[test]
    fn top_k_keeps_k_and_breaks_ties_by_id() {
        check(&Sampling { top_k: 3, ..Sampling::default() }, &LOGITS, &renormalised(&[1, 2, 4]));
        check(&Sampling { top_k: 1, ..Sampling::default() }, &LOGITS, &renormalised(&[1]));
        check(
            &Sampling { top_k: 60, ..Sampling::default() },
            &LOGITS,
            &renormalised(&[0, 1, 2, 3, 4, 5]),
        );
    }

    #[test]
    fn top_p_keeps_the_fewest_tokens_that_reach_the_mass() {
        // 1 and 4 hold 0.78 together; 2 makes it 0.92.
        check(&Sampling { top_p: 0.7, ..Sampling::default() }, &LOGITS, &renormalised(&[1, 4]));
        check(&Sampling { top_p: 0.9, ..Sampling::default() }, &LOGITS, &renormalised(&[1, 2, 4]));
        check(&Sampling { top_p: 0.01, ..Sampling::default() }, &LOGITS, &renormalised(&[1]));
    }

    #[test]
    fn min_p_is_relative_to_the_most_likely_token() {
        // e^-1 = 0.37 of the maximum passes 0.3, e^-2 = 0.135 does not.
        check(&Sampling { min_p: 0.3, ..Sampling::default() }, &LOGITS, &renormalised(&[1, 2, 4]));
        check(&Sampling { min_p: 1.0, ..Sampling::default() }, &LOGITS, &renormalised(&[1, 4]));
    }

    #[test]
    fn top_p_applies_to_the_tokens_left_by_top_k() {
        // Of {1, 2, 4} renormalised, 1 and 4 hold 0.84.
        let both = Sampling { top_k: 3, top_p: 0.8, ..Sampling::default() };
        check(&both, &LOGITS, &renormalised(&[1, 4]));
    }

    #[test]
    fn greedy_takes_the_first_tie_and_reports_untempered_log_probability() {
        let mut sampler = Sampler::new(&Sampling::greedy(1), &Extras::default());
        let mut rng = Stream::new(0, "test").at(0, 0);
        let draw = sampler.draw(&mut LOGITS.to_vec(), (&[], 0), None, &mut rng).unwrap();
        let expected = probabilities(&LOGITS, 1.0)[1].ln() as f32;
        assert_eq!((draw.id, draw.sample_logprob.to_bits()), (1, 0.0_f32.to_bits()));
        assert!((draw.logprob - expected).abs() < 1e-6);
    }

    #[test]
    fn repetition_penalty_applies_once_to_logits_of_either_sign() {
        let settings = Sampling { repetition_penalty: 4.0, ..Sampling::greedy(1) };
        let mut sampler = Sampler::new(&settings, &Extras::default());
        let mut rng = Stream::new(0, "test").at(0, 0);
        let mut logits = LOGITS.to_vec();
        // 1 and 4 fall from 2 to 0.5, 3 from -1 to -4: token 2 at 1.0 wins. An id outside the vocabulary is ignored.
        let draw = sampler.draw(&mut logits, (&[1, 4, 3, 1, 99], 5), None, &mut rng).unwrap();
        assert_eq!(draw.id, 2);
        assert_eq!(logits, [0.0, 0.5, 1.0, -4.0, 0.5, -3.0]);
        // The reported log-probability is the model's own, even for a penalised token.
        let settings = Sampling { repetition_penalty: 1.01, ..Sampling::greedy(1) };
        let draw = Sampler::new(&settings, &Extras::default())
            .draw(&mut LOGITS.to_vec(), (&[4, 1], 2), None, &mut rng)
            .unwrap();
        assert!((f64::from(draw.logprob) - probabilities(&LOGITS, 1.0)[1].ln()).abs() < 1e-6);
    }

    #[test]
    fn non_finite_logits_are_an_error() {
        let mut sampler = Sampler::new(&Sampling::default(), &Extras::default());
        let mut rng = Stream::new(0, "test").at(0, 0);
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(sampler.draw(&mut [0.0, bad, 1.0], (&[], 0), None, &mut rng).is_err());
        }
        assert!(sampler.draw(&mut [f32::NEG_INFINITY; 3], (&[], 0), None, &mut rng).is_err());
        assert_eq!(
            sampler.draw(&mut [f32::NEG_INFINITY, 0.0], (&[], 0), None, &mut rng).unwrap().id,
            1
        );
    }

    #[test]
    fn bias_and_penalties_change_the_draw_but_not_the_log_probability() {
        let extras = Extras {
            logit_bias: vec![(5, 100.0)],
            presence_penalty: 60.0,
            frequency_penalty: 30.0,
            top_logprobs: 3,
            ..Extras::default()
        };
        let mut sampler = Sampler::new(&Sampling::greedy(1), &extras);
        let mut rng = Stream::new(0, "test").at(0, 0);
        let expected = |id: usize| probabilities(&LOGITS, 1.0)[id].ln();
        // Token 5 costs nothing if in the prompt, 90 if once in the answer, 120 if twice: -3 + 100 - 120 loses to 2.
        for (history, id) in [(&[5, 9][..], 5), (&[5, 9, 5], 5), (&[5, 9, 5, 5], 1)] {
            let draw = sampler.draw(&mut LOGITS.to_vec(), (history, 2), None, &mut rng).unwrap();
            assert_eq!(draw.id, id, "{history:?}");
            assert!((f64::from(draw.logprob) - expected(id as usize)).abs() < 1e-6);
            assert_eq!(draw.top.iter().map(|&(id, _)| id).collect::<Vec<_>>(), [1, 4, 2]);
            assert!((f64::from(draw.top[2].1) - expected(2)).abs() < 1e-6);
        }
    }

    #[test]
    fn only_allowed_tokens_are_drawn() {
        let mut allowed = SimpleVob::alloc(6);
        for id in [0, 2] {
            allowed.allow_token(id);
        }
        let mut sampler = Sampler::new(&Sampling::default(), &Extras::default());
        let mut rng = Stream::new(0, "test").at(0, 0);
        let expected = renormalised(&[0, 2]);
        for _ in 0..200 {
            let draw =
                sampler.draw(&mut LOGITS.to_vec(), (&[], 0), Some(&allowed), &mut rng).unwrap();
            assert!(
                (f64::from(draw.sample_logprob) - expected[draw.id as usize].ln()).abs() < 1e-5
            );
        }
        let nothing = SimpleVob::alloc(6);
        let error = sampler.draw(&mut LOGITS.to_vec(), (&[], 0), Some(&nothing), &mut rng);
        assert!(error.unwrap_err().to_string().contains("no token may come next"));
    }

    #[test]
    fn every_piece_of_a_large_vocabulary_can_be_drawn() {
        let weights: Vec<f32> = (0..1000).map(|id| if id % 3 == 0 { 0.0 } else { 1.0 }).collect();
        let total = 666.0;
        for (place, &id) in [1_u32, 2, 4, 254, 256, 511, 512, 998].iter().enumerate() {
            let before = (0..id).filter(|id| id % 3 != 0).count() as f64;
            for chance in [(before + 0.01) / total, (before + 0.99) / total] {
                let (found, logprob) = pick_of_all(&weights, chance);
                assert_eq!(found, id, "{place}");
                assert!((f64::from(logprob) + f64::ln(total)).abs() < 1e-5);
            }
        }
        assert_eq!(pick_of_all(&weights, 1.0).0, 998);
    }
}
